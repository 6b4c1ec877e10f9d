"""Surgeries without images: on latents from files, on counts of an earlier pass, or on the codes alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEAD, Run, State, WriteModel, assert_refused
from safetensors.torch import load_file, save_file
from surgeries import do, maps_of, output_of, written
from weight_files import metadata_of

from codebook_tools.checkpoints import hashing
from codebook_tools.checkpoints.layout import index_map_path
from codebook_tools.codebook import REMOVED, Strategy
from codebook_tools.errors import CodebookError
from codebook_tools.models.demo import DEMO
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Grow, Prune, Refit, Restart
from codebook_tools.workflows.operate import measure_model
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_request

RANGE = ("--input-range", "-1,1")
Ask = Callable[..., Request]
LIMIT = 40
"""Images of the bundled sample; each has 64 latents."""


# --- latents from files: the encoder's own give what its images give, and no network is needed
@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The demo's latents of the bundled sample, by split, and all of them."""
    folder = tmp_path_factory.mktemp("latents")
    opened = open_request(Request(limit=LIMIT), Watch())
    parts = {"calibration": opened.calibration, "test": opened.test}
    rows = {split: torch.cat(list(opened.model.latents(images, 64))) for split, images in parts.items()}
    for name, latents in (rows | {"all": torch.cat(list(rows.values()))}).items():
        np.save(folder / f"{name}.npy", latents.numpy())
    return {name: str(folder / f"{name}.npy") for name in ("calibration", "test", "all")}


@pytest.fixture
def asked(files: dict[str, str], tmp_path: Path) -> Ask:
    """asked(): the demo, with the latents that its encoder makes of the sample, in the same splits."""
    given = {"latents": (files["calibration"],), "test_data": (files["test"],), "output": tmp_path / "out.safetensors"}
    return lambda **more: Request(**given | more)


