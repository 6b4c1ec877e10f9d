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
from conftest import Patch, Run, contents
from processes import ran
from safetensors.torch import load_file

from codebook_tools.checkpoints.layout import training_path
from codebook_tools.errors import VerificationError
from codebook_tools.workflows import operate, pipeline

RANGE = ("--input-range", "-1,1")


@pytest.mark.parametrize(
    "arguments",
    [
        "refit",
        "refit --k many",
        "refit --k 4 --init lucky",
        "prune --no-such-option",
        "measure one.safetensors two.safetensors",
        "no-such-command",
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: str, codebook: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    found = codebook(*arguments.split())
    assert found.exit_code == 2 and found.stdout == "" and "Usage:" in found.stderr
    assert contents(tmp_path) == {}


LEFT = {"tiny.finetune-k16.training.safetensors"}
"""For --resume."""


@pytest.mark.parametrize(
    ("room", "where", "error", "code", "words", "left"),
    [
        (operate, "write_checkpoint", ZeroDivisionError("of ours"), 70, ("Traceback", "of ours", "report it"), LEFT),
        (operate, "write_checkpoint", MemoryError(), 1, ("out of memory", "a smaller --batch-size or --size"), LEFT),
        (operate, "write_checkpoint", RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1,
         ("out of memory", "a smaller --batch-size or --size"), LEFT),
        (operate, "write_checkpoint", VerificationError("it is another"), 3, ("error: it is another",), LEFT),
        (operate, "write_checkpoint", KeyboardInterrupt(), 130, ("interrupted",), LEFT),
        (pipeline, "finetune", KeyboardInterrupt(), 130, ("interrupted",), set()),
    ],
)  # fmt: skip
def test_what_goes_wrong_has_an_exit_code_of_its_kind(
    room: ModuleType, where: str, error: BaseException, code: int, words: tuple[str, ...], left: set[str],
    on_tiny: Run, tmp_path: Path, monkeypatch: Patch,
) -> None:  # fmt: skip
    def raising(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(room, where, raising)
    outcome = on_tiny("finetune", "--steps", 1, "--json")
    assert (outcome.exit_code, outcome.stdout) == (code, ""), outcome
    assert all(word in outcome.stderr for word in words) and (code == 70 or outcome.stderr.count("\n") == 1)
    assert set(contents(tmp_path)) - {"tiny.safetensors"} == left


# --- in processes of their own ---------------------------------------------------------------------------------------


def heed_interrupts() -> None:
    """A job in the background is born deaf to them, and so would its children be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments: object, **more: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "codebook_tools", *map(str, arguments)], **more)


def ended(*arguments: object, **more: Any) -> tuple[int, bytes, bytes]:
    """Exit code and both outputs of a command."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(*arguments, **pipes | more) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [pytest.param(signal.SIGINT, 130, b"interrupted", marks=pytest.mark.slow), (signal.SIGTERM, 143, b"terminated")],
)
def test_a_signal_during_fine_tuning_ends_with_a_line_and_its_own_code_and_leaves_no_part(
    number: signal.Signals, code: int, word: bytes, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    pty = pytest.importorskip("pty")  # a terminal on stderr, so that progress says when fine-tuning has begun
    reader, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    command = ("finetune", tiny, "--steps", 10_000_000, "--batch-size", 8, "--data", images_folder, *RANGE, "--json")
    options: dict[str, Any] = {"stderr": terminal, "env": environment, "preexec_fn": heed_interrupts}
    with start(*command, stdout=subprocess.PIPE, **options) as process:
        os.close(terminal)
        progress, deadline, sent = b"", time.monotonic() + 120, False
        while time.monotonic() < deadline:
            if not select.select([reader], [], [], 1)[0]:
                continue
            try:
                chunk = os.read(reader, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not chunk:
                break
            progress += chunk
            if b"fine-tune" in progress and not sent:
                process.send_signal(number)
                sent = True
        os.close(reader)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()  # or the rest of the tests would wait for it
        assert process.stdout is not None and process.stdout.read() == b""
        assert sent and process.wait(30) == code, progress
    assert word in progress and b"Traceback" not in progress
    snapshot = training_path(tmp_path / "tiny.finetune-k16.safetensors").name  # of step 1, which may be over by then
    assert {"tiny.safetensors"} <= set(contents(tmp_path)) <= {"tiny.safetensors", snapshot}
    assert all(load_file(path) for path in tmp_path.glob("*.safetensors"))


CLEARED = """
import os, time, typer
from codebook_cli import app
from codebook_cli.errors import reported

class Cleared:
    def __del__(self):
        os.kill(os.getpid(), number)
        time.sleep(0.001)

def cleared(*_):
    Cleared()
    for _ in range(400):  # a long sleep would not be interrupted, the signal being another thread's
        time.sleep(0.05)
    print("it went on")
"""
WITHIN = """
def another_error():
    try:
        os.kill(os.getpid(), number)
        time.sleep(20)
    except BaseException:
        raise TypeError("no common dtype") from None

for number in (2, 15):
    for work in (cleared, another_error):
        try:
            with reported():
                work()
        except typer.Exit as end:
            print(end.exit_code)
"""
BEFORE = """
number, app.Commands.get_command = 2, cleared
app.app(["inspect"])
"""


@pytest.mark.parametrize(
    ("program", "code", "codes", "lines"),
    [(WITHIN, 0, "130 130 143 143", 4), (BEFORE, 130, "", 0)],
    ids=["within", "before"],
)
def test_no_signal_is_lost_and_none_is_a_fault_of_ours(program: str, code: int, codes: str, lines: int) -> None:
    """Python ignores what is raised while an object is cleared away, and a library makes an error of its own of it, as
    numpy does where structured arrays are compared."""
    done = ran(sys.executable, "-c", CLEARED + program, preexec_fn=heed_interrupts)
    assert (done.exit_code, done.stdout.split(), done.stderr.count("\n")) == (code, codes.split(), lines), done
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [["--json"], pytest.param([], marks=pytest.mark.slow)], ids=["json", "table"])
def test_a_reader_that_leaves_early_is_no_error(options: list[str], tiny: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code, _, said = ended("inspect", tiny, *options, stdout=writer)
    os.close(writer)
    assert (code, said) == (0, b"")


def closed(*handles: int) -> Callable[[], None]:
    """What closes standard streams in a process that is about to begin."""
    return lambda: [os.close(handle) for handle in handles] and None


@pytest.mark.parametrize("command", ["inspect", pytest.param("--version", marks=pytest.mark.slow)])
def test_standard_output_that_takes_no_more_is_told_in_one_line(command: str) -> None:
    with open("/dev/full", "w") as full:
        code, _, said = ended(command, stdout=full)
    assert (code, said) == (1, b"error: cannot write to standard output: No space left on device\n")


def test_a_current_folder_that_was_deleted_is_told_in_one_line(tmp_path: Path) -> None:
    (folder := tmp_path / "gone").mkdir()
    message = b"error: the current folder is no longer there; go to another with cd\n"
    assert ended("inspect", cwd=folder, preexec_fn=folder.rmdir) == (1, b"", message)


@pytest.mark.parametrize(
    ("command", "handle"),
    [("inspect --json", 1), *(pytest.param("inspect", handle, marks=pytest.mark.slow) for handle in (0, 2))],
)
def test_a_standard_stream_that_is_closed_is_as_if_it_led_nowhere(command: str, handle: int) -> None:
    code, out, said = ended(*command.split(), preexec_fn=closed(handle))
    assert (code, said) == (0, b"")
    assert (b"_vq_vae._embedding.weight" in out) == (handle != 1)


@pytest.mark.slow
def test_what_is_written_while_all_standard_streams_are_closed_is_whole(
    tiny: Path, images_folder: Path, codebook: Run, tmp_path: Path
) -> None:
    output = tmp_path / "out.safetensors"
    command = ("prune", tiny, "--keep", 4, "--data", images_folder, *RANGE, "-o", output)
    with start(*command, preexec_fn=closed(0, 1, 2)) as process:
        assert process.wait(120) == 0
    assert codebook("verify", output, "--against", tiny).exit_code == 0
