"""The strategies: one contract for all, and numbers worked by hand for each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import sklearn.cluster  # noqa: F401  # draws from `random` when it is first imported
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT, DOT, METRICS
from codebook_tools.codebook import EUCLIDEAN, REMOVED, Codebook, Metric, Surgery
from codebook_tools.data.latents import StoredLatents
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import STRATEGIES, Prune, Refit, on_device

Settings = dict[str, Any]


@dataclass(frozen=True)
class Situation:
    """Latents, the codebook they are assigned with, and how often it is used for them."""

    codebook: Codebook
    latents: Tensor

    @property
    def counts(self) -> Tensor:
        return torch.bincount(nearest(self.latents, self.codebook), minlength=self.codebook.size)


@dataclass(frozen=True)
class Case:
    """A strategy's settings, and the size that they ask for; None where they ask for what is not to be had."""

    settings: Settings
    size: Callable[[Situation], int | None]
    metrics: tuple[Metric, ...] = tuple(METRICS.values())


def more_than(threshold: int) -> Callable[[Situation], int | None]:
    return lambda situation: int((situation.counts > threshold).sum()) or None


def up_to_the_codes(k: int) -> Callable[[Situation], int | None]:
    return lambda situation: k if k <= situation.codebook.size else None


def up_to_the_distinct_latents(k: int) -> Callable[[Situation], int | None]:
    return lambda situation: k if k <= len(situation.latents.unique(dim=0)) else None


def up_to_the_centroids(k: int) -> Callable[[Situation], int | None]:
    """By the cosine, latents of one direction are one; there is no k-means for inner products."""

    def size(situation: Situation) -> int | None:
        metric = situation.codebook.metric
        return k if metric.is_distance and k <= len(metric.prepare(situation.latents).unique(dim=0)) else None

    return size


def unmoved_or_drawn(method: str, threshold: int) -> Callable[[Situation], int | None]:
    """The codebook's own size, where a code stays, and there are latents enough for the codes that move."""

    def size(situation: Situation) -> int | None:
        stays = situation.counts > threshold
        living = replace(situation.codebook, vectors=situation.codebook.vectors[stays])
        if not living.size:
            return None
        moving = int((~stays).sum())
        there = {"error": places_to_draw(situation, living), "random": len(situation.latents)}.get(method, moving)
        return situation.codebook.size if moving <= there else None

    return size


def grown(k: int) -> Callable[[Situation], int | None]:
    def size(situation: Situation) -> int | None:
        living = replace(situation.codebook, vectors=situation.codebook.vectors[situation.counts > 0])
        return k if living.size <= k <= living.size + places_to_draw(situation, living) else None

    return size


def condensed(k: int) -> Callable[[Situation], int | None]:
    """k: merged where more codes are in use, else drawn from what lies off them."""

    def size(situation: Situation) -> int | None:
        return k if int((situation.counts > 0).sum()) > k else grown(k)(situation)

    return size


def places_to_draw(situation: Situation, living: Codebook) -> int:
    """Distinct latents that no code emits, as the metric sees them."""
    points, codes = situation.latents, living.emitted
    places = living.metric.emit(points)
    off = (places - codes[nearest(points, living)]).square().sum(1) > 0
    return len((places[off] + 0).unique(dim=0))


