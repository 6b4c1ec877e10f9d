"""Single bits flipped in what a surgery wrote: `codebook verify` is to find each of them.

    python benchmarks/trust/flips.py [--flips 1000] [--seed N]

In turn in a fine-tuned checkpoint, its index map, the shards of a directory, their index, and its index map; the bit is
drawn alike from all of the file. What was done goes to benchmarks/results/trust.json.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from forks import run
from models import counts, latents, sharded
from record import record

from codebook_tools.errors import CodebookError
from codebook_tools.models.demo import DEMO
from codebook_tools.workflows.verify import verify_checkpoint


def found(model: Path, original: Path) -> bool:
    try:
        return bool(verify_checkpoint(model, original).differences)
    except CodebookError:
        return True


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (was,) = file.read(1)
        file.seek(at)
        file.write(bytes([was ^ 1 << bit]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance, missed, done = random.Random(given.seed), list[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        one, said = folder / "one.safetensors", folder / "said"
        shards = sharded(folder / "original", 1)
        stats = counts(shards, latents(folder / "latents.safetensors"))
        run(("refit", "--k", "64", "--limit", "40", "--steps", "10", "-o", one, "--force"), said)
        run(("prune", shards, "--stats", stats, "--steps", "0", "-o", folder / "many"), said)
        written = {
            **dict.fromkeys(folder.glob("one*.safetensors"), (one, DEMO)),
            **dict.fromkeys(folder.glob("many*/*.safetensors*"), (folder / "many", shards)),
            **dict.fromkeys(folder.glob("many.*.safetensors"), (folder / "many", shards)),
        }
        for model, original in dict.fromkeys(written.values()):
            assert not found(model, original), f"{model} is not sound before any bit is flipped"
        for i in range(given.flips):
            path, (model, original) = list(written.items())[i % len(written)]
            at, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
            flip(path, at, bit)
            if not found(model, original):
                missed.append(f"{path.relative_to(folder)}, bit {bit} of byte {at}")
                print(missed[-1], file=sys.stderr)
            flip(path, at, bit)
            done[str(path.relative_to(folder))] += 1
    command = f"python benchmarks/trust/flips.py --flips {given.flips} --seed {given.seed}"
    seen = {"flips": given.flips, "found": given.flips - len(missed), "by file": dict(done), "missed": missed}
    record("flips", command, seen)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
