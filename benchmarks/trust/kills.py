"""Commands killed with SIGKILL while they write: what is there afterwards, and whether the same command then succeeds.

    python benchmarks/trust/kills.py [COMMAND ...] [--kills 200] [--megabytes 400] [--seed N] [--folder DIR]

refit, prune, finetune, and sharded (a prune of a directory in four shards), on models large enough that writing takes a
second. Of five kills two fall 0 to 50 ms after the first change in the output folder (of a fine-tuning every other of
them after its output begins), two at any moment of the run, and one within 2 ms after the first file is renamed into
its place. Half of the runs replace an older output with --force. After each kill:

- what does not end in `.partial` is, byte for byte, what the older output or an unbroken run has there;
- the model that is there, if any, has its own index map beside it. Two files cannot be renamed in one instant: a kill
  between the two leaves the new map beside the older model, which `verify` tells (`between` counts these);
- of a directory the older one is whole, under its own name or with `.old`;
- the same command, or --resume for a fine-tuning, ends in the bytes of an unbroken run, where what was left makes it
  refuse after doing what it says, and leaves nothing else behind.

A trial is a fork of this process, so that each needs no import of torch. What was done goes to
benchmarks/results/trust.json, beside what the same options found of the other commands.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from forks import Fork, errors_of, run
from models import counts, demo, latents, metadata_of, sharded, single
from record import record, recorded
from safetensors.torch import load_file, save_file

from codebook_tools.checkpoints.layout import index_map_path, partial_path, training_path

PARTIAL, OLD = ".partial", ".old"
WINDOW, RENAMES = 0.05, 0.002
Bytes = dict[str, str]
"""SHA-256 by path in the folder."""


@dataclass(frozen=True)
class Trial:
    """A command that writes `output`, a name in the folder of outputs."""

    arguments: tuple[str, ...]
    output: str = "o.safetensors"
    resumes: bool = False

    def words(self, folder: Path, *more: str) -> tuple[str, ...]:
        return (*self.arguments, "--output", str(folder / self.output), "--quiet", *more)


def made(folder: Path, megabytes: int) -> dict[str, Trial]:
    """The models and what the commands read, in `folder`."""
    of = latents(folder / "latents.safetensors")
    large, one = demo(folder / "large.safetensors", megabytes), single(folder / "single.safetensors", megabytes)
    several, no_training = sharded(folder / "sharded", megabytes), ("--steps", "0")
    drawn = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    np.save(folder / "images.npy", drawn.repeat(8, axis=1).repeat(8, axis=2))
    few = ("--data", str(folder / "images.npy"), "--limit", "40", "--steps", "40", "--batch-size", "4")
    return {
        "refit": Trial(("refit", str(one), "--latents", str(of), "--k", "64", *no_training)),
        "prune": Trial(("prune", str(one), "--stats", str(counts(one, of)), *no_training)),
        "finetune": Trial(("finetune", str(large), *few), resumes=True),
        "sharded": Trial(("prune", str(several), "--stats", str(counts(several, of)), *no_training), "o"),
    }


def contents(folder: Path) -> Bytes:
    """Of all files that are no part of a partial one."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.endswith(PARTIAL) for part in Path(name).parts):
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def names(folder: Path) -> list[tuple[str, int]]:
    """All that a look at the folder tells, deep: names and sizes."""
    found = []
    for root, folders, files in os.walk(folder):
        found += [(os.path.join(root, name), -1) for name in folders]
        for name in files:
            try:
                found.append((os.path.join(root, name), os.stat(os.path.join(root, name)).st_mtime_ns))
            except FileNotFoundError:
                found.append((name, 0))
    return found


def killed(trial: Trial, folder: Path, more: tuple[str, ...], at: str, after: float) -> bool:
    """Run it and kill it, `after` seconds past "once", the first "change" in the folder, the "output"'s beginning, or
    the moment when its first file is "placed". Returns False where it had ended before."""
    before, begun = names(folder), partial_path(folder / trial.output)
    first = index_map_path(folder / trial.output)
    aged = _inode(first)
    moments: dict[str, Callable[[], bool]] = {
        "once": lambda: True,
        "change": lambda: names(folder) != before,
        "output": begun.exists,
        "placed": lambda: _inode(first) != aged,
    }
    reached = moments[at]
    running = Fork(trial.words(folder, *more))
    while not reached():
        if running.ended():
            running.wait()
            return False
        time.sleep(0.0005 if at != "placed" else 0)
    time.sleep(after)
    over = running.ended()
    running.kill()
    return not over


def _inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


class Faults(list[str]):
    def unless(self, held: bool, what: str) -> None:
        if not held:
            self.append(what)


