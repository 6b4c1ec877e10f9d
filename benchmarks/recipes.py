"""Fine-tuning recipes side by side: one thing changed at a time, at equal steps, after the same surgery.

    python benchmarks/recipes.py [VARIANT ...] [--data cifar10] [--k 128] [--strategy refit] [--steps 1000] [--seeds 3]
                                 [--jobs 2] [--shared ../shared] [--output FILE.json]

Without a name: all variants that differ from `default`, the tool's own recipe; each says what it changes. What did not
make it into the tool lives in variants.py alone. Rows go to benchmarks/results/recipes/DATA.json, or --output, and into
a plot and tables beside it; those that are there already, made with the same settings, are not run again. Each is
measured on test data that the run did not see, and is done by a process with one thread, of which there are as many as
jobs. excerpts.py then copies rows into the documents.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from machine import machine
from variants import VARIANTS

from codebook_tools.codebook import Strategy
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import find_strategy
from codebook_tools.strategies.comparison_entries import find_entry
from codebook_tools.training.recipe import FineTune
from codebook_tools.workflows.pipeline import Calibration, Latents, calibrate, encoder_latents, perform, run_stages
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import Opened, open_request

RESULTS = Path(__file__).parent / "results" / "recipes"
MODELS = {
    "demo": {},
    "cifar10": {
        "model": "checkpoints/cifar10-vqvae-k512.safetensors",
        "data": "data/cifar10-train.tar",
        "test_data": "data/cifar10-test.tar",
    },
    "fashion": {
        "model": "checkpoints/fashion-vqvae-k128.safetensors",
        "data": "data/fashion-train.tar",
        "test_data": "data/fashion-test.tar",
        "network": "models/fashion_vqvae.py:make",
    },
}
"""Paths within --shared; the bundled demo needs none."""


TRACED = ("step", "loss", "validation_mse", "used", "perplexity", "revived")


@dataclass(frozen=True)
class Run:
    """What a row is of. strategy: a row of `codebook compare`."""

    data: str
    variant: str
    strategy: str
    k: int
    steps: int
    seed: int


def request_of(data: str, shared: str) -> Request:
    paths = {name: str(Path(shared) / path) for name, path in MODELS[data].items()}
    return Request(
        model=Path(paths["model"]) if paths else None,
        data=(paths["data"],) if paths else (),
        test_data=(paths["test_data"],) if paths else (),
        network=paths.get("network"),
    )


@cache
def opened(data: str, shared: str) -> tuple[Opened, Calibration, Latents]:
    """Model and data before anything changes: once a process."""
    found = open_request(request_of(data, shared), Watch())
    return found, calibrate(found, Watch()), encoder_latents(found)


def strategy_of(run: Run) -> Strategy | None:
    entry = find_entry(run.strategy)
    if entry.strategy is None:
        return None
    make = find_strategy(entry.strategy)
    asked = {"k": run.k, "seed": run.seed} | dict(entry.settings)
    return make(**{name: value for name, value in asked.items() if name in signature(make).parameters})


def done(run: Run, shared: str) -> dict[str, Any]:
    """The row: settings, what became of the codebook and of the error, and the trace."""
    torch.set_num_threads(1)
    variant = VARIANTS[run.variant]
    found, seen, latents = opened(run.data, shared)
    before, since = deepcopy(found.model), time.perf_counter()
    try:
        with variant.in_place(found, run.seed):
            strategy = strategy_of(run)
            surgeries = perform(found, strategy, seen, Watch()) if strategy else {}
            recipe = FineTune(steps=run.steps, **variant.recipe)
            stages = run_stages(found, surgeries, seen, latents, recipe, seed=run.seed, watch=Watch())
        spread = torch.linalg.eigvalsh(torch.cov(torch.cat(list(found.model.latents(found.test, 64))).T))
    finally:
        found.model = before
    assert stages.finetuned and stages.tuned
    use = stages.finetuned.codebooks[0]
    return asdict(run) | {
        "settings": variant.settings(),
        "surgery": stages.surgery.mse if stages.surgery else None,
        "mse": stages.finetuned.mse,
        "ssim": stages.finetuned.ssim,
        "size": use.size,
        "used": use.used,
        "perplexity": use.perplexity,
        "coverage": use.coverage,
        "kept": stages.kept,
        "best": {"step": stages.tuned.best.step, "validation_mse": stages.tuned.best.validation_mse},
        "latent_dimension": float(spread.sum() ** 2 / spread.square().sum()),
        "dimensions_of_99_percent": int((spread.flip(0).cumsum(0) / spread.sum() < 0.99).sum()) + 1,
        "seconds": round(time.perf_counter() - since, 1),
        "trace": [{name: getattr(point, name) for name in TRACED} for point in stages.tuned.trace],
    }


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown, one of each surgery, K and number of steps: a line for each variant, the lowest error first."""
    groups = dict[tuple[str, int, int], list[dict[str, Any]]]()
    for row in rows:
        groups.setdefault((row["strategy"], row["k"], row["steps"]), []).append(row)
    return "\n".join(
        f"After `{strategy}` to {k} codes, {steps:,} steps:\n\n{_table(its)}"
        for (strategy, k, steps), its in sorted(groups.items())
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    by_variant = dict[str, dict[int, dict[str, Any]]]()
    for row in rows:
        by_variant.setdefault(row["variant"], {})[row["seed"]] = row
    default = {seed: row["mse"] for seed, row in by_variant.get("default", {}).items()}
    lines = [
        "| variant | mse | against default | used | perplexity | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, its in sorted(by_variant.items(), key=lambda one: statistics.mean(row["mse"] for row in one[1].values())):
        changes = [100 * (row["mse"] / default[seed] - 1) for seed, row in its.items() if seed in default]
        cells = (
            _spread([row["mse"] for row in its.values()], ".6f"),
            "" if name == "default" or not changes else f"{_spread(changes, '+.1f')} %",
            *(f"{statistics.mean(row[key] for row in its.values()):.1f}" for key in ("used", "perplexity")),
        )
        lines.append(f"| {name} | {' | '.join(cells)} | {len(its)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], form: str) -> str:
    """Mean and sample standard deviation."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else mean


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Every seed's error a dot, the best variant on top."""
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    import matplotlib.pyplot as plt

    errors = dict[str, list[float]]()
    for row in rows:
        errors.setdefault(row["variant"], []).append(row["mse"])
    names = sorted(errors, key=lambda name: statistics.mean(errors[name]), reverse=True)
    figure, axes = plt.subplots(figsize=(8, 1 + 0.22 * len(names)), layout="constrained")
    for place, name in enumerate(names):
        axes.plot(errors[name], [place] * len(errors[name]), "o", color="C3" if name == "default" else "C0", alpha=0.7)
    axes.axvline(statistics.mean(errors.get("default", errors[names[-1]])), color="C3", linewidth=0.8)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="squared error on test images", xscale="log")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def different() -> list[str]:
    """The variants without those that name the tool's own numbers, which are the default."""
    default = VARIANTS["default"].settings()
    return [name for name, variant in VARIANTS.items() if name == "default" or variant.settings() != default]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--data", choices=tuple(MODELS), default="cifar10")
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--strategy", default="refit")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--shared", default="../shared")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    unknown = set(given.variants) - set(VARIANTS)
    if unknown:
        parser.error(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    path = given.output or RESULTS / f"{given.data}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    asked = [
        Run(given.data, name, given.strategy, given.k, given.steps, seed)
        for seed in range(given.seeds)
        for name in given.variants or different()
    ]
    rows = {
        Run(**{name: row[name] for name in Run.__dataclass_fields__}): row
        for row in kept
        if row["settings"] == VARIANTS[row["variant"]].settings()
    }
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        waiting = {pool.submit(done, run, given.shared): run for run in asked if run not in rows}
        for future in as_completed(waiting):
            run = waiting[future]
            if error := future.exception():
                print(f"{run.variant}, seed {run.seed}: {error}", flush=True)
                continue
            row = rows[run] = future.result()
            print(f"{run.variant}, seed {run.seed}: {row['mse']:.6f}, {row['used']} used", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"machine": machine(), "rows": [*rows.values()]}, indent=1) + "\n")
    finished = [rows[run] for run in asked if run in rows]
    draw(path.with_suffix(".png"), finished)
    path.with_suffix(".md").write_text(tables([*rows.values()]), encoding="utf-8")
    print(tables(finished))
    if len(finished) < len(asked):
        raise SystemExit(f"{len(asked) - len(finished)} of {len(asked)} runs failed")


if __name__ == "__main__":
    main()
