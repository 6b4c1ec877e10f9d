"""The nearest code: against brute force in float64 and in exact arithmetic, at near-ties, offsets and odd sizes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from points import normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from codebook_tools.clustering import assignment, groups
from codebook_tools.clustering import scores as products
from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.kept_groups import KeptGroups
from codebook_tools.clustering.metric import COSINE, DOT, METRICS
from codebook_tools.codebook import EUCLIDEAN, Codebook, Metric

each_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


def scores(latents: Tensor, codebook: Codebook) -> Tensor:
    """(n, size) float64, lower is nearer: by definition, with no expansion of the square."""
    # A model compares rows that float32 has normalized.
    rows, codes = (codebook.metric.prepare(each).double() for each in (latents, codebook.vectors))
    return (rows[:, None] - codes).square().sum(2) if codebook.metric.is_distance else -(rows[:, None] * codes).sum(2)


def by_brute_force(latents: Tensor, codebook: Codebook) -> Tensor:
    """The first code of those with the lowest score."""
    table = scores(latents, codebook)
    return (table == table.amin(1, keepdim=True)).int().argmax(1)


def test_nearest_by_hand() -> None:
    latents = torch.tensor([[3.0, 1.0], [-1.0, 0.0], [0.2, 0.1]])
    codes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 4.0], [4.0, 4.0]])
    assert nearest(latents, Codebook(codes)).tolist() == [1, 0, 0]  # 5 < 10; 1 < 4; 0.05 < 0.65
    assert nearest(latents, Codebook(codes, DOT)).tolist() == [3, 0, 3]  # 16; ties at 0: the first; 1.2
    # Cosines of (3, 1) are 0.949 with (1, 0) and 0.894 with (4, 4); of (-1, 0) at most 0.
    assert nearest(latents[:1], Codebook(codes[1:], COSINE)).tolist() == [0]


def test_nearest_takes_views_of_any_stride() -> None:
    codebook, rows = Codebook(normal(20, 6)), normal(6, 100, seed=1).T
    assert not rows.is_contiguous()
    assert torch.equal(nearest(rows, codebook), by_brute_force(rows, codebook))
    assert torch.equal(nearest(rows[::3], codebook), by_brute_force(rows, codebook)[::3])


# --- the edges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [EUCLIDEAN, DOT])
def test_scales_whose_squares_float32_cannot_hold_are_searched_as_well(metric: Metric) -> None:
    for scale in (1e-30, 3e-22, 1e-20, 1e-10, 1e10, 1e18, 1.2e19, 1e20, 1e30):
        codebook, latents = Codebook(normal(40, 5, seed=1) * scale, metric), normal(500, 5, seed=2) * scale
        assert torch.equal(nearest(latents, codebook), by_brute_force(latents, codebook)), scale


def test_what_is_no_number_gets_some_code() -> None:
    latents = torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [1.0, 0.0]])
    assert nearest(latents, Codebook(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))).tolist() == [0, 0, 1]


@pytest.mark.parametrize("dim", [1, 32])
@pytest.mark.parametrize("offset", [1e2, 1e6])
def test_a_large_common_offset_does_not_blur_the_answer(offset: float, dim: int) -> None:
    """|x|² - 2xc + |c|² in float32 loses everything here: at 1e6 its terms are 1e12 and the distances below 10."""
    codebook, latents = Codebook(normal(30, dim, seed=1) + offset), normal(600, dim, seed=2) + offset
    assert torch.equal(nearest(latents, codebook), by_brute_force(latents, codebook))


# --- ties ----------------------------------------------------------------------------------------------------------


ROW = st.lists(st.integers(-4, 4), min_size=3, max_size=3)


@given(st.lists(ROW, min_size=1, max_size=12), st.lists(ROW, min_size=1, max_size=12))
def test_small_whole_numbers_are_decided_exactly(codes: list[list[int]], latents: list[list[int]]) -> None:
    """Many exact ties: integers decide, with no rounding anywhere."""
    rows, book = torch.tensor(latents, dtype=torch.float32), torch.tensor(codes, dtype=torch.float32)
    distances = [[sum((a - b) ** 2 for a, b in zip(x, c, strict=True)) for c in codes] for x in latents]
    products = [[-sum(a * b for a, b in zip(x, c, strict=True)) for c in codes] for x in latents]
    assert nearest(rows, Codebook(book)).tolist() == [row.index(min(row)) for row in distances]
    assert nearest(rows, Codebook(book, DOT)).tolist() == [row.index(min(row)) for row in products]


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_near_ties_of_one_unit_in_the_last_place_are_told_apart(offset: float) -> None:
    """Each latent lies between two codes, nudged by one float32 step to either side: exact fractions say which."""
    low = normal(100, 1, seed=1).abs() + offset
    high = low + normal(100, 1, seed=2).abs() + 0.5
    middle = (low + high) / 2
    for towards in (low, high):
        nudged = torch.nextafter(middle, towards)
        for i in range(len(low)):
            x, a, b = (Fraction(float(t[i])) for t in (nudged, low, high))
            expected = int(abs(x - b) < abs(x - a))
            assert nearest(nudged[i : i + 1], Codebook(torch.stack([low[i], high[i]]))).tolist() == [expected]


@each_metric
def test_codes_that_nearly_coincide_are_decided_as_float64_decides(metric: Metric) -> None:
    """A thousand codes within a few float32 steps of each other, far from the latents."""
    center = normal(1, 6, seed=3) + 10
    codes = center * (1 + 2**-22 * torch.randint(-4, 5, (1000, 6), generator=torch.Generator().manual_seed(4)))
    codebook, latents = Codebook(codes, metric), normal(300, 6, seed=5) + 3
    assert len(codes.unique(dim=0)) > 900
    assert torch.equal(nearest(latents, codebook), by_brute_force(latents, codebook))


# --- what must not matter ------------------------------------------------------------------------------------------


@each_metric
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_dropping_unused_codes_changes_no_assignment(metric: Metric, offset: float) -> None:
    if metric is DOT:
        offset = 0.0  # far off, few codes win
    codes = torch.cat([normal(400, 5, seed=1) * 3, normal(3, 5, seed=1).repeat(2, 1)]) + offset
    latents = normal(2000, 5, seed=2) * 0.5 + offset
    assigned = nearest(latents, Codebook(codes, metric))
    kept = assigned.unique()
    assert 2 <= len(kept) < len(codes) - 10
    assert torch.equal(kept[nearest(latents, Codebook(codes[kept], metric))], assigned)


@each_metric
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_answer_does_not_depend_on_tiles_batch_threads_or_products(
    metric: Metric, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    codebook, latents = Codebook(normal(37, 6, seed=1) + offset, metric), normal(500, 6, seed=2) + offset
    expected = nearest(latents, codebook)
    assert torch.equal(torch.cat([nearest(row, codebook) for row in latents.split(1)]), expected)
    threads = torch.get_num_threads()
    monkeypatch.setattr(assignment, "_CODES", 4)  # the last block has one code
    try:
        for tile in (1, 37 * 4 * 7, 37 * 4 * 64):  # one latent at a time; 7 of them; 64
            monkeypatch.setattr(assignment, "_TILE_BYTES", {"cpu": tile})
            torch.set_num_threads(1 if tile == 1 else 4)
            assert torch.equal(nearest(latents, codebook), expected)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(products, "_ONEDNN", False)
    assert torch.equal(nearest(latents, codebook), expected)


@pytest.mark.parametrize(("precision", "bits"), [("high", 10), ("medium", 7)])
def test_products_of_low_precision_are_settled_by_float64(
    precision: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU rounds them where TF32 or bfloat16 is allowed: so many bits of each factor are left."""
    codebook, latents = Codebook(normal(200, 16, seed=1)), normal(30_000, 16, seed=2)
    expected = nearest(latents, codebook)

    def coarse(rows: Tensor, weights: Tensor, norms: Tensor) -> Tensor:
        half = 1 << 22 - bits
        low = [(x.view(torch.int32) + half & -2 * half).view(torch.float32) for x in (rows.contiguous(), weights)]
        return torch.addmm(norms, low[0], low[1].T)

    monkeypatch.setattr(assignment, "product", coarse)
    assert not torch.equal(nearest(latents, codebook), expected)  # else this tests nothing
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert torch.equal(nearest(latents, codebook), expected)


