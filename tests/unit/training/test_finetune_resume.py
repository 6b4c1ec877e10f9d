"""A fine-tuning that was broken off ends in the same bytes, and the same events for TensorBoard, as an unbroken one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEAD, GREY, Grey, Run, State, assert_refused, contents
from runs import ROWS, BrokenError, breaking_at, tune, weights_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sources_of_images import Images, find_images

from codebook_tools.checkpoints.layout import training_path
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.sealed_file import SEAL, sealed
from codebook_tools.codebook import Strategy
from codebook_tools.data.splits import split
from codebook_tools.errors import CodebookError
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.runtime.version import VERSION
from codebook_tools.strategies import Prune, Refit
from codebook_tools.training.codebook_ema import ExtraCodes
from codebook_tools.training.finetune import FineTune, FineTuned
from codebook_tools.training.resume import SnapshotFile
from codebook_tools.training.tracking import Tracking, require_tracker
from codebook_tools.workflows.operate import Result, operate
from codebook_tools.workflows.request import Request

GreyImages = Callable[..., Images]
RequestFor = Callable[..., Request]
COUNTS = [int(i not in DEAD) for i in range(16)]
BREAKS = {7: 6, 18: 16}
"""Steps at which a run of 25 is broken off, one in each of two goes, and the evaluations before them."""


def everything(model: Model, found: FineTuned) -> list[Any]:
    """What a run leaves, to be compared bit by bit."""
    states = [(state.step, state.validation_mse, state.tensors()) for state in (found.start, found.best)]
    plain = [(step, error, {n: t.tolist() for n, t in tensors.items()}) for step, error, tensors in states]
    return [plain, found.trace, found.trained, {name: t.tolist() for name, t in weights_of(model).items()}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"optimizer": "adam"},
        {"codebook_update": "gradient", "weight_ema": 0.9, "clip": 0.5, "accumulate": 2},
        {"train": "decoder", "codebook_update": "frozen", "weight_ema": 0.5},
        {"more": True},
        {"adversarial": True, "distill": 0.5, "batch_size": 2},
    ],
    ids=lambda recipe: " ".join(f"{name}={value}" for name, value in recipe.items()) or "defaults",
)
def test_a_run_broken_off_twice_ends_in_the_bytes_of_another(
    recipe: dict[str, Any], tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    items = split(find_images([images_folder]))
    images = Images(find_images([images_folder]), 3, 4)
    train, validation = images.subset(items.train), images.subset(items.validation)
    settings = {"steps": 25, "batch_size": 8, "lr": 0.01} | recipe
    unbroken = load_model(read_checkpoint(tiny))
    if "more" in recipe:  # they are merged at step 15, between the two breaks
        rows = torch.cat(list(unbroken.latents(train, 8)))
        settings["more"] = {0: ExtraCodes(rows[:20].repeat(2, 1), torch.tensor([1, 0]).repeat_interleave(20))}
    whole = everything(unbroken, tune(unbroken, train, COUNTS, validation, **settings))
    assert whole[1][-1].revived > 0 or recipe.get("codebook_update", "ema") != "ema"
    saving = SnapshotFile(tmp_path / "x.training.safetensors", {"data": "these"})
    for step, evaluated in BREAKS.items():
        with pytest.raises(BrokenError):
            tune(load_model(read_checkpoint(tiny)), train, COUNTS, validation,
                 saving=replace(saving, resume=True), watch=breaking_at(step), **settings)  # fmt: skip
        with safe_open(saving.path, "pt") as file:
            assert json.loads(file.metadata()["trace"])[-1]["step"] == evaluated
    torch.rand(5)  # whatever else was drawn before
    resumed = load_model(read_checkpoint(tiny))
    found = tune(resumed, train, COUNTS, validation, saving=replace(saving, resume=True), **settings)
    assert everything(resumed, found) == whole


def test_what_torch_draws_itself_goes_on(grey: Callable[..., Grey], grey_images: GreyImages, tmp_path: Path) -> None:
    made = grey([0.0, 1.0])
    dropping = "return nn.functional.dropout(self.encoder(images), 0.3, self.training)"
    Path(made.network.removesuffix(":make")).write_text(GREY.replace("return self.encoder(images)", dropping))
    saving = SnapshotFile(tmp_path / "x.training.safetensors", {}, resume=True)

    def run(seed: int, saving: SnapshotFile | None = None, watch: Watch | None = None) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = load_model(read_checkpoint(made.path), network=made.network)
        model.input_range = (0.0, 1.0)
        tune(model, grey_images(ROWS), [3, 1], steps=12, saving=saving, watch=watch)
        return {name: tensor.tolist() for name, tensor in weights_of(model).items()}

    whole = run(1)
    with pytest.raises(BrokenError):
        run(1, saving, breaking_at(9))
    assert run(2, saving) == whole != run(2)


RECIPE = FineTune(steps=25, batch_size=16)


@pytest.fixture
def request_for(tiny: Path, images_folder: Path, tmp_path: Path) -> RequestFor:
    """request_for(name): the tiny model and images; the output in a folder of that name."""

    def make(name: str, **more: Any) -> Request:
        (tmp_path / name).mkdir(exist_ok=True)
        given = {"data": (str(images_folder),), "input_range": (-1.0, 1.0), "output": tmp_path / name / "o.safetensors"}
        return Request(model=tiny, **given | more)

    return make


def do(
    request: Request, strategy: Strategy | None = None, recipe: FineTune = RECIPE, watch: Watch | None = None
) -> Result:
    command = type(strategy).__name__.lower() if strategy else "finetune"
    return operate(command, request, strategy, recipe, watch or Watch())


def broken_off(request: Request, strategy: Strategy | None = None) -> Path:
    """What an interrupted run leaves."""
    with pytest.raises(BrokenError):
        do(request, strategy, watch=breaking_at(18))
    assert request.output is not None and not request.output.exists()
    return training_path(request.output)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [None, Refit(k=8)], ids=["finetune", "refit"])
def test_a_resumed_command_writes_the_bytes_of_an_unbroken_one(
    strategy: Strategy | None, request_for: RequestFor
) -> None:
    whole, parts = request_for("whole"), request_for("parts")
    unbroken = do(whole, strategy)
    left = broken_off(parts, strategy)
    assert training_path(Path("a/vae.refit-k128")) == Path("a/vae.refit-k128.training.safetensors")
    assert left.name == "o.training.safetensors" and [file.name for file in left.parent.iterdir()] == [left.name]
    resumed = do(replace(parts, resume=True), strategy)
    assert (resumed.trace, resumed.stages, resumed.warnings) == (unbroken.trace, unbroken.stages, unbroken.warnings)
    assert resumed.settings == unbroken.settings
    files = [contents(Path(str(result.outputs["model"])).parent) for result in (unbroken, resumed)]
    assert files[0] == files[1] and files[0].keys() == {"o.safetensors", "o.index_map.safetensors"}


def test_what_was_broken_off_is_neither_lost_nor_taken_up_unasked(request_for: RequestFor) -> None:
    request = request_for("parts")
    left = broken_off(request)
    with pytest.raises(CodebookError, match=r"o\.training\.safetensors is of an interrupted run: --resume goes on"):
        do(request)
    assert left.exists()
    anew, whole = do(replace(request, force=True)), do(request_for("whole", resume=True))
    assert anew.trace == whole.trace and not left.exists()
    assert any(w.startswith("--resume: there is no ") and w.endswith("began at step 0") for w in whole.warnings)


def test_another_run_is_not_taken_up(request_for: RequestFor, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_for("parts")
    left, other = broken_off(request), request_for("other").output
    before = left.read_bytes()
    assert request.model is not None and other is not None
    save_file(load_file(request.model), other)
    changes: list[tuple[dict[str, Any], FineTune, Strategy | None, str]] = [
        ({}, replace(RECIPE, lr=0.5), None, r"lr was None, and is 0\.5; --resume needs the same"),
        ({"seed": 1}, RECIPE, None, "seed was 0, and is 1"),
        ({"limit": 40}, RECIPE, None, "data was "),
        ({"input_range": (0.0, 1.0)}, RECIPE, None, r"input_range was \[-1.0, 1.0\], and is \[0.0, 1.0\]"),
        ({}, RECIPE, Prune(), "command was finetune, and is prune"),
        ({"model": other}, RECIPE, None, "model was [0-9a-f]+, and is [0-9a-f]+"),
    ]
    for changed, recipe, strategy, message in changes:
        with pytest.raises(CodebookError, match=rf"o\.training\.safetensors is of another fine-tuning: {message}"):
            do(replace(request, resume=True, **changed), strategy, recipe)
    monkeypatch.setattr("codebook_tools.workflows.operate.VERSION", "0.0.9")
    with pytest.raises(CodebookError, match=rf"another fine-tuning: version was {VERSION}, and is 0\.0\.9"):
        do(replace(request, resume=True))
    assert left.read_bytes() == before


def test_other_weights_under_the_same_settings_are_not_taken_up(tuned: Callable[..., Any], tmp_path: Path) -> None:
    saving = SnapshotFile(tmp_path / "x.training.safetensors", {}, resume=True)
    for second, error, message in ((1.0, BrokenError, None), (0.9, CodebookError, "began with other weights or codes")):
        with pytest.raises(error, match=message):
            tuned([0.0, second], [3, 1], ROWS, steps=12, saving=saving, watch=breaking_at(5))


def test_a_file_that_is_no_snapshot_is_named(tmp_path: Path) -> None:
    snapshot = SnapshotFile(tmp_path / "x.safetensors", {}, resume=True)
    save_file({"a": torch.ones(1)}, snapshot.path)
    with pytest.raises(CodebookError, match="is no unfinished fine-tuning; move it away"):
        snapshot.read()
    snapshot.path.write_bytes(b"nothing of ours")
    with pytest.raises(CodebookError, match=r"x\.safetensors is not a sound safetensors file"):
        snapshot.read()


NETWORK = "training/network/"
DAMAGES: list[tuple[Callable[[State, dict[str, str]], tuple[State, dict[str, str]]], bool, str]] = [
    (lambda tensors, about: ({n: t * 1000 if n.startswith(NETWORK) else t for n, t in tensors.items()}, about), False,
     "is not what was written; --force without --resume begins anew"),
    (lambda tensors, about: (tensors, about | {"best": "7777"}), False, "its header is not what was written"),
    (lambda tensors, about: ({n: t for n, t in tensors.items() if not n.startswith(NETWORK)}, about), True,
     "does not fit this run"),
    (lambda tensors, about: (tensors, about | {"trace": "[]"}), True, "is damaged"),
]  # fmt: skip
"""What became of tensors and header, whether they were sealed again, and what is said."""


@pytest.mark.parametrize(("damage", "sealed_again", "message"), DAMAGES)
def test_an_unfinished_run_that_was_damaged_is_not_resumed(
    damage: Any, sealed_again: bool, message: str, tuned: Callable[..., Any], tmp_path: Path
) -> None:
    saving = SnapshotFile(tmp_path / "x.training.safetensors", {}, resume=True)
    with pytest.raises(BrokenError):
        tuned([0.0, 1.0], [3, 1], ROWS, steps=12, saving=saving, watch=breaking_at(9))
    with safe_open(saving.path, "pt") as file:
        tensors, about = damage(load_file(saving.path), dict(file.metadata()))
    if sealed_again:
        about = sealed(tensors, {name: value for name, value in about.items() if name != SEAL})
    save_file(tensors, saving.path, about)
    with pytest.raises(CodebookError, match=message):
        tuned([0.0, 1.0], [3, 1], ROWS, steps=12, saving=saving)


def test_a_run_that_diverged_at_once_leaves_nothing(request_for: RequestFor) -> None:
    request = request_for("parts")
    with pytest.raises(CodebookError, match="diverged at step"):
        do(request, recipe=replace(RECIPE, lr=1e30))
    assert request.output is not None and list(request.output.parent.iterdir()) == []


def read_back(folder: Path) -> dict[str, dict[int, float]]:
    """Figures by name and step, by TensorBoard's own reader. Each step is there once."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
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
    codebook: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    require_tracker(None)
    found = codebook("finetune", tiny, "--log-dir", tmp_path / "runs", "-o", tmp_path / "o.safetensors")
    assert_refused(found, "needs tensorboard: pip install 'codebook-tools[tensorboard]'")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_encoded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CodebookError, match="cannot write into --log-dir"):
        require_tracker(Tracking("tensorboard", tmp_path / "file", "run"))
