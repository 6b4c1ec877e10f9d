"""On checkpoints that others trained, with the numbers measured elsewhere: wants ../shared beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run
from places import SHARED
from safetensors.torch import load_file
from sources_of_images import Images, find_images

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.write import tensor_bytes
from codebook_tools.evaluation.measure import reconstruct
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.models.load import load_model

CIFAR, CIFAR_TRAIN, CIFAR_TEST = (
    SHARED / name
    for name in ("checkpoints/cifar10-vqvae-k512.safetensors", "data/cifar10-train.tar", "data/cifar10-test.tar")
)
FASHION, FASHION_TRAIN, FASHION_TEST, FASHION_NETWORK = (
    SHARED / name
    for name in (
        "checkpoints/fashion-vqvae-k128.safetensors",
        "data/fashion-train.tar",
        "data/fashion-test.tar",
        "models/fashion_vqvae.py",
    )
)
WITH_NETWORK = ("--network", f"{FASHION_NETWORK}:make")

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the folder {SHARED} is absent")


def test_the_fashion_checkpoint_measures_as_it_did_elsewhere(codebook: Run) -> None:
    found = codebook("measure", FASHION, *WITH_NETWORK, "--test-data", FASHION_TEST, "--json")
    assert found.exit_code == 0, found
    stage = found.json["stages"]["before"]
    (use,) = stage["codebooks"]
    assert (stage["images"], use["size"], use["dim"], use["latents"]) == (100, 128, 32, 4900)
    assert use["used"] == 63
    assert use["perplexity"] == pytest.approx(51.14, abs=0.05)
    assert stage["mse"] == pytest.approx(0.005893, abs=1e-5)
    assert found.json["settings"]["input_range"] == [0.0, 1.0]  # found out, not told


@pytest.mark.slow
def test_the_cifar_checkpoint_measures_as_it_did_elsewhere(codebook: Run) -> None:
    found = codebook("measure", CIFAR, "--test-data", CIFAR_TEST, "--json")
    assert found.exit_code == 0, found
    stage = found.json["stages"]["before"]
    (use,) = stage["codebooks"]
    assert (stage["images"], use["size"], use["dim"], use["latents"]) == (2000, 512, 64, 128_000)
    assert use["used"] == 85
    assert use["perplexity"] == pytest.approx(67.18, abs=0.05)
    assert stage["mse"] == pytest.approx(0.009232, abs=1e-5)
    assert found.json["settings"]["input_range"] == [-1.0, 1.0]


@pytest.mark.slow
def test_pruning_the_cifar_checkpoint_of_dead_codes_changes_no_bit_of_a_reconstruction(
    codebook: Run, tmp_path: Path
) -> None:
    output = tmp_path / "pruned.safetensors"
    # The same test images as elsewhere, but few of them: the counts are the training images'.
    found = codebook(
        "prune", CIFAR, "--threshold", 0, "--data", CIFAR_TRAIN, "--test-data", few(tmp_path), "-o", output, "--json"
    )
    assert found.exit_code == 0, found
    old, new = load_file(CIFAR), load_file(output)
    assert new[CODEBOOK].shape == (86, 64)
    index_map = load_file(tmp_path / "pruned.index_map.safetensors")[f"{CODEBOOK}/index_map"]
    kept = (index_map >= 0).nonzero()[:, 0]
    assert index_map[kept].tolist() == list(range(86)) and index_map.shape == (512,)
    assert tensor_bytes(new[CODEBOOK]) == tensor_bytes(old[CODEBOOK][kept])
    assert all(tensor_bytes(new[name]) == tensor_bytes(old[name]) for name in old.keys() - {CODEBOOK})
    assert codebook("verify", output, "--against", CIFAR).exit_code == 0

    before, after = (load_model(read_checkpoint(path)) for path in (CIFAR, output))
    images = Images(find_images([CIFAR_TEST])[:200], 3, 4)
    for _, pixels in images.batches(50):
        old, new = reconstruct(before, pixels), reconstruct(after, pixels)
        assert torch.equal(old.media, new.media) and torch.equal(index_map[old.codes[0]], new.codes[0])


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "change"), [(8, 0.01), (6, 0.01)])
def test_the_cifar_codes_rounded_to_few_bits_reconstruct_as_well(
    bits: int, change: float, codebook: Run, tmp_path: Path
) -> None:
    output = tmp_path / "rounded.safetensors"
    done = codebook("quantize", CIFAR, "--bits", bits, "-o", output, "--json")
    assert done.exit_code == 0, done
    assert done.json["bytes"]["packed"] == 512 * 64 * bits // 8 + 4 * 512
    found = codebook("measure", output, "--test-data", CIFAR_TEST, "--json").json["stages"]["before"]
    assert found["mse"] == pytest.approx(0.009232, rel=change)
    assert found["codebooks"][0]["used"] in range(83, 88)


@pytest.mark.slow
def test_merging_the_cifar_codes_distorts_less_than_keeping_the_most_used(codebook: Run, tmp_path: Path) -> None:
    errors = []
    for name, *options in (
        ("prune", "--keep", 40),
        ("quantize", "--k", 40),
        ("quantize", "--k", 40, "--method", "pnn"),
    ):
        output = tmp_path / f"{'-'.join(map(str, (name, *options)))}.safetensors"
        done = codebook(
            name,
            CIFAR,
            *options,
            "--data",
            CIFAR_TRAIN,
            "--limit",
            1500,
            "--test-data",
            CIFAR_TEST,
            "-o",
            output,
            "--json",
        )
        assert done.exit_code == 0, done
        stages = done.json["stages"]
        errors.append(stages["surgery"]["codebooks"][0]["distortion"])
        assert stages["surgery"]["codebooks"][0]["used"] == 40
    kept, kmeans, pnn = errors
    assert max(kmeans, pnn) < kept


def few(folder: Path) -> Path:
    """A folder of the first 20 test images."""
    chosen = folder / "few"
    chosen.mkdir()
    for item in find_images([CIFAR_TEST])[:20]:
        path = chosen / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.source.read())
    return chosen


def test_test_data_choose_nothing_and_the_same_run_gives_the_same_bytes(codebook: Run, tmp_path: Path) -> None:
    items = find_images([FASHION_TEST])
    folders = [tmp_path / name for name in ("first", "second")]
    for folder, chosen in zip(folders, (items[:30], items[30:60]), strict=True):
        for item in chosen:
            path = folder / item.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(item.source.read())
    written, measured = [], []
    for name, test in (("one", folders[0]), ("two", folders[1]), ("three", folders[0])):
        output = tmp_path / f"{name}.safetensors"
        found = codebook(
            "refit", FASHION, *WITH_NETWORK, "--k", 32, "--steps", 2, "--limit", 150,
            "--data", FASHION_TRAIN, "--test-data", test, "-o", output, "--json",
        )  # fmt: skip
        assert found.exit_code == 0, found
        written.append([file.read_bytes() for file in (output, tmp_path / f"{name}.index_map.safetensors")])
        measured.append(found.json["stages"])
        assert codebook("verify", output, "--against", FASHION).exit_code == 0
    assert written[0] == written[1] == written[2]
    assert measured[0] == measured[2] != measured[1]