CASES: dict[str, list[Case]] = {
    "prune": [
        Case({}, more_than(0)),
        Case({"threshold": 2}, more_than(2)),
        Case({"keep": 1}, up_to_the_codes(1)),
        Case({"keep": 4}, up_to_the_codes(4)),
    ],
    "refit": [
        Case({"k": k, "init": init, "seed": k}, up_to_the_centroids(k))
        for k, init in ((1, "kmeans++"), (3, "kmeans++"), (3, "afkmc2"), (3, "random"), (3, "used"), (7, "used"))
    ],
    "quantize": [
        *(
            Case({"k": k, "method": method, "seed": k}, up_to_the_codes(k))
            for k in (1, 3, 7)
            for method in ("kmeans", "pnn")
        ),
        *(Case({"bits": bits}, lambda situation: situation.codebook.size) for bits in (2, 5, 8)),
    ],
    "restart": [
        Case({"method": method, "threshold": threshold, "seed": 3}, unmoved_or_drawn(method, threshold))
        for method in ("error", "random", "split", "nearest")
        for threshold in (0, 2)
    ],
    "grow": [Case({"k": k, "seed": k}, grown(k)) for k in (9, 12)],
    "condense": [Case({"k": k, "seed": k}, condensed(k)) for k in (1, 4, 9)],
    "top-k": [Case({"k": k}, up_to_the_codes(k)) for k in (1, 4)],
    "random": [Case({"k": k, "seed": k}, up_to_the_distinct_latents(k)) for k in (1, 5)],
    "kmeans++-seeds": [Case({"k": k, "seed": k}, up_to_the_distinct_latents(k)) for k in (1, 5)],
}
"""Settings of each strategy of STRATEGIES, with which it must keep the contract."""


def test_every_strategy_has_settings_to_be_tested_with() -> None:
    assert set(CASES) == set(STRATEGIES)


# --- the contract --------------------------------------------------------------------------------------------------

ALL = [pytest.param(name, case, id=f"{name} {case.settings}") for name in STRATEGIES for case in CASES.get(name, [])]
each_strategy = pytest.mark.parametrize(("name", "case"), ALL)


@st.composite
def situations(draw: st.DrawFn, metrics: tuple[Metric, ...] = (EUCLIDEAN,)) -> Situation:
    """Small grids, full of ties and repeats, or seeded normal rows, at several scales; some codes dead, some alike."""
    size, dim, count = draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        codes, latents = numbers.integers(-2, 3, (size, dim)), numbers.integers(-2, 3, (count, dim))
    else:
        codes, latents = numbers.normal(size=(size, dim)), numbers.normal(size=(count, dim))
    codes[draw(st.integers(0, size - 1)) :] *= draw(st.sampled_from([1, 50]))  # far from all latents: dead
    rows = [torch.tensor(np.asarray(x), dtype=torch.float32) * scale for x in (codes, latents)]
    return Situation(Codebook(rows[0], draw(st.sampled_from(metrics))), rows[1])


def operated(name: str, case: Case, situation: Situation, batch: int = 1000) -> Surgery | None:
    """What the strategy makes of the situation; None where it says that the user can fix this."""
    strategy = STRATEGIES[name](**case.settings)
    try:
        return strategy(situation.codebook, StoredLatents(situation.latents, batch), situation.counts)
    except CodebookError:
        return None


def as_bytes(surgery: Surgery) -> tuple[bytes, bytes]:
    return surgery.codebook.vectors.numpy().tobytes(), surgery.index_map.numpy().tobytes()


@each_strategy
@examples(max_examples=20)
@given(data=st.data())
def test_a_surgery_is_finite_in_range_and_of_the_size_asked_for(name: str, case: Case, data: st.DataObject) -> None:
    situation = data.draw(situations(case.metrics))
    surgery, old = operated(name, case, situation), situation.codebook
    size = case.size(situation)
    assert (surgery is None) == (size is None)
    if surgery is None:
        return
    new = surgery.codebook
    assert new.vectors.shape == (size, old.dim) and new.vectors.dtype == torch.float32
    assert bool(torch.isfinite(new.vectors).all())
    assert new.metric == old.metric
    assert surgery.index_map.shape == (old.size,) and surgery.index_map.dtype == torch.int64
    assert bool(((surgery.index_map >= REMOVED) & (surgery.index_map < new.size)).all())


