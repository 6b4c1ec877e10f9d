"""What another commit writes and what the working tree writes, by the same commands: byte for byte.

    python benchmarks/trust/same_output.py COMMIT [--only NAME ...] [--shared ../shared]

Every command on the bundled demo, with pages, tables, help and errors; with --shared the CIFAR-10 checkpoint, too. What
is said and every file that is left are compared, but for durations. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FEW, TRAINED, UNTRAINED = ("--limit", "60"), ("--steps", "20"), ("--steps", "0")
PAGE = ("--report", "page.html")
OUTPUT = ("-o", "o.safetensors")
SURGERIES: dict[str, tuple[str, ...]] = {
    "refit": ("refit", "--k", "64", *TRAINED),
    "refit, afkmc2": ("refit", "--k", "64", "--init", "afkmc2", *UNTRAINED),
    "refit, entropy and weight-ema": ("refit", "--k", "32", "--entropy", "0.1", "--weight-ema", "0.9", *TRAINED),
    "prune": ("prune", *TRAINED),
    "quantize by k-means": ("quantize", "--k", "32", "--method", "kmeans", *TRAINED),
    "quantize by merging": ("quantize", "--k", "32", "--method", "pnn", *UNTRAINED),
    "quantize to 4 bits": ("quantize", "--bits", "4", *UNTRAINED),
    "restart": ("restart", *TRAINED),
    "grow": ("grow", "--k", "128", *TRAINED),
    "condense": ("condense", "--k", "32", *TRAINED),
    "finetune": ("finetune", *TRAINED),
    "finetune by gradients": ("finetune", "--codebook-update", "gradient", *TRAINED),
}
RECIPE = "surgeries:\n  - prune\n  - refit:\n      k: 32\n"
TYPED = (
    *("inspect", "measure", "diagnose", "codes", "map", "refit", "prune", "quantize", "restart", "grow", "condense"),
    *("finetune", "run", "compare", "sweep", "verify", "remap"),
)


def jobs(shared: Path | None) -> dict[str, list[tuple[str, ...]]]:
    """Commands that run one after the other in one empty folder, by name; with `--json` where it is not said."""
    pruned = ("prune", *UNTRAINED, *FEW, *OUTPUT)
    done: dict[str, list[tuple[str, ...]]] = {name: [(*words, *FEW, *OUTPUT)] for name, words in SURGERIES.items()}
    done |= {
        "a page": [("refit", "--k", "64", *TRAINED, *FEW, *OUTPUT, *PAGE)],
        "a table": [("refit", "--k", "64", *UNTRAINED, *FEW, *OUTPUT, "no --json")],
        "inspect": [("inspect",), ("inspect", "no --json")],
        "measure": [("measure", *FEW, *PAGE), ("measure", *FEW, "no --json")],
        "sweep": [("sweep", "--k", "16,32", *FEW, *PAGE)],
        "diagnose": [("diagnose", *FEW, *PAGE), ("diagnose", *FEW, "no --json")],
        "codes": [("codes", *FEW, *PAGE)],
        "map": [("map", *FEW, *PAGE)],
        "run": [("run", "recipe.yaml", *UNTRAINED, *FEW, *OUTPUT)],
        "compare": [("compare", "--k", "32", "--strategies", "refit,prune", "--seeds", "2", *TRAINED, *FEW, "-o", ".")],
        "counts": [("measure", *FEW, "--stats", "demo.stats"), ("prune", "--stats", "demo.stats", *UNTRAINED, *OUTPUT)],
        "dry run": [("refit", "--k", "64", *FEW, *OUTPUT, "--dry-run")],
        "verify": [pruned, ("verify", "o.safetensors"), ("verify", "o.safetensors", "--data", "demo", *FEW)],
        "remap": [pruned, ("remap", "tokens.npy", "--map", "o.index_map.safetensors")],
        "errors": [
            ("refit", "--k", "100000", *UNTRAINED, *FEW),
            ("prune", "missing.safetensors"),
            ("quantize", "--k", "8", "--bits", "2", *UNTRAINED),
            ("verify", "recipe.yaml"),
        ],
        "help": [("--help", "no --json"), *((name, "--help", "no --json") for name in TYPED)],
    }
    if shared:
        data = ("--data", str(shared / "data" / "cifar10-train.tar"), "--limit", "2000")
        model = str(shared / "checkpoints" / "cifar10-vqvae-k512.safetensors")
        done["refit of CIFAR-10"] = [("refit", model, *data, "--k", "128", *TRAINED, *OUTPUT)]
        done["diagnose of CIFAR-10"] = [("diagnose", model, *data)]
    return done


def run(words: tuple[str, ...]) -> str:
    """One command in a fork of this process, in the current folder: its exit code, stdout and stderr."""
    app = import_module("codebook_cli.app").app  # of the tree that PYTHONPATH names
    vars(import_module("codebook_cli.output"))["SECONDS_A_LINE"] = float("inf")  # a slow machine logs its progress

    json_too = words[-1:] != ("no --json",)
    with tempfile.TemporaryFile("w+") as said:
        process = os.fork()
        if not process:
            code: Any = 70
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                app([*words, "--json"] if json_too else [*words[:-1]])
                code = 0
            except SystemExit as end:
                code = end.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        said.seek(0)
        return f"exit code {code}\n" + without_seconds(said.read())


def without_seconds(text: str) -> str:
    """Text without durations, and without the place in which the bundled demo lies."""
    text = re.sub(r'"(load|encode|strategy|finetune|measure|write|total|seconds)": [\d.e-]+', r'"\1": 0', text)
    text = re.sub(r'"seconds": \{[^{}]*\}|"estimate": [\d.e-]+', "SECONDS", text)
    text = re.sub(r"<dt>(load|encode|strategy|finetune|measure|write|total)</dt><dd>[\d.]+</dd>", "SECONDS", text)
    text = re.sub(r"[\d.]+ ?(s|ms|min|seconds|minutes)\b", "SECONDS", text)
    text = re.sub(r"[\w./-]*demo\.safetensors", "DEMO", text)
    return re.sub(r"[ ─━]{2,}", "  ", text)  # a column is as wide as its seconds


def written(name: str, commands: list[tuple[str, ...]]) -> dict[str, str]:
    """SHA-256 of what the commands of one job say, and of every file that they leave, by name."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("recipe.yaml").write_text(RECIPE)
        np.save("tokens.npy", np.arange(64).reshape(4, 16) % 7)
        done = {f"{name}: {' '.join(words)}": run(words).replace(folder, "FOLDER").encode() for words in commands}
        for path in sorted(Path().rglob("*")):
            if path.is_file():
                whole = path.read_bytes()
                text = path.suffix in (".json", ".md", ".html", ".yaml", ".svg")
                done[f"{name}: {path}"] = without_seconds(whole.decode()).encode() if text else whole
        os.chdir("/")
    if keep := os.environ.get("SAME_OUTPUT_KEEP"):  # to look at what differs
        for label, content in done.items():
            Path(keep, re.sub(r"[^\w.-]+", "_", label)[:150]).write_bytes(content)
    return {label: hashlib.sha256(content).hexdigest() for label, content in done.items()}


