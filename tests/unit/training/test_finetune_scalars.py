"""What a run writes for TensorBoard, read back with TensorBoard's own reader."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import DEAD, Outcome, assert_refused
from runs import BrokenError, breaking_at, tune
from sources_of_images import Images, find_images

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.load import load_model
from codebook_tools.training.resume import SnapshotFile
from codebook_tools.training.tensorboard import require_tensorboard

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

COUNTS = [int(i not in DEAD) for i in range(16)]


def read_back(folder: Path) -> dict[str, dict[int, float]]:
    """Figures by name and step. Each step is there once."""
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    figures = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert all(len(events.Scalars(name)) == len(steps) for name, steps in figures.items())
    return figures


@pytest.fixture
def images(images_folder: Path) -> Images:
    return Images(find_images([images_folder])[:16], 3, 4)


def test_the_trace_and_every_loss_are_written_and_a_resumed_run_replaces_what_came_after_its_snapshot(
    tiny: Path, images: Images, tmp_path: Path
) -> None:
    saving, whole, parts = SnapshotFile(tmp_path / "x.training.safetensors", {}), tmp_path / "whole", tmp_path / "parts"
    recipe = {"steps": 12, "batch_size": 8, "codebook_update": "gradient"}
    found = tune(load_model(read_checkpoint(tiny)), images, COUNTS, log_dir=whole, **recipe)
    with pytest.raises(BrokenError):
        tune(load_model(read_checkpoint(tiny)), images, COUNTS, log_dir=parts, saving=saving, watch=breaking_at(7),
             **recipe)  # fmt: skip
    resumed = replace(saving, resume=True)
    tune(load_model(read_checkpoint(tiny)), images, COUNTS, log_dir=parts, saving=resumed, **recipe)
    figures = read_back(whole)
    assert read_back(parts) == figures
    terms = {"loss/reconstruction", "loss/commitment", "loss/codebook"}
    of_codes = ("distortion", "perplexity", "revived", "usage", "used")
    evaluated = [*(f"codebook/{name}" for name in of_codes), "validation/mse", "validation/error"]
    assert figures.keys() == terms | {*evaluated, "loss/sum"}
    assert all([*figures[name]] == [*range(1, 13)] for name in terms)
    for step, total in figures["loss/sum"].items():
        assert total == pytest.approx(sum(figures[name][step] for name in terms), rel=1e-5)
    for point in found.trace:
        expected = [point.distortion, point.perplexity, point.revived, point.used / 16, point.used]
        expected += [point.validation_mse, point.error]
        assert [figures[name][point.step] for name in evaluated] == pytest.approx(expected, rel=1e-6)
        assert point.loss is None or figures["loss/sum"][point.step] == pytest.approx(point.loss, rel=1e-6)


def test_without_tensorboard_the_command_says_what_to_install(
    codebook: Callable[..., Outcome], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    require_tensorboard(None)
    found = codebook("finetune", tiny, "--log-dir", tmp_path / "runs", "-o", tmp_path / "o.safetensors")
    assert_refused(found, "needs tensorboard: pip install 'codebook-tools[tensorboard]'")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_encoded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CodebookError, match="cannot write into --log-dir"):
        require_tensorboard(tmp_path / "file")