@each_strategy
@examples(max_examples=20)
@given(data=st.data())
def test_the_inputs_stay_as_they_are_and_the_output_is_no_view_of_them(
    name: str, case: Case, data: st.DataObject
) -> None:
    situation = data.draw(situations())
    counts = situation.counts
    inputs = (situation.codebook.vectors, situation.latents, counts)
    before = [tensor.clone() for tensor in inputs]
    try:
        surgery = STRATEGIES[name](**case.settings)(situation.codebook, StoredLatents(situation.latents), counts)
    except CodebookError:
        surgery = None
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))
    if surgery is not None:
        surgery.codebook.vectors.fill_(-7)
        surgery.index_map.fill_(0)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


@each_strategy
@examples(max_examples=20)
@given(data=st.data())
def test_the_same_inputs_give_the_same_bytes_however_they_are_batched(
    name: str, case: Case, data: st.DataObject
) -> None:
    situation = data.draw(situations())
    first, again = (operated(name, case, situation) for _ in range(2))
    batched = operated(name, case, situation, batch=data.draw(st.integers(1, 7)))
    if first is None:
        assert again is batched is None
    else:
        assert again is not None and batched is not None
        assert as_bytes(first) == as_bytes(again) == as_bytes(batched)


@each_strategy
def test_no_random_number_is_drawn_from_anybody_elses_generator(name: str, case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    situation = Situation(Codebook(torch.randn(9, 3, generator=generator)), torch.randn(400, 3, generator=generator))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.random.get_rng_state(), str(np.random.get_state()), random.getstate()
        surgery = operated(name, case, situation)
        assert surgery is not None
        results.append(as_bytes(surgery))
        assert torch.equal(torch.random.get_rng_state(), before[0])
        assert str(np.random.get_state()) == before[1] and random.getstate() == before[2]
    assert results[0] == results[1]


@each_strategy
def test_a_strategy_is_a_frozen_dataclass_whose_settings_print(name: str, case: Case) -> None:
    strategy: Any = STRATEGIES[name](**case.settings)
    assert is_dataclass(strategy)
    entry = next(entry for entry in fields(strategy) if entry.repr)
    with pytest.raises(FrozenInstanceError):
        setattr(strategy, entry.name, 5)
    assert all(f"{field}={value!r}" in repr(strategy) for field, value in case.settings.items())
    assert strategy == STRATEGIES[name](**case.settings)


# --- prune ---------------------------------------------------------------------------------------------------------

NUMBERED = Codebook(torch.tensor([[0.0, 0.5], [1.0, 1.5], [2.0, 2.5], [3.0, 3.5], [4.0, 4.5]]))
NO_LATENTS = StoredLatents(torch.empty(0, 2))


@pytest.mark.parametrize(
    ("settings", "counts", "kept"),
    [
        ({}, [4, 0, 1, 0, 9], [0, 2, 4]),
        ({"threshold": 1}, [4, 0, 1, 0, 9], [0, 4]),
        ({"threshold": 3}, [4, 0, 1, 0, 9], [0, 4]),
        ({"threshold": 4}, [4, 0, 1, 0, 9], [4]),
        ({}, [1, 1, 1, 1, 1], [0, 1, 2, 3, 4]),
        ({"keep": 2}, [4, 0, 1, 0, 9], [0, 4]),
        ({"keep": 1}, [4, 0, 1, 0, 9], [4]),
        ({"keep": 5}, [4, 0, 1, 0, 9], [0, 1, 2, 3, 4]),
        ({"keep": 3}, [2, 7, 2, 2, 2], [0, 1, 2]),  # among equals the lower index stays
        ({"keep": 4}, [5, 0, 0, 1, 0], [0, 1, 2, 3]),  # dead codes fill up, the lower index first
        ({"keep": 2}, [0, 0, 0, 0, 0], [0, 1]),
    ],
)
def test_prune_by_hand(settings: Settings, counts: list[int], kept: list[int]) -> None:
    found = Prune(**settings)(NUMBERED, NO_LATENTS, torch.tensor(counts))
    assert torch.equal(found.codebook.vectors, NUMBERED.vectors[kept])
    assert found.index_map.tolist() == [kept.index(code) if code in kept else REMOVED for code in range(5)]


def test_among_thousands_of_equally_used_codes_the_lower_indices_stay() -> None:
    codebook = Codebook(torch.arange(5000.0)[:, None])
    counts = torch.full((5000,), 3)
    counts[4999] = 4
    found = Prune(keep=700)(codebook, NO_LATENTS, counts)
    assert found.codebook.vectors.flatten().tolist() == [*range(699), 4999]


def test_prune_keeps_lookup_and_output_of_the_codebook() -> None:
    old = Codebook(NUMBERED.vectors, COSINE_UNIT)
    found = Prune()(old, NO_LATENTS, torch.tensor([1, 0, 1, 0, 0])).codebook
    assert found.metric == COSINE_UNIT


def test_a_threshold_that_removes_all_says_which_one_would_not() -> None:
    counts = torch.tensor([4, 0, 1, 0, 9])
    with pytest.raises(CodebookError, match=r"threshold=9 removes every code: .* counts 9; use --threshold 8 or less"):
        Prune(threshold=9)(NUMBERED, NO_LATENTS, counts)
    assert Prune(threshold=8)(NUMBERED, NO_LATENTS, counts).codebook.size == 1


def test_where_no_code_was_counted_no_threshold_is_suggested() -> None:
    with pytest.raises(CodebookError, match="removes every code") as caught:
        Prune()(NUMBERED, NO_LATENTS, torch.zeros(5, dtype=torch.int64))
    assert "--threshold" not in str(caught.value) and "--keep" in str(caught.value)


def test_keeping_more_codes_than_there_are_says_how_many_there_are() -> None:
    with pytest.raises(CodebookError, match=r"keep=6 of 5 codes; use --keep 5 or less"):
        Prune(keep=6)(NUMBERED, NO_LATENTS, torch.ones(5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -1}, "threshold=-1"),
        ({"keep": 0}, "keep=0"),
        ({"keep": -3}, "keep=-3"),
        ({"keep": 2, "threshold": 9}, "give one of them"),
    ],
)
def test_settings_of_prune_that_make_no_sense_are_the_users_error(settings: Settings, message: str) -> None:
    with pytest.raises(CodebookError, match=message):
        Prune(**settings)


