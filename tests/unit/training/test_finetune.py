"""The training loop, one promise at a time: numbers worked by hand, who moves and who does not, and how fast."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEAD, GREY, Grey
from runs import ROWS, tune, weights_of
from sources_of_images import Images, find_images

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.measure import measure
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.batches import Batches
from codebook_tools.training.finetune import FineTune, FineTuned, finetune
from codebook_tools.training.learning_rate import relative_rates, schedule, usual_rate
from codebook_tools.training.trainer import Trainer

GreyImages = Callable[..., Images]
Line = Callable[..., Model]
Tuned = Callable[..., tuple[Model, FineTuned]]


@pytest.fixture
def images(images_folder: Path) -> Images:
    return Images(find_images([images_folder])[:16], 3, 4)


@pytest.fixture
def rewritten(grey: Callable[..., Grey]) -> Line:
    """rewritten({old: new}, more): a model of the network GREY with other source, at the codes 0 and 1."""

    def make(replaced: dict[str, str], more: dict[str, torch.Tensor] | None = None) -> Model:
        made, source = grey([0.0, 1.0], more=more), "from torch import ones, zeros\n" + GREY
        for old, new in replaced.items():
            assert old in source
            source = source.replace(old, new)
        Path(made.network.removesuffix(":make")).write_text(source)
        model = load_model(read_checkpoint(made.path), network=made.network)
        model.input_range = (0.0, 1.0)
        return model

    return make


# --- the codebook's own movement -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 1_000_000])
def test_one_step_of_the_moving_average_by_hand_at_any_scale_of_counts(tuned: Tuned, scale: int) -> None:
    model, _ = tuned([0.0, 1.0, 9.0], [2 * scale, scale, scale], ROWS, ROWS, steps=1, train="none")
    # Shares 0.5 and 0.25 move by 5% to the batch's 0.75 and 0.25; so do the sums, 0 and 0.25, to 0.2 and 0.2.
    first = 0.05 * 0.2 / (0.95 * 0.5 + 0.05 * 0.75)
    second = (0.95 * 0.25 + 0.05 * 0.2) / (0.95 * 0.25 + 0.05 * 0.25)
    torch.testing.assert_close(model.books[0].vectors[:2], torch.tensor([[first, 0.0], [second, 0.0]]))
    assert model.books[0].vectors[2].tolist() == [9.0, 0.0]  # no latent chose it


def test_the_learning_rate_is_by_the_network_and_not_by_its_codes(tuned: Tuned) -> None:
    """Its two small kernels have the highest rate there is; alone, codes have another."""

    def lr(**recipe: Any) -> float:
        return tuned([0.0, 0.5, 1.0], [3, 1, 0], ROWS, steps=1, **recipe)[1].lr

    assert lr() == lr(codebook_update="gradient") == 0.005
    assert lr(lr=0.25) == 0.25


@pytest.mark.parametrize("scale", [1, 40])
def test_codes_alone_learn_in_units_of_their_latents(scale: float, line: Line, grey_images: GreyImages) -> None:
    """Latents (x, 0) have half of the pixels' variance, 0.06; and the one image of a step is a 64th of the usual."""
    weights = torch.tensor([scale, 0.0]).reshape(2, 1, 1, 1), torch.tensor([1 / scale, 0.0]).reshape(1, 2, 1, 1)
    model = line([0.0, scale], dict(zip(("encoder.weight", "decoder.weight"), weights, strict=True)))
    tuning = tune(model, grey_images(ROWS), [3, 1], steps=1, train="none", codebook_update="gradient")
    assert tuning.lr == pytest.approx(0.01 * 0.03**0.5 * scale / 8)
    moved = [tuning.lr, scale - tuning.lr]  # Adam's first step
    assert model.books[0].vectors[:, 0].tolist() == pytest.approx(moved, rel=1e-5)


