"""Every command on the device and on the CPU, on the bundled demo: the same codes but for near-ties, the same errors.

    python benchmarks/gpu/commands.py --out FILE.json [--device cuda] [--quick]

Of each command: figures of the kept state on both devices, the largest relative difference of errors, and of used codes
and perplexity. With --deterministic two runs on the device must write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from part import options, write
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli.app import app

ERRORS, COUNTS = 1e-4, 1e-3
"""Relative differences that are allowed: of errors, and the share of latents that are counted for another code."""

TRAINED = 0.02
"""Relative difference of the error after a few steps, in which rounding grows."""


def commands(quick: bool) -> dict[str, str]:
    """What is typed, by name."""
    limit = 60 if quick else 600
    steps = 4 if quick else 30
    surgeries = {
        "refit": "refit --k 64 --steps 0",
        "prune": "prune",
        "quantize": "quantize --k 32",
        "quantize, pairs": "quantize --k 32 --method pnn",
        "restart": "restart",
        "grow": "grow --k 96",
        "condense": "condense --k 48 --steps 0",
        "refit, fine-tuned": f"refit --k 64 --steps {steps} --batch-size 16",
        "condense, fine-tuned": f"condense --k 48 --steps {steps} --batch-size 16",
        "finetune": f"finetune --steps {steps} --batch-size 16",
        "finetune, codes by gradient": f"finetune --steps {steps} --batch-size 16 --codebook-update gradient",
        "finetune, decoder alone": f"finetune --steps {steps} --batch-size 16 --train decoder",
        "finetune, bf16": f"finetune --steps {steps} --batch-size 16 --precision bf16",
    }
    looks = {
        "measure": "measure",
        "sweep": "sweep --k 16,32",
        "diagnose": "diagnose",
        "codes": "codes --top 4",
        "compare": "compare --k 32 --strategies untouched,prune,refit --steps 0",
    }
    return {name: f"{words} --limit {limit} --seed 1" for name, words in (looks | surgeries).items()}


def run(words: str, device: str, folder: Path, name: str) -> dict[str, Any]:
    """The JSON of a command."""
    folder.mkdir(parents=True, exist_ok=True)
    command = words.split()[0]
    output = [] if command in ("measure", "diagnose") else ["-o", str(folder / name)]
    if output and command not in ("sweep", "compare", "codes"):
        output[1] += ".safetensors"
    if command == "codes":
        output = ["--report", str(folder / "codes.html")]
    done = CliRunner().invoke(app, [*shlex.split(words), "--device", device, "--json", "--quiet", *output])
    if done.exit_code not in (0, 3):
        raise RuntimeError(f"{words} --device {device}: exit code {done.exit_code}: {done.output[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def figures(found: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON that should not hang on the device, by its path."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            if key not in ("seconds", "settings", "trace", "bytes", "proof", "outputs", "version"):
                yield from figures(value, f"{path}/{key}")
    elif isinstance(found, list):
        for i, value in enumerate(found):
            yield from figures(value, f"{path}/{i}")
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield path, float(found)


def compared(ours: dict[str, Any], theirs: dict[str, Any], trained: bool) -> dict[str, Any]:
    """Largest relative differences of what both say, and which figures differ by more than they may."""
    one, other = dict(figures(ours)), dict(figures(theirs))
    apart = {key: abs(one[key] - other[key]) / max(abs(other[key]), 1e-12) for key in one.keys() & other.keys()}
    errors = {key: value for key, value in apart.items() if key.endswith(("/mse", "/distortion"))}
    usage = {key: value for key, value in apart.items() if key.endswith(("/perplexity", "/used"))}
    allowed = TRAINED if trained else ERRORS
    worst = [key for key, value in errors.items() if value > allowed]
    worst += [key for key, value in usage.items() if value > (5 * TRAINED if trained else 10 * COUNTS)]
    return {
        "errors_apart": max(errors.values(), default=0.0),
        "usage_apart": max(usage.values(), default=0.0),
        "keys": one.keys() == other.keys(),
        "differ": sorted(worst),
    }


def counted(device: str, folder: Path, limit: int) -> dict[str, Any]:
    """Counts of all calibration latents on both devices: those that differ are near-ties, and few."""
    found = []
    for where in ("cpu", device):
        path = folder / f"{where.replace(':', '-')}.stats.safetensors"
        run(f"measure --limit {limit} --stats {path} --force", where, folder, "stats")
        found.append(next(tensor for key, tensor in load_file(path).items() if key.endswith("/counts")))
    moved = int((found[0] - found[1]).abs().sum()) // 2
    return {"latents": int(found[0].sum()), "moved": moved, "same": bool(torch.equal(*found))}


def deterministic(device: str, folder: Path, quick: bool) -> dict[str, Any]:
    """SHA-256 of what two runs wrote."""
    words = f"refit --k 32 --limit 120 --steps {4 if quick else 20} --batch-size 16 --deterministic --seed 2"
    hashes = []
    for name in ("once", "again"):
        run(words, device, folder, name)
        hashes.append(hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest())
    return {"command": f"codebook {words}", "same_bytes": hashes[0] == hashes[1]}


def main() -> None:
    given = options(__doc__ or "")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    found: dict[str, Any] = {"commands": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found["counts"] = counted(given.device, folder, 120 if given.quick else 1000)
        found["deterministic"] = deterministic(given.device, folder, given.quick)
        write(given, found)
        for name, words in commands(given.quick).items():
            try:
                both = [run(words, where, folder / f"{i}", name) for i, where in enumerate(("cpu", given.device))]
                found["commands"][name] = compared(both[1], both[0], "steps" in words and "--steps 0" not in words)
            except RuntimeError as error:
                found["commands"][name] = {"failed": str(error)}
            write(given, found)
    failed = [name for name, one in found["commands"].items() if one.get("failed") or one.get("differ")]
    found["ok"] = not failed and found["deterministic"]["same_bytes"]
    write(given, found)
    print(f"commands: {len(found['commands'])}, of which {len(failed)} differ: {failed}; {found['counts']}")


if __name__ == "__main__":
    main()