@given(situations(tuple(METRICS.values())))
def test_pruning_dead_codes_changes_no_assignment(situation: Situation) -> None:
    found = Prune()(situation.codebook, StoredLatents(situation.latents), situation.counts)
    before, after = nearest(situation.latents, situation.codebook), nearest(situation.latents, found.codebook)
    assert torch.equal(found.index_map[before], after)
    assert torch.equal(found.codebook.vectors[after], situation.codebook.vectors[before])


# --- refit ---------------------------------------------------------------------------------------------------------

RECTANGLE = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])


@pytest.mark.parametrize("init", ["kmeans++", "afkmc2", "used", "random"])
def test_refit_of_four_points_into_two_codes_by_hand(init: Any) -> None:
    old = Codebook(torch.tensor([[0.0, 1.0], [9.0, 1.0], [500.0, 500.0]]))
    best = None
    for seed in range(6):  # uniform seeds may cut the rectangle the long way
        found = Refit(2, init, seed=seed)(old, StoredLatents(RECTANGLE, 3), torch.tensor([2, 2, 0]))
        assert found.index_map.tolist() == [REMOVED] * 3
        assert found.codebook.metric == EUCLIDEAN
        best = best or sorted(found.codebook.vectors.tolist()) == [[0.0, 1.0], [10.0, 1.0]]
    assert best


def test_refit_of_as_many_codes_as_points_is_the_points() -> None:
    found = Refit(4)(NUMBERED, StoredLatents(RECTANGLE), torch.tensor([1, 3, 0, 0, 0]))
    assert sorted(found.codebook.vectors.tolist()) == RECTANGLE.tolist()


