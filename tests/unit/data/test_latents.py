"""Latents: streams that read the same twice, and the one pass that counts, measures and samples them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sources_of_images import Images
from torch import Tensor

from codebook_tools.clustering.metric import COSINE_UNIT, DOT, METRICS
from codebook_tools.codebook import EUCLIDEAN, Codebook, Latents, Metric
from codebook_tools.data.images import array_items
from codebook_tools.data.items import Item
from codebook_tools.data.latents import EncodedLatents, StoredLatents
from codebook_tools.data.sampling import SAMPLE_LIMIT, sample_keys
from codebook_tools.data.sampling import mixed as mixed_array
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.usage import Survey, survey
from codebook_tools.runtime.progress import Watch


def items_of(count: int, side: int = 4) -> list[Item]:
    """Gray images of noise."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, side, side), dtype=np.uint8)
    return array_items("x.npy", pixels)


def encode(images: Tensor) -> Tensor:
    """(n, 1, h, w) -> (n, h * w, 2): a pixel x has the latent (x, 1 - 2x), whatever batch it comes in."""
    pixels = images.flatten(1)
    return torch.stack([pixels, 1 - 2 * pixels], dim=2)


def encoded(items: list[Item], batch: int = 64, encoder: Callable[[Tensor], Tensor] = encode) -> EncodedLatents:
    return EncodedLatents(Images(items, 1), encoder, batch)


def surveyed(items: list[Item], *, batch: int = 64, seed: int = 0, limit: int = SAMPLE_LIMIT) -> Survey:
    return survey(encoded(items, batch), CODES, seed=seed, limit=limit, watch=Watch())


def all_of(items: list[Item]) -> Tensor:
    """(items * positions, 2): their latents, computed at once."""
    return encode(Images(items, 1).load(items)[1]).flatten(0, 1)


CODES = Codebook(torch.tensor([[0.0, 1.0], [0.5, 0.0], [1.0, -1.0], [9.0, 9.0]]))
ITEMS = items_of(30)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_streams_come_whole_in_order_and_again_even_two_at_once(batch: int) -> None:
    vectors = all_of(ITEMS)
    for latents in (StoredLatents(vectors, batch), encoded(ITEMS, batch)):
        assert isinstance(latents, Latents)
        one, two = zip(*zip(latents, latents, strict=True), strict=True)
        assert torch.equal(torch.cat(one), vectors) and torch.equal(torch.cat(two), vectors)
    assert max(map(len, StoredLatents(vectors, batch))) == batch and len(StoredLatents(vectors)) == 480
    assert [item for items, _ in encoded(ITEMS, batch).by_item() for item in items] == ITEMS


@pytest.mark.parametrize(("value", "batch"), [(torch.nan, 1), (torch.nan, 100), (torch.inf, 1), (-torch.inf, 100)])
def test_latents_that_are_not_finite_are_named_by_the_first_item_that_has_them(value: float, batch: int) -> None:
    items = items_of(9)
    pixels = Images(items, 1).load(items)[1]

    def encoder(images: Tensor) -> Tensor:
        latents = encode(images)
        for i, image in enumerate(images):
            if any(torch.equal(image, pixels[bad]) for bad in (5, 7)):
                latents[i, 3, 1] = value
        return latents

    with pytest.raises(CodebookError, match=r"latents of x\.npy#5 are not finite"):
        list(encoded(items, batch, encoder))


# --- counts and errors -----------------------------------------------------------------------------------------------
def test_a_pass_without_latents_is_refused() -> None:
    with pytest.raises(CodebookError, match="no latents"):
        surveyed([])


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_counts_and_error_equal_a_direct_computation_and_the_watch_sees_every_batch(metric: Metric) -> None:
    codebook = Codebook(torch.randn(12, 2, generator=torch.Generator().manual_seed(1)), metric)
    reports: list[tuple[str, int, int | None]] = []
    watch = Watch(lambda what, done, total, figures: reports.append((what, done, total)))
    result = survey(encoded(ITEMS, 7), codebook, seed=0, watch=watch)
    rows, codes = all_of(ITEMS).double(), codebook.vectors.double()
    unit_rows, unit_codes = (x / x.norm(dim=1, keepdim=True) for x in (rows, codes))
    if metric is EUCLIDEAN:
        chosen = torch.cdist(rows, codes).argmin(1)
    else:
        chosen = (rows @ codes.T if metric is DOT else unit_rows @ unit_codes.T).argmax(1)
    if metric is COSINE_UNIT:
        rows, codes = unit_rows, unit_codes
    assert result.counts.dtype == torch.int64
    assert result.counts.tolist() == torch.bincount(chosen, minlength=12).tolist()
    assert int(result.counts.sum()) == result.total == 30 * 16
    assert result.error == pytest.approx(float((rows - codes[chosen]).square().sum()), rel=1e-5)
    assert reports == [("encode", done, 30) for done in (7, 14, 21, 28, 30)]


# --- the sample ------------------------------------------------------------------------------------------------------
def mixed(x: int) -> int:
    """splitmix64's finalizer once more, in Python's own integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64s_as_published() -> None:
    """The generator adds 0x9E3779B97F4A7C15 to its state and finalizes: the first number from 0, and from 1234567."""
    gamma = 0x9E3779B97F4A7C15
    assert mixed(gamma) == 0xE220A8397B1DCDAF and mixed(1234567 + gamma) == 6457827717110365317
    values = [0, 1, gamma, 1234567 + gamma, 2**64 - 1, 2**63]
    assert mixed_array(np.array(values, dtype=np.uint64)).tolist() == [mixed(x) for x in values]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**64 - 1, 2**70 + 3])
def test_keys_depend_on_seed_name_and_position_alone(seed: int) -> None:
    items = items_of(5)
    firsts = [mixed(int.from_bytes(item.digest[24:], "big") ^ mixed(seed % 2**64)) for item in items]
    expected = [mixed((first + position) % 2**64) for first in firsts for position in range(7)]
    assert sample_keys(items, 7, seed).tolist() == expected and len(set(expected)) == 35


@pytest.mark.parametrize(("batch", "limit"), [(7, 100), (64, 100), (7, 480), (64, SAMPLE_LIMIT)])
def test_the_sample_is_the_latents_of_the_smallest_keys_in_any_order_of_reading(batch: int, limit: int) -> None:
    order = np.argsort(sample_keys(ITEMS, 16, 3))[:limit]
    shuffled = [ITEMS[i] for i in np.random.default_rng(0).permutation(30)]
    result, in_order = surveyed(shuffled, batch=batch, limit=limit, seed=3), surveyed(ITEMS, seed=3)
    assert torch.equal(result.sample.vectors, all_of(ITEMS)[torch.from_numpy(order)])
    assert result.sampled == (limit == 100) and result.total == int(result.counts.sum()) == 480
    assert torch.equal(result.counts, in_order.counts)
    assert result.error == pytest.approx(in_order.error, rel=1e-9)


def test_a_long_stream_that_is_trimmed_on_the_way_keeps_the_smallest_keys() -> None:
    """200,000 latents for a sample of 1,000: more than what is kept without trimming."""
    items = items_of(195, side=32)
    result = surveyed(items, batch=16, limit=1000)
    order = np.argsort(sample_keys(items, 1024, 0))[:1000]
    assert result.total == 195 * 1024
    assert torch.equal(result.sample.vectors, all_of(items)[torch.from_numpy(order.copy())])
