"""Mixed commands from a seeded generator, for as long as one likes: what they leave, and what they hold on to.

    python benchmarks/trust/soak.py [--minutes 3] [--seed N]

Models (the bundled one in float32 and float16, as a pickle, with EMA companions, a diffusers directory, shards, a bare
codebook), data (the sample, folders with damaged images, tars, latents), options and mistakes are drawn; one command in
six is killed at a random moment, by SIGKILL, SIGTERM or SIGINT. All others run in this one process. Held against:

- exit codes: 0, 1, 2 and 3 as documented, 130 and 143 of signals; never a traceback;
- every output that is there verifies against its model;
- nothing but outputs lies anywhere in the end: no `.partial` (but of the killed, until they are repeated), no temporary
  file;
- memory and open files of this process do not grow, from the middle of the run to its end.

What was done goes to benchmarks/results/trust.json.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import models
import numpy as np
import torch
from forks import Fork, app, errors_of
from PIL import Image
from record import record
from safetensors.torch import load_file, save_file

from codebook_tools.checkpoints.layout import aside_path, partial_path, training_path
from codebook_tools.models.demo import DEMO

DOCUMENTED = (0, 1, 2, 3)
SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
UNFINISHED = (".partial", ".old", ".training.safetensors")
GROWTH = 1.1
"""Of memory, that is no leak: allocators keep what they had."""


@dataclass(frozen=True)
class Subject:
    """A model and what its commands are given. trains: whether it has a network."""

    path: Path
    data: tuple[str, ...] = ()
    trains: bool = True

    @property
    def ending(self) -> str:
        return "" if self.path.is_dir() else ".safetensors"


def subjects(folder: Path) -> list[Subject]:
    state, about = load_file(DEMO), models.metadata_of(DEMO)
    key = next(name for name in state if name.endswith("_embedding.weight"))
    module, codes = key.rpartition("._embedding")[0], state[key]
    images, latents = pictures(folder), models.latents(folder / "latents.safetensors")
    half, ema, pickle = folder / "half.safetensors", folder / "ema.safetensors", folder / "model.pt"
    save_file({name: tensor.half() for name, tensor in state.items()}, half, about)
    hits = torch.arange(len(codes), dtype=torch.float32)
    save_file(state | {f"{module}._ema_cluster_size": hits, f"{module}._ema_w": codes * hits[:, None]}, ema, about)
    torch.save({"state_dict": state, "epoch": 3}, pickle)
    given, bare = ("--data", str(images), "--skip-bad", "--size", "32"), ("--latents", str(latents))
    found = [Subject(path, given) for path in (DEMO, half, ema, pickle)]
    found += [Subject(DEMO, ("--data", str(tarred(images)), *given[2:]))]
    found += [Subject(models.single(folder / "single.safetensors", 4), bare, trains=False)]
    found += [Subject(models.sharded(folder / "sharded", 4), bare, trains=False)]
    with contextlib.suppress(ImportError):
        from diffusers import VQModel

        small = {"block_out_channels": (8,), "latent_channels": 4, "num_vq_embeddings": 64, "norm_num_groups": 4}
        VQModel(**small).save_pretrained(folder / "vqmodel")
        found.append(Subject(folder / "vqmodel", (*given, "--input-range=-1,1")))
    return found


def pictures(folder: Path) -> Path:
    """48 of them, and some that are none."""
    place, drawn = folder / "images", np.random.default_rng(0)
    place.mkdir()
    for i in range(48):
        coarse = drawn.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 36), Image.Resampling.BICUBIC).save(place / f"{i}.png")
    (place / "cut.png").write_bytes((place / "0.png").read_bytes()[:100])
    (place / "text.jpg").write_text("no picture")
    return place


def tarred(images: Path) -> Path:
    path = images.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(images, ".")
    return path


def drawn_command(subject: Subject, outputs: Path, chance: random.Random) -> tuple[list[str], Path | None]:
    """Words, and the output where it has one that can be verified."""
    k = chance.choice([1, 2, 7, 16, 32, 64, 64, 64, 500, 100_000])
    steps = ["--steps", str(chance.choice([0, 0, 3, 12])), "--batch-size", "8"] if subject.trains else ["--steps", "0"]
    surgeries = {
        "refit": ["--k", str(k), "--init", chance.choice(["kmeans++", "afkmc2", "random", "used", "best"])],
        "prune": [chance.choice(["--threshold", "--keep"]), str(chance.choice([0, 1, 5]))],
        "quantize": chance.choice([["--k", str(k)], ["--bits", str(chance.randint(1, 9))]]),
        "restart": [],
        "grow": ["--k", str(chance.choice([512, 520, 600]))],
        "condense": ["--k", str(k)],
        "finetune": ["--codebook-update", chance.choice(["ema", "gradient", "frozen"])],
    }
    questions = {
        "inspect": [],
        "measure": ["--json"],
        "diagnose": [],
        "sweep": ["--k", "4,8", "--output", str(outputs / "sweep")],
        "codes": ["--report", str(outputs / "codes.html")],
        "map": ["--method", "pca", "--report", str(outputs / "map.html")],
    }
    name = chance.choice([*surgeries, *surgeries, *questions])
    data = [] if name == "inspect" else [*subject.data, "--quiet"]
    if name in questions:
        if name in ("codes", "map"):
            data += ["--force"]
        return [name, str(subject.path), *questions[name], *data], None
    output = outputs / f"{'file' if subject.ending else 'folder'}{chance.randrange(6)}{subject.ending}"
    more = [*steps, *chance.choice([[], ["--weight-ema", "0.9"], ["--loss", "l1"], ["--report", f"{output}.html"]])]
    more += chance.choice([["--force"], ["--force"], ["--force", "--resume"], []])
    return [name, str(subject.path), *surgeries[name], *data, *more, "--output", str(output)], output


def alone(words: list[str]) -> tuple[int, str]:
    """Exit code of a command, done in this process, and all that it says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            app(words)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            code = 70
            traceback.print_exc(file=said)
    return code, said.getvalue()


