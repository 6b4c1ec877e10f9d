"""Surgeries on latents from files: the encoder's own give what its images give, and no network is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, assert_refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from codebook_tools.codebook import REMOVED, Strategy
from codebook_tools.errors import CodebookError
from codebook_tools.models.demo import DEMO
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Grow, Prune, Refit, Restart
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.operate import measure_model, operate
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import Result
from codebook_tools.workflows.session import open_request
from codebook_tools.workflows.verify import verify_checkpoint

NO_STEPS = FineTune(steps=0)
Ask = Callable[..., Request]
LIMIT = 40
"""Images of the bundled sample; each has 64 latents."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo's latents of the bundled sample, by split, and all of them."""
    folder = tmp_path_factory.mktemp("latents")
    opened = open_request(Request(limit=LIMIT), Watch())
    rows = {
        split: torch.cat(list(opened.model.latents(images, 64)))
        for split, images in (("calibration", opened.calibration), ("test", opened.test))
    }
    for name, latents in (rows | {"all": torch.cat(list(rows.values()))}).items():
        np.save(folder / f"{name}.npy", latents.numpy())
    return {name: str(folder / f"{name}.npy") for name in ("calibration", "test", "all")}


@pytest.fixture
def asked(files: dict[str, str], tmp_path: Path) -> Callable[..., Request]:
    """asked(): the demo, with the latents that its encoder makes of the sample, in the same splits."""

    def make(**more: Any) -> Request:
        given = {"latents": (files["calibration"],), "test_data": (files["test"],)}
        return Request(**{"output": tmp_path / "out.safetensors"} | given | more)

    return make


def do(request: Request, strategy: Strategy, recipe: FineTune = NO_STEPS) -> Result:
    """The result, once its file is found sound."""
    result = operate(type(strategy).__name__.lower(), request, strategy, recipe, Watch())
    assert verify_checkpoint(Path(str(result.outputs["model"])), request.source).differences == ()
    return result


def codes_of(result: Result) -> Tensor:
    codes: Tensor = load_file(str(result.outputs["model"]))[CODEBOOK]
    return codes


def maps_of(result: Result) -> dict[str, list[int]]:
    found = load_file(str(result.outputs["index_map"]))
    return {key.rpartition("/")[2]: tensor.tolist() for key, tensor in found.items()}


