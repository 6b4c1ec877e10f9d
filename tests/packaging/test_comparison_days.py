"""Rows of a comparison that are not run again are named, with their day."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from places import BENCHMARKS

from codebook_tools.workflows.comparison_rows import Row, RowStore

pytestmark = pytest.mark.packaging

sys.path.append(str(BENCHMARKS))
compare = import_module("compare")
ROW = Row("prune", 4, 0, dict.fromkeys(("before", "surgery", "finetuned")), None, 1.0, 10, None, "0123456789abcdef")


def test_the_day_of_a_row_is_that_of_the_summary_else_that_of_the_file(tmp_path: Path) -> None:
    assert compare.days(tmp_path) == {}
    store = RowStore(tmp_path)
    store.add(ROW)
    store.add(replace(ROW, seed=1))
    os.utime(tmp_path / "rows.json", (10**9, 10**9))  # 2001-09-09, whatever the time zone
    first, second = (compare.label(row) for row in store.rows)
    assert (first, second) == ("prune, K 4, seed 0 (01234567)", "prune, K 4, seed 1 (01234567)")
    (tmp_path / "summary.json").write_text(json.dumps({"made": {first: "2020-02-02"}}))
    days = compare.days(tmp_path)
    assert days[first] == "2020-02-02" and days[second] in ("2001-09-08", "2001-09-09")


def test_old_rows_are_said_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(compare, "RUNS", {"few": compare.Run({64: ("untouched", "prune")}, steps=0)})
    monkeypatch.setattr(compare.Run, "request", lambda self, shared: compare.Request(limit=60))
    compare.run("few", "", 1)
    assert "old ones" not in capsys.readouterr().err
    summary = tmp_path / "few" / "summary.json"
    made = json.loads(summary.read_text())["made"]
    assert len(made) == 2
    summary.write_text(json.dumps({"made": dict.fromkeys(made, "2020-02-02")}))
    compare.run("few", "", 1)
    err = capsys.readouterr().err
    assert "2 of 2 rows are old ones, not run again: " in err and err.count(" of 2020-02-02") == 2
    assert json.loads(summary.read_text())["made"] == dict.fromkeys(made, "2020-02-02")
