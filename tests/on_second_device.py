"""Runs command lines on the second device, in this process: lists of words come in as JSON, results go out, a line each.

    python tests/on_second_device.py [--no-float64] < commands.json
"""

from __future__ import annotations

import json
import sys

import second_device
from typer.testing import CliRunner


def main() -> None:
    second_device.register(float64="--no-float64" not in sys.argv)
    from codebook_cli.app import app

    for words in json.load(sys.stdin):
        found = CliRunner().invoke(app, words)
        print(json.dumps([found.exit_code, found.stdout, found.stderr]), flush=True)


if __name__ == "__main__":
    main()
