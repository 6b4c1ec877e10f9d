"""Safetensors files and configs: sound and whole ones only, hashed once, and whether one can be written."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run, contents, same
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from weight_files import CODEBOOK, NEW, STATE, safetensors_bytes, save_pickle

from codebook_tools.checkpoints import hashing
from codebook_tools.checkpoints.config import entry_of, parse_config, with_entries
from codebook_tools.checkpoints.hashing import file_sha256, hash_ahead
from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint, torch_dtype
from codebook_tools.checkpoints.tensors import InMemory
from codebook_tools.checkpoints.write import check_writable, maps_sha256, write_checkpoint
from codebook_tools.errors import CodebookError


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    save_file(STATE, tmp_path / "mixed.safetensors")
    return tmp_path / "mixed.safetensors"


def write(original: Path, output: Path) -> None:
    write_checkpoint(read_checkpoint(original), output, {CODEBOOK: NEW}, {}, {"map": torch.arange(4)}, force=True)


def test_tensors_keep_the_order_of_their_bytes(mixed: Path, tmp_path: Path) -> None:
    write(mixed, tmp_path / "out.safetensors")
    orders = []
    for path in (mixed, tmp_path / "out.safetensors"):
        entries = read_checkpoint(path).entries.values()
        assert [entry.start for entry in entries] == sorted(entry.start for entry in entries)
        orders.append([entry.key for entry in entries if entry.nbytes])
    assert orders[0] == orders[1] != sorted(orders[0])  # the library sorts by dtype first


def test_a_file_that_shrinks_while_it_is_read_is_noticed(mixed: Path) -> None:
    read = read_checkpoint(mixed)
    os.truncate(mixed, mixed.stat().st_size - 4)
    last = list(read.entries)[-1]
    with pytest.raises(CodebookError, match=f"cut short .* {last}"):
        list(read.chunks(last))


def test_a_file_without_metadata_or_tensors_has_empty_ones(tmp_path: Path) -> None:
    for header in (b'{"__metadata__":null}', b"{}"):
        (tmp_path / "empty.safetensors").write_bytes(safetensors_bytes(header.ljust(24)))
        read = read_checkpoint(tmp_path / "empty.safetensors")
        assert read.metadata == {} and read.entries == {}
    with pytest.raises(CodebookError, match=r"dtype F4 .* F32"):
        torch_dtype("F4")


SOUND = safetensors_bytes(b'{"w":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}}'.ljust(64), bytes(256))
UNSOUND: dict[str, tuple[bytes | Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file"),
    "directory": (Path.mkdir, "is a directory"),
    "empty": (b"", "it is empty"),
    "pickle": (lambda path: save_pickle(STATE, path), "a PyTorch pickle"),
    "old pickle": (lambda path: save_pickle(STATE, path, zipped=False), "a PyTorch pickle"),
    "html": (b"\n<!DOCTYPE html><html>404</html>", "HTML"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "truncated": (SOUND[:-10], "truncated"),
    "swollen header": (struct.pack("<Q", 1 << 62) + SOUND[8:], "not a sound safetensors file"),
    "overlap": (SOUND.replace(b"[0,256]", b"[4,256]"), "not a sound safetensors file"),
    "endless side": (SOUND.replace(b"[64]", b"[0,%d]" % 2**63).replace(b"256", b"0"), "not a sound safetensors file"),
    "deep json": (safetensors_bytes(b"[" * 200_000), "not a sound safetensors file"),
    "noise": (bytes(range(256)), "not a sound safetensors file"),
    "name that no file can have": (lambda path: None, "cannot read"),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_an_unsound_file_is_named_and_said_to_be_what_it_is(kind: str, tmp_path: Path) -> None:
    content, message = UNSOUND[kind]
    path = tmp_path / ("x" * (300 if kind.startswith("name") else 1) + ".safetensors")
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(CodebookError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)


def test_the_hash_of_maps_covers_every_number_and_name() -> None:
    maps = {"index_map": torch.tensor([0, -1, 1]), "nearest": torch.tensor([0, 2, 1])}
    moved = {"index_map": maps["nearest"], "nearest": maps["index_map"]}
    other = maps | {"nearest": torch.tensor([0, 2, 0])}
    assert len({maps_sha256(some) for some in (maps, moved, other)}) == 3
    assert maps_sha256(dict(reversed(maps.items()))) == maps_sha256(maps)


def test_an_interruption_leaves_no_partial_file(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(mixed, tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.safetensors"]


def test_a_checkpoint_can_replace_the_file_that_it_is_made_from(mixed: Path) -> None:
    write(mixed, mixed)
    assert all(same(load_file(mixed)[key], tensor) for key, tensor in (STATE | {CODEBOOK: NEW}).items())


# --- whether a place can be written, asked beforehand --------------------------------------------------------------
def test_a_place_that_cannot_be_written_is_refused_beforehand(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "home").mkdir()
    for name, message in (
        ("missing/out.safetensors", r"no such folder: .*missing"),
        ("folder.safetensors", "is a directory"),
        ("home", "is not a directory that codebook-tools wrote"),
        *(("x" * length + ".safetensors", "cannot write in") for length in (228, 238, 288)),  # no room for partial, map
    ):
        with pytest.raises(CodebookError, match=message):
            check_writable(tmp_path / name, force=True)
    assert contents(tmp_path) == {}


def test_the_hash_of_tensors_in_memory_tells_name_dtype_and_shape() -> None:
    ones = torch.ones(2, 3)
    tensors = [("a", ones), ("b", ones), ("a", ones.view(3, 2)), ("a", ones.view(torch.int32)), ("a", 2 * ones)]
    hashes = [Checkpoint(Path("net"), {key: InMemory(key, value)}, {}, ()).sha256 for key, value in tensors]
    assert len(set(hashes)) == len(tensors)


# --- hashes of files that are begun ahead, and never of what is no longer there --------------------------------------
@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are gone through, in order."""
    done, digest = list[Path](), hashing._digest
    monkeypatch.setattr(hashing, "_digest", lambda path: done.append(path) or digest(path))
    return done