def test_codes_alone_end_where_a_linear_decoder_has_the_least_squares_solution(
    line: Line, grey_images: GreyImages
) -> None:
    """It shows the code c as 0.9 c1 + 0.3 c2, best at the mean pixel of a cell. Means of latents are shown darker."""
    decoder = torch.tensor([0.9, 0.3])
    for update, expected in (("gradient", [0.8 / 3, 0.8]), ("ema", [0.9 * 0.8 / 3, 0.9 * 0.8])):
        model = line([0.0, 1.0], {"decoder.weight": decoder.reshape(1, 2, 1, 1)})
        before = weights_of(model)
        recipe = {"steps": 300, "train": "none", "codebook_update": update, "lr": 0.02}
        tune(model, grey_images(ROWS), [3, 1], **recipe)
        assert (model.books[0].vectors @ decoder).tolist() == pytest.approx(expected, abs=1e-3)
        unmoved = {name for name, tensor in weights_of(model).items() if torch.equal(tensor, before[name])}
        assert unmoved == {"encoder.weight", "decoder.weight"}


def test_codes_alone_need_a_decoder_that_lets_gradients_through(rewritten: Line, grey_images: GreyImages) -> None:
    detached = {"self.decoder(quantised)": "self.decoder(quantised).detach()"}
    with pytest.raises(CodebookError, match="no gradient reaches the codes through decode; use codebook_update=ema"):
        tune(rewritten(detached), grey_images(ROWS), [3, 1], steps=1, train="none", codebook_update="gradient")


def test_codes_in_use_move_towards_their_latents_be_they_a_parameter_or_a_buffer(
    rewritten: Line, grey_images: GreyImages
) -> None:
    """Adam's first step is the learning rate, whatever the size of the gradient."""
    embedding = "self.quantizer.codebook = nn.Embedding(codebook_size, 2)"
    buffer = 'self.quantizer.codebook = nn.Module(); self.quantizer.codebook.register_buffer("weight", zeros(3, 2))'
    average = [0.05 * 0.2 / 0.75, 0.95 + 0.05 * 0.8]
    for source, (update, ends) in product((embedding, buffer), {"gradient": [0.01, 0.99], "ema": average}.items()):
        model = rewritten({embedding: source}, {"quantizer.codebook.weight": torch.tensor([[0.0, 0], [1, 0], [9, 0]])})
        tune(model, grey_images(ROWS), [3, 1, 0], steps=1, train="none", codebook_update=update, lr=0.01)
        expected = torch.tensor([[first, 0.0] for first in (*ends, 9.0)])
        torch.testing.assert_close(model.books[0].vectors, expected, rtol=0, atol=1e-6)


# --- revival -------------------------------------------------------------------------------------------------------

OUTLIER = [[0.0] * 8 + [1.0] * 7 + [0.4]]
"""Pixels that lie on the codes 0 and 1, but for one."""


def test_a_dead_code_moves_to_a_latent_drawn_by_its_error(line: Line, grey_images: GreyImages) -> None:
    model = line([0.0, 1.0, 9.0])
    before = model.books[0].codebook.vectors
    found = tune(model, grey_images(OUTLIER), [8, 7, 0], steps=12, train="none")
    assert [point.revived for point in found.trace] == [0] * 10 + [1] * (len(found.trace) - 10)
    assert found.best.step >= 10 and [codes.tolist() for codes in found.best.revived] == [[False, False, True]]
    assert model.books[0].vectors[2].tolist() == pytest.approx([0.4, 0.0])
    assert before.tolist() == [[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]]  # whoever has these keeps them


