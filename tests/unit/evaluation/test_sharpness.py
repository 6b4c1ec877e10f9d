"""How sharp reconstructions are beside their images: by hand, in parts, and what a result warns of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Grey
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sources_of_images import Images, find_images
from torch.nn import functional

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.sealed_file import SEAL, sealed
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation import metrics
from codebook_tools.evaluation.accumulators import Sums
from codebook_tools.evaluation.figures import Measurement, measurement_of
from codebook_tools.evaluation.measure import measure, reconstructions, totals_of
from codebook_tools.evaluation.one_pass import run_pass
from codebook_tools.evaluation.quality_warnings import blur_warnings
from codebook_tools.evaluation.stats_file import read_part
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.finetune import FineTune, FineTuned
from codebook_tools.training.state import State
from codebook_tools.workflows import pipeline
from codebook_tools.workflows.operate import measure_model, operate
from codebook_tools.workflows.request import Request

GreyImages = Callable[..., Images]


def detail(images: torch.Tensor) -> list[float]:
    found = metrics.detail(images)
    assert found is not None and found.dtype == torch.float64
    return [float(of) for of in found]


def board(side: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """(side, side): a checkerboard of single pixels."""
    return low + (high - low) * (torch.arange(side)[:, None] + torch.arange(side)).remainder(2).float()


def test_detail_of_a_point_and_of_an_edge_by_hand() -> None:
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 2, 2] = 0.5
    assert detail(point) == [4 * 0.5**2 + (4 * 0.5) ** 2]  # its four neighbours, and itself
    edge = torch.zeros(1, 2, 4, 6)
    edge[..., 3:] = 1
    assert detail(edge) == [2 * 2 * 2 * 1.0]  # two channels, two inner rows, both sides of the edge


def test_slopes_and_flat_images_have_no_detail() -> None:
    slope = (torch.arange(8.0)[:, None] + torch.arange(8.0)).expand(3, 8, 8)
    assert detail(torch.stack([slope, torch.ones(3, 8, 8)])) == [0.0, 0.0]


@pytest.mark.parametrize("sides", [(2, 9), (9, 2), (1, 1)])
def test_images_without_inner_pixels_have_none(sides: tuple[int, int]) -> None:
    assert metrics.detail(torch.zeros(1, 1, *sides)) is None


def test_of_a_wave_it_is_the_fourth_power_of_the_frequency() -> None:
    """The Laplacian makes 2 cos(w) - 2 of a wave along one axis, about w squared, and its energy squares that."""
    frequencies = (math.pi / 16, math.pi / 8)
    waves = torch.stack([torch.sin(torch.arange(66.0) * w).expand(1, 66, 66) for w in frequencies])
    slow, fast = detail(waves)
    exact = ((math.cos(frequencies[1]) - 1) / (math.cos(frequencies[0]) - 1)) ** 2
    assert fast / slow == pytest.approx(exact, rel=1e-3) and exact == pytest.approx(2**4, rel=0.05)


def test_a_blur_lowers_it_by_the_square_of_its_response() -> None:
    """A checkerboard is a single frequency, of which a mean over 3x3 pixels leaves a ninth."""
    sharp = board(20)[None, None]
    blurred = functional.avg_pool2d(sharp, 3, 1)
    assert detail(sharp) == [18**2 * 4.0**2]
    assert detail(blurred) == pytest.approx([16**2 * (4 / 9) ** 2], rel=1e-5)


# --- measured ------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(grey: Callable[..., Grey]) -> Callable[..., Model]:
    def load(*firsts: float) -> Model:
        made = grey([*firsts])
        model = load_model(read_checkpoint(made.path), network=made.network)
        model.input_range = (0.0, 1.0)
        return model

    return load


def test_sharpness_is_the_ratio_of_detail_over_all_images(
    opened: Callable[..., Model], grey_images: GreyImages
) -> None:
    """Boards of 0.2 and 0.8 are shown as 0.4 and 0.6, a ninth of their energy; flat images add nothing to either."""
    images = grey_images(board(12, 0.2, 0.8).tolist(), torch.full((12, 12), 0.6).tolist())
    found = measure(opened(0.4, 0.6), images, batch=1, watch=Watch())
    assert found.sharpness == pytest.approx(1 / 9, rel=1e-5)
    assert measure(opened(0.2, 0.8), images, watch=Watch()).sharpness == pytest.approx(1, rel=1e-5)
    assert measure(opened(0.4, 0.6), images, structure=False, watch=Watch()).sharpness is None


@pytest.mark.parametrize("rows", [torch.full((12, 12), 0.5), board(2)], ids=["flat", "too small"])
def test_without_detail_there_is_no_sharpness(
    rows: torch.Tensor, opened: Callable[..., Model], grey_images: GreyImages
) -> None:
    assert measure(opened(0.4, 0.6), grey_images(rows.tolist()), watch=Watch()).sharpness is None


def test_an_image_of_one_grey_leaves_no_sharpness(opened: Callable[..., Model], grey_images: GreyImages) -> None:
    found = measure(opened(0.5), grey_images(board(12).tolist()), watch=Watch())
    assert found.sharpness == 0.0


def test_parts_in_any_order_and_packed_are_the_whole(tiny: Path, images_folder: Path) -> None:
    model, items = load_model(read_checkpoint(tiny)), find_images([images_folder])

    def part(i: int, n: int) -> Sums:
        images = Images(items, 3, 4)
        images.part = i, n
        totals = totals_of(model)
        run_pass(reconstructions(model, images, 7), [totals], Watch())
        return totals.sums

    whole, parts = part(0, 1), [part(i, 4) for i in (2, 0, 3, 1)]
    total = reduce(add, parts)
    assert (total.detail, total.reconstructed_detail) == (whole.detail, whole.reconstructed_detail) and whole.detail
    again = whole.unpacked(*whole.packed())
    assert (again.detail, again.reconstructed_detail) == (whole.detail, whole.reconstructed_detail)
    assert measurement_of(again, "test").sharpness == float(Fraction(whole.reconstructed_detail or 0) / whole.detail)
    assert (whole + replace(whole, detail=None)).detail is None


def test_a_file_of_a_part_without_it_is_refused_with_the_way_out(
    tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "part.safetensors"
    measure_model(Request(tiny, (str(images_folder),)), Watch(), path)
    assert read_part(path).measured is not None
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    integers, floats = (tensors[f"measured/{name}"] for name in ("integers", "floats"))
    older = {  # no flags and no sums of detail
        "measured/integers": torch.cat([integers[:3], integers[5:]]),
        "measured/floats": torch.cat([floats[:6], floats[12:]]),
    }
    del about[SEAL]
    save_file(tensors | older, path, sealed(tensors | older, about))
    with pytest.raises(CodebookError, match="as older versions wrote; measure that part anew"):
        read_part(path)


# --- what a result warns of ----------------------------------------------------------------------------------------


def measured(sharpness: float | None, ssim: float | None) -> Measurement:
    return Measurement("test", 10, 0.01, 20.0, ssim, (), sharpness)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ((0.5, 0.8), (0.44, 0.8), ["blurrier than the original: sharpness fell from 50.0% to 44.0%"]),
        ((0.5, 0.8), (0.6, 0.78), ["less true than the original: SSIM fell from 0.8000 to 0.7800"]),
        ((0.5, 0.8), (0.3, 0.7), ["sharpness fell from 50.0% to 30.0%", "SSIM fell from 0.8000 to 0.7000"]),
        ((3.0, 0.8), (0.8, 0.8), ["sharpness fell from 300.0% to 80.0%"]),
        ((0.5, None), (0.1, None), ["sharpness fell from 50.0% to 10.0%"]),
    ],
)
def test_a_fall_is_named_with_the_way_out(
    before: tuple[float, float | None], after: tuple[float, float | None], said: list[str]
) -> None:
    for expected, warning in zip(said, blur_warnings(measured(*before), measured(*after)), strict=True):
        assert expected in warning and "--perceptual" in warning and "--distill 1" in warning


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((0.5, 0.8), (0.46, 0.795)),
        ((0.5, 0.8), (0.9, 0.9)),
        ((None, None), (None, None)),
        ((0.0, 0.5), (0.0, 0.5)),
        ((3.0, 0.5), (0.95, 0.5)),
    ],
)
def test_small_falls_gains_and_what_was_not_measured_are_not(
    before: tuple[float | None, float | None], after: tuple[float | None, float | None]
) -> None:
    assert blur_warnings(measured(*before), measured(*after)) == []


def test_the_result_of_a_fine_tuning_that_blurs_warns_of_it(
    tiny: Path, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that fades the pictures, and is said to be better."""

    def fade(model: Model, train: Any, validation: Any, recipe: Any, counts: Any, **more: Any) -> FineTuned:
        tensors = model.network.state_dict(), tuple(book.vectors for book in model.books)
        revived = tuple(torch.zeros(len(book.vectors), dtype=torch.bool) for book in model.books)
        with torch.no_grad():
            dict(model.network.named_parameters())["_decoder._conv_trans_2.weight"].mul_(0.5)
        start, best = State(0, 1.0, *tensors, revived), State(1, 0.5, *tensors, revived)
        return FineTuned(start, best, (), (), ("decoder",), 0.1, None)

    asked = Request(tiny, (str(images_folder),), input_range=(-1.0, 1.0), output=tmp_path / "out.safetensors")
    monkeypatch.setattr(pipeline, "finetune", fade)
    result = operate("finetune", asked, None, FineTune(steps=1), Watch())
    assert result.before is not None and result.finetuned is not None and result.kept == "finetuned"
    assert result.finetuned.sharpness == pytest.approx((result.before.sharpness or 0) / 4, rel=0.01)
    assert any("blurrier than the original: sharpness fell" in warning for warning in result.warnings)
    fallen = (result.before.ssim or 0) - (result.finetuned.ssim or 0) > 0.01
    assert any("less true than the original" in warning for warning in result.warnings) == fallen
