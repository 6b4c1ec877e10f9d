"""Errors that name the next step: an original to give, a hub id to fetch, keys to choose from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GREY, Grey, Run, assert_refused
from safetensors.torch import save_file

RANGE = ("--input-range", "-1,1")


def test_verify_asks_for_the_original_unless_it_is_the_demo(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    assert codebook("prune", tiny, "--data", images_folder, *RANGE, "-o", out).exit_code == 0
    assert_refused(
        codebook("verify", out), f"--against is missing: give the original of {out}, the file that its prune"
    )
    assert codebook("verify", out, "--against", tiny).exit_code == 0
    assert_refused(
        codebook("verify", tiny), "says nothing of a surgery: it was not written by codebook-tools; --network"
    )


@pytest.mark.parametrize("model", ["org/model", "org/a.b@v1", "there/model"])
def test_a_text_that_may_be_a_hub_id_has_both_readings_in_the_error(
    model: str, codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for command in ("inspect", "measure", "prune"):
        refused = codebook(command, model)
        assert_refused(refused, f"no such file: {model}; and as a model of the hub, {model}: HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("path", ["model", "org/model.safetensors", "/org/model", "a/b/c"])
def test_a_path_that_is_no_hub_id_is_not_taken_for_one(
    path: str, codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = codebook("inspect", path)
    assert_refused(refused, f"no such file: {path}")
    assert "hub" not in refused.stderr


@pytest.fixture
def declaring(grey: Callable[..., Grey], tmp_path: Path) -> Callable[..., tuple[object, ...]]:
    """declaring("a.b", ...): `prune` of a file with two codebooks by name, and a network that declares these."""

    def make(*names: str) -> tuple[object, ...]:
        more = {"old_quantizer.embedding.weight": torch.rand(8, 2)}
        path = grey([0.0, 0.5, 1.0], more=more).path
        own = GREY.replace("    def encode", f"    codebooks = {names!r}\n\n    def encode", 1)
        (tmp_path / "own.py").write_text(own)
        np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8))
        return ("measure", path, "--network", f"{tmp_path}/own.py:make", "--data", tmp_path / "images.npy", "--json")

    return make


def test_a_network_that_declares_its_codebook_is_believed(
    declaring: Callable[..., tuple[object, ...]], codebook: Run
) -> None:
    asked = codebook(*declaring("quantizer.codebook.weight"))
    assert asked.exit_code == 0, asked.stderr
    assert [book["key"] for book in asked.json["stages"]["before"]["codebooks"]] == ["quantizer.codebook.weight"]
    refused = codebook(*declaring())
    assert_refused(refused, "choose with --codebook-key, of ")
    assert "old_quantizer.embedding.weight" in refused.stderr and "quantizer.codebook.weight" in refused.stderr


def test_what_a_network_declares_in_vain_is_named(declaring: Callable[..., tuple[object, ...]], codebook: Run) -> None:
    assert_refused(
        codebook(*declaring("quantizer.codebok.weight")),
        "the network declares the codebook quantizer.codebok.weight, and ",
    )
    both = declaring("quantizer.codebook.weight", "old_quantizer.embedding.weight")
    assert_refused(
        codebook(*both), "declares 2 codebooks, quantizer.codebook.weight, old_quantizer.embedding.weight, and"
    )
    one = codebook(*both, "--codebook-key", "quantizer.codebook.weight")
    assert one.exit_code == 0, one.stderr


def test_all_tensors_of_unknown_meaning_are_named_at_once(
    grey: Callable[..., Grey], codebook: Run, tmp_path: Path
) -> None:
    odd = {f"quantizer.codebook.odd{i}": torch.tensor([3.0, -1.0, 0.5]) * (i + 1) for i in range(4)}
    made = grey([0.0, 0.5, 1.0], more=odd)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8))
    asked = codebook("prune", made.path, "--network", made.network, "--data", tmp_path / "images.npy")
    assert_refused(asked, "has numbers for each code of quantizer.codebook.weight")
    assert all(f"--companion {key}=" in asked.stderr for key in odd)


def test_all_codebooks_are_named_where_one_is_unsure(codebook: Run, tmp_path: Path) -> None:
    state = {f"{name}.weight": torch.rand(16, 2) for name in ("emb", "emb2", "embed", "codes", "vq.emb")}
    state |= {"encoder.weight": torch.rand(2, 1, 1, 1), "decoder.weight": torch.rand(1, 2, 1, 1)}
    save_file(state, tmp_path / "m.safetensors")
    listed = [book["key"] for book in codebook("inspect", tmp_path / "m.safetensors", "--json").json["codebooks"]]
    np.save(tmp_path / "latents.npy", np.random.default_rng(0).random((60, 2), dtype=np.float32))
    asked = codebook("prune", tmp_path / "m.safetensors", "--latents", tmp_path / "latents.npy")
    assert len(listed) == 5
    assert_refused(asked, "is only perhaps a codebook")
    assert all(f"--codebook-key {key}" in asked.stderr for key in listed)


def test_more_data_are_not_asked_for_where_a_limit_leaves_them_out(
    codebook: Run, tiny: Path, images_folder: Path
) -> None:
    refused = codebook("prune", tiny, "--data", images_folder, "--limit", 2, *RANGE)
    assert_refused(
        refused, "is empty: a tenth is drawn by name; raise --limit, or give the test images with --test-data"
    )


def test_fetching_again_is_not_advised_for_a_file_of_arrays(codebook: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    refused = codebook("inspect", tmp_path / "x.npz")
    assert_refused(refused, "x.npz is an archive of arrays of numpy, and no checkpoint; give the file of the weights")


def test_skipping_images_is_not_advised_where_the_size_is_at_fault(
    codebook: Run, tiny: Path, images_folder: Path
) -> None:
    refused = codebook("measure", tiny, "--data", images_folder, "--size", 3, *RANGE)
    assert_refused(refused, "--size 3 is smaller than the model's stride of 4; give a multiple")


def test_a_missing_index_map_and_a_file_of_no_surgery_are_told_apart(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    assert codebook("prune", tiny, "--data", images_folder, *RANGE, "-o", out).exit_code == 0
    assert_refused(codebook("verify", tiny, "--against", out), "says nothing of a surgery")
    (tmp_path / "out.index_map.safetensors").unlink()
    assert_refused(codebook("verify", out, "--against", tiny), "the index map lies beside the checkpoint, else give it")


def test_a_codebook_of_any_name_can_be_named_from_what_inspect_lists(tmp_path: Path, codebook: Run) -> None:
    state = {
        "analysis.0.weight": torch.rand(8, 3, 4, 4), "head.weight": torch.rand(9, 8), "head.bias": torch.rand(9),
        "words.weight": torch.rand(24, 8), "synthesis.0.weight": torch.rand(3, 8, 4, 4),
    }  # fmt: skip
    path = tmp_path / "mine.safetensors"
    save_file(state, path)
    assert "--codebook-key; matrices without a bias: words.weight" in " ".join(codebook("inspect", path).stdout.split())
    assert_refused(codebook("quantize", path, "--k", 8), "matrices without a bias: words.weight")
    assert_refused(
        codebook("quantize", path, "--k", 8, "--codebook-key", "word.weight"), "the candidates: words.weight"
    )


OWN = """
import torch
from torch import nn


