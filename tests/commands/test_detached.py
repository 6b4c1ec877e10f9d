"""Surgeries without images: on counts of an earlier pass, or on the codes alone; no network is needed for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import DEAD, Run, State, WriteModel, assert_refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from codebook_tools.checkpoints.layout import index_map_path
from codebook_tools.models.families.zalando import CODEBOOK

RANGE = ("--input-range", "-1,1")


@pytest.fixture
def stats(tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path) -> Path:
    """What `measure --stats` writes for the tiny model and its images."""
    path = tmp_path / "stats.safetensors"
    found = codebook("measure", tiny, "--data", images_folder, *RANGE, "--stats", path)
    assert found.exit_code == 0, found.stderr
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- counts of an earlier pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["prune --threshold 40", "quantize --k 5 --method pnn", "quantize --bits 4"])
def test_counts_do_what_the_images_they_are_of_do(
    words: str, stats: Path, tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    command = words.split()
    seen, counted = tmp_path / "seen.safetensors", tmp_path / "counted.safetensors"
    by_images = codebook(*command, tiny, "--data", images_folder, *RANGE, "-o", seen, "--json")
    by_counts = codebook(*command, tiny, "--stats", stats, "-o", counted, "--json")
    assert by_images.exit_code == by_counts.exit_code == 0, by_counts.stderr
    both = [load_file(path) for path in (seen, counted)]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])
    maps = [load_file(index_map_path(path))[f"{CODEBOOK}/index_map"] for path in (seen, counted)]
    assert torch.equal(*maps)
    assert codebook("verify", counted, "--against", tiny).exit_code == 0
    assert by_counts.json["bytes"].get("packed") == by_images.json["bytes"].get("packed")


def test_the_result_says_what_was_counted_and_nothing_of_images(stats: Path, tiny: Path, codebook: Run) -> None:
    found = codebook("prune", tiny, "--stats", stats, "--json")
    assert found.exit_code == 0 and found.stderr == ""
    stages = found.json["stages"]
    assert stages["surgery"] is stages["finetuned"] is None and found.json["kept"] == "surgery"
    before = stages["before"]
    assert (before["split"], before["mse"], before["psnr"], before["ssim"]) == ("calibration", None, None, None)
    assert before["images"] == 57
    (use,) = before["codebooks"]
    assert (use["size"], use["used"], use["latents"], use["coverage"]) == (16, 10, 57 * 16, None)
    shown = codebook("prune", tiny, "--stats", stats, "--force")
    assert shown.exit_code == 0 and "10 of 16" in shown.stdout and "counts of 57 items" in shown.stdout


def test_stats_are_of_the_calibration_data_or_else_of_the_test_data(
    stats: Path, tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    with safe_open(stats, "pt") as file:
        assert file.metadata()["codebook_tools.split"] == "calibration"
        counts = file.get_tensor(f"{CODEBOOK}/counts")
    assert counts.dtype == torch.int64 and int(counts.sum()) == 57 * 16
    assert (counts == 0).nonzero()[:, 0].tolist() == list(DEAD)
    alone = tmp_path / "alone.safetensors"
    assert codebook("measure", tiny, "--test-data", images_folder, *RANGE, "--stats", alone).exit_code == 0
    with safe_open(alone, "pt") as file:
        assert file.metadata()["codebook_tools.split"] == "test"
        assert int(file.get_tensor(f"{CODEBOOK}/counts").sum()) == 60 * 16


def test_stats_are_not_overwritten_without_force(stats: Path, tiny: Path, codebook: Run, images_folder: Path) -> None:
    before = stats.read_bytes()
    again = ("measure", tiny, "--data", images_folder, *RANGE, "--stats", stats)
    assert_refused(codebook(*again), "stats.safetensors exists; --force replaces it")
    assert codebook(*again, "--force").exit_code == 0
    assert stats.read_bytes() == before


def test_companions_follow_the_counts(
    write_model: WriteModel, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    model, stats = write_model("ema"), tmp_path / "stats.safetensors"
    codebook("measure", model, "--data", images_folder, *RANGE, "--stats", stats)
    done = codebook("prune", model, "--stats", stats, "--json")
    tensors = load_file(done.json["outputs"]["model"])
    counts = load_file(stats)[f"{CODEBOOK}/counts"]
    assert torch.equal(tensors["_vq_vae._ema_cluster_size"], counts[counts > 0].float())
    assert codebook("verify", done.json["outputs"]["model"], "--against", model).exit_code == 0


def test_counts_that_are_not_this_models_are_refused(
    stats: Path, tiny: Path, codebook: Run, tmp_path: Path, variants: dict[str, State]
) -> None:
    other = tmp_path / "other.safetensors"
    save_file(variants["plain"] | {CODEBOOK: variants["plain"][CODEBOOK] + 1}, other)
    before = names(tmp_path)
    assert_refused(codebook("prune", other, "--stats", stats), "another checkpoint")
    assert_refused(codebook("prune", tiny, "--stats", tiny), "holds no counts")
    with safe_open(stats, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(stats)
    save_file(tensors | {f"{CODEBOOK}/counts": tensors[f"{CODEBOOK}/counts"] - 1}, stats, metadata)
    assert_refused(codebook("quantize", tiny, "--k", 4, "--stats", stats), "damaged")
    assert names(tmp_path) == before


# --- the codes alone -----------------------------------------------------------------------------------------------


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
    shown = codebook("quantize", model, "--bits", 3, "-o", tmp_path / "bits.safetensors")
    assert shown.exit_code == 0 and "would take 19 bytes" in shown.stdout  # 4 * 2 * 3 bits, and 4 steps of 4 bytes
    assert "weigh" not in shown.stderr and "nothing is measured" in shown.stderr


def test_prune_says_what_it_needs(tiny: Path, codebook: Run, held_out_folder: Path, tmp_path: Path) -> None:
    for more in ((), ("--test-data", held_out_folder)):
        assert_refused(codebook("prune", tiny, *more), "give images with --data, or counts with --stats")
    assert names(tmp_path) == {tiny.name}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("prune", "--data", "IMAGES"), "--stats stands in for images"),
        (("quantize", "--k", "4", "--test-data", "IMAGES"), "--stats stands in for images"),
        (("prune", "--steps", "5"), "5 steps of fine-tuning need images"),
        (("prune", "--threshold", "100000"), "removes every code"),
        (("prune", "--codebook-key", "nonsense"), "no such tensor"),
    ],
    ids=str,
)
def test_what_does_not_go_without_images_is_refused(
    given: tuple[str, ...], message: str, stats: Path, tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    before = names(tmp_path)
    options = [images_folder if part == "IMAGES" else part for part in given[1:]]
    assert_refused(codebook(given[0], tiny, *options, "--stats", stats), message)
    assert names(tmp_path) == before


def test_a_dry_run_without_images_says_what_would_be_written(
    stats: Path, tiny: Path, codebook: Run, tmp_path: Path
) -> None:
    before = names(tmp_path)
    found = codebook("quantize", tiny, "--k", 5, "--stats", stats, "--dry-run", "--json").json
    assert found["size"] == {"before": 16, "after": 5}
    assert Path(found["outputs"]["model"]).name == "tiny.quantize-k5.safetensors"
    assert codebook("prune", tiny, "--stats", stats, "--dry-run").exit_code == 0
    assert names(tmp_path) == before
