"""What a run tells TensorBoard, read back with TensorBoard's own reader."""

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
from codebook_tools.training.resume import Saving
from codebook_tools.training.tensorboard import require_tensorboard

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

COUNTS = [int(i not in DEAD) for i in range(16)]
Scalars = dict[str, dict[int, float]]


def read_back(folder: Path) -> Scalars:
    """Figures by name and step. Each step is there once."""
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found: Scalars = {}
    for name in events.Tags()["scalars"]:
        told = events.Scalars(name)
        found[name] = {event.step: event.value for event in told}
        assert len(found[name]) == len(told), name
    return found


@pytest.fixture
def images(images_folder: Path) -> Images:
    return Images(find_images([images_folder])[:16], 3, 4)


def test_the_trace_and_every_loss_are_told(tiny: Path, images: Images, tmp_path: Path) -> None:
    found = tune(load_model(read_checkpoint(tiny)), images, COUNTS, steps=12, batch_size=8,
                 codebook_update="gradient", log_dir=tmp_path / "runs" / "a")  # fmt: skip
    told = read_back(tmp_path / "runs" / "a")
    terms = {"loss/reconstruction", "loss/commitment", "loss/codebook"}
    of_codes = ("distortion", "perplexity", "revived", "usage", "used")
    looks = [*(f"codebook/{name}" for name in of_codes), "validation/mse", "validation/error"]
    assert told.keys() == terms | {*looks} | {"loss/sum"}
    assert all([*told[name]] == [*range(1, 13)] for name in terms)
    for step, whole in told["loss/sum"].items():
        assert whole == pytest.approx(sum(told[name][step] for name in terms), rel=1e-5)
    for point in found.trace:
        expected = [point.distortion, point.perplexity, point.revived, point.used / 16, point.used]
        expected += [point.validation_mse, point.error]
        assert [told[name][point.step] for name in looks] == pytest.approx(expected, rel=1e-6)
        assert point.loss is None or told["loss/sum"][point.step] == pytest.approx(point.loss, rel=1e-6)


def test_a_resumed_run_replaces_what_was_told_after_its_last_look(tiny: Path, images: Images, tmp_path: Path) -> None:
    saving = Saving(tmp_path / "x.training.safetensors", {})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tune(load_model(read_checkpoint(tiny)), images, COUNTS, steps=30, batch_size=8, log_dir=whole)
    with pytest.raises(BrokenError):
        tune(load_model(read_checkpoint(tiny)), images, COUNTS, steps=30, batch_size=8, log_dir=parts,
             saving=saving, watch=breaking_at(17))  # fmt: skip
    tune(load_model(read_checkpoint(tiny)), images, COUNTS, steps=30, batch_size=8, log_dir=parts,
         saving=replace(saving, resume=True))  # fmt: skip
    assert read_back(parts) == read_back(whole)


def test_without_tensorboard_the_command_says_what_to_install(
    codebook: Callable[..., Outcome], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(CodebookError, match="--log-dir"):
        require_tensorboard(tmp_path)
    require_tensorboard(None)
    found = codebook("finetune", tiny, "--log-dir", tmp_path / "runs", "-o", tmp_path / "o.safetensors")
    assert_refused(found, "needs TensorBoard: pip install 'codebook-tools[tensorboard]'")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_is_named(tiny: Path, images: Images, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CodebookError, match="cannot write into --log-dir"):
        require_tensorboard(tmp_path / "file")  # before anything is encoded
    with pytest.raises(CodebookError, match="cannot write into --log-dir"):
        tune(load_model(read_checkpoint(tiny)), images, COUNTS, steps=2, log_dir=tmp_path / "file")
