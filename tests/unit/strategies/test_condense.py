"""Condensing: what it begins with, how codes are merged on the way, and what becomes of the old ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from points import column, normal
from runs import tune
from safetensors.torch import load_file
from sources_of_images import Images, find_images
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import REMOVED, Codebook
from codebook_tools.data.latents import StoredLatents
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.strategies import Condense, Quantize
from codebook_tools.training.codebook_ema import CodebookEMA, ExtraCodes

Line = Callable[..., Model]
KEY = "_vq_vae._embedding.weight"


POINTS = normal(500, 2)
CODES = torch.cat([POINTS[:20], torch.full((4, 2), 100.0)])


def condensed(k: int, codes: Tensor = CODES, points: Tensor = POINTS) -> tuple[Codebook, Tensor, Any]:
    codebook = Codebook(codes)
    counts = torch.bincount(nearest(points, codebook), minlength=len(codes))
    return codebook, counts, Condense(k, seed=1)(codebook, StoredLatents(points), counts)


def test_below_the_codes_in_use_it_is_merging_at_once_and_begins_with_four_times_as_many() -> None:
    codebook, counts, found = condensed(8)
    merged = Quantize(8, "pnn")(codebook, StoredLatents(POINTS), counts)
    assert torch.equal(found.codebook.vectors, merged.codebook.vectors)
    assert torch.equal(found.index_map, merged.index_map)
    assert found.first.codebook.size == 32
    assert torch.equal(found.first.codebook.vectors[:20], CODES[:20])  # the four dead ones are not there
    assert found.first.index_map.tolist() == [*range(20), *[REMOVED] * 4]
    drawn = found.first.codebook.vectors[20:]
    assert ((drawn[:, None] == POINTS).all(2).any(1)).all()


def test_it_begins_with_all_in_use_where_those_are_more_than_four_times_k_and_grows_where_fewer_than_k() -> None:
    _, _, found = condensed(3)
    assert (found.codebook.size, found.first.codebook.size) == (3, 20)
    _, _, found = condensed(24)
    assert torch.equal(found.codebook.vectors[:20], CODES[:20]) and found.first.codebook.size == 96
    _, _, found = condensed(4, column(0, 1, 2, 3), column(0, 1, 2, 3))  # no more codes are to be had
    assert found.first is None and found.codebook.size == 4


def on_the_line(*firsts: float) -> Tensor:
    return torch.tensor([[first, 0.0] for first in firsts])


def averaged(model: Model, codes: list[float], hits: list[int]) -> CodebookEMA:
    model.books[0].vectors = on_the_line(*codes)
    return CodebookEMA(model, 0, torch.tensor(hits), moves=True, random=torch.Generator())


def test_pairs_are_merged_by_what_they_cost_into_their_mean(line: Line) -> None:
    """0 and 0.1 cost 0.4 * 0.1 / 0.5 * 0.01, 0.8 and 1 cost 0.125 * 0.04, and any others more."""
    ours = averaged(line([0.0, 1.0]), [0.0, 0.8, 0.1, 1.0], [8, 5, 2, 5])
    ours.revived[2] = True
    ours.merge(2)
    assert ours.book.vectors[:, 0].tolist() == pytest.approx([0.02, 0.9])
    assert ours.usage.tolist() == pytest.approx([0.5, 0.5])
    assert ours.sums[:, 0].tolist() == pytest.approx([0.01, 0.45])
    assert ours.merged is not None and ours.merged.tolist() == [0, 1, REMOVED, 1]
    assert ours.revived.tolist() == [False, False]


def test_rows_that_are_given_out_at_unit_length_are_merged_by_direction(line: Line) -> None:
    """(0.2, 0) lies near (0.2, 0.1), and is (1, 0) when it is emitted."""
    ours = averaged(line([0.0, 1.0]), [1.0, 0.2, 0.2, 0.0], [1, 1, 1, 1])
    ours.book.vectors[2:] = torch.tensor([[0.2, 0.1], [0.0, 1.0]])
    ours.book.metric = COSINE_UNIT
    ours.merge(3)
    assert ours.merged is not None and ours.merged.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("hits", [0, 1, 7])
def test_usage_is_a_fraction_of_all_hits(line: Line, hits: int) -> None:
    assert averaged(line([0.0, 1.0]), [0.0, 1.0], [hits, 0]).usage.tolist() == [float(hits > 0), 0.0]


def test_dead_codes_leave_those_in_use_where_they_are(line: Line) -> None:
    ours = averaged(line([0.0, 1.0]), [0.0, 0.4, 1.0, 0.41, 7.0], [4, 0, 4, 0, 0])
    ours.merge(2)
    assert ours.book.vectors[:, 0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_a_run_ends_with_the_codes_asked_for_and_keeps_no_state_from_before(tiny: Path, images_folder: Path) -> None:
    model, images = load_model(read_checkpoint(tiny)), Images(find_images([images_folder])[:48], 3, 4)
    few = model.books[0].vectors[:4].clone()
    model.books[0].vectors = few
    latents = torch.cat(list(model.latents(images, 16)))
    many = ExtraCodes(latents[:: len(latents) // 29][:30].clone(), torch.ones(30))
    found = tune(model, images, [1] * 4, steps=20, lr=1e-4, batch_size=16, more={0: many})
    used = {point.step: point.used for point in found.trace}
    assert max(used[step] for step in (1, 2, 4)) > 4 and all(used[step] <= 4 for step in used if step >= 12)
    assert found.best.step >= 12 and len(found.best.vectors[0]) == 4 == len(model.books[0].vectors)
    assert torch.equal(found.start.vectors[0], few) and found.trace[0].used <= 4
    assert set(found.merged) == {0} and len(found.merged[0]) == 30
    assert len(many.vectors) == 30  # left as it was


def test_a_run_that_diverges_before_the_merge_leaves_what_the_surgery_made(tiny: Path, images_folder: Path) -> None:
    model, images = load_model(read_checkpoint(tiny)), Images(find_images([images_folder])[:48], 3, 4)
    before = model.books[0].vectors.clone()
    many = ExtraCodes(torch.cat([before, before + 1]), torch.ones(32))
    found = tune(model, images, [1] * 16, steps=20, lr=1e20, batch_size=16, more={0: many})
    assert found.diverged and found.best.step == 0 and not found.gained
    assert torch.equal(model.books[0].vectors, before)


@pytest.mark.slow
def test_the_command_writes_k_codes_and_what_became_of_old_ones(codebook: Run, tiny: Path, images_folder: Path) -> None:
    command = ("condense", tiny, "--k", 5, "--data", images_folder, "--input-range", "-1,1", "--json")
    for without_ema in (("--steps", 0), ("--steps", 5, "--codebook-update", "gradient")):
        merged = codebook(*command, *without_ema, "--force").json
        assert all(point["used"] <= 5 for point in merged["trace"]), "merged at once"
        assert merged["stages"]["surgery"]["codebooks"][0]["size"] == 5
    found = codebook(*command, "--steps", 20, "--lr", "0.01", "--force").json
    assert found["kept"] == "finetuned" and found["settings"]["k"] == 5
    written, old = load_file(found["outputs"]["model"]), load_file(tiny)
    assert written[KEY].shape == (5, 4) and old[KEY].shape[0] == 16
    index_map = load_file(found["outputs"]["index_map"])[f"{KEY}/index_map"]
    assert len(index_map) == 16 and set(index_map.tolist()) <= set(range(-1, 5))
    assert found["trace"][0]["used"] <= 5 < max(point["used"] for point in found["trace"])
    assert codebook("verify", found["outputs"]["model"], "--against", tiny).exit_code == 0


def test_old_codes_are_followed_through_the_merge(tuned: Callable[..., tuple[Model, Any]]) -> None:
    """Nothing trains but the average, and nothing is revived: 0 and 0.2 become one, and 1 stays."""
    more = {0: ExtraCodes(on_the_line(1.0, 0.0, 0.2), torch.tensor([2, 1, 1]))}
    model, found = tuned([0.1, 1.0], [2, 2], [[0.0, 0.2], [1.0, 1.0]], steps=5, train="none", more=more)
    assert found.merged[0].tolist() == [0, 1, 1]
    assert model.books[0].vectors[:, 0].tolist() == pytest.approx([1.0, 0.1], abs=1e-6)
