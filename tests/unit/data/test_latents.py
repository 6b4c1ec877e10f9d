"""Latents: streams that read the same twice, and the one pass that counts, measures and samples them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from sources_of_images import Images, find_images
from torch import Tensor

from codebook_tools.clustering.metric import COSINE_UNIT, DOT, METRICS
from codebook_tools.codebook import EUCLIDEAN, Codebook, Latents, Metric
from codebook_tools.data.images import array_items
from codebook_tools.data.items import Item
from codebook_tools.data.latents import EncodedLatents, StoredLatents
from codebook_tools.data.sampling import SAMPLE_LIMIT, sample_keys
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.usage import Survey, survey
from codebook_tools.runtime.progress import Watch


def items_of(count: int, side: int = 4) -> list[Item]:
    """Grey images in which no two pixels next to each other tell where they are from."""
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
    """(items, positions, 2): their latents, worked out at once."""
    return encode(Images(items, 1).load(items)[1])


CODES = Codebook(torch.tensor([[0.0, 1.0], [0.5, 0.0], [1.0, -1.0], [9.0, 9.0]]))


# --- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 10, 100])
def test_stored_latents_come_whole_in_order_and_again(batch: int) -> None:
    vectors = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    latents = StoredLatents(vectors, batch)
    assert isinstance(latents, Latents) and len(latents) == 10
    for _ in range(2):
        batches = list(latents)
        assert all(len(rows) <= batch for rows in batches)
        assert torch.equal(torch.cat(batches), vectors)


@pytest.mark.parametrize("batch", [1, 4, 7, 100])
def test_encoded_latents_come_whole_in_order_and_again(batch: int) -> None:
    items = items_of(11)
    latents = encoded(items, batch)
    assert isinstance(latents, Latents)
    for _ in range(2):
        assert torch.equal(torch.cat(list(latents)), all_of(items).flatten(0, 1))
        assert [item.name for found, _ in latents.by_item() for item in found] == [item.name for item in items]


def test_two_readings_at_once_do_not_disturb_each_other() -> None:
    latents = encoded(items_of(9), 2)
    assert all(torch.equal(one, two) for one, two in zip(latents, latents, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_latents_that_are_not_finite_are_named_by_the_first_item_that_has_them(value: float, batch: int) -> None:
    items = items_of(9)
    pixels = Images(items, 1).load(items)[1].flatten(1)
    poisoned = {tuple(pixels[i].tolist()) for i in (5, 7)}

    def encoder(images: Tensor) -> Tensor:
        latents = encode(images)
        for i, image in enumerate(images):
            if tuple(image.flatten().tolist()) in poisoned:
                latents[i, 3, 1] = value
        return latents

    with pytest.raises(CodebookError, match=r"latents of x\.npy#5 are not finite"):
        list(encoded(items, batch, encoder))
    with pytest.raises(CodebookError, match=r"x\.npy#5"):
        survey(encoded(items, batch, encoder), CODES, seed=0, watch=Watch())


# --- counts and errors ---------------------------------------------------------------------------------------------


def test_a_survey_by_hand() -> None:
    """Pixels 0, 51, 102 and 255 of 255 are x = 0, 0.2, 0.4 and 1: latents (0, 1), (0.2, 0.6), (0.4, 0.2), (1, -1)."""
    items = array_items("x", np.array([[[0, 51]], [[102, 255]]], dtype=np.uint8))
    found = surveyed(items)
    # (0.2, 0.6) is 0.2 from the code (0, 1) and 0.45 from (0.5, 0); (0.4, 0.2) is 0.05 from that.
    assert found.counts.tolist() == [2, 1, 1, 0]
    assert found.total == 4 and not found.sampled
    assert found.error == pytest.approx(0.2 + 0.05, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_counts_and_error_equal_a_direct_computation(batch: int, metric: Metric) -> None:
    codebook = Codebook(torch.randn(12, 2, generator=torch.Generator().manual_seed(1)), metric)
    items = items_of(30)
    found = survey(encoded(items, batch), codebook, seed=0, watch=Watch())
    rows, codes = all_of(items).flatten(0, 1).double(), codebook.vectors.double()
    unit_rows, unit_codes = (x / x.norm(dim=1, keepdim=True) for x in (rows, codes))
    if metric is EUCLIDEAN:
        chosen = torch.cdist(rows, codes).argmin(1)
    else:
        chosen = (rows @ codes.T if metric is DOT else unit_rows @ unit_codes.T).argmax(1)
    if metric is COSINE_UNIT:
        rows = unit_rows
    shown = unit_codes if metric is COSINE_UNIT else codes
    assert found.counts.dtype == torch.int64
    assert found.counts.tolist() == torch.bincount(chosen, minlength=12).tolist()
    assert int(found.counts.sum()) == found.total == 30 * 16
    assert found.error == pytest.approx(float((rows - shown[chosen]).square().sum()), rel=1e-5)


def test_bad_images_take_no_part(tmp_path: Path, images_folder: Path) -> None:
    for i, file in enumerate(sorted(images_folder.rglob("*.png"))[:6]):
        (tmp_path / f"{i}.png").write_bytes(file.read_bytes() if i != 2 else b"no image")
    images = Images(find_images([tmp_path]), 1, skip_bad=True, mixing="mix")
    found = survey(EncodedLatents(images, encode, 2), CODES, seed=0, watch=Watch())
    assert found.total == 5 * 256 == int(found.counts.sum()) == len(found.sample)
    assert list(images.bad) == ["2.png"]


def test_a_stream_without_any_image_is_the_users_error() -> None:
    with pytest.raises(CodebookError, match="no latents"):
        survey(encoded([]), CODES, seed=0, watch=Watch())


def test_the_watch_is_told_how_far_the_pass_is() -> None:
    told: list[tuple[str, int, int | None]] = []
    watch = Watch(lambda what, done, total, figures: told.append((what, done, total)))
    survey(encoded(items_of(10), 4), CODES, seed=0, watch=watch)
    assert told == [("encode", 4, 10), ("encode", 8, 10), ("encode", 10, 10)]


# --- the sample ----------------------------------------------------------------------------------------------------


def as_rows(vectors: Tensor) -> list[tuple[float, ...]]:
    return sorted(tuple(row) for row in vectors.tolist())


def mixed(x: int) -> int:
    """splitmix64's finaliser once more, in Python's own integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64s_as_published() -> None:
    """The generator adds 0x9E3779B97F4A7C15 to its state and finalises: the first number from 0, and from 1234567."""
    from codebook_tools.data.sampling import mixed as ours

    gamma = 0x9E3779B97F4A7C15
    assert mixed(gamma) == 0xE220A8397B1DCDAF and mixed(1234567 + gamma) == 6457827717110365317
    values = [0, 1, gamma, 1234567 + gamma, 2**64 - 1, 2**63]
    assert ours(np.array(values, dtype=np.uint64)).tolist() == [mixed(x) for x in values]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**64 - 1, 2**70 + 3])