def test_refit_beyond_the_distinct_latents_says_how_many_there_are() -> None:
    latents = StoredLatents(RECTANGLE.repeat(50, 1))
    for init in ("kmeans++", "used"):
        with pytest.raises(CodebookError, match=r"k=5 asks for more codes than the 4 distinct latents; use --k 4"):
            Refit(5, init)(NUMBERED, latents, torch.tensor([100, 100, 0, 0, 0]))  # type: ignore[arg-type]
    with pytest.raises(CodebookError, match=r"k=300 asks for more codes than the 4 distinct latents; use --k 4"):
        Refit(300, "used")(NUMBERED, latents, torch.tensor([200, 0, 0, 0, 0]))


def test_used_starts_lloyd_at_the_most_used_codes_in_order_of_use() -> None:
    """From the seeds 10 and 0, in this order, the cells are {9, 10, 11} and {0, 2}."""
    old = Codebook(torch.tensor([[0.0], [500.0], [10.0], [7.0]]))
    points = torch.tensor([[0.0], [2.0], [9.0], [10.0], [11.0]])
    found = Refit(2, "used", iterations=1)(old, StoredLatents(points), torch.tensor([2, 0, 3, 0]))
    assert found.codebook.vectors.flatten().tolist() == pytest.approx([10.0, 1.0])


def test_used_takes_the_lower_index_among_equally_used_codes() -> None:
    old = Codebook(torch.tensor([[100.0], [0.0], [50.0]]))
    points = torch.tensor([[0.0], [1.0], [49.0], [51.0], [99.0], [101.0]])
    found = Refit(2, "used", iterations=1)(old, StoredLatents(points), torch.tensor([2, 2, 2]))
    # Seeds 100 and 0; 49 is nearer to 0 and 51 nearer to 100.
    assert found.codebook.vectors.flatten().tolist() == pytest.approx([251 / 3, 50 / 3], rel=1e-5)


def test_used_with_enough_codes_in_use_is_kmeans_from_those_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    old, points = Codebook(torch.randn(30, 4, generator=generator)), torch.randn(500, 4, generator=generator)
    counts = torch.bincount(nearest(points, old), minlength=30)
    seeds = old.vectors[counts.argsort(descending=True, stable=True)[:8]]
    expected = kmeans(points, 8, init=seeds, watch=Watch()).centroids
    assert torch.equal(Refit(8, "used")(old, StoredLatents(points), counts).codebook.vectors, expected)


def test_a_dead_code_is_no_start_for_used() -> None:
    """The code -3 was never used: the second seed comes from the points, and any of them parts 0 from the others."""
    old, points = Codebook(torch.tensor([[0.0], [-3.0]])), torch.tensor([[0.0], [10.0], [11.0], [12.0]])
    found = Refit(2, "used", iterations=1)(old, StoredLatents(points), torch.tensor([4, 0]))
    assert found.codebook.vectors.flatten().tolist() == pytest.approx([0.0, 11.0])


