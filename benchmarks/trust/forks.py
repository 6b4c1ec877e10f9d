"""Commands in forks of this process: each begins with all imports done, in a millisecond."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

app = import_module("codebook_cli.app").app


class Fork:
    """`codebook *arguments` in a process of its own. said: a file for its stdout; `errors_of` that is its stderr's."""

    def __init__(self, arguments: Sequence[str], said: Path | None = None, threads: int = 1) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process:
            return
        code = 70
        try:
            for stream, path in ((1, said), (2, said and errors_of(said))):
                os.dup2(os.open(path or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
            torch.set_num_threads(threads)
            app(list(arguments))
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except KeyboardInterrupt:  # before the command had begun
            code = 130
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> int:
        """The exit code, minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def ended(self) -> bool:
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        self.wait()


def errors_of(said: Path) -> Path:
    return said.with_name(said.name + ".errors")


def run(arguments: Sequence[object], said: Path, threads: int = 1) -> str:
    """What the command says. Raises RuntimeError with that where its exit code is not 0."""
    code = Fork([str(word) for word in arguments], said, threads).wait()
    if code:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: exit code {code}: {errors_of(said).read_text()}")
    return said.read_text()
