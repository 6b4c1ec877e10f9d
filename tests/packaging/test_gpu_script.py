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
from tables import BEGIN, END, NOTHING, section

PARTS = ("commands", "finetuning", "throughput", "clustering", "nearest")


@pytest.mark.slow
def test_every_part_ends_and_leaves_a_small_file(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for folder in ("codebook_tools", "cli", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing" / "faiss.py").write_text("raise ImportError('as on the machine')\n")
    done = subprocess.run(
        [
            "bash",
            "benchmarks/gpu.sh",
            "--out",
            str(tmp_path / "out"),
            "--device",
            "cpu",
            "--quick",
            "--python",
            sys.executable,
        ],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "missing")},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, log[-3000:]
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {*(f"{part}.json" for part in PARTS), "log.txt"}
    assert sum(path.stat().st_size for path in files.values()) < 1 << 20
    found = {part: json.loads(files[f"{part}.json"].read_text()) for part in PARTS}
    assert all(heading in section(tmp_path / "out") for heading in ("Fine-tuning", "VQGAN", "k-means", "nearest code"))
    assert found["commands"]["ok"] and len(found["commands"]["commands"]) >= 15
    assert found["commands"]["counts"]["same"], "the same device, asked twice"
    assert all("failed" not in one for one in found["finetuning"]["rates"].values())


def test_the_documents_say_what_the_committed_files_say() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page.partition(BEGIN)[2].partition(END)[0] == section()


def test_a_section_is_made_of_whatever_parts_there_are(tmp_path: Path) -> None:
    assert section(tmp_path) == NOTHING
    machine = {"cpu": "a CPU", "gpu": "a GPU", "torch": "2.11"}
    commands = {
        "machine": machine,
        "commands": {"prune": {"differ": []}, "refit": {"differ": ["/stages/surgery/mse"]}},
        "counts": {"latents": 38400, "moved": 3},
        "deterministic": {"same_bytes": True},
    }
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    told = section(tmp_path)
    assert "On one a GPU, torch 2.11" in told and "1 differ from the CPU: refit" in told and "3 chose another" in told


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$1" in *throughput*) exit 3;; esac\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--out", str(tmp_path / "out"), "--python", str(python)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 1 and "throughput ended with 3" in log
    assert all(f"benchmarks/gpu/{part}.py --device cuda" in log for part in PARTS if part != "throughput")
