"""What the commands in the documents print: each page's `console` blocks are run, in order, and filled in anew.

    python benchmarks/transcripts.py docs/tutorial.md

A line that begins with `$ ` is run in a folder of the page's own, which is empty at first; what it prints on stdout, in
80 columns and without colour, takes the place of what stands below it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^```console\n(.*?)^```$", re.S | re.M)
PROMPT = "$ "


def commands(page: str) -> list[str]:
    """The lines of all blocks that are to be typed."""
    lines = [line for block in BLOCK.findall(page) for line in block.splitlines()]
    return [line.removeprefix(PROMPT) for line in lines if line.startswith(PROMPT)]


def filled(page: str, folder: Path) -> str:
    """The page with what its commands print today."""

    def again(block: re.Match[str]) -> str:
        shown = ""
        for command in commands(block[0]):
            print(command, file=sys.stderr)
            shown += f"{PROMPT}{command}\n{printed(command, folder)}"
        return f"```console\n{shown}```"

    return BLOCK.sub(again, page)


def printed(command: str, folder: Path) -> str:
    here = {"COLUMNS": "80", "NO_COLOR": "1", "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.defpath])}
    run = subprocess.run(command, shell=True, cwd=folder, env=os.environ | here, capture_output=True, text=True)
    if run.returncode not in (0, 3):  # 3: diagnose found something
        raise SystemExit(f"{command}: exit code {run.returncode}\n{run.stderr}")
    return "".join(f"{line.rstrip()}\n" for line in run.stdout.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE.md")
    for page in parser.parse_args().pages:
        with tempfile.TemporaryDirectory() as folder:
            page.write_text(filled(page.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
