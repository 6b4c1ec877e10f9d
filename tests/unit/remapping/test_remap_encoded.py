"""Tokens as `encode` writes them follow an index map: every level its own, in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, WriteMap, assert_refused, save_map

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
