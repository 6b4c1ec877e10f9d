"""Weights in several files: an index that is checked against them, and only what must change written anew."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from operator import ne
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import Run, State, assert_refused, contents
from safetensors.torch import load_file, save_file
from torch import Tensor
from weight_files import (
    CODEBOOK,
    INDEX,
    NEW,
    SHARDS,
    STATE,
    TOTAL,
    A,
    B,
    edit_index,
    metadata_of,
    safetensors_bytes,
    save_pickle,
    save_shards,
    sha256,
)

from codebook_tools.checkpoints.layout import CONFIG
from codebook_tools.checkpoints.read import joined_sha256, read_checkpoint
from codebook_tools.checkpoints.write import write_checkpoint
from codebook_tools.errors import CodebookError

CHANGED, COUNT = {CODEBOOK: NEW}, {"count": torch.tensor(8)}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / CONFIG).write_text("{}")
    return save_shards(tmp_path / "model")


def write(original: Path, output: Path, changed: State, **metadata: str) -> Path:
    write_checkpoint(read_checkpoint(original), output, changed, metadata or {"kept": "surgery"}, {}, b'{"k": 2}')
    return output


# --- reading -------------------------------------------------------------------------------------------------------
def test_without_a_config_shards_are_read_all_the_same(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sharded / CONFIG).unlink()
    monkeypatch.chdir(sharded)
    for path in (sharded, sharded / INDEX, Path(INDEX)):
        read = read_checkpoint(path)
        assert (read.folder, read.config_path, read.config) == (path.parent if path.suffix else path, None, None)
        assert read.entries.keys() == STATE.keys()


def replaced(target: object, folder: Path) -> None:
    """A shard is elsewhere, and a link to `target` in its place, or a folder, or nothing."""
    (folder / A).rename(folder.parent / A)
    if target == "folder":
        (folder / A).mkdir()
    elif target:
        (folder / A).symlink_to(str(target))


def place(folder: Path, name: object) -> None:
    """The index says that a tensor is in the file `name`."""
    edit_index(folder, lambda index: index["weight_map"].update(count=name))


def put_index(text: str, folder: Path) -> None:
    (folder / INDEX).write_text(text)


def save_again(folder: Path, name: str, **more: Tensor) -> None:
    save_file(SHARDS[name] | more, folder / name, {"format": "pt"})


UNSOUND: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard missing": (partial(replaced, None), f"names {A}, which is missing"),
    "a shard that is a folder": (partial(replaced, "folder"), f"names {A}, which is missing"),
    "a shard linked from outside": (partial(replaced, f"../{A}"), f"{A} is a link to outside its folder"),
    "a link in a circle": (partial(replaced, A), f"names {A}, which is missing"),
    "a shard above": (lambda f: (replaced(None, f), place(f, f"../{A}")), f"names '../{A}', outside its folder"),
    "a number as a name": (lambda f: place(f, 1), "says that count is in 1, which is no name"),
    "the index as a shard": (lambda f: place(f, INDEX), f"{INDEX} is not a sound safetensors file"),
    "a key in another shard": (lambda f: place(f, B), f"count is in {B}, but it is in {A}"),
    "a key in no shard": (lambda f: edit_index(f, lambda index: index["weight_map"].update(gone=A)), "no shard has it"),
    "a key in two shards": (lambda f: save_again(f, B, count=torch.ones(1)), f"count lies in two .* {A} and {B}"),
    "a key in no index": (lambda f: save_again(f, B, extra=torch.ones(1)), f"not name extra, which {B} holds"),
    "a shard in no index": (lambda f: save_file(STATE, f / B.replace("2", "3")), "does not name model-00003-of-00003"),
    "a shard cut short": (lambda f: os.truncate(f / A, 100), f"{A} is not a sound safetensors file"),
    "metadata that is a list": (lambda f: edit_index(f, lambda i: i.update(metadata=[])), "is no index of shards"),
    "weights in one file, too": (lambda f: save_file(STATE, f / "model.safetensors"), "and sharded weights"),
    "a config that is none": (lambda f: (f / CONFIG).write_text("{"), "config.json is no JSON"),
}  # fmt: skip
OUTSIDE = ("/etc/passwd", f"x/{A}", f"..\\{A}", ".", "", "a\0b")
UNSOUND |= {f"a shard called {name!r}": (partial(place, name=name), "outside its folder") for name in OUTSIDE}
INDICES = {"{": "is no JSON", "[]": "holds a JSON list"} | dict.fromkeys(
    ("{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'), "is no index of shards"
)
UNSOUND |= {f"index {text}": (partial(put_index, text), message) for text, message in INDICES.items()}


@pytest.mark.parametrize("kind", UNSOUND)
def test_shards_that_are_amiss_are_refused_in_one_line(kind: str, sharded: Path) -> None:
    change, message = UNSOUND[kind]
    change(sharded)
    with pytest.raises(CodebookError, match=message) as error:
        read_checkpoint(sharded)
    assert "\n" not in str(error.value)


def test_another_json_is_no_index_and_a_link_within_the_folder_no_way_out_of_it(sharded: Path) -> None:
    with pytest.raises(CodebookError, match=r"config.json is no index of shards"):
        read_checkpoint(sharded / CONFIG)
    (sharded / A).rename(sharded / "real.safetensors")
    (sharded / A).symlink_to("real.safetensors")
    assert read_checkpoint(sharded).shapes["count"] == ()


# --- writing -------------------------------------------------------------------------------------------------------
def test_only_the_shard_that_changes_is_written_anew_and_the_total_put_right(sharded: Path, tmp_path: Path) -> None:
    before, after = contents(sharded), contents(write(sharded, tmp_path / "out", CHANGED))
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == [CONFIG, B, INDEX]
    assert after[INDEX] == before[INDEX].replace(b'"total_size": %d' % TOTAL, b'"total_size": %d' % (TOTAL - 24))
    assert load_file(tmp_path / "out" / B)[CODEBOOK].equal(NEW)
    for name in ("wrong", "missing"):
        total = {"metadata": {"total_size": 1.5e9}} if name == "wrong" else {}
        weights = json.loads((sharded / INDEX).read_text())["weight_map"]
        (sharded / INDEX).write_text(json.dumps({"weight_map": weights} | total))
        write(sharded, tmp_path / name, CHANGED)
        assert json.loads((tmp_path / name / INDEX).read_text())["metadata"]["total_size"] == TOTAL - 24


def test_shards_that_change_or_else_the_first_have_our_metadata_of_the_last_change(
    sharded: Path, tmp_path: Path
) -> None:
    cases: list[tuple[State, set[str]]] = [({}, {A}), (COUNT, {A}), (CHANGED, {B}), (CHANGED | COUNT, {A, B})]
    for number, (changed, rewritten) in enumerate(cases):
        output = write(sharded, tmp_path / str(number), changed)
        for name in (A, B):
            ours = {"codebook_tools.kept": "surgery"} if name in rewritten else {}
            assert metadata_of(output / name) == {"format": "pt", "shard": name, **ours}
            assert (sha256(output / name) == sha256(sharded / name)) is (name not in rewritten)
        assert read_checkpoint(output).metadata["codebook_tools.kept"] == "surgery"
    twice = write(write(sharded, tmp_path / "once", COUNT, kept="first"), tmp_path / "twice", CHANGED, kept="second")
    assert [metadata_of(twice / name)["codebook_tools.kept"] for name in (A, B)] == ["second"] * 2
    assert read_checkpoint(twice).tensor("count") == 8


def test_a_shard_is_not_overwritten_by_what_is_made_of_it(sharded: Path, codebook: Run, images_folder: Path) -> None:
    before = contents(sharded)
    refused = codebook("prune", sharded, "--data", images_folder, "--output", sharded / A, "--force")
    assert_refused(refused, f"{sharded / A} is the model itself")
    assert contents(sharded) == before


# --- streaming -----------------------------------------------------------------------------------------------------
WIDTHS = {  # of a number, in bits; torch has no name for the last two
    "F32": 32, "BF16": 16, "F8_E4M3": 8, "I64": 64, "BOOL": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
}  # fmt: skip


def save_large(folder: Path, nbytes: int) -> Path:
    """Tensors of `nbytes` bytes: one of each dtype, and in another shard a codebook; written without a library."""
    folder.mkdir()
    layer = [(f"layer.{dtype}", dtype, [nbytes * 8 // bits]) for dtype, bits in WIDTHS.items()]
    shards = {A: layer, B: [(CODEBOOK, "F32", [nbytes // 16, 4])]}
    for name, tensors in shards.items():
        header = {
            key: {"dtype": dtype, "shape": shape, "data_offsets": [i * nbytes, (i + 1) * nbytes]}
            for i, (key, dtype, shape) in enumerate(tensors)
        }
        text, data = json.dumps(header).encode(), hashlib.shake_256(name.encode()).digest(len(header) * nbytes)
        (folder / name).write_bytes(safetensors_bytes(text + b" " * (-len(text) % 8), data))
    places = {key: name for name, tensors in shards.items() for key, _, _ in tensors}
    edit_index(folder, lambda index: index.update(weight_map=places))
    return folder


STREAM = """
import json, sys
from pathlib import Path
from tempfile import TemporaryDirectory
import safetensors, torch
from codebook_tools.checkpoints.read import joined_sha256, read_checkpoint
from codebook_tools.checkpoints.write import write_checkpoint
status = Path("/proc/self/status")  # getrusage would count what the process that started this one took
peak = lambda: int(status.read_text().partition("VmHWM:")[2].split()[0]) // 1024
before, used = peak(), []
assert read_checkpoint(Path("large.pt")).tensor("codebook").sum() == 12
used.append(peak() - before)
original = read_checkpoint(Path("model"))
original.tensor("quantize.embedding.weight")
used.append(peak() - before)
for output in ("out", "out.safetensors"):
    write_checkpoint(original, Path(output), {"quantize.embedding.weight": torch.ones(8, 4)}, {}, {}, force=True)
