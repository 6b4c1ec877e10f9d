"""Stored tokens follow an index map: exactly, in place, streamed, and against a twin in plain Python."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import KEY, Outcome, WriteMap, assert_refused, contents, save_map
from drawing import SPARSE, sparse_tar
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.read import file_sha256
from codebook_tools.checkpoints.sealed_file import sealed
from codebook_tools.codebook import REMOVED
from codebook_tools.errors import CodebookError
from codebook_tools.remapping.index_map import IndexMap, read_index_maps
from codebook_tools.remapping.token_ids import OnRemoved, Translation

Run = Callable[..., Outcome]


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """Six codes, of which 1 and 4 were removed; they stand nearest to the new codes 0 and 3."""
    return save_map(tmp_path / "map.safetensors", {KEY: ([0, -1, 1, 2, -1, 3], [0, 0, 1, 2, 3, 3])})


def nothing_but(folder: Path, before: dict[str, bytes]) -> None:
    """No output and no partial was left."""
    assert contents(folder) == before


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "u4", "<i8", ">u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_keeps_its_dtype_order_and_shape(
    codebook: Run, pruned: Path, tmp_path: Path, dtype: str, order: Any
) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.asarray([[0, 2, 3], [5, 5, 0]], dtype=dtype, order=order))
    found = codebook("remap", path, "--map", pruned, "--json")
    assert found.exit_code == 0, found
    output = tmp_path / "tokens.remapped.npy"
    assert found.json == {
        "tokens": 6, "changed": 4, "removed": 0, "nearest": 0, "outputs": {str(path): str(output)}, "warnings": [],
    }  # fmt: skip
    written = np.load(output)
    assert written.tolist() == [[0, 1, 2], [3, 3, 0]]
    assert written.dtype == np.dtype(dtype) and written.flags.f_contiguous == (order == "F")
    assert output.stat().st_size == path.stat().st_size


@pytest.mark.parametrize(
    ("on_removed", "meant", "counts"),
    [("nearest", [0, 0, 3, 3], (4, 3, 2, 2)), ("mask=200", [0, 200, 200, 3], (4, 3, 2, 0))],
)
def test_tokens_of_removed_codes(
    codebook: Run, pruned: Path, tmp_path: Path, on_removed: str, meant: list[int], counts: tuple[int, ...]
) -> None:
    path, output = tmp_path / "tokens.npy", tmp_path / "out.npy"
    np.save(path, np.array([0, 1, 4, 5], np.uint8))
    found = codebook("remap", path, "--map", pruned, "--on-removed", on_removed, "-o", output, "--json")
    assert found.exit_code == 0, found
    assert np.load(output).tolist() == meant
    assert tuple(found.json[name] for name in ("tokens", "changed", "removed", "nearest")) == counts


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[0, 2], [1, 4]], (), "at [1, 0]: token 1 is a code that was removed; --on-removed nearest"),
        ([[0, 2], [1, 6]], (), "at [1, 1]: token 6 is not within 0 and 5"),
        ([[0, -3], [1, 6]], (), "at [0, 1]: token -3 is not within 0 and 5"),
        ([[0, 8], [9, 6]], ("--offset", 2), "at [0, 1]: token 8 is not within 0 and 7"),
        ([[0, 1]], ("--on-removed", "mask=300"), "at [0, 1]: token 1 becomes 300, for which int8 has no room"),
        ([[0, 1]], ("--on-removed", "drop"), "--on-removed drop: expected error, nearest, or mask=ID"),
        ([[0, 1]], ("--on-removed", "mask=9999999999999999999"), "expected error, nearest, or mask=ID"),
        ([[0, 1]], ("--offset", -1), "offset=-1 is not within 0 and 4294967296"),
        ([[0, 1]], ("--offset", 2**63), "is not within 0 and 4294967296"),
        ([[0, 1]], ("--special", 10**24), "is not within 0 and 4294967296"),
        ([[0, 1]], ("--pad-to-multiple", 10**12), "pad-to-multiple=1000000000000 is not within 1 and 1048576"),
        ([[0, 2]], ("--axis", 2), "has shape (1, 2) and no axis 2"),
        ([[0, 2]], ("--axis", 1), "has 2 codebooks along axis 1 and the map 1"),
        ([[0, 2]], ("--codebook-key", "other"), "has no map of other; it maps quantizer.codebook.weight"),
        ([[0, 2]], ("-o", "x.tar"), "x.tar does not end in .npy"),
        ([[0, 2]], ("-o", "nowhere/x.npy"), "no such folder: nowhere"),
    ],
)
def test_what_is_refused(
    codebook: Run, pruned: Path, tmp_path: Path, tokens: list[list[int]], options: tuple[object, ...], message: str
) -> None:
    np.save(tmp_path / "tokens.npy", np.array(tokens, np.int8))
    before = contents(tmp_path)
    assert_refused(codebook("remap", tmp_path / "tokens.npy", "--map", pruned, *options), message)
    nothing_but(tmp_path, before)


def test_what_lies_beyond_a_chunk_is_named_where_it_lies(codebook: Run, pruned: Path, tmp_path: Path) -> None:
    tokens = np.zeros((3, 1_000_000), np.uint16)
    tokens[2, 345_678] = 77
    np.save(tmp_path / "tokens.npy", tokens)
    found = codebook("remap", tmp_path / "tokens.npy", "--map", pruned)
    assert_refused(found, "tokens.npy at [2, 345678]: token 77 is not within 0 and 5")


def test_arrays_that_are_no_tokens_are_refused(codebook: Run, pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    for array, message in (
        (np.array([{}, []], dtype=object), "holds pickled objects, which are never opened"),
        (np.zeros(3, np.float32), "holds float32; tokens are integers"),
        (np.zeros(3, bool), "holds bool; tokens are integers"),
    ):
        np.save(path, array, allow_pickle=True)
        assert_refused(codebook("remap", path, "--map", pruned), message)
    path.write_bytes(b"PK\x03\x04 rather a zip")
    assert_refused(codebook("remap", path, "--map", pruned), "is not a sound .npy file")
    np.save(path, np.zeros(100, np.int64))
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(codebook("remap", path, "--map", pruned), "is cut short: its header says 100 ids")
    assert_refused(codebook("remap", tmp_path / "none.npy", "--map", pruned), "no such file")
    np.savez(tmp_path / "tokens.npz", np.zeros(2, np.int64))
    message = "holds neither tokens (.npy, .parquet, .safetensors, .tar) nor a prior's weights; convert it first"
    assert_refused(codebook("remap", tmp_path / "tokens.npz", "--map", pruned), message)


def test_nothing_is_overwritten_unless_asked(codebook: Run, pruned: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "tokens.npy", tmp_path / "tokens.remapped.npy"
    np.save(path, np.array([5]))
    output.write_bytes(b"mine")
    before = contents(tmp_path)
    assert_refused(codebook("remap", path, "--map", pruned), "exists; --force replaces it")
    assert_refused(codebook("remap", path, "--map", pruned, "-o", path, "--force"), "is the file that is read")
    nothing_but(tmp_path, before)
    assert codebook("remap", path, "--map", pruned, "--force").exit_code == 0
    assert np.load(output).tolist() == [3]


def test_several_files_at_once(codebook: Run, pruned: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.npy" for name in "ab"]
    for path in paths:
        np.save(path, np.array([0, 5]))
    assert_refused(codebook("remap", *paths, "--map", pruned, "-o", tmp_path / "c.npy"), "is one place for 2 files")
    shown = codebook("remap", *paths, "--map", pruned)
    lines = [
        "ids                    4",
        "changed                2",
        "of removed codes       0",
        "by their nearest code  0",
    ]
    assert [line.rstrip() for line in shown.stdout.splitlines()][:4] == lines
    assert f"written to {tmp_path / 'b.remapped.npy'}" in shown.stdout
    found = codebook("remap", *paths, "--map", pruned, "--json", "--force")
    assert found.json["tokens"] == 4 and len(found.json["outputs"]) == 2
    assert all(np.load(output).tolist() == [0, 3] for output in found.json["outputs"].values())
    np.save(paths[1], np.array([0, 6]))
    refused = codebook("remap", *paths, "--map", pruned, "--force")
    assert_refused(refused, f"already written: {tmp_path / 'a.remapped.npy'}")


def test_special_ids_keep_their_place_beside_the_codes(codebook: Run, with_model: WriteMap, tmp_path: Path) -> None:
    """Ids: 0 and 1 special, 2 to 5 the codes, 6 and 7 special; of the codes two are left, and two are removed."""
    path, output = tmp_path / "tokens.npy", tmp_path / "out.npy"
    np.save(path, np.array([0, 1, 2, 3, 4, 5, 6, 7]))
    options = ("--offset", 2, "--special", 2, "--on-removed", "mask=5")
    found = codebook("remap", path, "--map", with_model("m", 2, ([1, -1, -1, 0], [1, 1, 0, 0])), *options, "-o", output)
    assert found.exit_code == 0, found
    assert np.load(output).tolist() == [0, 1, 3, 5, 5, 2, 4, 5]
    grown = with_model("g", 300, ([0, 1, 2, 3], [0, 1, 2, 3]))
    np.save(path, np.array([4], np.uint8))
    message = "token 4 becomes 300, for which uint8 has no room; store the tokens in a wider dtype first"
    assert_refused(codebook("remap", path, "--map", grown, "--special", 1, "-o", output, "--force"), message)


# Other files


def test_a_safetensors_file_changes_in_its_tokens_alone(codebook: Run, pruned: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "tokens.safetensors", tmp_path / "tokens.remapped.safetensors"
    tensors = {"a.tokens": torch.tensor([[5, 0]]), "label": torch.tensor([5, 2], dtype=torch.int16), "w": torch.ones(2)}
    save_file(tensors, path, {"note": "by others"})
    found = codebook("remap", path, "--map", pruned, "--key", "a.tokens", "--json")
    assert found.exit_code == 0, found
    assert found.json["tokens"] == 2
    written = load_file(output)
    assert written["a.tokens"].tolist() == [[3, 0]]
    assert written["label"].tolist() == [5, 2] and written["w"].tolist() == [1, 1]
    differ = sum(a != b for a, b in zip(path.read_bytes(), output.read_bytes(), strict=True))
    assert differ == 1  # one byte of one id
    both = codebook("remap", path, "--map", pruned, "--key", "a.tokens", "--key", "label", "--force")
    assert both.exit_code == 0 and load_file(output)["label"].tolist() == [3, 1]
    assert_refused(codebook("remap", path, "--map", pruned, "--key", "w", "--force"), "the tensor w holds no integers")
    del tensors["w"]
    save_file(tensors, path)
    message = "could be tokens in each of the tensors a.tokens, label; name what holds them with --key"
    assert_refused(codebook("remap", path, "--map", pruned, "--force"), message)


def test_a_tar_changes_in_its_arrays_alone(codebook: Run, pruned: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "shard.tar", tmp_path / "shard.remapped.tar"
    members: dict[str, bytes] = {}
    for i in range(3):
        file = io.BytesIO()
        np.save(file, np.array([[0, 5, i + 2 if i != 2 else 5]], np.uint16))
        members |= {f"{i}.codes.npy": file.getvalue(), f"{i}.cls": b"5", f"{i}.json": json.dumps({"t": [5]}).encode()}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo("ä" * 120 + name)  # too long for a plain header
            info.size, info.mtime, info.uname = len(data), 1_234_567, "somebody"
            archive.addfile(info, io.BytesIO(data))
    found = codebook("remap", path, "--map", pruned, "--json")
    assert found.exit_code == 0, found
    assert found.json["tokens"] == 9
    with tarfile.open(path) as before, tarfile.open(output) as after:
        assert [m.get_info() for m in before] == [m.get_info() for m in after]
        for member in after:
            data = after.extractfile(member).read()  # type: ignore[union-attr]
            name = member.name.lstrip("ä")
            if name.endswith(".npy"):
                assert np.load(io.BytesIO(data)).tolist() == [[[0, 3, 1], [0, 3, 2], [0, 3, 3]][int(name[0])]]
            else:
                assert data == members[name]
    assert_refused(
        codebook("remap", path, "--map", pruned, "--key", "vq.npy", "--force"), "no member that ends in .vq.npy"
    )
    path.write_bytes(b"\x1f\x8b no tar")
    assert_refused(codebook("remap", path, "--map", pruned, "--force"), "is not a readable, uncompressed tar")


@pytest.mark.parametrize("how", SPARSE)
def test_tokens_that_a_tar_stores_sparse_are_refused_and_other_sparse_members_stay(
    codebook: Run, pruned: Path, tmp_path: Path, how: str
) -> None:
    tokens, picture = tmp_path / "a.codes.npy", tmp_path / "b.bin"
    np.save(tokens, np.r_[[5, 2, 3], np.zeros(100_000)].astype(np.uint16))
    picture.write_bytes(b"\xff" * 9_000 + bytes(300_000))
    sparse = sparse_tar(tmp_path / "tokens.tar", tokens, how, picture)
    before = contents(tmp_path)
    message = f"{sparse}/a.codes.npy is stored sparse; make the tar without --sparse"
    assert_refused(codebook("remap", sparse, "--map", pruned), message)
    nothing_but(tmp_path, before)
    path = sparse_tar(tmp_path / "shard.tar", picture, how)
    with tarfile.open(path, "a") as archive:
        archive.add(tokens, tokens.name)
    assert codebook("remap", path, "--map", pruned).exit_code == 0
    with tarfile.open(tmp_path / "shard.remapped.tar") as written:
        members = {name: written.extractfile(name).read() for name in written.getnames()}  # type: ignore[union-attr]
    assert members["b.bin"] == picture.read_bytes()
    assert np.load(io.BytesIO(members["a.codes.npy"]))[:4].tolist() == [3, 1, 2, 0]


def test_a_parquet_table_keeps_schema_nulls_and_compression(codebook: Run, pruned: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path, output = tmp_path / "t.parquet", tmp_path / "t.remapped.parquet"
    # A null among lists of fixed size is written by every pyarrow, and read back by those from 26 on.
    absent = None if int(pa.__version__.partition(".")[0]) >= 26 else [2, 3]
    table = pa.table(
        {
            "flat": pa.array([0, None, 5], pa.uint16()),
            "lists": pa.array([[5, 0], None, []], pa.list_(pa.int32())),
            "nested": pa.array([[[5], [0, None]], [], None], pa.large_list(pa.list_(pa.int8()))),
            "fixed": pa.array([[2, 3], absent, [5, 5]], pa.list_(pa.int64(), 2)),
            "text": ["a", "b", None],
        },
        metadata={"who": "others"},
    )
    parquet.write_table(table, path, row_group_size=2, compression={"text": "zstd", "flat": "none"})
    columns = ("flat", "lists", "nested", "fixed")
    found = codebook("remap", path, "--map", pruned, *(x for name in columns for x in ("--key", name)), "--json")
    assert found.exit_code == 0, found
    assert found.json["tokens"] == 2 + 2 + 2 + 4 + len(absent or [])
    old, new = parquet.read_table(path), parquet.read_table(output)
    assert new.schema.equals(old.schema, check_metadata=True)
    assert new.to_pydict() == {
        "flat": [0, None, 3],
        "lists": [[3, 0], None, []],
        "nested": [[[3], [0, None]], [], None],
        "fixed": [[1, 2], absent and [1, 2], [3, 3]],
        "text": ["a", "b", None],
    }
    before, after = parquet.ParquetFile(path).metadata, parquet.ParquetFile(output).metadata
    assert (before.num_row_groups, after.num_row_groups) == (2, 2)
    shown = [[m.row_group(0).column(i).compression for i in range(m.num_columns)] for m in (before, after)]
    assert shown[0] == shown[1]
    message = "could be tokens in each of the columns flat, lists, nested, fixed"
    assert_refused(codebook("remap", path, "--map", pruned, "--force"), message)
    parquet.write_table(pa.table({"t": [[0, 2], [5, 9]]}), path)
    assert_refused(codebook("remap", path, "--map", pruned, "--force"), "t in ")
    assert "at [1, 1]: token 9 is not within" in codebook("remap", path, "--map", pruned, "--force").stderr
    path.write_bytes(b"PAR1 cut off")
    assert_refused(codebook("remap", path, "--map", pruned, "--force"), "is not a sound parquet file")


@pytest.mark.parametrize("keys", [(), ("--key", "t")])
def test_a_name_of_two_columns_does_not_say_which_holds_tokens(
    codebook: Run, pruned: Path, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table([[5, 2], [3, 3]], ["t", "t"]), path)
    before = contents(tmp_path)
    assert_refused(codebook("remap", path, "--map", pruned, *keys), f"{path} has several columns called t; rename")
    nothing_but(tmp_path, before)
    parquet.write_table(pa.table([[5, 2], [0, 0], ["a", "b"], ["c", "d"]], ["t", "label", "x", "x"]), path)
    assert codebook("remap", path, "--map", pruned, "--key", "t").exit_code == 0
    written = parquet.ParquetFile(tmp_path / "t.remapped.parquet").read()
    assert [column.to_pylist() for column in written.columns] == [[3, 1], [0, 0], ["a", "b"], ["c", "d"]]


# Several codebooks

STAGES = {f"layers.{i}.embed": ([(c + i) % 4 for c in range(4)], [(c + i) % 4 for c in range(4)]) for i in (0, 2, 10)}
"""Code c of stage i becomes c + i. Of the names 10 comes before 2, of the stages behind it."""


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_axis_runs_over_the_codebooks(codebook: Run, tmp_path: Path, order: Any) -> None:
    path, map_path = tmp_path / "tokens.npy", save_map(tmp_path / "map.safetensors", STAGES)
    tokens = np.arange(2 * 3 * 5).reshape(2, 3, 5) % 4
    np.save(path, np.asarray(tokens, order=order))
    found = codebook("remap", path, "--map", map_path, "--axis", 1)
    assert found.exit_code == 0, found
    meant = (tokens + np.array([0, 2, 10])[:, None]) % 4
    assert np.array_equal(np.load(tmp_path / "tokens.remapped.npy"), meant)
    assert_refused(codebook("remap", path, "--map", map_path, "--force"), "the map has 3 codebooks; --axis N says")
    assert_refused(codebook("remap", path, "--map", map_path, "--axis", 2, "--force"), "has 5 codebooks along axis 2")
    np.save(path, tokens[:, :2])  # a lower bandwidth has the first stages alone
    assert codebook("remap", path, "--map", map_path, "--axis", 1, "--force").exit_code == 0
    assert np.array_equal(np.load(tmp_path / "tokens.remapped.npy"), meant[:, :2])
    one = codebook("remap", path, "--map", map_path, "--codebook-key", "layers.2.embed", "--force")
    assert one.exit_code == 0
    assert np.array_equal(np.load(tmp_path / "tokens.remapped.npy"), (tokens[:, :2] + 2) % 4)


def test_levels_of_lists_are_axes(codebook: Run, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path, map_path = tmp_path / "t.parquet", save_map(tmp_path / "map.safetensors", STAGES)
    parquet.write_table(pa.table({"t": [[[0, 1], [0], [3]], None, [[2]]]}), path)
    assert codebook("remap", path, "--map", map_path, "--axis", 1).exit_code == 0
    written = parquet.read_table(tmp_path / "t.remapped.parquet").to_pydict()
    assert written == {"t": [[[0, 1], [2], [(3 + 10) % 4]], None, [[2]]]}
    assert_refused(
        codebook("remap", path, "--map", map_path, "--axis", 3, "--force"), "nested 3 deep and has no axis 3"
    )


def test_the_map_says_the_order_whatever_the_names_are(codebook: Run, tmp_path: Path) -> None:
    identity, turned = ([0, 1], [0, 1]), ([1, 0], [1, 0])
    map_path = save_map(tmp_path / "map.safetensors", {"semantic.0.embed": turned, "acoustic.0.embed": identity})
    path = tmp_path / "tokens.npy"
    np.save(path, np.array([[0, 0], [0, 0]]))
    assert codebook("remap", path, "--map", map_path, "--axis", 0).exit_code == 0
    assert np.load(tmp_path / "tokens.remapped.npy").tolist() == [[1, 1], [0, 0]]
    keys = ("--codebook-key", "acoustic.0.embed", "--codebook-key", "semantic.0.embed")
    assert codebook("remap", path, "--map", map_path, "--axis", 0, *keys, "--force").exit_code == 0
    assert np.load(tmp_path / "tokens.remapped.npy").tolist() == [[0, 0], [1, 1]]


# Maps


def test_maps_of_surgeries_in_a_row_are_one(codebook: Run, with_model: WriteMap, tmp_path: Path) -> None:
    first = with_model("a", 3, ([0, -1, 1, 2], [0, 0, 1, 2]))
    second = with_model("b", 2, ([1, 0, 0], [1, 0, 0]), file_sha256(tmp_path / "a.safetensors"))
    path = tmp_path / "tokens.npy"
    np.save(path, np.array([0, 1, 2, 3]))
    found = codebook("remap", path, "--map", first, "--map", second, "--on-removed", "nearest", "--json")
    assert found.exit_code == 0, found
    assert found.json["removed"] == 1
    assert np.load(tmp_path / "tokens.remapped.npy").tolist() == [1, 1, 0, 0]
    message = "is of another checkpoint: its surgery was not done on the model of"
    assert_refused(codebook("remap", path, "--map", second, "--map", first, "--force"), message)
    (tmp_path / "b.safetensors").unlink()
    (tmp_path / "a.safetensors").unlink()  # a map alone knows as well what it was made of
    assert_refused(codebook("remap", path, "--map", first, "--map", first, "--force"), message)
    again = codebook("remap", path, "--map", first, "--map", second, "--force", "--on-removed", "nearest")
    assert again.exit_code == 0


def test_a_map_that_is_none_or_of_another_checkpoint_is_refused(
    codebook: Run, with_model: WriteMap, tmp_path: Path
) -> None:
    path, good = tmp_path / "tokens.npy", with_model("m", 2, ([0, 1], [0, 1]))
    np.save(path, np.array([0]))
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    assert_refused(codebook("remap", path, "--map", tmp_path / "x.safetensors"), "is no index map")
    broken = bytearray(good.read_bytes())
    broken[-1] ^= 1
    (tmp_path / "broken.safetensors").write_bytes(broken)
    assert_refused(codebook("remap", path, "--map", tmp_path / "broken.safetensors"), "is damaged")
    header = good.read_bytes().replace(b": 2}", b": 3}")  # of as many codes as no one wrote
    (tmp_path / "broken.safetensors").write_bytes(header)
    assert_refused(codebook("remap", path, "--map", tmp_path / "broken.safetensors"), "its header is not what")
    for pair in (([0, -2], [0, 0]), ([0, 1], [0, 0]), ([0, -1], [0])):
        forged = save_map(tmp_path / "forged.safetensors", {KEY: pair})
        assert_refused(codebook("remap", path, "--map", forged), "its numbers are no codes")
    small = save_map(tmp_path / "forged.safetensors", {KEY: ([0, 1], [0, 1])}, sizes={KEY: 1})
    assert_refused(codebook("remap", path, "--map", small), "its numbers are no codes")
    tensors = load_file(good)
    sizes = (json.dumps({KEY: size}) for size in ("2", 0, -1, 1 << 25, 10**30))
    for said in ({}, *({"codebooks": one} for one in (KEY, "{}", *sizes))):
        about = sealed(tensors, {PREFIX + name: value for name, value in said.items()})
        save_file(tensors, tmp_path / "forged.safetensors", about)
        message = "is no index map: it does not say how many new codes there are"
        assert_refused(codebook("remap", path, "--map", tmp_path / "forged.safetensors"), message)
    save_file({KEY: torch.randn(2, 4)}, tmp_path / "m.safetensors")
    assert_refused(codebook("remap", path, "--map", good), "is of another checkpoint than")


@st.composite
def index_maps(draw: st.DrawFn, old: int | None = None) -> IndexMap:
    size = draw(st.integers(1, 6))
    nearest = draw(st.lists(st.integers(0, size - 1), min_size=old or 1, max_size=old or 8))
    kept = draw(st.lists(st.booleans(), min_size=len(nearest), max_size=len(nearest)))
    index_map = [n if keep else REMOVED for n, keep in zip(nearest, kept, strict=True)]
    return IndexMap(KEY, torch.tensor(index_map), torch.tensor(nearest), size)


@given(st.data())
def test_composing_is_applying_one_after_the_other(data: st.DataObject) -> None:
    a = data.draw(index_maps())
    b = data.draw(index_maps(a.size))
    c = data.draw(index_maps(b.size))
    both = a.then(b)
    for old in range(a.old_size):
        middle = a.index_map.tolist()[old]
        assert both.index_map[old] == (REMOVED if middle == REMOVED else b.index_map.tolist()[middle])
        assert both.nearest[old] == b.nearest.tolist()[a.nearest.tolist()[old]]
    left, right = both.then(c), a.then(b.then(c))
    assert torch.equal(left.index_map, right.index_map) and torch.equal(left.nearest, right.nearest)
    assert left.size == c.size
    kept = both.index_map != REMOVED
    assert torch.equal(both.index_map[kept], both.nearest[kept])


@pytest.mark.parametrize("next_size", [2, 4])
def test_maps_whose_sizes_do_not_meet_do_not_compose(next_size: int) -> None:
    first = IndexMap(KEY, torch.arange(3), torch.arange(3), 3)
    later = IndexMap(KEY, torch.arange(next_size), torch.arange(next_size), next_size)
    with pytest.raises(CodebookError, match=f"leads to 3 codes and the next starts from {next_size}"):
        first.then(later)


def twin(token: int, one: IndexMap, on_removed: OnRemoved, offset: int, special: int) -> int | None:
    """What a token becomes, None where it must be refused; in plain Python."""
    code = token - offset
    if token < 0 or code >= one.old_size + special:
        return None
    if code < 0:
        return token
    if code >= one.old_size:
        return offset + one.size + (code - one.old_size)
    new = one.index_map.tolist()[code]
    if new == REMOVED and on_removed == "error":
        return None
    if new == REMOVED and isinstance(on_removed, int):
        return on_removed
    return offset + one.nearest.tolist()[code]


@given(st.data())
def test_tokens_become_what_the_twin_says(data: st.DataObject) -> None:
    maps = tuple(data.draw(st.lists(index_maps(), min_size=1, max_size=3)))
    on_removed = data.draw(st.sampled_from(["error", "nearest", 77]))
    offset, special = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    drawn = st.tuples(st.integers(-1 if data.draw(st.booleans()) else 0, 12), st.integers(0, len(maps) - 1))
    pairs = data.draw(st.lists(drawn, max_size=20))
    ids, stages = (np.array([pair[i] for pair in pairs], np.int16).astype(np.int64) for i in (0, 1))
    meant = [twin(token, maps[stage], on_removed, offset, special) for token, stage in pairs]
    translation = Translation(maps, on_removed, offset, special)
    if None in meant:
        with pytest.raises(CodebookError, match=r"^[0-9]+: token"):
            translation(ids, stages, str)
        return
    assert translation(ids, stages, str).tolist() == meant
    counts = translation.counts
    removed = [0 <= t - offset < maps[s].old_size and maps[s].index_map[t - offset] == REMOVED for t, s in pairs]
    assert counts.tokens == len(pairs) and counts.removed == sum(removed)
    assert counts.changed == sum(t != new for (t, _), new in zip(pairs, meant, strict=True))
    assert counts.nearest == (sum(removed) if on_removed == "nearest" else 0)


def test_the_chunks_of_a_long_file_meet(pruned: Path, codebook: Run, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).choice(np.array([0, 2, 3, 5], np.uint16), 3_000_001)
    np.save(tmp_path / "t.npy", tokens)
    assert codebook("remap", tmp_path / "t.npy", "--map", pruned).exit_code == 0
    table = np.array([0, 99, 1, 2, 99, 3], np.uint16)
    assert np.array_equal(np.load(tmp_path / "t.remapped.npy"), table[tokens])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(pruned: Path, tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
from codebook_tools.remapping.remap import RemapRequest, remap
peaks = []
for name in ("small", "large"):
    remap(RemapRequest((Path(sys.argv[1]) / f"{name}.npy",), (Path(sys.argv[2]),)))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""
    np.save(tmp_path / "small.npy", np.zeros(1 << 22, np.int64))
    np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.int64, (1 << 25,)).flush()  # 256 MiB
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(pruned)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 8 << 10  # KiB


def test_maps_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    path = save_map(tmp_path / "map.safetensors", STAGES)
    assert [one.key for one in read_index_maps([path])] == ["layers.0.embed", "layers.2.embed", "layers.10.embed"]
    for keys in product(STAGES, repeat=2):
        assert [one.key for one in read_index_maps([path], keys)] == list(keys)
