"""One contract for all strategies: what each keeps to on any codebook, latents and counts, and what it refuses."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields, replace
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
from codebook_tools.clustering.metric import METRICS
from codebook_tools.codebook import REMOVED, Codebook, Surgery
from codebook_tools.data.latents import StoredLatents
from codebook_tools.errors import CodebookError
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

    def living(self, threshold: int = 0) -> Codebook:
        """The codes with more counts."""
        return replace(self.codebook, vectors=self.codebook.vectors[self.counts > threshold])


def of_codes(situation: Situation, k: int) -> int | None:
    return k if k <= situation.codebook.size else None


def distinct(situation: Situation, k: int) -> int | None:
    return k if k <= len(situation.latents.unique(dim=0)) else None


def centroids(situation: Situation, k: int) -> int | None:
    """By cosine, latents of one direction are one; there is no k-means for inner products."""
    metric = situation.codebook.metric
    return k if metric.is_distance and k <= len(metric.prepare(situation.latents).unique(dim=0)) else None


def restarted(situation: Situation, method: str, threshold: int) -> int | None:
    """The codebook's own size, where a code stays, and there are latents enough for the codes that move."""
    size, living = situation.codebook.size, situation.living(threshold)
    if not living.size:
        return None
    moving = size - living.size
    there = {"error": places_to_draw(situation, living), "random": len(situation.latents)}.get(method, moving)
    return size if moving <= there else None


def grown(situation: Situation, k: int) -> int | None:
    living = situation.living()
    return k if living.size <= k <= living.size + places_to_draw(situation, living) else None


def places_to_draw(situation: Situation, living: Codebook) -> int:
    """Distinct latents that no code emits, as the metric sees them."""
    points, codes = situation.latents, living.emitted
    emitted = living.metric.emit(points)
    off = (emitted - codes[nearest(points, living)]).square().sum(1) > 0
    return len((emitted[off] + 0).unique(dim=0))


SIZES: dict[str, Callable[..., int | None]] = {
    "prune": lambda s, keep=0, threshold=0: of_codes(s, keep) if keep else s.living(threshold).size or None,
    "refit": lambda s, k, **_: centroids(s, k),
    "quantize": lambda s, k=0, **_: of_codes(s, k) if k else s.codebook.size,
    "restart": lambda s, seed, **settings: restarted(s, **settings),
    "grow": lambda s, k, seed: grown(s, k),
    "condense": lambda s, k, seed: k if s.living().size > k else grown(s, k),  # merged, else drawn
    "top-k": of_codes,
    **dict.fromkeys(("random", "kmeans++-seeds"), lambda s, k, seed: distinct(s, k)),
}
"""The size that settings ask for in a situation; None where they ask for what is not to be had."""

CASES: list[tuple[str, Settings]] = [
    *(("prune", settings) for settings in ({}, {"threshold": 2}, {"keep": 4})),
    *(("refit", {"k": k, "init": init, "seed": k})
      for k, init in ((1, "kmeans++"), (3, "afkmc2"), (3, "random"), (3, "used"), (7, "used"))),
    *(("quantize", {"k": k, "method": method, "seed": k})
      for k, method in ((1, "kmeans"), (3, "pnn"), (7, "kmeans"), (7, "pnn"))),
    *(("quantize", {"bits": bits}) for bits in (2, 8)),
    *(("restart", {"method": method, "threshold": threshold, "seed": 3})
      for method, threshold in (("error", 0), ("error", 2), ("random", 2), ("split", 0), ("nearest", 2))),
    *(("grow", {"k": k, "seed": k}) for k in (9, 12)),
    *(("condense", {"k": k, "seed": k}) for k in (1, 4, 9)),
    ("top-k", {"k": 4}),
    *((name, {"k": 5, "seed": 5}) for name in ("random", "kmeans++-seeds")),
]  # fmt: skip
"""Settings of each strategy of STRATEGIES, with which it must keep the contract."""

each_case = pytest.mark.parametrize(
    ("name", "settings"), [pytest.param(*case, id=f"{case[0]} {case[1]}") for case in CASES]
)


def test_every_strategy_has_settings_to_be_tested_with() -> None:
    assert {name for name, _ in CASES} == set(SIZES) == set(STRATEGIES)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
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
    return Situation(Codebook(rows[0], draw(st.sampled_from([*METRICS.values()]))), rows[1])


def operated(name: str, settings: Settings, situation: Situation, batch: int = 1000) -> Surgery | None:
    """What the strategy makes of the situation; None where it says that the user can fix this."""
    counts = situation.counts
    try:
        return STRATEGIES[name](**settings)(situation.codebook, StoredLatents(situation.latents, batch), counts)
    except CodebookError:
        return None
    finally:
        assert torch.equal(counts, situation.counts)


def as_bytes(surgery: Surgery) -> tuple[bytes, bytes]:
    return surgery.codebook.vectors.numpy().tobytes(), surgery.index_map.numpy().tobytes()


@each_case
@examples(max_examples=30)
@given(data=st.data())
def test_a_surgery_has_the_size_asked_for_leaves_its_inputs_alone_and_is_repeatable(
    name: str, settings: Settings, data: st.DataObject
) -> None:
    situation = data.draw(situations())
    old, inputs = situation.codebook, (situation.codebook.vectors, situation.latents)
    before = [tensor.clone() for tensor in inputs]
    surgery = operated(name, settings, situation)
    batched = operated(name, settings, situation, batch=data.draw(st.integers(1, 7)))
    expected = SIZES[name](situation, **settings)
    assert (surgery is None) == (batched is None) == (expected is None)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))
    if surgery is None or batched is None:
        return
    new, index_map = surgery.codebook, surgery.index_map
    assert new.vectors.shape == (expected, old.dim) and new.vectors.dtype == torch.float32
    assert bool(torch.isfinite(new.vectors).all()) and new.metric == old.metric
    assert index_map.shape == (old.size,) and index_map.dtype == torch.int64
    assert bool(((index_map >= REMOVED) & (index_map < new.size)).all())
    assert as_bytes(surgery) == as_bytes(batched)
    new.vectors.fill_(-7)  # no view of the inputs
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


