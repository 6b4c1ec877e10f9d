"""Weights in several files: an index that is not believed, and only what must change written anew."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, assert_refused, contents
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from codebook_tools.checkpoints.layout import CONFIG
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.write import check_writable, tensor_bytes, write_checkpoint
from codebook_tools.errors import CodebookError, VerificationError

INDEX = "model.safetensors.index.json"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CODES = torch.linspace(-1, 1, 12).reshape(4, 3)
SHARDS = {
    A: {"encoder.weight": torch.linspace(0, 1, 6).bfloat16(), "count": torch.tensor(7)},
    B: {"quantize.embedding.weight": CODES, "decoder.bias": torch.tensor([True, False, True])},
}
STATE = {key: tensor for state in SHARDS.values() for key, tensor in state.items()}
TOTAL = 6 * 2 + 8 + 12 * 4 + 3
NEW = torch.linspace(0, 1, 6).reshape(2, 3)
CHANGED = {"quantize.embedding.weight": NEW}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A directory as transformers writes it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, state in SHARDS.items():
        save_file(state, folder / name, {"format": "pt", "shard": name})
    places = {key: name for name, state in SHARDS.items() for key in state}
    edit_index(folder, lambda index: index.update(metadata={"total_size": TOTAL, "by": "others"}, weight_map=places))
    (folder / CONFIG).write_text('{"k": 4}')
    (folder / "README.md").write_text("by others")
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text()) if path.exists() else {}
    change(index)
    path.write_text(json.dumps(index, indent=3))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(original: Path, output: Path, changed: dict[str, Tensor] = CHANGED, **metadata: str) -> dict[str, str]:
    """Write, and return the metadata of the index map."""
    config = b'{"k": 2}' if output.suffix != ".safetensors" else None
    maps = {"codes/index_map": torch.tensor([0, -1, 1, -1])}
    map_path = write_checkpoint(
        read_checkpoint(original), output, changed, metadata or {"kept": "surgery"}, maps, config
    )
    with safe_open(map_path, "pt") as file:
        found: dict[str, str] = file.metadata()
        return found


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["", INDEX])
def test_shards_are_one_checkpoint_by_directory_or_index(sharded: Path, named: str) -> None:
    read = read_checkpoint(sharded / named)
    assert (read.path, read.folder, read.config) == (sharded / INDEX, sharded, {"k": 4})
    assert read.files == (sharded / INDEX, sharded / A, sharded / B)
    assert read.shapes == {key: tuple(tensor.shape) for key, tensor in STATE.items()}
    assert all(torch.equal(read.tensor(key), tensor) for key, tensor in STATE.items())
    assert all(b"".join(read.chunks(key)) == tensor_bytes(tensor) for key, tensor in STATE.items())
    assert read.tensors().keys() == STATE.keys()
    assert read.metadata == {"format": "pt", "shard": A}
    assert read.nbytes == (sharded / A).stat().st_size + (sharded / B).stat().st_size


def test_the_hash_is_that_of_what_sha256sum_prints(sharded: Path) -> None:
    lines = "".join(f"{sha256(sharded / name)}  {name}\n" for name in (INDEX, A, B))
    assert read_checkpoint(sharded).sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_without_a_config_shards_are_read_all_the_same(sharded: Path) -> None:
    (sharded / CONFIG).unlink()
    for path in (sharded, sharded / INDEX):
        read = read_checkpoint(path)
        assert (read.folder, read.config_path, read.config) == (sharded, None, None)


def test_an_index_in_the_current_folder_is_read(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sharded)
    assert read_checkpoint(Path(INDEX)).shapes == read_checkpoint(sharded).shapes


def test_a_link_within_the_folder_is_no_way_out_of_it(sharded: Path) -> None:
    (sharded / A).rename(sharded / "real.safetensors")
    (sharded / A).symlink_to("real.safetensors")
    assert read_checkpoint(sharded).shapes["count"] == ()


def move_out(folder: Path) -> None:
    (folder / A).rename(folder.parent / A)


def link_out(folder: Path) -> None:
    move_out(folder)
    (folder / A).symlink_to(folder.parent / A)


def place(folder: Path, name: object) -> None:
    """The index says that a tensor is in the file `name`."""
    edit_index(folder, lambda index: index["weight_map"].update(count=name))


def save_again(folder: Path, name: str, **more: Tensor) -> None:
    save_file(SHARDS[name] | more, folder / name, {"format": "pt"})


UNSOUND: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard missing": (move_out, f"names {A}, which is missing"),
    "a shard that is a folder": (lambda f: (move_out(f), (f / A).mkdir()), f"names {A}, which is missing"),
    "a shard linked from outside": (link_out, f"{A} is a link to outside its folder"),
    "a link in a circle": (lambda f: (move_out(f), (f / A).symlink_to(A)), f"names {A}, which is missing"),
    "a shard above": (lambda f: (move_out(f), place(f, f"../{A}")), f"names '../{A}', outside its folder"),
    "an absolute shard": (lambda f: place(f, "/etc/passwd"), "names '/etc/passwd', outside its folder"),
    "a shard below": (lambda f: place(f, f"x/{A}"), "outside its folder"),
    "a shard of Windows": (lambda f: place(f, f"..\\{A}"), "outside its folder"),
    "the folder as a shard": (lambda f: place(f, "."), "outside its folder"),
    "no name": (lambda f: place(f, ""), "outside its folder"),
    "a name with a zero": (lambda f: place(f, "a\0b"), "outside its folder"),
    "a number as a name": (lambda f: place(f, 1), "says that count is in 1, which is no name"),
    "the index as a shard": (lambda f: place(f, INDEX), f"{INDEX} is not a sound safetensors file"),
    "a key in another shard": (lambda f: place(f, B), f"count is in {B}, but it is in {A}"),
    "a key in no shard": (
        lambda f: edit_index(f, lambda index: index["weight_map"].update(gone=A)),
        f"gone is in {A}, but no shard has it",
    ),
    "a key in two shards": (lambda f: save_again(f, B, count=torch.ones(1)), f"count lies in two .* {A} and {B}"),
    "a key in no index": (lambda f: save_again(f, B, extra=torch.ones(1)), f"not name extra, which {B} holds"),
    "a shard in no index": (
        lambda f: save_file({"x": torch.ones(1)}, f / "model-00003-of-00003.safetensors"),
        "does not name model-00003-of-00003.safetensors",
    ),
    "a shard cut short": (lambda f: os.truncate(f / A, 100), f"{A} is not a sound safetensors file"),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), f"{INDEX} is no JSON"),
    "a list": (lambda f: (f / INDEX).write_text("[]"), "holds a JSON list"),
    "no map": (lambda f: (f / INDEX).write_text("{}"), "is no index of shards"),
    "an empty map": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "is no index of shards"),
    "a map that is a list": (lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'), "is no index of shards"),
    "metadata that is a list": (lambda f: edit_index(f, lambda i: i.update(metadata=[])), "is no index of shards"),
    "weights in one file, too": (lambda f: save_file(STATE, f / "model.safetensors"), "and sharded weights"),
    "a config that is none": (lambda f: (f / CONFIG).write_text("{"), "config.json is no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSOUND)
def test_shards_that_are_amiss_are_refused_in_one_line(kind: str, sharded: Path) -> None:
    change, message = UNSOUND[kind]
    change(sharded)
    with pytest.raises(CodebookError, match=message) as error:
        read_checkpoint(sharded)
    assert "\n" not in str(error.value)


def test_another_json_is_no_index(sharded: Path) -> None:
    with pytest.raises(CodebookError, match=r"config.json is no index of shards"):
        read_checkpoint(sharded / CONFIG)


# --- writing -------------------------------------------------------------------------------------------------------


def test_only_the_shard_that_changes_is_written_anew(sharded: Path, tmp_path: Path) -> None:
    before = contents(sharded)
    about = write(sharded, tmp_path / "out")
    after = contents(tmp_path / "out")
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == [CONFIG, B, INDEX]
    assert after[INDEX] == before[INDEX].replace(b'"total_size": %d' % TOTAL, b'"total_size": %d' % (TOTAL - 24))
    assert load_file(tmp_path / "out" / B)["quantize.embedding.weight"].equal(NEW)
    read = read_checkpoint(tmp_path / "out")
    assert read.config == {"k": 2} and read.shapes["quantize.embedding.weight"] == (2, 3)
    assert all(torch.equal(read.tensor(key), STATE[key]) for key in STATE.keys() - CHANGED.keys())
    with safe_open(tmp_path / "out" / B, "pt") as file:
        assert file.metadata() == {"format": "pt", "shard": B, "codebook_tools.kept": "surgery"}
    assert about["codebook_tools.checkpoint_sha256"] == read.sha256
    assert contents(sharded) == before


def test_an_index_without_a_total_gets_one_and_a_wrong_one_is_put_right(sharded: Path, tmp_path: Path) -> None:
    edit_index(sharded, lambda index: index["metadata"].update(total_size=1.5e9))
    write(sharded, tmp_path / "one")
    edit_index(sharded, lambda index: index.pop("metadata"))
    write(sharded, tmp_path / "two")
    for name in ("one", "two"):
        assert json.loads((tmp_path / name / INDEX).read_text())["metadata"]["total_size"] == TOTAL - 24


def test_a_change_in_several_shards_is_told_in_each(sharded: Path, tmp_path: Path) -> None:
    write(sharded, tmp_path / "out", {**CHANGED, "count": torch.tensor(8)})
    for name in (A, B):
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata()["codebook_tools.kept"] == "surgery"
    assert read_checkpoint(tmp_path / "out").tensor("count") == 8


def test_where_nothing_changes_the_first_shard_tells_of_it(sharded: Path, tmp_path: Path) -> None:
    write(sharded, tmp_path / "out", {})
    assert (tmp_path / "out" / B).read_bytes() == (sharded / B).read_bytes()
    assert (tmp_path / "out" / INDEX).read_bytes() == (sharded / INDEX).read_bytes()
    assert read_checkpoint(tmp_path / "out").metadata["codebook_tools.kept"] == "surgery"


def test_what_was_told_of_an_earlier_change_does_not_outlive_it(sharded: Path, tmp_path: Path) -> None:
    write(sharded, tmp_path / "once", {"count": torch.tensor(8)}, kept="first")
    write(tmp_path / "once", tmp_path / "twice", kept="second")
    for name in (A, B):
        with safe_open(tmp_path / "twice" / name, "pt") as file:
            assert file.metadata()["codebook_tools.kept"] == "second"
    assert read_checkpoint(tmp_path / "twice").tensor("count") == 8


def test_shards_can_be_written_as_one_file(sharded: Path, tmp_path: Path) -> None:
    about = write(sharded, tmp_path / "out.safetensors")
    loaded = load_file(tmp_path / "out.safetensors")
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[key], (STATE | CHANGED)[key]) for key in STATE)
    assert about["codebook_tools.checkpoint_sha256"] == sha256(tmp_path / "out.safetensors")


def test_a_written_directory_is_replaced_where_it_is_ours_alone(sharded: Path, tmp_path: Path) -> None:
    write(sharded, tmp_path / "out", codebooks=json.dumps({"quantize.embedding.weight": 2}))
    check_writable(tmp_path / "out", force=True)
    with pytest.raises(CodebookError, match="is not a directory that codebook-tools wrote"):
        check_writable(sharded, force=True)


@pytest.mark.parametrize("broken", [A, B, INDEX])
def test_a_disk_that_damages_any_file_leaves_nothing(
    broken: str, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(broken):
            os.pwrite(handle, b"\x7f", os.fstat(handle).st_size - 1)

    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(VerificationError, match=f"{broken} read back from disk is not what was written"):
        write(sharded, tmp_path / "out")
    assert contents(tmp_path) == before


# --- through the command line --------------------------------------------------------------------------------------


def test_shards_are_operated_on_as_one_file_is(
    tiny: Path, codebook: Callable[..., Outcome], images_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    state = load_file(tiny)
    halves = {A: sorted(state)[::2], B: sorted(state)[1::2]}
    for name, keys in halves.items():
        save_file({key: state[key] for key in keys}, folder / name, {"format": "pt"})
    places = {key: name for name, keys in halves.items() for key in keys}
    edit_index(folder, lambda index: index.update(metadata={"total_size": 0}, weight_map=places))
    found = {}
    for model in (tiny, folder, folder / INDEX):
        options = ("--data", images_folder, "--input-range", "-1,1", "--json")
        done = codebook("prune", model, *options, *(("--force",) if model.suffix == ".json" else ()))
        assert done.exit_code == 0, done.stderr
        found[model] = done.json
        written = Path(done.json["outputs"]["model"])
        assert codebook("verify", written, "--against", model).exit_code == 0
    assert found[folder]["outputs"] == found[folder / INDEX]["outputs"]
    assert found[folder]["stages"] == found[tiny]["stages"]
    assert {path.name for path in Path(found[folder]["outputs"]["model"]).iterdir()} == {A, B, INDEX, "README.md"}
    one, many = (read_checkpoint(Path(found[model]["outputs"]["model"])) for model in (tiny, folder))
    assert all(torch.equal(many.tensor(key), one.tensor(key)) for key in one.entries)
    assert found[folder]["bytes"] == {"before": read_checkpoint(folder).nbytes, "after": many.nbytes}
    over = folder / A
    refused = codebook("prune", folder, "--data", images_folder, "--output", over, "--force")
    assert_refused(refused, f"{over} is the model itself")


# --- streaming -----------------------------------------------------------------------------------------------------

WIDTHS = {  # of a number, in bits; torch has no name for the last two
    "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "U8": 8, "BOOL": 8, "F8_E8M0": 8, "F4": 4,
    "F6_E2M3": 6,
}  # fmt: skip
CODEBOOK = "quantize.embedding.weight"


def make_mixed(folder: Path, shards: int, tensors: int, nbytes: int) -> dict[str, str]:
    """Write shards of `tensors` tensors, each of about `nbytes` bytes and of another dtype, without a library; return
    the SHA-256 of every tensor's bytes. In the middle of the last shard is a codebook of 16 codes."""
    folder.mkdir()
    places, digests, dtypes, pattern = {}, {}, cycle(WIDTHS), hashlib.shake_256(b"mixed").digest(nbytes + 4096)
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, Any] = {}
        chunks, offset = [], 0
        for position in range(tensors):
            dtype = next(dtypes)
            key, shape = f"layers.{number}.{position}.{dtype}", [nbytes // 48 * 48 * 8 // WIDTHS[dtype]]
            if number == shards - 1 and position == tensors // 2:
                key, dtype, shape = CODEBOOK, "F32", [16, 4]
            length = shape[0] * (4 if key == CODEBOOK else 1) * WIDTHS[dtype] // 8
            start = 16 * (number * tensors + position) % 4096
            chunk = memoryview(pattern)[start : start + length]
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + length]}
            chunks.append(chunk)
            places[key], digests[key] = name, hashlib.sha256(chunk).hexdigest()
            offset += length
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.writelines(chunks)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    return digests


