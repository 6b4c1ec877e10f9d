"""One pass over images: against numbers worked by hand, and against an independent float64 pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Grey, State
from sources_of_images import Images, find_images
from torch import Tensor, nn
from tutorial import Tutorial

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.evaluation.measure import find_input_range, measure, reconstruct
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch

GreyImages = Callable[..., Images]

# Nearest codes 0 0 0 1 and 2 2 1 0; squared errors 0 .04 .04 .01 and 0 .04 .01 0.
BY_HAND = ([[0.0, 0.2], [0.2, 0.4]], [[1.0, 0.8], [0.4, 0.0]])


@pytest.fixture
def halves(grey: Callable[..., Grey]) -> Model:
    """The model with the codes (0, 0), (0.5, 0) and (1, 0), at input range [0, 1]."""
    return opened(grey([0.0, 0.5, 1.0]))


def opened(made: Grey) -> Model:
    model = load_model(read_checkpoint(made.path), network=made.network)
    model.input_range = (0.0, 1.0)
    return model


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_every_number_of_a_measurement_is_the_one_worked_by_hand(
    halves: Model, grey_images: GreyImages, batch: int
) -> None:
    found = measure(halves, grey_images(*BY_HAND), batch=batch, watch=Watch())
    assert (found.split, found.images) == ("test", 2)
    assert found.mse == pytest.approx(0.14 / 8, rel=1e-6)
    assert found.psnr == pytest.approx(-10 * math.log10(0.0175), rel=1e-6)
    assert found.ssim is None  # no window of 11 pixels fits
    (use,) = found.codebooks
    assert (use.key, use.size, use.dim, use.latents) == ("quantizer.codebook.weight", 3, 2, 8)
    assert (use.used, use.usage, use.used_10) == (3, 1.0, 0)
    assert use.bits == pytest.approx(1.5) and use.perplexity == pytest.approx(2**1.5)
    assert use.top_share == 0.5
    assert use.distortion == pytest.approx(0.14 / 8, rel=1e-6)
    assert use.coverage is None


def test_codes_nearer_to_each_other_than_a_255th_are_told_apart(
    grey: Callable[..., Grey], grey_images: GreyImages
) -> None:
    """64 codes from 0.5 to 0.504, each the value of one pixel: all lie in one of 255 levels."""
    firsts = (0.5 + torch.arange(64) * 2.0**-14).tolist()
    found = measure(opened(grey(firsts)), grey_images([firsts[:32], firsts[32:]]), watch=Watch())
    assert (found.codebooks[0].used, found.mse) == (64, 0)


def test_codes_without_hits_are_not_in_use_and_ten_hits_are_counted(
    grey: Callable[..., Grey], grey_images: GreyImages
) -> None:
    model = opened(grey([0.0, 9.0, 1.0, -9.0]))
    use = measure(model, grey_images([[0.0] * 10 + [1.0]]), watch=Watch()).codebooks[0]
    assert (use.size, use.used, use.usage, use.used_10) == (4, 2, 0.5, 1)
    assert use.top_share == pytest.approx(10 / 11)


def test_reconstructions_are_clamped_before_they_are_compared(
    grey: Callable[..., Grey], grey_images: GreyImages
) -> None:
    model = opened(grey([1.5, -0.5]))  # shown as 1 and 0
    found = measure(model, grey_images([[1.0, 0.0], [1.0, 0.2]]), watch=Watch())
    assert found.mse == pytest.approx(0.04 / 4, rel=1e-6)
    assert found.codebooks[0].distortion == pytest.approx((3 * 0.25 + 0.49) / 4, rel=1e-6)


def test_an_exact_reconstruction_has_no_psnr_and_an_ssim_of_one(
    grey: Callable[..., Grey], grey_images: GreyImages
) -> None:
    rows = [[float(x % 3 == y % 2) for x in range(16)] for y in range(12)]
    found = measure(opened(grey([0.0, 1.0])), grey_images(rows), watch=Watch())
    assert (found.mse, found.psnr) == (0.0, None)
    assert found.ssim == pytest.approx(1.0)
    assert measure(opened(grey([0.0, 1.0])), grey_images(rows), structure=False, watch=Watch()).ssim is None


def test_a_measurement_is_what_an_independent_pass_in_float64_finds(
    tiny: Path, images_folder: Path, image_tensor: Tensor, variants: dict[str, State]
) -> None:
    theirs, codes = Tutorial(variants["plain"]), variants["plain"][CODEBOOK].double()
    latents = theirs.encode(image_tensor * 2 - 1)
    rows = latents.movedim(1, -1).flatten(0, -2)
    distances = (rows[:, None] - codes).square().sum(2)
    assigned = distances.argmin(1)
    quantised = codes[assigned].reshape(60, 4, 4, 4).movedim(-1, 1)
    shown = ((theirs.decode(quantised) + 1) / 2).clamp(0, 1)
    counts = torch.bincount(assigned, minlength=16)
    shares = counts[counts > 0] / counts.sum()

    model = load_model(read_checkpoint(tiny))
    found = measure(model, Images(find_images([images_folder]), 3, 4), batch=7, watch=Watch())
    use = found.codebooks[0]
    assert found.mse == pytest.approx(float((shown - image_tensor).square().mean()), rel=1e-5)
    assert use.distortion == pytest.approx(float(distances.amin(1).mean()), rel=1e-4)
    assert (use.latents, use.used, use.used_10) == (960, int((counts > 0).sum()), int((counts >= 10).sum()))
    assert use.perplexity == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-6)


def test_measuring_leaves_the_model_as_it_was(halves: Model, grey_images: GreyImages) -> None:
    before = {name: tensor.clone() for name, tensor in halves.network.state_dict().items()}
    codes = halves.books[0].vectors.clone()
    measure(halves, grey_images(*BY_HAND), watch=Watch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in halves.network.state_dict().items())
    assert torch.equal(halves.books[0].vectors, codes) and halves.input_range == (0.0, 1.0)


# --- the input range -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5)])
def test_the_range_that_reconstructs_best_is_the_one_the_codes_were_made_for(
    grey: Callable[..., Grey], grey_images: GreyImages, low: float, high: float
) -> None:
    model = opened(grey([low + (high - low) * i / 32 for i in range(33)]))
    ramp = [[x / 255 for x in range(256)]]
    errors = find_input_range(model, grey_images(ramp))
    assert min(errors, key=errors.__getitem__) == (low, high)
    assert model.input_range == (0.0, 1.0)


def test_the_range_is_found_out_with_few_images_drawn_from_all(
    halves: Model, grey_images: GreyImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    run = Model.run
    monkeypatch.setattr(Model, "run", lambda model, media, *more: seen.append(len(media)) or run(model, media, *more))
    find_input_range(halves, grey_images(*[[[i / 255]] for i in range(200)]))
    assert sum(seen) == 3 * 64


# --- networks that go astray ---------------------------------------------------------------------------------------


class Astray(nn.Module):
    """Wraps a network; one half returns what a function makes of its output."""

    def __init__(self, network: nn.Module, half: str, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.half, self.change = network, half, change

    def __getattr__(self, name: str) -> object:
        if name in ("encode", "decode"):
            method = getattr(self.network, name)
            return (lambda x: self.change(method(x))) if name == self.half else method
        if name == "quantizer":
            return self.network.quantizer
        return super().__getattr__(name)


def not_a_number(x: Tensor) -> Tensor:
    return torch.where(torch.arange(x.shape[-1]) == 1, torch.nan, x)


@pytest.mark.parametrize(
    ("half", "change", "kind", "message"),
    [
        ("encode", not_a_number, NotFiniteError, "latents are not finite"),
        ("decode", not_a_number, NotFiniteError, "reconstructions are not finite"),
        ("decode", lambda x: x[..., :1], CodebookError, r"decode returns \(1, 2, 1\) for images of \(1, 2, 2\)"),
        ("decode", lambda x: None, CodebookError, "decode returns a NoneType"),
    ],
)
def test_a_network_whose_output_is_no_use_is_refused(
    halves: Model,
    half: str,
    change: Callable[[Tensor], Tensor],
    kind: type[CodebookError],
    message: str,
) -> None:
    halves.network = Astray(halves.network, half, change)
    with pytest.raises(kind, match=message):
        reconstruct(halves, torch.rand(3, 1, 2, 2))