def test_a_precision_that_was_set_for_one_backend_counts() -> None:
    """Since torch 2.9 it can be, and torch then refuses to say what holds for all."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has one precision for all backends")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert products.rounding() == 2.0**-10
    finally:
        matmul.fp32_precision = before
    assert products.rounding() == torch.finfo(torch.float32).eps


@pytest.mark.parametrize("metric", [EUCLIDEAN, COSINE], ids=lambda metric: metric.name)
@pytest.mark.parametrize("kind", ["few dimensions", "copies", "offset", "one far", "grid"])
def test_groups_of_codes_change_no_answer(metric: Metric, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all codes in float64: where most are left out, where many are equal, where rounding leaves few out."""
    codes, latents = normal(600, 2, seed=1) @ normal(2, 6, seed=3), normal(900, 2, seed=2) @ normal(2, 6, seed=3)
    if kind == "copies":
        codes, latents = codes[torch.arange(600) % 90], torch.cat([latents, codes])
    elif kind == "offset":
        codes, latents = codes + 300, latents + 300
    elif kind == "one far":
        codes[7], latents[3], latents[4] = 1e12, 1e12, torch.nan
    elif kind == "grid":
        codes, latents = codes.round(), latents.round()
    compared = list[int]()
    monkeypatch.setattr(assignment, "LEAST_CODES", 600)
    monkeypatch.setattr(assignment, "ROWS_PER_GROUP", 1)
    monkeypatch.setattr(groups, "_FEW", 2.0)  # by groups also where that is not worth it
    lowest = groups.two_lowest
    monkeypatch.setattr(groups, "two_lowest", lambda scores: (compared.append(scores.numel()), lowest(scores))[1])
    assigned = nearest(latents, Codebook(codes, metric))
    at = latents.isfinite().all(1)
    assert torch.equal(assigned[at], by_brute_force(latents[at], Codebook(codes, metric)))
    assert bool(((assigned >= 0) & (assigned < 600)).all())
    if kind == "few dimensions":
        assert 0 < sum(compared) < 0.5 * latents.shape[0] * codes.shape[0]


def test_codes_are_searched_by_groups_only_where_few_are_left_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment, "LEAST_CODES", 1000)
    for dim, grouped in ((2, True), (16, False)):
        codebook, latents = Codebook(normal(1000, dim, seed=1)), normal(2000, dim, seed=2)
        search = assignment._Search(codebook.vectors, codebook.metric)
        search.group(latents, KeptGroups())
        assert (search.groups is not None) == grouped


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dim", [3, 24])  # searched by groups, and all
def test_no_step_needs_a_table_of_all_latents_and_codes(dim: int) -> None:
    """Which would take 256 MB here; an assignment takes tiles, and sums of codes need none."""
    codebook, latents = Codebook(normal(16_384, dim, seed=1)), normal(4096, dim, seed=2)
    with Largest() as largest:
        codes = nearest(latents, codebook, wait=False)
    assert largest.bytes <= 32 << 20
    at = torch.arange(0, 4096, 512)
    assert torch.equal(codes[at], by_brute_force(latents[at], codebook))
