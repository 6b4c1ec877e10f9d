"""How sharp reconstructions are beside their images, and what a result warns of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sources_of_images import Images

from codebook_tools.evaluation.figures import Measurement
from codebook_tools.evaluation.measure import measure
from codebook_tools.evaluation.quality_warnings import blur_warnings
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.finetune import FineTune, FineTuned
from codebook_tools.training.state import State
from codebook_tools.workflows import pipeline
from codebook_tools.workflows.operate import operate
from codebook_tools.workflows.request import Request


def board(side: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
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
    pictures: list[torch.Tensor],
    structure: bool,
    sharpness: float | None,
    line: Callable[..., Model],
    grey_images: Callable[..., Images],
) -> None:
    images = grey_images(*(picture.tolist() for picture in pictures))
    result = measure(line(codes), images, batch=1, structure=structure, watch=Watch())
    assert result.sharpness == sharpness


def measured(sharpness: float | None, ssim: float | None) -> Measurement:
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
    for words, warning in zip(expected, blur_warnings(measured(*before), measured(*after)), strict=True):
        assert words in warning and "--perceptual" in warning and "--distill 1" in warning


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

    request = Request(tiny, (str(images_folder),), input_range=(-1.0, 1.0), output=tmp_path / "out.safetensors")
    monkeypatch.setattr(pipeline, "finetune", fade)
    result = operate("finetune", request, None, FineTune(steps=1), Watch())
    assert result.before is not None and result.finetuned is not None and result.kept == "finetuned"
    assert result.finetuned.sharpness == pytest.approx((result.before.sharpness or 0) / 4, rel=0.01)
    assert any("blurrier than the original: sharpness fell" in warning for warning in result.warnings)
