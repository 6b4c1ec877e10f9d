"""Disks that are full or read-only, files that change on the way, and two commands with one output."""

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
from conftest import Patch, Run, assert_refused, contents
from processes import ran

from codebook_tools.checkpoints.write import check_writable
from codebook_tools.models.demo import DEMO
from codebook_tools.workflows import operate

pytestmark = pytest.mark.hostile

Mount = Callable[[str], Path]
QUICK = ("--limit", "20", "--steps", "0", "--quiet")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """mount("size=1m"): a new file system, which needs root on Linux."""
    mounted = list[Path]()

    def make(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        if shutil.which("mount") is None or ran("mount", "-t", "tmpfs", "-o", options, "tmpfs", place).exit_code:
            pytest.skip("no file system can be mounted here")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        assert ran("umount", place).exit_code == 0


FULL = (
    "prune --steps 0 --output DISK/o.safetensors",
    "prune --steps 0 --output elsewhere.safetensors --report DISK/o.html",
    "finetune --steps 12 --output DISK/o.safetensors",
    "measure --stats DISK/o.stats",
    "map --method pca --report DISK/o.html",
)
MESSAGES = {"size=64k": "No space left on device", "ro,size=1m": "Read-only file system"}


@pytest.mark.parametrize(
    ("disk", "command"), [*(("size=64k", command) for command in FULL), *(("ro,size=1m", FULL[i]) for i in (0, 3))]
)
def test_a_full_or_read_only_disk_is_told(
    disk: str, command: str, codebook: Run, mount: Mount, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = mount(disk)
    words = command.replace("DISK", str(place)).split()
    assert_refused(codebook(*words, "--limit", 20, "--quiet"), MESSAGES[disk])
    assert contents(place) == {}


def test_an_input_that_changes_is_told(codebook: Run, tiny: Path, images_folder: Path, monkeypatch: Patch) -> None:
    write = operate.write_checkpoint
    monkeypatch.setattr(operate, "write_checkpoint", lambda *args, **more: (tiny.touch(), write(*args, **more))[1])
    assert_refused(codebook("prune", tiny, "--data", images_folder, "--input-range=-1,1", *QUICK), "has changed since")
    assert [*contents(tiny.parent)] == [tiny.name]


def test_what_another_process_is_writing_is_left_to_it(codebook: Run, tmp_path: Path) -> None:
    partial = tmp_path / "o.safetensors.codebook.partial"
    with partial.open("wb") as other:
        other.write(b"begun by another")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert_refused(codebook("prune", *QUICK, "--output", tmp_path / "o.safetensors"), "written by another process")
        assert partial.read_bytes() == b"begun by another" and not (tmp_path / "o.safetensors").exists()
    assert codebook("prune", *QUICK, "--output", tmp_path / "o.safetensors").exit_code == 0
    assert set(contents(tmp_path)) == {"o.safetensors", "o.index_map.safetensors"}


def test_what_another_wrote_meanwhile_stays_without_force(codebook: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    output, write = tmp_path / "o.safetensors", operate.write_checkpoint

    def later(*args: Any, **more: Any) -> Path:
        output.write_bytes(b"another's")
        return write(*args, **more)

    monkeypatch.setattr(operate, "write_checkpoint", later)
    assert_refused(codebook("prune", *QUICK, "--output", output), "o.safetensors exists; --force replaces it")
    assert contents(tmp_path) == {"o.safetensors": b"another's"}
    assert codebook("prune", *QUICK, "--output", output, "--force").exit_code == 0
    assert len(contents(tmp_path)) == 2 and output.read_bytes() != b"another's"


def test_a_kill_while_it_is_looked_whether_one_can_write_leaves_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "unlink", lambda *args, **more: None)
    check_writable(tmp_path / "o.safetensors", force=False)
    assert not contents(tmp_path)


@pytest.mark.slow
def test_of_two_commands_with_one_output_each_leaves_a_whole_one_or_none(tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    command = [sys.executable, "-m", "codebook_tools", "prune", *QUICK, "--output", str(output), "--force"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        errors = process.communicate(timeout=240)[1]
        assert process.returncode in (0, 1) and "Traceback" not in errors, errors
    assert any(process.returncode == 0 for process in both)
    assert {"o.safetensors", "o.index_map.safetensors"} == set(contents(tmp_path))
    assert ran(sys.executable, "-m", "codebook_tools", "verify", output, "--against", DEMO).exit_code == 0
