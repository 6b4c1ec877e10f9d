"""The usage of codes in a terminal."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from codebook_tools.report.terminal.histogram import UsageLines, bars


@pytest.mark.parametrize(
    ("counts", "width", "expected"),
    [([0, 255, 0, 15], 4, "█▅"), ([3, 1, 0, 0], 2, "█"), ([1] * 10, 5, "█████"), ([0, 0], 2, ""), ([7], 5, "█")],
)
def test_the_most_used_stand_first_and_dead_ones_leave_nothing(counts: list[int], width: int, expected: str) -> None:
    """log(1 + 15) is half of log(1 + 255): the fifth of eight heights."""
    assert bars(torch.tensor(counts), width, "▁▂▃▄▅▆▇█") == expected


@pytest.mark.parametrize(("encoding", "mark"), [("utf-8", "█"), ("ascii", "%")])
def test_a_console_without_blocks_has_plain_letters(encoding: str, mark: str) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=40)
    console.print(UsageLines({"before": torch.tensor([5, 0]), "after surgery": torch.ones(200)}))
    file.seek(0)
    assert file.read().splitlines() == [f"before         {mark}", f"after surgery  {mark * 25}"]
