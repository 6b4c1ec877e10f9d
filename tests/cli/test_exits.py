"""Every other end than exit code 1: wrong usage, a file that is not what was meant, our own faults, and signals."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import Outcome, assert_refused, contents

from codebook_tools.workflows import operate, pipeline

Run = Callable[..., Outcome]
RANGE = ("--input-range", "-1,1")


@pytest.mark.parametrize(
    "arguments",
    [
        ["refit"],
        ["refit", "--k", "many"],
        ["refit", "--k", "4", "--init", "lucky"],
        ["prune", "--no-such-option"],
        ["measure", "one.safetensors", "two.safetensors"],
        ["finetune", "--train", "encoder"],
        ["verify"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = codebook(*arguments)
    assert found.exit_code == 2 and found.stdout == "" and "Usage:" in found.stderr
    assert contents(tmp_path) == {}


def test_a_file_that_is_not_what_was_meant_is_exit_code_3_and_leaves_nothing(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        os.lseek(handle, -1, os.SEEK_END)
        os.write(handle, b"\x7f")

    monkeypatch.setattr(os, "fsync", fsync)  # a disk that damages the last byte
    found = codebook("prune", tiny, "--data", images_folder, *RANGE)
    assert found.exit_code == 3 and "is not what was written" in found.stderr
    assert set(contents(tmp_path)) == {"tiny.safetensors"}


def test_our_own_fault_is_exit_code_70_with_the_traceback_to_report(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(operate, "write_checkpoint", faulty)
    found = codebook("prune", tiny, "--data", images_folder, *RANGE, "--json")
    assert found.exit_code == 70 and found.stdout == ""
    assert "Traceback" in found.stderr and "a fault of ours" in found.stderr and "please report it" in found.stderr
    assert set(contents(tmp_path)) == {"tiny.safetensors"}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_lack_of_memory_is_the_users_to_mend(
    error: Exception, tiny: Path, codebook: Run, images_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(operate, "write_checkpoint", greedy)
    found = codebook("prune", tiny, "--data", images_folder, *RANGE, "--json")
    assert_refused(found, "out of memory")
    assert "use a smaller --batch-size or --size" in found.stderr


@pytest.mark.parametrize(
    ("room", "where"),
    [(pipeline, "finetune"), (operate, "write_checkpoint"), (pipeline, "measure_stage"), (operate, "prove")],
)
def test_an_interruption_is_exit_code_130_wherever_it_comes(
    room: ModuleType,
    where: str,
    tiny: Path,
    codebook: Run,
    images_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room, where, interrupted)
    found = codebook("finetune", tiny, "--steps", 1, "--data", images_folder, *RANGE)
    assert found.exit_code == 130 and found.stdout == "" and found.stderr.count("\n") == 1
    unfinished = set() if where == "finetune" else {"tiny.finetune-k16.training.safetensors"}  # for --resume
    assert set(contents(tmp_path)) - {"tiny.safetensors"} == unfinished


def heed_interrupts() -> None:
    """A job in the background is born deaf to them, and so would its children be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(program: str) -> subprocess.CompletedProcess[str]:
    """How a program of Python ends."""
    command = [sys.executable, "-c", program]
    given: dict[str, Any] = {"capture_output": True, "text": True, "preexec_fn": heed_interrupts}
    return subprocess.run(command, check=False, timeout=120, **given)


