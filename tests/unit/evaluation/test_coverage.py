"""Coverage: the reference distance by hand, and what it says of good and of collapsed codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sources_of_images import Images, find_images
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import Codebook
from codebook_tools.evaluation import coverage
from codebook_tools.evaluation.coverage import reference_distance, reference_latents
from codebook_tools.models.load import load_model


@pytest.mark.parametrize(
    ("points", "size", "distance"),
    [
        # 0 ... 20 about their mean 10: the squares in order are 0 1 1 4 4 ... 81 81 100 100, and 0.95 * 20 = 19 is the
        # place of the first 100.
        ([*range(21)], 1, 100),
        # Two clusters of their own; as one, mean 2.5, squares 6.25 (3 times) and 56.25: the place 0.95 * 3 = 2.85 lies
        # 0.85 of the way.
        ([0, 0, 0, 10], 2, 0),
        ([0, 0, 0, 10], 1, 6.25 + 0.85 * 50),
        ([0, 1, 1], 3, None),  # fewer distinct points than codes
        (None, 2, None),
    ],
)
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