def test_keys_depend_on_seed_name_and_position_alone(seed: int) -> None:
    items = items_of(5)
    expected = [
        mixed((mixed(int.from_bytes(item.digest[24:], "big") ^ mixed(seed % 2**64)) + position) % 2**64)
        for item in items
        for position in range(7)
    ]
    assert sample_keys(items, 7, seed).tolist() == expected
    assert sample_keys(items[::-1], 7, seed).reshape(5, 7)[::-1].ravel().tolist() == expected
    assert len(set(expected)) == 35


@pytest.mark.parametrize("limit", [30 * 16, 30 * 16 + 1, SAMPLE_LIMIT])
def test_up_to_the_limit_the_sample_is_all_latents_in_the_order_of_their_keys(limit: int) -> None:
    items = items_of(30)
    found = surveyed(items, limit=limit)
    order = np.argsort(sample_keys(items, 16, 0))
    assert not found.sampled
    assert torch.equal(found.sample.vectors, all_of(items).flatten(0, 1)[torch.from_numpy(order)])


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("limit", [100, SAMPLE_LIMIT])
def test_the_sample_depends_neither_on_order_nor_on_batch_size(batch: int, limit: int) -> None:
    items = items_of(30)
    reference = surveyed(items, limit=limit, seed=3)
    shuffled = [items[i] for i in np.random.default_rng(0).permutation(30)]
    found = surveyed(shuffled, batch=batch, limit=limit, seed=3)
    assert torch.equal(found.sample.vectors, reference.sample.vectors)
    assert torch.equal(found.counts, reference.counts)
    assert found.error == pytest.approx(reference.error, rel=1e-9)


