"""The quantizers of peers.py against the tool itself: the same checkpoint, batches and steps.

    python benchmarks/compare.py --peers [NAME ...] [--k 128,512,4096] [--steps 500] [--seeds 3] [--jobs 1]
                                         [--data cifar10] [--shared ../shared] [--output FOLDER]

A peer's learning rate is the best of three by validation error after half the steps with one seed. Then it is run for
all steps with every seed, or with one where codes are many. The tool's own rows have its defaults. Every run keeps the
state with the lowest validation error after at least one step, and is measured in it on the test data.

Rows go to benchmarks/results/compare/peers/, or --output: rows.json has all runs, table.md those of all steps. Runs
that are there already, made with the same settings, are not run again. Each is done by a process with one thread, of
which there are as many as jobs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import recipes
import torch
from machine import machine
from peers import PEERS, trained
from variants import VARIANTS

from codebook_tools.training.recipe import FineTune

RESULTS = Path(__file__).parent / "results" / "compare" / "peers"
OURS = ("refit", "grow", "condense")
TIMES = (1 / 3, 1.0, 3.0)  # of the learning rate that the tool takes for the network
MANY = 1024  # codes, above which there is one seed
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """times: of the tool's learning rate; 1 for the tool itself."""

    data: str
    name: str
    k: int
    steps: int
    seed: int
    times: float = 1.0

    def settings(self) -> dict[str, str]:
        """What else the row of a run depends on: the quantizer's call, versions, and the library's numbers."""
        library = VARIANTS["default"].settings()
        if self.name in OURS:
            return library | {"recipe": str(FineTune(steps=self.steps))}
        peer, package = PEERS[self.name], "vector-quantize-pytorch"
        return library | {
            "recipe": str(peer.recipe(self.steps)),
            "quantizer": peer.described(),
            package: version(package),
        }


def done(run: Run, shared: str) -> Row:
    """The row of a run."""
    torch.set_num_threads(1)
    recipes.opened(run.data, shared)  # not timed
    since = time.process_time()
    figures = (_ours if run.name in OURS else _peer)(run, shared)
    return asdict(run) | figures | {"cpu_seconds": round(time.process_time() - since, 1), "settings": run.settings()}


def _ours(run: Run, shared: str) -> Row:
    row = recipes.done(recipes.Run(run.data, "default", run.name, run.k, run.steps, run.seed), shared)
    return {"lr": None, **row["best"], **_of_test(row)}


def _peer(run: Run, shared: str) -> Row:
    opened, *_ = recipes.opened(run.data, shared)
    tuned = trained(opened, PEERS[run.name], run.k, run.steps, run.seed, run.times)
    measured = tuned.measured(opened)
    (use,) = measured.codebooks
    figures = {"mse": measured.mse, "size": use.size, "used": use.used, "perplexity": use.perplexity}
    return {"lr": tuned.lr, "validation_mse": tuned.best.validation_mse, "step": tuned.best.step, **_of_test(figures)}


def _of_test(figures: Row) -> Row:
    return {name: figures[name] for name in ("mse", "size", "used", "perplexity")}


