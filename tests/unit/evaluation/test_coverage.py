"""Coverage: the reference distance by hand, and what it says of good and of collapsed codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Grey
from sources_of_images import Images, find_images
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import Codebook
from codebook_tools.evaluation import coverage
from codebook_tools.evaluation.coverage import reference_distance, reference_latents
from codebook_tools.evaluation.measure import measure
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch


def of_size(k: int, dim: int = 1) -> Codebook:
    return Codebook(torch.zeros(k, dim))


def test_the_reference_distance_by_hand() -> None:
    """21 points 0 ... 20 about their mean 10: the squares in order are 0 1 1 4 4 ... 81 81 100 100, and 0.95 * 20 = 19
    is the place of the first 100."""
    points = torch.arange(21.0)[:, None]
    assert reference_distance(points, of_size(1), seed=0) == pytest.approx(100)


def test_between_two_places_the_percentile_is_interpolated() -> None:
    """The points 0 and 10 in two clusters of their own, 3 times and once; one cluster: mean 2.5, squares 6.25 (3 times)
    and 56.25; the place 0.95 * 3 = 2.85 lies 0.85 of the way."""
    points = torch.tensor([[0.0], [0.0], [0.0], [10.0]])
    assert reference_distance(points, of_size(2), seed=0) == 0
    assert reference_distance(points, of_size(1), seed=0) == pytest.approx(6.25 + 0.85 * 50)


def test_there_is_none_without_latents_or_with_fewer_of_them_than_codes() -> None:
    points = torch.tensor([[0.0], [1.0], [1.0]])
    assert reference_distance(None, of_size(2), seed=0) is None
    assert reference_distance(points, of_size(2), seed=0) == 0
    assert reference_distance(points, of_size(3), seed=0) is None


def test_between_unit_vectors_length_does_not_matter() -> None:
    points = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(0.1, 9, 300)[:, None]
    both = [
        reference_distance(rows, Codebook(torch.zeros(4, 3), COSINE_UNIT), seed=0)
        for rows in (points, points * lengths)
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-4)
    assert both[0] is not None and 0 < both[0] < 4


def test_good_codes_cover_about_95_percent_and_a_few_of_them_far_less() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = 10 * torch.randn(32, 4, generator=generator)
    points = (centres[:, None] + torch.randn(32, 200, 4, generator=generator)).flatten(0, 1)
    points = points[torch.randperm(len(points), generator=generator)]
    limit = reference_distance(points[::2], Codebook(centres), seed=0)
    assert limit is not None
    codes = {"all": Codebook(centres), "collapsed": Codebook(torch.cat([centres[:8], 500 + centres[8:]]))}
    held_out = points[1::2]
    shares = {
        name: float((squared_errors(held_out, book, nearest(held_out, book)) <= limit).float().mean())
        for name, book in codes.items()
    }
    assert 0.93 < shares["all"] < 0.97
    assert shares["collapsed"] < 0.5


# --- in a measurement ----------------------------------------------------------------------------------------------


def test_a_measurement_counts_the_latents_within_the_reference_distance(
    grey: Callable[..., Grey], grey_images: Callable[..., Images]
) -> None:
    """Squared errors 0 .04 .04 .01 and 0 .04 .01 0 to the codes 0, 0.5 and 1."""
    made = grey([0.0, 0.5, 1.0])
    model = load_model(read_checkpoint(made.path), network=made.network)
    model.input_range = (0.0, 1.0)
    images = grey_images([[0.0, 0.2], [0.2, 0.4]], [[1.0, 0.8], [0.4, 0.0]])
    shares = {
        limit: measure(model, images, references=[limit], watch=Watch()).codebooks[0].coverage
        for limit in (None, 0.0, 0.02, 0.05)
    }
    assert shares == {None: None, 0.0: 3 / 8, 0.02: 5 / 8, 0.05: 1.0}


@pytest.fixture
def model(tiny: Path) -> Model:
    return load_model(read_checkpoint(tiny))


@pytest.fixture
def images(images_folder: Path) -> Images:
    return Images(find_images([images_folder]), channels=3)


def rows(found: Tensor | None) -> Tensor:
    assert found is not None
    return found


def test_reference_latents_are_the_encoders_own_and_follow_from_names_and_seed_alone(
    model: Model, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = torch.cat(list(model.latents(images, 64)))
    all_of_them = rows(reference_latents(model, images, seed=0, batch=64))
    assert sorted(map(tuple, all_of_them.tolist())) == sorted(map(tuple, everything.tolist()))  # 60 images of 16
    monkeypatch.setattr(coverage, "POINTS", 50)
    few = rows(reference_latents(model, images, seed=0, batch=64))
    assert few.shape == (50, 4)
    turned = images.subset(images.items[::-1])
    assert torch.equal(few, rows(reference_latents(model, turned, seed=0, batch=64)))
    assert torch.allclose(few, rows(reference_latents(model, images, seed=0, batch=7)), atol=1e-6)
    assert not torch.equal(few, rows(reference_latents(model, images, seed=1, batch=64)))
    apart = (few[:, None] - everything).abs().amax(2).amin(1)
    assert float(apart.max()) < 1e-5  # rounding depends on the batch


def test_four_times_the_latents_are_encoded_from_images_that_the_seed_draws(
    model: Model, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "POINTS", 20)
    seen: set[int] = set()
    encode = model.encode

    def counted(pixels: Tensor, stage: int = 0, **more: bool) -> Tensor:
        seen.update(hash(image.numpy().tobytes()) for image in pixels)
        return encode(pixels, stage, **more)

    monkeypatch.setattr(model, "encode", counted)
    assert len(rows(reference_latents(model, images, seed=0, batch=1))) == 20
    assert len(seen) == 5  # of 16 latents each: 80


def test_without_calibration_images_there_are_no_reference_latents(model: Model, images: Images) -> None:
    assert reference_latents(model, images.subset([]), seed=0, batch=64) is None
