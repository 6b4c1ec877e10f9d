"""On checkpoints that others trained, with the numbers measured elsewhere: wants ../shared beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run, same
from places import SHARED
from safetensors.torch import load_file
from sources_of_images import Images, find_images

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.write import index_map_path
from codebook_tools.evaluation.measure import reconstruct
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.models.load import load_model

CHECKPOINTS, DATA = SHARED / "checkpoints", SHARED / "data"
CIFAR, FASHION = CHECKPOINTS / "cifar10-vqvae-k512.safetensors", CHECKPOINTS / "fashion-vqvae-k128.safetensors"
CIFAR_TRAIN, CIFAR_TEST = DATA / "cifar10-train.tar", DATA / "cifar10-test.tar"
FASHION_TEST = DATA / "fashion-test.tar"
WITH_NETWORK = ("--network", f"{SHARED / 'models' / 'fashion_vqvae.py'}:make")

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the folder {SHARED} is absent")


@pytest.mark.parametrize(
    ("model", "data", "counts", "perplexity", "mse", "input_range"),
    [
        ((FASHION, *WITH_NETWORK), FASHION_TEST, (100, 128, 32, 4900, 63), 51.14, 0.005893, [0.0, 1.0]),
        pytest.param(
            (CIFAR,), CIFAR_TEST, (2000, 512, 64, 128_000, 85), 67.18, 0.009232, [-1.0, 1.0], marks=pytest.mark.slow
        ),
    ],
    ids=["fashion", "cifar"],
)
def test_a_checkpoint_measures_as_it_did_elsewhere(
    model: tuple[object, ...], data: Path, counts: tuple[int, ...], perplexity: float, mse: float,
    input_range: list[float], codebook: Run,
) -> None:  # fmt: skip
    measured = codebook("measure", *model, "--test-data", data, "--json")
    assert measured.exit_code == 0, measured
    stage = measured.json["stages"]["before"]
    (use,) = stage["codebooks"]
    assert (stage["images"], use["size"], use["dim"], use["latents"], use["used"]) == counts
    assert use["perplexity"] == pytest.approx(perplexity, abs=0.05) and stage["mse"] == pytest.approx(mse, abs=1e-5)
    assert measured.json["settings"]["input_range"] == input_range  # nobody gave it


@pytest.mark.slow
def test_pruning_the_cifar_checkpoint_of_dead_codes_changes_no_reconstruction(codebook: Run, tmp_path: Path) -> None:
    output = tmp_path / "pruned.safetensors"
    # The same test images as elsewhere, but few of them: the counts are the training images'.
    few = tmp_path / "few"
    for item in find_images([CIFAR_TEST])[:20]:
        path = few / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.source.read())
    data = ("--data", CIFAR_TRAIN, "--test-data", few)
    found = codebook("prune", CIFAR, "--threshold", 0, *data, "-o", output, "--json")
    assert found.exit_code == 0, found
    old, new = load_file(CIFAR), load_file(output)
    index_map = load_file(index_map_path(output))[f"{CODEBOOK}/index_map"]
    kept = (index_map >= 0).nonzero()[:, 0]
    assert index_map[kept].tolist() == list(range(86)) and index_map.shape == (512,)
    expected = old | {CODEBOOK: old[CODEBOOK][kept]}
    assert old.keys() == new.keys() and all(same(new[name], expected[name]) for name in old)
    assert codebook("verify", output, "--against", CIFAR).exit_code == 0

    before, after = (load_model(read_checkpoint(path)) for path in (CIFAR, output))
    for _, pixels in Images(find_images([CIFAR_TEST])[:200], 3, 4).batches(50):
        old, new = reconstruct(before, pixels), reconstruct(after, pixels)
        assert torch.equal(old.media, new.media) and torch.equal(index_map[old.codes[0]], new.codes[0])


@pytest.mark.slow
def test_the_cifar_codes_rounded_to_few_bits_reconstruct_as_well(codebook: Run, tmp_path: Path) -> None:
    output = tmp_path / "rounded.safetensors"
    done = codebook("quantize", CIFAR, "--bits", 6, "-o", output, "--json")
    assert done.exit_code == 0, done
    assert done.json["bytes"]["packed"] == 512 * 64 * 6 // 8 + 4 * 512
    found = codebook("measure", output, "--test-data", CIFAR_TEST, "--json").json["stages"]["before"]
    assert found["mse"] == pytest.approx(0.009232, rel=0.01)
    assert found["codebooks"][0]["used"] in range(83, 88)


@pytest.mark.slow
def test_merging_the_cifar_codes_distorts_less_than_keeping_the_most_used(codebook: Run, tmp_path: Path) -> None:
    data = ("--data", CIFAR_TRAIN, "--limit", 800, "--test-data", CIFAR_TEST, "--force", "--json")
    errors = []
    for name, *options in (("prune", "--keep", 40), ("quantize", "--k", 40), ("quantize", "--k=40", "--method=pnn")):
        done = codebook(name, CIFAR, *options, *data, "-o", tmp_path / "out.safetensors")
        assert done.exit_code == 0, done
        (use,) = done.json["stages"]["surgery"]["codebooks"]
        assert use["used"] == 40
        errors.append(use["distortion"])
    assert max(errors[1:]) < errors[0]
