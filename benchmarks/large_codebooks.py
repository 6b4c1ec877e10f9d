"""Codebooks of 16,384 codes: seconds and memory of each surgery, a step of fine-tuning against 512, sizes of pages.

    python benchmarks/large_codebooks.py [--codes 16384] [--latents 200000] [--dim 8] [--runs 3]
        [--model FILE --data PATH]

Surgeries run alone, on a codebook and latents of a Gaussian mixture of 3,000 centers, each in a process of its own:
memory is what its highest resident set grows by. A tenth of the codes are dead. Steps of fine-tuning are those of the
bundled model, and of another, with 512 codes and with `--codes`, in turn, in one process; pages are those of commands
on files of such codes and latents. Writes benchmarks/results/large_codebooks.json, or --output.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from large import ROOT
from machine import machine
from safetensors.torch import save_file

from codebook_tools.codebook import Codebook
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.finetune import FineTune
from codebook_tools.training.trainer import Trainer
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_request

SURGERY = """
import json, sys, time
import torch
from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook
from codebook_tools.data.latents import StoredLatents
from codebook_tools.strategies import find_strategy
name, settings, points, size, dim = sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:6])
drawn = torch.Generator().manual_seed(0)
centers = 3 * torch.randn(3000, dim, generator=drawn)
def draw(n):
    return centers[torch.randint(3000, (n,), generator=drawn)] + torch.randn(n, dim, generator=drawn)
latents, codes = draw(points), draw(size)
codes[::10] += 100
codebook = Codebook(codes)
counts = torch.bincount(nearest(latents, codebook), minlength=size)
counts += (torch.arange(size) % 10 > 0).long()
memory = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
before, since = memory(), time.perf_counter()
surgery = find_strategy(name)(**settings)(codebook, StoredLatents(latents), counts)
seconds = time.perf_counter() - since
print(json.dumps({"seconds": round(seconds, 2), "memory_mb": round(memory() - before, 1), "k": surgery.codebook.size}))
"""

PAGES = ("measure", "diagnose", "map", "prune")


def surgeries(codes: int) -> dict[str, tuple[str, dict[str, Any]]]:
    fewer = codes // 4
    return {
        "prune": ("prune", {}),
        "quantize --method pnn": ("quantize", {"k": fewer, "method": "pnn"}),
        "quantize": ("quantize", {"k": fewer}),
        "grow": ("grow", {"k": codes}),
        "condense": ("condense", {"k": codes}),
        "condense to a quarter": ("condense", {"k": fewer}),
        **{f"restart --method {way}": ("restart", {"method": way}) for way in ("error", "random", "split", "nearest")},
    }


def operated(name: str, settings: dict[str, Any], latents: int, codes: int, dim: int) -> dict[str, Any]:
    """Seconds, MB and codes of a surgery in a process of its own."""
    command = [sys.executable, "-c", SURGERY, name, json.dumps(settings), *map(str, (latents, codes, dim))]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def step_seconds(request: Request, sizes: tuple[int, int], steps: int, runs: int) -> dict[str, Any]:
    """Seconds of a training step of a model with so many codes, which are latents; in turn, run after run."""
    opened = open_request(request, Watch())
    train, model = opened.calibration, opened.model
    with torch.no_grad():
        passes = [model.pass_through(media).latents[0] for _, media in train.batches(64)]
    latents = torch.cat([of.movedim(1, -1).flatten(0, -2) for of in passes])
    trainers = list[Trainer]()
    for size in sizes:
        own = model.copy(copy.deepcopy(model.network))
        own.install(Codebook(latents[torch.arange(size) * len(latents) // size].clone()))
        recipe = FineTune(steps=(runs + 1) * steps, batch_size=64)
        trainers.append(Trainer(own, train, recipe, [torch.ones(size)], 0, {}, {}))
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for run in range(runs + 1):  # the first is for whatever is done once
        for size, trainer in zip(sizes, trainers, strict=True):
            since = time.perf_counter()
            for step in range(run * steps, (run + 1) * steps):
                trainer.gradients()
                trainer.move(step + 1)
            if run:
                seconds[size].append((time.perf_counter() - since) / steps)
    ratios = [large / small for small, large in zip(*seconds.values(), strict=True)]
    medians = {f"{size:,}": round(statistics.median(of), 4) for size, of in seconds.items()}
    return {"seconds": medians, "ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios]}


def page_bytes(latents: int, codes: int, dim: int) -> dict[str, int]:
    """Sizes of pages, of commands on a file of a codebook and a file of latents."""
    drawn = torch.Generator().manual_seed(0)
    with TemporaryDirectory() as folder:
        model, data, page = (Path(folder) / name for name in ("model.safetensors", "latents.npy", "page.html"))
        save_file({"quantize.embedding.weight": torch.randn(codes, dim, generator=drawn)}, model)
        np.save(data, torch.randn(latents, dim, generator=drawn).numpy())
        sizes = dict[str, int]()
        for command in PAGES:
            more = ("--output", Path(folder) / "pruned.safetensors") if command == "prune" else ()
            words = [sys.executable, "-m", "codebook_tools", command, model, "--latents", data, "--report", page, *more]
            subprocess.run(
                [*map(str, words)], cwd=folder, capture_output=True
            )  # diagnose exits with 3 by what it tells
            sizes[command] = page.stat().st_size
            page.unlink()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=16_384)
    parser.add_argument("--latents", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="of a block")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "large_codebooks.json")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", action="append", default=[])
    asked = parser.parse_args()
    results: dict[str, Any] = {
        "command": f"python benchmarks/large_codebooks.py {' '.join(Path(text).name for text in sys.argv[1:])}".strip(),
        "machine": machine(),
        "codes": asked.codes,
        "latents": [asked.latents, asked.dim],
        "surgeries": {},
    }
    for title, (name, settings) in surgeries(asked.codes).items():
        runs = [operated(name, settings, asked.latents, asked.codes, asked.dim) for _ in range(asked.runs)]
        middle = {part: statistics.median(run[part] for run in runs) for part in ("seconds", "memory_mb")}
        results["surgeries"][title] = {**middle, "k": runs[0]["k"], "all_seconds": [run["seconds"] for run in runs]}
        print(f"{title}: {middle['seconds']:.1f} s, {middle['memory_mb']:.0f} MB", flush=True)
    requests = {"the bundled demo": Request(None, ())}
    if asked.model:
        requests[asked.model.name] = Request(asked.model, tuple(asked.data), limit=10_000)
    results["steps"] = {
        name: step_seconds(request, (512, asked.codes), asked.steps, asked.runs) for name, request in requests.items()
    }
    results["page_bytes"] = page_bytes(asked.latents, asked.codes, asked.dim)
    asked.output.write_text(json.dumps(results, indent=2) + "\n")
    for name, step in results["steps"].items():
        print(f"a step of {name}: {step['ratio']:.2f} of one with 512 codes")
    print(f"pages: {results['page_bytes']}")


if __name__ == "__main__":
    main()
