"""Traces as curves."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from places import BENCHMARKS

from codebook_tools.errors import CodebookError
from codebook_tools.report.html.curves import PANELS, draw_panels, draw_traces

pytestmark = pytest.mark.packaging

TRACE = [{"step": step, **dict.fromkeys(PANELS, 7.0 / (1 + step)), "loss": None} for step in (0, 1, 10, 100)]


def test_each_trace_is_a_line_of_its_values_in_each_panel() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(14, 3.2))
    draw_panels({"a": TRACE, "b": TRACE[:2]}, figure)
    assert [axes.get_title() for axes in figure.axes] == [*PANELS.values()]
    for axes in figure.axes:
        first, second = axes.lines
        assert first.get_xdata().tolist() == [0, 1, 10, 100] and second.get_ydata().tolist() == [7.0, 3.5]
        places = axes.transData.transform([(step, 1.0) for step in (0, 1, 10, 100)])[:, 0]
        assert min(places[1:] - places[:-1]) > 20, "pixels: the early steps are told apart"


def test_a_result_of_a_benchmark_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    plain, output = tmp_path / "plain.json", tmp_path / "trace.png"
    plain.write_text(json.dumps({"command": "refit", "trace": TRACE}))
    arguments = [BENCHMARKS / "results" / "demo.json", plain, "--output", output]
    monkeypatch.setattr(sys, "argv", ["curve.py", *map(str, arguments)])
    runpy.run_path(str(BENCHMARKS / "curve.py"), run_name="__main__")
    assert output.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CodebookError, match=r"codebook-tools\[report\]"):
        draw_traces({"a": TRACE}, tmp_path / "x.png")