@pytest.mark.parametrize("strategy", [Prune(keep=20), Refit(8, init="used")], ids=["keep", "refit"])
def test_the_encoders_own_latents_do_what_the_images_do(strategy: Strategy, asked: Ask, tmp_path: Path) -> None:
    by_images, by_latents = (
        do(Request(limit=LIMIT, output=tmp_path / "images.safetensors"), strategy),
        do(asked(), strategy),
    )
    assert str(Path(asked().latents[0]).parent).encode() not in output_of(by_latents).read_bytes()
    if isinstance(strategy, Prune):
        torch.testing.assert_close(written(by_latents)[CODEBOOK], written(by_images)[CODEBOOK], rtol=0, atol=1e-4)
    (index_map, nearest), (their_map, their_nearest) = (maps_of(result)[CODEBOOK] for result in (by_latents, by_images))
    assert torch.equal(index_map, their_map)
    # Equals may fall either way where rounding moves a latent; k-means stops a little before it has converged.
    assert int((nearest != their_nearest).sum()) <= (len(nearest) // 50 if isinstance(strategy, Refit) else 2)
    for stage in ("before", "surgery"):
        (mine,), (theirs,) = by_latents.stages[stage].codebooks, by_images.stages[stage].codebooks  # type: ignore[union-attr]
        near = 0.02 if isinstance(strategy, Refit) and stage == "surgery" else 1e-3
        for name in ("key", "size", "dim", "latents", "used"):
            assert getattr(mine, name) == getattr(theirs, name)
        for name in ("perplexity", "distortion"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=near)


def test_figures_of_images_are_null_and_those_of_codes_are_in_float64(files: dict[str, str], asked: Ask) -> None:
    result = do(asked(), Refit(8))
    assert result.before is not None and result.surgery is not None
    for stage in (result.before, result.surgery):
        assert (stage.split, stage.images, stage.mse, stage.psnr, stage.ssim) == ("test", None, None, None, None)
    assert (result.finetuned, result.trace, result.kept) == (None, (), "surgery")
    assert result.to_json()["stages"]["before"]["mse"] is None  # type: ignore[index]
    rows = torch.from_numpy(np.load(files["test"])).double()
    distances = torch.cdist(rows, written(result)[CODEBOOK].double()).square()
    counts = torch.bincount(distances.argmin(1), minlength=8)
    (use,) = result.surgery.codebooks
    assert (use.latents, use.used, use.used_10) == (len(rows), int((counts > 0).sum()), int((counts >= 10).sum()))
    assert use.distortion == pytest.approx(float(distances.amin(1).mean()), rel=1e-4)


def test_a_refit_finds_clusters_that_no_encoder_made(tmp_path: Path) -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    noise = 0.01 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    latents, model, key = tmp_path / "latents.safetensors", tmp_path / "m.safetensors", "quantize.embedding.weight"
    save_file({"latents": centres.repeat(100, 1) + noise}, latents)
    save_file({key: torch.rand(16, 2), "other.weight": torch.ones(3)}, model)
    result = do(Request(model, latents=(str(latents),)), Refit(3))
    new = written(result)
    torch.testing.assert_close(new[key][torch.cdist(centres, new[key]).argmin(1)], centres, rtol=0, atol=0.01)
    assert new["other.weight"].tolist() == [1, 1, 1] and output_of(result).name == "m.refit-k3.safetensors"


def test_prune_restart_and_grow_keep_the_codes_in_use(files: dict[str, str], asked: Ask) -> None:
    old = load_file(DEMO)[CODEBOOK]
    rows = torch.from_numpy(np.load(files["calibration"])).double()
    counts = torch.bincount(torch.cdist(rows, old.double()).argmin(1), minlength=512)
    used = (counts > 0).nonzero()[:, 0]
    for strategy, size in ((Prune(), len(used)), (Restart(), 512), (Grow(len(used) + 7), len(used) + 7)):
        result = do(asked(force=True), strategy)
        new, (index_map, _) = written(result)[CODEBOOK], maps_of(result)[CODEBOOK]
        assert len(new) == size and torch.equal(new[index_map[used]], old[used])
        assert (index_map[counts == 0] == REMOVED).all()
        assert result.surgery is not None and result.before is not None
        before, after = result.before.codebooks[0], result.surgery.codebooks[0]
        assert after.distortion == before.distortion if isinstance(strategy, Prune) else after.used > before.used


def test_counts_of_latents_are_kept_for_later(files: dict[str, str], asked: Ask, tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    found = measure_model(asked(), Watch(), stats)
    assert found.before and not found.surgery and (found.before.images, found.before.mse) == (None, None)
    assert int(load_file(stats)[f"{CODEBOOK}/counts"].sum()) == len(np.load(files["calibration"]))
    pruned = do(asked(), Prune())
    counted = do(Request(stats=stats, output=tmp_path / "counted.safetensors"), Prune())
    assert torch.equal(written(counted)[CODEBOOK], written(pruned)[CODEBOOK])
    assert counted.before is not None and counted.before.images is None


def test_a_tenth_of_the_latents_is_held_out_where_no_test_data_are_given(files: dict[str, str]) -> None:
    result, total = measure_model(Request(latents=(files["all"],)), Watch()), len(np.load(files["all"]))
    rows: Any = result.settings["rows"]
    assert rows["calibration"] + rows["test"] == total and 0.08 * total < rows["test"] < 0.12 * total
    assert result.before is not None and result.before.codebooks[0].latents == rows["test"]
    few = measure_model(Request(latents=(files["all"],), limit=50), Watch())
    assert few.settings["rows"] == {"calibration": 50, "test": 50}


def test_latents_are_of_one_codebook(tmp_path: Path) -> None:
    top, bottom = keys = [f"quantize_{side}.embedding.weight" for side in "tb"]
    old = {key: torch.rand(16, 4) for key in keys}
    save_file(old, tmp_path / "two.safetensors")
    np.save(tmp_path / "latents.npy", torch.rand(300, 4).numpy())
    asked = Request(tmp_path / "two.safetensors", latents=(str(tmp_path / "latents.npy"),))
    for work in (lambda request: do(request, Refit(4)), lambda request: measure_model(request, Watch())):
        with pytest.raises(CodebookError, match=r"2 codebooks, .*choose with --codebook-key"):
            work(asked)
    new = written(do(replace(asked, codebook_key=(bottom,)), Refit(16, seed=1)))
    assert [torch.equal(new[key], old[key]) for key in (top, bottom)] == [True, False]


def test_the_commands_take_latents(
    files: dict[str, str], codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in (("--data", "images"), ("--stats", "stats.safetensors")):
        assert_refused(codebook("refit", "--k", 8, "--latents", files["all"], *more), "--latents stand in for images")
    measured = codebook("measure", "--latents", files["all"])
    assert measured.exit_code == 0 and "perplexity" in measured.stdout and "mse" not in measured.stdout, measured
    done = codebook("refit", "--k", 8, "--latents", files["calibration"], "--test-data", files["test"], "--json")
    assert done.exit_code == 0, done.stderr  # without images there are no steps, though nothing was said of them
    assert done.json["stages"]["surgery"]["images"] is None and done.json["stages"]["surgery"]["mse"] is None
    refused = codebook("refit", "--k", 9, "--latents", files["all"], "--steps", 12)
    assert_refused(refused, "12 steps of fine-tuning need images; give --data, or --steps 0")
    planned = codebook("refit", "--k", 9, "--latents", files["all"], "--dry-run")
    assert planned.exit_code == 0 and "512 -> 9" in planned.stdout
    assert names(tmp_path) == {"demo.refit-k8.safetensors", "demo.refit-k8.index_map.safetensors"}


def test_a_metric_that_nobody_names_is_guessed_and_said(tmp_path: Path) -> None:
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    path, latents = tmp_path / "own.safetensors", tmp_path / "latents.npy"
    save_file({"quantizer.codebook": rows[:16].clone(), "quantizer.codebook_used": torch.zeros(99)}, path)
    np.save(latents, torch.cat([rows, rows + 0.01]).numpy())
    asked = Request(path, latents=(str(latents),), force=True)
    guessed, named = do(asked, Refit(4)), do(replace(asked, metric="cosine-unit"), Refit(4))
    guess = "its names suggest cosine, but do not say how quantizer.codebook is searched"
    assert guess in " ".join(guessed.warnings) and "--metric" not in " ".join(named.warnings)
    assert [result.settings["metric"] for result in (guessed, named)] == ["euclidean", "cosine-unit"]
    torch.testing.assert_close(written(named)["quantizer.codebook"].norm(dim=1), torch.ones(4))


# --- counts of an earlier pass
@pytest.fixture
def tiny(write_model: WriteModel) -> Path:
    """With EMA companions."""
    return write_model("ema")


@pytest.fixture
def stats(tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path) -> Path:
    """What `measure --stats` writes for the tiny model and its images."""
    path = tmp_path / "stats.safetensors"
    found = codebook("measure", tiny, "--data", images_folder, *RANGE, "--stats", path)
    assert found.exit_code == 0, found.stderr
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "words",
    [
        "prune --threshold 40", "quantize --k 5 --method pnn", "quantize --bits 4",
        "refit --k 6 --steps 0", "restart --steps 0", "grow --k 12 --steps 0",
    ],
)  # fmt: skip
def test_counts_and_a_sample_that_is_all_latents_do_what_the_images_they_are_of_do(
    words: str, stats: Path, tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    paths = tmp_path / "images.safetensors", tmp_path / "counts.safetensors"
    sources = ("--data", images_folder, *RANGE), ("--stats", stats)
    done = [codebook(*words.split(), tiny, *of, "-o", path, "--json") for of, path in zip(sources, paths, strict=True)]
    assert [outcome.exit_code for outcome in done] == [0, 0], done
    by_images, by_stats = (load_file(path) | load_file(index_map_path(path)) for path in paths)
    assert by_images.keys() == by_stats.keys()
    # Counts do not tell where the latents of a code go that is no more.
    follows_latents = ("_ema", "/nearest") if words.startswith(("prune", "quantize")) else ()
    different = [key for key in by_images if not torch.equal(by_images[key], by_stats[key])]
    assert not [key for key in different if not any(part in key for part in follows_latents)]
    assert codebook("verify", paths[1], "--against", tiny).exit_code == 0
    assert done[0].json["bytes"].get("packed") == done[1].json["bytes"].get("packed")
    stages = done[1].json["stages"]
    assert stages["surgery"] is None and stages["before"]["split"] == "calibration"


def test_the_result_says_what_was_counted_and_nothing_of_images(stats: Path, tiny: Path, codebook: Run) -> None:
    found = codebook("prune", tiny, "--stats", stats, "--json")
    assert found.exit_code == 0 and found.stderr == ""
    counts = load_file(stats)[f"{CODEBOOK}/counts"]
    sizes = load_file(found.json["outputs"]["model"])["_vq_vae._ema_cluster_size"]
    assert torch.equal(sizes, counts[counts > 0].float())
    stages = found.json["stages"]
    assert stages["surgery"] is stages["finetuned"] is None and found.json["kept"] == "surgery"
    before = stages["before"]
    assert (before["split"], before["mse"], before["psnr"], before["ssim"]) == ("calibration", None, None, None)
    assert before["images"] == 57
    (use,) = before["codebooks"]
    assert (use["size"], use["used"], use["latents"], use["coverage"]) == (16, 10, 57 * 16, None)
    printed = codebook("prune", tiny, "--stats", stats, "--force")
    assert printed.exit_code == 0 and "10 of 16" in printed.stdout and "counts of 57 items" in printed.stdout


def test_stats_are_of_the_calibration_data_or_else_of_the_test_data_and_are_overwritten_with_force_alone(
    stats: Path, tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    counts = load_file(stats)[f"{CODEBOOK}/counts"]
    assert counts.dtype == torch.int64 and int(counts.sum()) == 57 * 16
    assert (counts == 0).nonzero()[:, 0].tolist() == list(DEAD)
    alone, before = tmp_path / "alone.safetensors", stats.read_bytes()
    assert codebook("measure", tiny, "--test-data", images_folder, *RANGE, "--stats", alone).exit_code == 0
    assert int(load_file(alone)[f"{CODEBOOK}/counts"].sum()) == 60 * 16
    assert [metadata_of(path)["codebook_tools.split"] for path in (stats, alone)] == ["calibration", "test"]
    again = ("measure", tiny, "--data", images_folder, *RANGE, "--stats", stats)
    assert_refused(codebook(*again), "stats.safetensors exists; --force replaces it")
    assert codebook(*again, "--force").exit_code == 0
    assert stats.read_bytes() == before


# --- the codes alone
def test_quantize_without_counts_goes_on_unweighted_and_says_so(tmp_path: Path, codebook: Run) -> None:
    """The pairs (0, 1) and (10, 12) are merged into their means, whoever's network they are of."""
    model = tmp_path / "theirs.safetensors"
    codes = torch.tensor([[0.0, 0.0], [10.0, 0.0], [1.0, 0.0], [12.0, 0.0]])
    save_file({"quantize.embedding.weight": codes, "to_rgb.weight": torch.ones(3)}, model)
    found = codebook("quantize", model, "--k", 2, "--json")
    assert found.exit_code == 0, found.stderr
    assert found.json["stages"] == {"before": None, "surgery": None, "finetuned": None}
    assert any("all codes weigh alike" in warning for warning in found.json["warnings"])
    output = Path(found.json["outputs"]["model"])
    tensors = load_file(output)
    assert sorted(tensors["quantize.embedding.weight"].tolist()) == [[0.5, 0.0], [11.0, 0.0]]
    assert torch.equal(tensors["to_rgb.weight"], torch.ones(3))
    assert codebook("verify", output, "--against", model).exit_code == 0
    rounded = codebook("quantize", model, "--bits", 3, "-o", tmp_path / "bits.safetensors")
    assert rounded.exit_code == 0 and "would take 19 bytes" in rounded.stdout  # 4 * 2 * 3 bits, and 4 steps of 4 bytes
    assert "weigh" not in rounded.stderr and "nothing is measured" in rounded.stderr


def test_what_does_not_go_without_images_is_refused_and_a_dry_run_says_what_would_be_written(
    stats: Path, tiny: Path, codebook: Run, images_folder: Path, write_model: WriteModel, variants: dict[str, State]
) -> None:
    other = write_model(name="other", state=variants["plain"] | {CODEBOOK: variants["plain"][CODEBOOK] + 1})
    before = names(tiny.parent)
    assert_refused(codebook("prune", other, "--stats", stats), "another checkpoint")
    assert_refused(codebook("prune", tiny, "--stats", tiny), "holds no counts")
    for options in ((), ("--test-data", images_folder)):
        assert_refused(codebook("prune", tiny, *options), "give images with --data, or counts with --stats")
    for words, message in {
        ("prune", "--data", images_folder): "--stats stands in for images",
        ("quantize", "--k", 4, "--test-data", images_folder): "--stats stands in for images",
        ("prune", "--steps", 5): "5 steps of fine-tuning need images",
        ("prune", "--threshold", 100_000): "removes every code",
        ("prune", "--codebook-key", "nonsense"): "no such tensor",
    }.items():
        assert_refused(codebook(words[0], tiny, *words[1:], "--stats", stats), message)
    found = codebook("quantize", tiny, "--k", 5, "--stats", stats, "--dry-run", "--json").json
    assert found["size"] == {"before": 16, "after": 5}
    assert Path(found["outputs"]["model"]).name == "tiny.quantize-k5.safetensors"
    assert codebook("prune", tiny, "--stats", stats, "--dry-run").exit_code == 0
    tensors = load_file(stats)
    save_file(tensors | {f"{CODEBOOK}/counts": tensors[f"{CODEBOOK}/counts"] - 1}, stats, metadata_of(stats))
    assert_refused(codebook("quantize", tiny, "--k", 4, "--stats", stats), "damaged")
    assert names(tiny.parent) == before


@pytest.mark.parametrize("name", ["tiny.safetensors", "other.safetensors"])
def test_counts_are_trusted_while_the_model_is_hashed_and_checked_before_its_output_has_a_name(
    name: str, stats: Path, tiny: Path, codebook: Run, write_model: WriteModel, variants: dict[str, State],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write_model(name="other", state=variants["plain"] | {CODEBOOK: variants["plain"][CODEBOOK] + 1})
    assert codebook("prune", tiny, "--stats", stats, "-o", tiny.with_name("hashed_before.safetensors")).exit_code == 0
    digest, fsync, written, before = hashing._digest, os.fsync, threading.Event(), names(tiny.parent)
    monkeypatch.setattr(os, "fsync", lambda handle: (written.set(), fsync(handle))[1])
    monkeypatch.setattr(hashing, "_digest", lambda path: (written.wait(30), digest(path))[1])
    output = tiny.with_name("hashed_after.safetensors")
    result = codebook("prune", tiny.with_name(name), "--stats", stats, "-o", output)
    assert written.is_set()
    if name == tiny.name:
        assert output.read_bytes() == tiny.with_name("hashed_before.safetensors").read_bytes()
    else:
        assert_refused(result, "counts the codes of another checkpoint")
        assert names(tiny.parent) == before