STREAM = """
import json, sys
from pathlib import Path
import safetensors, torch
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.write import write_checkpoint
status = Path("/proc/self/status")  # getrusage would count what the process that started this one took
peak = lambda: int(status.read_text().partition("VmHWM:")[2].split()[0]) // 1024
before = peak()
original = read_checkpoint(Path(sys.argv[1]))
opened = peak() - before
original.tensor("quantize.embedding.weight")
write_checkpoint(original, Path(sys.argv[2]), {"quantize.embedding.weight": torch.ones(8, 4)}, {"kept": "surgery"}, {})
print(json.dumps({"opened": opened, "written": peak() - before}))
"""


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not outlive its test: pytest keeps tmp_path."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("shards", "tensors", "nbytes"),
    [
        pytest.param(3, 12, 10_000, id="small"),
        pytest.param(4, 11, 14 << 20, id="600 MB", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_mixed_dtypes_stream_through_unchanged_in_little_memory(
    shards: int, tensors: int, nbytes: int, output: str, roomy: Path
) -> None:
    digests = make_mixed(roomy / "model", shards, tensors, nbytes)
    done = subprocess.run(
        [sys.executable, "-c", STREAM, roomy / "model", roomy / output],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    assert used["opened"] < 20 and used["written"] < 200  # MB
    before, after = read_checkpoint(roomy / "model"), read_checkpoint(roomy / output)
    assert before.nbytes >= shards * (tensors - 1) * nbytes * 0.99
    assert {key: entry.dtype for key, entry in after.entries.items()} == before.dtypes
    for key, digest in digests.items():
        found = hashlib.sha256()
        for chunk in after.chunks(key):
            found.update(chunk)
        assert (found.hexdigest() == digest) is (key != CODEBOOK), key
    assert after.tensor(CODEBOOK).equal(torch.ones(8, 4))
    copied = [file.name for file in before.files[1:-1] if output == "out"]
    assert all(sha256(roomy / "out" / name) == sha256(roomy / "model" / name) for name in copied)
    if output == "out":
        total = json.loads((roomy / "out" / INDEX).read_text())["metadata"]["total_size"]
        assert total == sum(entry.nbytes for entry in after.entries.values())
