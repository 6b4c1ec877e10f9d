"""How many codes? `codebook sweep` on the checkpoints that others trained: the figures of docs/choosing-k.md.

    python benchmarks/sweeps.py [--shared ../shared]

For each, a table, a drawing and all figures go to benchmarks/results/sweep/NAME/. excerpts.py then copies rows into the
documents.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare import RUNS
from matplotlib.figure import Figure

from codebook_tools.report.html.sweep import curves_plot
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.sweep import Sweep, markdown, sweep

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks") / "results" / "sweep"
SIZES = {"cifar10": (16, 32, 64, 128, 256, 512), "fashion": (8, 16, 32, 64, 128, 256)}
PRICES = (0.003, 0.01, 0.03, 0.1)


def run(name: str, shared: str) -> Sweep:
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    asked = RUNS[name]
    with tempfile.TemporaryDirectory() as rows:
        found = sweep(asked.request(shared), SIZES[name], PRICES, Path(rows), Watch())
    (folder / "table.md").write_text(markdown(found))
    plot = curves_plot(found)
    width, height = plot.size
    figure = Figure(figsize=(2 * width, height * len(plot.panels) / 2), layout="constrained")
    places: Any = figure.subfigures(len(plot.panels) // 2, 2)
    for place, draw in zip(places.flat, plot.panels, strict=True):
        draw(place)
    figure.savefig(folder / "curves.png", dpi=110)
    about = replace(found, model=str(asked.model).format(shared=shared)).to_json() | {
        "command": f"python benchmarks/sweeps.py {name}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    del about["outputs"]
    (folder / "sweep.json").write_text(json.dumps(about, indent=1) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SIZES)}; left out: all")
    parser.add_argument("--shared", default="../shared")
    given = parser.parse_args()
    os.chdir(ROOT)
    for name in given.names or SIZES:
        found = run(name, given.shared)
        print(f"{name}: {found.suggested_k} codes, {found.reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
