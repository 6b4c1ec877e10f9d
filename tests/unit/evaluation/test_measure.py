"""One pass over images: against numbers worked by hand, and against an independent float64 pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import State
from sources_of_images import Images, find_images
from torch import Tensor, nn
from tutorial_networks import Tutorial

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.evaluation.figures import Measurement
from codebook_tools.evaluation.measure import find_input_range, measure, reconstruct
from codebook_tools.evaluation.quality_warnings import blur_warnings
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.recipe import FineTune
from codebook_tools.workflows import operate as workflow
from codebook_tools.workflows.request import Request

GreyImages = Callable[..., Images]
Line = Callable[[list[float]], Model]

# Nearest of the codes 0, 0.5 and 1: 0 0 0 1 and 2 2 1 0; squared errors 0 .04 .04 .01 and 0 .04 .01 0.
BY_HAND = ([[0.0, 0.2], [0.2, 0.4]], [[1.0, 0.8], [0.4, 0.0]])


def measured(model: Model, images: Images, **settings: object) -> Measurement:
    return measure(model, images, watch=Watch(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 64])
def test_every_number_of_a_measurement_is_the_one_worked_by_hand(
    line: Line, grey_images: GreyImages, batch: int
) -> None:
    model = line([0.0, 0.5, 1.0])
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    result = measured(model, grey_images(*BY_HAND), batch=batch)
    assert (result.split, result.images, result.ssim) == ("test", 2, None)  # no window of 11 pixels fits
    assert result.mse == pytest.approx(0.14 / 8, rel=1e-6)
    assert result.psnr == pytest.approx(-10 * math.log10(0.0175), rel=1e-6)
    (use,) = result.codebooks
    assert (use.key, use.size, use.dim, use.latents) == ("quantizer.codebook.weight", 3, 2, 8)
    assert (use.used, use.usage, use.used_10, use.top_share, use.coverage) == (3, 1.0, 0, 0.5, None)
    assert use.bits == pytest.approx(1.5) and use.perplexity == pytest.approx(2**1.5)
    assert use.distortion == pytest.approx(0.14 / 8, rel=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())


@pytest.mark.parametrize(("limit", "share"), [(0.0, 3 / 8), (0.02, 5 / 8), (0.05, 1.0)])
def test_coverage_counts_the_latents_within_the_reference_distance(
    limit: float, share: float, line: Line, grey_images: GreyImages
) -> None:
    result = measured(line([0.0, 0.5, 1.0]), grey_images(*BY_HAND), references=[limit])
    assert result.codebooks[0].coverage == share


def test_codes_nearer_to_each_other_than_a_255th_are_told_apart(line: Line, grey_images: GreyImages) -> None:
    """64 codes from 0.5 to 0.504, each the value of one pixel: all lie in one of 255 levels."""
    firsts = (0.5 + torch.arange(64) * 2.0**-14).tolist()
    result = measured(line(firsts), grey_images([firsts[:32], firsts[32:]]))
    assert (result.codebooks[0].used, result.mse) == (64, 0)


def test_codes_without_hits_are_not_in_use_and_ten_hits_are_counted(line: Line, grey_images: GreyImages) -> None:
    use = measured(line([0.0, 9.0, 1.0, -9.0]), grey_images([[0.0] * 10 + [1.0]])).codebooks[0]
    assert (use.size, use.used, use.usage, use.used_10, use.top_share) == (4, 2, 0.5, 1, pytest.approx(10 / 11))


def test_reconstructions_are_clamped_before_they_are_compared(line: Line, grey_images: GreyImages) -> None:
    result = measured(line([1.5, -0.5]), grey_images([[1.0, 0.0], [1.0, 0.2]]))  # reconstructed as 1 and 0
    assert result.mse == pytest.approx(0.04 / 4, rel=1e-6)
    assert result.codebooks[0].distortion == pytest.approx((3 * 0.25 + 0.49) / 4, rel=1e-6)


def test_an_exact_reconstruction_has_no_psnr_and_an_ssim_of_one(line: Line, grey_images: GreyImages) -> None:
    images = grey_images([[float(x % 3 == y % 2) for x in range(16)] for y in range(12)])
    result = measured(line([0.0, 1.0]), images)
    assert (result.mse, result.psnr, result.ssim) == (0.0, None, pytest.approx(1.0))
    assert measured(line([0.0, 1.0]), images, structure=False).ssim is None


def test_a_measurement_is_what_an_independent_pass_in_float64_finds(
    tiny: Path, images_folder: Path, image_tensor: Tensor, variants: dict[str, State]
) -> None:
    theirs, codes = Tutorial(variants["plain"]), variants["plain"][CODEBOOK].double()
    rows = theirs.encode(image_tensor * 2 - 1).movedim(1, -1).flatten(0, -2)
    distances = (rows[:, None] - codes).square().sum(2)
    assigned = distances.argmin(1)
    quantized = codes[assigned].reshape(60, 4, 4, 4).movedim(-1, 1)
    reconstructed = ((theirs.decode(quantized) + 1) / 2).clamp(0, 1)
    counts = torch.bincount(assigned, minlength=16)
    shares = counts[counts > 0] / counts.sum()

    result = measured(load_model(read_checkpoint(tiny)), Images(find_images([images_folder]), 3, 4), batch=7)
    use = result.codebooks[0]
    assert result.mse == pytest.approx(float((reconstructed - image_tensor).square().mean()), rel=1e-5)
    assert use.distortion == pytest.approx(float(distances.amin(1).mean()), rel=1e-4)
    assert (use.latents, use.used, use.used_10) == (960, int((counts > 0).sum()), int((counts >= 10).sum()))
    assert use.perplexity == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-6)


# --- sharpness -------------------------------------------------------------------------------------------------------


def board(side: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """(side, side): a checkerboard of single pixels."""
    return low + (high - low) * (torch.arange(side)[:, None] + torch.arange(side)).remainder(2).float()


FADED = board(12, 0.2, 0.8), torch.full((12, 12), 0.6)
"""Reconstructed as 0.4 and 0.6 the board has a ninth of its energy; flat images add nothing to either."""


@pytest.mark.parametrize(
    ("codes", "pictures", "structure", "sharpness"),
    [
        ([0.4, 0.6], FADED, True, pytest.approx(1 / 9, rel=1e-5)),
        ([0.2, 0.8], FADED, True, pytest.approx(1, rel=1e-5)),
        ([0.4, 0.6], FADED, False, None),
        ([0.5], [board(12)], True, 0),
        ([0.4, 0.6], [torch.full((12, 12), 0.5)], True, None),  # no detail
        ([0.4, 0.6], [board(2)], True, None),  # too small
    ],
)
def test_sharpness_is_the_ratio_of_detail_over_all_images(
    codes: list[float],
    pictures: list[Tensor],
    structure: bool,
    sharpness: float | None,
    line: Line,
    grey_images: GreyImages,
) -> None:
    images = grey_images(*(picture.tolist() for picture in pictures))
    result = measured(line(codes), images, batch=1, structure=structure)
    assert result.sharpness == sharpness


def with_figures(sharpness: float | None, ssim: float | None) -> Measurement:
    return Measurement("test", 10, 0.01, 20.0, ssim, (), sharpness)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.5, 0.8), (0.44, 0.8), ["blurrier than the original: sharpness fell from 50.0% to 44.0%"]),
        ((0.5, 0.8), (0.6, 0.78), ["less true than the original: SSIM fell from 0.8000 to 0.7800"]),
        ((0.5, 0.8), (0.3, 0.7), ["sharpness fell from 50.0% to 30.0%", "SSIM fell from 0.8000 to 0.7000"]),
        ((3.0, 0.8), (0.8, 0.8), ["sharpness fell from 300.0% to 80.0%"]),
        ((0.5, None), (0.1, None), ["sharpness fell from 50.0% to 10.0%"]),
        # small falls, gains, and what was not measured
        ((0.5, 0.8), (0.46, 0.795), []),
        ((0.5, 0.8), (0.9, 0.9), []),
        ((None, None), (None, None), []),
        ((0.0, 0.5), (0.0, 0.5), []),
        ((3.0, 0.5), (0.95, 0.5), []),
    ],
)
def test_a_fall_of_some_size_is_named_with_the_way_out(
    before: tuple[float | None, float | None], after: tuple[float | None, float | None], expected: list[str]
) -> None:
    for words, warning in zip(expected, blur_warnings(with_figures(*before), with_figures(*after)), strict=True):
        assert words in warning and "--perceptual" in warning and "--distill 1" in warning


@pytest.mark.filterwarnings("ignore::codebook_tools.CodebookWarning")
def test_the_result_of_a_fine_tuning_has_the_warnings(
    tiny: Path, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "blur_warnings", lambda before, after: [f"{before.images}, {after.images} images"])
    request = Request(tiny, (str(images_folder),), input_range=(-1.0, 1.0), output=tmp_path / "out.safetensors")
    result = workflow.operate("finetune", request, None, FineTune(steps=1), Watch())
    assert "3, 3 images" in result.warnings


# --- the input range -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5)])
def test_the_range_that_reconstructs_best_is_the_one_the_codes_were_made_for(
    line: Line, grey_images: GreyImages, low: float, high: float
) -> None:
    model = line([low + (high - low) * i / 32 for i in range(33)])
    errors = find_input_range(model, grey_images([[x / 255 for x in range(256)]]))
    assert min(errors, key=errors.__getitem__) == (low, high)
    assert model.input_range == (0.0, 1.0)


def test_the_range_is_determined_with_few_of_the_images(
    line: Line, grey_images: GreyImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, run = [], Model.run
    monkeypatch.setattr(Model, "run", lambda self, media, *more: batches.append(len(media)) or run(self, media, *more))
    find_input_range(line([0.0, 1.0]), grey_images(*[[[i / 255]] for i in range(200)]))
    assert sum(batches) == 3 * 64


# --- networks that go astray -----------------------------------------------------------------------------------------


class Astray(nn.Module):
    """Wraps a network; one half returns what a function makes of its output."""

    def __init__(self, network: nn.Module, half: str, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.quantizer, self.encode, self.decode = network.quantizer, network.encode, network.decode
        method = getattr(network, half)
        setattr(self, half, lambda x: change(method(x)))


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
    line: Line, half: str, change: Callable[[Tensor], Tensor], kind: type[CodebookError], message: str
) -> None:
    model = line([0.0, 0.5, 1.0])
    model.network = Astray(model.network, half, change)
    with pytest.raises(kind, match=message):
        reconstruct(model, torch.rand(3, 1, 2, 2))
