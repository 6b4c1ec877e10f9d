"""What the documents say is what was measured."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from places import BENCHMARKS, ROOT, TRUST

from codebook_tools.models.registry import CUSTOM, FAMILIES
from codebook_tools.workflows.comparison_rows import Comparison, Row, markdown_table, table_rows

DOCUMENTS = [*ROOT.glob("*.md"), *(path for path in (ROOT / "docs").glob("*.md") if path.name != "cli.md")]
RESULTS = BENCHMARKS / "results"
TABLES = sorted((RESULTS / "compare").glob("*/table.md"))
sys.path += [str(TRUST), str(BENCHMARKS / "gpu")]


def quoted() -> Iterator[tuple[str, str, Path]]:
    """A document, the mark in it, and the file of results that follows the mark."""
    yield from (("comparison.md", f"table: {path.parent.name}", path) for path in TABLES)
    yield from (("finetuning.md", f"recipes: {path.stem}", path) for path in (RESULTS / "recipes").glob("*.md"))
    sweeps = (RESULTS / "sweep").glob("*/table.md")
    yield from (("choosing-k.md", f"sweep: {path.parent.name}", path) for path in sweeps)
    yield "trust.md", "trust", RESULTS / "trust.md"


@pytest.mark.parametrize(("document", "mark", "path"), sorted(quoted()))
def test_a_table_of_the_documents_is_that_of_the_results(document: str, mark: str, path: Path) -> None:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    assert f"<!-- {mark} -->\n{path.read_text(encoding='utf-8')}<!-- end -->" in text


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
