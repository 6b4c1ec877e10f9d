"""Verification: a sound file passes, and each single fault is found, also where the hashes were forged to fit it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from conftest import State, WriteModel
from safetensors.torch import load_file, save_file
from surgeries import NO_STEPS, do
from torch import Tensor
from weight_files import metadata_of

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.sealed_file import SEAL, sealed
from codebook_tools.checkpoints.write import index_map_path
from codebook_tools.codebook import Strategy
from codebook_tools.errors import CodebookError
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.strategies import Prune, Refit
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.verify import Difference, verify_checkpoint

SIZES, SUMS = "_vq_vae._ema_cluster_size", "_vq_vae._ema_w"
UNTOUCHED = "_decoder._conv_1.weight"
INDEX_MAP, NEAREST = f"{CODEBOOK}/index_map", f"{CODEBOOK}/nearest"
PREFIX = "codebook_tools."
Make = Callable[..., tuple[Path, Path]]
DEAD_CODES = Prune()
Change = Callable[[State, dict[str, str], State], object]
"""Of a checkpoint's tensors and metadata, and of its map."""


@pytest.fixture(scope="module")
def done(variants: dict[str, State], images_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """done(): copies of a checkpoint pruned of its dead codes, and of the original that it was made from. mask=: one
    more tensor in it."""

    @cache
    def surgery(strategy: Strategy | None, recipe: FineTune, **more: Tensor) -> Path:
        folder = tmp_path_factory.mktemp("surgery")
        save_file(variants["ema"] | more, folder / "tiny.safetensors", {"format": "pt", "note": "by others"})
        request = Request(folder / "tiny.safetensors", (str(images_folder),), output=folder / "out.safetensors")
        do(request, strategy, recipe)
        return folder

    def make(strategy: Strategy | None = DEAD_CODES, recipe: FineTune = NO_STEPS, **more: Tensor) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("copy")
        copytree(surgery(strategy, recipe, **more), folder, dirs_exist_ok=True)
        return folder / "out.safetensors", folder / "tiny.safetensors"

    return make


def forge(model: Path, change: Change) -> None:
    """Rewrite a checkpoint and its map, and every hash with them: only the fault itself is left."""
    map_path = index_map_path(model)
    tensors, metadata, maps, of_map = load_file(model), metadata_of(model), load_file(map_path), metadata_of(map_path)
    change(tensors, metadata, maps)
    save_file(tensors, model, metadata)
    of_map[PREFIX + "checkpoint_sha256"] = hashlib.sha256(model.read_bytes()).hexdigest()
    save_file(maps, map_path, sealed(maps, {name: value for name, value in of_map.items() if name != SEAL}))


def found_in(model: Path, original: Path, **more: Any) -> tuple[Difference, ...]:
    return verify_checkpoint(model, original, **more).differences


def keys_found_in(model: Path, original: Path, **more: Any) -> set[str]:
    return {difference.key for difference in found_in(model, original, **more)}


# --- damage
def flipped(path: Path, key: str) -> None:
    """One bit in the first number of a tensor."""
    content = bytearray(path.read_bytes())
    content[read_checkpoint(path).entries[key].start + 1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("key", [UNTOUCHED, SUMS, NEAREST])
def test_one_flipped_bit_is_found_and_the_damaged_file_is_named(key: str, done: Make) -> None:
    model, original = done(Refit(6))
    flipped(index_map_path(model) if key == NEAREST else model, key)
    what = "is damaged" if key == NEAREST else "belongs to another checkpoint, or one of the two is damaged"
    differences = found_in(model, original)
    assert Difference("__metadata__", f"out.index_map.safetensors {what}") in differences
    assert (UNTOUCHED in {difference.key for difference in differences}) == (key == UNTOUCHED)


def test_any_flipped_bit_of_any_written_file_is_found(done: Make) -> None:
    """In the header, too: the map's did not stand under any hash."""
    model, original = done(Refit(6))
    chance = random.Random(0)
    for path in (model, index_map_path(model)):
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        for at in (*range(8), *chance.sample(range(8, header), 40), *chance.sample(range(header, len(content)), 4)):
            damaged = bytearray(content)
            damaged[at] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            try:
                found = found_in(model, original)
            except CodebookError:
                continue
            assert found, f"byte {at} of {path.name}"
        path.write_bytes(content)


def test_another_original_or_map_is_found(done: Make, write_model: WriteModel, variants: dict[str, State]) -> None:
    model, original = done()
    assert found_in(model, original, maps=[index_map_path(model).rename(model.parent / "elsewhere.safetensors")]) == ()
    with pytest.raises(CodebookError, match=r"no such file: .*out\.index_map"):
        verify_checkpoint(model, original)
    model, original = done()
    other_map = index_map_path(done(Prune(keep=5))[0]).rename(model.parent / "map.safetensors")
    differences = found_in(model, original, maps=[other_map])
    assert {difference.key for difference in differences} == {"__metadata__", CODEBOOK}
    assert "map.safetensors belongs to another checkpoint" in differences[0].what
    other = write_model(name="other", state=variants["ema"] | {UNTOUCHED: variants["ema"][UNTOUCHED] + 1})
    differences = found_in(model, other)
    assert Difference("__metadata__", "other.safetensors is not the file that the surgery was done on") in differences
    assert UNTOUCHED in {difference.key for difference in differences}
    none = write_model(name="none", state={"a.weight": torch.ones(3, 3)})
    with pytest.raises(CodebookError, match=r"has no _vq_vae\._embedding\.weight.*not the original"):
        verify_checkpoint(model, none)
    with pytest.raises(CodebookError, match="says nothing of a surgery"):
        verify_checkpoint(original, original, [index_map_path(model)])


# --- forgeries: every hash fits
def edited(key: str, make: Callable[[Tensor], Tensor] | None = None) -> Change:
    """A tensor of a checkpoint or of its map becomes another one, or is taken out."""

    def change(tensors: State, _: object, maps: State) -> None:
        part = maps if key in (INDEX_MAP, NEAREST) else tensors
        old = part.pop(key, torch.ones(2))
        part |= {} if make is None else {key: make(old)}

    return change


def filled(row: int, value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor(row), value)


def another_code(tensors: State, *_: object) -> None:
    """A code and its running sum, which goes with it."""
    tensors[CODEBOOK][2] = 7.0
    tensors[SUMS][2] = 7.0 * tensors[SIZES][2]


def said(**entries: str) -> Change:
    return lambda _, metadata, __: metadata.update({PREFIX + name: value for name, value in entries.items()})


FORGERIES: dict[str, tuple[Change, str, str]] = {
    "an untouched tensor": (edited(UNTOUCHED, filled(2, 7.0)), UNTOUCHED, "changed, though nothing says that it was"),
    "a code": (another_code, CODEBOOK, "the codes are not the original's that the index map says were kept"),
    "sums that do not follow": (edited(SUMS, filled(2, 7.0)), SUMS, "does not belong to the codes"),
    "sizes that do not follow": (edited(SIZES, filled(2, 7.0)), SUMS, "does not belong to the codes"),
    "a missing layer": (edited(UNTOUCHED), UNTOUCHED, "missing"),
    "a missing codebook": (edited(CODEBOOK), CODEBOOK, "missing"),
    "missing sums": (edited(SUMS), SUMS, "missing"),
    "a tensor more": (edited("extra", Tensor.clone), "extra", "not in the original"),
    "another dtype": (edited(UNTOUCHED, Tensor.half), UNTOUCHED, "dtype F16 instead of F32"),
    "another shape": (edited(UNTOUCHED, lambda t: t[:1].clone()), UNTOUCHED, "shape (1, 4, 3, 3) instead"),
    "sums of the old size": (edited(SUMS, lambda _: torch.ones(16, 4)), SUMS, "shape (16, 4) does not follow 10 codes"),
    "sizes of the old size": (edited(SIZES, lambda _: torch.ones(16)), SIZES, "shape (16,) does not follow 10 codes"),
    "sums that are not finite": (edited(SUMS, lambda t: t * torch.nan), SUMS, "not finite"),
    "a codebook of another dimension": (
        edited(CODEBOOK, lambda t: t[:, :3].clone()), CODEBOOK, "shape (10, 3), of which only axis 0 may differ",
    ),
    "metadata that were changed": (lambda _, m, __: m.update(note="mine"), "__metadata__", "entry note was not kept"),
    "another source": (said(source_sha256="0"), "__metadata__", "is not the file that"),
    "a code past the end": (edited(INDEX_MAP, filled(0, 10)), INDEX_MAP, "an entry outside -1 to 9"),
    "nearest to nothing": (edited(NEAREST, filled(0, -1)), NEAREST, "an entry outside 0 to 9"),
    "a wrong identity": (lambda *of: [t[:1].fill_(3) for t in of[2].values()], CODEBOOK, "are not the original's"),
    "an identity lost": (edited(INDEX_MAP, filled(0, -1)), CODEBOOK, "the codes are not the original's"),
    "identity and nearest at odds": (edited(NEAREST, filled(0, 3)), NEAREST, "its identity is not its own nearest"),
    "a short map": (edited(NEAREST, lambda t: t[:9].clone()), NEAREST, "shape (9,) for 16 old codes"),
    "no nearest": (edited(NEAREST), INDEX_MAP, "does not hold"),
    "a map of another dtype": (edited(NEAREST, Tensor.int), INDEX_MAP, "int64, of each codebook"),
}  # fmt: skip
FOUND_TWICE = ("sums that are not finite", "another source")


@pytest.mark.parametrize("fault", FORGERIES)
def test_each_fault_is_found_though_all_hashes_fit(fault: str, done: Make) -> None:
    change, key, what = FORGERIES[fault]
    model, original = done()
    forge(model, change)
    differences = found_in(model, original)
    assert [difference.key for difference in differences] == [key] * (2 if fault in FOUND_TWICE else 1)
    assert any(what in difference.what for difference in differences), differences


def test_a_codebook_said_to_be_as_before_fine_tuning_must_be(done: Make) -> None:
    model, original = done(None, FineTune(steps=3, batch_size=16, lr=30.0))
    assert metadata_of(model)[PREFIX + "kept"] == "before"
    forge(model, another_code)
    assert keys_found_in(model, original) == {CODEBOOK}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_flag_that_says_not_initialised_is_found(dtype: torch.dtype, done: Make) -> None:
    flag = "_vq_vae._embedding.initted"
    model, original = done(**{flag: torch.zeros(1, dtype=dtype)})
    assert load_file(model)[flag].tolist() == [1] and found_in(model, original) == ()
    forge(model, edited(flag, torch.zeros_like))
    assert found_in(model, original) == (Difference(flag, "says that the codebook is not initialized"),)


def test_infinities_that_were_carried_over_are_no_fault(done: Make) -> None:
    assert found_in(*done(mask=torch.full((3,), -torch.inf))) == ()


def test_parameters_that_trained_may_differ_and_no_others(done: Make) -> None:
    model, original = done(Prune(), FineTune(steps=3, batch_size=16, train="decoder"))
    assert UNTOUCHED in json.loads(metadata_of(model)[PREFIX + "trained_tensors"])
    assert found_in(model, original) == ()
    forge(model, edited("_encoder._conv_3.weight", filled(2, 7.0)))
    assert keys_found_in(model, original) == {"_encoder._conv_3.weight"}
    forge(model, edited(UNTOUCHED, lambda t: t * torch.inf))
    assert Difference(UNTOUCHED, "not finite") in found_in(model, original)
    for text in ("{", "[1, 2]"):  # a list of trained tensors that is none permits nothing
        model, original = done(Prune(), FineTune(steps=3, batch_size=16, train="decoder"))
        forge(model, said(trained_tensors=text))
        assert UNTOUCHED in keys_found_in(model, original)
