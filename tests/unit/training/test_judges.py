"""What judges pictures: the discriminator, by hand and that it learns; and LPIPS, as torchmetrics computes it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from conftest import Grey, Run, assert_refused, same
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.load import load_model
from codebook_tools.training.losses.adversarial import SHARE, SMALLEST, Adversary, Discriminator, hinge, last_layer
from codebook_tools.training.losses.perceptual import Perceptual
from codebook_tools.training.parameters import set_trainable

IMAGES = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BLURRED = functional.avg_pool2d(IMAGES, 3, 1, 1)


def adversary(seed: int = 0) -> Adversary:
    return Adversary(Discriminator(3, 16, seed), nn.Parameter(torch.ones(2, 2)))


@pytest.mark.parametrize(("side", "patches"), [(8, 2), (16, 2), (64, 6), (256, 30)])
def test_patches_are_those_of_the_paper_and_smaller_ones_in_small_images(side: int, patches: int) -> None:
    """256 pixels give 30 x 30 patches of 70 pixels, as Isola et al. have it; small images need smaller patches."""
    discriminator = Discriminator(1, side, seed=0)
    assert discriminator(torch.rand(1, 1, side, side)).shape == (1, 1, patches, patches)
    if side == 256:
        field = 1
        for layer in reversed([layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]):
            field = (field - 1) * layer.stride[0] + layer.kernel_size[0]
        assert field == 70
    with pytest.raises(CodebookError, match="7 pixels a side are too few; it takes 8 or more"):
        Discriminator(3, SMALLEST - 1, seed=0)


def test_logits_of_an_image_are_alike_in_any_batch_and_weights_come_of_the_seed() -> None:
    ours, again, other = (Discriminator(3, 16, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(ours(IMAGES)[3:5], ours(IMAGES[3:5]))
    assert torch.equal(ours(IMAGES), again(IMAGES)) and not torch.allclose(ours(IMAGES), other(IMAGES))


def test_the_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge(real, fake).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)
    assert hinge(torch.zeros(2), torch.zeros(2)).item() == 1


def test_it_learns_to_tell_images_from_blurred_ones() -> None:
    ours = adversary()
    losses = list[float]()
    for _ in range(25):
        ours.watch(IMAGES, BLURRED)
        losses.append(ours.learn().item())
    assert losses[0] == pytest.approx(1, abs=0.15) and losses[-1] < 0.2 and ours.steps == 25
    assert ours.discriminator(IMAGES).mean().item() > 0 > ours.discriminator(BLURRED).mean().item()


def test_batches_of_a_step_are_learnt_from_together() -> None:
    whole, parts = adversary(), adversary()
    whole.watch(IMAGES, BLURRED)
    for part in (slice(0, 5), slice(5, 12)):
        parts.watch(IMAGES[part], BLURRED[part])
    assert whole.learn().item() == pytest.approx(parts.learn().item(), rel=1e-5)
    for one, other in zip(whole.discriminator.parameters(), parts.discriminator.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-5)


def test_the_weight_by_hand() -> None:
    """Gradients at the layer (1, 1; 1, 1): of length 6 for the error, of 2 for the adversarial loss."""
    ours = adversary()
    error, loss = 3 * ours.layer.sum(), ours.layer.sum()
    weights = [ours.weight(error, factor * loss, 5).item() for factor in (1, 1000, 0)]
    assert weights == pytest.approx([SHARE * 6 / 2, SHARE * 6 / 2000, SHARE * 1e4])  # and never without limit


def test_the_term_has_a_gradient_of_a_share_of_the_errors() -> None:
    ours = adversary()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = nn.Conv2d(3, 3, 3, padding=1)
    ours.layer = decoder.weight
    for unit in (1e-3, 1e3):
        reconstruction = decoder(IMAGES)
        error = unit * functional.mse_loss(reconstruction, IMAGES)
        term = ours.term(reconstruction, error)
        lengths = [torch.autograd.grad(of, ours.layer, retain_graph=True)[0].norm().item() for of in (error, term)]
        assert lengths[1] == pytest.approx(SHARE * lengths[0], rel=1e-3)
    assert all(parameter.grad is None for parameter in ours.discriminator.parameters())


def test_it_goes_on_from_its_state_to_the_last_bit() -> None:
    unbroken, second = adversary(), adversary(seed=5)
    for step in range(6):
        if step == 3:
            second.load({name: tensor.clone() for name, tensor in unbroken.state().items()})
        for one in (unbroken, second)[: 1 + (step >= 3)]:
            one.watch(IMAGES, BLURRED)
            one.learn()
    assert second.steps == 6 and all(same(tensor, second.state()[name]) for name, tensor in unbroken.state().items())


def test_the_last_layer_is_found_by_the_graph(tiny: Path, image_tensor: Tensor, grey: Callable[..., Grey]) -> None:
    model = load_model(read_checkpoint(tiny))
    set_trainable(model, {name for name, _ in model.network.named_parameters()})
    parameters = dict(model.network.named_parameters())
    assert last_layer(model, image_tensor[:1]) is parameters["_decoder._conv_trans_2.weight"]
    made = grey([0.0, 1.0])
    model = load_model(read_checkpoint(made.path), network=made.network)
    with pytest.raises(CodebookError, match="leave it out"):
        last_layer(model, torch.rand(1, 1, 8, 8))  # nothing trains


CPU = torch.device("cpu")
PAIR = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def features() -> nn.Sequential:
    """Those of torchvision's VGG16, of random weights."""
    models = pytest.importorskip("torchvision").models
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features: nn.Sequential = models.vgg16(weights=None).features
    return features