@pytest.mark.parametrize(("codes", "image", "recipe"), [
    ([0.0, 1.0, 9.0], OUTLIER, {"steps": 11, "train": "none"}),  # the tenth is after 90% of the run
    ([0.0, 1.0, 9.0], OUTLIER, {"steps": 20, "codebook_update": "gradient"}),
    ([0.0, 1.0, 9.0], OUTLIER, {"steps": 20, "codebook_update": "frozen"}),
    ([0.0, 1.0, 7.0, 9.0], [[0.0, 0.0, 1.0, 1.0]], {"steps": 20, "train": "none"}),  # no latent has an error
])  # fmt: skip
def test_a_dead_code_rests(codes: list[float], image: list[list[float]], recipe: dict[str, Any], tuned: Tuned) -> None:
    model, found = tuned(codes, [8, 7, 0, 0][: len(codes)], image, **recipe)
    assert found.trace[-1].revived == 0 and not found.best.revived[0].any()
    assert model.books[0].vectors[-1].tolist() == [9.0, 0.0]


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 40])
def test_the_loss_is_the_error_and_the_commitment_in_units_of_their_variances(
    scale: float, line: Line, grey_images: GreyImages
) -> None:
    weights = torch.tensor([scale, 0.0]).reshape(2, 1, 1, 1), torch.tensor([1 / scale, 0.0]).reshape(1, 2, 1, 1)
    for loss, train, update, expected in (
        ("mse", "all", "ema", 0.07 / 0.06 * 1.25),
        ("mse", "all", "gradient", 0.07 / 0.06 * 2.25),
        ("mse", "none", "gradient", 0.07 / 0.06 * 1.25),  # the decoder alone moves the codes
        ("l1", "all", "ema", 0.25 / 0.06**0.5 + 0.07 / 0.06 * 0.25),
    ):
        model = line([0.0, scale], dict(zip(("encoder.weight", "decoder.weight"), weights, strict=True)))
        recipe = {"steps": 1, "loss": loss, "train": train, "codebook_update": update}
        trace = tune(model, grey_images(ROWS), [3, 1], **recipe).trace
        assert trace[0].loss is None and trace[1].loss == pytest.approx(expected, rel=1e-4)


# --- who trains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "update", "moving"), [
    ("all", "ema", {"encoder", "decoder", "codebook"}), ("all", "frozen", {"encoder", "decoder"}),
    ("decoder", "gradient", {"decoder", "codebook"}), ("decoder", "frozen", {"decoder"}), ("none", "ema", {"codebook"}),
    ("none", "gradient", {"codebook"}),
])  # fmt: skip
def test_only_what_is_to_train_moves(train: str, update: str, moving: set[str], tiny: Path, images: Images) -> None:
    model = load_model(read_checkpoint(tiny))
    before = weights_of(model)
    found = tune(model, images, [int(i not in DEAD) for i in range(16)], steps=2, train=train, codebook_update=update)
    moved = {name for name, tensor in weights_of(model).items() if not torch.equal(tensor, before[name])}
    sides = {"_encoder": "encoder", "_pre_vq_conv": "encoder", "_vq_vae": "codebook", "_decoder": "decoder"}
    assert {sides[name.partition(".")[0]] for name in moved} == moving
    networks = {name for name in before if name != CODEBOOK and sides[name.partition(".")[0]] in moving}
    assert set(found.trained) == networks
    assert moved >= networks - {name for name in networks if "residual" in name}
    assert set(found.groups) == moving - {"codebook"}


def test_gradients_pass_the_quantizer_straight_to_the_encoder(tuned: Tuned) -> None:
    model, _ = tuned([0.0, 1.0], [3, 1], ROWS, steps=1, codebook_update="frozen", lr=0.01)
    # Reconstruction asks for a larger latent: the sum of (c - x) x is -0.2*0.2*2 - 0.4*0.4 + 0.2*0.8 = -0.08.
    # Commitment, a quarter as strong, asks for the opposite.
    weight = model.network.state_dict()["encoder.weight"].flatten()
    assert weight.tolist() == pytest.approx([1.01, 0.0], abs=1e-5)


