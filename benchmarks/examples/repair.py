"""Measure, diagnose and repair an example by the command line, beside controls at the same steps, for three seeds.

    python benchmarks/examples/repair.py signals motion items clips

Needs what train.py wrote. Writes benchmarks/results/examples/NAME.json: each command as it is typed in the repository's
folder, its exit code and its JSON. A command that is there already, of the same weights, is not run again. Then
example_tables.py writes the table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from example_tables import RESULTS, write

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from machine import machine  # noqa: E402

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Repair:
    """What is typed for an example.

    Attributes:
        model: The file of the weights.
        data: Options that name the data.
        k: Codes of each level afterwards.
        steps: Of fine-tuning, of the Re-Fit and of the control.
    """

    model: str
    data: str
    k: int
    steps: int


REPAIRS = {
    "signals": Repair("model.pt", "--data {work}/data.npy --group {work}/patients.npy --latent-axis 1", 128, 300),
    "motion": Repair("model.pt", "--data {work}/data.npy", 128, 200),
    "items": Repair("model.safetensors", "--data {work}/data.npy", 256, 300),
    "clips": Repair("model.pt", "--data {work}/data.npy --test-data {work}/test.npy --batch-size 32", 128, 60),
}


def commands(name: str) -> list[str]:
    """All commands of an example, as they are typed."""
    repair, work = REPAIRS[name], f"benchmarks/work/{name}"
    model = f"{work}/{repair.model}"
    network = f"--network benchmarks/examples/{name}.py:make"
    data = repair.data.format(work=work)

    def typed(command: str, more: str, output: str) -> str:
        return f"codebook {command} {model} {network} {data} {more} --output {work}/{output}.safetensors"

    seeded = [
        line
        for seed in SEEDS
        for line in (
            typed("refit", f"--k {repair.k} --steps {repair.steps} --seed {seed}", f"refit-{seed}")
            + (f" --report {work}/refit.html" if seed == 0 else ""),
            typed("finetune", f"--steps {repair.steps} --seed {seed}", f"finetune-{seed}"),
        )
    ]
    return [
        f"codebook measure {model} {network} {data}",
        f"codebook diagnose {model} {network} {data}",
        typed("prune", "--steps 0", "prune"),
        *seeded,
        f"codebook verify {work}/refit-0.safetensors --against {model} {network} {data}",
    ]


def run(command: str) -> dict[str, Any]:
    """The command, its exit code, and what it printed as JSON.

    Raises:
        RuntimeError: It printed none.
    """
    words = shlex.split(command)[1:]
    force = ["--force"] if "--output" in words else []
    line = [sys.executable, "-m", "codebook_tools", *words, *force, "--json", "--no-config"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if not done.stdout.strip():
        raise RuntimeError(f"{command}\nexit {done.returncode}\n{done.stderr}")
    return {"command": command, "exit": done.returncode, "result": json.loads(done.stdout)}


def repair(name: str) -> None:
    """Run what is missing, and write the results after each command."""
    work, path = ROOT / "benchmarks" / "work" / name, RESULTS / f"{name}.json"
    digest = hashlib.sha256((work / REPAIRS[name].model).read_bytes()).hexdigest()
    kept = json.loads(path.read_text()) if path.exists() else {}
    rows = {row["command"]: row for row in kept.get("runs", [])} if kept.get("model_sha256") == digest else {}
    training = json.loads((work / "training.json").read_text())
    for command in commands(name):
        if command not in rows:
            rows[command] = run(command)
            print(f"exit {rows[command]['exit']}: {command}", flush=True)
        report = {"name": name, "model_sha256": digest, "training": training, "machine": machine()}
        runs = [rows[line] for line in commands(name) if line in rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**report, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=tuple(REPAIRS))
    for name in parser.parse_args().names:
        repair(name)
    write()
