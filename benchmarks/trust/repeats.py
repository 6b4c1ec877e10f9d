"""The same command with the same seed, twice: the same bytes in every file, the same JSON but for seconds.

    python benchmarks/trust/repeats.py [--shared ../shared]

Every command that writes, on the bundled demo, and with --shared the CIFAR-10 checkpoint; then its counts of all codes
on one thread and on two. What was done goes to benchmarks/results/trust.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from forks import run
from record import record
from safetensors.torch import load_file
from same_output import FEW, SURGERIES, TRAINED

from codebook_tools.models.demo import DEMO

QUESTIONS: dict[str, tuple[str, ...]] = {
    "measure": ("measure",),
    "sweep": ("sweep", "--k", "16,32"),
    "diagnose": ("diagnose",),
}
COMPARE = ("compare", "--k", "32", "--strategies", "refit,prune", "--seeds", "2", *TRAINED)


def once(words: tuple[object, ...], folder: Path, threads: int = 1) -> dict[str, str]:
    """SHA-256 of what a command writes into an empty folder, and of its JSON, by name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    told = run((*words, "--json"), folder.with_name("said"), threads)
    found = {"its JSON": _sha256(json.dumps(_without_seconds(json.loads(told))).encode())}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            found[path.name] = _sha256(json.dumps(_without_seconds(json.loads(path.read_text()))).encode())
        elif path.is_file() and path.name != "table.md":  # it has a column of seconds
            found[path.name] = _sha256(path.read_bytes())
    return found


def _without_seconds(told: Any) -> Any:
    if isinstance(told, dict):
        return {name: _without_seconds(its) for name, its in told.items() if name != "seconds"}
    return [_without_seconds(its) for its in told] if isinstance(told, list) else told


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def differing(name: str, words: tuple[object, ...], folder: Path) -> tuple[int, list[str]]:
    """How many outputs were compared, and those that differ."""
    first, second = (once(words, folder) for _ in range(2))
    wrong = [f"{name}: {file}" for file in first.keys() | second.keys() if first.get(file) != second.get(file)]
    return len(first), wrong


def counts_differ(model: tuple[object, ...], folder: Path) -> tuple[int, list[str]]:
    """On one thread and on two: how many codes were counted, and whether any count differs."""
    found = []
    for threads in (1, 2):
        stats = folder.with_name(f"{threads}.stats")
        run(("measure", *model, "--stats", stats, "--force"), folder.with_name("said"), threads)
        found.append({name: its for name, its in load_file(stats).items() if "count" in name})
    names = [name for name, its in found[0].items() if not its.equal(found[1][name])]
    assert found[0], "no counts in the file"
    return sum(len(its) for its in found[0].values()), [f"{model[0]}: {name} on two threads" for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path)
    given = parser.parse_args()
    done, wrong, codes = dict[str, int](), list[str](), dict[str, int]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "out"
        output = ("-o", folder / "o.safetensors")
        models: dict[str, tuple[object, ...]] = {"demo": (DEMO,)}
        jobs: dict[str, tuple[object, ...]] = {name: (*words, *FEW, *output) for name, words in SURGERIES.items()}
        jobs |= {name: (*words, *FEW) for name, words in QUESTIONS.items()}
        jobs["compare"] = (*COMPARE, *FEW, "-o", folder)
        if given.shared:
            data = ("--data", given.shared / "data" / "cifar10-train.tar", "--limit", "2000")
            models["CIFAR-10"] = (given.shared / "checkpoints" / "cifar10-vqvae-k512.safetensors", *data)
            jobs["refit of CIFAR-10"] = ("refit", *models["CIFAR-10"], "--k", "128", *TRAINED, *output)
        for name, words in jobs.items():
            done[name], more = differing(name, words, folder)
            wrong += more
            print(f"{name}: {done[name]} outputs, {len(more)} differ", file=sys.stderr, flush=True)
        for name, model in models.items():
            codes[name], more = counts_differ(model, folder)
            wrong += more
            print(f"{name}: {codes[name]} counts on 1 and 2 threads, {len(more)} differ", file=sys.stderr, flush=True)
    shared = f" --shared {given.shared}" if given.shared else ""
    record(
        "repeats",
        f"python benchmarks/trust/repeats.py{shared}",
        {"commands": len(done), "outputs": done, "counts on one thread and two": codes, "differ": wrong},
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
