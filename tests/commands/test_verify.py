"""Verification: a sound file passes, and each single fault is found, also where the hashes were forged to fit it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, WriteModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.sealed_file import SEAL, sealed
from codebook_tools.checkpoints.write import index_map_path
from codebook_tools.codebook import Strategy
from codebook_tools.errors import CodebookError
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Prune, Refit
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.operate import operate
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.verify import Difference, verify_checkpoint

SIZES, SUMS = "_vq_vae._ema_cluster_size", "_vq_vae._ema_w"
UNTOUCHED = "_decoder._conv_1.weight"
INDEX_MAP, NEAREST = f"{CODEBOOK}/index_map", f"{CODEBOOK}/nearest"
PREFIX = "codebook_tools."
Make = Callable[..., tuple[Path, Path]]
SHORT = FineTune(steps=3, batch_size=16)


@pytest.fixture
def done(write_model: WriteModel, images_folder: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """done(): a checkpoint pruned of its dead codes, and the original that it was made from."""

    def make(
        strategy: Strategy | None = Prune(),  # noqa: B008
        recipe: FineTune = FineTune(steps=0),  # noqa: B008
        variant: str = "ema",
        state: State | None = None,
    ) -> tuple[Path, Path]:
        original, output = write_model(variant, state=state), tmp_path / "out.safetensors"
        command = type(strategy).__name__.lower() if strategy else "finetune"
        asked = Request(model=original, data=(str(images_folder),), input_range=(-1.0, 1.0), output=output, force=True)
        operate(command, asked, strategy, recipe, Watch())
        return output, original

    return make


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def forge(
    model: Path, change: Callable[[State, dict[str, str]], object], maps: Callable[[State], object] | None = None
) -> None:
    """Rewrite a checkpoint, its map where `maps` is given, and every hash with them: only the fault itself is left."""
    tensors, metadata = load_file(model), metadata_of(model)
    change(tensors, metadata)
    save_file(tensors, model, metadata)
    map_path = index_map_path(model)
    entries, of_map = load_file(map_path), metadata_of(map_path)
    if maps is not None:
        maps(entries)
    of_map[PREFIX + "checkpoint_sha256"] = hashlib.sha256(model.read_bytes()).hexdigest()
    save_file(entries, map_path, sealed(entries, {name: value for name, value in of_map.items() if name != SEAL}))


def keep(tensors: State, metadata: dict[str, str]) -> None:
    """Change nothing."""


def found_in(model: Path, original: Path, **more: Any) -> tuple[Difference, ...]:
    return verify_checkpoint(model, original, **more).differences


# --- what is sound -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "recipe"), [(Prune(), FineTune(steps=0)), (Refit(20, init="random"), SHORT), (None, SHORT)], ids=str
)
def test_what_the_package_writes_is_sound(strategy: Strategy | None, recipe: FineTune, done: Make) -> None:
    found = verify_checkpoint(*done(strategy, recipe))
    assert found.ok and found.to_json() == {"ok": True, "differences": []}


def test_a_map_that_lies_elsewhere_is_read_where_it_is_said_to_lie(done: Make, tmp_path: Path) -> None:
    model, original = done()
    moved = index_map_path(model).rename(tmp_path / "elsewhere.safetensors")
    assert found_in(model, original, maps=[moved]) == ()
    with pytest.raises(CodebookError, match=r"no such file: .*out\.index_map"):
        verify_checkpoint(model, original)


# --- damage --------------------------------------------------------------------------------------------------------


def flipped(path: Path, key: str) -> None:
    """One bit in the first number of a tensor."""
    content = bytearray(path.read_bytes())
    content[read_checkpoint(path).entries[key].start + 1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("key", [UNTOUCHED, SUMS])
def test_one_flipped_bit_of_the_checkpoint_is_found(key: str, done: Make) -> None:
    model, original = done(Refit(6))
    flipped(model, key)
    differences = found_in(model, original)
    what = "out.index_map.safetensors belongs to another checkpoint, or one of the two is damaged"
    assert Difference("__metadata__", what) in differences
    assert (UNTOUCHED in {difference.key for difference in differences}) == (key == UNTOUCHED)


def test_one_flipped_bit_of_the_map_is_found(done: Make) -> None:
    model, original = done(Refit(6))
    flipped(index_map_path(model), NEAREST)
    assert Difference("__metadata__", "out.index_map.safetensors is damaged") in found_in(model, original)


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


def test_another_original_is_found(done: Make, write_model: WriteModel, variants: dict[str, State]) -> None:
    model, _ = done()
    other = write_model(name="other", state=variants["ema"] | {UNTOUCHED: variants["ema"][UNTOUCHED] + 1})
    found = found_in(model, other)
    assert Difference("__metadata__", "other.safetensors is not the file that the surgery was done on") in found
    assert UNTOUCHED in {difference.key for difference in found}


def test_the_map_of_another_surgery_is_found(done: Make, tmp_path: Path) -> None:
    model, _ = done(Prune(keep=5))
    other = index_map_path(model).rename(tmp_path / "other.safetensors")
    model, original = done(Prune())
    found = found_in(model, original, maps=[other])
    assert {difference.key for difference in found} == {"__metadata__", CODEBOOK}
    assert "other.safetensors belongs to another checkpoint" in found[0].what


# --- forgeries: every hash fits ------------------------------------------------------------------------------------


def set_row(key: str) -> Callable[[State, dict[str, str]], object]:
    return lambda tensors, _: tensors[key].__setitem__(2, 7.0)


def another_code(tensors: State, _: dict[str, str]) -> None:
    """A code and its running sum, which goes with it."""
    tensors[CODEBOOK][2] = 7.0
    tensors[SUMS][2] = 7.0 * tensors[SIZES][2]


def removed(key: str) -> Callable[[State, dict[str, str]], object]:
    return lambda tensors, _: tensors.pop(key)


def put(key: str, make: Callable[[State], torch.Tensor]) -> Callable[[State, dict[str, str]], object]:
    return lambda tensors, _: tensors.__setitem__(key, make(tensors))


FORGERIES: dict[str, tuple[Callable[[State, dict[str, str]], object], str, str]] = {
    "an untouched tensor": (set_row(UNTOUCHED), UNTOUCHED, "changed, though nothing says that it was trained"),
    "a code": (another_code, CODEBOOK, "the codes are not the original's that the index map says were kept"),
    "sums that do not follow": (set_row(SUMS), SUMS, "does not belong to the codes"),
    "sizes that do not follow": (set_row(SIZES), SUMS, "does not belong to the codes"),
    "a missing layer": (removed(UNTOUCHED), UNTOUCHED, "missing"),
    "a missing codebook": (removed(CODEBOOK), CODEBOOK, "missing"),
    "missing sums": (removed(SUMS), SUMS, "missing"),
    "a tensor more": (put("extra", lambda _: torch.ones(2)), "extra", "not in the original"),
    "another dtype": (put(UNTOUCHED, lambda t: t[UNTOUCHED].half()), UNTOUCHED, "dtype F16 instead of F32"),
    "another shape": (put(UNTOUCHED, lambda t: t[UNTOUCHED][:1].clone()), UNTOUCHED, "shape (1, 4, 3, 3) instead"),
    "sums of the old size": (put(SUMS, lambda _: torch.ones(16, 4)), SUMS, "shape (16, 4) does not follow 10 codes"),
    "sizes of the old size": (put(SIZES, lambda _: torch.ones(16)), SIZES, "shape (16,) does not follow 10 codes"),
    "sums that are not finite": (put(SUMS, lambda t: t[SUMS] * torch.nan), SUMS, "not finite"),
    "a codebook of another dimension": (
        put(CODEBOOK, lambda t: t[CODEBOOK][:, :3].clone()), CODEBOOK, "shape (10, 3), of which only axis 0 may differ",
    ),
    "metadata that were changed": (lambda _, m: m.update(note="mine"), "__metadata__", "entry note was not kept"),
    "another source": (lambda _, m: m.update({PREFIX + "source_sha256": "0"}), "__metadata__", "is not the file that"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FORGERIES)
def test_each_fault_of_a_checkpoint_is_found_though_its_hashes_fit(fault: str, done: Make) -> None:
    change, key, what = FORGERIES[fault]
    model, original = done()
    forge(model, change)
    differences = found_in(model, original)
    assert any(what in difference.what for difference in differences), differences
    assert {difference.key for difference in differences} == {key}


def first(key: str, value: int) -> Callable[[State], object]:
    return lambda maps: maps[key].__setitem__(0, value)


MAP_FAULTS: dict[str, tuple[Callable[[State], object], str, str]] = {
    "a code past the end": (first(INDEX_MAP, 10), INDEX_MAP, "an entry outside -1 to 9"),
    "nearest to nothing": (first(NEAREST, -1), NEAREST, "an entry outside 0 to 9"),
    "a wrong identity": (lambda m: [m[k].__setitem__(0, 3) for k in m], CODEBOOK, "the codes are not the original's"),
    "an identity lost": (first(INDEX_MAP, -1), CODEBOOK, "the codes are not the original's"),
    "identity and nearest at odds": (first(NEAREST, 3), NEAREST, "kept its identity is not its own nearest"),
    "too short": (lambda m: m.__setitem__(NEAREST, m[NEAREST][:9].clone()), NEAREST, "shape (9,) for 16 old codes"),
    "no nearest": (lambda m: m.pop(NEAREST), INDEX_MAP, "does not hold"),
    "another dtype": (lambda m: m.__setitem__(NEAREST, m[NEAREST].int()), INDEX_MAP, "int64, of each codebook"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MAP_FAULTS)
def test_each_fault_of_a_map_is_found_though_its_hashes_fit(fault: str, done: Make) -> None:
    maps, key, what = MAP_FAULTS[fault]
    model, original = done()
    forge(model, keep, maps)
    (found,) = found_in(model, original)
    assert found.key == key and what in found.what


def test_a_codebook_said_to_be_as_before_fine_tuning_must_be(done: Make) -> None:
    model, original = done(None, FineTune(steps=3, batch_size=16, lr=30.0))
    assert metadata_of(model)[PREFIX + "kept"] == "before"
    forge(model, another_code)
    assert {difference.key for difference in found_in(model, original)} == {CODEBOOK}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_flag_that_says_not_initialised_is_found(dtype: torch.dtype, done: Make, variants: dict[str, State]) -> None:
    flag = "_vq_vae._embedding.initted"
    model, original = done(state=variants["plain"] | {flag: torch.zeros(1, dtype=dtype)})
    assert load_file(model)[flag].tolist() == [1] and found_in(model, original) == ()
    forge(model, put(flag, lambda t: torch.zeros_like(t[flag])))
    assert found_in(model, original) == (Difference(flag, "says that the codebook is not initialized"),)


def test_parameters_that_trained_may_differ_and_no_others(done: Make) -> None:
    model, original = done(Prune(), FineTune(steps=3, batch_size=16, train="decoder"))
    assert UNTOUCHED in json.loads(metadata_of(model)[PREFIX + "trained_tensors"])
    assert found_in(model, original) == ()
    forge(model, set_row("_encoder._conv_3.weight"))
    assert [difference.key for difference in found_in(model, original)] == ["_encoder._conv_3.weight"]
    forge(model, put(UNTOUCHED, lambda t: t[UNTOUCHED] * torch.inf))
    assert Difference(UNTOUCHED, "not finite") in found_in(model, original)


@pytest.mark.parametrize("text", ["{", "[1, 2]"])
def test_a_list_of_trained_tensors_that_is_none_permits_nothing(text: str, done: Make) -> None:
    model, original = done(Prune(), FineTune(steps=3, batch_size=16, train="decoder"))
    forge(model, lambda _, metadata: metadata.update({PREFIX + "trained_tensors": text}))
    assert UNTOUCHED in {difference.key for difference in found_in(model, original)}


def test_infinities_of_a_tensor_that_was_carried_over_are_no_fault(done: Make, variants: dict[str, State]) -> None:
    assert found_in(*done(state=variants["plain"] | {"mask": torch.full((3,), -torch.inf)})) == ()


# --- what cannot be verified at all --------------------------------------------------------------------------------


def test_a_file_that_the_package_did_not_write_cannot_be_verified(done: Make) -> None:
    model, original = done()
    with pytest.raises(CodebookError, match="says nothing of a surgery"):
        verify_checkpoint(original, original, [index_map_path(model)])


def test_an_original_without_the_codebook_is_none(done: Make, write_model: WriteModel) -> None:
    model, _ = done()
    other = write_model(name="other", state={"a.weight": torch.ones(3, 3)})
    with pytest.raises(CodebookError, match=r"has no _vq_vae\._embedding\.weight.*not the original"):
        verify_checkpoint(model, other)