def cleared(output: Path) -> None:
    """What a killed command left, as the next one asks for it to be cleared."""
    for left in (partial_path(output), aside_path(output), training_path(output)):
        if left == aside_path(output) and left.exists() and not output.exists():
            left.rename(output)
        elif left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


class Soak:
    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.outputs, self.chance = work, work / "outputs", random.Random(seed)
        self.outputs.mkdir()
        self.temporary = work / "temporary"
        self.temporary.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.temporary)
        self.subjects = subjects(work)
        self.made = dict[Path, Path]()  # which model an output is of
        self.codes, self.commands, self.faults = Counter[str](), Counter[str](), list[str]()
        self.killed = 0
        self.memory, self.files = list[int](), list[int]()

    def fault(self, words: list[str], what: str) -> None:
        self.faults.append(f"{' '.join(words)}: {what}")
        print(self.faults[-1], file=sys.stderr, flush=True)

    def go(self, minutes: float) -> None:
        since = time.perf_counter()
        while time.perf_counter() - since < 60 * minutes:
            subject = self.chance.choice(self.subjects)
            words, output = drawn_command(subject, self.outputs, self.chance)
            self.commands[words[0]] += 1
            killed = self.chance.random() < 1 / 6
            code = self.kill(words, output) if killed else self.do(words)
            self.codes[str(code)] += 1
            if output is not None and output.exists():
                older = self.made.get(output)
                if code == 0 or older is None:
                    self.made[output] = subject.path
                self.check(output, [self.made[output], *([subject.path] if killed else [])])
            self.memory.append(_kilobytes())
            self.files.append(len(os.listdir("/proc/self/fd")))
        self.look_around()

    def do(self, words: list[str]) -> int:
        code, said = alone(words)
        if code not in DOCUMENTED or "Traceback" in said:
            self.fault(words, f"exit code {code}: {said[-800:]}")
        return code

    def kill(self, words: list[str], output: Path | None) -> int:
        number = self.chance.choice(list(SIGNALS))
        running = Fork(words, self.work / "said")
        time.sleep(self.chance.uniform(0, 2))
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.process, number)
        code = running.wait()
        self.killed += 1
        said = errors_of(self.work / "said").read_text()
        if code not in (*DOCUMENTED, SIGNALS[number], -number) or "Traceback" in said:
            self.fault(words, f"killed by {number}, exit code {code}: {said[-800:]}")
        if output is not None:
            if number != signal.SIGKILL and partial_path(output).exists():
                self.fault(words, f"signal {number} left {partial_path(output).name}")
            cleared(output)
        return code

    def check(self, output: Path, candidates: list[Path]) -> None:
        """That it is a surgery of one of these, and remember of which."""
        for model in candidates:
            code, said = alone(["verify", str(output), "--against", str(model)])
            if code == 0:
                self.made[output] = model
                return
        self.fault(["verify", str(output), str(candidates)], f"exit code {code}: {said[-800:]}")
        shutil.rmtree(output) if output.is_dir() else output.unlink()
        self.made.pop(output, None)

    def look_around(self) -> None:
        """Nothing but what was asked for."""
        for path in self.outputs.iterdir():
            if path.name.endswith(UNFINISHED):
                self.faults.append(f"{path.name} is left among the outputs")
        # torch keeps a folder of its own there.
        left = [path.name for path in self.temporary.iterdir() if not path.name.startswith("torchinductor")]
        self.faults += [f"{name} is left of temporary files" for name in left]
        for what, values in (("kB of memory", self.memory), ("open files", self.files)):
            *_, middle, end = quarters(values)
            if end > GROWTH * middle:
                self.faults.append(f"{what} grew from {middle:.0f} to {end:.0f}")


def quarters(values: list[int]) -> list[float]:
    """The median of each of four parts."""
    ends = [len(values) * i // 4 for i in range(5)]
    return [statistics.median(values[start:end] or values) for start, end in pairwise(ends)]


def _kilobytes() -> int:
    """What this process holds: pages that its allocator keeps for later are given back first, or they hide a leak."""
    with contextlib.suppress(AttributeError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background is born deaf to
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        before = set(os.listdir())
        soak = Soak(Path(place), given.seed)
        soak.go(given.minutes)
        soak.faults += [f"{name} is left in the current folder" for name in set(os.listdir()) - before]
    tempfile.tempdir = None
    record(
        "soak",
        f"python benchmarks/trust/soak.py --minutes {given.minutes:g} --seed {given.seed}",
        {
            "minutes": given.minutes,
            "commands": sum(soak.commands.values()),
            "of each": dict(soak.commands.most_common()),
            "killed": soak.killed,
            "exit codes": dict(soak.codes.most_common()),
            "megabytes, by quarter": [round(kilobytes / 1024) for kilobytes in quarters(soak.memory)],
            "open files, by quarter": [round(files) for files in quarters(soak.files)],
            "faults": soak.faults,
        },
    )
    sys.exit(bool(soak.faults))


if __name__ == "__main__":
    main()