def test_a_layer_used_twice_trains_as_one_and_is_named_by_all_keys(
    write_model: Callable[..., Path], images: Images
) -> None:
    model = load_model(read_checkpoint(write_model("tied")))
    found = tune(model, images, [1] * 16, steps=3)
    after = model.network.state_dict()
    for name in ("_encoder", "_decoder"):
        keys = [f"{name}._residual_stack._layers.{i}._block.1.weight" for i in range(2)]
        assert torch.equal(after[keys[0]], after[keys[1]]) and set(keys) <= set(found.trained)


@pytest.mark.parametrize(("train", "moves"), [("decoder", False), ("all", True)])
def test_a_frozen_encoders_running_statistics_do_not_drift_and_a_trained_ones_are_named(
    train: str, moves: bool, rewritten: Line, grey_images: GreyImages
) -> None:
    layers = "self.norm = nn.BatchNorm2d(2, affine=False); self.scale = nn.BatchNorm2d(2); self.decoder = "
    fresh = {"running_mean": torch.zeros(2), "running_var": torch.ones(2), "num_batches_tracked": torch.tensor(0)}
    more = {f"{layer}.{name}": tensor.clone() for layer in ("norm", "scale") for name, tensor in fresh.items()}
    more |= {"scale.weight": torch.ones(2), "scale.bias": torch.tensor([0.0, 1.0])}
    model = rewritten({"self.decoder = ": layers, "self.encoder(images)": "self.scale(self.encoder(images))"}, more)
    found = tune(model, grey_images(ROWS, ROWS), [1, 1], steps=2, train=train)
    moved = not torch.equal(model.network.state_dict()["scale.running_mean"], torch.zeros(2))
    assert moved == moves == ({"scale.running_mean", "scale.num_batches_tracked"} <= {*found.trained})
    assert not any(module.training for module in model.network.modules())


@pytest.mark.parametrize(
    ("train", "trained"), [("decoder", ["decoder.weight"]), ("all", ["decoder.weight", "encoder.weight", "gain"])]
)
def test_a_parameter_of_both_halves_stays_where_the_decoder_trains_alone(
    train: str, trained: list[str], rewritten: Line, grey_images: GreyImages
) -> None:
    replaced = {"self.decoder = ": "self.gain = nn.Parameter(ones(1)); self.decoder = "}
    replaced |= {"self.encoder(images)": "self.encoder(images) * self.gain"}
    replaced |= {"self.decoder(quantised)": "self.decoder(quantised) * self.gain"}
    model = rewritten(replaced, {"gain": torch.ones(1)})
    assert list(tune(model, grey_images(ROWS), [3, 1], steps=2, train=train).trained) == trained
    assert (model.network.state_dict()["gain"].item() == 1) == (train == "decoder")


def test_a_network_that_cuts_its_gradients_cannot_be_trained(rewritten: Line, grey_images: GreyImages) -> None:
    model = rewritten({"(images)\n": "(images).detach()\n", "(quantised)\n": "(quantised).detach()\n"})
    with pytest.raises(CodebookError, match="no gradient reaches"):
        tune(model, grey_images(ROWS), [3, 1], steps=1)


# --- evaluation steps, and the state that is kept ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1, [0, 1]), (25, [0, 1, *range(2, 25, 2), 25]), (250, [0, 1, 10, *range(25, 251, 25), 100])],
)
def test_evaluations_begin_at_step_0_and_cover_the_first_steps(tuned: Tuned, steps: int, expected: list[int]) -> None:
    _, found = tuned([0.0, 1.0], [3, 1], ROWS, steps=steps, train="none")
    assert [point.step for point in found.trace] == sorted(set(expected))


def test_the_state_at_step_0_is_the_model_before_training(line: Line, grey_images: GreyImages) -> None:
    model, images = line([0.0, 1.0]), grey_images(ROWS)
    before, weights = measure(model, images, watch=Watch()), weights_of(model)
    found = tune(model, images, [3, 1], steps=3)
    assert found.start.validation_mse == found.trace[0].validation_mse == before.mse
    assert found.trace[0].distortion == before.codebooks[0].distortion
    found.start.restore(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(model).items())


