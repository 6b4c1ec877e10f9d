"""What can be asked of a fine-tuning beyond the plain one: numbers by hand, and runs that agree where they must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEAD, Outcome
from runs import tune, weights_of
from sources_of_images import Images, find_images

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.measure import measure
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.finetune import FineTune, TracePoint
from codebook_tools.training.history import reason_to_stop

GreyImages = Callable[..., Images]
ROWS = [[0.2, 0.2], [0.4, 0.8]]
"""An image of mean 0.4 and variance 0.06. The codes 0 and 1 get 3 of its pixels and 1, at a mean error of 0.07."""

COUNTS = [int(i not in DEAD) for i in range(16)]


@pytest.fixture
def images(images_folder: Path) -> Images:
    return Images(find_images([images_folder])[:48], 3, 4)


# --- accumulation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_two_batches_to_a_step_are_one_of_twice_the_size(update: str, tiny: Path, images: Images) -> None:
    ended, found = [], []
    for size, accumulate in ((16, 1), (8, 2), (4, 4)):
        model = load_model(read_checkpoint(tiny))
        settings: dict[str, Any] = {"codebook_update": update, "batch_size": size, "accumulate": accumulate}
        found.append(tune(model, images, COUNTS, steps=12, **settings))
        ended.append(weights_of(model))
    for other, run in zip(ended[1:], found[1:], strict=True):
        assert [p.step for p in run.trace] == [p.step for p in found[0].trace]
        assert [p.loss for p in run.trace[1:]] == pytest.approx([p.loss for p in found[0].trace[1:]], rel=1e-3)
        assert [p.revived for p in run.trace] == [p.revived for p in found[0].trace]
        for name, tensor in ended[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def test_the_moving_average_takes_in_every_batch_of_a_step(line: Callable[..., Model], grey_images: GreyImages) -> None:
    model = line([0.0, 1.0])
    few = grey_images([[0.2, 0.2], [0.2, 0.2]], [[0.8, 0.8], [0.8, 0.8]])
    tune(model, few, [1, 1], steps=1, train="none", batch_size=1, accumulate=2)
    # Shares stay a half each. The sums move by 5 % from 0 to 0.5 * 0.2, and from 0.5 to 0.5 * 0.8.
    assert model.books[0].vectors[:, 0].tolist() == pytest.approx([0.05 * 0.2, 0.95 + 0.05 * 0.8])


# --- clipping ------------------------------------------------------------------------------------------------------


def test_gradients_are_clipped_to_a_norm_of_all_together(
    line: Callable[..., Model], grey_images: GreyImages, light_commitment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped: list[list[float]] = []
    step = torch.optim.Adam.step

    def seen(optimiser: torch.optim.Adam, *given: Any) -> Any:
        gradients = [parameter.grad for group in optimiser.param_groups for parameter in group["params"]]
        stepped.append([number for gradient in gradients for number in gradient.flatten().tolist()])
        return step(optimiser, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", seen)
    for clip in (None, 0.5, 100.0):
        tune(line([0.0, 1.0]), grey_images(ROWS), [3, 1], steps=1, codebook_update="frozen", clip=clip)
    plain, clipped, spared = stepped
    # Reconstruction asks the encoder for 2 * -0.08 / 4 / 0.06, commitment for a quarter of the opposite; the decoder's
    # own weight sees the codes: (c - x) c is 0.2 for the one pixel of code 1.
    norm = sum(number**2 for number in plain) ** 0.5
    assert sorted(number for number in plain if number) == pytest.approx([-0.5, 2 * 0.2 / 4 / 0.06])
    assert norm > 0.5 and clipped == pytest.approx([number * 0.5 / norm for number in plain], rel=1e-4)
    assert spared == plain


# --- the average of the weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["frozen", "gradient"])
def test_the_averaged_weights_are_validated_and_kept(
    line: Callable[..., Model], grey_images: GreyImages, light_commitment: None, update: str
) -> None:
    images, model = grey_images(ROWS), line([0.0, 1.0])
    settings: dict[str, Any] = {"steps": 1, "codebook_update": update, "lr": 0.01}
    plain = tune(line([0.0, 1.0]), images, [3, 1], **settings)
    found = tune(model, images, [3, 1], weight_ema=0.75, **settings)
    before, after = plain.start.tensors(), plain.best.tensors()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    codes = {"vectors/0"} if update == "gradient" else set[str]()
    assert moved == {"weights/encoder.weight", "weights/decoder.weight"} | codes
    for name in moved:
        torch.testing.assert_close(found.best.tensors()[name], before[name] + (after[name] - before[name]) / 4)
    assert found.trace[1].validation_mse == found.best.validation_mse == measure(model, images, watch=Watch()).mse
    assert found.trace[1].validation_mse != plain.trace[1].validation_mse


def test_what_is_averaged_trains_on_as_it_would(line: Callable[..., Model], grey_images: GreyImages) -> None:
    settings: dict[str, Any] = {"steps": 6, "codebook_update": "gradient", "lr": 0.01}
    runs = [tune(line([0.0, 1.0]), grey_images(ROWS), [3, 1], weight_ema=decay, **settings) for decay in (None, 0.9, 0)]
    assert [p.loss for p in runs[0].trace] == [p.loss for p in runs[1].trace]
    assert runs[0].trace == runs[2].trace != runs[1].trace  # a decay of 0 is no average


# --- stopping ------------------------------------------------------------------------------------------------------


def traced(*points: tuple[int, float, int]) -> list[TracePoint]:
    """Of step, validation error, codes in use."""
    return [TracePoint(step, None, error, used, 1.0, 1.0, 0) for step, error, used in points]


@pytest.mark.parametrize(
    ("errors", "stops"),
    [
        ([1.0], False),
        ([1.0, 5.0], False),  # the start does not count: what is kept comes after it
        ([1.0, 5.0, 6.0], False),
        ([1.0, 5.0, 6.0, 6.0], True),
        ([1.0, 5.0, 6.0, 5.0], True),  # as good is not better
        ([1.0, 5.0, 6.0, 4.0, 7.0], False),
    ],
)
def test_patience_ends_after_so_many_looks_without_a_gain(errors: list[float], stops: bool) -> None:
    trace = traced(*((step, error, 4) for step, error in enumerate(errors)))
    said = reason_to_stop(FineTune(steps=9, patience=2), trace, 4, 0)
    assert (said is not None) == stops
    assert said is None or said.endswith(f"stopped at step {len(errors) - 1}: --patience 2 looks without a gain")
    assert reason_to_stop(FineTune(steps=len(errors) - 1, patience=2), trace, 4, 0) is None  # it has ended anyway
    assert reason_to_stop(FineTune(steps=9), trace, 4, 0) is None


@pytest.mark.parametrize(
    ("used", "stops"),
    [([8, 4], False), ([8, 3], True), ([2, 1], False), ([2, 5, 4, 3], True), ([8, 8, 4, 4], False)],
)
def test_the_guard_stops_where_usage_falls_under_its_share(used: list[int], stops: bool) -> None:
    trace = traced(*((step, 1.0 - step / 10, codes) for step, codes in enumerate(used)))
    assert (reason_to_stop(FineTune(min_usage=0.5), trace, 8, 0) is not None) == stops
    assert reason_to_stop(FineTune(), trace, 8, 0) is None


@pytest.mark.parametrize(
    ("recipe", "levers"),
    [
        ({}, "a lower --lr or --train decoder"),
        ({"codebook_update": "gradient"}, "a lower --lr or --codebook-update ema or --train decoder"),
        ({"codebook_update": "frozen", "train": "decoder"}, "a lower --lr or --codebook-update ema"),
    ],
)
def test_the_guard_names_the_levers_that_are_left(recipe: dict[str, Any], levers: str) -> None:
    said = reason_to_stop(FineTune(min_usage=0.5, **recipe), traced((0, 1.0, 8), (10, 1.0, 3)), 8, 0)
    assert said == (
        "at step 10 only 3 of 8 codes were in use, fewer than --min-usage 0.5 asks for: the fine-tuning was stopped; "
        f"try {levers}"
    )


def test_a_run_without_gain_stops_and_keeps_the_best(line: Callable[..., Model], grey_images: GreyImages) -> None:
    model, images = line([0.0, 1.0]), grey_images(ROWS)
    found = tune(model, images, [3, 1], grey_images([[0.0, 1.0]]), steps=40, train="none", patience=3)
    assert [point.step for point in found.trace] == [0, 1, 4, 8, 10] and found.best.step == 1
    assert found.stopped == "the fine-tuning was stopped at step 10: --patience 3 looks without a gain"


def test_a_run_that_loses_codes_stops_and_keeps_an_earlier_state(
    line: Callable[..., Model], grey_images: GreyImages, light_commitment: None
) -> None:
    # The encoder comes down to where code 0 alone is near: half of the codes go, while the error falls.
    images, codes = grey_images([[0.1, 0.2, 0.3, 0.65]]), [0.2, 1.0]
    given: dict[str, Any] = {"steps": 20, "codebook_update": "frozen", "lr": 0.1}
    free = tune(line(codes), images, [3, 1], **given)
    lost = next(point for point in free.trace if point.used == 1)
    assert lost.step > 1
    found = tune(line(codes), images, [3, 1], min_usage=0.9, **given)
    assert found.trace == free.trace[: free.trace.index(lost) + 1]
    assert found.best.step < lost.step and found.stopped is not None
    assert found.stopped.startswith(f"at step {lost.step} only 1 of 2 codes were in use, fewer than --min-usage 0.9")


def test_a_run_that_loses_them_at_once_has_gained_nothing_whatever_its_error(
    line: Callable[..., Model], grey_images: GreyImages, light_commitment: None
) -> None:
    images, validation = grey_images([[0.1, 0.2, 0.3, 0.65]]), grey_images([[0.2, 0.2, 0.2, 0.61]])
    given: dict[str, Any] = {"steps": 20, "codebook_update": "frozen", "lr": 4.0}
    found = tune(line([0.2, 1.0]), images, [3, 1], validation, min_usage=0.9, **given)
    assert [point.used for point in found.trace] == [2, 1] and found.best.step == 1
    assert found.collapsed and not found.gained and found.stopped is not None
    assert "try a lower --lr or --codebook-update ema or --train decoder" in found.stopped


def test_a_surgery_whose_fine_tuning_loses_its_codes_is_kept_as_it_is(
    codebook: Callable[..., Outcome], tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    found = codebook("prune", tiny, "--data", images_folder, "--input-range", "-1,1", "--lr", 30, "--steps", 30,
                     "--batch-size", 8, "--min-usage", 0.5, "-o", tmp_path / "o.safetensors", "--json")  # fmt: skip
    assert found.exit_code == 0 and found.json["kept"] == "surgery", found
    (levers, kept) = found.json["warnings"]
    assert levers.startswith("at step 1 only ") and levers.endswith("try a lower --lr or --train decoder")
    assert kept == "fine-tuning lost codes: the state after surgery is kept"
    assert [path.name for path in tmp_path.glob("o.*")] == ["o.safetensors", "o.index_map.safetensors"]


# --- precision, settings -------------------------------------------------------------------------------------------


def test_bf16_trains_weights_that_stay_float32_by_nearest_codes_in_float32(tiny: Path, images: Images) -> None:
    model, seen = load_model(read_checkpoint(tiny), bf16=True), set[tuple[torch.dtype, bool]]()
    assign = model.assign

    def watched(latents: torch.Tensor, stage: int = 0, *, wait: bool = True) -> torch.Tensor:
        seen.add((latents.dtype, torch.is_autocast_enabled("cpu")))
        return assign(latents, stage, wait=wait)

    model.assign = watched  # type: ignore[method-assign]
    computed = set[torch.dtype]()
    for module in model.network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, given, made: computed.add(made.dtype))
    found = tune(model, images, COUNTS, steps=10, batch_size=16, lr=0.002)
    assert seen == {(torch.float32, False)} and computed == {torch.bfloat16}
    assert {tensor.dtype for tensor in found.best.tensors().values()} == {torch.float32, torch.bool}
    whole = tune(load_model(read_checkpoint(tiny)), images, COUNTS, steps=10, batch_size=16, lr=0.002)
    assert found.trace[-1].validation_mse == pytest.approx(whole.trace[-1].validation_mse, rel=0.05)
    assert found.trace[-1].validation_mse < found.trace[0].validation_mse


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 0}, "accumulate=0 is below 1"),
        ({"patience": 0}, "patience=0 is below 1"),
        ({"clip": 0.0}, "clip=0.0 is no norm to keep gradients below; try --clip 1"),
        ({"clip": float("nan")}, "clip=nan is no norm"),
        ({"weight_ema": 1.0}, "weight_ema=1.0 is not within 0 and 1; try --weight-ema 0.999"),
        ({"weight_ema": -0.1}, "weight_ema=-0.1 is not within 0 and 1"),
        ({"min_usage": 1.5}, "min_usage=1.5 is no share of the codes; try --min-usage 0.5"),
        ({"min_usage": float("nan")}, "min_usage=nan is no share"),
    ],
)
def test_options_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CodebookError, match=message):
        FineTune(**settings)


def test_the_command_passes_them_on_and_says_why_it_stopped(
    codebook: Callable[..., Outcome], tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"accumulate": 2, "clip": 1.5, "weight_ema": 0.5, "patience": 1, "min_usage": 0.05}
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    # A learning rate at which nothing is gained after the first look.
    found = codebook("finetune", tiny, "--data", images_folder, "--input-range", "-1,1", "--lr", 1.0, "--steps", 30,
                     "--batch-size", 8, *given, "-o", tmp_path / "o.safetensors", "--json")  # fmt: skip
    assert found.exit_code == 0, found.stderr
    assert {name: found.json["settings"][name] for name in options} == options
    assert found.json["trace"][-1]["step"] < 30
    assert any("--patience 1 looks without a gain" in warning for warning in found.json["warnings"])
