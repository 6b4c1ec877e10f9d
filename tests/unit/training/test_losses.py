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
from conftest import Outcome, State, assert_refused, same
from processes import torchrun
from runs import BrokenError, breaking_at, tune, weights_of
from safetensors.torch import load_file, save_file
from sources_of_images import Images, find_images
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.finetune import FineTune
from codebook_tools.training.history import Course
from codebook_tools.training.losses.adversarial import SHARE
from codebook_tools.training.losses.distillation import Original
from codebook_tools.training.losses.objective import Several, judges, objective_of, pictures_loss
from codebook_tools.training.losses.reconstruction import Reconstruction, Scales, Seen
from codebook_tools.training.parameters import set_trainable
from codebook_tools.training.resume import Saving
from codebook_tools.training.state import TracePoint, is_better
from codebook_tools.training.trainer import Training

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
    path = write_model(variant)
    expected = load_model(read_checkpoint(path)).pass_through(image_tensor).media
    model = load_model(read_checkpoint(path))
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(1.5).requires_grad_(True)
    book = model.books[0]
    model.install(replace(book.codebook, vectors=torch.randn(5, 4)))  # after a surgery, and another network
    set_trainable(model, {name for name, _ in model.own_parameters()})
    original = Original(model)
    model.network.train()
    found = original(image_tensor)
    assert same(found, expected) and not found.requires_grad
    assert len(model.books[0].vectors) == 5 and not original.model.network.training


def test_the_distance_to_it_is_in_the_units_of_the_reconstruction() -> None:
    """|0.5 - 0.1| and |0.5 - 0.3| in deviations of 0.5, the second at weight 3."""
    shown, media, original = (torch.full((1, 1, 2, 2), value) for value in (0.5, 0.1, 0.3))
    several = Several(PLAIN, {"distill": lambda shown, _: 3 * PLAIN.error(shown, original)})
    terms = several(shown, media, [])
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {"reconstruction": 0.8, "distill": 3 * 0.4}
    )
    assert several.error(shown, media).item() == pytest.approx(2.0)


def test_a_large_weight_keeps_a_model_where_it_was(codebook: Run, tiny: Path, images_folder: Path) -> None:
    """Trained on other pictures than its own, the decoder drifts less from what it showed."""
    moved = {}
    untouched = load_model(read_checkpoint(tiny))
    for weight in (0, 100):
        output = tiny.with_name(f"d{weight}.safetensors")
        found = codebook(
            *(
                "finetune",
                tiny,
                "--data",
                images_folder,
                "--steps",
                10,
                "--limit",
                30,
                "--input-range",
                "-1,1",
                "--quiet",
            ),
            *("--codebook-update", "frozen", "--distill", weight, "-o", output, "--json"),
        )
        assert found.exit_code == 0, found
        tuned = load_model(read_checkpoint(output))
        shown, was = (of.pass_through(MEDIA).media for of in (tuned, untouched))
        moved[weight] = float((shown - was).square().mean())
    assert 0 < moved[100] < moved[0] / 3


# --- several terms -------------------------------------------------------------------------------------------------


def objective(model: Model, images: Images, **recipe: Any) -> Any:
    set_trainable(model, {name for name, _ in model.own_parameters()})
    pixels = images.load(images.items[:1])[1]
    return objective_of(model, images, FineTune(**recipe), pixels, seed=0)


def test_a_recipe_without_more_terms_is_the_plain_objective(model: Model, images: Images) -> None:
    plain = objective(model, images)
    assert isinstance(plain, Reconstruction) and plain.state() == {}
    assert pictures_loss(plain, model, images) is None


def test_the_discriminator_is_heard_when_it_has_learnt_for_a_quarter_of_the_run(model: Model, images: Images) -> None:
    ours = objective(model, images, steps=12, adversarial=True)
    heard = list[bool]()
    for _ in range(5):
        shown = model.run(MEDIA, lambda stage, latents: latents)
        terms = ours(shown, MEDIA, [Seen(EMPTY, EMPTY, EMPTY, model.books[0])])
        assert terms.pop("commitment") == 0 and terms.keys() == {"reconstruction", "adversarial"}
        heard.append(bool(terms["adversarial"] != 0))
        if heard[-1]:
            layer = ours.adversary.layer
            error, term = (torch.autograd.grad(of, layer, retain_graph=True)[0].norm() for of in terms.values())
            assert term.item() == pytest.approx(SHARE * error.item(), rel=1e-2)
        ours.step()
    assert heard == [False, False, False, True, True] and FineTune(steps=12, adversarial=True).settled_from == 4


def test_states_from_before_it_is_heard_give_way(model: Model, images: Images) -> None:
    """However low their error was; the one at step 0, too."""
    train, validation = images.subset(images.items[:50]), images.subset(images.items[50:])
    recipe = FineTune(steps=8, adversarial=True, batch_size=8)
    training = Training(model, train, recipe, [torch.ones(16)], seed=0, more={})
    course = Course(training, validation, None)
    errors = iter([0.1, 0.2, 0.5, 0.4, 0.6])

    def look(step: int) -> int:
        course._measured = lambda *_: replace(course.trace[0], step=step, validation_loss=next(errors))  # type: ignore
        course.look(step, None)
        assert course.best is not None
        return course.best.step

    assert [look(step) for step in (1, 2, 3, 4, 8)] == [1, 1, 3, 4, 4]


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
        shown = model.pass_through(media).media.clamp(0, 1)
        original = load_model(model.checkpoint).pass_through(media).media
    deviation = float(media.movedim(1, -1).flatten(0, -2).double().var(0, correction=0).mean()) ** 0.5
    expected = float((shown - media).abs().mean() + 2 * (shown - original).abs().mean()) / deviation
    assert pictures_loss(ours, model, images) == pytest.approx(expected, rel=1e-4)


