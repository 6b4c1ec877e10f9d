"""The training loop, one promise at a time: numbers worked by hand, and who moves and who does not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEAD, GREY, Grey
from runs import tune, weights_of
from sources_of_images import Images, find_images

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.data.splits import split
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.measure import measure
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.batches import Batches
from codebook_tools.training.finetune import FineTune, finetune
from codebook_tools.training.learning_rate import rate
from codebook_tools.training.trainer import Training

GreyImages = Callable[..., Images]
WriteModel = Callable[..., Path]

ROWS = [[0.2, 0.2], [0.4, 0.8]]
"""An image of mean 0.4 and variance 0.06. The codes 0 and 1 get 3 of its pixels and 1, at a mean error of 0.07."""


# --- the codebook's own movement -----------------------------------------------------------------------------------


def test_one_step_of_the_moving_average_is_the_one_worked_by_hand(
    line: Callable[..., Model], grey_images: GreyImages
) -> None:
    model = line([0.0, 1.0, 9.0])
    tune(model, grey_images(ROWS, ROWS), [2, 1, 1], steps=1, train="none")
    # Shares 0.5 and 0.25 move by 5% to the batch's 0.75 and 0.25; so do the sums, 0 and 0.25, to 0.2 and 0.2.
    first = 0.05 * 0.2 / (0.95 * 0.5 + 0.05 * 0.75)
    second = (0.95 * 0.25 + 0.05 * 0.2) / (0.95 * 0.25 + 0.05 * 0.25)
    torch.testing.assert_close(model.books[0].vectors[:2], torch.tensor([[first, 0.0], [second, 0.0]]))
    assert model.books[0].vectors[2].tolist() == [9.0, 0.0]  # no latent chose it


def test_two_steps_of_the_moving_average_go_on_from_the_first(
    line: Callable[..., Model], grey_images: GreyImages
) -> None:
    model = line([0.0, 1.0])
    tune(model, grey_images(ROWS), [3, 1], steps=2, train="none")
    share, total = 0.75, 0.0
    for _ in range(2):
        share, total = 0.95 * share + 0.05 * 0.75, 0.95 * total + 0.05 * 0.2
    assert model.books[0].vectors[0, 0].item() == pytest.approx(total / share, rel=1e-5)


def test_the_moving_average_does_not_depend_on_the_scale_of_the_counts(
    line: Callable[..., Model], grey_images: GreyImages
) -> None:
    ended = []
    for counts in ([3, 1], [3_000_000, 1_000_000]):
        model = line([0.0, 1.0])
        tune(model, grey_images(ROWS), counts, steps=3, train="none")
        ended.append(model.books[0].vectors)
    torch.testing.assert_close(*ended)


def test_the_learning_rate_is_by_the_network_and_not_by_its_codes(
    line: Callable[..., Model], grey_images: GreyImages
) -> None:
    """Its two small kernels have the highest rate there is; alone, codes have another."""

    def rate(**recipe: Any) -> float:
        return tune(line([0.0, 0.5, 1.0]), grey_images(ROWS), [3, 1, 0], steps=1, **recipe).lr

    assert rate() == rate(codebook_update="gradient") == 0.005
    assert rate(train="none", codebook_update="gradient") == 1e-3 and rate(lr=0.25) == 0.25


def test_a_gradient_step_moves_the_codes_in_use_towards_their_latents(
    line: Callable[..., Model], grey_images: GreyImages
) -> None:
    model = line([0.0, 1.0, 9.0])
    tune(model, grey_images(ROWS), [3, 1, 0], steps=1, train="none", codebook_update="gradient", lr=0.01)
    # Adam's first step is the learning rate, whatever the size of the gradient.
    expected = torch.tensor([[0.01, 0.0], [0.99, 0.0], [9.0, 0.0]])
    torch.testing.assert_close(model.books[0].vectors, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_codes_that_others_hold_stay_as_they_were(
    line: Callable[..., Model], grey_images: GreyImages, update: str
) -> None:
    model = line([0.0, 1.0, 9.0])
    held = model.books[0].codebook.vectors
    tune(model, outlier(grey_images), [8, 7, 0], steps=12, train="none", codebook_update=update)
    assert held.tolist() == [[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]]


def test_a_codebook_that_is_a_buffer_moves_like_any_other(grey: Callable[..., Grey], grey_images: GreyImages) -> None:
    made = grey([0.0, 1.0])
    script = Path(made.network.removesuffix(":make"))
    buffer = 'self.quantizer.codebook = nn.Module(); self.quantizer.codebook.register_buffer("weight", zeros(2, 2))'
    source = GREY.replace("self.quantizer.codebook = nn.Embedding(codebook_size, 2)", buffer)
    script.write_text("from torch import zeros\n" + source)
    for update, expected in (("gradient", 0.01), ("ema", 0.05 * 0.2 / 0.75)):
        model = load_model(read_checkpoint(made.path), network=made.network)
        model.input_range = (0.0, 1.0)
        tune(model, grey_images(ROWS), [3, 1], steps=1, train="none", codebook_update=update, lr=0.01)
        assert model.books[0].vectors[0, 0].item() == pytest.approx(expected, rel=1e-5)


# --- revival -------------------------------------------------------------------------------------------------------


def outlier(grey_images: GreyImages) -> Images:
    """Pixels that lie on the codes 0 and 1, but for one."""
    return grey_images([[0.0] * 8 + [1.0] * 7 + [0.4]])


def test_a_dead_code_moves_to_a_latent_drawn_by_its_error(line: Callable[..., Model], grey_images: GreyImages) -> None:
    model = line([0.0, 1.0, 9.0])
    found = tune(model, outlier(grey_images), [8, 7, 0], steps=12, train="none")
    assert [point.revived for point in found.trace] == [0] * 10 + [1] * (len(found.trace) - 10)
    assert found.best.step >= 10 and [codes.tolist() for codes in found.best.revived] == [[False, False, True]]
    assert model.books[0].vectors[2].tolist() == pytest.approx([0.4, 0.0])


def test_a_dead_code_rests_until_the_tenth_step(line: Callable[..., Model], grey_images: GreyImages) -> None:
    model = line([0.0, 1.0, 9.0])
    found = tune(model, outlier(grey_images), [8, 7, 0], steps=11, train="none")  # the tenth is after 90% of the run
    assert found.trace[-1].revived == 0 and model.books[0].vectors[2].tolist() == [9.0, 0.0]


@pytest.mark.parametrize("update", ["gradient", "frozen"])
def test_only_the_moving_average_revives(line: Callable[..., Model], grey_images: GreyImages, update: str) -> None:
    model = line([0.0, 1.0, 9.0])
    found = tune(model, outlier(grey_images), [8, 7, 0], steps=20, codebook_update=update)
    assert not found.best.revived[0].any() and found.trace[-1].revived == 0
    assert model.books[0].vectors[2].tolist() == [9.0, 0.0]


def test_no_more_codes_are_revived_than_latents_have_an_error(
    line: Callable[..., Model], grey_images: GreyImages
) -> None:
    model = line([0.0, 1.0, 7.0, 8.0, 9.0])
    found = tune(model, grey_images([[0.0, 0.0, 1.0, 1.0]]), [2, 2, 0, 0, 0], steps=20, train="none")
    assert found.trace[-1].revived == 0


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "update", "expected"),
    [
        ("mse", "ema", 0.07 / 0.06 * 2),
        ("mse", "gradient", 0.07 / 0.06 * 3),
        ("l1", "ema", 0.25 / 0.06**0.5 + 0.07 / 0.06),
    ],
)
def test_the_loss_is_the_error_and_the_commitment_in_units_of_their_variances(
    line: Callable[..., Model], grey_images: GreyImages, loss: str, update: str, expected: float
) -> None:
    found = tune(line([0.0, 1.0]), grey_images(ROWS), [3, 1], steps=1, loss=loss, codebook_update=update)
    assert found.trace[0].loss is None
    assert found.trace[1].loss == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_free_of_the_latents_scale(
    line: Callable[..., Model], grey: Callable[..., Grey], grey_images: GreyImages
) -> None:
    plain = tune(line([0.0, 1.0]), grey_images(ROWS), [3, 1], steps=1).trace[1].loss
    scaled = {"encoder.weight": torch.tensor([40.0, 0.0]), "decoder.weight": torch.tensor([0.025, 0.0])}
    model = line(
        [0.0, 40.0],
        {name: tensor.reshape(2, 1, 1, 1) for name, tensor in scaled.items()}
        | {"decoder.weight": scaled["decoder.weight"].reshape(1, 2, 1, 1)},
    )
    assert tune(model, grey_images(ROWS), [3, 1], steps=1).trace[1].loss == pytest.approx(plain, rel=1e-4)


# --- who trains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "update", "moving"),
    [
        ("all", "ema", {"encoder", "decoder", "codebook"}),
        ("all", "gradient", {"encoder", "decoder", "codebook"}),
        ("all", "frozen", {"encoder", "decoder"}),
        ("decoder", "ema", {"decoder", "codebook"}),
        ("decoder", "gradient", {"decoder", "codebook"}),
        ("decoder", "frozen", {"decoder"}),
        ("none", "ema", {"codebook"}),
        ("none", "gradient", {"codebook"}),
    ],
)
def test_only_what_is_said_to_train_moves(
    train: str, update: str, moving: set[str], tiny: Path, images_folder: Path
) -> None:
    model = load_model(read_checkpoint(tiny))
    images = Images(find_images([images_folder])[:16], 3, 4)
    before = weights_of(model)
    found = tune(model, images, [int(i not in DEAD) for i in range(16)], steps=2, train=train, codebook_update=update)
    moved = {name for name, tensor in weights_of(model).items() if not torch.equal(tensor, before[name])}
    sides = {"_encoder": "encoder", "_pre_vq_conv": "encoder", "_vq_vae": "codebook", "_decoder": "decoder"}
    assert {sides[name.partition(".")[0]] for name in moved} == moving
    networks = {name for name in before if name != CODEBOOK and sides[name.partition(".")[0]] in moving}
    assert set(found.trained) == networks
    assert moved >= networks - {name for name in networks if "residual" in name}
    assert set(found.groups) == moving - {"codebook"}


def test_gradients_pass_the_quantiser_straight_to_the_encoder(
    line: Callable[..., Model], grey_images: GreyImages, light_commitment: None
) -> None:
    model = line([0.0, 1.0])
    tune(model, grey_images(ROWS), [3, 1], steps=1, codebook_update="frozen", lr=0.01)
    # Reconstruction asks for a larger latent: the sum of (c - x) x is -0.2*0.2*2 - 0.4*0.4 + 0.2*0.8 = -0.08.
    # Commitment, a quarter as strong, asks for the opposite.
    weight = model.network.state_dict()["encoder.weight"].flatten()
    assert weight.tolist() == pytest.approx([1.01, 0.0], abs=1e-5)


def test_a_layer_used_twice_trains_as_one_and_is_named_under_all_its_keys(
    write_model: WriteModel, images_folder: Path
) -> None:
    model = load_model(read_checkpoint(write_model("tied")))
    images = Images(find_images([images_folder])[:16], 3, 4)
    found = tune(model, images, [1] * 16, steps=3)
    after = model.network.state_dict()
    for side in ("_encoder", "_decoder"):
        for block in ("1", "3"):
            keys = [f"{side}._residual_stack._layers.{i}._block.{block}.weight" for i in range(2)]
            assert torch.equal(after[keys[0]], after[keys[1]])
            assert set(keys) <= set(found.trained)


NORMED = GREY.replace(
    "self.decoder = nn.Conv2d(2, 1, 1, bias=False)",
    "self.norm = nn.BatchNorm2d(2, affine=False)\n        self.scale = nn.BatchNorm2d(2)\n"
    "        self.decoder = nn.Conv2d(2, 1, 1, bias=False)",
).replace("self.encoder(images)", "self.scale(self.encoder(images))")


def test_a_frozen_encoders_running_statistics_do_not_drift_and_a_trained_ones_are_named(
    grey: Callable[..., Grey], grey_images: GreyImages
) -> None:
    statistics = {
        f"{layer}.{name}": tensor
        for layer in ("norm", "scale")
        for name, tensor in (
            ("running_mean", torch.zeros(2)), ("running_var", torch.ones(2)), ("num_batches_tracked", torch.tensor(0))
        )
    }  # fmt: skip
    more = statistics | {"scale.weight": torch.ones(2), "scale.bias": torch.tensor([0.0, 1.0])}
    made = grey([0.0, 1.0], more=more)
    Path(made.network.removesuffix(":make")).write_text(NORMED)
    for train, moves in (("decoder", False), ("all", True)):
        model = load_model(read_checkpoint(made.path), network=made.network)
        model.input_range = (0.0, 1.0)
        found = tune(model, grey_images(ROWS, ROWS), [1, 1], steps=2, train=train)
        moved = not torch.equal(model.network.state_dict()["scale.running_mean"], torch.zeros(2))
        assert (
            moved == moves == ("scale.running_mean" in found.trained) == ("scale.num_batches_tracked" in found.trained)
        )
        assert not any(module.training for module in model.network.modules())


def test_a_parameter_of_both_halves_stays_where_the_decoder_trains_alone(
    grey: Callable[..., Grey], grey_images: GreyImages
) -> None:
    made = grey([0.0, 1.0], more={"gain": torch.ones(1)})
    source = GREY.replace("self.decoder = ", "self.gain = nn.Parameter(ones(1)); self.decoder = ")
    source = source.replace("return self.encoder(images)", "return self.encoder(images) * self.gain")
    source = source.replace("return self.decoder(quantised)", "return self.decoder(quantised) * self.gain")
    Path(made.network.removesuffix(":make")).write_text("from torch import ones\n" + source)
    for train, expected in (("decoder", ["decoder.weight"]), ("all", ["decoder.weight", "encoder.weight", "gain"])):
        model = load_model(read_checkpoint(made.path), network=made.network)
        model.input_range = (0.0, 1.0)
        found = tune(model, grey_images(ROWS), [3, 1], steps=2, train=train)
        assert list(found.trained) == expected
        assert (model.network.state_dict()["gain"].item() == 1) == (train == "decoder")


def test_a_network_that_cuts_its_gradients_cannot_be_trained(
    grey: Callable[..., Grey], grey_images: GreyImages
) -> None:
    made = grey([0.0, 1.0])
    script = Path(made.network.removesuffix(":make"))
    script.write_text(
        GREY.replace("(images)\n", "(images).detach()\n").replace("(quantised)\n", "(quantised).detach()\n")
    )
    model = load_model(read_checkpoint(made.path), network=made.network)
    model.input_range = (0.0, 1.0)
    with pytest.raises(CodebookError, match="no gradient reaches"):
        tune(model, grey_images(ROWS), [3, 1], steps=1)


# --- looks, and the state that is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "looks"),
    [(1, [0, 1]), (2, [0, 1, 2]), (25, [0, 1, *range(2, 25, 2), 25]), (250, [0, 1, 10, *range(25, 251, 25), 100])],
)
def test_looks_begin_at_step_0_and_tell_the_first_steps(
    line: Callable[..., Model], grey_images: GreyImages, steps: int, looks: list[int]
) -> None:
    found = tune(line([0.0, 1.0]), grey_images(ROWS), [3, 1], steps=steps, train="none")
    assert [point.step for point in found.trace] == sorted(set(looks))


def test_the_state_at_step_0_is_the_model_before_training(line: Callable[..., Model], grey_images: GreyImages) -> None:
    model, images = line([0.0, 1.0]), grey_images(ROWS)
    before, weights = measure(model, images, watch=Watch()), weights_of(model)
    found = tune(model, images, [3, 1], steps=3)
    assert found.start.validation_mse == found.trace[0].validation_mse == before.mse
    assert found.trace[0].distortion == before.codebooks[0].distortion
    found.start.restore(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(model).items())


def test_the_best_state_after_a_step_is_restored_exactly(
    line: Callable[..., Model], grey_images: GreyImages, light_commitment: None
) -> None:
    model, images = line([0.1, 0.9]), grey_images(ROWS)
    found = tune(model, images, [3, 1], steps=12, lr=0.3)
    errors = {point.step: point.validation_mse for point in found.trace if point.step}
    assert len(set(errors.values())) > 5 and found.best.step == min(errors, key=errors.__getitem__)
    assert found.best.step != 12  # so that restoring it is more than stopping
    assert measure(model, images, watch=Watch()).mse == found.best.validation_mse == errors[found.best.step]
    assert all(torch.equal(tensor, found.best.weights[name]) for name, tensor in model.network.state_dict().items())
    assert torch.equal(model.books[0].vectors, found.best.vectors[0])


def test_the_best_state_is_one_after_a_step_even_when_the_start_was_better(
    line: Callable[..., Model], grey_images: GreyImages
) -> None:
    exact = grey_images([[0.0, 1.0]])  # nothing to gain
    found = tune(line([0.0, 1.0]), grey_images(ROWS), [3, 1], exact, steps=3, lr=0.5)
    assert found.start.validation_mse == 0
    assert found.best.step >= 1 and found.best.validation_mse > 1e-4


def test_validation_images_alone_choose_the_state(line: Callable[..., Model], grey_images: GreyImages) -> None:
    images, other = grey_images(ROWS), grey_images([[0.0, 1.0]])
    chosen = tune(line([0.0, 1.0]), images, [3, 1], other, steps=12, train="none")
    errors = {point.step: point.validation_mse for point in chosen.trace if point.step}
    assert chosen.best.step == min(errors, key=errors.__getitem__) == 1
    assert tune(line([0.0, 1.0]), images, [3, 1], steps=12, train="none").best.step == 12


def test_no_gradient_sees_a_validation_image(line: Callable[..., Model], grey_images: GreyImages) -> None:
    ended = []
    for pixel in (0.3, 0.7):
        model = line([0.0, 1.0])
        found = tune(model, grey_images(ROWS), [3, 1], grey_images([[pixel, 1.0]]), steps=1)
        ended.append(found.best.weights | {"codes": found.best.vectors[0]})
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


# --- divergence, settings, and repetition --------------------------------------------------------------------------


def test_a_run_that_diverges_keeps_the_best_state_before(line: Callable[..., Model], grey_images: GreyImages) -> None:
    model = line([0.0, 1.0])
    model.network.encoder.weight.data[1] = 1e-3  # type: ignore[union-attr, operator]
    found = tune(model, grey_images(ROWS), [3, 1], steps=60, lr=1e12)
    assert found.diverged is not None and 1 <= found.best.step <= found.diverged.step
    assert found.trace[-1].step <= found.diverged.step
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights_of(model).values())


def test_a_run_that_diverges_at_once_says_so_and_leaves_the_model_as_it_was(tiny: Path, images_folder: Path) -> None:
    model, images = load_model(read_checkpoint(tiny)), Images(find_images([images_folder])[:8], 3, 4)
    before = weights_of(model)
    with pytest.raises(CodebookError, match=r"diverged at step 1: .*lower --lr"):
        tune(model, images, [1] * 16, steps=5, lr=1e30)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def test_a_tensor_that_is_not_finite_is_named_with_the_step(
    line: Callable[..., Model], grey_images: GreyImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient of step 3 overflows, and Adam puts it into a weight."""
    model, move = line([0.0, 1.0]), Training.move

    def spoilt(self: Training, step: int) -> None:
        if step == 3:
            dict(self.model.network.named_parameters())["decoder.weight"].grad.fill_(torch.inf)  # type: ignore[union-attr]
        move(self, step)

    monkeypatch.setattr(Training, "move", spoilt)
    found = tune(model, grey_images(ROWS), [3, 1], steps=60, lr=1e-3)
    assert str(found.diverged) == "fine-tuning diverged at step 4: decoder.weight is not finite"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps=-1 is below 0"),
        ({"batch_size": 0}, "batch_size=0 is below 1"),
        ({"lr": 0.0}, "lr=0.0 is no learning rate"),
        ({"lr": float("nan")}, "lr=nan is no learning rate"),
        ({"lr": float("inf")}, "lr=inf is no learning rate"),
        ({"train": "none", "codebook_update": "frozen"}, "nothing to train; use --steps 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CodebookError, match=message):
        FineTune(**settings)
    assert FineTune(steps=0, train="none", codebook_update="frozen").steps == 0


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny: Path, images_folder: Path) -> None:
    images = Images(find_images([images_folder]), 3, 4)
    ended = []
    for seed in (0, 0, 1):
        torch.rand(seed + 3)  # whatever else was drawn before
        model = load_model(read_checkpoint(tiny))
        counts = torch.tensor([int(i not in DEAD) for i in range(16)])
        recipe = FineTune(steps=12, batch_size=8)
        splits = split(images.items)
        finetune(model, images.subset(splits.train), images.subset(splits.validation), recipe, [counts],
                 seed=seed, watch=Watch())  # fmt: skip
        ended.append(torch.cat([tensor.flatten() for tensor in weights_of(model).values()]))
    assert torch.equal(ended[0], ended[1]) and not torch.equal(ended[0], ended[2])