print(json.dumps([*used, peak() - before]))
"""


@pytest.mark.parametrize("nbytes", [12_000, pytest.param(72_000_000, marks=pytest.mark.slow)])
def test_files_are_opened_and_written_unchanged_in_little_memory(nbytes: int, tmp_path: Path) -> None:
    with TemporaryDirectory(dir=tmp_path) as name:  # it does not outlive its test: pytest keeps tmp_path
        folder = Path(name)
        before = read_checkpoint(save_large(folder / "model", nbytes))
        save_pickle({"codebook": torch.ones(4, 3), "large": torch.zeros(20_000_000)}, folder / "large.pt")  # 80 MB
        done = subprocess.run([sys.executable, "-c", STREAM], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        pickle_opened, opened, written = json.loads(done.stdout)  # MB
        assert pickle_opened < 40 and opened < 80 and written < 220
        for output in ("out", "out.safetensors"):
            after = read_checkpoint(folder / output)
            assert (after.dtypes, after.shapes) == (before.dtypes, before.shapes | {CODEBOOK: (8, 4)})
            changed = {key for key in before.entries if any(map(ne, before.chunks(key), after.chunks(key)))}
            assert changed == {CODEBOOK} and after.tensor(CODEBOOK).equal(torch.ones(8, 4))


def test_the_hash_of_shards_is_that_of_their_sums() -> None:
    sums = {"a.safetensors": "1" * 64, "b.safetensors": "2" * 64}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    assert joined_sha256(sums) == hashlib.sha256(lines.encode()).hexdigest()
    assert joined_sha256({"a.safetensors": "1" * 64}) == "1" * 64
