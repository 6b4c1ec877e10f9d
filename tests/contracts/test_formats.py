"""What all formats of weights promise alike, each read and written through the same cases."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import Outcome, State, contents, same
from safetensors.torch import load_file, save_file
from torch import Tensor
from weight_files import (
    CODEBOOK,
    INDEX,
    NEW,
    STATE,
    TOTAL,
    A,
    B,
    header_of,
    metadata_of,
    save_pickle,
    save_shards,
    sha256,
)

from codebook_tools.checkpoints import tensors
from codebook_tools.checkpoints.layout import CONFIG, index_map_path
from codebook_tools.checkpoints.read import read_checkpoint, torch_dtype
from codebook_tools.checkpoints.write import tensor_bytes, write_checkpoint
from codebook_tools.errors import CodebookError, VerificationError

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"
MAPS = {"codes/index_map": torch.tensor([0, -1, 1, -1]), "codes/nearest": torch.tensor([0, 0, 1, 1])}


@dataclass(frozen=True)
class Format:
    """How weights are saved in an empty folder, what is read of them, and how a directory of them is written."""

    save: Callable[[Path], Path]
    files: tuple[str, ...]
    written: set[str]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, object] | None = None


def one_file(folder: Path) -> Path:
    save_file(STATE, folder / "vq.safetensors", SAFETENSORS)
    return folder / "vq.safetensors"


def with_config(folder: Path, config: dict[str, object] | None = None) -> Path:
    """With a file that goes with any weights, and what does not: other weights, a link out, a folder."""
    (folder / CONFIG).write_text(json.dumps(config or K4))
    (folder / "README.md").write_text("by others")
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "link").symlink_to(__file__)
    (folder / "below").mkdir()
    return folder


def wrapped(state: State = STATE) -> dict[str, object]:
    return {"args": argparse.Namespace(k=4), "model": state}


def pickle_in(folder: Path, name: str, config: dict[str, object] | None = None) -> Path:
    return save_pickle(wrapped(), with_config(folder, config) / name)


SAFETENSORS, SHARDED = {"format": "pt", "author": "A. Ünal", "step": "7"}, {"format": "pt", "shard": A}
K4: dict[str, object] = {"k": 4}
ENCODEC: dict[str, object] = {"model_type": "encodec"}
BESIDE = {CONFIG, "README.md"}
DIFFUSERS_BIN, TRANSFORMERS_BIN = "diffusion_pytorch_model.bin", "pytorch_model.bin"
FORMATS = {
    "safetensors": Format(one_file, ("vq.safetensors",), {DIFFUSERS, CONFIG}, SAFETENSORS),
    "directory": Format(lambda f: one_file(with_config(f)).parent, ("vq.safetensors",), {"vq.safetensors"} | BESIDE,
                        SAFETENSORS, K4),
    "shards": Format(lambda f: save_shards(with_config(f)), (INDEX, A, B), {INDEX, A, B} | BESIDE, SHARDED, K4),
    "index": Format(lambda f: save_shards(with_config(f)) / INDEX, (INDEX, A, B), {INDEX, A, B} | BESIDE, SHARDED, K4),
    "pickle": Format(lambda f: save_pickle(wrapped(), f / "vq.ckpt"), ("vq.ckpt",), {DIFFUSERS, CONFIG}),
    "old pickle": Format(lambda f: save_pickle(wrapped(), f / "vq", False), ("vq",), {DIFFUSERS, CONFIG}),
    "pickle beside a config of transformers": Format(lambda f: pickle_in(f, "vq.pt", ENCODEC), ("vq.pt",),
                                                     {TRANSFORMERS, CONFIG}, config=ENCODEC),
    "directory of a pickle of transformers": Format(lambda f: pickle_in(f, TRANSFORMERS_BIN).parent,
                                                    (TRANSFORMERS_BIN,), {TRANSFORMERS} | BESIDE, config=K4),
    "directory of a pickle of diffusers": Format(lambda f: pickle_in(f, DIFFUSERS_BIN).parent,
                                                 (DIFFUSERS_BIN,), {DIFFUSERS} | BESIDE, config=K4),
}  # fmt: skip


@pytest.fixture(params=FORMATS)
def kind(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


@pytest.fixture
def source(kind: Format, tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return kind.save(tmp_path / "in")


def write(source: Path, output: Path, changed: State | None = None) -> Path:
    config = b'{"k": 2}' if output.suffix != ".safetensors" else None
    changed = {CODEBOOK: NEW} if changed is None else changed
    return write_checkpoint(read_checkpoint(source), output, changed, {"kept": "surgery"}, MAPS, config, force=True)


def test_weights_are_read_as_they_were_saved(kind: Format, source: Path, tmp_path: Path) -> None:
    before, folder = contents(tmp_path), tmp_path / "in"
    read = read_checkpoint(source)
    assert read.files == tuple(folder / name for name in kind.files) and read.path == read.files[0]
    assert read.folder == (folder if source.is_dir() or read.sharded else None)
    assert (read.metadata, read.config) == (kind.metadata, kind.config)
    assert read.shapes == {key: tuple(tensor.shape) for key, tensor in STATE.items()}
    assert all(torch_dtype(read.dtypes[key]) == tensor.dtype for key, tensor in STATE.items())
    read.tensor("flag ü").zero_()  # each is a copy of its own
    assert all(same(read.tensor(key), tensor) for key, tensor in STATE.items())
    assert all(same(tensor, STATE[key]) for key, tensor in read.tensors().items())
    weights = [file for file in read.files if file.suffix == ".safetensors"]
    assert read.nbytes == (sum(file.stat().st_size for file in weights) or TOTAL)
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in read.files)  # as sha256sum prints them
    assert read.sha256 == (hashlib.sha256(lines.encode()).hexdigest() if read.sharded else sha256(read.path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_chunks_are_the_bytes_of_safetensors(source: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    read = read_checkpoint(source)
    for key, tensor in STATE.items():
        chunks = list(read.chunks(key))
        assert all(len(part) <= chunk for part in chunks)
        assert b"".join(chunks) == tensor_bytes(tensor)
        assert same(read.tensor(key), tensor)


def test_one_file_takes_what_changed_and_all_else_as_it_was(kind: Format, source: Path, tmp_path: Path) -> None:
    before, output = contents(tmp_path), tmp_path / "out.safetensors"
    assert write(source, output) == tmp_path / "out.index_map.safetensors" == index_map_path(output)
    loaded = load_file(output)
    assert loaded.keys() == STATE.keys()
    assert all(same(loaded[key], tensor) for key, tensor in (STATE | {CODEBOOK: NEW}).items())
    assert metadata_of(output) == {"format": "pt", **kind.metadata, "codebook_tools.kept": "surgery"}
    entries = [entry for entry in read_checkpoint(output).entries.values() if entry.nbytes]
    first = min(entry.start for entry in entries)
    assert all((entry.start - first) % STATE[entry.key].element_size() == 0 for entry in entries)
    maps = load_file(index_map_path(output))
    assert maps.keys() == MAPS.keys() and all(same(maps[key], MAPS[key]) for key in MAPS)
    assert metadata_of(index_map_path(output))["codebook_tools.checkpoint_sha256"] == sha256(output)
    for path in (output, index_map_path(output)):
        header, data = header_of(path)
        assert [*header] == ["__metadata__", *sorted(header.keys() - {"__metadata__"})]
        assert [*header["__metadata__"]] == sorted(header["__metadata__"])
        assert (path.stat().st_size - len(data)) % 8 == 0
    assert before.items() <= contents(tmp_path).items()


def test_a_directory_is_written_as_its_library_loads_it(kind: Format, source: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    map_path = write(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == kind.written
    read = read_checkpoint(tmp_path / "out")
    assert read.config == {"k": 2}
    assert all(same(read.tensor(key), tensor) for key, tensor in (STATE | {CODEBOOK: NEW}).items())
    assert metadata_of(map_path)["codebook_tools.checkpoint_sha256"] == read.sha256
    assert before.items() <= contents(tmp_path).items()


def test_equal_work_gives_equal_bytes_whatever_the_order_of_its_parts(source: Path, tmp_path: Path) -> None:
    parts: list[dict[str, Tensor]] = [{CODEBOOK: NEW, "flag ü": torch.tensor([True] * 3)}, MAPS]
    for name, turn in (("one", list), ("two", lambda items: list(items)[::-1])):
        changed, maps = (dict(turn(part.items())) for part in parts)
        about = dict(turn({"a": "1", "b": "2"}.items()))
        for output in (tmp_path / f"{name}-folder", tmp_path / f"{name}.safetensors"):
            write_checkpoint(read_checkpoint(source), output, changed, about, maps)
    written = contents(tmp_path)
    ones = {path.replace("one", "two"): content for path, content in written.items() if path.startswith("one")}
    assert len(ones) >= 4 and ones.items() <= written.items()


@pytest.mark.parametrize("fault", ["data", "header", "full"])
@pytest.mark.parametrize("output", ["out", "out.safetensors"])
def test_a_disk_that_fails_at_any_file_leaves_what_was_there(
    fault: str, output: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if output == "out.safetensors":
        (tmp_path / output).write_bytes(b"the old one")
    before = contents(tmp_path)
    for failing in count():
        numbers = count()

        def fsync(handle: int, failing: int = failing, numbers: count[int] = numbers) -> None:
            if stat.S_ISREG(os.fstat(handle).st_mode) and next(numbers) == failing:
                if fault == "full":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.pwrite(handle, b"\x7f", os.fstat(handle).st_size - 1 if fault == "data" else 60)

        monkeypatch.setattr(os, "fsync", fsync)
        refusal = None
        try:
            write(source, tmp_path / output)
        except CodebookError as error:
            refusal = error
        if refusal is None:
            break
        assert isinstance(refusal, VerificationError) == (fault != "full")
        assert str(tmp_path / "out") in str(refusal)
        assert contents(tmp_path) == before
    assert failing >= 2 and contents(tmp_path) != before


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def alter(path: Path) -> None:
    """Into another of the same length, so that only its time differs."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("change", "message"), [(Path.unlink, "gone"), (alter, "changed"), (cut, "changed")])
