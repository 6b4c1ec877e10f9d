"""Tokens as `encode` writes them follow an index map: every level its own, in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, WriteMap, assert_refused, save_map
from safetensors.torch import save_file

from codebook_tools.checkpoints.layout import index_map_path
from codebook_tools.checkpoints.read import file_sha256
from codebook_tools.remapping.token_readers import open_tokens
from codebook_tools.remapping.token_writers import writing_tokens

MAPS = {
    "layers.0.embed": ([2, 0, 1, 3], [2, 0, 1, 3]),
    "layers.1.embed": ([3, 2, 1, 0], [3, 2, 1, 0]),
    "layers.2.embed": ([0, -1, 1, 2], [0, 2, 1, 2]),
}
"""Of three levels of four codes each; code 1 of the last was removed, and is nearest to 2."""

TABLES = np.array([nearest for _, nearest in MAPS.values()])


def write(path: Path, codes: np.ndarray[Any, Any]) -> Path:
    """codes: (n, levels, ...) of several levels, (n, ...) of one where `levels` is None."""
    with writing_tokens(path, len(codes), {}, force=True) as writer:
        writer.add([f"item {i}" for i in range(len(codes))], [*codes.swapaxes(0, 1)])
    return path


def read(path: Path, levels: int) -> np.ndarray[Any, Any]:
    batches = [codes for _, codes in open_tokens(path).batches(levels, 2)]
    return np.concatenate([np.stack(codes, 1) for codes in batches])


@pytest.mark.parametrize("ending", [".npy", ".safetensors", ".parquet", ".jsonl"])
@pytest.mark.parametrize("grid", [(5,), (2, 3), ()])
def test_each_level_follows_its_own_map(ending: str, grid: tuple[int, ...], codebook: Run, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 4, (7, 3, *grid))
    codes[0, 2] = 1
    path = write(tmp_path / f"t{ending}", codes)
    assert np.array_equal(read(path, 3), codes)
    asked = ("remap", path, "--map", save_map(tmp_path / "map.safetensors", MAPS))
    assert_refused(codebook(*asked), "and `codebook encode` makes tokens anew")
    done = codebook(*asked, "--on-removed", "nearest", "--json").json
    expected = np.stack([TABLES[level][codes[:, level]] for level in range(3)], 1)
    assert np.array_equal(read(tmp_path / f"t.remapped{ending}", 3), expected)
    names = [name for some, _ in open_tokens(tmp_path / f"t.remapped{ending}").batches(3, 2) for name in some]
    assert names == [f"item {i}" for i in range(7)]
    assert done["tokens"] == codes.size and done["removed"] == int((codes[:, 2] == 1).sum()) == done["nearest"]
    assert done["changed"] == int((expected != codes).sum())


def test_lists_of_unlike_levels_follow_too(codebook: Run, tmp_path: Path) -> None:
    """Keys that hold no tokens stay, and lines that hold none are named."""
    path, map_path = tmp_path / "t.jsonl", save_map(tmp_path / "map.safetensors", MAPS)
    lines: list[Any] = [{"item": "ü", "codes": [[[0, 1]], [[0], [3]], [[3]]], "n": 1.5}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert codebook("remap", path, "--map", map_path).exit_code == 0
    new = [json.loads(line) for line in (tmp_path / "t.remapped.jsonl").read_text().splitlines()]
    assert new == [{"item": "ü", "codes": [[[2, 0]], [[3], [0]], [[2]]], "n": 1.5}]
    for codes, message in (
        ([[0], [1], [2.5]], "line 1: codes holds 2.5, and tokens are integers"),
        ([[0], [1], [9]], "line 1, at [2, 0]: token 9 is not within 0 and 3"),
        ([[0], [1], [1 << 70]], "more than 64 bits"),
    ):
        path.write_text(json.dumps({"codes": codes}))
        assert_refused(codebook("remap", path, "--map", map_path, "--force"), message)
    path.write_text(json.dumps({"tokens": [0, 1]}))
    assert_refused(codebook("remap", path, "--map", map_path, "--force"), 'line 1 is no {"item": name, "codes": [...]}')
    one = ("--codebook-key", "layers.1.embed", "--key", "tokens", "--force")
    assert codebook("remap", path, "--map", map_path, *one).exit_code == 0
    assert json.loads((tmp_path / "t.remapped.jsonl").read_text()) == {"tokens": [3, 2]}


def test_many_approximations_are_better_made_anew(codebook: Run, with_model: WriteMap, tmp_path: Path) -> None:
    """Of 20 tokens 2 are a tenth, which is not many yet."""
    map_path = with_model("after", 3, ([0, -1, 1, 2], [0, 2, 1, 2]))
    for removed, said in ((2, False), (3, True)):
        codes = np.zeros(20, int)
        codes[:removed] = 1
        np.save(path := tmp_path / "t.npy", codes)
        asked = ("remap", path, "--map", map_path, "--on-removed", "nearest", "--force")
        done = codebook(*asked, "--json").json
        command = f"codebook encode {tmp_path / 'after.safetensors'} --data DATA -o tokens.npy"
        assert (done["next_step"] is not None) == said
        if said:
            assert command in done["next_step"] and done["next_step"].startswith("15% of the tokens")
            assert command in codebook(*asked).stdout


def test_a_map_of_one_level_leaves_the_others(codebook: Run, tmp_path: Path) -> None:
    """Its surgery chose one of the codebooks of the model that lies beside it. Two such surgeries in a row are one."""
    keys, pairs = [f"quantizer.layers.{i}.codebook.embed" for i in range(3)], [*MAPS.values()]
    books = {key: torch.randn(4, 2) for key in keys}
    maps, source = list[Path](), ""
    for name, level in (("a", 1), ("b", 0)):
        model = tmp_path / f"{name}.safetensors"
        save_file(books | {"name": torch.tensor([float(ord(name))])}, model)
        maps.append(save_map(index_map_path(model), {keys[level]: pairs[level]}, file_sha256(model), source))
        source = file_sha256(model)
    codes = np.random.default_rng(0).integers(0, 4, (7, 3, 5))
    path = write(tmp_path / "t.npy", codes)
    expected = codes.copy()
    expected[:, 1] = TABLES[1][codes[:, 1]]
    asked = ("remap", path, "--force", "--map", maps[0])
    assert_refused(codebook(*asked), "has 3 levels, and the map one codebook of 3: name those of all levels, in order")
    named = [word for key in keys for word in ("--codebook-key", key)]
    assert codebook(*asked, *named).exit_code == 0
    assert np.array_equal(read(tmp_path / "t.remapped.npy", 3), expected)
    assert_refused(codebook(*asked, "--map", maps[1]), "name the codebooks of all levels, in order")
    expected[:, 0] = TABLES[0][codes[:, 0]]
    assert codebook(*asked, "--map", maps[1], *named).exit_code == 0
    assert np.array_equal(read(tmp_path / "t.remapped.npy", 3), expected)
    assert_refused(codebook(*asked, *named, "--codebook-key", "layers.9.embed"), "has no map of layers.9.embed")
