"""What the documents say is what was measured."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from places import ROOT

from codebook_tools.models.registry import CUSTOM, FAMILIES
from codebook_tools.workflows.comparison_rows import Comparison, Row, markdown_table, table_rows

DOCUMENTS = [*ROOT.glob("*.md"), *(path for path in (ROOT / "docs").glob("*.md") if path.name != "cli.md")]
RESULTS = ROOT / "benchmarks" / "results"
RECIPES = sorted((RESULTS / "recipes").glob("*.md"))
SWEEPS = sorted((RESULTS / "sweep").glob("*/table.md"))
TABLES = sorted((RESULTS / "compare").glob("*/table.md"))
sys.path.append(str(ROOT / "benchmarks" / "trust"))


def named(path: Path) -> str:
    return path.parent.name


@pytest.mark.parametrize("path", TABLES, ids=named)
def test_a_table_of_the_documents_is_that_of_the_results(path: Path) -> None:
    text = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert f"<!-- table: {named(path)} -->\n{path.read_text(encoding='utf-8')}<!-- end -->" in text


@pytest.mark.parametrize("path", TABLES, ids=named)
def test_a_table_is_that_of_its_rows(path: Path) -> None:
    found = json.loads(path.with_name("rows.json").read_text())["rows"]
    rows = tuple(map(Row.from_json, found))
    summaries = Comparison(command="compare", model="", family="", settings={}, seed=0, rows=rows).summaries
    lines = {" | ".join(line) for line in table_rows(summaries)}
    shown = [line for line in path.read_text(encoding="utf-8").splitlines()[2:] if line.startswith("| ")]
    # A row that could not be done is in the table alone.
    assert {line for line in shown if "not possible" not in line} <= {f"| {line} |" for line in lines}
    assert markdown_table(summaries).splitlines()[:2] == path.read_text(encoding="utf-8").splitlines()[:2]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_those_of_the_results(path: Path) -> None:
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    assert f"<!-- recipes: {path.stem} -->\n{path.read_text(encoding='utf-8')}<!-- end -->" in text


@pytest.mark.parametrize("path", SWEEPS, ids=named)
def test_sweeps_are_those_of_the_results(path: Path) -> None:
    text = (ROOT / "docs" / "choosing-k.md").read_text(encoding="utf-8")
    assert f"<!-- sweep: {named(path)} -->\n{path.read_text(encoding='utf-8')}<!-- end -->" in text


def test_the_counts_of_trust_are_those_of_the_results() -> None:
    found = json.loads((RESULTS / "trust.json").read_text())
    counted = (RESULTS / "trust.md").read_text(encoding="utf-8")
    assert import_module("record").table(found) == counted
    text = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    assert f"<!-- trust -->\n{counted}<!-- end -->" in text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


def test_every_family_has_a_row_whose_tests_are_there() -> None:
    """A row may say "the same" for the tests of the row above it."""
    path = ROOT / "docs" / "families.md"
    rows = [line.split(" | ") for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"\| [`l]", line)]
    named_families = {name for cells in rows for name in re.findall(r"`([\w-]+)`", cells[0])}
    assert {*FAMILIES, CUSTOM} <= named_families
    assert all(cells[-1].startswith(("the same", "[test_")) for cells in rows)
    tests = [path.parent / target for cells in rows for target in re.findall(r"\]\(([^)]+)\)", cells[-1])]
    assert tests and all(test.exists() for test in tests)
