"""The terms of a fine-tuning's loss, their targets and what they choose; and a VQGAN trained with all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from audio_codecs import CASES, save, waveforms
from conftest import Outcome, assert_refused, same
from processes import torchrun
from runs import tune
from safetensors.torch import save_file
from sources_of_images import Images, find_images
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.training.finetune import FineTune
from codebook_tools.training.history import History
from codebook_tools.training.losses.adversarial import SHARE
from codebook_tools.training.losses.distillation import Original
from codebook_tools.training.losses.objective import Objective, judges, objective_of, validation_loss
from codebook_tools.training.losses.reconstruction import Quantized, Reconstruction, Scales
from codebook_tools.training.parameters import set_trainable
from codebook_tools.training.state import TracePoint, is_better
from codebook_tools.training.trainer import Trainer

Run = Callable[..., Outcome]
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


# --- distill -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "weight_norm_newer", "tied", "float16"])
def test_the_target_is_what_the_untouched_model_reconstructs_to_the_last_bit(
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


# --- several terms -------------------------------------------------------------------------------------------------


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
    history = History(Trainer(model, train, recipe, [torch.ones(16)], seed=0, more={}), validation, None)
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


# --- refused -------------------------------------------------------------------------------------------------------


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
    for stage in range(len(model.books)):
        model.install(
            replace(model.books[stage].codebook, vectors=torch.zeros(2, model.books[stage].stored.dim)), stage
        )
    assert same(Original(model)(sound), expected) and not torch.equal(model.pass_through(sound).media, expected)


def test_images_too_small_to_judge_are_refused_before_the_surgery(
    codebook: Run, tiny: Path, images_folder: Path
) -> None:
    small = ("--data", images_folder, "--size", 4, "--input-range", "-1,1")
    found = codebook("refit", tiny, "--k", 4, *small, "--steps", 1, "--adversarial", "--quiet")
    assert_refused(found, "--adversarial: 4 pixels a side are too few")


# --- the command ----------------------------------------------------------------------------------------------------


def trained(codebook: Run, tiny: Path, data: Path, *options: object) -> Any:
    found = codebook(
        *("refit", tiny, "--k", 8, "--data", data, "--input-range", "-1,1", "--batch-size", 8, "--steps", 4),
        *("--quiet", "--json", "--force", "-o", tiny.with_name("tuned.safetensors"), *options),
    )
    assert found.exit_code == 0, found.stderr
    return found.json


@pytest.fixture
def vgg(tmp_path: Path) -> Path:
    """The convolutions of torchvision's VGG16 in a file, of weights drawn here."""
    features = pytest.importorskip("torchvision").models.vgg16().features
    path = tmp_path / "vgg16-of-mine.safetensors"
    save_file({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    return path


def test_the_command_trains_with_a_discriminator_and_the_original_beside_it(
    codebook: Run, tiny: Path, images_folder: Path
) -> None:
    found = trained(codebook, tiny, images_folder, "--loss", "l1", "--adversarial", "--distill", 0.5)
    assert found["settings"]["adversarial"] is True and found["settings"]["distill"] == 0.5
    assert all(point["validation_loss"] > 0 for point in found["trace"])


def test_the_command_trains_with_lpips_and_its_file_does_not_say_where_the_weights_lay(
    codebook: Run, tiny: Path, vgg: Path, images_folder: Path
) -> None:
    plain = trained(codebook, tiny, images_folder)
    found = trained(codebook, tiny, images_folder, "--perceptual", vgg)
    assert found["trace"][0]["validation_loss"] > 0 and plain["trace"][0]["validation_loss"] is None
    assert found["trace"][0]["validation_mse"] == plain["trace"][0]["validation_mse"]
    about = read_checkpoint(Path(found["outputs"]["model"])).metadata["codebook_tools.settings"]
    assert json.loads(about)["perceptual"] is True and "of-mine" not in about


# --- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_do_together_what_one_does_alone(codebook: Run, tiny: Path, images_folder: Path) -> None:
    """Of 9 images the slices are 4 and 5: the discriminator and its weight go by all of them."""
    options = (
        *("finetune", tiny, "--data", images_folder, "--input-range", "-1,1", "--batch-size", 9, "--steps", 8),
        *("--adversarial", "--distill", 0.5, "--codebook-update", "frozen", "--lr", "1e-4", "--json", "--quiet"),
    )
    alone, shared = (
        run(*options, "-o", tiny.with_name(name))
        for run, name in ((codebook, "1.safetensors"), (torchrun, "2.safetensors"))
    )
    assert (alone.exit_code, shared.exit_code) == (0, 0), (alone.stderr, shared.stderr)
    start, *later = zip(alone.json["trace"], shared.json["trace"], strict=True)
    assert start[0]["validation_loss"] == pytest.approx(start[1]["validation_loss"], rel=1e-6)
    for one, two in later:
        assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-3)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