def judged(trial: Trial, folder: Path, older: Bytes, whole: Bytes, faults: Faults) -> str:
    """In a word, what a kill left."""
    found = contents(folder)
    training = training_path(folder / trial.output).name
    unfinished = found.pop(training, None)
    if unfinished is not None:
        try:
            load_file(folder / training)
        except Exception as error:
            faults.append(f"{training} does not load: {error}")
    index_map = index_map_path(folder / trial.output).name
    is_folder = not trial.output.endswith(".safetensors")
    for name, digest in found.items():
        plain = name.replace(f"{trial.output}{OLD}/", f"{trial.output}/", 1) if is_folder else name
        faults.unless(
            digest in (older.get(plain), whole.get(plain)), f"{name} is neither the older file nor the new one"
        )
    model = {
        name: digest for name, digest in found.items() if name == trial.output or name.startswith(trial.output + "/")
    }
    aside = {name.replace(OLD, "", 1): digest for name, digest in found.items() if name.startswith(trial.output + OLD)}
    sound = [{n: d for n, d in of.items() if n != index_map} for of in (older, whole)]
    if is_folder:
        faults.unless(
            model in (sound[0], sound[1], {}), "the directory is neither the older one, nor the new, nor none"
        )
        faults.unless(
            not older or sound[0] in (model, aside) or model == sound[1], "the older directory is nowhere whole"
        )
    elif older:
        faults.unless(bool(model), "the older model is gone")
    new = bool(model) and model == sound[1]
    place = found.get(index_map)
    if new:
        faults.unless(place == whole[index_map], "the new model has not its map beside it")
        return "new"
    if place is not None and place != older.get(index_map):
        return "between"
    if unfinished is not None:
        return "unfinished"
    return "older" if older else "nothing"


def repeated(trial: Trial, folder: Path, whole: Bytes, faults: Faults) -> str:
    """Do it again, as a user would. Returns how."""
    said, how = folder.parent / "said", "repeated"
    more = ("--force", "--resume") if trial.resumes else ("--force",)
    for _ in range(3):
        code = Fork(trial.words(folder, *more), said).wait()
        text = errors_of(said).read_text().strip()
        told = re.search(r"(\S+) is (left of|what) .*?(delete it|rename it to (\S+), or)", text)
        if code == 0 or not told:
            break
        how = "repeated as told"
        place = Path(told[1])
        place.rename(place.with_name(told[4])) if told[4] else shutil.rmtree(place)
    faults.unless(code == 0, f"again: exit code {code}: {text[-300:]}")
    faults.unless(contents(folder) == whole, "again: not the bytes of an unbroken run")
    left = [name for name, _ in names(folder) if name.endswith((PARTIAL, OLD))]
    faults.unless(not left, f"again: {left} is left")
    return how


def tried(name: str, trial: Trial, work: Path, kills: int, chance: random.Random) -> Mapping[str, object]:
    folder, reference, older = work / "out", work / "reference", work / "older"
    for place in (folder, reference, older):
        shutil.rmtree(place, ignore_errors=True)
    reference.mkdir()
    since = time.perf_counter()
    run(trial.words(reference), work / "said")
    takes = time.perf_counter() - since
    whole = contents(reference)
    older.mkdir()
    _age(reference, older)
    aged = contents(older)
    states, faults = Counter[str](), Faults()
    done = late = survived = 0
    while done < kills:
        shutil.rmtree(folder, ignore_errors=True)
        replacing = done // 5 % 2 == 0
        at = ("change", "once", "change", "once", "placed")[done % 5]
        if at == "change" and trial.resumes and done % 5:  # it changes the folder long before it writes its output
            at = "output"
        folder.mkdir() if not replacing else shutil.copytree(older, folder, copy_function=os.link)
        after = chance.uniform(0, {"once": 1.2 * takes, "placed": RENAMES}.get(at, WINDOW))
        if not killed(trial, folder, ("--force",) if replacing else (), at, after):
            late += 1
            if late > 20 * kills:
                sys.exit(f"{name}: of {late} runs the moment {at!r} was not reached before their end")
            continue
        found = len(faults)
        states[judged(trial, folder, aged if replacing else {}, whole, faults)] += 1
        states[repeated(trial, folder, whole, faults)] += 1
        if len(faults) > found:
            print(f"{name}, kill {done}: {faults[found:]}", file=sys.stderr, flush=True)
        survived += len(faults) == found
        done += 1
    return {
        "kills": done,
        "survived": survived,
        "too late": late,
        "seconds of a run": round(takes, 2),
        "megabytes written": round(sum(f.stat().st_size for f in reference.rglob("*") if f.is_file()) / 2**20),
        "found": dict(sorted(states.items())),
        "faults": list(faults),
    }


def _age(reference: Path, older: Path) -> None:
    """Another output of the same command: the same files with a word more in them."""
    for path in sorted(reference.rglob("*")):
        target = older / path.relative_to(reference)
        if path.is_dir():
            target.mkdir()
        elif path.suffix == ".safetensors":
            save_file(load_file(path), target, metadata_of(path) | {"age": "older"})
        else:
            shutil.copy(path, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ("refit", "prune", "finetune", "sharded")
    parser.add_argument("commands", nargs="*", metavar="COMMAND", choices=[*commands, []], help=", ".join(commands))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="kills-") as folder:
        work = Path(folder)
        trials = made(work, given.megabytes)
        found = {}
        for name in given.commands or commands:
            found[name] = tried(name, trials[name], work, given.kills, random.Random(f"{name} {given.seed}"))
            print(name, found[name], file=sys.stderr, flush=True)
    options = f"--kills {given.kills} --megabytes {given.megabytes} --seed {given.seed}"
    command = f"python benchmarks/trust/kills.py {options}"
    record("kills", command, {"commands": recorded("kills", command).get("commands", {}) | found})
    sys.exit(any(one["faults"] for one in found.values()))


if __name__ == "__main__":
    main()