@pytest.mark.parametrize("late", [False, True], ids=["before it is written", "while it is written"])
def test_a_source_that_changes_on_the_way_leaves_no_output(
    change: Callable[[Path], None],
    message: str,
    late: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = read_checkpoint(source)
    if late:  # what was written differs then, or cannot be read again, or the source shows at the end that it changed
        monkeypatch.setattr(os, "fsync", lambda handle: change(read.files[-1]) if read.files[-1].exists() else None)
    else:
        change(read.files[-1])
    for output in ("out", "out.safetensors"):
        with pytest.raises(CodebookError, match=None if late else f"(has|is) {message} since"):
            write_checkpoint(read, tmp_path / output, {CODEBOOK: NEW}, {}, MAPS, b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def twin_pickle(state: State, folder: Path) -> Path:
    return save_pickle(wrapped(state), folder / "twin.pt")


def twin_shards(state: State, folder: Path) -> Path:
    keys = sorted(state)
    return save_shards(folder, {A: {key: state[key] for key in keys[::2]}, B: {key: state[key] for key in keys[1::2]}})


@pytest.mark.parametrize("save", [twin_pickle, twin_shards, lambda *args: twin_shards(*args) / INDEX])
def test_a_surgery_is_that_of_the_safetensors_twin(
    save: Callable[[State, Path], Path], tiny: Path, codebook: Callable[..., Outcome], images_folder: Path
) -> None:
    (tiny.parent / "twin").mkdir()
    twin = save(load_file(tiny), tiny.parent / "twin")
    results = []
    for model in (tiny, twin):
        done = codebook("prune", model, "--data", images_folder, "--input-range", "-1,1", "--json")
        assert done.exit_code == 0, done.stderr
        results.append(done.json)
        assert codebook("verify", done.json["outputs"]["model"], "--against", model).exit_code == 0
    assert results[0]["stages"] == results[1]["stages"]
    one, other = (read_checkpoint(Path(result["outputs"]["model"])) for result in results)
    assert one.entries.keys() == other.entries.keys()
    assert all(same(one.tensor(key), other.tensor(key)) for key in one.entries)
    assert results[1]["bytes"] == {"before": read_checkpoint(twin).nbytes, "after": other.nbytes}