@pytest.fixture
def vgg(features: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of them, as torchvision's is; half a gigabyte of classifier, which nobody asks for, is not made either."""

    def without_classifier(weights: object = None) -> SimpleNamespace:
        made = deepcopy(features)
        if weights is None:
            for parameter in made.parameters():
                parameter.detach().zero_()
        return SimpleNamespace(features=made)

    monkeypatch.setattr("torchvision.models.vgg16", without_classifier)
    path = tmp_path / "vgg16.pth"
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as the real one is
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "home" / "hub" / "checkpoints"


def by_torchmetrics(output: Tensor, images: Tensor) -> float:
    """By the public class, with the weights that torchvision offers."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric: Any = LearnedPerceptualImagePatchSimilarity("vgg", normalize=True)
    return float(metric(output, images))


def test_lpips_is_what_torchmetrics_computes_with_the_same_weights(vgg: Path, home: Path) -> None:
    from torchvision.models import VGG16_Weights

    home.mkdir(parents=True)
    (home / Path(VGG16_Weights.DEFAULT.url).name).write_bytes(vgg.read_bytes())
    expected, gray = by_torchmetrics(*PAIR), PAIR[:, :, :1]
    for weights in (str(vgg), "auto"):
        perceptual = Perceptual(weights, 32, CPU)
        assert perceptual(*PAIR).item() == pytest.approx(expected, rel=1e-5) and expected > 0.01
    expected = by_torchmetrics(*gray.expand(-1, -1, 3, -1, -1))
    assert perceptual(*gray).item() == pytest.approx(expected, rel=1e-5)
    assert perceptual(gray[1], gray[1]).item() == 0


def test_gradients_reach_reconstructions_beyond_black_and_white_too_and_nothing_else(vgg: Path) -> None:
    perceptual, output = Perceptual(str(vgg), 32, CPU), (3 * PAIR[0] - 1).requires_grad_()
    perceptual(output, PAIR[1]).backward()
    assert output.grad is not None and bool(output.grad[output > 1].any()) and bool(output.grad[output < 0].any())
    assert all(parameter.grad is None for parameter in perceptual.network.parameters())
    assert not perceptual.network.training


def test_safetensors_do_as_well_and_no_number_is_drawn(vgg: Path, tmp_path: Path) -> None:
    save_file(torch.load(vgg, weights_only=True), tmp_path / "vgg16.safetensors")
    before = torch.get_rng_state()
    other = Perceptual(str(tmp_path / "vgg16.safetensors"), 32, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(other(*PAIR), Perceptual(str(vgg), 32, CPU)(*PAIR))


def test_other_weights_are_refused_with_the_address_of_the_right_ones(vgg: Path, tiny: Path, tmp_path: Path) -> None:
    features = torch.load(vgg, weights_only=True) | {"features.0.weight": torch.zeros(64, 1, 3, 3)}
    save_file(features, gray := tmp_path / "gray.safetensors")
    for path, message in (
        (tiny, r"no weights of torchvision's VGG16 .*; the file is https://.*vgg16.*\.pth"),
        (gray, "^[^\n]*size mismatch[^\n]*$"),
        (tmp_path / "nobody.pth", r"no such file.*nobody\.pth"),
    ):
        with pytest.raises(CodebookError, match=message):
            Perceptual(str(path), 32, CPU)


def test_without_weights_and_network_a_way_out_is_named(vgg: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(CodebookError, match=r"fetch https://.*vgg16.* elsewhere, and give the file with --perceptual"):
        Perceptual("auto", 32, CPU)


def test_small_images_are_refused_before_anything_is_loaded_and_a_missing_torchvision_at_once(
    codebook: Run, tiny: Path, images_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CodebookError, match="8 pixels a side are too few; it takes 16 or more"):
        Perceptual("auto", 8, CPU)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = codebook("refit", tiny, "--k", 8, "--data", images_folder, "--steps", 1, "--perceptual", "auto")
    assert_refused(found, "needs torchvision")


def trained(codebook: Run, tiny: Path, data: Path, *options: object) -> Any:
    """What a Re-Fit with a short fine-tuning says of it."""
    recipe = ("--data", data, "--input-range", "-1,1", "--batch-size", 8, "--steps", 4)
    done = codebook("refit", tiny, "--k", 8, *recipe, "--quiet", "--json", "--force", *options)
    assert done.exit_code == 0, done.stderr
    return done.json


def test_the_command_trains_with_a_discriminator_and_the_original(
    codebook: Run, tiny: Path, images_folder: Path
) -> None:
    result = trained(codebook, tiny, images_folder, "--loss", "l1", "--adversarial", "--distill", 0.5)
    assert result["settings"]["adversarial"] is True and result["settings"]["distill"] == 0.5
    assert all(point["validation_loss"] > 0 for point in result["trace"])


def test_the_command_trains_with_lpips_and_its_file_does_not_say_where_weights_lay(
    codebook: Run, tiny: Path, vgg: Path, images_folder: Path
) -> None:
    mine = vgg.rename(vgg.with_name("vgg16-of-mine.pth"))
    plain = trained(codebook, tiny, images_folder)
    result = trained(codebook, tiny, images_folder, "--perceptual", mine)
    assert result["trace"][0]["validation_loss"] > 0 and plain["trace"][0]["validation_loss"] is None
    assert result["trace"][0]["validation_mse"] == plain["trace"][0]["validation_mse"]
    about = read_checkpoint(Path(result["outputs"]["model"])).metadata["codebook_tools.settings"]
    assert json.loads(about)["perceptual"] is True and "of-mine" not in about
