"""Trackers get the history and the figures of each phase, offline, and nothing of theirs goes to stdout."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, assert_refused
from processes import ran

from codebook_tools.errors import CodebookError
from codebook_tools.training.tracking import Tracking, require_tracker, tracked

History = dict[str, dict[int, float]]
"""Figures by name and step."""


def of_tensorboard(folder: Path) -> tuple[History, dict[str, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    history = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
    return history, {name: steps[4] for name, steps in history.items() if 4 in steps}


def of_trackio(folder: Path) -> tuple[History, dict[str, float]]:
    history: History = defaultdict(dict)
    with sqlite3.connect(folder / "trackio" / "codebook-tools.db") as stored:
        for step, figures in stored.execute("select step, metrics from metrics where run_name = 'o'"):
            for name, figure in json.loads(figures).items():
                history[name][step] = figure
    return history, {name: steps[4] for name, steps in history.items() if 4 in steps}


def values_of(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def of_wandb(folder: Path) -> tuple[History, dict[str, float]]:
    history: History = defaultdict(dict)
    summary = dict[str, float]()
    (file,) = (folder / "logs").glob("wandb/offline-run-*/*.wandb")
    for record in _records(file.read_bytes()):
        figures = values_of(record.history.item)
        for name, figure in figures.items():
            history[name][figures["_step"]] = figure
        summary |= {
            item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update
        }
    return history, summary


def _records(raw: bytes) -> Iterator[Any]:
    """The records of a file of Weights & Biases, which are chunks within blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    at, whole = 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        whole += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


READERS: dict[str, Callable[[Path], tuple[History, dict[str, float]]]] = {
    "tensorboard": of_tensorboard,
    "trackio": of_trackio,
    "wandb": of_wandb,
}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", READERS)
def test_the_history_and_the_figures_of_each_phase_are_written(
    tracker: str, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip(tracker)
    places = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    options = ("--data", images_folder, "--k", 8, "--steps", 4, "--batch-size", 8, "--metrics", "robustness")
    folder = () if tracker == "trackio" else ("--log-dir", tmp_path / "logs")
    done = ran(
        *(sys.executable, "-m", "codebook_cli.app", "refit", tiny, *options, "-o", tmp_path / "o.safetensors"),
        *("--track", tracker, *folder, "--json"),
        env=os.environ | places,
        cwd=tmp_path,
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)  # nothing else is there
    history, final = READERS[tracker](tmp_path)
    for point in result["trace"]:
        assert history["validation/mse"][point["step"]] == pytest.approx(point["validation_mse"], rel=1e-6)
        assert history["codebook/used"][point["step"]] == point["used"]
    assert sorted(history["loss/sum"]) == [1, 2, 3, 4]
    for phase, figures in result["stages"].items():
        for name in ("mse", "psnr", "robustness"):
            assert final[f"{phase}/{name}"] == pytest.approx(figures[name], rel=1e-6)
        assert final[f"{phase}/perplexity"] == pytest.approx(figures["codebooks"][0]["perplexity"], rel=1e-6)


@pytest.mark.slow
def test_without_a_key_weights_and_biases_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    typed = sys.stdin
    with pytest.raises(CodebookError, match=r"^--track wandb: [^\n]+WANDB_MODE=offline keeps the run here$"):
        tracked(Tracking("wandb", tmp_path, "o")).__enter__()
    assert sys.stdin is typed


def test_a_missing_library_is_named_before_any_work(
    codebook: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tracker in READERS:
        monkeypatch.setitem(sys.modules, tracker, None)
        outcome = codebook("finetune", tiny, "--track", tracker, "-o", tmp_path / "o.safetensors")
        assert_refused(outcome, f"--track {tracker} needs {tracker}: pip install 'codebook-tools[{tracker}]'")


def test_trackio_has_a_place_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    with pytest.raises(CodebookError, match="keeps runs in TRACKIO_DIR, or in its cache; leave out --log-dir"):
        require_tracker(Tracking("trackio", tmp_path, "o"))


def test_without_a_tracker_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with tracked(None) as tracker:
        tracker.log(1, {"a": 1.0})
        tracker.conclude({"a": 1.0})
    with tracked(Tracking("tensorboard", None, "o")):
        pass  # a run that logs nothing leaves no file of events
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "o"]
