"""No surgery does harm in silence: used codes stay, and an error that rose is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run, assert_refused
from proven_networks import write_images, write_network
from safetensors.torch import load_file, save_file

from codebook_tools.clustering.metric import COSINE
from codebook_tools.codebook import EUCLIDEAN, Codebook, Metric, Strategy
from codebook_tools.data.latents import StoredLatents
from codebook_tools.evaluation.figures import Measurement
from codebook_tools.evaluation.quality_warnings import worse_warnings
from codebook_tools.strategies import Condense, Grow, Quantize, Restart
from codebook_tools.workflows.session import UNSEEN

KEY = "vq.codebook.weight"


@pytest.fixture
def collapsed(tmp_path: Path) -> tuple[object, ...]:
    """A model of 64 codes, of which 4 are in use, the others being thousands of times longer; and what to type for its
    data."""
    calibration, held_out = write_images(tmp_path)
    model, network = write_network(tmp_path, "round", 64)
    state = load_file(model)
    torch.manual_seed(1)
    codes = torch.randn(64, 6) * 3000
    codes[[5, 20, 33, 60]] = torch.randn(4, 6) * 0.5
    save_file(state | {KEY: codes}, model)
    data = ("--network", network, "--data", calibration, "--test-data", held_out, "--input-range", "0,1")
    return (model, *data, "--metric", "euclidean", "--json")


@pytest.mark.parametrize("method", ["kmeans", "pnn"])
def test_quantizing_to_more_codes_than_are_in_use_merges_none_of_them(
    method: str, collapsed: tuple[object, ...], codebook: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    found = codebook("quantize", *collapsed, "--k", 32, "--method", method, "-o", out)
    assert found.exit_code == 0, found.stderr
    stages = found.json["stages"]
    assert stages["before"]["codebooks"][0]["used"] == stages["surgery"]["codebooks"][0]["used"] > 1
    pruned = codebook("prune", *collapsed, "-o", tmp_path / "pruned.safetensors").json["stages"]
    # A test latent or two meet codes that no calibration latent does.
    assert stages["surgery"]["mse"] == pytest.approx(pruned["surgery"]["mse"], rel=1e-4)
    old, new = (load_file(path)[KEY] for path in (collapsed[0], out))  # type: ignore[arg-type]
    index_map, alive = (
        load_file(tmp_path / f"{name}.index_map.safetensors")[f"{KEY}/index_map"] for name in ("out", "pruned")
    )
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
def test_an_error_that_rose_is_said_with_by_how_much(
    command: tuple[object, ...], collapsed: tuple[object, ...], codebook: Run, tmp_path: Path
) -> None:
    found = codebook(command[0], *collapsed, *command[1:], "--steps", 0, "-o", tmp_path / "out.safetensors").json
    before, after = (found["stages"][name]["mse"] for name in ("before", found["kept"]))
    told = [warning for warning in found["warnings"] if "error on the test data rose" in warning]
    assert bool(told) == (after > 1.0005 * before)
    if told:
        assert f"from {before:.6f} to {after:.6f}" in told[0]
        assert told[0].endswith(
            f"({after / before - 1:+.1%})" if after < 2 * before else f"({after / before:.1f} times)"
        )


def test_a_larger_error_by_hand() -> None:
    def measured(mse: float) -> Measurement:
        return Measurement("test", 1, mse, None, None, ())

    assert worse_warnings(measured(0.5), measured(0.5001)) == []
    assert worse_warnings(measured(0.5), measured(0.75))[0].endswith("from 0.500000 to 0.750000 (+50.0%)")
    assert worse_warnings(measured(0.5), measured(1.0))[0].endswith("(2.0 times)")
    assert worse_warnings(measured(0.5), None) == []


# --- a user's model without data
def test_a_model_of_the_users_own_is_not_trained_on_the_bundled_photographs(
    tiny: Path, codebook: Run, tmp_path: Path
) -> None:
    words = ("refit", tiny, "--k", 8, "--limit", 40)
    found = codebook(*words, "-o", tmp_path / "out.safetensors")
    assert found.exit_code == 0, found.stderr
    assert found.stdout.startswith(UNSEEN)
    again = codebook(*words, "-o", tmp_path / "again.safetensors", "--json").json
    assert again["stages"]["finetuned"] is None and again["settings"]["steps"] == 0
    assert UNSEEN in again["warnings"]
    rows = codebook("compare", tiny, "--k", 8, "--limit", 40, "--strategies", "prune,refit", "-o", tmp_path / "c")
    assert rows.exit_code == 0 and rows.stdout.startswith(UNSEEN)


@pytest.mark.parametrize("command", [("refit", "--k", 8, "--steps", 2), ("finetune", "--dry-run")])
def test_a_training_without_data_of_the_models_own_is_refused(
    command: tuple[object, ...], tiny: Path, codebook: Run, tmp_path: Path
) -> None:
    found = codebook(command[0], tiny, *command[1:], "-o", tmp_path / "out.safetensors")
    assert_refused(found, "give some with --data")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_demo_is_trained_on_the_sample_that_is_its_own(codebook: Run, tmp_path: Path) -> None:
    found = codebook("refit", "--k", 8, "--limit", 40, "--dry-run", "-o", tmp_path / "out.safetensors", "--json")
    assert found.json["settings"]["steps"] == 1000 and UNSEEN not in found.json["warnings"]


@pytest.mark.parametrize("method", ["random", "nearest", "error"])
def test_by_the_cosine_no_code_is_placed_where_there_is_no_direction(method: str) -> None:
    torch.manual_seed(0)
    points = torch.randn(300, 4)
    points[::2] *= 1e-8  # what rounding leaves of a residual
    codes = torch.randn(40, 4)
    counts = torch.tensor([5] * 10 + [0] * 30)
    placed = Restart(method)(Codebook(codes, COSINE), StoredLatents(points), counts)  # type: ignore[arg-type]
    assert float(placed.codebook.vectors.norm(dim=1).min()) > 1e-3