def of_tree(tree: Path, place: Path, given: argparse.Namespace) -> dict[str, str]:
    """What the package in a tree writes, by a process that imports it and nothing of another tree."""
    place.mkdir()
    (place / "codebook_cli").symlink_to(tree / "cli")
    (place / "codebook_tools").symlink_to(tree / "codebook_tools")
    words = [sys.executable, __file__, given.commit, "--emit", *(f"--only={name}" for name in given.only)]
    if given.shared:
        words += ["--shared", str(given.shared.resolve())]
    env = {**os.environ, "PYTHONPATH": str(place), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    if given.keep:
        kept = given.keep.resolve() / place.name
        kept.mkdir(parents=True, exist_ok=True)
        env["SAME_OUTPUT_KEEP"] = str(kept)
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True, cwd="/")
    return dict(json.loads(done.stdout))


def differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="jobs by name")
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="outputs of both trees, to look at what differs")
    parser.add_argument("--emit", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.emit:
        import torch

        torch.set_num_threads(1)
        chosen = {name: job for name, job in jobs(given.shared).items() if not given.only or name in given.only}
        print(json.dumps({k: v for name, job in chosen.items() for k, v in written(name, job).items()}))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        worktree = ("git", "-C", str(ROOT), "worktree")
        subprocess.run([*worktree, "add", "--quiet", "--detach", place / "tree", given.commit], check=True)
        try:
            before, after = of_tree(place / "tree", place / "before", given), of_tree(ROOT, place / "after", given)
        finally:
            shutil.rmtree(place / "tree", ignore_errors=True)
            subprocess.run([*worktree, "prune"], check=True)
    wrong = differing(before, after)
    print(f"{len(after)} outputs of {len(jobs(given.shared))} jobs: {len(wrong)} differ", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
