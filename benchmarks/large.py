"""A 600 MB checkpoint in three shards of mixed dtypes: how long `--help` and `inspect` take, and how much memory
`prune --stats`.

    python benchmarks/large.py [--runs 5]

Writes benchmarks/results/large.json. Every figure is of a process of its own: wall seconds, and the highest resident
memory, beside those of an interpreter that does nothing and of one that imports torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.write import write_tensors

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "large"
MODEL, STATS, OUTPUT = BUILD / "model", BUILD / "stats.safetensors", BUILD / "pruned"
KEY, CODES, DIM = "quantize.embedding.weight", 16_384, 256


def make() -> None:
    """The checkpoint, and counts of which a third are 0."""
    shutil.rmtree(BUILD, ignore_errors=True)
    MODEL.mkdir(parents=True)
    drawn = torch.Generator().manual_seed(0)
    encoder = {f"encoder.{i}.weight": torch.randn(10, 1024, 1024, generator=drawn) for i in range(5)}
    quantiser = {
        KEY: torch.randn(CODES, DIM, generator=drawn),
        "quantize.cluster_size": torch.rand(CODES, generator=drawn),
        "quantize.embed_avg": torch.randn(CODES, DIM, generator=drawn),
        "scale.bf16": torch.randn(1000, 1000, generator=drawn).bfloat16(),
        "scale.f8": torch.randn(1000, 1000, generator=drawn).to(torch.float8_e4m3fn),
        "index": torch.arange(10**6),
    }
    decoder = {f"decoder.{i}.weight": torch.randn(36, 1024, 1024, generator=drawn).half() for i in range(5)}
    shards = {f"model-{i:05d}-of-00003.safetensors": s for i, s in enumerate((encoder, quantiser, decoder), 1)}
    for name, tensors in shards.items():
        save_file(tensors, MODEL / name, {"format": "pt"})
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    index = {key: name for name, tensors in shards.items() for key in tensors}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (MODEL / "model.safetensors.index.json").write_text(text)
    counts = torch.randint(0, 3, (CODES,), generator=drawn)
    about = {"checkpoint_sha256": read_checkpoint(MODEL).sha256, "split": "calibration", "images": "1"}
    tensors = {f"{KEY}/counts": counts, f"{KEY}/squared_error": torch.ones(1, dtype=torch.float64)}
    write_tensors(STATS, tensors, {PREFIX + name: value for name, value in about.items()}, force=True)


TELL = """
import atexit, runpy, sys
peak = lambda: open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]
atexit.register(lambda: print(peak(), file=sys.stderr))
"""
"""Of the process itself, when it ends: what the kernel tells of a child counts its parent's memory, too."""


def timed(program: str, *arguments: object) -> tuple[float, float]:
    """Wall seconds, and the highest resident memory in MB."""
    since = time.perf_counter()
    command = [sys.executable, "-c", TELL + program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return time.perf_counter() - since, int(done.stderr.split()[-1]) / 1024


def untouched(key: str) -> bool:
    """Whether a tensor is, byte for byte, what it was."""
    digests = []
    for model in (MODEL, OUTPUT):
        digest = hashlib.sha256()
        for chunk in read_checkpoint(model).chunks(key):
            digest.update(chunk)
        digests.append(digest.hexdigest())
    return digests[0] == digests[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    make()
    ours = "runpy.run_module('codebook_tools', run_name='__main__')"
    commands: dict[str, tuple[object, ...]] = {
        "interpreter alone": ("pass",),
        "import torch": ("import torch",),
        "--help": (ours, "--help"),
        "inspect": (ours, "inspect", MODEL),
        "prune --stats": (ours, "prune", MODEL, "--stats", STATS, "-o", OUTPUT, "--force"),
    }
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(given.runs):  # in turn, so that a busy moment of the machine meets all alike
        for name, command in commands.items():
            figures[name].append(timed(*map(str, command)))
    keys = [key for key in read_checkpoint(MODEL).entries if not key.startswith("quantize.")]
    found: dict[str, Any] = {
        "command": f"python benchmarks/large.py --runs {given.runs}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "bytes": read_checkpoint(MODEL).nbytes,
        "figures": {
            name: {
                "seconds": {"median": statistics.median(s for s, _ in runs), "all": [round(s, 3) for s, _ in runs]},
                "memory_mb": {"median": statistics.median(m for _, m in runs), "all": [round(m, 1) for _, m in runs]},
            }
            for name, runs in figures.items()
        },
        "untouched_tensors_identical": f"{sum(map(untouched, keys))} of {len(keys)}",
    }
    (ROOT / "benchmarks" / "results" / "large.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, of in found["figures"].items():
        print(f"{name}: {of['seconds']['median']:.2f} s, {of['memory_mb']['median']:.0f} MB")
    print(f"untouched tensors identical: {found['untouched_tensors_identical']}")
    shutil.rmtree(BUILD)


if __name__ == "__main__":
    main()
