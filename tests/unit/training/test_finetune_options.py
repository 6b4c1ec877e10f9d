"""What can be asked of a fine-tuning beyond the plain one: numbers by hand, and runs that agree where they must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEAD, Run
from runs import ROWS, tune, weights_of
from sources_of_images import Images, find_images

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.measure import measure
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.finetune import FineTune, FineTuned, TracePoint
from codebook_tools.training.history import reason_to_stop
from codebook_tools.training.trainer import Trainer

GreyImages = Callable[..., Images]
Tuned = Callable[..., tuple[Model, FineTuned]]
COUNTS = [int(i not in DEAD) for i in range(16)]
LOSING = [[0.1, 0.2, 0.3, 0.65]]
"""The encoder comes down to where the code 0.2 alone is near, not 1: half of the codes go, while the error falls."""


@pytest.fixture
def images(images_folder: Path) -> Images:
    return Images(find_images([images_folder])[:48], 3, 4)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_batches_to_a_step_are_one_of_their_size_together(update: str, tiny: Path, images: Images) -> None:
    ended, found = [], []
    for size, accumulate in ((16, 1), (4, 4)):
        model = load_model(read_checkpoint(tiny))
        settings: dict[str, Any] = {"codebook_update": update, "batch_size": size, "accumulate": accumulate}
        found.append(tune(model, images, COUNTS, steps=12, **settings))
        ended.append(weights_of(model))
    for one, other in zip(*(run.trace for run in found), strict=True):
        assert (one.step, one.revived) == (other.step, other.revived)
        assert one.loss == other.loss is None or other.loss == pytest.approx(one.loss, rel=1e-3)
    for name, tensor in ended[0].items():
        torch.testing.assert_close(ended[1][name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def test_gradients_are_clipped_by_the_norm_of_all(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[list[float]] = []
    step = torch.optim.Adam.step

    def recorded(optimizer: torch.optim.Adam, *arguments: Any) -> Any:
        all_of_them = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        gradients.append([number for gradient in all_of_them for number in gradient.flatten().tolist()])
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    for clip in (None, 0.5, 100.0):
        tuned([0.0, 1.0], [3, 1], ROWS, steps=1, codebook_update="frozen", clip=clip)
    plain, clipped, spared = gradients
    # Reconstruction asks the encoder for 2 * -0.08 / 4 / 0.06, commitment for a quarter of the opposite; the decoder's
    # own weight sees the codes: (c - x) c is 0.2 for the one pixel of code 1.
    norm = sum(number**2 for number in plain) ** 0.5
    assert sorted(number for number in plain if number) == pytest.approx([-0.5, 2 * 0.2 / 4 / 0.06])
    assert norm > 0.5 and clipped == pytest.approx([number * 0.5 / norm for number in plain], rel=1e-4)
    assert spared == plain


@pytest.mark.parametrize("update", ["frozen", "gradient"])
def test_the_averaged_weights_are_validated_and_kept(tuned: Tuned, grey_images: GreyImages, update: str) -> None:
    settings: dict[str, Any] = {"steps": 1, "codebook_update": update, "lr": 0.01}
    _, plain = tuned([0.0, 1.0], [3, 1], ROWS, **settings)
    model, found = tuned([0.0, 1.0], [3, 1], ROWS, weight_ema=0.75, **settings)
    before, after = plain.start.tensors(), plain.best.tensors()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    codes = {"vectors/0"} if update == "gradient" else set[str]()
    assert moved == {"weights/encoder.weight", "weights/decoder.weight"} | codes
    for name in moved:
        torch.testing.assert_close(found.best.tensors()[name], before[name] + (after[name] - before[name]) / 4)
    mse = measure(model, grey_images(ROWS), watch=Watch()).mse
    assert found.trace[1].validation_mse == found.best.validation_mse == mse != plain.trace[1].validation_mse


def test_averaged_weights_train_on_as_they_would(tuned: Tuned) -> None:
    settings: dict[str, Any] = {"steps": 6, "codebook_update": "gradient", "lr": 0.01}
    runs = [tuned([0.0, 1.0], [3, 1], ROWS, weight_ema=decay, **settings)[1] for decay in (None, 0.9, 0)]
    assert [p.loss for p in runs[0].trace] == [p.loss for p in runs[1].trace]
    assert runs[0].trace == runs[2].trace != runs[1].trace  # a decay of 0 is no average


@pytest.mark.parametrize(("errors", "stops"), [
    ([1.0, 5.0, 6.0], False),  # the start does not count: what is kept comes after it
    ([1.0, 5.0, 6.0, 6.0], True), ([1.0, 5.0, 6.0, 5.0], True),  # as good is not better
    ([1.0, 5.0, 6.0, 4.0, 7.0], False),
])  # fmt: skip
def test_patience_ends_after_so_many_evaluations_without_a_gain(errors: list[float], stops: bool) -> None:
    trace = [TracePoint(step, None, error, 4, 1.0, 1.0, 0) for step, error in enumerate(errors)]
    reason = reason_to_stop(FineTune(steps=9, patience=2), trace, 4, 0)
    assert (reason is not None) == stops
    assert reason is None or reason.endswith(
        f"stopped at step {len(errors) - 1}: --patience 2 evaluation steps without a gain"
    )
    assert reason_to_stop(FineTune(steps=len(errors) - 1, patience=2), trace, 4, 0) is None  # it has ended anyway
    assert reason_to_stop(FineTune(steps=9), trace, 4, 0) is None


@pytest.mark.parametrize(("used", "recipe", "levers"), [
    *((used, {}, None) for used in ([8, 4], [2, 1], [8, 8, 4, 4])), ([8, 3], {}, "a lower --lr or --train decoder"),
    ([2, 5, 4, 3], {"codebook_update": "gradient"}, "a lower --lr or --codebook-update ema or --train decoder"),
    ([8, 3], {"codebook_update": "frozen", "train": "decoder"}, "a lower --lr or --codebook-update ema"),
])  # fmt: skip
def test_the_guard_stops_below_a_share_and_names_the_levers(
    used: list[int], recipe: dict[str, Any], levers: str | None
) -> None:
    trace = [TracePoint(step, None, 1 - step / 10, codes, 1.0, 1.0, 0) for step, codes in enumerate(used)]
    reason = reason_to_stop(FineTune(min_usage=0.5, **recipe), trace, 8, 0)
    expected = f"at step {len(used) - 1} only 3 of 8 codes were in use, fewer than --min-usage 0.5 asks for"
    assert reason == (levers and f"{expected}: the fine-tuning was stopped; try {levers}")
    assert reason_to_stop(FineTune(), trace, 8, 0) is None


def test_a_run_that_loses_codes_stops_and_keeps_an_earlier_state(tuned: Tuned) -> None:
    recipe: dict[str, Any] = {"steps": 20, "codebook_update": "frozen", "lr": 0.1}
    _, free = tuned([0.2, 1.0], [3, 1], LOSING, **recipe)
    lost = next(point for point in free.trace if point.used == 1)
    _, found = tuned([0.2, 1.0], [3, 1], LOSING, min_usage=0.9, **recipe)
    assert lost.step > 1 and found.trace == free.trace[: free.trace.index(lost) + 1]
    assert found.best.step < lost.step and found.stopped is not None
    assert found.stopped.startswith(f"at step {lost.step} only 1 of 2 codes were in use, fewer than --min-usage 0.9")


def test_a_run_that_loses_them_at_once_has_gained_nothing_whatever_its_error(
    tuned: Tuned, grey_images: GreyImages
) -> None:
    recipe: dict[str, Any] = {"steps": 20, "codebook_update": "frozen", "lr": 4.0, "min_usage": 0.9}
    _, found = tuned([0.2, 1.0], [3, 1], LOSING, validation=grey_images([[0.2, 0.2, 0.2, 0.61]]), **recipe)
    assert [point.used for point in found.trace] == [2, 1] and found.best.step == 1
    assert found.collapsed and not found.gained


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_bf16_trains_weights_that_stay_float32_by_nearest_codes_in_float32(
    tiny: Path, images: Images, optimizer: str
) -> None:
    model, assigned = load_model(read_checkpoint(tiny), bf16=True), set[tuple[torch.dtype, bool]]()
    assign = model.assign

    def watched(latents: torch.Tensor, stage: int = 0, *, wait: bool = True) -> torch.Tensor:
        assigned.add((latents.dtype, torch.is_autocast_enabled("cpu")))
        return assign(latents, stage, wait=wait)

    model.assign = watched  # type: ignore[method-assign]
    computed = set[torch.dtype]()
    for module in model.network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: computed.add(output.dtype))
    recipe: dict[str, Any] = {"steps": 10, "batch_size": 16, "lr": 0.002, "optimizer": optimizer}
    found = tune(model, images, COUNTS, **recipe)
    assert assigned == {(torch.float32, False)} and computed == {torch.bfloat16}
    assert {tensor.dtype for tensor in found.best.tensors().values()} == {torch.float32, torch.bool}
    whole = tune(load_model(read_checkpoint(tiny)), images, COUNTS, **recipe)
    assert found.trace[-1].validation_mse == pytest.approx(whole.trace[-1].validation_mse, rel=0.05)
    assert found.trace[-1].validation_mse < found.trace[0].validation_mse


@pytest.mark.parametrize(("settings", "message"), [
    ({"steps": -1}, "steps=-1 is below 0"), ({"batch_size": 0}, "batch_size=0 is below 1"),
    ({"accumulate": 0}, "accumulate=0 is below 1"), ({"patience": 0}, "patience=0 is below 1"),
    *(({"lr": lr}, f"lr={lr} is no learning rate; try --lr 0.001") for lr in (0.0, float("nan"), float("inf"))),
    *(({"clip": clip}, f"clip={clip} is no norm .*; try --clip 1") for clip in (0.0, float("nan"))),
    *(({"weight_ema": decay}, "is not within 0 and 1; try --weight-ema 0.999") for decay in (1.0, -0.1)),
    *(({"min_usage": share}, "is no share of the codes; try --min-usage 0.5") for share in (1.5, float("nan"))),
    *(({"distill": weight}, "is no weight; try --distill 1") for weight in (-1.0, float("nan"))),
    ({"entropy": -0.1}, "entropy=-0.1 is no weight; try --entropy 0.1"),
    ({"adversarial": True, "train": "none"}, "adversarial with train=none"),
    ({"optimizer": "muon", "train": "none"}, "optimizer=muon with train=none"),
    ({"train": "none", "codebook_update": "frozen"}, "nothing to train; use --steps 0"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CodebookError, match=message):
        FineTune(**settings)
    assert FineTune(steps=0, train="none", codebook_update="frozen").steps == 0


@pytest.fixture
def asked(images_folder: Path, tmp_path: Path) -> tuple[object, ...]:
    return ("--data", images_folder, "--input-range", "-1,1", "--steps", 30, "--batch-size", 8,
            "-o", tmp_path / "o.safetensors", "--json")  # fmt: skip


def test_a_surgery_whose_fine_tuning_loses_its_codes_is_kept_as_it_is(
    codebook: Run, tiny: Path, asked: tuple[object, ...], tmp_path: Path
) -> None:
    found = codebook("prune", tiny, "--lr", 30, "--min-usage", 0.5, *asked)
    assert found.exit_code == 0 and found.json["kept"] == "surgery", found
    (levers, kept) = found.json["warnings"]
    assert levers.startswith("at step 1 only ") and levers.endswith("try a lower --lr or --train decoder")
    assert kept == "fine-tuning lost codes: the state after surgery is kept"
    assert [path.name for path in tmp_path.glob("o.*")] == ["o.safetensors", "o.index_map.safetensors"]


def test_the_command_passes_them_on_and_says_why_it_ended(codebook: Run, tiny: Path, asked: tuple[object, ...]) -> None:
    options: dict[str, Any] = {"accumulate": 2, "clip": 1.5, "weight_ema": 0.5, "patience": 1, "min_usage": 0.05}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    found = codebook("finetune", tiny, "--lr", 1.0, *words, *asked)  # a rate without a gain after the first evaluation
    assert found.exit_code == 0, found.stderr
    assert {name: found.json["settings"][name] for name in options} == options
    assert found.json["trace"][-1]["step"] < 30
    assert any("--patience 1 evaluation steps without a gain" in warning for warning in found.json["warnings"])


@pytest.mark.parametrize(("settings", "optimizer"), [
    ({}, "muon"), ({"optimizer": "muon"}, "muon"), ({"optimizer": "adam"}, "adam"), ({"train": "none"}, "adam"),
    ({"adversarial": True}, "adam"), ({"adversarial": True, "optimizer": "muon"}, "muon"),
])  # fmt: skip
def test_muon_moves_kernels_unless_a_discriminator_trains(
    settings: dict[str, Any], optimizer: str, tiny: Path, images_folder: Path
) -> None:
    images = Images(find_images([images_folder]), 3, 16)
    assert tune(load_model(read_checkpoint(tiny)), images, [1] * 16, steps=1, **settings).optimizer == optimizer


@pytest.mark.parametrize("augment", ["mirror", "none"])
def test_the_second_visit_to_images_is_to_their_mirror_images_if_asked_for(
    augment: str, tiny: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = list[torch.Tensor]()
    gradients_of = Trainer._gradients_of

    def recorded(trainer: Trainer, media: torch.Tensor, fraction: float) -> dict[str, torch.Tensor]:
        visits.append(media)
        return gradients_of(trainer, media, fraction)

    monkeypatch.setattr(Trainer, "_gradients_of", recorded)
    tuned = tune(load_model(read_checkpoint(tiny)), images, COUNTS, steps=2, batch_size=48, augment=augment)
    first, second = ({image.numpy().tobytes() for image in visit} for visit in visits)
    mirrored = {image.flip(-1).contiguous().numpy().tobytes() for image in visits[1]}
    assert tuned.augment == augment and first == (second if augment == "none" else mirrored) and mirrored != second