@each_case
def test_no_random_number_is_drawn_from_a_global_generator(name: str, settings: Settings) -> None:
    generator = torch.Generator().manual_seed(0)
    situation = Situation(Codebook(torch.randn(9, 3, generator=generator)), torch.randn(400, 3, generator=generator))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.random.get_rng_state(), str(np.random.get_state()), random.getstate()
        surgery = operated(name, settings, situation)
        assert surgery is not None
        results.append(as_bytes(surgery))
        assert torch.equal(torch.random.get_rng_state(), before[0])
        assert str(np.random.get_state()) == before[1] and random.getstate() == before[2]
    assert results[0] == results[1]


@each_case
def test_a_strategy_is_a_frozen_dataclass_whose_settings_print(name: str, settings: Settings) -> None:
    strategy: Any = STRATEGIES[name](**settings)
    with pytest.raises(FrozenInstanceError):
        setattr(strategy, fields(strategy)[0].name, 5)
    assert all(f"{field}={value!r}" in repr(strategy) for field, value in settings.items())
    assert strategy == STRATEGIES[name](**settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        *((name, {"k": k}, f"k={k} is below 1; use --k 1 or more")
          for name in ("refit", "quantize", "grow", "condense", "top-k", "random", "kmeans++-seeds") for k in (0, -2)),
        ("refit", {"k": 4, "iterations": 0}, "iterations=0 is below 1; use --iterations 1 or more"),
        ("prune", {"threshold": -1}, "threshold=-1 is below 0"),
        ("prune", {"threshold": 2**63}, f"threshold={2**63} is more than can be counted"),
        ("prune", {"keep": 0}, "keep=0 is below 1; use --keep 1 or more"),
        ("prune", {"keep": 2, "threshold": 9}, "give one of them"),
        ("quantize", {}, "either --k, .* or --bits"),
        ("quantize", {"k": 4, "bits": 4}, "either --k, .* or --bits"),
        ("quantize", {"bits": 1}, "bits=1 is not within 2 and 8"),
        ("quantize", {"bits": 9}, "bits=9 is not within 2 and 8"),
        ("quantize", {"k": 4, "method": "x"}, "method=x is neither kmeans nor pnn"),
        ("restart", {"method": "x"}, "method=x is none of error, random, split, nearest"),
        ("restart", {"threshold": -1}, "threshold=-1 is below 0"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_the_users_error(name: str, settings: Settings, message: str) -> None:
    with pytest.raises(CodebookError, match=message):
        STRATEGIES[name](**settings)


CODES = torch.tensor([[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]])


@pytest.mark.parametrize(
    ("name", "settings", "counts", "message"),
    [
        ("prune", {"threshold": 9}, [4, 1, 9], "threshold=9 removes every .* counts 9; use --threshold 8 or less"),
        ("prune", {}, [0, 0, 0], "removes every code: the most used one counts 0; use --keep, or give more data"),
        ("prune", {"keep": 4}, [1, 1, 1], "keep=4 of 3 codes; use --keep 3 or less"),
        ("top-k", {"k": 4}, [1, 1, 1], "^k=4 of 3 codes; use --k 3 or less"),
        ("quantize", {"k": 4}, [1, 1, 1], "k=4 of 3 codes; use --k 3 or less"),
        *(("restart", {"method": method, "threshold": 9}, [4, 9, 1],
           "threshold=9 moves every code: .* counts 9; use --threshold 8 or less") for method in ("error", "split")),
        ("restart", {}, [0, 0, 0], "every code: the most used one counts 0; use refit$"),
        ("restart", {}, [9, 0, 0], "2 codes are to be moved, but only 1 latents .*more data, or use prune"),
        ("grow", {"k": 2}, [1, 2, 1], "k=2 is less than the 3 codes in use; use --k 3 or more, or refit"),
        ("grow", {"k": 4}, [9, 0, 0], "k=4 asks for more codes than the 2 that .*--k 2 or less, .*more data"),
        ("grow", {"k": 3}, [0, 0, 0], "every code is dead: there is none to grow from; use refit"),
        ("condense", {"k": 4}, [9, 0, 0], "k=4 asks for more codes than the 2 that"),
        *((name, {"k": 3}, [9, 0, 0], "k=3 asks for more codes than the 2 distinct latents; use --k 2 or less, or give")
          for name in ("refit", "random", "kmeans++-seeds")),
        *(("refit", {"k": k, "init": "used"}, [9, 1, 0], f"k={k} asks for more codes than the 2 distinct")
          for k in (3, 300)),
    ],
)  # fmt: skip
def test_what_is_not_to_be_had_names_what_is(name: str, settings: Settings, counts: list[int], message: str) -> None:
    latents = StoredLatents(torch.stack([CODES[0], CODES[2]]).repeat(20, 1))
    with pytest.raises(CodebookError, match=message):
        STRATEGIES[name](**settings)(Codebook(CODES), latents, torch.tensor(counts))


def test_a_strategy_that_can_works_on_a_device_and_stays_the_same_otherwise() -> None:
    moved = on_device(Refit(3, seed=7), torch.device("cuda", 1))
    assert moved == Refit(3, seed=7) and getattr(moved, "device") == "cuda:1"  # noqa: B009 (not of every strategy)
    prune = Prune()
    assert on_device(prune, torch.device("cuda")) is prune
