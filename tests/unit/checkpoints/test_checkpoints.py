"""Reading and writing checkpoints: sound files only, whole files only, and nothing else touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from codebook_tools.checkpoints import tensors
from codebook_tools.checkpoints import write as writing
from codebook_tools.checkpoints.read import read_checkpoint, torch_dtype
from codebook_tools.checkpoints.write import (
    check_writable,
    index_map_path,
    maps_sha256,
    partial_path,
    tensor_bytes,
    write_checkpoint,
)
from codebook_tools.errors import CodebookError, VerificationError

MIXED: State = {
    "b.weight": torch.linspace(-1, 1, 35).reshape(5, 7),
    "a.half": torch.linspace(-1, 1, 6).half(),
    "a.brain": torch.linspace(-1, 1, 3).bfloat16(),
    "count": torch.tensor(7),
    "flag": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 4),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.safetensors"
    save_file(MIXED, path, {"format": "pt", "author": "A. Ünal", "step": "7"})
    return path


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, by its specification: 8 bytes of length, JSON, data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def stored_bytes(path: Path, key: str) -> bytes:
    header, data = header_of(path)
    start, end = header[key]["data_offsets"]
    return data[start:end]


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_the_safetensors_library_reads_it(mixed: Path) -> None:
    found = read_checkpoint(mixed)
    assert found.metadata == {"format": "pt", "author": "A. Ünal", "step": "7"}
    assert found.shapes == {key: tuple(tensor.shape) for key, tensor in MIXED.items()}
    assert all(torch_dtype(found.dtypes[key]) == tensor.dtype for key, tensor in MIXED.items())
    assert all(same(found.tensor(key), tensor) for key, tensor in MIXED.items())
    assert all(same(tensor, MIXED[key]) for key, tensor in found.tensors().items())
    assert found.sha256 == hashlib.sha256(mixed.read_bytes()).hexdigest()


def test_entries_come_in_the_order_of_their_bytes(mixed: Path) -> None:
    starts = [entry.start for entry in read_checkpoint(mixed).entries.values()]
    assert starts == sorted(starts)
    assert list(read_checkpoint(mixed).entries) != sorted(MIXED)  # the library sorts by dtype first


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_chunks_joined_are_the_stored_bytes(mixed: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    found = read_checkpoint(mixed)
    for key, tensor in MIXED.items():
        chunks = list(found.chunks(key))
        assert all(len(part) <= chunk for part in chunks)
        assert b"".join(chunks) == tensor_bytes(tensor) == stored_bytes(mixed, key)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(mixed: Path) -> None:
    found = read_checkpoint(mixed)
    os.truncate(mixed, mixed.stat().st_size - 4)
    last = list(found.entries)[-1]
    with pytest.raises(CodebookError, match=f"cut short .* {last}"):
        list(found.chunks(last))


@pytest.mark.parametrize("header", ['{"__metadata__":null}', "{}"])
def test_a_file_without_metadata_or_tensors_has_empty_ones(tmp_path: Path, header: str) -> None:
    path = tmp_path / "empty.safetensors"
    padded = header.encode().ljust(24)
    path.write_bytes(struct.pack("<Q", len(padded)) + padded)
    found = read_checkpoint(path)
    assert found.metadata == {} and found.entries == {}


def unsound(kind: str, path: Path) -> Path:
    """Make a file (or none, or a folder) at `path` that is no sound checkpoint."""
    if kind == "pickle":
        torch.save(MIXED, path)
    elif kind == "old pickle":
        torch.save(MIXED, path, _use_new_zipfile_serialization=False)
    elif kind == "directory":
        path.mkdir()
    elif kind in ("truncated", "swollen header", "overlap"):
        save_file({"w": torch.arange(64.0)}, path)
        content = path.read_bytes()
        if kind == "truncated":
            path.write_bytes(content[:-10])
        elif kind == "swollen header":
            path.write_bytes(struct.pack("<Q", 1 << 62) + content[8:])
        else:
            path.write_bytes(content.replace(b"[0,256]", b"[4,256]"))
    elif kind != "missing":
        path.write_bytes(
            {
                "empty": b"",
                "html": b"\n<!DOCTYPE html><html>404</html>",
                "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
                "deep json": struct.pack("<Q", 200_000) + b"[" * 200_000,
                "noise": bytes(range(256)),
            }[kind]
        )
    return path


UNSOUND = {
    "missing": "no such file",
    "directory": "is a directory",
    "empty": "it is empty",
    "pickle": "a PyTorch pickle",
    "old pickle": "a PyTorch pickle",
    "html": "HTML",
    "lfs pointer": "git lfs pull",
    "truncated": "truncated",
    "swollen header": "not a sound safetensors file",
    "overlap": "not a sound safetensors file",
    "deep json": "not a sound safetensors file",
    "noise": "not a sound safetensors file",
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_an_unsound_file_is_named_and_said_to_be_what_it_is(kind: str, tmp_path: Path) -> None:
    path = unsound(kind, tmp_path / "model.safetensors")
    with pytest.raises(CodebookError, match=UNSOUND[kind]) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)


def test_a_name_that_no_file_can_have_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(CodebookError, match="cannot read"):
        read_checkpoint(tmp_path / ("x" * 300))


def test_dtypes_that_torch_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(CodebookError, match=r"dtype F4 .* F32"):
        torch_dtype("F4")


# --- writing -------------------------------------------------------------------------------------------------------

MAPS = {"b.weight/index_map": torch.tensor([0, -1, 1, -1, 2]), "b.weight/nearest": torch.tensor([0, 2, 1, 0, 2])}
NEW = torch.linspace(0, 1, 21).reshape(3, 7)


def write(original: Path, output: Path) -> Path:
    return write_checkpoint(read_checkpoint(original), output, {"b.weight": NEW}, {"kept": "surgery"}, MAPS, force=True)


def test_what_is_not_changed_stays_byte_for_byte_and_where_it_was(mixed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    write(mixed, output)
    loaded = load_file(output)
    assert loaded.keys() == MIXED.keys()
    assert same(loaded["b.weight"], NEW)
    for key in MIXED.keys() - {"b.weight"}:
        assert stored_bytes(output, key) == stored_bytes(mixed, key)
        assert loaded[key].dtype == MIXED[key].dtype and loaded[key].shape == MIXED[key].shape
    places = [[key for key, e in read_checkpoint(path).entries.items() if e.end > e.start] for path in (mixed, output)]
    assert places[0] == places[1]


def test_metadata_are_kept_and_ours_are_added_under_their_prefix(mixed: Path, tmp_path: Path) -> None:
    write(mixed, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata == {"format": "pt", "author": "A. Ünal", "step": "7", "codebook_tools.kept": "surgery"}


def test_the_format_entry_that_transformers_wants_is_added_where_it_is_missing(tmp_path: Path) -> None:
    save_file({"b.weight": torch.zeros(5, 7)}, tmp_path / "bare.safetensors")
    write(tmp_path / "bare.safetensors", tmp_path / "out.safetensors")
    assert read_checkpoint(tmp_path / "out.safetensors").metadata["format"] == "pt"


def test_the_header_is_sorted_and_padded_to_eight_bytes(mixed: Path, tmp_path: Path) -> None:
    write(mixed, tmp_path / "out.safetensors")
    for path in (tmp_path / "out.safetensors", tmp_path / "out.index_map.safetensors"):
        header, _ = header_of(path)
        keys = [key for key in header if key != "__metadata__"]
        assert keys == sorted(keys)
        assert list(header["__metadata__"]) == sorted(header["__metadata__"])
        assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


def test_the_same_work_gives_the_same_bytes_whatever_the_order_of_its_parts(mixed: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(mixed)
    changed = {"b.weight": NEW, "flag": torch.tensor([True] * 3)}
    for name, turn in (("one", list), ("two", lambda items: list(items)[::-1])):
        write_checkpoint(
            checkpoint,
            tmp_path / f"{name}.safetensors",
            dict(turn(changed.items())),
            dict(turn({"a": "1", "b": "2"}.items())),
            dict(turn(MAPS.items())),
        )
    for ending in (".safetensors", ".index_map.safetensors"):
        assert (tmp_path / f"one{ending}").read_bytes() == (tmp_path / f"two{ending}").read_bytes()


def test_the_index_map_lies_beside_its_checkpoint_and_carries_its_hash(mixed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    assert write(mixed, output) == tmp_path / "out.index_map.safetensors" == index_map_path(output)
    with safe_open(index_map_path(output), "pt") as file:
        metadata = file.metadata()
    assert metadata["codebook_tools.checkpoint_sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    loaded = load_file(index_map_path(output))
    assert loaded.keys() == MAPS.keys() and all(same(loaded[key], MAPS[key]) for key in MAPS)


def test_the_hash_of_maps_sees_every_number_and_name() -> None:
    moved = {"b.weight/index_map": MAPS["b.weight/nearest"], "b.weight/nearest": MAPS["b.weight/index_map"]}
    other = MAPS | {"b.weight/nearest": torch.tensor([0, 2, 1, 0, 1])}
    assert len({maps_sha256(maps) for maps in (MAPS, moved, other)}) == 3
    assert maps_sha256(dict(reversed(MAPS.items()))) == maps_sha256(MAPS)


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


@st.composite
def states(draw: Callable[..., Any]) -> State:
    keys = draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, unique=True))
    state = {}
    for key in keys:
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(len(state)))
        state[key] = tensor.to(draw(st.sampled_from(DTYPES)))
    return state


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=states(), rows=st.integers(0, 5))
def test_any_checkpoint_with_any_tensor_replaced_is_read_back_by_the_library(
    state: State, rows: int, tmp_path: Path
) -> None:
    if "__metadata__" in state:
        return
    save_file(state, tmp_path / "in.safetensors", {"format": "pt"})
    changed = next(iter(state))
    new = torch.ones(rows, 3).to(state[changed].dtype)
    write_checkpoint(
        read_checkpoint(tmp_path / "in.safetensors"), tmp_path / "out.safetensors", {changed: new}, {}, {}, force=True
    )
    loaded = load_file(tmp_path / "out.safetensors")
    assert loaded.keys() == state.keys()
    assert all(same(loaded[key], state[key] if key != changed else new) for key in state)


def damage_when_flushed(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A disk that damages the last byte of the file, or one of its metadata, or is full."""

    def fsync(handle: int) -> None:
        if what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.lseek(handle, os.fstat(handle).st_size - 1 if what == "data" else 60, os.SEEK_SET)
        os.write(handle, b"\x7f")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    ("what", "kind"), [("data", VerificationError), ("metadata", VerificationError), ("full", CodebookError)]
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fails_leaves_nothing_new_and_what_was_there(
    what: str, kind: type[CodebookError], existing: bool, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.safetensors"
    if existing:
        output.write_bytes(b"the old one")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    damage_when_flushed(monkeypatch, what)
    with pytest.raises(kind) as error:
        write(mixed, output)
    assert str(output) in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interruption_while_the_files_are_put_in_place_leaves_no_partial_file(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(mixed, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.safetensors"]


def test_a_checkpoint_can_replace_the_file_that_it_is_made_from(mixed: Path) -> None:
    untouched = {key: stored_bytes(mixed, key) for key in MIXED.keys() - {"b.weight"}}
    write(mixed, mixed)
    assert {key: stored_bytes(mixed, key) for key in untouched} == untouched
    assert same(load_file(mixed)["b.weight"], NEW)


# --- whether a place can be written, asked beforehand --------------------------------------------------------------


def test_a_free_place_is_writable_and_asking_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "out.safetensors", force=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.safetensors", "out.index_map.safetensors"])
def test_neither_checkpoint_nor_index_map_is_overwritten_without_force(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(CodebookError, match=rf"{name} exists; --force"):
        check_writable(tmp_path / "out.safetensors", force=False)
    check_writable(tmp_path / "out.safetensors", force=True)
    assert (tmp_path / name).read_bytes() == b"precious"


def test_a_missing_folder_and_a_folder_in_the_way_are_named(tmp_path: Path) -> None:
    with pytest.raises(CodebookError, match=r"no such folder: .*missing"):
        check_writable(tmp_path / "missing" / "out.safetensors", force=False)
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises(CodebookError, match="is a directory"):
        check_writable(tmp_path / "out.safetensors", force=True)


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    # the superuser, whom CI may run as, could write in any folder
    monkeypatch.setattr(writing, "TemporaryFile", refuse)
    with pytest.raises(CodebookError, match=f"cannot write in .*{os.strerror(errno.EACCES)}; .*--output"):
        check_writable(tmp_path / "out.safetensors", force=False)


@pytest.mark.parametrize("length", [240, 250, 300])
def test_a_name_too_long_for_the_file_the_map_or_the_partial_is_found_before_the_work(
    tmp_path: Path, length: int
) -> None:
    name = "x" * (length - len(".safetensors")) + ".safetensors"
    with pytest.raises(CodebookError, match="cannot write in"):
        check_writable(tmp_path / name, force=False)
    assert list(tmp_path.iterdir()) == []


def test_partial_files_lie_in_the_folder_of_the_output(tmp_path: Path) -> None:
    assert partial_path(tmp_path / "a.safetensors") == tmp_path / "a.safetensors.codebook.partial"