def test_the_best_state_after_a_step_is_restored_exactly(line: Line, grey_images: GreyImages) -> None:
    model, images = line([0.1, 0.9]), grey_images(ROWS)
    found = tune(model, images, [3, 1], steps=12, lr=0.3)
    errors = {point.step: point.validation_mse for point in found.trace if point.step}
    assert len(set(errors.values())) > 5 and found.best.step == min(errors, key=errors.__getitem__)
    assert found.best.step != 12  # so that restoring it is more than stopping
    assert measure(model, images, watch=Watch()).mse == found.best.validation_mse == errors[found.best.step]
    assert all(torch.equal(tensor, found.best.weights[name]) for name, tensor in model.network.state_dict().items())
    assert torch.equal(model.books[0].vectors, found.best.vectors[0])


def test_validation_alone_chooses_the_state_though_the_start_was_better(tuned: Tuned, grey_images: GreyImages) -> None:
    recipe: dict[str, Any] = {"steps": 40, "train": "none", "patience": 3}
    _, found = tuned([0.0, 1.0], [3, 1], ROWS, validation=grey_images([[0.0, 1.0]]), **recipe)  # nothing to gain
    errors = {point.step: point.validation_mse for point in found.trace if point.step}
    assert [*errors] == [1, 4, 8, 10] and found.start.validation_mse == 0 < found.best.validation_mse
    assert found.best.step == min(errors, key=errors.__getitem__) == 1
    assert found.stopped == "the fine-tuning was stopped at step 10: --patience 3 evaluation steps without a gain"
    assert tuned([0.0, 1.0], [3, 1], ROWS, steps=12, train="none")[1].best.step == 12


def test_no_gradient_sees_a_validation_image(tuned: Tuned, grey_images: GreyImages) -> None:
    one, other = (
        tuned([0.0, 1.0], [3, 1], ROWS, validation=grey_images([[pixel, 1.0]]), steps=1)[1].best.tensors()
        for pixel in (0.3, 0.7)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- divergence and repetition -------------------------------------------------------------------------------------


def test_a_run_that_diverges_keeps_the_best_state_before(line: Line, grey_images: GreyImages) -> None:
    model = line([0.0, 1.0])
    model.network.encoder.weight.data[1] = 1e-3  # type: ignore[union-attr, operator]
    found = tune(model, grey_images(ROWS), [3, 1], steps=60, lr=1e12)
    assert found.diverged is not None and 1 <= found.best.step <= found.diverged.step
    assert found.trace[-1].step <= found.diverged.step
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights_of(model).values())


def test_a_run_that_diverges_at_once_says_so_and_leaves_the_model_as_it_was(tiny: Path, images: Images) -> None:
    model = load_model(read_checkpoint(tiny))
    before = weights_of(model)
    with pytest.raises(CodebookError, match=r"diverged at step 1: .*lower --lr"):
        tune(model, images, [1] * 16, steps=5, lr=1e30)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(model).items())