def test_a_run_goes_on_with_the_discriminator_that_it_had(tiny: Path, images: Images, tmp_path: Path) -> None:
    train, validation = images.subset(images.items[:40]), images.subset(images.items[40:])

    def run(saving: Saving | None = None, watch: Watch | None = None) -> tuple[Any, State]:
        model = load_model(read_checkpoint(tiny))
        options: dict[str, Any] = {"steps": 20, "batch_size": 8, "adversarial": True, "distill": 0.5, "accumulate": 2}
        found = tune(model, train, [1] * 16, validation, saving=saving, watch=watch, **options)
        return found.trace, weights_of(model)

    saving = Saving(tmp_path / "x.training.safetensors", {}, resume=True)
    with pytest.raises(BrokenError):
        run(saving, breaking_at(13))  # it is heard since the fifth
    (trace, weights), (of_one, weights_of_one) = run(saving), run()
    assert trace == of_one and all(same(tensor, weights_of_one[name]) for name, tensor in weights.items())


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"distill": -1.0}, "distill=-1.0 is no weight"),
        ({"distill": float("nan")}, "distill=nan is no weight"),
        ({"entropy": -0.1}, "entropy=-0.1 is no weight; try --entropy 0.1"),
        ({"adversarial": True, "train": "none"}, "adversarial with train=none"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(CodebookError, match=message):
        FineTune(**recipe)


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


# --- a VQGAN, through the command line -----------------------------------------------------------------------------


@pytest.fixture
def vqgan(tmp_path: Path) -> Path:
    """A directory as diffusers saves it: a VQModel of 16 codes, of weights drawn here."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = diffusers.VQModel(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            num_vq_embeddings=16,
            layers_per_block=1,
            norm_num_groups=8,
        )
        with torch.no_grad():
            network.quantize.embedding.weight.normal_()
    network.save_pretrained(tmp_path / "vqgan")
    return tmp_path / "vqgan"


def trained(codebook: Run, vqgan: Path, data: Path, name: str, *options: object) -> tuple[Any, State]:
    output = vqgan.with_name(name)
    found = codebook(
        *("refit", vqgan, "--k", 8, "--data", data, "--input-range", "-1,1", "--batch-size", 8, "--steps", 8),
        *("--quiet", "--json", "-o", output, *options),
    )
    assert found.exit_code == 0, found.stderr
    return found.json, load_file(output / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def vgg(tmp_path: Path) -> Path:
    """The convolutions of torchvision's VGG16 in a file, of weights drawn here."""
    features = pytest.importorskip("torchvision").models.vgg16().features
    path = tmp_path / "vgg16-of-mine.safetensors"
    save_file({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    return path


def test_a_vqgan_trains_with_a_discriminator_and_the_original_beside_it(
    codebook: Run, vqgan: Path, images_folder: Path
) -> None:
    options = ("--loss", "l1", "--adversarial", "--distill", 0.5)
    found, state = trained(codebook, vqgan, images_folder, "all", *options)
    assert found["settings"]["adversarial"] is True and found["settings"]["distill"] == 0.5
    assert all(point["validation_loss"] > 0 for point in found["trace"])
    assert found["stages"]["finetuned"]["sharpness"] > 0
    again, same_state = trained(codebook, vqgan, images_folder, "again", *options)
    assert again["trace"] == found["trace"]
    assert all(same(tensor, same_state[name]) for name, tensor in state.items())
    plain, _ = trained(codebook, vqgan, images_folder, "plain", "--loss", "l1")
    assert plain["trace"][-1]["loss"] != found["trace"][-1]["loss"]
    assert all(point["validation_loss"] is None for point in plain["trace"])


def test_a_vqgan_trains_with_lpips_too_and_its_file_does_not_say_where_the_weights_lay(
    codebook: Run, vqgan: Path, vgg: Path, images_folder: Path
) -> None:
    found, _ = trained(codebook, vqgan, images_folder, "all", "--perceptual", vgg, "--adversarial", "--distill", 0.5)
    less, _ = trained(codebook, vqgan, images_folder, "less", "--adversarial", "--distill", 0.5)
    assert found["trace"][0]["validation_loss"] > less["trace"][0]["validation_loss"]
    assert found["trace"][0]["validation_mse"] == less["trace"][0]["validation_mse"]
    about = read_checkpoint(vqgan.with_name("all")).metadata["codebook_tools.settings"]
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
    start, *looks = zip(alone.json["trace"], shared.json["trace"], strict=True)
    assert start[0]["validation_loss"] == pytest.approx(start[1]["validation_loss"], rel=1e-6)
    for one, two in looks:
        assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-3)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
