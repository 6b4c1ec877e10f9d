"""What the documents say is what was measured."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from places import BENCHMARKS, ROOT, TRUST

from codebook_tools.models.registry import CUSTOM, FAMILIES
from codebook_tools.workflows.comparison_rows import Comparison, Row, markdown_table, table_rows

DOCUMENTS = [*ROOT.glob("*.md"), *(path for path in (ROOT / "docs").glob("*.md") if path.name != "cli.md")]
RESULTS = BENCHMARKS / "results"
# Of comparisons; that of peers has other columns, and its own test.
TABLES = sorted(path for path in (RESULTS / "compare").glob("*/table.md") if path.parent.name != "peers")
sys.path += [str(BENCHMARKS), str(TRUST), str(BENCHMARKS / "gpu")]
excerpts = import_module("excerpts")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_of_a_document_are_those_of_the_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert excerpts.filled(text) == text


def test_each_table_of_the_results_is_in_a_document_or_linked_from_one() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    tables = [path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.md")]
    assert [name for name in tables if f"results/{name}" not in text and f"excerpt: {name[:-3]} -->" not in text] == []


def test_an_excerpt_takes_named_rows_and_columns() -> None:
    selection = "compare/cifar10-2000, compare/fashion | K; strategy; used | prune 86;\n refit 32"
    assert excerpts.excerpt(selection).splitlines() == [
        "| K | strategy | used |",
        "| ---: | --- | ---: |",
        "| 86 | prune | 86.0 ± 0.0 |",
        "| 32 | refit | 32.0 ± 0.0 |",
    ]
    before, after = (f"<!-- excerpt: trust -->\n{table}<!-- end -->" for table in ("", excerpts.excerpt("trust")))
    assert excerpts.filled(before) == excerpts.filled(after) == after


@pytest.mark.parametrize(
    "selection",
    [
        "compare/demo | strategy; usage | prune",
        "compare/demo | strategy | refit",
        "compare/demo | strategy | pruned",
        "compare/demo, recipes/demo | mse | prune",
    ],
)
def test_an_excerpt_that_is_ambiguous_or_not_there_is_an_error(selection: str) -> None:
    with pytest.raises(ValueError, match=r"usage|refit|pruned|columns"):
        excerpts.excerpt(selection)


def test_an_excerpt_without_an_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="end"):
        excerpts.filled("<!-- excerpt: trust -->\n")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.parent.name)
def test_a_table_is_that_of_its_rows(path: Path) -> None:
    rows = tuple(map(Row.from_json, json.loads(path.with_name("rows.json").read_text())["rows"]))
    summaries = Comparison(command="compare", model="", family="", settings={}, seed=0, rows=rows).summaries
    lines = {f"| {' | '.join(line)} |" for line in table_rows(summaries)}
    head, rule, *table = path.read_text(encoding="utf-8").splitlines()
    # A row that could not be done is in the table alone.
    assert {line for line in table if line.startswith("| ") and "not possible" not in line} <= lines
    assert markdown_table(summaries).splitlines()[:2] == [head, rule]


def test_the_counts_of_trust_are_those_of_the_results() -> None:
    counted = json.loads((RESULTS / "trust.json").read_text())
    assert import_module("record").table(counted) == (RESULTS / "trust.md").read_text(encoding="utf-8")


def test_the_figures_of_a_gpu_are_those_of_the_results() -> None:
    tables, page = import_module("tables"), (ROOT / "docs" / "performance.md").read_text()
    assert page.partition(tables.BEGIN)[2].partition(tables.END)[0] == tables.section()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


def test_every_family_has_a_row_whose_tests_are_there() -> None:
    """A row may say "the same" for the tests of the row above it; links are tested above."""
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| [`l]", line)]
    assert {*FAMILIES, CUSTOM} <= {name for cells in rows for name in re.findall(r"`([\w-]+)`", cells[0])}
    assert all(cells[-1].startswith(("the same", "[test_")) for cells in rows)


def words(path: Path) -> int:
    return sum(any(map(str.isalnum, word)) for word in path.read_text(encoding="utf-8").split())


def test_the_documents_are_short() -> None:
    """What people read before they use the tool; the reference of the command line is generated, and not in it."""
    documents = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
    assert words(ROOT / "README.md") <= 800
    assert words(ROOT / "docs" / "architecture.md") <= 1200
    assert sum(map(words, documents)) <= 14_000
