"""Two real processes: a function of a test module in each of them, or the command as torchrun starts it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from places import ROOT, SUPPORT, TESTS

from codebook_tools.runtime import distributed

_PROGRAM = "import sys, processes, {module} as module; processes.report(module.{function}, *sys.argv[1:])"


def _environment(*folders: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join([*map(str, (*folders, SUPPORT, TESTS, ROOT)), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


def ran(*command: object, **options: Any) -> Outcome:
    """A program's exit code and what it prints."""
    more: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run(list(map(str, command)), **more | options)
    return Outcome(done.returncode, done.stdout, done.stderr)


def together(function: Callable[..., Any], *arguments: object) -> list[Any]:
    """What a function of a test module returns in each of two joined processes. It takes text and returns JSON."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = Path(function.__code__.co_filename)
    program = _PROGRAM.format(module=file.stem, function=function.__name__)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    joined = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(command, env=_environment(file.parent, RANK=str(rank), **joined), **pipes) for rank in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def report(function: Callable[..., Any], *arguments: str) -> None:
    """In one of two processes: print what the function returns, as JSON."""
    with distributed.joined("cpu"):
        value = function(*arguments)
    print(json.dumps(value))


def torchrun(*arguments: object) -> Outcome:
    """The command in two processes, as users start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return ran(*command, "-m", "codebook_tools", *arguments, env=_environment())


def alike(a: Any, b: Any, relative: float) -> bool:
    """The same shape, integers and names, and numbers that differ by rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key], relative) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(alike(*pair, relative) for pair in zip(a, b, strict=True))
    return bool(a == pytest.approx(b, rel=relative, abs=1e-6)) if isinstance(a, float) else bool(a == b)
