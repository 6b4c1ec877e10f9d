"""A fine-tuning that was broken off goes on from its last evaluation, and ends in the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEAD, GREY, Grey, State, contents
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
from codebook_tools.workflows.operate import Result, operate
from codebook_tools.workflows.request import Request

GreyImages = Callable[..., Images]
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
        {"codebook_update": "gradient", "weight_ema": 0.9, "clip": 0.5, "accumulate": 2},
        {"train": "decoder", "codebook_update": "frozen", "weight_ema": 0.5},
        {"more": True},
        {"adversarial": True, "distill": 0.5, "batch_size": 2},
    ],
    ids=lambda recipe: " ".join(f"{name}={value}" for name, value in recipe.items()) or "defaults",
)
def test_a_run_that_was_broken_off_twice_ends_in_the_bytes_of_an_unbroken_one(
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


def test_what_torch_itself_draws_goes_on_too(
    grey: Callable[..., Grey], grey_images: GreyImages, tmp_path: Path
) -> None:
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


# --- the command ---------------------------------------------------------------------------------------------------

RECIPE = FineTune(steps=25, batch_size=16)


@pytest.fixture
def request_for(tiny: Path, images_folder: Path, tmp_path: Path) -> Callable[..., Request]:
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
    strategy: Strategy | None, request_for: Callable[..., Request]
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


def test_what_was_broken_off_is_neither_lost_nor_taken_up_unasked(request_for: Callable[..., Request]) -> None:
    request = request_for("parts")
    left = broken_off(request)
    with pytest.raises(CodebookError, match=r"o\.training\.safetensors is of an interrupted run: --resume goes on"):
        do(request)
    assert left.exists()
    whole = request_for("whole")
    anew = do(replace(request, force=True)), do(whole)
    assert anew[0].trace == anew[1].trace and not left.exists()


def test_nothing_to_resume_is_said_and_no_reason_to_stop(request_for: Callable[..., Request]) -> None:
    found = do(request_for("parts", resume=True))
    assert any(w.startswith("--resume: there is no ") and w.endswith("began at step 0") for w in found.warnings)


def test_another_run_is_not_taken_up(request_for: Callable[..., Request], monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("whole", "message"),
    [(True, "is no unfinished fine-tuning; move it away"), (False, "x.safetensors is not a sound safetensors file")],
)
def test_a_file_that_is_no_snapshot_is_named(whole: bool, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, path)
    path.write_bytes(path.read_bytes() if whole else b"nothing of ours")
    with pytest.raises(CodebookError, match=message):
        SnapshotFile(path, {}, resume=True).read()


def louder(tensors: State, about: dict[str, str]) -> None:
    next(tensor for name, tensor in tensors.items() if name.startswith("training/network/")).mul_(1000)


def from_another_step(tensors: State, about: dict[str, str]) -> None:
    about["best"] = "7777"


def without_weights(tensors: State, about: dict[str, str]) -> None:
    for name in [name for name in tensors if name.startswith("training/network/")]:
        del tensors[name]


def without_trace(tensors: State, about: dict[str, str]) -> None:
    about["trace"] = "[]"


@pytest.mark.parametrize(
    ("damage", "sealed_again", "message"),
    [
        (louder, False, "is not what was written; --force without --resume begins anew"),
        (from_another_step, False, "its header is not what was written"),
        (without_weights, True, "does not fit this run"),
        (without_trace, True, "is damaged"),
    ],
)
def test_an_unfinished_run_that_was_damaged_is_not_resumed(
    damage: Callable[[State, dict[str, str]], None],
    sealed_again: bool,
    message: str,
    tuned: Callable[..., Any],
    tmp_path: Path,
) -> None:
    saving = SnapshotFile(tmp_path / "x.training.safetensors", {}, resume=True)
    with pytest.raises(BrokenError):
        tuned([0.0, 1.0], [3, 1], ROWS, steps=12, saving=saving, watch=breaking_at(9))
    with safe_open(saving.path, "pt") as file:
        tensors, about = load_file(saving.path), dict(file.metadata())
    damage(tensors, about)
    if sealed_again:
        about = sealed(tensors, {name: value for name, value in about.items() if name != SEAL})
    save_file(tensors, saving.path, about)
    with pytest.raises(CodebookError, match=message):
        tuned([0.0, 1.0], [3, 1], ROWS, steps=12, saving=saving)


def test_a_run_that_diverged_at_once_leaves_nothing(request_for: Callable[..., Request]) -> None:
    request = request_for("parts")
    with pytest.raises(CodebookError, match="diverged at step"):
        do(request, recipe=replace(RECIPE, lr=1e30))
    assert request.output is not None and list(request.output.parent.iterdir()) == []
