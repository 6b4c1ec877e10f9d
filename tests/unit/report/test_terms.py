"""Terms: each is explained once, where it first stands, with the line of the glossary."""

from __future__ import annotations

from pathlib import Path

import pytest

from codebook_tools.evaluation.figures import CodebookUse, Measurement, figures_of
from codebook_tools.evaluation.terms import TERMS
from codebook_tools.report.html.page import Listing, Page, Table, html
from codebook_tools.report.html.terms import explanations
from codebook_tools.strategies.comparison_entries import ENTRIES

GLOSSARY = Path(__file__).parents[3] / "docs" / "glossary.md"


@pytest.mark.parametrize("term", TERMS)
def test_the_glossary_has_the_same_line(term: str) -> None:
    assert f"- **{term}**: {TERMS[term]}\n" in GLOSSARY.read_text(encoding="utf-8")


def test_each_figure_and_each_row_of_a_comparison_is_explained() -> None:
    figures = [figure.label for kind in (CodebookUse, Measurement) for figure in figures_of(kind).values()]
    for words in [*filter(None, figures), *ENTRIES]:
        (lines,) = explanations([words])
        assert lines, words


def test_a_term_is_explained_once_with_the_terms_of_its_line() -> None:
    first, second, third = explanations(["5 bits per token", "The perplexity of 3 centroids", "Tokens/bits.png"])
    assert {"bits per token", "perplexity", "token", "code", "codebook", "latents", "K"} <= first.keys()
    assert second.keys() == {"centroid"} and third == {}


@pytest.mark.parametrize(
    ("text", "term"), [("k-means", "K"), ("because", "codes used"), ("demo.prune-k3.safetensors", "prune")]
)
def test_a_part_of_a_word_or_of_a_path_is_no_term(text: str, term: str) -> None:
    assert term not in explanations([text])[0]


def test_a_page_explains_a_term_below_the_part_where_it_first_stands() -> None:
    parts = [
        Listing("Settings", {"distortion": "2"}),
        Table("First", ("", "before"), (("coverage", "0.5"),)),
        Table("Second", ("", "before"), (("coverage", "0.7"),)),
    ]
    text = html(Page("title", "It worked.", parts, "codebook measure"))
    assert text.count("<dt>coverage</dt>") == 1 and "<dt>distortion</dt> <dd>" not in text.replace("<dd>2</dd>", "")
    assert text.index("First") < text.index("<dt>coverage</dt>") < text.index("Second")