def test_above_the_limit_the_sample_has_the_limits_size_and_counts_see_all() -> None:
    found = surveyed(items_of(30), limit=100)
    assert found.sampled and len(found.sample) == 100
    assert found.total == int(found.counts.sum()) == 480


@given(st.integers(1, 480), st.integers(1, 480), st.integers(0, 3))
def test_a_smaller_sample_is_the_head_of_a_larger_one(a: int, b: int, seed: int) -> None:
    few, many = (surveyed(ITEMS, limit=limit, seed=seed).sample.vectors for limit in sorted((a, b)))
    assert torch.equal(many[: len(few)], few)


ITEMS = items_of(30)


def test_another_seed_draws_another_sample() -> None:
    one, two = (surveyed(ITEMS, limit=100, seed=seed).sample.vectors for seed in (0, 1))
    assert as_rows(one) != as_rows(two)


@pytest.mark.parametrize("batch", [16, 200])
def test_a_long_stream_that_is_trimmed_on_the_way_keeps_the_smallest_keys(batch: int) -> None:
    """200,000 latents for a sample of 1,000: more than what is held without cutting it down."""
    items = items_of(195, side=32)
    found = surveyed(items, batch=batch, limit=1000)
    order = np.argsort(sample_keys(items, 1024, 0))[:1000]
    assert found.total == 195 * 1024
    assert torch.equal(found.sample.vectors, all_of(items).flatten(0, 1)[torch.from_numpy(order.copy())])


def test_above_the_limit_every_item_and_every_position_is_drawn_alike() -> None:
    """60 samples of 64 of 640 latents, by 60 seeds: 6 draws of each expected. Red and green say which it is."""
    places = np.arange(640).reshape(20, 4, 8)
    items = array_items("x", np.stack([places // 256, places % 256, places * 0], axis=3).astype(np.uint8))
    latents = EncodedLatents(Images(items, 3), lambda images: images.flatten(2).movedim(1, 2))
    codes = Codebook(torch.eye(3))
    drawn = np.zeros(640, dtype=np.int64)
    for seed in range(60):
        found = survey(latents, codes, seed=seed, limit=64, watch=Watch()).sample.vectors * 255
        drawn += np.bincount((found[:, 0] * 256 + found[:, 1]).round().long().numpy(), minlength=640)
    assert drawn.sum() == 60 * 64
    for times in (drawn, drawn.reshape(20, 32).sum(0), drawn.reshape(20, 32).sum(1)):
        assert chisquare(times).pvalue > 0.001


def test_neighbours_in_an_image_are_drawn_independently_of_each_other() -> None:
    """A tenth of 100,000 is drawn, so both of two neighbours a thousand times, with a standard deviation of 32."""
    items = items_of(100)
    keys = sample_keys(items, 1000, 0)
    chosen = (keys <= np.sort(keys)[9999]).reshape(100, 1000)
    for apart in (1, 2, 32):
        both = (chosen[:, :-apart] & chosen[:, apart:]).mean()
        assert both == pytest.approx(0.01, rel=0.12)
    per_item = chosen.sum(1)
    assert chisquare(per_item).pvalue > 0.001


def test_the_sample_of_one_seed_says_nothing_about_that_of_the_next() -> None:
    items = items_of(100)
    chosen = [sample_keys(items, 1000, seed) < 2**64 // 10 for seed in (0, 1, 2)]
    for one in range(3):
        for two in range(one):
            assert (chosen[one] & chosen[two]).mean() == pytest.approx(0.01, rel=0.12)