@pytest.mark.parametrize("init", ["kmeans++", "afkmc2", "random"])
def test_refit_is_kmeans_with_its_own_seed_and_iterations(init: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    points, counts = torch.randn(700, 4, generator=generator), torch.ones(5, dtype=torch.int64)
    old = Codebook(torch.randn(5, 4, generator=generator))
    for seed, iterations in ((0, 2), (3, 2), (3, 300)):
        expected = kmeans(points, 9, init=init, iterations=iterations, seed=seed, watch=Watch()).centroids
        found = Refit(9, init, iterations, seed)(old, StoredLatents(points, 100), counts)
        assert torch.equal(found.codebook.vectors, expected)


def test_refit_tells_its_watch_of_the_progress() -> None:
    told: list[str] = []
    watch = Watch(lambda what, done, total, figures: told.append(what))
    Refit(2, watch=watch)(NUMBERED, StoredLatents(RECTANGLE), torch.tensor([1, 3, 0, 0, 0]))
    assert set(told) == {"k-means on 4 latents"}


def test_used_fills_up_with_other_points_where_fewer_codes_are_in_use() -> None:
    """Only one code is in use. All four points become codes all the same, whatever the filling draws."""
    old = Codebook(torch.tensor([[0.0, 0.0], [900.0, 900.0]]))
    for seed in range(5):
        found = Refit(4, "used", seed=seed)(old, StoredLatents(RECTANGLE), torch.tensor([4, 0]))
        assert sorted(found.codebook.vectors.tolist()) == RECTANGLE.tolist()


@pytest.mark.parametrize("init", ["kmeans++", "used", "random"])
def test_refit_leaves_no_code_unused_where_latents_repeat(init: Any) -> None:
    """Flat regions of images give the same latent thousands of times."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(40, 3, generator=generator)
    latents = distinct[torch.randint(40, (3000,), generator=generator) ** 2 // 40]
    old = Codebook(torch.randn(64, 3, generator=generator) * 0.01)
    counts = torch.bincount(nearest(latents, old), minlength=64)
    k = len(latents.unique(dim=0)) - 2
    found = Refit(k, init)(old, StoredLatents(latents), counts).codebook
    assert len(nearest(latents, found).unique()) == k


@pytest.mark.parametrize(
    ("metric", "first", "second"), [(COSINE, [3.0, 0.0], [0.0, 3.0]), (COSINE_UNIT, [1, 0], [0, 1])]
)
def test_refit_for_cosine_goes_by_directions(metric: Metric, first: list[float], second: list[float]) -> None:
    """Two clusters of directions, of latents as far from each other within as between them: their means by hand."""
    latents = torch.tensor([[1.0, 0.1], [1.0, -0.1], [7.0, 0.0], [0.1, 1.0], [-0.1, 1.0], [0.0, 7.0]])
    old = Codebook(NUMBERED.vectors[:, :2], metric)
    found = Refit(2)(old, StoredLatents(latents), torch.ones(old.size, dtype=torch.int64)).codebook
    assert found.metric == metric
    rows = sorted(found.vectors.tolist(), reverse=True)
    torch.testing.assert_close(torch.tensor(rows), torch.tensor([first, second]).float())


@pytest.mark.parametrize("init", ["kmeans++", "afkmc2", "used", "random"])
def test_refit_for_cosine_stays_at_unit_length_and_lowers_the_error(init: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3000, 4, generator=generator) * torch.tensor([3.0, 1, 1, 0.2]) + 1
    old = Codebook(torch.nn.functional.normalize(latents[:16], dim=1), COSINE_UNIT)
    counts = torch.bincount(nearest(latents, old), minlength=16)
    found = Refit(16, init)(old, StoredLatents(latents), counts).codebook
    torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(16))
    cosines = [
        (torch.nn.functional.normalize(latents, dim=1) @ book.vectors.mT).amax(1).mean() for book in (old, found)
    ]
    assert 1 - cosines[1] < 0.8 * (1 - cosines[0])


def test_refit_says_which_codebooks_it_has_no_kmeans_for() -> None:
    old = Codebook(NUMBERED.vectors, DOT)
    with pytest.raises(CodebookError, match="no k-means for dot lookup with raw rows"):
        Refit(2)(old, StoredLatents(RECTANGLE), torch.ones(5, dtype=torch.int64))


@pytest.mark.parametrize("settings", [{"k": 0}, {"k": -1}, {"k": 4, "iterations": 0}])
def test_settings_of_refit_that_make_no_sense_are_the_users_error(settings: Settings) -> None:
    with pytest.raises(CodebookError, match=r"is below 1; use --\w+ 1 or more"):
        Refit(**settings)


def test_a_strategy_that_can_is_told_where_to_work_and_stays_the_same_otherwise() -> None:
    moved = on_device(Refit(3, seed=7), torch.device("cuda", 1))
    assert moved == Refit(3, seed=7) and getattr(moved, "device") == "cuda:1"  # noqa: B009 (not of every strategy)
    prune = Prune()
    assert on_device(prune, torch.device("cuda")) is prune
