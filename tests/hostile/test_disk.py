"""Disks that are full or read-only, files that vanish or change on the way, and two commands with one output."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, assert_refused, contents

from codebook_tools.checkpoints.write import check_writable
from codebook_tools.models.demo import DEMO
from codebook_tools.workflows import operate

Run = Callable[..., Outcome]
Mount = Callable[[str], Path]
QUICK = ("--limit", "20", "--steps", "0", "--quiet")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """mount("size=1m"): a file system of its own, which needs root on Linux."""
    mounted = list[Path]()

    def make(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        asked = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(asked, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    "command",
    [
        ("prune", *QUICK, "--output", "o.safetensors"),
        ("prune", *QUICK, "--output", "elsewhere", "--report", "o.html"),
        ("finetune", "--limit", "20", "--steps", "12", "--quiet", "--output", "o.safetensors"),
        ("measure", "--limit", "20", "--quiet", "--stats", "o.stats"),
        ("map", "--limit", "20", "--quiet", "--method", "pca", "--report", "o.html"),
    ],
    ids=lambda command: " ".join(word for word in command if word[0] != "-"),
)
def test_a_full_disk_is_told_and_nothing_stays(
    command: tuple[str, ...], codebook: Run, mount: Mount, tmp_path: Path
) -> None:
    disk = mount("size=64k")
    words = [str(disk / word) if word.startswith("o.") else word for word in command]
    words = [str(tmp_path / "whole.safetensors") if word == "elsewhere" else word for word in words]
    assert_refused(codebook(*words), "No space left on device")
    assert contents(disk) == {}


def test_a_read_only_disk_is_told_before_any_work(codebook: Run, mount: Mount) -> None:
    disk = mount("ro,size=1m")
    for command in (
        ("prune", *QUICK, "--output", disk / "o.safetensors"),
        ("measure", "--limit", "20", "--quiet", "--stats", disk / "o.stats"),
    ):
        assert_refused(codebook(*command), "Read-only file system")


def gone(path: Path) -> None:
    path.unlink()


def changed(path: Path) -> None:
    """Another of the same length: nothing but its time tells."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize(
    ("what", "message"), [(gone, "is gone since"), (changed, "has changed since"), (cut, "has changed since")]
)
@pytest.mark.parametrize("late", [False, True], ids=["before it is written", "while it is written"])
def test_an_input_that_changes_on_the_way_is_told(
    what: Callable[[Path], None],
    message: str,
    late: bool,
    codebook: Run,
    tiny: Path,
    images_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if late:
        from codebook_tools.checkpoints import write as writing

        original = writing._write_tensors
        monkeypatch.setattr(writing, "_write_tensors", lambda *given: (original(*given), what(tiny))[0])
    else:
        write = operate.write_checkpoint
        monkeypatch.setattr(operate, "write_checkpoint", lambda *given, **more: (what(tiny), write(*given, **more))[1])
    assert_refused(codebook("prune", tiny, "--data", images_folder, "--input-range=-1,1", *QUICK), message)
    assert set(contents(tiny.parent)) <= {tiny.name}


def test_what_another_process_is_writing_is_left_to_it(codebook: Run, tmp_path: Path) -> None:
    """It was written into by both, and the first to end put a mixture of the two in place."""
    partial = tmp_path / "o.safetensors.codebook.partial"
    with partial.open("wb") as other:
        other.write(b"begun by another")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert_refused(codebook("prune", *QUICK, "--output", tmp_path / "o.safetensors"), "written by another process")
        assert partial.read_bytes() == b"begun by another" and not (tmp_path / "o.safetensors").exists()
    assert codebook("prune", *QUICK, "--output", tmp_path / "o.safetensors").exit_code == 0
    assert set(contents(tmp_path)) == {"o.safetensors", "o.index_map.safetensors"}


def test_what_another_process_wrote_meanwhile_is_not_replaced_without_force(
    codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both had found nothing there when they began, and the later of two commands replaced what the first wrote."""
    output, write = tmp_path / "o.safetensors", operate.write_checkpoint

    def later(*given: Any, **more: Any) -> Path:
        output.write_bytes(b"another's")
        return write(*given, **more)

    monkeypatch.setattr(operate, "write_checkpoint", later)
    assert_refused(codebook("prune", *QUICK, "--output", output), "o.safetensors exists; --force replaces it")
    assert contents(tmp_path) == {"o.safetensors": b"another's"}
    assert codebook("prune", *QUICK, "--output", output, "--force").exit_code == 0
    assert len(contents(tmp_path)) == 2 and output.read_bytes() != b"another's"


def test_a_kill_while_it_is_looked_whether_one_can_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made in order to see had a name, and lay there for good where a kill came before it was removed."""
    monkeypatch.setattr(os, "unlink", lambda *given, **more: None)
    check_writable(tmp_path / "o.safetensors", force=False)
    assert not contents(tmp_path)


def test_of_two_commands_with_one_output_each_leaves_a_whole_one_or_none(tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    command = [sys.executable, "-m", "codebook_tools", "prune", *QUICK, "--output", str(output), "--force"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        said = process.communicate(timeout=240)[1]
        assert process.returncode in (0, 1) and "Traceback" not in said, said
    assert any(process.returncode == 0 for process in both)
    assert {"o.safetensors", "o.index_map.safetensors"} == set(contents(tmp_path))
    verified = [sys.executable, "-m", "codebook_tools", "verify", str(output), "--against", str(DEMO)]
    assert subprocess.run(verified, capture_output=True, check=False).returncode == 0
