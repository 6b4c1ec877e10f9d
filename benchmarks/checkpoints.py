"""Operate on the real checkpoints beside the repository, and measure what was written a second time, independently.

    python benchmarks/checkpoints.py [--shared ../shared] [--only NAME ...]

Every run is one `codebook` command; its JSON, and what benchmarks/independent.py (which shares no code with the
package) measures on the file it wrote, go to benchmarks/results/NAME.json. Without --only: all but ASKED_FOR.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
CIFAR = "{shared}/checkpoints/cifar10-vqvae-k512.safetensors --data {shared}/data/cifar10-train.tar"
CIFAR_TEST = "--test-data {shared}/data/cifar10-test.tar"
FASHION = (
    "{shared}/checkpoints/fashion-vqvae-k128.safetensors --network {shared}/models/fashion_vqvae.py:make "
    "--data {shared}/data/fashion-train.tar"
)
FASHION_TEST = "--test-data {shared}/data/fashion-test.tar"
FASHION_NETWORK = "--network {shared}/models/fashion_vqvae.py:make"

RUNS = {
    "cifar10-measure": f"measure {CIFAR} {CIFAR_TEST}",
    "cifar10-prune": f"prune {CIFAR} {CIFAR_TEST} --threshold 0",
    "cifar10-refit-k128": f"refit {CIFAR} {CIFAR_TEST} --k 128 --steps 1000",
    "fashion-measure": f"measure {FASHION} {FASHION_TEST}",
    "fashion-refit-k64": f"refit {FASHION} {FASHION_TEST} --k 64 --steps 300",
}
LONG = "cifar10-refit-k512-25000"
REPAIRED = "cifar10-finetune-2000"
OF_REPAIRED = (
    f"refit build/checkpoints/{REPAIRED}.safetensors --data {{shared}}/data/cifar10-train.tar {CIFAR_TEST} --k 128"
)
ASKED_FOR = {
    LONG: f"refit {CIFAR} --data {{shared}}/data/cifar10-train-extra.tar {CIFAR_TEST} --k 512 --steps 25000",
    "cifar10-healthy-refit-k128": (
        f"refit build/checkpoints/{LONG}.safetensors --data {{shared}}/data/cifar10-train.tar {CIFAR_TEST} "
        "--k 128 --steps 1000"
    ),
    REPAIRED: f"finetune {CIFAR} {CIFAR_TEST} --steps 2000",
    f"{REPAIRED}-refit-k128": f"{OF_REPAIRED} --steps 500",
    f"{REPAIRED}-refit-k128-whole-rate": f"{OF_REPAIRED} --steps 500 --lr 0.00411997258498526",
}
"""What is run only where it is asked for: up to two hours of one core, and what begins from such results."""


def run(name: str, shared: str) -> dict[str, Any]:
    command = f"codebook {(RUNS | ASKED_FOR)[name].format(shared=shared)}"
    model = shlex.split(command)[2]
    if " measure " not in command:
        model = f"build/checkpoints/{name}.safetensors"
        command += f" -o {model} --force"
    command += " --json"
    found = _json([str(Path(sys.executable).with_name("codebook")), *shlex.split(command)[1:]])
    low, high = found["settings"]["input_range"]
    data = (CIFAR_TEST if "cifar" in name else f"{FASHION_TEST} {FASHION_NETWORK}").format(shared=shared)
    again = f"benchmarks/independent.py {model} {data} --input-range={low:g},{high:g} --json"
    return {
        "command": command,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "result": found,
        "independent": {"command": f"python {again}", "result": _json([sys.executable, *shlex.split(again)])},
    }


def _json(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", default="../shared")
    parser.add_argument("--only", nargs="*", choices=[*RUNS, *ASKED_FOR], default=list(RUNS))
    given = parser.parse_args()
    (ROOT / "build" / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in given.only:
        found = run(name, given.shared)
        (ROOT / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        stages = {stage: m for stage, m in found["result"]["stages"].items() if m}
        ours, theirs = stages[found["result"]["kept"] or "before"], found["independent"]["result"]
        print(f"{name}: mse {ours['mse']:.6f}, independently {theirs['mse']:.6f}", flush=True)


if __name__ == "__main__":
    main()
