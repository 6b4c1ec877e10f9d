"""Restart and grow: where codes are moved or added, that the others stay bit for bit, and the drawing by error."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from points import column, normal
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT, DOT, METRICS, unit
from codebook_tools.clustering.seeding import draw_by_error
from codebook_tools.codebook import EUCLIDEAN, REMOVED, Codebook, Metric, Surgery
from codebook_tools.data.latents import StoredLatents
from codebook_tools.strategies import Grow, Prune, Restart
from codebook_tools.strategies.restart import Method

METHODS: tuple[Method, ...] = ("error", "random", "split", "nearest")
each_method = pytest.mark.parametrize("method", METHODS)


def restarted(codes: Tensor, points: Tensor, counts: list[int], metric: Metric = EUCLIDEAN, **settings: Any) -> Surgery:
    return Restart(**settings)(Codebook(codes, metric), StoredLatents(points), torch.tensor(counts))


def grown(codes: Tensor, points: Tensor, counts: list[int], k: int, seed: int = 0) -> Surgery:
    return Grow(k, seed)(Codebook(codes), StoredLatents(points), torch.tensor(counts))


def drawn(points: Tensor, codes: Tensor, n: int, seed: int) -> Any:
    return points[draw_by_error(points, Codebook(codes), n, seed)].flatten().tolist()


def assert_frequencies(counts: Counter[Any], expected: dict[Any, float]) -> None:
    """Each within four standard deviations of what is expected, and nothing else."""
    total = sum(counts.values())
    assert set(counts) <= {key for key, frequency in expected.items() if frequency}
    for key, frequency in expected.items():
        assert counts[key] / total == pytest.approx(frequency, abs=4 * (frequency * (1 - frequency) / total) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("points", "codes", "n", "expected"),
    [
        # From the code 0 the squared errors of 0, 1, 2, 3 are 0, 1, 4, 9, of 14.
        ((0, 1, 2, 3), (0,), 1, {(1,): 1 / 14, (2,): 4 / 14, (3,): 9 / 14}),
        # After 3 the errors of 1 and 2 are 1 and 1; after 2 those of 1 and 3 are 1 and 1; after 1, of 2 and 3, 1 and 4.
        ((0, 1, 2, 3), (0,), 2, {(3, 1): 9 / 28, (3, 2): 9 / 28, (2, 1): 4 / 28, (2, 3): 4 / 28, (1, 2): 1 / 70,
                                 (1, 3): 4 / 70}),
        ((1, 1, 2, 1, 1, 1), (0,), 1, {(1,): 5 / 9, (2,): 4 / 9}),  # copies weigh as often as they stand there
        ((1, 5, 8, 10), (0, 10), 1, {(1,): 1 / 30, (5,): 25 / 30, (8,): 4 / 30}),  # to the nearest code
    ],
)  # fmt: skip
def test_points_are_drawn_as_often_as_their_squared_error_asks(
    points: tuple[float, ...], codes: tuple[float, ...], n: int, expected: dict[Any, float]
) -> None:
    draws = Counter(tuple(drawn(column(*points), column(*codes), n, seed)) for seed in range(1500))
    assert_frequencies(draws, expected)


def test_unit_codes_are_missed_by_angle_and_not_by_length() -> None:
    """From (1, 0) on the circle: (0, 90) has 2, (1, 1) has 2 - sqrt(2) = 0.586, (500, 0) has nothing."""
    points = torch.tensor([[0.0, 90.0], [1.0, 1.0], [500.0, 0.0]])
    codebook = Codebook(torch.tensor([[3.0, 0.0]]), COSINE_UNIT)
    draws = Counter(float(points[draw_by_error(points, codebook, 1, seed)][0, 1]) for seed in range(1500))
    frequency = (2 - 2**0.5) / (4 - 2**0.5)
    assert_frequencies(draws, {90: 1 - frequency, 1: frequency})
    # After (0, 90) the next is (1, 1), though (500, 0) is farther from it: a code points there.
    both = {tuple(points[draw_by_error(points, codebook, 2, seed)][:, 1].tolist()) for seed in range(20)}
    assert both == {(90, 1), (1, 90)}
    # (0, 7) and (0, 90) are one place.
    more = torch.cat([points, torch.tensor([[0.0, 7.0]])])
    assert all(len(more[draw_by_error(more, codebook, 4, seed)]) == 2 for seed in range(5))


GRID = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=30)


@given(GRID, GRID, st.integers(0, 40), st.integers(0, 99))
def test_no_place_is_drawn_twice_and_none_that_a_code_sits_on(rows: Any, codes: Any, n: int, seed: int) -> None:
    points, codebook = torch.tensor(rows, dtype=torch.float32), Codebook(torch.tensor(codes, dtype=torch.float32))
    places = [tuple(row) for row in points[draw_by_error(points, codebook, n, seed)].tolist()]
    free = set(rows) - set(codes)
    assert len(set(places)) == len(places) == min(n, len(free)) and set(places) <= free


def test_fewer_draws_are_the_first_of_more() -> None:
    points, codebook = normal(200, 3), Codebook(normal(4, 3, seed=1))
    many = points[draw_by_error(points, codebook, 30, 7)]
    assert torch.equal(points[draw_by_error(points, codebook, 11, 7)], many[:11])
    assert not torch.equal(points[draw_by_error(points, codebook, 30, 8)], many)


def test_of_very_many_points_a_head_is_drawn_from_unless_it_is_full_of_repeats() -> None:
    """65,536 points, or 128 for each draw; points behind have nearly all of the error here, and stay unseen."""
    points = torch.cat([torch.linspace(1, 2, 65_536), torch.linspace(1e4, 2e4, 4096)])[:, None]
    assert all(max(drawn(points, column(0), 3, seed)) <= 2 for seed in range(5))
    many = drawn(points, column(0), 520, 0)  # of 66,560 points
    assert max(many) >= 1e4 and len(set(many)) == 520
    points = torch.cat([torch.zeros(66_000), torch.arange(1.0, 11)])[:, None]
    for n in (1, 10, 30):
        behind = drawn(points, column(0), n, 0)
        assert len(set(behind)) == len(behind) == min(n, 10) and set(behind) <= set(range(1, 11))


@each_method
@pytest.mark.parametrize(("threshold", "moved"), [(0, [2]), (1, [1, 2]), (3, [1, 2, 4]), (4, [0, 1, 2, 4])])
def test_codes_with_threshold_counts_or_fewer_are_moved(method: Method, threshold: int, moved: list[int]) -> None:
    codes, points = column(0, 10, 20, 30, 40), 100 + normal(50, 1)
    surgery = restarted(codes, points, [4, 1, 0, 9, 3], method=method, threshold=threshold)
    assert [i for i in range(5) if surgery.codebook.vectors[i] != codes[i]] == moved
    assert surgery.index_map.tolist() == [REMOVED if i in moved else i for i in range(5)]


@each_method
@examples(max_examples=25)
@given(data=st.data())
def test_codes_that_stay_are_the_same_bits_at_the_same_place(method: Method, data: st.DataObject) -> None:
    entries = st.floats(width=32, min_value=-1e6, max_value=1e6)  # minus zero and the smallest numbers among them
    codes = torch.tensor(data.draw(st.lists(st.tuples(entries, entries), min_size=2, max_size=9)))
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(codes), max_size=len(codes)).filter(any))
    points = normal(40, 2)
    surgery = restarted(codes, points, counts, method=method)
    stays = torch.tensor(counts) > 0
    assert surgery.codebook.vectors[stays].numpy().tobytes() == codes[stays].numpy().tobytes()
    assert torch.equal(surgery.index_map, torch.where(stays, torch.arange(len(codes)), REMOVED))
    if method != "split":
        latents = {row.numpy().tobytes() for row in points}
        assert all(row.numpy().tobytes() in latents for row in surgery.codebook.vectors[~stays])


@pytest.mark.parametrize("method", ["error", "random", "split"])
def test_what_is_drawn_comes_from_the_seed(method: Method) -> None:
    codes, points, counts = normal(8, 3), normal(90, 3, seed=1), [3, 0, 3, 0, 3, 3, 0, 0]
    ones = [restarted(codes, points, counts, method=method, seed=s).codebook.vectors for s in (0, 1, -1, 2**31)]
    assert all(not torch.equal(ones[i], ones[j]) for i in range(1, 4) for j in range(i))


def test_new_codes_are_latents_drawn_by_their_error_from_the_living_codes_alone() -> None:
    codes, points, counts = normal(6, 2), normal(50, 2, seed=1), [0, 2, 0, 1, 0, 0]
    expected = points[draw_by_error(points, Codebook(codes[[1, 3]]), 4, 3)]
    assert torch.equal(restarted(codes, points, counts, seed=3).codebook.vectors[[0, 2, 4, 5]], expected)
    assert torch.equal(grown(codes, points, counts, 6, seed=3).codebook.vectors[2:], expected)


def test_at_random_every_latent_is_as_likely_as_any_other() -> None:
    """Of 0, 1, 2, 30 two are drawn, in order, without putting back: twelve pairs."""
    codes, points = column(0, 70, 80), column(0, 1, 2, 30)
    pairs: Counter[Any] = Counter()
    for seed in range(2400):
        surgery = restarted(codes, points, [4, 0, 0], method="random", seed=seed)
        pairs[tuple(surgery.codebook.vectors[1:].flatten().tolist())] += 1
    assert_frequencies(pairs, {(x, y): 1 / 12 for x in (0, 1, 2, 30) for y in (0, 1, 2, 30) if x != y})


def test_split_takes_the_most_used_codes_in_order_and_again_from_the_start() -> None:
    """Counts 5, 9, 5, 1: first the code 20, then 0 and 30, of the equal ones the first, then 50, then 20 again."""
    codes = column(0, 900, 20, 901, 30, 902, 903, 50, 904)
    points = column(*[x + y for x in (0, 20, 30, 50) for y in (-1, 1)])
    vectors = restarted(codes, points, [5, 0, 9, 0, 5, 0, 0, 1, 0], method="split").codebook.vectors.flatten()
    assert vectors[[1, 3, 5, 6, 8]].tolist() == pytest.approx([20, 0, 30, 50, 20], abs=0.05)
    assert len(vectors.unique()) == 9


def test_the_noise_of_split_is_a_hundredth_of_the_spread_about_the_codes() -> None:
    """Latents 3 away in one of two dimensions: a mean square of 9/2 an entry, so a spread of 2.12."""
    codes = torch.cat([torch.tensor([[50.0, 60.0]]), torch.full((2000, 2), 1e3)])
    points = torch.tensor([[53.0, 60.0], [47.0, 60.0], [50.0, 63.0], [50.0, 57.0]])
    noise = restarted(codes, points, [4] + [0] * 2000, method="split").codebook.vectors[1:] - codes[0]
    assert noise.std(0).tolist() == pytest.approx([0.0212, 0.0212], rel=0.08)
    assert noise.mean(0).tolist() == pytest.approx([0, 0], abs=0.002)


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_split_unit_codes_share_the_latents_of_their_parents_however_long_their_rows_are(length: float) -> None:
    """The length of such a row is left to chance in training."""
    directions, codes = unit(normal(8, 6, seed=3)), normal(16, 6, seed=1)
    codes[:8] = length * directions
    points = directions.repeat(100, 1) + 0.1 * normal(800, 6, seed=2)
    codebook = Codebook(codes, COSINE_UNIT)
    split = Restart("split")(codebook, StoredLatents(points), torch.tensor([100] * 8 + [0] * 8)).codebook
    turned = (unit(split.vectors[8:]) - directions).norm(dim=1)
    assert bool((turned > 1e-5).all()) and bool((turned < 0.01).all())
    assert int(torch.bincount(nearest(points, split), minlength=16).min()) > 10


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_the_nearest_latent_is_that_of_brute_force(metric: Metric) -> None:
    """Of the dead code (0, 9) the angle is smallest to (0.1, 0.2), the distance to (5, 5), the product with (8, 6)."""
    codes, points = torch.tensor([[1.0, 1.0], [0.0, 9.0]]), torch.tensor([[0.1, 0.2], [5.0, 5.0], [8.0, 6.0]])
    surgery = restarted(codes, points, [3, 0], metric, method="nearest")
    assert torch.equal(surgery.codebook.vectors[1], points[{EUCLIDEAN: 1, DOT: 2}.get(metric, 0)])
    codes, points = 2 * normal(40, 5), normal(300, 5, seed=1) * torch.linspace(0.1, 3, 300)[:, None]
    moved = restarted(codes, points, [1, 0] * 20, metric, method="nearest").codebook.vectors[1::2]
    dead, wide = codes[1::2].double(), points.double()
    if metric is EUCLIDEAN:
        best = (dead[:, None] - wide).square().sum(2).argmin(1)
    else:
        lengths = wide.norm(dim=1) if metric in (COSINE, COSINE_UNIT) else 1
        best = (dead @ wide.T / lengths).argmax(1)
    assert torch.equal(moved, points[best])


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(any), st.integers(0, 20), st.integers(0, 99))
def test_codes_in_use_stay_as_pruned_bit_for_bit_and_new_ones_are_latents(counts: Any, more: int, seed: int) -> None:
    codes, points = normal(len(counts), 3), normal(60, 3, seed=1)
    codes[:, 0] = -0.0
    pruned = Prune()(Codebook(codes), StoredLatents(points), torch.tensor(counts))
    used = pruned.codebook.size
    surgery = grown(codes, points, counts, used + more, seed)
    vectors = surgery.codebook.vectors
    assert vectors.shape == (used + more, 3) and torch.equal(surgery.index_map, pruned.index_map)
    assert vectors[:used].numpy().tobytes() == pruned.codebook.vectors.numpy().tobytes()
    new = {row.numpy().tobytes() for row in vectors[used:]}
    assert len(new) == more and new <= {row.numpy().tobytes() for row in points}