def start(*arguments: object, **more: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "codebook_tools", *map(str, arguments)], **more)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, b"interrupted"), (signal.SIGTERM, 143, b"terminated")]
)
def test_a_signal_during_fine_tuning_ends_with_a_line_and_its_own_code_and_leaves_nothing(
    number: signal.Signals, code: int, word: bytes, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    pty = pytest.importorskip("pty")  # a terminal on stderr, so that progress says when fine-tuning has begun
    reader, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    asked = ("finetune", tiny, "--steps", 10_000_000, "--batch-size", 8, "--data", images_folder, *RANGE, "--json")
    given: dict[str, Any] = {"stderr": terminal, "env": environment, "preexec_fn": heed_interrupts}
    with start(*asked, stdout=subprocess.PIPE, **given) as process:
        os.close(terminal)
        shown, deadline, sent = b"", time.monotonic() + 120, False
        while time.monotonic() < deadline:
            if not select.select([reader], [], [], 1)[0]:
                continue
            try:
                chunk = os.read(reader, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not chunk:
                break
            shown += chunk
            if b"fine-tune" in shown and not sent:
                process.send_signal(number)
                sent = True
        os.close(reader)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()  # or the rest of the tests would wait for it
        assert process.stdout is not None and process.stdout.read() == b""
        assert sent and process.wait(30) == code, shown
    assert word in shown and b"Traceback" not in shown
    assert set(contents(tmp_path)) == {"tiny.safetensors"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_comes_while_an_object_is_cleared_away_is_not_lost(number: int, code: int) -> None:
    """Python ignores what is raised there: the command went on to its end, with a traceback in between."""
    program = f"""
import os, time, typer
from codebook_cli.errors import reported

class Cleared:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        time.sleep(0.001)

try:
    with reported():
        Cleared()
        time.sleep(20)
        print("it went on")
except typer.Exit as end:
    print(end.exit_code)
"""
    found = ended(program)
    assert (found.stdout, found.stderr.count("\n")) == (f"{code}\n", 1), found


def test_an_interruption_before_a_command_begins_is_not_lost_either() -> None:
    program = """
import os, signal, time
from codebook_cli import app

class Cleared:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)

def get_command(*_):
    Cleared()
    time.sleep(20)

app.Commands.get_command = get_command
app.app(["inspect"])
"""
    found = ended(program)
    assert found.returncode == 130 and "Traceback" not in found.stderr, found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_of_which_a_library_makes_an_error_of_its_own_is_no_fault_of_ours(number: int, code: int) -> None:
    """As numpy does where it comes while structured arrays are compared: exit code 70, and a traceback."""
    program = f"""
import os, time, typer
from codebook_cli.errors import reported

try:
    with reported():
        try:
            os.kill(os.getpid(), {int(number)})
            time.sleep(20)
        except BaseException:
            raise TypeError("no common dtype") from None
except typer.Exit as end:
    print(end.exit_code)
"""
    found = ended(program)
    assert (found.stdout, found.stderr.count("\n")) == (f"{code}\n", 1), found


def test_a_reader_that_leaves_early_is_no_error(tiny: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with start("inspect", tiny, "--json", stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, b"")


def closed(*handles: int) -> Callable[[], None]:
    """What closes standard streams in a process that is about to begin."""
    return lambda: [os.close(handle) for handle in handles] and None


@pytest.mark.parametrize("asked", [["inspect"], ["inspect", "--json"], ["inspect", "--help"], ["--version"]])
def test_standard_output_that_takes_no_more_is_told_in_one_line(asked: list[str]) -> None:
    with open("/dev/full", "w") as full, start(*asked, stdout=full, stderr=subprocess.PIPE) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said == b"error: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize("handles", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("asked", [["inspect"], ["inspect", "--json"]])
def test_a_standard_stream_that_is_closed_is_as_if_it_led_nowhere(asked: list[str], handles: tuple[int, ...]) -> None:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(*asked, preexec_fn=closed(*handles), **pipes) as process:
        shown, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, b"")
    assert (b"_vq_vae._embedding.weight" in shown) == (1 not in handles)


def test_what_is_written_while_all_standard_streams_are_closed_is_whole(
    tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.safetensors"
    asked = ("prune", tiny, "--keep", 4, "--data", images_folder, *RANGE, "-o", output)
    with start(*asked, preexec_fn=closed(0, 1, 2)) as process:
        assert process.wait(120) == 0
    with start("verify", output, "--against", tiny, stdout=subprocess.PIPE) as process:
        assert process.wait(120) == 0


def test_a_reader_of_a_table_that_leaves_early_is_no_error_either(tiny: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with start("inspect", tiny, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, b"")


@pytest.mark.parametrize("asked", [["inspect"], ["prune", "--keep", "4", "--limit", "60"]])
def test_a_current_folder_that_was_deleted_is_told_in_one_line(asked: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with start(*asked, cwd=folder, preexec_fn=folder.rmdir, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        shown, said = process.communicate(timeout=120)
    assert (process.returncode, shown) == (1, b"")
    assert said == b"error: the current folder is no longer there; go to another with cd\n"
