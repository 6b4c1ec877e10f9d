"""No surgery does harm in silence: used codes stay, and an error that rose is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run, assert_refused
from proven_networks import write_images, write_network
from safetensors.torch import load_file, save_file

from codebook_tools.checkpoints.layout import index_map_path
from codebook_tools.clustering.metric import COSINE
from codebook_tools.codebook import EUCLIDEAN, Codebook, Metric, Strategy
from codebook_tools.data.latents import StoredLatents
from codebook_tools.evaluation.figures import Measurement
from codebook_tools.evaluation.quality_warnings import worse_warnings
from codebook_tools.strategies import Condense, Grow, Quantize, Restart
from codebook_tools.workflows.session import UNSEEN

KEY = "vq.codebook.weight"
Words = tuple[object, ...]


@pytest.fixture
def collapsed(tmp_path: Path) -> Words:
    """A model of 64 codes, of which 4 are in use, the others being thousands of times longer; and what to type for its
    data."""
    calibration, held_out = write_images(tmp_path)
    model, network = write_network(tmp_path, "round", 64)
    torch.manual_seed(1)
    codes = torch.randn(64, 6) * 3000
    codes[[5, 20, 33, 60]] = torch.randn(4, 6) * 0.5
    save_file(load_file(model) | {KEY: codes}, model)
    data = ("--network", network, "--data", calibration, "--test-data", held_out, "--input-range", "0,1")
    return (model, *data, "--metric", "euclidean", "--json")


@pytest.mark.parametrize("method", ["kmeans", "pnn"])
def test_quantizing_upwards_merges_no_code_in_use(method: str, collapsed: Words, codebook: Run, tmp_path: Path) -> None:
    out, pruned = tmp_path / "out.safetensors", tmp_path / "pruned.safetensors"
    found = codebook("quantize", *collapsed, "--k", 32, "--method", method, "-o", out)
    assert found.exit_code == 0, found.stderr
    stages = found.json["stages"]
    assert stages["before"]["codebooks"][0]["used"] == stages["surgery"]["codebooks"][0]["used"] > 1
    by_pruning = codebook("prune", *collapsed, "-o", pruned).json["stages"]
    # A test latent or two meet codes that no calibration latent does.
    assert stages["surgery"]["mse"] == pytest.approx(by_pruning["surgery"]["mse"], rel=1e-4)
    old, new = (load_file(path)[KEY] for path in (collapsed[0], out))  # type: ignore[arg-type]
    index_map, alive = (load_file(index_map_path(path))[f"{KEY}/index_map"] for path in (out, pruned))
    used = alive >= 0
    assert 1 < int(used.sum()) <= 4 and torch.equal(new[index_map[used]], old[used])


def test_the_dead_codes_nearest_to_those_in_use_fill_up_k() -> None:
    """1 and 9 are in use; of the dead 5.5, 40, 8, 2.5 the nearest to them are 8, at 1, and 2.5, at 1.5."""
    rows = torch.tensor([[5.5], [1.0], [40.0], [8.0], [9.0], [2.5]])
    surgery = Quantize(k=4)(Codebook(rows), StoredLatents(torch.empty(0, 1)), torch.tensor([0, 7, 0, 0, 2, 0]))
    assert surgery.codebook.vectors.flatten().tolist() == [1.0, 8.0, 9.0, 2.5]
    assert surgery.index_map.tolist() == [1, 0, 2, 1, 2, 3], "5.5 goes to 8, 40 to 9"


@pytest.mark.parametrize("metric", [EUCLIDEAN, COSINE])
@pytest.mark.parametrize("dead", [0, 3, 11])
@pytest.mark.parametrize(
    "strategy",
    [Quantize(k=13), Quantize(k=13, method="pnn"), Grow(k=16), Condense(k=16), Restart(), Restart("random")],
    ids=repr,
)
def test_a_used_code_stays_as_it_is(strategy: Strategy, dead: int, metric: Metric) -> None:
    torch.manual_seed(dead)
    rows, points = torch.randn(16, 3), torch.randn(500, 3)
    counts = torch.randint(1, 99, (16,))
    counts[torch.randperm(16)[: max(dead, 3)]] = 0
    codebook = Codebook(rows, metric)
    surgery = strategy(codebook, StoredLatents(points), counts)
    kept = surgery.index_map[counts > 0]
    assert (kept >= 0).all() and len(kept.unique()) == len(kept)
    assert torch.equal(surgery.codebook.vectors[kept], rows[counts > 0])


@pytest.mark.parametrize("command", [("quantize", "--k", 1), ("prune", "--keep", 1), ("condense", "--k", 1)])
def test_an_error_that_rose_is_said(command: Words, collapsed: Words, codebook: Run, tmp_path: Path) -> None:
    found = codebook(command[0], *collapsed, *command[1:], "--steps", 0, "-o", tmp_path / "out.safetensors").json
    before, after = (found["stages"][name]["mse"] for name in ("before", found["kept"]))
    warnings = [warning for warning in found["warnings"] if "error on the test data rose" in warning]
    assert bool(warnings) == (after > 1.0005 * before)
    by_how_much = f"({after / before - 1:+.1%})" if after < 2 * before else f"({after / before:.1f} times)"
    assert all(warning.endswith(f"from {before:.6f} to {after:.6f} {by_how_much}") for warning in warnings)


def test_a_larger_error_by_hand() -> None:
    half, more, much, twice = (Measurement("test", 1, mse, None, None, ()) for mse in (0.5, 0.5001, 0.75, 1.0))
    assert worse_warnings(half, more) == worse_warnings(half, None) == []
    assert worse_warnings(half, much)[0].endswith("from 0.500000 to 0.750000 (+50.0%)")
    assert worse_warnings(half, twice)[0].endswith("(2.0 times)")


# --- a user's model without data
def test_only_the_demo_is_trained_on_the_bundled_photographs(tiny: Path, codebook: Run, tmp_path: Path) -> None:
    out, limit = tmp_path / "out.safetensors", ("--k", 8, "--limit", 40)
    for command in (("refit", "--k", 8, "--steps", 2), ("finetune", "--dry-run")):
        assert_refused(codebook(command[0], tiny, *command[1:], "-o", out), "give some with --data")
    assert not out.exists()
    found = codebook("refit", tiny, *limit, "-o", out)
    assert found.exit_code == 0, found.stderr
    assert found.stdout.startswith(UNSEEN)
    again = codebook("refit", tiny, *limit, "-o", tmp_path / "again.safetensors", "--json").json
    assert again["stages"]["finetuned"] is None and again["settings"]["steps"] == 0
    assert UNSEEN in again["warnings"]
    rows = codebook("compare", tiny, *limit, "--strategies", "prune,refit", "-o", tmp_path / "c")
    assert rows.exit_code == 0 and rows.stdout.startswith(UNSEEN)
    demo = codebook("refit", *limit, "--dry-run", "-o", tmp_path / "demo.safetensors", "--json").json  # its own sample
    assert demo["settings"]["steps"] == 1000 and UNSEEN not in demo["warnings"]


@pytest.mark.parametrize("method", ["random", "nearest", "error"])
def test_by_the_cosine_no_code_is_placed_where_there_is_no_direction(method: str) -> None:
    torch.manual_seed(0)
    points = torch.randn(300, 4)
    points[::2] *= 1e-8  # what rounding leaves of a residual
    codes = torch.randn(40, 4)
    counts = torch.tensor([5] * 10 + [0] * 30)
    placed = Restart(method)(Codebook(codes, COSINE), StoredLatents(points), counts)  # type: ignore[arg-type]
    assert float(placed.codebook.vectors.norm(dim=1).min()) > 1e-3
