"""The terms of a fine-tuning's loss, their targets and what they choose: entropy, and distance to the original."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from audio_codecs import CASES, save, waveforms
from conftest import Run, assert_refused, same
from points import normal
from runs import tune
from sources_of_images import Images, find_images
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.clustering.metric import COSINE, DOT
from codebook_tools.codebook import EUCLIDEAN, Codebook
from codebook_tools.errors import CodebookError
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.training.finetune import FineTune
from codebook_tools.training.history import History
from codebook_tools.training.losses import entropy
from codebook_tools.training.losses.adversarial import SHARE
from codebook_tools.training.losses.distillation import Original
from codebook_tools.training.losses.entropy import indecision
from codebook_tools.training.losses.objective import Objective, judges, objective_of, validation_loss
from codebook_tools.training.losses.reconstruction import Quantized, Reconstruction, Scales
from codebook_tools.training.parameters import set_trainable
from codebook_tools.training.state import TracePoint, is_better
from codebook_tools.training.trainer import Trainer

WriteModel = Callable[..., Path]
PLAIN = Reconstruction(Scales(pixels=0.25, latents=()), "l1", moves_codes=False, entropy=0.0)
MEDIA = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
EMPTY = torch.zeros(1, 4, 1, 1)


@pytest.fixture
def model(tiny: Path) -> Model:
    return load_model(read_checkpoint(tiny))


@pytest.fixture
def images(images_folder: Path) -> Images:
    return Images(find_images([images_folder]), 3, 4)


@pytest.mark.parametrize("variant", ["plain", "weight_norm_newer", "tied", "float16"])
def test_the_target_is_the_bits_of_the_untouched_model(
    variant: str, write_model: WriteModel, image_tensor: Tensor
) -> None:
    model = load_model(read_checkpoint(write_model(variant)))
    expected = model.pass_through(image_tensor).media
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(1.5).requires_grad_(True)
    model.install(replace(model.books[0].codebook, vectors=torch.randn(5, 4)))  # after a surgery, and another network
    set_trainable(model, {name for name, _ in model.own_parameters()})
    original = Original(model)
    model.network.train()
    target = original(image_tensor)
    assert same(target, expected) and not target.requires_grad
    assert len(model.books[0].vectors) == 5 and not original.model.network.training


def test_the_distance_to_it_is_in_the_units_of_the_reconstruction() -> None:
    """|0.5 - 0.1| and |0.5 - 0.3| in deviations of 0.5, the second at weight 3."""
    output, media, original = (torch.full((1, 1, 2, 2), value) for value in (0.5, 0.1, 0.3))
    ours = Objective(PLAIN, {"distill": lambda output, _: 3 * PLAIN.error(output, original)})
    terms = {name: term.item() for name, term in ours(output, media, []).items()}
    assert terms == pytest.approx({"reconstruction": 0.8, "distill": 3 * 0.4})
    assert ours.error(output, media).item() == pytest.approx(2.0)


def test_a_large_weight_keeps_a_model_where_it_was(model: Model, images: Images) -> None:
    """Trained on other pictures than its own, the decoder drifts less from what it reconstructed."""
    before, moved = model.pass_through(MEDIA).media, {}
    for weight in (0.0, 100.0):
        tuned = load_model(model.checkpoint)
        tune(tuned, images, [1] * 16, steps=10, batch_size=16, codebook_update="frozen", distill=weight)
        moved[weight] = float((tuned.pass_through(MEDIA).media - before).square().mean())
    assert 0 < moved[100] < moved[0] / 3


def objective(model: Model, images: Images, **recipe: Any) -> Any:
    set_trainable(model, {name for name, _ in model.own_parameters()})
    pixels = images.load(images.items[:1])[1]
    return objective_of(model, images, FineTune(**recipe), pixels, seed=0)


def test_a_recipe_without_more_terms_is_the_plain_objective(model: Model, images: Images) -> None:
    plain = objective(model, images)
    assert plain.state() == {} and not plain.more and validation_loss(plain, model, images) is None


def test_the_discriminator_counts_when_it_has_learnt_for_a_quarter_of_the_run(model: Model, images: Images) -> None:
    ours = objective(model, images, steps=12, adversarial=True)
    counts = list[bool]()
    for _ in range(5):
        output = model.run(MEDIA, lambda stage, latents: latents)
        terms = ours(output, MEDIA, [Quantized(EMPTY, EMPTY, EMPTY, model.books[0])])
        assert terms.pop("commitment") == 0 and terms.keys() == {"reconstruction", "adversarial"}
        counts.append(bool(terms["adversarial"] != 0))
        if counts[-1]:
            layer = ours.adversary.layer
            error, term = (torch.autograd.grad(of, layer, retain_graph=True)[0].norm() for of in terms.values())
            assert term.item() == pytest.approx(SHARE * error.item(), rel=1e-2)
        ours.step()
    assert counts == [False, False, False, True, True] and FineTune(steps=12, adversarial=True).settled_from == 4


def test_states_from_before_it_counts_give_way(model: Model, images: Images) -> None:
    """However low their error was; the one at step 0, too."""
    train, validation = images.subset(images.items[:50]), images.subset(images.items[50:])
    recipe = FineTune(steps=8, adversarial=True, batch_size=8)
    history = History(Trainer(model, train, recipe, [torch.ones(16)], seed=0, more={}, powers={}), validation, None)
    kept = []
    for step, error in zip((1, 2, 3, 4, 8), (0.1, 0.2, 0.5, 0.4, 0.6), strict=True):
        point = replace(history.trace[0], step=step, validation_loss=error)
        history._measured = lambda *_, point=point: point  # type: ignore
        history.evaluate(step, None)
        assert history.best is not None
        kept.append(history.best.step)
    assert kept == [1, 1, 3, 4, 4]


@pytest.mark.parametrize(("step", "error", "settled_from", "kept"), [
    (5, 0.3, 0, False), (5, 0.1, 0, True), (5, 0.3, 6, False), (5, 0.1, 6, True), (6, 0.3, 6, True),
])  # fmt: skip
def test_what_began_before_all_terms_counted_is_no_bar(step: int, error: float, settled_from: int, kept: bool) -> None:
    start, best = (TracePoint(at, None, of, 1, 1.0, 1.0, 0) for at, of in ((0, 0.2), (step, error)))
    assert is_better(best, start, settled_from) is kept


def test_validation_data_are_judged_by_all_terms_but_the_discriminators(model: Model, images: Images) -> None:
    ours = objective(model, images, steps=4, adversarial=True, distill=2.0, loss="l1")
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(1.01)
        media = images.load(images.items)[1]
        output = model.pass_through(media).media.clamp(0, 1)
        original = load_model(model.checkpoint).pass_through(media).media
    deviation = float(media.movedim(1, -1).flatten(0, -2).double().var(0, correction=0).mean()) ** 0.5
    expected = float((output - media).abs().mean() + 2 * (output - original).abs().mean()) / deviation
    assert validation_loss(ours, model, images) == pytest.approx(expected, rel=1e-4)


def test_what_takes_sound_has_no_pictures_to_judge_and_can_be_distilled(tmp_path: Path) -> None:
    """Two codebooks and more, too: the target walks them as the original does."""
    pytest.importorskip("transformers")
    case = CASES["encodec"]
    model = load_model(read_checkpoint(save(case, tmp_path / "codec")))
    sound = waveforms(model.network)
    for recipe in (FineTune(adversarial=True), FineTune(perceptual="auto")):
        with pytest.raises(CodebookError, match="judge images; this model takes clips"):
            judges(model, recipe, sound)
    expected = model.pass_through(sound).media
    for stage, book in enumerate(model.books):
        model.install(replace(book.codebook, vectors=torch.zeros(2, book.stored.dim)), stage)
    assert same(Original(model)(sound), expected) and not torch.equal(model.pass_through(sound).media, expected)


def test_images_too_small_to_judge_are_refused_at_once(codebook: Run, tiny: Path, images_folder: Path) -> None:
    small = ("--data", images_folder, "--size", 4, "--input-range", "-1,1")
    found = codebook("refit", tiny, "--k", 4, *small, "--steps", 1, "--adversarial", "--quiet")
    assert_refused(found, "--adversarial: 4 pixels a side are too few")


QUARTERS = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
"""The entropy of (3/4, 1/4) in bits."""

# 4 x = 0.3 log 3 (1 - x)^2: the other code is farther by log 3 times 0.3 of the distance, so a third as likely.
B = 2 + 4 / (0.3 * math.log(3))
THIRD = (B - math.sqrt(B * B - 4)) / 2


@pytest.mark.parametrize(("rows", "codes", "expected"), [
    ([-0.9, 0.9], [-1, 1], -1),  # sure latents count by how evenly they choose
    ([-0.9, -1.1, -0.9, 0.9], [-1, 1], -QUARTERS), ([0.9, 1.1], [-1, 1], 0),
    ([0, 0], [-1, 1], 0),  # undecided latents do not count as spread
    ([-THIRD, THIRD], [-1, 1], QUARTERS - 1),
    ([-1, 1], [-1, 1], -1),  # latents on their codes
    ([1, 1], [1, 1], 0),
    ([1, 1, 1], [0], 0),  # one code leaves no choice
])  # fmt: skip
def test_the_entropy_by_hand(rows: list[float], codes: list[float], expected: float) -> None:
    latents = torch.tensor(rows, dtype=torch.float32)[:, None].requires_grad_()
    loss = indecision(latents, torch.tensor(codes, dtype=torch.float32)[:, None], EUCLIDEAN)
    assert loss.item() == pytest.approx(expected, abs=1e-3)
    if len(codes) > 1:
        torch.autograd.backward(loss)
        assert latents.grad is not None and latents.grad.isfinite().all()


def test_scale_does_not_matter_by_cosine_no_length_and_some_of_many_latents_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = normal(200, 3)
    small, large = rows.clone().requires_grad_(True), (10 * rows).requires_grad_(True)
    values = [indecision(x, scale * rows[:9] + scale, EUCLIDEAN) for x, scale in ((small, 1), (large, 10))]
    torch.autograd.backward(values)
    assert small.grad is not None and large.grad is not None
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(small.grad, 10 * large.grad)
    lengths = normal(200, 1, seed=1).abs() + 0.5
    values = [indecision(x, rows[:9] * lengths[:9], COSINE) for x in (rows[9:], rows[9:] * lengths[9:])]
    torch.testing.assert_close(values[0], values[1])
    codes = rows[:4]
    expected = indecision(rows[::3], codes, EUCLIDEAN)
    monkeypatch.setattr(entropy, "_AT_MOST", 4 * 80)  # 200 rows are 800 distances
    torch.testing.assert_close(indecision(rows, codes, EUCLIDEAN), expected)


def test_a_recipe_weighs_the_entropy(tuned: Callable[..., tuple[Model, Any]]) -> None:
    """Pixels of 0.2 and 0.8 are sure of their codes, and choose both alike."""
    rows = [[0.2, 0.8], [0.2, 0.8]]
    runs = (tuned([0.2001, 0.8001], [1, 1], rows, steps=1, entropy=weight)[1] for weight in (0.0, 0.5))
    plain, weighed = (run.trace[1].loss for run in runs)
    assert weighed == pytest.approx(plain - 0.5, abs=1e-3)


def test_inner_products_are_no_distances(line: Callable[..., Model], grey_images: Callable[..., Images]) -> None:
    model, images = line([0.2, 0.8]), grey_images([[0.2, 0.8], [0.2, 0.8]])
    model.books[0].metric = DOT
    with pytest.raises(CodebookError, match="--entropy goes by distances"):
        objective_of(model, images, FineTune(entropy=0.1), next(images.batches(1))[1], seed=0)


def test_terms_of_the_codebooks_are_means_over_stages_in_units_of_the_latents_variance() -> None:
    outputs = [
        Quantized(torch.full((2, 4, 1, 1), value), torch.zeros(2, 1, 1).long(), torch.zeros(2, 4, 1, 1), None)  # type: ignore[arg-type]
        for value in (1.0, 3.0)
    ]
    losses = Reconstruction(Scales(pixels=1.0, latents=(2.0, 6.0)), "mse", moves_codes=True, entropy=0.0)
    terms = losses(MEDIA, MEDIA, outputs)
    # 1² / 2 and 3² / 6, of which the mean is 1; commitment has a quarter of the weight.
    assert {name: float(term) for name, term in terms.items()} == {
        "reconstruction": 0.0, "codebook": 1.0, "commitment": 0.25,
    }  # fmt: skip


def test_the_term_of_the_entropy_is_a_mean_over_stages() -> None:
    stages = ((-1.0, 1.0), (-THIRD, THIRD))
    latents = [torch.tensor(values)[:, None, None, None] for values in stages]
    book = Codebook(torch.tensor([[-1.0], [1.0]]))
    outputs = [Quantized(rows, torch.tensor([[[0]], [[1]]]), rows, book) for rows in latents]  # type: ignore[arg-type]
    losses = Reconstruction(Scales(pixels=1.0, latents=(1.0, 1.0)), "mse", moves_codes=False, entropy=0.5)
    expected = 0.5 * (-1 + (QUARTERS - 1)) / 2
    assert float(losses(MEDIA, MEDIA, outputs)["entropy"]) == pytest.approx(expected, abs=1e-3)
