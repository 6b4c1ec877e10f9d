"""Seconds of fine-tuning until a test error, in pairs: the default against more steps by Adam.

    python benchmarks/until.py [--steps 700] [--adam 2000] [--k 128] [--pairs 3] [--shared ../shared]

CIFAR-10, after Re-Fit. The two of a pair run side by side, each in a process with one thread; seconds are those that
the whole run had of a core, without reading the data. Rows go to benchmarks/results/until.json.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import recipes
import torch
from machine import machine

RESULT = Path(__file__).parent / "results" / "until.json"


def timed(run: recipes.Run, shared: str) -> dict[str, Any]:
    """A run's error and seconds."""
    torch.set_num_threads(1)
    recipes.opened(run.data, shared)  # not timed
    since = time.process_time()
    row = recipes.done(run, shared)
    seconds = round(time.process_time() - since, 1)
    return {name: row[name] for name in ("variant", "steps", "seed", "mse")} | {"cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--adam", type=int, default=2000)
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--shared", default="../shared")
    asked = parser.parse_args()
    rows = []
    for seed in range(asked.pairs):
        runs = [
            recipes.Run("cifar10", variant, "refit", asked.k, steps, seed)
            for variant, steps in (("default", asked.steps), ("Adam", asked.adam))
        ]
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            ours, adam = pool.map(timed, runs, [asked.shared] * 2)
        rows.append({"default": ours, "adam": adam, "ratio": ours["cpu_seconds"] / adam["cpu_seconds"]})
        print(
            f"seed {seed}: {ours['mse']:.6f} after {ours['cpu_seconds']} s, "
            f"{adam['mse']:.6f} after {adam['cpu_seconds']} s, ratio {rows[-1]['ratio']:.2f}",
            flush=True,
        )
        RESULT.write_text(json.dumps({"machine": machine(), "k": asked.k, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
