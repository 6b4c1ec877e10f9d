"""The script for a machine with a GPU, on a CPU: in a copy of the repository, without faiss and without other data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
from tables import NOTHING, section

pytestmark = pytest.mark.packaging

PARTS = ("commands", "finetuning", "throughput", "clustering", "nearest")


def gpu_script(root: Path, output: Path, *options: object, **environment: str) -> tuple[int, str]:
    """Exit code and log of benchmarks/gpu.sh in a copy of the repository."""
    command = ["bash", "benchmarks/gpu.sh", "--out", output, *options]
    done = subprocess.run(list(map(str, command)), cwd=root, env=os.environ | environment, timeout=900)
    return done.returncode, (output / "log.txt").read_text()


@pytest.mark.slow
def test_every_part_ends_and_leaves_a_small_file(tmp_path: Path) -> None:
    copy, output, missing = tmp_path / "copy", tmp_path / "out", tmp_path / "missing"
    for folder in ("codebook_tools", "cli", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    missing.mkdir()
    (missing / "faiss.py").write_text("raise ImportError('as on the machine')\n")
    options = ("--device", "cpu", "--quick", "--python", sys.executable)
    code, log = gpu_script(copy, output, *options, PYTHONPATH=str(missing))
    assert code == 0, log[-3000:]
    files = {path.name: path for path in output.iterdir()}
    assert files.keys() == {*(f"{part}.json" for part in PARTS), "log.txt"}
    assert sum(path.stat().st_size for path in files.values()) < 1 << 20
    assert all(heading in section(output) for heading in ("Fine-tuning", "VQGAN", "k-means", "nearest code"))
    commands, finetuning = (json.loads(files[f"{part}.json"].read_text()) for part in PARTS[:2])
    assert commands["ok"] and len(commands["commands"]) >= 15
    assert commands["counts"]["same"], "the same device, asked twice"
    assert all("failed" not in rate for rate in finetuning["rates"].values())


def test_a_section_is_made_of_whatever_parts_there_are(tmp_path: Path) -> None:
    assert section(tmp_path) == NOTHING
    commands = {
        "machine": {"cpu": "a CPU", "gpu": "a GPU", "torch": "2.11"},
        "commands": {"prune": {"differ": []}, "refit": {"differ": ["/stages/surgery/mse"]}},
        "counts": {"latents": 38400, "moved": 3},
        "deterministic": {"same_bytes": True},
    }
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    text = section(tmp_path)
    assert "On one a GPU, torch 2.11" in text and "1 differ from the CPU: refit" in text and "3 chose another" in text


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$1" in *throughput*) exit 3;; esac\necho "$@"\n')
    python.chmod(0o755)
    code, log = gpu_script(ROOT, tmp_path / "out", "--python", python)
    assert code == 1 and "throughput ended with 3" in log
    assert all(f"benchmarks/gpu/{part}.py --device cuda" in log for part in PARTS if part != "throughput")
