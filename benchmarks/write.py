"""`prune --stats` of a 2 GB checkpoint, in one file and in three, against `cp`, `sync` and `cmp` of the same files.

    python benchmarks/write.py [--runs 3] [--gigabytes 2]

Writes benchmarks/results/write.json. The two take turns; every figure is of processes of its own: wall
seconds, start-up included, and of ours the highest resident memory, beside that of an interpreter that imports torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from large import ROOT, timed
from safetensors.torch import save_file

from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.write import write_tensors

BUILD = ROOT / "build" / "write"
STATS, COPY = BUILD / "stats.safetensors", BUILD / "copy"
KEY, CODES, DIM = "quantize.embedding.weight", 16_384, 256
OURS = "runpy.run_module('codebook_tools', run_name='__main__')"


def make(gigabytes: float) -> dict[str, Path]:
    """Models by name: half of one lies before its codebook, half behind it."""
    shutil.rmtree(BUILD, ignore_errors=True)
    (BUILD / "sharded").mkdir(parents=True)
    drawn = torch.Generator().manual_seed(0)
    rows = int(gigabytes * 2**30 / 2 / 4 / 10 / 2**20)
    parts = {
        name: {f"{name}.{i}.weight": torch.randn(rows, 1024, 1024, generator=drawn) for i in range(10)}
        for name in ("encoder", "unet")
    }
    codes = {KEY: torch.randn(CODES, DIM, generator=drawn)}
    single = BUILD / "single.safetensors"
    save_file(parts["encoder"] | codes | parts["unet"], single, {"format": "pt"})
    places = dict[str, str]()
    for i, tensors in enumerate((parts["encoder"], codes, parts["unet"]), 1):
        name = f"model-{i:05d}-of-00003.safetensors"
        save_file(tensors, BUILD / "sharded" / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    (BUILD / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (BUILD / "sharded" / "config.json").write_text("{}")
    return {"one file": single, "three shards": BUILD / "sharded"}


def count(model: Path) -> None:
    """Counts of a model, of which a third are 0."""
    counts = torch.randint(0, 3, (CODES,), generator=torch.Generator().manual_seed(1))
    about = {"checkpoint_sha256": read_checkpoint(model).sha256, "split": "calibration", "images": "1"}
    tensors = {f"{KEY}/counts": counts, f"{KEY}/squared_error": torch.ones(1, dtype=torch.float64)}
    write_tensors(STATS, tensors, {PREFIX + name: value for name, value in about.items()}, force=True)


def prune(model: Path) -> tuple[float, float]:
    """Wall seconds, and the highest resident memory in MB."""
    output = COPY.with_suffix(model.suffix)
    found = timed(OURS, "prune", model, "--stats", STATS, "-o", output)
    output.unlink() if output.is_file() else shutil.rmtree(output)
    output.with_name(f"{COPY.name}.index_map.safetensors").unlink()
    return found


def copy(model: Path) -> tuple[float, float]:
    """Wall seconds of `cp`, `sync` and `cmp`, which no memory is asked for."""
    since = time.perf_counter()
    subprocess.run(["cp", "-r", model, COPY], check=True)
    files = [model] if model.is_file() else sorted(model.iterdir())
    copies = [COPY if model.is_file() else COPY / file.name for file in files]
    subprocess.run(["sync", *copies], check=True)
    for file, its in zip(files, copies, strict=True):
        subprocess.run(["cmp", file, its], check=True)
    seconds = time.perf_counter() - since
    COPY.unlink() if COPY.is_file() else shutil.rmtree(COPY)
    return seconds, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=2)
    given = parser.parse_args()
    found: dict[str, Any] = {
        "command": f"python benchmarks/write.py --runs {given.runs} --gigabytes {given.gigabytes:g}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}",
    }
    for name, model in make(given.gigabytes).items():
        count(model)
        ways: dict[str, Callable[[Path], tuple[float, float]]] = {
            "prune --stats": prune,
            "cp + sync + cmp": copy,
            "import torch": lambda _: timed("import torch"),
        }
        figures: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(given.runs):  # in turn, so that a busy moment of the machine meets all alike
            for way, run in ways.items():
                figures[way].append(run(model))
        seconds = {way: statistics.median(its for its, _ in runs) for way, runs in figures.items()}
        memory = {way: statistics.median(its for _, its in runs) for way, runs in figures.items()}
        found[name] = {
            "bytes": read_checkpoint(model).nbytes,
            "seconds": {way: [round(its, 3) for its, _ in runs] for way, runs in figures.items()},
            "median_seconds": seconds,
            "ratio": seconds["prune --stats"] / seconds["cp + sync + cmp"],
            "ratios": [
                round(ours / theirs, 3)
                for (ours, _), (theirs, _) in zip(figures["prune --stats"], figures["cp + sync + cmp"], strict=True)
            ],
            "memory_growth_mb": memory["prune --stats"] - memory["import torch"],
        }
        print(f"{name}: {', '.join(f'{way} {its:.2f} s' for way, its in seconds.items())}")
        print(f"  ratio {found[name]['ratio']:.2f}, memory +{found[name]['memory_growth_mb']:.0f} MB over import torch")
    (ROOT / "benchmarks" / "results" / "write.json").write_text(json.dumps(found, indent=2) + "\n")
    shutil.rmtree(BUILD)


if __name__ == "__main__":
    main()
