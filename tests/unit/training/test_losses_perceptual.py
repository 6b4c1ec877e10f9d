"""LPIPS as a loss: what torchmetrics computes with the same weights, and what is said where there are none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from conftest import Outcome, assert_refused
from safetensors.torch import save_file
from torch import Tensor, nn

from codebook_tools.errors import CodebookError
from codebook_tools.training.losses.perceptual import Perceptual

Run = Callable[..., Outcome]
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


def by_torchmetrics(shown: Tensor, images: Tensor) -> float:
    """By the public class, with the weights that torchvision offers."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric: Any = LearnedPerceptualImagePatchSimilarity("vgg", normalize=True)
    return float(metric(shown, images))


def test_it_is_what_torchmetrics_computes_with_the_same_weights(vgg: Path, home: Path) -> None:
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


def test_without_weights_and_network_it_is_said_how_to_give_some(
    vgg: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(CodebookError, match=r"fetch https://.*vgg16.* elsewhere, and give the file with --perceptual"):
        Perceptual("auto", 32, CPU)


def test_small_images_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(CodebookError, match="8 pixels a side are too few; it takes 16 or more"):
        Perceptual("auto", 8, CPU)


def test_without_torchvision_the_command_that_installs_it_is_said_at_once(
    codebook: Run, tiny: Path, images_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = codebook("refit", tiny, "--k", 8, "--data", images_folder, "--steps", 1, "--perceptual", "auto")
    assert_refused(found, "needs torchvision")