class Rows:
    """The rows of a folder by run, as far as they are of the settings of now."""

    def __init__(self, folder: Path, shared: str, pool: Executor) -> None:
        self.path, self.shared, self.pool = folder / "rows.json", shared, pool
        folder.mkdir(parents=True, exist_ok=True)
        kept = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        by_run = {Run(**{field.name: row[field.name] for field in fields(Run)}): row for row in kept}
        known = {*OURS, *PEERS}
        of_known = ((run, row) for run, row in by_run.items() if run.name in known)
        self._rows = {run: row for run, row in of_known if row["settings"] == run.settings()}

    def of(self, runs: Iterable[Run]) -> list[Row]:
        """The rows of these runs, in their order; those that are not there are made, and kept one by one."""
        runs = list(runs)
        waiting = {self.pool.submit(done, run, self.shared): run for run in runs if run not in self._rows}
        failed = list[BaseException]()
        for future in as_completed(waiting):
            run, error = waiting[future], future.exception()
            if error:
                print(f"{run}: {error}", flush=True)
                failed.append(error)
                continue
            row = self._rows[run] = future.result()
            print(f"{run}: {row['validation_mse']:.6f} on validation, {row['mse']:.6f} on test data", flush=True)
            self.save()
        if failed:
            raise failed[0]
        return [self._rows[run] for run in runs]

    @property
    def compared(self) -> list[Row]:
        """Those that a table shows, not the trials of learning rates."""
        return [row for row in self._rows.values() if "tried" in row]

    def save(self) -> None:
        """In the same order, whichever run ended first."""
        order = ("data", "k", "name", "steps", "seed", "times")
        rows = sorted(self._rows.values(), key=lambda row: [row[name] for name in order])
        self.path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def compared(rows: Rows, data: str, names: Sequence[str], k: int, steps: int, seeds: int) -> list[Row]:
    """The rows of all steps at one size, each with the learning rates that were tried for it."""
    peers = [name for name in names if name not in OURS]
    trials = {name: [Run(data, name, k, max(1, steps // 2), 0, times) for times in TIMES] for name in peers}
    rows.of(run for runs in trials.values() for run in runs)
    tried = {name: rows.of(runs) for name, runs in trials.items()}
    best = {
        name: min(trial_rows, key=lambda row: float(row["validation_mse"]))["times"]
        for name, trial_rows in tried.items()
    }
    runs = [Run(data, name, k, steps, seed, best.get(name, 1.0)) for seed in range(seeds) for name in names]
    final = rows.of(runs)
    for row in final:
        row["tried"] = {f"{trial['lr']:.2g}": trial["validation_mse"] for trial in tried.get(row["name"], [])}
    rows.save()
    return final


HEADINGS = (
    *("quantizer", "K", "test mse", "against refit", "validation mse"),
    *("at step", "used", "perplexity", "seconds", "seeds"),
)
ABOUT = """Mean squared error of test images in [0, 1], reconstructions clamped, in the state with the lowest validation
error: of the steps of {steps} that are evaluated, from 1 on. Seconds are of one thread of the CPU. The learning rate is
the best of three by validation error after {half} steps with seed 0; those tried, and these errors:"""


def tables(rows: Iterable[Row]) -> str:
    """In Markdown, one of each checkpoint, number of steps and size."""
    groups = dict[tuple[str, int, int], list[Row]]()
    for row in rows:
        groups.setdefault((row["data"], row["steps"], row["k"]), []).append(row)
    return "\n".join(table(groups[key]) for key in sorted(groups))


def table(rows: Sequence[Row]) -> str:
    """The lowest test error first; under it the learning rates that were tried."""
    data, k, steps = (rows[0][name] for name in ("data", "k", "steps"))
    by_name = dict[str, list[Row]]()
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    mean = {name: statistics.mean(row["mse"] for row in of_one) for name, of_one in by_name.items()}
    lines = [f"{data}, K = {k:,}, {steps:,} steps:", "", f"| {' | '.join(HEADINGS)} |", f"|{' --- |' * len(HEADINGS)}"]
    lines += [
        f"| {' | '.join(_cells(name, by_name[name], mean))} |" for name in sorted(mean, key=lambda name: mean[name])
    ]
    lines += ["", ABOUT.format(steps=steps, half=max(1, steps // 2)), ""]
    return (
        "\n".join([*lines, *(_rates(name, of_one[0]) for name, of_one in by_name.items() if of_one[0]["tried"])]) + "\n"
    )


def _cells(name: str, rows: Sequence[Row], mean: Mapping[str, float]) -> list[str]:
    def spread(key: str, form: str) -> str:
        values = [row[key] for row in rows]
        return format(statistics.mean(values), form) + (f" ± {statistics.stdev(values):{form}}" if values[1:] else "")

    against = f"{100 * (mean[name] / mean['refit'] - 1):+.1f} %" if "refit" in mean else ""
    steps = sorted({row["step"] for row in rows})
    used = f"{statistics.mean(row['used'] for row in rows):.0f}/{rows[0]['size']}"
    errors = [spread("mse", ".6f"), against, spread("validation_mse", ".6f")]
    more = [", ".join(map(str, steps)), used, spread("perplexity", ".1f"), spread("cpu_seconds", ".0f"), str(len(rows))]
    return [name, str(rows[0]["k"]), *errors, *more]


def _rates(name: str, row: Row) -> str:
    tried = "; ".join(f"{lr}: {error:.6f}" for lr, error in row["tried"].items())
    return f"- {name}, `{row['settings']['quantizer']}`: learning rate {row['lr']:.2g} of {tried}"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join((*OURS, *PEERS))}; left out: all")
    parser.add_argument("--k", default="128,512,4096", help="sizes, with commas between them")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--data", choices=tuple(recipes.MODELS), default="cifar10")
    parser.add_argument("--shared", default="../shared")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    if unknown := set(asked.names) - {*OURS, *PEERS}:
        parser.error(f"no quantizer {', '.join(sorted(unknown))}; there are {', '.join((*OURS, *PEERS))}")
    with ProcessPoolExecutor(asked.jobs, get_context("spawn")) as pool:
        rows = Rows(asked.output, asked.shared, pool)
        for k in map(int, asked.k.split(",")):
            seeds = 1 if k > MANY else asked.seeds
            names = asked.names or (*OURS, *PEERS)
            print(table(compared(rows, asked.data, names, k, asked.steps, seeds)), flush=True)
            (asked.output / "table.md").write_text(tables(rows.compared), encoding="utf-8")
