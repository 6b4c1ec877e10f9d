"""One pass over images: by hand, against an independent one in float64, and in parts; and the coverage of codes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State
from hypothesis import given, settings
from hypothesis import strategies as st
from sources_of_images import Images, find_images
from torch import Tensor, nn
from tutorial_networks import Tutorial

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import Codebook
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.evaluation import coverage
from codebook_tools.evaluation.accumulators import BookSums, Sums
from codebook_tools.evaluation.coverage import reference_distance, reference_latents
from codebook_tools.evaluation.exact import exact, from_limbs, limbs
from codebook_tools.evaluation.figures import Measurement, measurement_of
from codebook_tools.evaluation.measure import find_input_range, measure, reconstruct, reconstructions, totals_of
from codebook_tools.evaluation.one_pass import run_pass
from codebook_tools.evaluation.quality_warnings import blur_warnings
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.recipe import FineTune
from codebook_tools.workflows import operate as workflow
from codebook_tools.workflows.request import Request

GreyImages = Callable[..., Images]
Figures = tuple[float | None, float | None]  # sharpness and SSIM
Line = Callable[[list[float]], Model]

# Nearest of the codes 0, 0.5 and 1: 0 0 0 1 and 2 2 1 0; squared errors 0 .04 .04 .01 and 0 .04 .01 0.
BY_HAND = ([[0.0, 0.2], [0.2, 0.4]], [[1.0, 0.8], [0.4, 0.0]])


def measured(model: Model, images: Images, **settings: object) -> Measurement:
    return measure(model, images, watch=Watch(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 64])
def test_every_number_of_a_measurement_by_hand(line: Line, grey_images: GreyImages, batch: int) -> None:
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
def test_coverage_counts_latents_within_the_reference(limit: float, share: float, line: Line, grey_images: Any) -> None:
    result = measured(line([0.0, 0.5, 1.0]), grey_images(*BY_HAND), references=[limit])
    assert result.codebooks[0].coverage == share


def test_codes_nearer_to_each_other_than_a_255th_are_told_apart(line: Line, grey_images: GreyImages) -> None:
    """64 codes from 0.5 to 0.504, each the value of one pixel: all lie in one of 255 levels."""
    firsts = (0.5 + torch.arange(64) * 2.0**-14).tolist()
    result = measured(line(firsts), grey_images([firsts[:32], firsts[32:]]))
    assert (result.codebooks[0].used, result.mse) == (64, 0)


def test_reconstructions_are_clamped_before_they_are_compared(line: Line, grey_images: GreyImages) -> None:
    result = measured(line([1.5, -0.5]), grey_images([[1.0, 0.0], [1.0, 0.2]]))
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


def board(side: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """(side, side): a checkerboard of single pixels."""
    return low + (high - low) * (torch.arange(side)[:, None] + torch.arange(side)).remainder(2).float()


FADED = board(12, 0.2, 0.8), torch.full((12, 12), 0.6)
"""Reconstructed as 0.4 and 0.6 the board has a ninth of its energy; flat images add nothing to either."""


@pytest.mark.parametrize(("codes", "pictures", "structure", "sharpness"), [
    ([0.4, 0.6], FADED, True, pytest.approx(1 / 9, rel=1e-5)), ([0.2, 0.8], FADED, True, pytest.approx(1, rel=1e-5)),
    ([0.4, 0.6], FADED, False, None), ([0.5], [board(12)], True, 0),
    ([0.4, 0.6], [torch.full((12, 12), 0.5)], True, None),  # no detail
    ([0.4, 0.6], [board(2)], True, None),  # too small
])  # fmt: skip
def test_sharpness_is_the_ratio_of_detail_over_all_images(
    codes: list[float], pictures: list[Tensor], structure: bool, sharpness: Any, line: Line, grey_images: GreyImages
) -> None:
    images = grey_images(*(picture.tolist() for picture in pictures))
    assert measured(line(codes), images, batch=1, structure=structure).sharpness == sharpness


@pytest.mark.parametrize(("before", "after", "expected"), [
    ((0.5, 0.8), (0.44, 0.8), ["blurrier than the original: sharpness fell from 50.0% to 44.0%"]),
    ((0.5, 0.8), (0.6, 0.78), ["less true than the original: SSIM fell from 0.8000 to 0.7800"]),
    ((0.5, 0.8), (0.3, 0.7), ["sharpness fell from 50.0% to 30.0%", "SSIM fell from 0.8000 to 0.7000"]),
    ((3.0, 0.8), (0.8, 0.8), ["sharpness fell from 300.0% to 80.0%"]),
    ((0.5, None), (0.1, None), ["sharpness fell from 50.0% to 10.0%"]),
    # small falls, gains, and what was not measured
    ((0.5, 0.8), (0.46, 0.795), []), ((0.5, 0.8), (0.9, 0.9), []), ((None, None), (None, None), []),
    ((0.0, 0.5), (0.0, 0.5), []), ((3.0, 0.5), (0.95, 0.5), []),
])  # fmt: skip
def test_a_fall_of_some_size_is_named_with_the_way_out(before: Figures, after: Figures, expected: list[str]) -> None:
    stages = (Measurement("test", 10, 0.01, 20.0, ssim, (), sharpness) for sharpness, ssim in (before, after))
    for words, warning in zip(expected, blur_warnings(*stages), strict=True):
        assert words in warning and "--perceptual" in warning and "--distill 1" in warning


@pytest.mark.filterwarnings("ignore::codebook_tools.CodebookWarning")
def test_a_fine_tuning_has_the_warnings(
    tiny: Path, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "blur_warnings", lambda before, after: [f"{before.images}, {after.images} images"])
    request = Request(tiny, (str(images_folder),), input_range=(-1.0, 1.0), output=tmp_path / "out.safetensors")
    result = workflow.operate("finetune", request, None, FineTune(steps=1), Watch())
    assert "3, 3 images" in result.warnings


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5)])
def test_the_range_that_reconstructs_best_is_found_with_few_of_the_images(
    line: Line, grey_images: GreyImages, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, run = [], Model.run
    monkeypatch.setattr(Model, "run", lambda self, media, *more: batches.append(len(media)) or run(self, media, *more))
    model = line([low + (high - low) * i / 32 for i in range(33)])
    errors = find_input_range(model, grey_images(*[[[x / 255 for x in range(256)]]] * 200))
    assert min(errors, key=errors.__getitem__) == (low, high) and sum(batches) == 3 * 64
    assert model.input_range == (0.0, 1.0)


class Astray(nn.Module):
    """Wraps a network; one half returns what a function makes of its output."""

    def __init__(self, network: nn.Module, half: str, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.quantizer, self.encode, self.decode = network.quantizer, network.encode, network.decode
        method = getattr(network, half)
        setattr(self, half, lambda x: change(method(x)))


def not_a_number(x: Tensor) -> Tensor:
    return torch.where(torch.arange(x.shape[-1]) == 1, torch.nan, x)


@pytest.mark.parametrize(("half", "change", "kind", "message"), [
    ("encode", not_a_number, NotFiniteError, "latents are not finite"),
    ("decode", not_a_number, NotFiniteError, "reconstructions are not finite"),
    ("decode", lambda x: x[..., :1], CodebookError, r"decode returns \(1, 2, 1\) for images of \(1, 2, 2\)"),
    ("decode", lambda x: None, CodebookError, "decode returns a NoneType"),
])  # fmt: skip
def test_a_network_whose_output_is_no_use_is_refused(
    line: Line, half: str, change: Callable[[Tensor], Tensor], kind: type[CodebookError], message: str
) -> None:
    model = line([0.0, 0.5, 1.0])
    model.network = Astray(model.network, half, change)
    with pytest.raises(kind, match=message):
        reconstruct(model, torch.rand(3, 1, 2, 2))


FINITE = st.floats(allow_nan=False, allow_infinity=False, max_value=1e30, min_value=-1e30)


def one(counts: list[int], error: float, near: int | None = None, score: float | None = None) -> Sums:
    book = BookSums("codes", 4, torch.tensor(counts), exact(error), near)
    total = None if score is None else exact(score)
    return Sums(1, 12, exact(error / 2), total, (book,), total, total)


def numbers(sums: Sums) -> tuple[object, ...]:
    """Everything in it, comparable."""
    books = [(book.key, book.dim, book.counts.tolist(), book.error, book.near) for book in sums.books]
    return sums.images, sums.values, sums.error, sums.similarity, sums.detail, sums.reconstructed_detail, books


def test_sums_add_up_by_hand_and_lack_what_a_part_lacks() -> None:
    total = one([1, 0, 2], 0.5, near=2, score=0.25) + one([0, 0, 4], 1.5, near=3, score=0.5)
    assert numbers(total) == (2, 24, 1, *[Fraction(3, 4)] * 3, [("codes", 4, [1, 0, 6], 2, 5)])
    assert numbers(total + one([1, 0, 0], 0.5))[3:] == (*[None] * 3, [("codes", 4, [2, 0, 6], 2.5, None)])


@settings(max_examples=50)
@given(st.lists(FINITE, max_size=30), st.randoms())
def test_no_order_of_adding_changes_a_sum(errors: list[float], shuffle: random.Random) -> None:
    parts = [one([i, 1], error, near=i, score=error) for i, error in enumerate(errors)]
    nothing = one([0, 0], 0.0, near=0, score=0.0)
    total = reduce(add, parts, nothing)
    shuffle.shuffle(parts)
    half = len(parts) // 2
    assert numbers(reduce(add, parts[half:], nothing) + reduce(add, parts[:half], nothing))[2:] == numbers(total)[2:]
    assert float(total.error) == math.fsum(error / 2 for error in errors)  # the standard library's exact sum


@settings(max_examples=50)
@given(st.lists(st.floats(min_value=0, max_value=1e9), min_size=1, max_size=50))
def test_limbs_represent_sums_of_any_size(errors: list[float]) -> None:
    total = sum(map(exact, errors), Fraction(0))
    parts = limbs(total)
    assert parts.dtype == torch.float64 and parts.shape == (3,) and float(parts[0]) == float(total)
    assert abs(from_limbs(parts) - total) <= total / 2**150
    with pytest.raises(CodebookError, match="too large for float32"):
        exact(math.inf)


@pytest.mark.parametrize(("near", "score"), [(None, 0.1), (7, None)])
def test_packed_sums_unpack_and_add_up_as_the_sums_do(near: int | None, score: float | None) -> None:
    a, b = (one([i, 5 * i], i / 7, near, score) for i in (1, 3))
    assert numbers(b.unpacked(*a.packed())) == numbers(a)
    with pytest.raises(ValueError, match="as older versions wrote"):
        a.unpacked(a.packed()[0][1:], a.packed()[1])
    packed = [x + y for x, y in zip(a.packed(), b.packed(), strict=True)]
    assert [tensor.dtype for tensor in packed] == [torch.int64, torch.float64]
    total, expected = a.unpacked(*packed), a + b
    assert (total.images, total.values, total.books[0].near) == (2, 24, expected.books[0].near)
    assert torch.equal(total.books[0].counts, expected.books[0].counts)
    assert float(total.error) == pytest.approx(float(expected.error), rel=1e-15)
    assert (total.similarity is None) == (score is None)


@pytest.mark.parametrize("parts", [2, 11])
def test_parts_of_a_pass_add_up_to_the_pass(parts: int, tiny: Path, images_folder: Path) -> None:
    """11 parts of 9 batches: two are of nothing."""
    model, items = load_model(read_checkpoint(tiny)), find_images([images_folder])

    def part(i: int, parts: int) -> Sums:
        images = Images(items, 3, 4)
        images.part = i, parts
        totals = totals_of(model, [0.5])
        run_pass(reconstructions(model, images, 7), [totals], Watch())
        return totals.sums

    whole = part(0, 1)
    total = reduce(add, (part(i, parts) for i in reversed(range(parts))))
    assert numbers(total) == numbers(whole) == numbers(whole.unpacked(*whole.packed()))
    assert whole.images == 60 and whole.detail
    result = measure(model, Images(items, 3, 4), batch=7, references=[0.5], watch=Watch())
    assert measurement_of(total, "test") == result
    assert result.sharpness == float(Fraction(whole.reconstructed_detail or 0) / whole.detail)


@pytest.mark.parametrize(("points", "size", "distance"), [
    # 0 ... 20 about their mean 10: the squares in order are 0 1 1 4 4 ... 81 81 100 100, and 0.95 * 20 = 19 is the
    # place of the first 100.
    ([*range(21)], 1, 100),
    # Two clusters of their own; as one, mean 2.5, squares 6.25 (3 times) and 56.25: the place 0.95 * 3 = 2.85 lies
    # 0.85 of the way.
    ([0, 0, 0, 10], 2, 0), ([0, 0, 0, 10], 1, 6.25 + 0.85 * 50),
    ([0, 1, 1], 3, None),  # fewer distinct points than codes
    (None, 2, None),
])  # fmt: skip
def test_the_reference_distance_by_hand(points: list[int] | None, size: int, distance: float | None) -> None:
    latents = None if points is None else torch.tensor(points).float()[:, None]
    assert reference_distance(latents, Codebook(torch.zeros(size, 1)), seed=0) == pytest.approx(distance)


def test_between_unit_vectors_length_does_not_matter() -> None:
    points = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    codebook = Codebook(torch.zeros(4, 3), COSINE_UNIT)
    one, other = (reference_distance(points * x, codebook, seed=0) for x in (1, torch.linspace(0.1, 9, 300)[:, None]))
    assert one == pytest.approx(other, rel=1e-4) and one is not None and 0 < one < 4


def test_good_codes_cover_about_95_percent_and_a_few_of_them_far_less() -> None:
    generator = torch.Generator().manual_seed(1)
    centers = 10 * torch.randn(32, 4, generator=generator)
    points = (centers + torch.randn(200, 32, 4, generator=generator)).flatten(0, 1)
    limit = reference_distance(points[:3200], Codebook(centers), seed=0)
    assert limit is not None
    good, collapsed = Codebook(centers), Codebook(torch.cat([centers[:8], 500 + centers[8:]]))
    shares = [
        float((squared_errors(points[3200:], book, nearest(points[3200:], book)) <= limit).float().mean())
        for book in (good, collapsed)
    ]
    assert 0.93 < shares[0] < 0.97 and shares[1] < 0.5


def test_reference_latents_are_the_encoders_own_and_follow_from_names_and_seed_alone(
    tiny: Path, images_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = load_model(read_checkpoint(tiny)), Images(find_images([images_folder]), channels=3)
    encoded, encode = set[int](), model.encode

    def recorded(pixels: Tensor, stage: int = 0, **more: bool) -> Tensor:
        encoded.update(hash(image.numpy().tobytes()) for image in pixels)
        return encode(pixels, stage, **more)

    def drawn(images: Images = images, seed: int = 0, batch: int = 64) -> Tensor:
        latents = reference_latents(model, images, seed=seed, batch=batch)
        assert latents is not None
        return latents

    everything = torch.cat(list(model.latents(images, 64)))
    assert sorted(map(tuple, drawn().tolist())) == sorted(map(tuple, everything.tolist()))
    monkeypatch.setattr(coverage, "POINTS", 50)
    few = drawn()
    assert few.shape == (50, 4)
    assert float((few[:, None] - everything).abs().amax(2).amin(1).max()) < 1e-5  # rounding depends on the batch
    assert torch.equal(few, drawn(images.subset(images.items[::-1])))
    assert torch.allclose(few, drawn(batch=7), atol=1e-6) and not torch.equal(few, drawn(seed=1))
    assert reference_latents(model, images.subset([]), seed=0, batch=64) is None
    monkeypatch.setattr(coverage, "POINTS", 20)
    monkeypatch.setattr(model, "encode", recorded)
    assert len(drawn(batch=1)) == 20
    assert len(encoded) == 5  # of 16 latents each: four times as many