def test_a_tensor_that_is_not_finite_is_named_with_the_step(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of step 3 overflows, and Adam puts it into a weight."""
    move = Trainer.move

    def spoilt(self: Trainer, step: int) -> None:
        if step == 3:
            dict(self.model.network.named_parameters())["decoder.weight"].grad.fill_(torch.inf)  # type: ignore[union-attr]
        move(self, step)

    monkeypatch.setattr(Trainer, "move", spoilt)
    _, found = tuned([0.0, 1.0], [3, 1], ROWS, steps=60, lr=1e-3)
    assert str(found.diverged) == "fine-tuning diverged at step 4: decoder.weight is not finite"


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny: Path, images: Images) -> None:
    counts, ended = torch.tensor([int(i not in DEAD) for i in range(16)]), []
    for seed in (0, 0, 1):
        torch.rand(seed + 3)  # whatever else was drawn before
        model = load_model(read_checkpoint(tiny))
        finetune(model, images, images, FineTune(steps=10, batch_size=4), [counts], seed=seed, watch=Watch())
        ended.append(torch.cat([tensor.flatten() for tensor in weights_of(model).values()]))
    assert torch.equal(ended[0], ended[1]) and not torch.equal(ended[0], ended[2])


def test_every_image_is_seen_once_before_one_is_seen_again(images: Images) -> None:
    batches = iter(Batches(images, 4, 0, torch.empty(1, 3, 16, 16)))
    pixels = [image.numpy().tobytes() for _ in range(8) for image in next(batches)[0]]
    assert len(set(pixels[:16])) == len(set(pixels[16:])) == 16 and pixels[:16] != pixels[16:]


@pytest.mark.parametrize("drawn", [0, 3, 6])
def test_every_other_epoch_is_mirrored_from_wherever_it_is_resumed(images: Images, drawn: int) -> None:
    plain, mirrored = (Batches(images, 4, 0, torch.empty(1, 3, 16, 16), mirror) for mirror in (False, True))
    mirrored.drawn = drawn
    expected = [batch for batch, _ in islice(plain, 12)]
    expected[4:8] = [batch.flip(-1) for batch in expected[4:8]]
    for batch, (ours, fraction) in zip(expected[drawn:], mirrored, strict=False):
        assert torch.equal(batch, ours) and fraction == 1
    assert mirrored.drawn == 12


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    rates = [schedule(step, 1000) for step in range(1000)]
    assert [rates[step] for step in (0, 49, 99, 550, 999)] == pytest.approx([0.01, 0.5, 1.0, 0.5, 1 / 900])
    assert all(a >= b for a, b in pairwise(rates[99:]))
    assert [schedule(step, 3) for step in range(3)] == [1, 1, 0.5]


def of(size: float, *shape: int) -> torch.Tensor:
    return torch.full(shape, size)


@pytest.mark.parametrize(("tensors", "expected"), [
    ([of(0.01, 4, 4), of(0.04, 8, 2, 3, 3), of(0.16, 2, 2)], [0.25, 1, 4]),  # in proportion to their size
    ([of(0.05, 4, 4), of(0, 4, 4), of(0, 4), of(1, 4)], [1, 0.105, 0.105, 1]),  # fresh ones slowly, gains at most 1
    ([of(1, 4), of(3, 4)], [1, 1]),  # gains alone
])  # fmt: skip
def test_tensors_learn_in_proportion_to_their_size(tensors: list[torch.Tensor], expected: list[float]) -> None:
    assert relative_rates(tensors) == pytest.approx(expected, rel=0.01)


def test_a_layer_that_is_scaled_while_the_next_makes_up_for_it_learns_as_before() -> None:
    plain = relative_rates([of(0.05, 4, 4), of(0.1, 4), of(0.03, 4, 4), of(0.02, 4)])
    scaled = relative_rates([of(0.5, 4, 4), of(1.0, 4), of(0.003, 4, 4), of(0.02, 4)])
    assert [scaled[0] / plain[0], scaled[2] / plain[2]] == pytest.approx([10, 0.1], rel=0.2)
    assert scaled[3] == plain[3]


def test_the_usual_rate_falls_with_depth_and_with_the_roots_of_width_and_of_fewer_images() -> None:
    deep = [of(0.3, 8, 300), of(1.0, 8)] * 10
    assert usual_rate(deep, 64) == pytest.approx(1.25 / 30 / 10)  # entries begin at 1 / sqrt(3 · 300)
    assert usual_rate([of(0.3, 8, 300, 2, 2)] * 20, 64) == pytest.approx(1.25 / 60 / 20)
    assert usual_rate(deep, 16) == pytest.approx(1.25 / 60 / 10)
    assert usual_rate([of(0.3, 8, 12)], 64) == 0.005
    assert usual_rate([of(1.0, 8)], 64) == 1e-3
