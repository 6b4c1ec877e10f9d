"""Restart and grow: where codes are moved or added, that the others stay bit for bit, and the drawing by error."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.kmeans import draw_by_error
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT, DOT, METRICS, unit
from codebook_tools.codebook import EUCLIDEAN, REMOVED, Codebook, Metric, Surgery
from codebook_tools.data.latents import StoredLatents
from codebook_tools.errors import CodebookError
from codebook_tools.strategies import Grow, Prune, Refit, Restart
from codebook_tools.strategies.restart import Method

METHODS: tuple[Method, ...] = ("error", "random", "split", "nearest")
each_method = pytest.mark.parametrize("method", METHODS)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def restarted(codes: Tensor, points: Tensor, counts: list[int], metric: Metric = EUCLIDEAN, **settings: Any) -> Surgery:
    return Restart(**settings)(Codebook(codes, metric), StoredLatents(points), torch.tensor(counts))


def grown(codes: Tensor, points: Tensor, counts: list[int], k: int, seed: int = 0) -> Surgery:
    return Grow(k, seed)(Codebook(codes), StoredLatents(points), torch.tensor(counts))


def drawn(points: Tensor, codes: Tensor, n: int, seed: int) -> list[float]:
    found: list[float] = draw_by_error(points, Codebook(codes), n, seed).flatten().tolist()
    return found


def assert_shares(found: Counter[Any], expected: dict[Any, float]) -> None:
    """Each share within four standard deviations of what is expected, and nothing else was found."""
    total = sum(found.values())
    assert set(found) <= {key for key, share in expected.items() if share}
    for key, share in expected.items():
        assert found[key] / total == pytest.approx(share, abs=4 * (share * (1 - share) / total) ** 0.5), key


# --- drawing by error ----------------------------------------------------------------------------------------------


def test_a_point_is_drawn_as_often_as_its_squared_error_asks() -> None:
    """From the code 0 the squared errors of 0, 1, 2, 3 are 0, 1, 4, 9, of 14."""
    points = column(0, 1, 2, 3)
    found = Counter(drawn(points, column(0), 1, seed)[0] for seed in range(2000))
    assert_shares(found, {0: 0, 1: 1 / 14, 2: 4 / 14, 3: 9 / 14})


def test_the_next_point_is_drawn_by_what_those_before_leave_of_the_error() -> None:
    """After 3 the errors of 1 and 2 are 1 and 1; after 2 those of 1 and 3 are 1 and 1; after 1, of 2 and 3, 1 and 4."""
    points = column(0, 1, 2, 3)
    pairs = Counter(tuple(drawn(points, column(0), 2, seed)) for seed in range(2000))
    shares: dict[Any, float] = {(3, 1): 9 / 28, (3, 2): 9 / 28, (2, 1): 4 / 28, (2, 3): 4 / 28}
    assert_shares(pairs, shares | {(1, 2): 1 / 14 / 5, (1, 3): 1 / 14 * 4 / 5})


def test_copies_of_a_point_weigh_as_often_as_they_stand_there() -> None:
    """Five times 1, and 2 once: 5 to 4."""
    points = column(1, 1, 2, 1, 1, 1)
    found = Counter(drawn(points, column(0), 1, seed)[0] for seed in range(1500))
    assert_shares(found, {1: 5 / 9, 2: 4 / 9})


def test_the_error_is_to_the_nearest_code() -> None:
    """From 0 and 10: 1 has 1, 5 has 25, 8 has 4."""
    found = Counter(drawn(column(1, 5, 8, 10), column(0, 10), 1, seed)[0] for seed in range(1500))
    assert_shares(found, {1: 1 / 30, 5: 25 / 30, 8: 4 / 30, 10: 0})


def test_unit_codes_are_missed_by_angle_and_not_by_length() -> None:
    """From (1, 0) on the circle: (0, 90) has 2, (1, 1) has 2 - sqrt(2) = 0.586, (500, 0) has nothing."""
    points = torch.tensor([[0.0, 90.0], [1.0, 1.0], [500.0, 0.0]])
    codebook = Codebook(torch.tensor([[3.0, 0.0]]), COSINE_UNIT)
    found = Counter(float(draw_by_error(points, codebook, 1, seed)[0, 1]) for seed in range(1500))
    share = (2 - 2**0.5) / (4 - 2**0.5)
    assert_shares(found, {90: 1 - share, 1: share, 0: 0})
    # After (0, 90) the next is (1, 1), though (500, 0) is farther from it: a code points there.
    both = {tuple(draw_by_error(points, codebook, 2, seed)[:, 1].tolist()) for seed in range(20)}
    assert both == {(90, 1), (1, 90)}
    # (0, 7) and (0, 90) are one place.
    more = torch.cat([points, torch.tensor([[0.0, 7.0]])])
    assert all(len(draw_by_error(more, codebook, 4, seed)) == 2 for seed in range(5))


GRID = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=30)


@given(GRID, GRID, st.integers(0, 40), st.integers(0, 99))
def test_no_place_is_drawn_twice_and_none_that_a_code_sits_on(
    rows: list[tuple[int, int]], codes: list[tuple[int, int]], n: int, seed: int
) -> None:
    points, codebook = torch.tensor(rows, dtype=torch.float32), Codebook(torch.tensor(codes, dtype=torch.float32))
    found = [tuple(row) for row in draw_by_error(points, codebook, n, seed).tolist()]
    free = set(rows) - set(codes)
    assert len(set(found)) == len(found) == min(n, len(free))
    assert set(found) <= free


def test_fewer_draws_are_the_first_of_more() -> None:
    points, codebook = normal(200, 3), Codebook(normal(4, 3, seed=1))
    many = draw_by_error(points, codebook, 30, 7)
    assert torch.equal(draw_by_error(points, codebook, 11, 7), many[:11])
    assert not torch.equal(draw_by_error(points, codebook, 30, 8), many)
    assert draw_by_error(points, codebook, 0, 7).shape == (0, 3)


def test_of_very_many_points_a_head_is_drawn_from() -> None:
    """65,536 points, or 128 for each draw; points behind have nearly all of the error here, and stay unseen."""
    points = torch.cat([torch.linspace(1, 2, 65_536), torch.linspace(1e4, 2e4, 4096)])[:, None]
    assert all(max(drawn(points, column(0), 3, seed)) <= 2 for seed in range(5))
    assert max(drawn(points, column(0), 520, 0)) >= 1e4  # 66,560 points
    assert len(set(drawn(points, column(0), 520, 0))) == 520


@pytest.mark.parametrize("n", [1, 7, 10, 30])
def test_points_behind_a_head_full_of_repeats_are_found(n: int) -> None:
    """The codes have no error on the head at all: the ten other points all lie behind it."""
    points = torch.cat([torch.zeros(66_000), torch.arange(1.0, 11)])[:, None]
    found = drawn(points, column(0), n, 0)
    assert len(set(found)) == len(found) == min(n, 10) and set(found) <= set(range(1, 11))


def test_codes_are_moved_added_and_filled_up_where_repeats_crowd_the_head() -> None:
    points = torch.cat([torch.zeros(66_000), torch.arange(1.0, 4)])[:, None]
    codes, counts = column(0, 500, 501, 502), [66_003, 0, 0, 0]
    assert sorted(restarted(codes, points, counts).codebook.vectors.flatten().tolist()) == [0, 1, 2, 3]
    assert sorted(grown(codes, points, counts, 4).codebook.vectors.flatten().tolist()) == [0, 1, 2, 3]
    refit = Refit(4, "used")(Codebook(codes), StoredLatents(points), torch.tensor(counts))
    assert sorted(refit.codebook.vectors.flatten().tolist()) == pytest.approx([0, 1, 2, 3], abs=1e-6)


# --- restart: who moves and who stays ------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize(
    ("threshold", "moved"), [(0, [2]), (1, [1, 2]), (2, [1, 2]), (3, [1, 2, 4]), (4, [0, 1, 2, 4])]
)
def test_codes_with_threshold_counts_or_fewer_are_moved(method: Method, threshold: int, moved: list[int]) -> None:
    codes, points = column(0, 10, 20, 30, 40), 100 + normal(50, 1)
    found = restarted(codes, points, [4, 1, 0, 9, 3], method=method, threshold=threshold)
    assert [i for i in range(5) if found.codebook.vectors[i] != codes[i]] == moved
    assert found.index_map.tolist() == [REMOVED if i in moved else i for i in range(5)]


@each_method
@examples(max_examples=25)
@given(data=st.data())
def test_codes_that_stay_are_the_same_bits_at_the_same_place(method: Method, data: st.DataObject) -> None:
    entries = st.floats(width=32, min_value=-1e6, max_value=1e6)  # minus zero and the smallest numbers among them
    codes = torch.tensor(data.draw(st.lists(st.tuples(entries, entries), min_size=2, max_size=9)))
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(codes), max_size=len(codes)).filter(any))
    found = restarted(codes, normal(40, 2), counts, method=method)
    stays = torch.tensor(counts) > 0
    assert found.codebook.vectors[stays].numpy().tobytes() == codes[stays].numpy().tobytes()
    assert torch.equal(found.index_map, torch.where(stays, torch.arange(len(codes)), REMOVED))


@each_method
@pytest.mark.parametrize("metric", [COSINE_UNIT, DOT])
def test_restart_keeps_lookup_and_output_of_the_codebook(method: Method, metric: Metric) -> None:
    codebook = Codebook(normal(6, 3), metric)
    found = Restart(method)(codebook, StoredLatents(normal(50, 3, seed=1)), torch.tensor([1, 0, 1, 1, 0, 1]))
    assert found.codebook.metric == metric


@each_method
def test_where_no_code_is_dead_nothing_changes(method: Method) -> None:
    codes = normal(5, 2)
    found = restarted(codes, normal(30, 2, seed=1), [1, 2, 3, 4, 5], method=method)
    assert torch.equal(found.codebook.vectors, codes) and found.index_map.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", ["error", "random", "nearest"])
def test_each_moved_code_is_a_latent(method: Method) -> None:
    codes, points = normal(30, 3), normal(200, 3, seed=1)
    found = restarted(codes, points, [0, 2, 0] * 10, method=method)
    latents = {row.numpy().tobytes() for row in points}
    assert all(found.codebook.vectors[i].numpy().tobytes() in latents for i in range(30) if i % 3 != 1)


@pytest.mark.parametrize("method", ["error", "random", "split"])
def test_what_is_drawn_comes_from_the_seed(method: Method) -> None:
    codes, points, counts = normal(8, 3), normal(90, 3, seed=1), [3, 0, 3, 0, 3, 3, 0, 0]
    ones = [restarted(codes, points, counts, method=method, seed=s).codebook.vectors for s in (0, 0, 1, -1, 2**31)]
    assert torch.equal(ones[0], ones[1])
    assert all(not torch.equal(ones[i], ones[j]) for i in range(1, 5) for j in range(1, i))


# --- restart: where codes move -------------------------------------------------------------------------------------


def test_by_error_codes_move_to_latents_as_often_as_their_squared_error_asks() -> None:
    """The dead code at 3 counts for nothing: from 0 the squared errors are 1, 4, 9."""
    codes, points = column(3, 0), column(0, 1, 2, 3)
    found = Counter(float(restarted(codes, points, [0, 4], seed=s).codebook.vectors[0]) for s in range(1000))
    assert_shares(found, {0: 0, 1: 1 / 14, 2: 4 / 14, 3: 9 / 14})


def test_by_error_rarely_used_codes_that_are_moved_do_not_count_as_codes() -> None:
    """With threshold 1 the code 5 moves: its latent 5 has the whole error."""
    found = restarted(column(0, 5), column(0, 0, 5), [2, 1], threshold=1)
    assert found.codebook.vectors.flatten().tolist() == [0, 5] and found.index_map.tolist() == [0, REMOVED]


def test_at_random_every_latent_is_as_likely_as_any_other() -> None:
    """Of 0, 1, 2, 30 two are drawn, in order, without putting back: twelve pairs."""
    codes, points = column(0, 70, 80), column(0, 1, 2, 30)
    pairs: Counter[Any] = Counter()
    for seed in range(2400):
        found = restarted(codes, points, [4, 0, 0], method="random", seed=seed)
        pairs[tuple(found.codebook.vectors[1:].flatten().tolist())] += 1
    assert_shares(pairs, {(x, y): 1 / 12 for x in (0, 1, 2, 30) for y in (0, 1, 2, 30) if x != y})


def test_split_takes_the_most_used_codes_in_order_and_again_from_the_start() -> None:
    """Counts 5, 9, 5, 1: first the code 20, then 0 and 30, of the equal ones the first, then 50, then 20 again."""
    codes = column(0, 900, 20, 901, 30, 902, 903, 50, 904)
    points = column(*[x + y for x in (0, 20, 30, 50) for y in (-1, 1)])
    found = restarted(codes, points, [5, 0, 9, 0, 5, 0, 0, 1, 0], method="split").codebook.vectors.flatten()
    assert found[[1, 3, 5, 6, 8]].tolist() == pytest.approx([20, 0, 30, 50, 20], abs=0.05)
    assert len(found.unique()) == 9


def test_the_noise_of_split_is_a_hundredth_of_the_spread_about_the_codes() -> None:
    """Latents 3 away in one of two dimensions: a mean square of 9/2 an entry, so a spread of 2.12."""
    codes = torch.cat([torch.tensor([[50.0, 60.0]]), torch.full((2000, 2), 1e3)])
    points = torch.tensor([[53.0, 60.0], [47.0, 60.0], [50.0, 63.0], [50.0, 57.0]])
    found = restarted(codes, points, [4] + [0] * 2000, method="split").codebook.vectors[1:] - codes[0]
    assert found.std(0).tolist() == pytest.approx([0.0212, 0.0212], rel=0.08)
    assert found.mean(0).tolist() == pytest.approx([0, 0], abs=0.002)


def test_split_codes_share_the_latents_of_their_parents() -> None:
    centres = 50 * torch.eye(6)[:, :3] + 20 * torch.arange(6.0)[:, None]
    points = centres.repeat(200, 1) + normal(1200, 3)
    codes = torch.cat([torch.full((6, 3), 1e4), centres])
    before = nearest(points, Codebook(codes))
    counts = torch.bincount(before, minlength=12)
    after = nearest(points, restarted(codes, points, counts.tolist(), method="split").codebook)
    for dead in range(6):
        parent = 6 + dead  # all are used 200 times: the first is the first parent
        assert torch.equal((after == dead) | (after == parent), before == parent)
        assert 20 < int((after == dead).sum()) < 180


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_split_unit_codes_point_where_their_parents_do_however_long_their_rows_are(length: float) -> None:
    """Only the direction of such a row is seen, and its length is left to chance in training."""
    directions, codes = unit(normal(8, 6, seed=3)), normal(16, 6, seed=1)
    codes[:8] = length * directions
    points = directions.repeat(100, 1) + 0.1 * normal(800, 6, seed=2)
    codebook = Codebook(codes, COSINE_UNIT)
    found = Restart("split")(codebook, StoredLatents(points), torch.tensor([100] * 8 + [0] * 8)).codebook
    turned = (unit(found.vectors[8:]) - directions).norm(dim=1)
    assert bool((turned > 1e-5).all()) and bool((turned < 0.01).all())
    assert int(torch.bincount(nearest(points, found), minlength=16).min()) > 10


def test_the_nearest_latent_is_found_by_hand_for_each_lookup() -> None:
    """Of the dead code (0, 9) the angle is smallest to (0.1, 0.2), the distance to (5, 5), the product with (8, 6).

    Cosines 0.89, 0.71, 0.6; squared distances 77.5, 41, 73; products 1.8, 45, 54.
    """
    codes, points = torch.tensor([[1.0, 1.0], [0.0, 9.0]]), torch.tensor([[0.1, 0.2], [5.0, 5.0], [8.0, 6.0]])
    for metric, expected in ((COSINE, 0), (EUCLIDEAN, 1), (DOT, 2)):
        found = restarted(codes, points, [3, 0], metric, method="nearest")
        assert torch.equal(found.codebook.vectors[1], points[expected])


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_the_nearest_latents_are_those_of_brute_force(metric: Metric) -> None:
    codes, points = 2 * normal(40, 5), normal(300, 5, seed=1) * torch.linspace(0.1, 3, 300)[:, None]
    found = restarted(codes, points, [1, 0] * 20, metric, method="nearest").codebook.vectors[1::2]
    dead, wide = codes[1::2].double(), points.double()
    if metric is EUCLIDEAN:
        best = (dead[:, None] - wide).square().sum(2).argmin(1)
    else:
        lengths = wide.norm(dim=1) if metric.by_direction else 1
        best = (dead @ wide.T / lengths).argmax(1)
    assert torch.equal(found, points[best])


# --- restart: errors -----------------------------------------------------------------------------------------------


@each_method
def test_a_threshold_that_moves_every_code_says_which_one_would_not(method: Method) -> None:
    codes, points, counts = column(0, 5, 9), normal(20, 1), [4, 9, 1]
    with pytest.raises(CodebookError, match=r"threshold=9 moves every code: .* counts 9; use --threshold 8 or less"):
        restarted(codes, points, counts, method=method, threshold=9)
    assert restarted(codes, points, counts, method=method, threshold=8).index_map.tolist() == [REMOVED, 1, REMOVED]


@each_method
def test_where_every_code_is_dead_refit_is_named(method: Method) -> None:
    with pytest.raises(CodebookError, match=r"every code: the most used one counts 0; use refit") as caught:
        restarted(column(0, 5, 9), normal(20, 1), [0, 0, 0], method=method)
    assert "--threshold" not in str(caught.value)


def test_too_few_latents_to_move_to_says_how_many_there_are() -> None:
    codes, counts = column(0, 5, 6, 7), [9, 0, 0, 0]
    with pytest.raises(CodebookError, match=r"3 codes are to be moved, but only 2 latents .*more data, or use prune"):
        restarted(codes, column(0, 1, 1, 0, 2, 2), counts)  # 1 and 2: no second place, nor where a code is
    with pytest.raises(CodebookError, match=r"3 codes are to be moved, but only 2 latents .*more data, or use prune"):
        restarted(codes, column(0, 1), counts, method="random")
    for method in ("split", "nearest"):
        assert restarted(codes, column(0, 1), counts, method=method).codebook.size == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "x"}, "method=x is none of error, random, split, nearest"),
        ({"threshold": -1}, "threshold=-1 is below 0"),
    ],
)
def test_settings_of_restart_that_make_no_sense_are_the_users_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CodebookError, match=message):
        Restart(**settings)


# --- grow ----------------------------------------------------------------------------------------------------------


def test_three_codes_are_grown_to_four_by_hand() -> None:
    """Of the codes 10, 50, 0 the second is dead. The latents 10 and 0 have a code; 4 and 12 are what is left."""
    found = grown(column(10, 50, 0), column(0, 4, 12, 10), [2, 0, 2], 4)
    assert found.codebook.vectors[:2].flatten().tolist() == [10, 0]
    assert sorted(found.codebook.vectors[2:].flatten().tolist()) == [4, 12]
    assert found.index_map.tolist() == [0, REMOVED, 1]


def test_grown_codes_are_latents_as_often_as_their_squared_error_asks() -> None:
    """A code in use at 0, a dead one at 3, which counts for nothing: the squared errors are 1, 4, 9."""
    codes, points = column(3, 0), column(0, 1, 2, 3)
    found = Counter(float(grown(codes, points, [0, 4], 2, seed).codebook.vectors[1]) for seed in range(1000))
    assert_shares(found, {0: 0, 1: 1 / 14, 2: 4 / 14, 3: 9 / 14})


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(any), st.integers(0, 20), st.integers(0, 99))
def test_codes_in_use_stay_in_order_bit_for_bit_and_new_ones_are_latents(
    counts: list[int], more: int, seed: int
) -> None:
    codes, points = normal(len(counts), 3), normal(60, 3, seed=1)
    codes[:, 0] = -0.0
    used = [i for i, count in enumerate(counts) if count]
    found = grown(codes, points, counts, len(used) + more, seed)
    vectors = found.codebook.vectors
    assert vectors.shape == (len(used) + more, 3)
    assert vectors[: len(used)].numpy().tobytes() == codes[used].numpy().tobytes()
    assert found.index_map.tolist() == [used.index(i) if i in used else REMOVED for i in range(len(counts))]
    new = {row.numpy().tobytes() for row in vectors[len(used) :]}
    assert len(new) == more and new <= {row.numpy().tobytes() for row in points}


def test_growing_to_the_codes_in_use_is_pruning() -> None:
    codes, points, counts = normal(6, 2), normal(40, 2, seed=1), [3, 0, 1, 0, 0, 7]
    found, pruned = (
        strategy(Codebook(codes), StoredLatents(points), torch.tensor(counts)) for strategy in (Grow(3), Prune())
    )
    assert torch.equal(found.codebook.vectors, pruned.codebook.vectors)
    assert torch.equal(found.index_map, pruned.index_map)


def test_growing_back_to_the_old_size_moves_dead_codes_as_restart_does() -> None:
    codes, points, counts = normal(9, 3), normal(90, 3, seed=1), [5, 1, 2, 3, 0, 0, 0, 0, 0]
    found, moved = grown(codes, points, counts, 9, seed=4), restarted(codes, points, counts, seed=4)
    assert torch.equal(found.codebook.vectors, moved.codebook.vectors)
    assert torch.equal(found.index_map, moved.index_map)


def test_growing_keeps_lookup_and_output_of_the_codebook() -> None:
    codebook = Codebook(normal(3, 2), COSINE_UNIT)
    found = Grow(5)(codebook, StoredLatents(normal(30, 2, seed=1)), torch.tensor([1, 0, 2]))
    assert found.codebook.metric == COSINE_UNIT


def test_fewer_codes_than_are_in_use_says_how_many_there_are() -> None:
    codes, points, counts = column(0, 5, 9), column(0, 5, 9, 7), [1, 2, 1]
    with pytest.raises(CodebookError, match=r"k=2 is less than the 3 codes in use; use --k 3 or more, or refit"):
        grown(codes, points, counts, 2)
    assert grown(codes, points, counts, 3).codebook.size == 3


def test_more_codes_than_distinct_latents_allow_says_how_many_they_do() -> None:
    """One code in use, at a latent; 1 and 2 are the other places."""
    codes, points, counts = column(0, 80), column(0, 1, 1, 0, 2, 2), [6, 0]
    with pytest.raises(
        CodebookError,
        match=r"k=4 asks for more codes than the 3 that the distinct .*--k 3 or less, .*more data",
    ):
        grown(codes, points, counts, 4)
    assert sorted(grown(codes, points, counts, 3).codebook.vectors.flatten().tolist()) == [0, 1, 2]


def test_growing_from_dead_codes_alone_names_refit() -> None:
    with pytest.raises(CodebookError, match="every code is dead: there is none to grow from; use refit"):
        grown(column(0, 5), column(0, 1), [0, 0], 2)


@pytest.mark.parametrize("k", [0, -1])
def test_settings_of_grow_that_make_no_sense_are_the_users_error(k: int) -> None:
    with pytest.raises(CodebookError, match=f"k={k} is below 1; use --k 1 or more"):
        Grow(k)
