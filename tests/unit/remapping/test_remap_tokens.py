"""Stored tokens follow an index map: exactly, in place, streamed, and as a reference in plain Python says."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import KEY, Outcome, Patch, Run, WriteMap, assert_refused, contents, save_map
from drawing import SPARSE, sparse_tar, tar_of
from hypothesis import given
from hypothesis import strategies as st
from index_maps import index_maps
from numpy.typing import ArrayLike
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.read import file_sha256
from codebook_tools.checkpoints.sealed_file import sealed
from codebook_tools.codebook import REMOVED
from codebook_tools.errors import CodebookError
from codebook_tools.remapping.index_map import IndexMap, read_index_maps
from codebook_tools.remapping.token_files import rewrite_tokens
from codebook_tools.remapping.token_ids import OnRemoved, Translation

Save = Callable[..., Path]


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """Six codes, of which 1 and 4 were removed; they are nearest to the new codes 0 and 3."""
    return save_map(tmp_path / "map.safetensors", {KEY: ([0, -1, 1, 2, -1, 3], [0, 0, 1, 2, 3, 3])})


@pytest.fixture
def remap(codebook: Run) -> Run:
    """remap(path, map, *options): the command, which may replace its output."""
    return lambda path, map_path, *options: codebook("remap", path, "--map", map_path, "--force", *options)


@pytest.fixture
def tokens(tmp_path: Path) -> Save:
    """tokens([[0, 1]], np.int8): a .npy file."""

    def write(values: ArrayLike, dtype: Any = None) -> Path:
        np.save(path := tmp_path / "tokens.npy", np.asarray(values, dtype))
        return path

    return write


def npy(values: list[int]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([values], np.uint16))
    return file.getvalue()


def written(path: Path) -> Any:
    return np.load(path.with_name("tokens.remapped.npy"))


@pytest.mark.parametrize(
    ("dtype", "order"), [("u1", "C"), ("<i2", "F"), (">i2", "C"), ("u4", "F"), ("<i8", "C"), (">u8", "F")]
)
def test_an_array_keeps_dtype_order_and_shape(remap: Run, pruned: Path, tokens: Save, dtype: str, order: Any) -> None:
    path = tokens(np.asarray([[0, 2, 3], [5, 5, 0]], dtype=dtype, order=order))
    output = path.with_name("tokens.remapped.npy")
    assert remap(path, pruned, "--json").json == {
        "tokens": 6, "changed": 4, "removed": 0, "nearest": 0, "outputs": {str(path): str(output)}, "warnings": [],
        "next_step": None,
    }  # fmt: skip
    new = written(path)
    assert new.tolist() == [[0, 1, 2], [3, 3, 0]]
    assert new.dtype == np.dtype(dtype) and new.flags.f_contiguous == (order == "F")
    assert output.stat().st_size == path.stat().st_size


@pytest.mark.parametrize(("values", "options", "message"), [
    ([[0, 2], [1, 4]], (), "at [1, 0]: token 1 is a code that was removed; --on-removed nearest"),
    ([[0, 2], [1, 6]], (), "at [1, 1]: token 6 is not within 0 and 5"),
    ([[0, -3], [1, 6]], (), "at [0, 1]: token -3 is not within 0 and 5"),
    ([[0, 8], [9, 6]], ("--offset", 2), "at [0, 1]: token 8 is not within 0 and 7"),
    ([[0, 1]], ("--on-removed", "mask=300"), "at [0, 1]: token 1 becomes 300, for which int8 has no room"),
    ([[0, 1]], ("--on-removed", "drop"), "--on-removed drop: expected error, nearest, or mask=ID"),
    ([[0, 1]], ("--on-removed", "mask=9999999999999999999"), "expected error, nearest, or mask=ID"),
    ([[0, 1]], ("--offset", -1), "offset=-1 is not within 0 and 4294967296"),
    ([[0, 1]], ("--special", 10**24), "is not within 0 and 4294967296"),
    ([[0, 1]], ("--pad-to-multiple", 10**12), "pad-to-multiple=1000000000000 is not within 1 and 1048576"),
    ([[0, 2]], ("--axis", 2), "has shape (1, 2) and no axis 2"),
    ([[0, 2]], ("--axis", 1), "has 2 codebooks along axis 1 and the map 1"),
    ([[0, 2]], ("--codebook-key", "other"), "has no map of other; it maps quantizer.codebook.weight"),
    ([[0, 2]], ("-o", "x.tar"), "x.tar does not end in .npy"),
    ([[0, 2]], ("-o", "nowhere/x.npy"), "no such folder: nowhere"),
    (np.array([{}, []], dtype=object), (), "holds pickled objects, which are never opened"),
    (np.zeros(3, np.float32), (), "holds float32; tokens are integers"),
    (np.zeros(3, bool), (), "holds bool; tokens are integers"),
])  # fmt: skip
def test_what_is_refused(remap: Run, pruned: Path, tokens: Save, values: Any, options: Any, message: str) -> None:
    path = tokens(values, np.int8 if isinstance(values, list) else None)
    before = contents(path.parent)
    assert_refused(remap(path, pruned, *options), message)
    assert contents(path.parent) == before, "no output and no partial"


@pytest.mark.parametrize(("name", "content", "message"), [
    ("tokens.npy", b"PK\x03\x04 rather a zip", "is not a sound .npy file"),
    ("tokens.npy", npy([0] * 100)[:-1], "is cut short: its header says 100 ids"),
    ("tokens.npz", b"PK", "holds neither tokens (.jsonl, .npy, .parquet, .safetensors, .tar) nor a prior's weights"),
    ("tokens.tar", b"\x1f\x8b no tar", "is not a readable, uncompressed tar"),
    ("tokens.parquet", b"PAR1 cut off", "is not a sound parquet file"), ("tokens.npy", None, "no such file"),
])  # fmt: skip
def test_damaged_and_other_files_are_refused(remap: Run, pruned: Path, name: str, content: Any, message: str) -> None:
    path = pruned.with_name(name)
    if content is not None:
        path.write_bytes(content)
    assert_refused(remap(path, pruned), message)


def test_a_long_file_is_rewritten_in_chunks_that_meet(remap: Run, pruned: Path, tokens: Save) -> None:
    values = np.random.default_rng(0).choice(np.array([0, 2, 3, 5], np.uint16), (3, 1_000_001))
    path = tokens(values)
    assert remap(path, pruned).exit_code == 0
    assert np.array_equal(written(path), np.array([0, 99, 1, 2, 99, 3], np.uint16)[values])
    chunks = rewrite_tokens(path, Translation(read_index_maps([pruned])), (), None)
    assert max(map(len, chunks)) <= 1 << 21, "memory does not grow with the file"
    values[2, 345_678] = 77
    assert_refused(remap(tokens(values), pruned), "tokens.npy at [2, 345678]: token 77 is not within 0 and 5")


def test_several_files_at_once(codebook: Run, pruned: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.npy" for name in "ab"]
    for path in paths:
        np.save(path, np.array([0, 5]))
    several = ("remap", *paths, "--map", pruned, "--force")
    assert_refused(codebook(*several, "-o", tmp_path / "c.npy"), "is one place for 2 files")
    assert_refused(codebook("remap", paths[0], *several[3:], "-o", paths[0]), "is the file that is read")
    lines = [line.rstrip() for line in codebook(*several).stdout.splitlines()]
    labels = ("ids", 4), ("changed", 2), ("of removed codes", 0), ("by their nearest code", 0)
    assert lines[:4] == [f"{label:<21}  {count}" for label, count in labels]
    assert lines[-1].startswith("written to ")
    done = codebook(*several, "--json").json
    assert done["tokens"] == 4 and len(done["outputs"]) == 2
    assert all(np.load(output).tolist() == [0, 3] for output in done["outputs"].values())
    before = contents(tmp_path)
    assert_refused(codebook(*several[:-1]), "exists; --force replaces it")
    assert contents(tmp_path) == before
    np.save(paths[1], np.array([0, 6]))
    assert_refused(codebook(*several), f"already written: {tmp_path / 'a.remapped.npy'}")


def test_special_ids_keep_their_place_beside_the_codes(remap: Run, with_model: WriteMap, tokens: Save) -> None:
    """Ids: 0 and 1 special, 2 to 5 the codes, 6 and 7 special; of the codes two are left, and two are removed."""
    path = tokens(range(8))
    options = ("--offset", 2, "--special", 2, "--on-removed", "mask=5")
    assert remap(path, with_model("m", 2, ([1, -1, -1, 0], [1, 1, 0, 0])), *options).exit_code == 0
    assert written(path).tolist() == [0, 1, 3, 5, 5, 2, 4, 5]
    full, grown = (with_model(f"g{size}", size, ([0, 1, 2, 3], [0, 1, 2, 3])) for size in (255, 300))
    assert remap(tokens([4], np.uint8), full, "--special", 1).exit_code == 0 and written(path).tolist() == [255]
    message = "token 4 becomes 300, for which uint8 has no room; store the tokens in a wider dtype first"
    assert_refused(remap(tokens([4], np.uint8), grown, "--special", 1), message)


# Other files


def test_a_safetensors_file_changes_in_its_tokens_alone(remap: Run, pruned: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "tokens.safetensors", tmp_path / "tokens.remapped.safetensors"
    tensors = {"a.tokens": torch.tensor([[5, 0]]), "label": torch.tensor([5, 2], dtype=torch.int16), "w": torch.ones(2)}
    save_file(tensors, path, {"note": "by others"})
    assert remap(path, pruned, "--key", "a.tokens", "--json").json["tokens"] == 2
    assert load_file(output)["a.tokens"].tolist() == [[3, 0]]
    differ = sum(a != b for a, b in zip(path.read_bytes(), output.read_bytes(), strict=True))
    assert differ == 1  # one byte of one id
    both = remap(path, pruned, "--key", "a.tokens", "--key", "label")
    assert both.exit_code == 0 and load_file(output)["label"].tolist() == [3, 1]
    assert_refused(remap(path, pruned, "--key", "w"), "the tensor w holds no integers")
    assert_refused(remap(path, pruned, "--key", "x"), "the tensor x is not there")
    del tensors["w"]
    save_file(tensors, path)
    message = "could be tokens in each of the tensors a.tokens, label; name what holds them with --key"
    assert_refused(remap(path, pruned), message)


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]


def test_a_tar_changes_in_its_arrays_alone(remap: Run, pruned: Path, tmp_path: Path) -> None:
    long = "ä" * 120  # too long for a plain header
    members = {f"{long}{i}.codes.npy": npy([0, 5, i]) for i in (2, 3)} | {f"{long}.cls": b"5", "0.json": b'{"t": [5]}'}
    path, output = tar_of(tmp_path / "shard.tar", members), tmp_path / "shard.remapped.tar"
    assert remap(path, pruned, "--json").json["tokens"] == 6
    assert members_of(output) == members | {f"{long}{i}.codes.npy": npy([0, 3, i - 1]) for i in (2, 3)}
    with tarfile.open(path) as before, tarfile.open(output) as after:
        assert [m.get_info() for m in before] == [m.get_info() for m in after]
    assert_refused(remap(path, pruned, "--key", "vq.npy"), "no member that ends in .vq.npy")


@pytest.mark.parametrize("how", SPARSE)
def test_tokens_that_a_tar_stores_sparse_are_refused_and_other_sparse_members_stay(
    remap: Run, pruned: Path, tmp_path: Path, how: str
) -> None:
    tokens, picture = tmp_path / "a.codes.npy", tmp_path / "b.bin"
    np.save(tokens, np.r_[[5, 2, 3], np.zeros(100_000)].astype(np.uint16))
    picture.write_bytes(b"\xff" * 9_000 + bytes(300_000))
    sparse = sparse_tar(tmp_path / "tokens.tar", tokens, how, picture)
    before = contents(tmp_path)
    assert_refused(remap(sparse, pruned), f"{sparse}/a.codes.npy is stored sparse; make the tar without --sparse")
    assert contents(tmp_path) == before
    path = sparse_tar(tmp_path / "shard.tar", picture, how)
    with tarfile.open(path, "a") as archive:
        archive.add(tokens, tokens.name)
    assert remap(path, pruned).exit_code == 0
    members = members_of(tmp_path / "shard.remapped.tar")
    assert members["b.bin"] == picture.read_bytes()
    assert np.load(io.BytesIO(members["a.codes.npy"]))[:4].tolist() == [3, 1, 2, 0]


def test_a_parquet_table_keeps_schema_nulls_and_compression(remap: Run, pruned: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "t.parquet", tmp_path / "t.remapped.parquet"
    # A null among lists of fixed size is written by every pyarrow, and read back by those from 26 on.
    absent = None if int(pa.__version__.partition(".")[0]) >= 26 else [2, 3]
    columns = {
        "flat": pa.array([0, None, 5], pa.uint16()),
        "lists": pa.array([[5, 0], None, []], pa.list_(pa.int32())),
        "nested": pa.array([[[5], [0, None]], [], None], pa.large_list(pa.list_(pa.int8()))),
        "fixed": pa.array([[2, 3], absent, [5, 5]], pa.list_(pa.int64(), 2)),
    }
    table = pa.table({**columns, "text": ["a", "b", None]}, metadata={"who": "others"})
    parquet.write_table(table, path, row_group_size=2, compression={"text": "zstd", "flat": "none"})
    done = remap(path, pruned, *(option for name in columns for option in ("--key", name)), "--json")
    assert done.json["tokens"] == 2 + 2 + 2 + 4 + len(absent or [])
    old, new = parquet.read_table(path), parquet.read_table(output)
    assert new.schema.equals(old.schema, check_metadata=True)
    assert new.to_pydict() == {
        "flat": [0, None, 3], "lists": [[3, 0], None, []], "nested": [[[3], [0, None]], [], None],
        "fixed": [[1, 2], absent and [1, 2], [3, 3]], "text": ["a", "b", None],
    }  # fmt: skip
    stored = [parquet.ParquetFile(file).metadata for file in (path, output)]
    assert [metadata.num_row_groups for metadata in stored] == [2, 2]
    before, after = ([m.row_group(0).column(i).compression for i in range(m.num_columns)] for m in stored)
    assert before == after
    assert_refused(remap(path, pruned), "could be tokens in each of the columns flat, lists, nested, fixed")
    parquet.write_table(pa.table({"t": [[0, 2], [5, 9]]}), path)
    assert_refused(remap(path, pruned), f"t in {path} at [1, 1]: token 9 is not within")


def test_a_name_of_two_columns_does_not_say_which_holds_tokens(remap: Run, pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table([[5, 2], [3, 3]], ["t", "t"]), path)
    for keys in (), ("--key", "t"):
        assert_refused(remap(path, pruned, *keys), f"{path} has several columns called t; rename")
    parquet.write_table(pa.table([[5, 2], [0, 0], ["a", "b"], ["c", "d"]], ["t", "label", "x", "x"]), path)
    assert remap(path, pruned, "--key", "t").exit_code == 0
    columns = parquet.ParquetFile(tmp_path / "t.remapped.parquet").read().columns
    assert [column.to_pylist() for column in columns] == [[3, 1], [0, 0], ["a", "b"], ["c", "d"]]


# Several codebooks

STAGES = {f"layers.{i}.embed": ([(c + i) % 4 for c in range(4)], [(c + i) % 4 for c in range(4)]) for i in (0, 2, 10)}
"""Code c of stage i becomes c + i. By name 10 comes before 2, by stage after it."""


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_axis_runs_over_the_codebooks(remap: Run, tokens: Save, tmp_path: Path, order: Any) -> None:
    map_path = save_map(tmp_path / "map.safetensors", STAGES)
    values = np.arange(2 * 3 * 5).reshape(2, 3, 5) % 4
    expected = (values + np.array([0, 2, 10])[:, None]) % 4
    path = tokens(np.asarray(values, order=order))
    assert remap(path, map_path, "--axis", 1).exit_code == 0 and np.array_equal(written(path), expected)
    assert remap(path, map_path).exit_code == 0 and np.array_equal(written(path), expected), "as `encode` has them"
    assert_refused(remap(path, map_path, "--axis", 2), "has 5 codebooks along axis 2")
    path = tokens(values[:, :2])  # a lower bandwidth has the first stages alone
    assert_refused(remap(path, map_path), "the map has 3 codebooks; --axis N says")
    assert remap(path, map_path, "--axis", 1).exit_code == 0 and np.array_equal(written(path), expected[:, :2])
    assert remap(path, map_path, "--codebook-key", "layers.2.embed").exit_code == 0
    assert np.array_equal(written(path), (values[:, :2] + 2) % 4)
    keys = ("--codebook-key", "layers.10.embed", "--codebook-key", "layers.0.embed")
    for axis in ((), ("--axis", 1)):
        assert remap(path, map_path, *axis, *keys).exit_code == 0, "in the order asked for"
        assert np.array_equal(written(path), (values[:, :2] + np.array([10, 0])[:, None]) % 4)


def test_levels_of_lists_are_axes(remap: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("codebook_tools.remapping.parquet._MOST_VALUES", 1)  # in a large file many are no repetition
    path, map_path = tmp_path / "t.parquet", save_map(tmp_path / "map.safetensors", STAGES)
    parquet.write_table(pa.table({"t": [[[0, 1], [0], [3]], None, [[2]]]}), path)
    assert remap(path, map_path, "--axis", 1).exit_code == 0
    new = parquet.read_table(tmp_path / "t.remapped.parquet").to_pydict()
    assert new == {"t": [[[0, 1], [2], [(3 + 10) % 4]], None, [[2]]]}
    assert_refused(remap(path, map_path, "--axis", 3), "nested 3 deep and has no axis 3")
    one = ("--codebook-key", "layers.2.embed")
    assert_refused(remap(path, map_path, "--axis", 2, *one), "more codebooks along axis 2")


# Maps


def test_maps_of_surgeries_in_a_row_are_one(codebook: Run, with_model: WriteMap, tokens: Save, tmp_path: Path) -> None:
    first = with_model("a", 3, ([0, -1, 1, 2], [0, 0, 1, 2]))
    second = with_model("b", 2, ([1, 0, 0], [1, 0, 0]), file_sha256(tmp_path / "a.safetensors"))
    path = tokens([0, 1, 2, 3])

    def remap(*maps: Path) -> Outcome:
        named = (option for one in maps for option in ("--map", one))
        return codebook("remap", path, *named, "--on-removed", "nearest", "--force", "--json")

    done = remap(first, second).json
    assert (done["removed"], done["nearest"]) == (1, 1) and written(path).tolist() == [1, 1, 0, 0]
    message = "is of another checkpoint: its surgery was not done on the model of"
    assert_refused(remap(second, first), message)
    for name in "ab":  # a map without its model knows as well what it was made of
        (tmp_path / f"{name}.safetensors").unlink()
    assert_refused(remap(first, first), message)
    assert remap(first, second).exit_code == 0


def test_a_map_that_is_none_or_of_another_checkpoint_is_refused(
    remap: Run, with_model: WriteMap, tokens: Save, tmp_path: Path
) -> None:
    path, good, forged = tokens([0]), with_model("m", 2, ([0, 1], [0, 1])), tmp_path / "forged.safetensors"
    save_file({"x": torch.ones(1)}, forged)
    assert_refused(remap(path, forged), "is no index map")
    whole = good.read_bytes()
    forged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_refused(remap(path, forged), "is damaged")
    forged.write_bytes(whole.replace(b": 2}", b": 3}"))  # another number of codes
    assert_refused(remap(path, forged), "its header is not what")
    for pair, size in (([0, -2], [0, 0]), 1), (([0, 1], [0, 0]), 1), (([0, -1], [0]), 1), (([0, 1], [0, 1]), 1):
        save_map(forged, {KEY: pair}, sizes={KEY: size})
        assert_refused(remap(path, forged), "its numbers are no codes")
    tensors = load_file(good)
    sizes = (json.dumps({KEY: size}) for size in ("2", 0, -1, 1 << 25, 10**30))
    for about in ({}, *({PREFIX + "codebooks": text} for text in (KEY, "{}", *sizes))):
        save_file(tensors, forged, sealed(tensors, about))
        assert_refused(remap(path, forged), "is no index map: it does not say how many new codes there are")
    save_file({KEY: torch.randn(2, 4)}, tmp_path / "m.safetensors")
    assert_refused(remap(path, good), "is of another checkpoint than")


@given(st.data())
def test_composing_is_applying_one_after_the_other(data: st.DataObject) -> None:
    a = data.draw(index_maps())
    b = data.draw(index_maps(a.size))
    both = a.then(b)
    for old, (middle, nearest) in enumerate(zip(a.index_map.tolist(), a.nearest.tolist(), strict=True)):
        assert both.index_map[old] == (REMOVED if middle == REMOVED else b.index_map[middle])
        assert both.nearest[old] == b.nearest[nearest]
    assert both.size == b.size
    assert torch.equal(*(codes[both.index_map != REMOVED] for codes in (both.index_map, both.nearest)))
    with pytest.raises(CodebookError, match=f"leads to {a.size} codes and the next starts from {a.size + 1}"):
        a.then(IndexMap(KEY, torch.arange(a.size + 1), torch.arange(a.size + 1), a.size + 1))


def reference(token: int, one: IndexMap, on_removed: OnRemoved, offset: int, special: int) -> int | None:
    """What a token becomes, None where it must be refused; in plain Python."""
    code = token - offset
    if token < 0 or code >= one.old_size + special:
        return None
    if code < 0:
        return token
    if code >= one.old_size:
        return offset + one.size + (code - one.old_size)
    if one.index_map[code] == REMOVED and on_removed != "nearest":
        return on_removed if isinstance(on_removed, int) else None
    return offset + int(one.nearest[code])


@given(st.data())
def test_tokens_become_what_the_reference_says(data: st.DataObject) -> None:
    maps = tuple(data.draw(st.lists(index_maps(), min_size=1, max_size=3)))
    on_removed = data.draw(st.sampled_from(["error", "nearest", 77]))
    offset, special = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    drawn = st.tuples(st.integers(-1 if data.draw(st.booleans()) else 0, 12), st.integers(0, len(maps) - 1))
    pairs = data.draw(st.lists(drawn, max_size=20))
    ids, stages = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    expected = [reference(token, maps[stage], on_removed, offset, special) for token, stage in pairs]
    translation = Translation(maps, on_removed, offset, special)
    if None in expected:
        with pytest.raises(CodebookError, match=r"^[0-9]+: token"):
            translation(ids, stages, str)
        return
    assert translation(ids, stages, str).tolist() == expected
    counts = translation.counts
    removed = [0 <= t - offset < maps[s].old_size and maps[s].index_map[t - offset] == REMOVED for t, s in pairs]
    assert counts.tokens == len(pairs) and counts.removed == sum(removed)
    assert counts.changed == sum(t != new for (t, _), new in zip(pairs, expected, strict=True))
    assert counts.nearest == (sum(removed) if on_removed == "nearest" else 0)