def test_a_hash_begun_ahead_is_not_done_again(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "CHUNK", 5)
    for size in (0, 1, 10, 11):
        path, expected = tmp_path / str(size), hashlib.sha256(bytes(range(size))).hexdigest()
        path.write_bytes(bytes(range(size)))
        assert file_sha256(path) == expected
        hash_ahead([path])
        assert file_sha256(path) == expected and hashed.count(path) == 2
        assert file_sha256(path) == expected and hashed.count(path) == 3


def test_a_file_that_changed_or_went_away_since_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    os.utime(path, ns=(0, 0))
    hash_ahead([path])
    path.write_bytes(b"behind")
    assert file_sha256(path) == hashlib.sha256(b"behind").hexdigest()
    hash_ahead([path])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file_sha256(path)


def test_a_surgery_without_a_network_hashes_its_model_once(tiny: Path, codebook: Run, hashed: list[Path]) -> None:
    assert codebook("quantize", tiny, "--k", 8).exit_code == 0
    assert hashed == [tiny]


# --- single entries of a config, read and set, and its text else left as it stands -----------------------------------
def test_an_entry_has_a_dotted_key_and_is_none_where_it_is_missing() -> None:
    config = {"k": 3, "vq_config": {"num_embeddings": 16, "deep": {"er": [1]}}, "none": None}
    keys = ("k", "vq_config.num_embeddings", "vq_config.deep.er")
    assert [entry_of(config, key) for key in keys] == [3, 16, [1]]
    assert [entry_of(config, key) for key in ("x", "vq_config.x", "k.x", "none", "none.x", "")] == [None] * 6