class Glyphs(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.eyes, self.hands = nn.Conv2d(1, 6, 4, 4), nn.ConvTranspose2d(6, 1, 4, 4)
        self.dictionary = nn.Parameter(torch.randn(size, 6))
        EXTRA

    def encode(self, images):
        return self.eyes(images)

    def decode(self, latents):
        return self.hands(latents)


def make(codebook_size):
    return Glyphs(codebook_size)
"""


def test_the_only_matrix_that_grows_with_codebook_size_is_the_codebook(tmp_path: Path, codebook: Run) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (80, 16, 16), dtype=np.uint8))
    for extra, sure in (("pass", True), ("self.classes = nn.Linear(6, size)", False)):
        names = dict[str, object]()
        exec(OWN.replace("EXTRA", extra), names)
        module = names["make"](32)  # type: ignore[operator]
        path = tmp_path / f"{len(extra)}.safetensors"
        save_file(module.state_dict(), path)
        (tmp_path / "own.py").write_text(OWN.replace("EXTRA", extra))
        words = (path, "--network", f"{tmp_path / 'own.py'}:make", "--data", tmp_path / "x.npy")
        done = codebook("refit", *words, "--k", 8, "--steps", 0, "--input-range", "0,1", "--json")
        if sure:
            assert done.exit_code == 0 and "dictionary" in done.json["stages"]["surgery"]["codebooks"][0]["key"], done
        else:
            assert_refused(done, "has no codebook: ")