# --- the same as with images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [Prune(keep=20), Refit(8, init="used")], ids=["keep", "refit"])
def test_the_encoders_own_latents_do_what_the_images_do(strategy: Strategy, asked: Ask, tmp_path: Path) -> None:
    seen = do(Request(limit=LIMIT, output=tmp_path / "seen.safetensors"), strategy)
    given = do(asked(), strategy)
    folder = Path(asked().latents[0]).parent
    assert str(folder).encode() not in Path(str(given.outputs["model"])).read_bytes()
    if isinstance(strategy, Prune):
        torch.testing.assert_close(codes_of(given), codes_of(seen), rtol=0, atol=1e-4)
    assert maps_of(given)["index_map"] == maps_of(seen)["index_map"]
    same = [a == b for a, b in zip(maps_of(given)["nearest"], maps_of(seen)["nearest"], strict=True)]
    # Equals may fall either way where rounding moves a latent; k-means stops a little before it has converged.
    assert sum(same) >= len(same) - (len(same) // 50 if isinstance(strategy, Refit) else 2)
    for stage in ("before", "surgery"):
        (mine,), (theirs,) = given.stages[stage].codebooks, seen.stages[stage].codebooks  # type: ignore[union-attr]
        assert (mine.key, mine.size, mine.dim, mine.latents) == (theirs.key, theirs.size, theirs.dim, theirs.latents)
        near = 0.02 if isinstance(strategy, Refit) and stage == "surgery" else 1e-3
        assert mine.used == theirs.used and mine.perplexity == pytest.approx(theirs.perplexity, rel=near)
        assert mine.distortion == pytest.approx(theirs.distortion, rel=near)


def test_figures_of_images_are_null_and_those_of_codes_are_worked_out_in_float64(
    files: dict[str, str], asked: Ask
) -> None:
    result = do(asked(), Refit(8))
    assert result.before is not None and result.surgery is not None
    for stage in (result.before, result.surgery):
        assert stage.split == "test"
        assert (stage.images, stage.mse, stage.psnr, stage.ssim) == (None, None, None, None)
        assert stage.codebooks[0].distortion > 0
    assert result.finetuned is None and result.trace == () and result.kept == "surgery"
    found = result.to_json()
    assert found["stages"]["before"]["mse"] is None  # type: ignore[index]
    rows = torch.from_numpy(np.load(files["test"])).double()
    distances = torch.cdist(rows, codes_of(result).double()).square()
    counts = torch.bincount(distances.argmin(1), minlength=8)
    (use,) = result.surgery.codebooks
    assert (use.latents, use.used, use.used_10) == (len(rows), int((counts > 0).sum()), int((counts >= 10).sum()))
    assert use.distortion == pytest.approx(float(distances.amin(1).mean()), rel=1e-4)


# --- every strategy ------------------------------------------------------------------------------------------------


def test_a_refit_finds_clusters_that_no_encoder_made(tmp_path: Path) -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    noise = 0.01 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    save_file({"latents": (centres.repeat(100, 1) + noise)}, tmp_path / "latents.safetensors")
    save_file(
        {"quantize.embedding.weight": torch.rand(16, 2), "other.weight": torch.ones(3)}, tmp_path / "m.safetensors"
    )
    asked = Request(model=tmp_path / "m.safetensors", latents=(str(tmp_path / "latents.safetensors"),))
    result = do(asked, Refit(3))
    new = load_file(str(result.outputs["model"]))
    found = new["quantize.embedding.weight"]
    torch.testing.assert_close(found[torch.cdist(centres, found).argmin(1)], centres, rtol=0, atol=0.01)
    assert new["other.weight"].tolist() == [1, 1, 1] and result.outputs["model"].endswith("m.refit-k3.safetensors")  # type: ignore[union-attr]


def test_prune_restart_and_grow_keep_the_codes_in_use(files: dict[str, str], asked: Ask) -> None:
    old = load_file(DEMO)[CODEBOOK]
    rows = torch.from_numpy(np.load(files["calibration"])).double()
    counts = torch.bincount(torch.cdist(rows, old.double()).argmin(1), minlength=512)
    used = (counts > 0).nonzero()[:, 0]
    for strategy, size in ((Prune(), len(used)), (Restart(), 512), (Grow(len(used) + 7), len(used) + 7)):
        result = do(asked(force=True), strategy)
        new, index_map = codes_of(result), torch.tensor(maps_of(result)["index_map"])
        assert len(new) == size and torch.equal(new[index_map[used]], old[used])
        assert all(index_map[code] == REMOVED for code in (counts == 0).nonzero()[:, 0])
        assert result.surgery is not None and result.before is not None
        before, after = result.before.codebooks[0], result.surgery.codebooks[0]
        assert after.distortion == before.distortion if isinstance(strategy, Prune) else after.used > before.used


def test_counts_of_latents_are_kept_for_later(files: dict[str, str], asked: Ask, tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    found = measure_model(asked(), Watch(), stats)
    assert (
        found.before is not None and found.surgery is None and (found.before.images, found.before.mse) == (None, None)
    )
    counts = load_file(stats)[f"{CODEBOOK}/counts"]
    assert int(counts.sum()) == len(np.load(files["calibration"]))
    pruned = do(asked(), Prune())
    counted = do(Request(stats=stats, output=tmp_path / "counted.safetensors"), Prune())
    assert torch.equal(codes_of(counted), codes_of(pruned))
    assert counted.before is not None and counted.before.images is None


def test_a_tenth_of_the_latents_is_held_out_where_no_test_data_are_given(files: dict[str, str], tmp_path: Path) -> None:
    result = measure_model(Request(latents=(files["all"],)), Watch())
    total = len(np.load(files["all"]))
    rows = result.settings["rows"]
    assert isinstance(rows, dict) and rows["calibration"] + rows["test"] == total
    assert 0.08 * total < rows["test"] < 0.12 * total
    assert result.before is not None and result.before.codebooks[0].latents == rows["test"]
    few = measure_model(Request(latents=(files["all"],), limit=50), Watch())
    assert few.settings["rows"] == {"calibration": 50, "test": 50}


# --- what is refused, and what is shown ----------------------------------------------------------------------------


def test_fine_tuning_needs_images(asked: Ask, tmp_path: Path) -> None:
    with pytest.raises(CodebookError, match=r"12 steps of fine-tuning need images; give --data, or --steps 0"):
        do(asked(), Refit(8), FineTune(steps=12))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("more", [{"data": ("images",)}, {"stats": Path("stats.safetensors")}], ids=str)
def test_latents_stand_alone(more: dict[str, Any], asked: Ask) -> None:
    with pytest.raises(CodebookError, match="--latents stand in for images"):
        do(asked(**more), Refit(8))


def test_latents_are_of_one_codebook(tmp_path: Path) -> None:
    state = {f"quantize_{side}.embedding.weight": torch.rand(16, 4) for side in "tb"}
    save_file(state, tmp_path / "two.safetensors")
    np.save(tmp_path / "latents.npy", torch.rand(300, 4).numpy())
    asked = {"model": tmp_path / "two.safetensors", "latents": (str(tmp_path / "latents.npy"),)}
    for work in (lambda request: do(request, Refit(4)), lambda request: measure_model(request, Watch())):
        with pytest.raises(CodebookError, match=r"2 codebooks, .*choose with --codebook-key"):
            work(Request(**asked))
    result = do(Request(**asked, codebook_key=("quantize_b.embedding.weight",)), Refit(16, seed=1))
    new = load_file(str(result.outputs["model"]))
    assert torch.equal(new["quantize_t.embedding.weight"], state["quantize_t.embedding.weight"])
    assert not torch.equal(new["quantize_b.embedding.weight"], state["quantize_b.embedding.weight"])


def test_the_commands_take_latents(
    files: dict[str, str], codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = codebook("measure", "--latents", files["all"])
    assert shown.exit_code == 0 and "perplexity" in shown.stdout and "mse" not in shown.stdout, shown
    done = codebook("refit", "--k", 8, "--latents", files["calibration"], "--test-data", files["test"], "--json")
    assert done.exit_code == 0, done.stderr  # without images there are no steps, though nothing was said of them
    assert done.json["stages"]["surgery"]["images"] is None and done.json["stages"]["surgery"]["mse"] is None
    assert_refused(codebook("refit", "--k", 9, "--latents", files["all"], "--steps", 5), "fine-tuning need images")
    planned = codebook("refit", "--k", 9, "--latents", files["all"], "--dry-run")
    assert planned.exit_code == 0 and "512 -> 9" in planned.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "demo.refit-k8.safetensors",
        "demo.refit-k8.index_map.safetensors",
    }


def test_a_metric_that_nobody_names_is_guessed_and_said(tmp_path: Path) -> None:
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    state = {"quantizer.codebook": rows[:16].clone(), "quantizer.codebook_used": torch.zeros(99)}
    path = tmp_path / "own.safetensors"
    save_file(state, path)
    np.save(tmp_path / "latents.npy", torch.cat([rows, rows + 0.01]).numpy())
    asked = Request(model=path, latents=(str(tmp_path / "latents.npy"),), force=True)
    guessed = operate("refit", asked, Refit(4), FineTune(steps=0), Watch())
    assert "its names suggest cosine, but do not say how quantizer.codebook is searched" in " ".join(guessed.warnings)
    assert guessed.settings["metric"] == "euclidean"
    told = operate("refit", replace(asked, metric="cosine-unit"), Refit(4), FineTune(steps=0), Watch())
    assert "--metric" not in " ".join(told.warnings) and told.settings["metric"] == "cosine-unit"
    written = load_file(str(told.outputs["model"]))["quantizer.codebook"]
    torch.testing.assert_close(written.norm(dim=1), torch.ones(4))
