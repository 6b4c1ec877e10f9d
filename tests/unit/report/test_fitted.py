"""Tables in narrow terminals: every figure whole on one line, with and without color."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from codebook_cli.output import Screen
from rich.color import ColorSystem
from rich.console import Console

from codebook_tools.diagnosis.finding import Check
from codebook_tools.evaluation.tables import COLUMNS, COLUMNS_OF_LATENTS
from codebook_tools.report.terminal.diagnosis import _CheckLines
from codebook_tools.report.terminal.fitted import FittedTable, Prose
from codebook_tools.report.terminal.tables import comparison_table
from codebook_tools.workflows.comparison_rows import Spread, Summary, table_rows

narrow = pytest.mark.parametrize("width", [80, 60])
colored = pytest.mark.parametrize("color", [False, True], ids=["plain", "color"])


def printed(what: Any, width: int, color: bool = False, screen: type[Console] = Screen) -> list[str]:
    """The lines on a terminal, without escape sequences."""
    console = screen(width=width)
    console.file = file = io.StringIO()
    console._force_terminal, console._color_system = color, ColorSystem.STANDARD if color else None
    console.print(what)
    return re.sub(r"\x1b\[[\d;]*m", "", file.getvalue()).splitlines()


def summary(strategy: str, seeds: int, error: str | None = None) -> Summary:
    spread = 0.001234 if seeds > 1 else None
    stages = {
        stage: {figure: Spread(value, spread) for figure, value in VALUES.items()}
        for stage in ("before", "surgery", "finetuned")
    }
    kept = {"surgery": 1, "finetuned": seeds - 1} if seeds > 1 else {"surgery": 1}
    return Summary(strategy, 16384, seeds, stages, kept, Spread(1234.5, spread), 123_456_789, error)


VALUES = {"mse": 0.012345, "used": 16384.0, "perplexity": 12345.6, "coverage": 0.987}
NAMES = ("untouched", "untouched+same-recipe", "refit+frozen-encoder", "kmeans++-seeds", "prune")


@colored
@narrow
@pytest.mark.parametrize("seeds", [1, 3])
def test_every_figure_of_a_comparison_stands_whole_in_one_line(seeds: int, width: int, color: bool) -> None:
    summaries = [summary(name, seeds) for name in NAMES] + [summary("grow", seeds, "k is less than the codes in use")]
    comparison: Any = SimpleNamespace(
        summaries=summaries, outputs={"rows": "x.compare/rows.json", "table": "x.compare/table.md"}, warnings=()
    )
    lines = printed(comparison_table(comparison), width, color)
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    text = " ".join(lines)
    left_out = re.search(r"too wide for this terminal: (.*); x\.compare/table\.md has all columns", text)
    assert left_out is not None
    head, *rows = table_rows(summaries)
    for column, heading in enumerate(head):
        if heading in left_out[1].split(", "):
            continue
        for row in rows[:-1]:
            assert any(line.startswith(row[0]) and f" {row[column]} " in f" {line} " for line in lines), heading
    assert "mse fine-tuned" not in left_out[1] and "bytes" in left_out[1]
    assert any(line.startswith("grow") and "not possible" in line for line in lines)


def test_a_wide_terminal_and_a_pipe_get_all_columns() -> None:
    lines = table_rows([summary(name, 3) for name in NAMES])
    for width in (300, 10_000):
        (head, *rows) = printed(FittedTable(lines, fixed=2, importance=("bytes",)), width)
        assert all(heading in head for heading in lines[0])
        assert [row.split()[0] for row in rows] == [*NAMES]


@narrow
def test_columns_without_an_importance_follow_below(width: int) -> None:
    phases = [f"{i}, {name}" for i, name in enumerate(("prune", "refit", "quantize", "finetune"))]
    lines = [("", *phases), ("codes used", *["16384 of 16384 (100.0%)"] * 4), ("mse", *["0.012345"] * 4)]
    shown = printed(FittedTable(lines), width)
    assert max(map(len, shown)) <= width
    assert sum(line.count("16384 of 16384 (100.0%)") for line in shown) == 4
    assert sum(line.startswith("codes used") for line in shown) == sum(line.startswith("mse") for line in shown) == 2


def test_columns_without_a_figure_go_first() -> None:
    lines = [("strategy", "K", "mse", "used"), ("prune", "16", "–", "12"), ("refit", "16", "", "13")]
    shown = printed(FittedTable(lines, fixed=2, importance=("mse", "used"), elsewhere="t.md has all"), 18)
    assert [line.split() for line in shown[:3]] == [
        ["strategy", "K", "used"],
        ["prune", "16", "12"],
        ["refit", "16", "13"],
    ]


@colored
@narrow
def test_sentences_and_the_evidence_of_a_check_are_wrapped_between_words(width: int, color: bool) -> None:
    words = [f"{i}.{i:04d}e-05" for i in range(40)]
    check = Check("found", 0.5, 0.1, " ".join(words), "dead-codes", "codebook prune")
    for what in (Prose(" ".join(words), "dim"), _CheckLines(check)):
        lines = printed(what, width, color)
        assert max(map(len, lines)) <= width
        assert [word for line in lines for word in line.split() if word in words] == words


def test_the_columns_of_a_comparison_all_have_an_importance() -> None:
    from codebook_tools.report.terminal.tables import _COMPARISON_COLUMNS

    assert {heading for heading, *_ in (*COLUMNS, *COLUMNS_OF_LATENTS)} | {"kept", "seconds", "bytes"} == set(
        _COMPARISON_COLUMNS
    )
