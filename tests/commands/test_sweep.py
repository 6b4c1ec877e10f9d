"""How many codes: the curve, what it suggests, and Re-Fits that pay for bits."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, assert_refused
from torch import Tensor

from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import REMOVED, Codebook
from codebook_tools.data.latents import StoredLatents
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation import metrics
from codebook_tools.evaluation.figures import CodebookUse, Measurement
from codebook_tools.strategies import Refit
from codebook_tools.strategies.entropy_refit import EntropyRefit
from codebook_tools.workflows.sweep import suggest


def measured(mse: float | None, distortion: float = 1.0) -> Measurement:
    use = CodebookUse("codes", 8, 4, 100, 8, 1.0, 8, 8.0, 3.0, 0.1, distortion, None)
    return Measurement("test", 10, mse, None, None, (use,))


# --- what is suggested
@pytest.mark.parametrize(
    ("curve", "k", "reason"),
    [
        # 16 → 32 gains 20 %, 32 → 64 gains 2 %
        ({16: 1.0, 32: 0.8, 64: 0.784}, 32, "from 32 codes on, twice as many lower the untrained error by 2.0%"),
        # four times as many gain 4 %: 2.02 % a doubling
        ({16: 1.0, 64: 0.96}, 16, "from 16 codes on, twice as many lower the untrained error by 2.0%"),
        ({16: 1.0, 32: 1.1}, 16, "from 16 codes on, twice as many lower the untrained error by 0.0%"),
        ({16: 1.0, 32: 0.9}, 32, "up to 32 codes, the most there are, each doubling lowers the error by 2.5% or more"),
        ({16: 0.0, 32: 0.0}, 16, "from 16 codes on, twice as many lower the untrained error by 0.0%"),
        ({48: 1.0}, 48, "48 is the only size there is"),
    ],
)
def test_the_size_is_suggested_from_which_doubling_gains_little(curve: dict[int, float], k: int, reason: str) -> None:
    found, why = suggest({size: measured(mse) for size, mse in curve.items()})
    assert found == k and why.removesuffix(", less than 2.5%") == reason


def test_without_reconstructions_the_distortion_decides_and_its_dimension_is_that_of_zadors_law() -> None:
    k, reason = suggest({8: measured(None, 1.0), 16: measured(None, 0.5), 32: measured(None, 0.49)})
    assert k == 16 and "lower the untrained distortion by 2.0%" in reason
    for dimension in (1, 3, 8):
        curve = {k: 5.0 * k ** (-2 / dimension) for k in (8, 16, 64, 256)}
        assert metrics.effective_dimension(curve) == pytest.approx(dimension)
    assert metrics.effective_dimension({8: 1.0, 16: 1.0}) == math.inf


# --- Re-Fits that pay for bits

OLD = Codebook(torch.zeros(4, 2))
COUNTS = torch.zeros(4, dtype=torch.int64)


def bits_and_distortion(codes: Tensor, points: Tensor) -> tuple[float, float]:
    squared = torch.cdist(points, codes).square()
    return metrics.bits(torch.bincount(squared.argmin(1), minlength=len(codes))), float(squared.amin(1).mean())


def test_codes_that_few_latents_need_are_given_up_once_bits_cost_more_than_they_save() -> None:
    """99 latents at 0 and one at 1, of variance 0.0099: its own code costs that one 6.644 bits, the other 0.0145 bits
    and a distance of 1, which is less from 15.24 variances a bit on."""
    points = torch.zeros(100, 2)
    points[0, 0] = 1.0
    for price, left in ((0.0, 2), (15.0, 2), (15.5, 1)):
        found = EntropyRefit(2, price)(OLD, StoredLatents(points), COUNTS)
        assert found.codebook.size == left, price
        assert (found.index_map == REMOVED).all()
    one = EntropyRefit(2, 15.5)(OLD, StoredLatents(points), COUNTS).codebook.vectors
    torch.testing.assert_close(one, torch.tensor([[0.01, 0.0]]))
    for codebook, price, message in (
        (Codebook(torch.zeros(4, 2), COSINE_UNIT), 0.1, "needs a Euclidean codebook; leave out --lambda"),
        (OLD, -1.0, "a bit cannot cost -1.0 variances; try --lambda 0.01"),
        (OLD, math.nan, "a bit cannot cost nan variances"),
    ):
        with pytest.raises(CodebookError, match=message):
            EntropyRefit(2, price)(codebook, StoredLatents(points), COUNTS)


def test_the_higher_the_price_the_fewer_bits_and_below_the_curve_of_refit() -> None:
    points = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) ** 3  # a dense middle and long tails
    latents = StoredLatents(points)
    strategies = [Refit(k) for k in (4, 8, 16, 32, 64)], [EntropyRefit(64, price) for price in (0.0, 0.003, 0.01, 0.03)]
    curve, paid = (
        [bits_and_distortion(strategy(OLD, latents, COUNTS).codebook.vectors, points) for strategy in of]
        for of in strategies
    )
    assert paid[0] == pytest.approx(curve[-1], rel=0.05)
    assert [bits for bits, _ in paid] == sorted((bits for bits, _ in paid), reverse=True)
    for bits, distortion in paid[1:]:
        (low, worse), (high, better) = next(pair for pair in pairwise(curve) if pair[0][0] <= bits <= pair[1][0])
        between = worse * (better / worse) ** ((bits - low) / (high - low))
        assert distortion < between


# --- the command
@pytest.fixture
def swept(tiny: Path, images_folder: Path, codebook: Run, tmp_path: Path) -> Run:
    words = ("sweep", tiny, "--data", images_folder, "--input-range", "-1,1", "-o", tmp_path / "sweep", "--json")
    return lambda *options: codebook(*words, *options)


def test_a_sweep_has_every_surgery_that_can_be_done(swept: Run, tmp_path: Path) -> None:
    found = swept("--k", "8,2", "--lambda", "0.05", "--report", tmp_path / "page.html")
    assert found.exit_code == 0, found.stderr
    points: list[dict[str, Any]] = found.json["points"]
    assert [(p["strategy"], p["k"]) for p in points[:2]] == [("refit", 2), ("refit", 8)]
    assert {p["strategy"] for p in points} == {"refit", "refit, 0.05 a bit", "prune", "quantize"}
    assert all(p["stages"]["before"] == points[0]["stages"]["before"] for p in points)
    distortion = [p["stages"]["surgery"]["codebooks"][0]["distortion"] for p in points[:2]]
    assert distortion == sorted(distortion, reverse=True)
    assert found.json["suggested_k"] in (2, 8) and found.json["reason"]
    assert found.json["effective_dimension"] > 0
    (lossless,) = [p for p in points if p["strategy"] == "prune" and p["k"] > 2][-1:]
    assert lossless["stages"]["surgery"]["mse"] == lossless["stages"]["before"]["mse"]
    page = (tmp_path / "page.html").read_text()
    suffices = found.json["suggested_k"] < 8
    assert (f"{found.json['suggested_k']} codes suffice" in page) == suffices
    assert ("No K that was tried is known to suffice" in page) != suffices
    assert "| refit | 8 |" in (tmp_path / "sweep" / "table.md").read_text()


def test_points_that_are_there_are_not_measured_again(swept: Run, tmp_path: Path) -> None:
    first = swept("--k", "2,4")
    rows = tmp_path / "sweep" / "rows.json"
    kept = json.loads(rows.read_text())
    kept["rows"][0]["stages"]["surgery"]["ssim"] = 0.123
    rows.write_text(json.dumps(kept))
    again = swept("--k", "2,4")
    assert again.json["points"][0]["stages"]["surgery"]["ssim"] == 0.123
    assert again.json["points"][1:] == first.json["points"][1:]
    other = swept("--k", "2,4", "--seed", 1)
    assert other.json["points"][0]["stages"]["surgery"]["ssim"] != 0.123


def test_a_size_that_cannot_be_done_is_a_warning_and_nonsense_is_refused(swept: Run) -> None:
    found = swept("--k", "4,100000")
    assert found.exit_code == 0 and found.json["suggested_k"] == 4
    assert "100000" in " ".join(found.json["warnings"])
    assert_refused(swept("--k", "0,4"), "k=0 is below 1")
    assert_refused(swept("--k", "100000"), "Re-Fit can be done to none of")
    assert_refused(swept("--k", "4", "--lambda", "-1"), "a bit cannot cost -1.0 variances")
    usage = swept("--k", "4,many")
    assert usage.exit_code == 2 and "expected numbers with commas between them" in usage.stderr.replace("\n", " ")