@pytest.mark.parametrize(
    ("text", "key", "value", "expected"),
    [
        ('{\n\t"a": NaN,\n\t"k" : 16\n}', "k", 8, '{\n\t"a": NaN,\n\t"k" : 8\n}'),
        ('{"k": 8.0}', "k", 8, '{"k": 8}'),
        ('{"k": true}', "k", 1, '{"k": 1}'),
        ('{"k":16,"b":[1, 2]}', "k", 8, '{"k":8,"b":[1, 2]}'),
        ('{"a": Infinity, "k": 1, "b": -Infinity}', "k", 8, '{"a": Infinity, "k": 8, "b": -Infinity}'),
        ('{"a": {"k": 16}, "k": 16}', "k", 8, '{"a": {"k": 16}, "k": 8}'),
        ('{"a": {"k": 16}, "k": 16}', "a.k", 8, '{"a": {"k": 8}, "k": 16}'),
        ('{"b": "\\"k\\": 16, {[", "k": 16}', "k", 8, '{"b": "\\"k\\": 16, {[", "k": 8}'),
        ('{"\\u006b": 16}', "k", 8, '{"\\u006b": 8}'),  # the same name, spelt otherwise
        ('{"k": 1, "k": 2}', "k", 8, '{"k": 1, "k": 8}'),  # the last of a name is the one that counts
        (' \r\n{ "k"\t:\r\n16 \r\n,"b" :{ } }\r\n', "k", 8, ' \r\n{ "k"\t:\r\n8 \r\n,"b" :{ } }\r\n'),
        ('{"k": "16"}', "k", 8, '{"k": 8}'),
        ('{"r": [\n  1.5,\n  3.0\n ], "k": 1}', "r", [1.2, 2.4], '{"r": [\n  1.2,\n  2.4\n ], "k": 1}'),
        ('{"r": [1.5, [3, 4]]}', "r", [1.5, [3, 5]], '{"r": [1.5, [3, 5]]}'),
        ('{"r": [1.5, 3.0]}', "r", [2.0], '{"r": [2.0]}'),
        ('{"r": []}', "r", [2.0], '{"r": [2.0]}'),
        ('{"a": 1}', "k", 8, '{\n  "a": 1,\n  "k": 8\n}\n'),
        ('{"a": {"b": 1}}', "a.k", 8, '{\n  "a": {\n    "b": 1,\n    "k": 8\n  }\n}\n'),
        ("{}", "a.k", 8, '{\n  "a": {\n    "k": 8\n  }\n}\n'),
        ('\ufeff{"n": "Ünal", "k": 1}', "k", 8, '\ufeff{"n": "Ünal", "k": 8}'),
    ],
)
def test_one_entry_is_set_and_the_rest_left_as_it_was(text: str, key: str, value: object, expected: str) -> None:
    assert with_entries(text.encode(), {key: value}).decode() == expected
    assert with_entries(expected.encode(), {key: value}).decode() == expected


def test_several_entries_are_set_at_once_in_the_encoding_of_the_text() -> None:
    text = '{"vq": {"k": 1, "r": [1, 2]}, "n": 3}'
    changed = with_entries(text.encode("utf-16"), {"vq.k": 10, "n": 30, "vq.r": [1.25, 2.5]})
    assert changed == '{"vq": {"k": 10, "r": [1.25, 2.5]}, "n": 30}'.encode("utf-16")
    assert with_entries(text.encode(), {}) == text.encode()


def test_a_key_that_leads_through_a_number_and_a_file_without_an_object_are_refused(tmp_path: Path) -> None:
    for text in ('{"a": 3}', '{"a": [1]}', '{"a": null}', '{"a": "text"}'):
        with pytest.raises(CodebookError, match=r"no place for k: .* is no object"):
            with_entries(text.encode(), {"a.k": 8})
    for text, message in (("{", "is no JSON"), ("[]", "holds a JSON list"), ("[" * 99999, "is no JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CodebookError, match=message):
            parse_config(tmp_path / "config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(config=st.dictionaries(st.text(max_size=3), JSON, max_size=4), value=JSON, indent=st.sampled_from([None, 0, 3]))
def test_any_entry_of_any_config_can_be_set(config: dict[str, object], value: object, indent: int | None) -> None:
    for key in config:
        if "." not in key:
            text = json.dumps(config, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
            edited = json.loads(with_entries(text, {key: value}))
            assert edited == {**config, key: value} and list(edited) == list(config)
