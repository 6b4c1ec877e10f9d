"""A fine-tuning that was broken off goes on from its last look, and ends in the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEAD, GREY, Grey, Outcome, State, assert_refused, contents
from runs import BrokenError, breaking_at, tune, weights_of
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
from codebook_tools.training.codebook_ema import More
from codebook_tools.training.finetune import FineTune, FineTuned
from codebook_tools.training.resume import Saving
from codebook_tools.workflows.operate import Result, operate
from codebook_tools.workflows.request import Request

GreyImages = Callable[..., Images]
COUNTS = [int(i not in DEAD) for i in range(16)]
BREAKS = {7: 6, 18: 16}
"""Steps at which a run of 25 is broken off, one in each of two goes, and the looks before them."""


def everything(model: Model, found: FineTuned) -> list[Any]:
    """What a run leaves, to be compared bit by bit."""
    states = [(state.step, state.validation_mse, state.tensors()) for state in (found.start, found.best)]
    plain = [(step, error, {n: t.tolist() for n, t in tensors.items()}) for step, error, tensors in states]
    return [plain, found.trace, found.trained, {name: t.tolist() for name, t in weights_of(model).items()}]


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"codebook_update": "gradient", "weight_ema": 0.9, "clip": 0.5, "accumulate": 2},
        {"train": "decoder", "loss": "l1"},
        {"train": "none"},
        {"train": "decoder", "codebook_update": "frozen", "weight_ema": 0.5},
        {"more": True},
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
        settings["more"] = {0: More(rows[:20].repeat(2, 1), torch.tensor([1, 0]).repeat_interleave(20))}
    whole = everything(unbroken, tune(unbroken, train, COUNTS, validation, **settings))
    assert whole[1][-1].revived > 0 or recipe.get("codebook_update", "ema") != "ema"
    saving = Saving(tmp_path / "x.training.safetensors", {"data": "these"})
    for step, look in BREAKS.items():
        with pytest.raises(BrokenError):
            tune(load_model(read_checkpoint(tiny)), train, COUNTS, validation,
                 saving=replace(saving, resume=True), watch=breaking_at(step), **settings)  # fmt: skip
        with safe_open(saving.path, "pt") as file:
            assert json.loads(file.metadata()["trace"])[-1]["step"] == look
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
    images, saving = grey_images([[0.2, 0.2], [0.4, 0.8]]), Saving(tmp_path / "x.training.safetensors", {}, resume=True)

    def run(seed: int, saving: Saving | None = None, watch: Watch | None = None) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = load_model(read_checkpoint(made.path), network=made.network)
        model.input_range = (0.0, 1.0)
        tune(model, images, [3, 1], steps=12, saving=saving, watch=watch)
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


@pytest.mark.parametrize("strategy", [None, Refit(k=8), Prune()], ids=["finetune", "refit", "prune"])
def test_a_resumed_command_writes_the_bytes_of_an_unbroken_one(
    strategy: Strategy | None, request_for: Callable[..., Request]
) -> None:
    whole, parts = request_for("whole"), request_for("parts")
    told = do(whole, strategy)
    left = broken_off(parts, strategy)
    assert left.name == "o.training.safetensors" and [file.name for file in left.parent.iterdir()] == [left.name]
    resumed = do(replace(parts, resume=True), strategy)
    assert resumed.trace == told.trace and resumed.stages == told.stages and resumed.warnings == told.warnings
    assert resumed.settings == told.settings
    files = [contents(Path(str(found.outputs["model"])).parent) for found in (told, resumed)]
    assert files[0] == files[1] and files[0].keys() == {"o.safetensors", "o.index_map.safetensors"}


def test_a_directory_has_it_beside_itself() -> None:
    assert training_path(Path("a/vae.refit-k128")) == Path("a/vae.refit-k128.training.safetensors")


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


@pytest.mark.parametrize(
    ("changed", "recipe", "message"),
    [
        ({}, replace(RECIPE, lr=0.5), r"lr was None, and is 0\.5; --resume needs the same"),
        ({}, replace(RECIPE, accumulate=2), "accumulate was 1, and is 2"),
        ({"seed": 1}, RECIPE, "seed was 0, and is 1"),
        ({"limit": 40}, RECIPE, "data was "),
        ({"input_range": (0.0, 1.0)}, RECIPE, r"input_range was \[-1.0, 1.0\], and is \[0.0, 1.0\]"),
    ],
)
def test_another_run_is_not_taken_up(
    changed: dict[str, Any], recipe: FineTune, message: str, request_for: Callable[..., Request]
) -> None:
    request = request_for("parts")
    left = broken_off(request)
    before = left.read_bytes()
    with pytest.raises(CodebookError, match=rf"o\.training\.safetensors is of another fine-tuning: {message}"):
        do(replace(request, resume=True, **changed), recipe=recipe)
    assert left.read_bytes() == before


def test_another_model_or_version_or_strategy_is_not_taken_up(
    request_for: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for("parts")
    broken_off(request)
    other = request_for("other").output
    assert request.model is not None and other is not None
    state = load_file(request.model)
    save_file(state, other)
    resumed = replace(request, resume=True)
    with pytest.raises(CodebookError, match=r"another fine-tuning: command was finetune, and is prune"):
        do(resumed, Prune())
    with pytest.raises(CodebookError, match=r"another fine-tuning: model was [0-9a-f]+, and is [0-9a-f]+"):
        do(replace(resumed, model=other))
    monkeypatch.setattr("codebook_tools.workflows.operate.VERSION", "0.0.9")
    with pytest.raises(CodebookError, match=rf"another fine-tuning: version was {VERSION}, and is 0\.0\.9"):
        do(resumed)


def test_other_weights_under_the_same_settings_are_not_taken_up(
    line: Callable[..., Model], grey_images: GreyImages, tmp_path: Path
) -> None:
    images, saving = grey_images([[0.2, 0.2], [0.4, 0.8]]), Saving(tmp_path / "x.training.safetensors", {}, resume=True)
    for second, error, message in ((1.0, BrokenError, None), (0.9, CodebookError, "began with other weights or codes")):
        with pytest.raises(error, match=message):
            tune(line([0.0, second]), images, [3, 1], steps=12, saving=saving, watch=breaking_at(5))


def test_a_damaged_file_is_named_by_the_command(
    codebook: Callable[..., Outcome], request_for: Callable[..., Request], tiny: Path, images_folder: Path
) -> None:
    output = request_for("parts").output
    assert output is not None
    given = ("finetune", tiny, "--data", images_folder, "--steps", 2, "--batch-size", 8, "-o", output, "--resume")
    training_path(output).write_bytes(b"nothing of ours")
    assert_refused(codebook(*given), "o.training.safetensors is not a sound safetensors file")
    save_file({"a": torch.ones(1)}, training_path(output))
    assert_refused(codebook(*given), "is no unfinished fine-tuning; move it away")


def louder(tensors: State, about: dict[str, str]) -> None:
    next(tensor for name, tensor in tensors.items() if name.startswith("training/network/")).mul_(1000)


def from_another_step(tensors: State, about: dict[str, str]) -> None:
    about["best"] = "7777"


def without_weights(tensors: State, about: dict[str, str]) -> None:
    for name in [name for name in tensors if name.startswith("training/network/")]:
        del tensors[name]


def without_looks(tensors: State, about: dict[str, str]) -> None:
    about["trace"] = "[]"


@pytest.mark.parametrize(
    ("damage", "sealed_again", "message"),
    [
        (louder, False, "is not what was written; --force without --resume begins anew"),
        (from_another_step, False, "its header is not what was written"),
        (without_weights, True, "does not fit this run"),
        (without_looks, True, "is damaged"),
    ],
)
def test_an_unfinished_run_that_was_damaged_is_not_gone_on_with(
    damage: Callable[[State, dict[str, str]], None],
    sealed_again: bool,
    message: str,
    line: Callable[..., Model],
    grey_images: GreyImages,
    tmp_path: Path,
) -> None:
    """A number in it that was a thousand times too large was trained on without a word."""
    images, saving = grey_images([[0.2, 0.2], [0.4, 0.8]]), Saving(tmp_path / "x.training.safetensors", {}, resume=True)
    with pytest.raises(BrokenError):
        tune(line([0.0, 1.0]), images, [3, 1], steps=12, saving=saving, watch=breaking_at(9))
    with safe_open(saving.path, "pt") as file:
        tensors, about = load_file(saving.path), dict(file.metadata())
    damage(tensors, about)
    if sealed_again:
        about = sealed(tensors, {name: value for name, value in about.items() if name != SEAL})
    save_file(tensors, saving.path, about)
    with pytest.raises(CodebookError, match=message):
        tune(line([0.0, 1.0]), images, [3, 1], steps=12, saving=saving)


def test_a_run_that_diverged_at_once_leaves_nothing(request_for: Callable[..., Request]) -> None:
    request = request_for("parts")
    with pytest.raises(CodebookError, match="diverged at step"):
        do(request, recipe=replace(RECIPE, lr=1e30))
    assert request.output is not None and list(request.output.parent.iterdir()) == []
