"""Groups that are kept while codes change: every search finds what brute force finds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from points import normal
from torch import Tensor

from codebook_tools.clustering import assignment, groups, kept_groups
from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.groups import Centers
from codebook_tools.clustering.kept_groups import KeptGroups
from codebook_tools.clustering.metric import COSINE
from codebook_tools.codebook import EUCLIDEAN, Codebook, Metric

SIZE = 400


@pytest.fixture(autouse=True)
def small_codebooks_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "LEAST_CODES", 100)
    monkeypatch.setattr(assignment, "ROWS_PER_GROUP", 1)
    monkeypatch.setattr(groups, "_FEW", 2.0)


def by_brute_force(latents: Tensor, codebook: Codebook) -> Tensor:
    """The first code at the least distance, in float64 and with no expansion of the square."""
    rows, codes = (codebook.metric.prepare(each).double() for each in (latents, codebook.vectors))
    table = (rows[:, None] - codes).square().sum(2)
    return (table == table.amin(1, keepdim=True)).int().argmax(1)


def points(n: int, seed: int) -> Tensor:
    """(n, 6), of two intrinsic dimensions."""
    return normal(n, 2, seed=seed) @ normal(2, 6, seed=99)


def updates() -> Iterator[tuple[str, Tensor]]:
    """A codebook in training, by the kind of the change."""
    codes, drawn = points(SIZE, 0), torch.Generator().manual_seed(0)
    yield "as it begins", codes
    yield "unchanged", codes.clone()
    for step in range(1, 8):
        some = torch.randperm(SIZE, generator=drawn)[:60]
        codes = codes.index_copy(0, some, points(60, step))
        yield "some", codes
    yield "all", codes + 0.5 * points(SIZE, 20)
    yield "all far from their centers", codes + 40
    yield "back", codes
    yield "larger", torch.cat([codes, points(100, 21)])
    yield "smaller", codes[:300]
    yield "repeated", codes[torch.arange(SIZE) % 50]
    yield "one diverged", codes.index_fill(0, torch.tensor([3]), 1e30)
    yield "one is no number", codes.index_fill(0, torch.tensor([3]), torch.nan)
    yield "all are one", codes[:1].repeat(SIZE, 1)
    yield "at last", codes


@pytest.mark.parametrize("metric", [EUCLIDEAN, COSINE], ids=lambda metric: metric.name)
@pytest.mark.parametrize("searches", [3, 50])  # by the same centers
def test_every_search_finds_the_nearest_codes(metric: Metric, searches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_groups, "_SEARCHES", searches)
    kept = KeptGroups()
    for step, (kind, codes) in enumerate(updates()):
        codebook = Codebook(codes, metric)
        latents = torch.cat([points(300, 100 + step), codes[:20], (codes[:20] + codes[20:40]) / 2])
        latents[7], latents[8], latents[9] = torch.nan, torch.inf, -torch.inf
        assigned = nearest(latents, codebook, kept=kept)
        assert bool(((assigned >= 0) & (assigned < len(codes))).all()), kind
        assert torch.equal(assigned, nearest(latents, codebook)), kind
        if bool(codes.isfinite().all()):
            at = latents.isfinite().all(1)
            assert torch.equal(assigned[at], by_brute_force(latents[at], codebook)), kind


def test_codes_that_change_in_place_are_grouped_anew() -> None:
    """As an optimizer changes them: the tensor is the same."""
    kept, codes, latents = KeptGroups(), points(SIZE, 0), points(300, 1)
    nearest(latents, Codebook(codes), kept=kept)
    codes.add_(points(SIZE, 2))
    assert torch.equal(nearest(latents, Codebook(codes), kept=kept), by_brute_force(latents, Codebook(codes)))


def test_only_changed_codes_are_compared_with_the_centers(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = list[int]()
    of = Centers.groups_of
    monkeypatch.setattr(
        Centers, "groups_of", lambda self, weights: (compared.append(len(weights)), of(self, weights))[1]
    )
    kept, codes, latents = KeptGroups(), points(SIZE, 0), points(300, 1)
    nearest(latents, Codebook(codes), kept=kept)
    compared.clear()
    nearest(latents, Codebook(codes.index_copy(0, torch.arange(25), points(25, 2))), kept=kept)
    assert compared == [25]


def test_whether_groups_pay_is_asked_once_in_many_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_groups, "_SEARCHES", 4)
    asked, kept, codes = list[bool](), KeptGroups(), points(SIZE, 0)

    def pays(_: groups.Groups) -> bool:
        asked.append(len(asked) % 2 == 0)
        return asked[-1]

    searched = [kept.of(-2 * codes, codes.square().sum(1), pays) is not None for _ in range(12)]
    assert searched == [True] * 4 + [False] * 4 + [True] * 4
    assert asked == [True, False, True]