def test_every_image_is_seen_once_before_one_is_seen_again(images_folder: Path) -> None:
    images = Images(find_images([images_folder])[:12], 3, 4)
    seen: list[bytes] = []
    batches = iter(Batches(images, 4, 0, torch.empty(1, 3, 16, 16)))
    for _ in range(6):
        batch, share = next(batches)
        seen += [pixels.numpy().tobytes() for pixels in batch]
        assert share == 1
    assert len(set(seen[:12])) == len(set(seen[12:])) == 12
    assert seen[:12] != seen[12:]


def test_the_learning_rate_warms_up_and_decays_to_a_twentieth() -> None:
    rates = [rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[49] == pytest.approx(0.5) and rates[99] == pytest.approx(1.0)
    assert rates[550] == pytest.approx(0.525) and rates[-1] == pytest.approx(0.05, abs=1e-4)
    assert all(a >= b for a, b in pairwise(rates[99:]))


def test_unreadable_images_are_left_out_of_training_when_asked(tiny: Path, images_folder: Path, tmp_path: Path) -> None:
    for i, file in enumerate(sorted(images_folder.rglob("*.png"))[:8]):
        (tmp_path / f"{i}.png").write_bytes(file.read_bytes() if i else b"no picture")
    images = Images(find_images([tmp_path]), 3, 4, skip_bad=True)
    model = load_model(read_checkpoint(tiny))
    found = tune(model, images, [1] * 16, steps=2, batch_size=4)
    assert list(images.bad) == ["0.png"] and len(found.trace) == 3
