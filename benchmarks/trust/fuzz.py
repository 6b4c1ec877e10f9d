"""Every reader of files, on inputs that a coverage-guided fuzzer makes of sound ones (atheris, libFuzzer's Python).

    pip install -e ".[fuzz]"
    python benchmarks/trust/fuzz.py [READER ...] [--inputs N] [--seed N]

None may end in anything but a result or one clear line, take more than 5 seconds, or come to more than 1 GB. An input
that does is kept in build/fuzz/, and `python benchmarks/trust/fuzz.py READER --again FILE` reads it once more. Without
READER: each of targets.py in turn, N inputs in all, more of those that are quick; what was done goes to
benchmarks/results/trust.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEPT = Path("build") / "fuzz"
SECONDS, MEGABYTES, LONGEST = 5, 1024, 8192
SLOW = {"config": 0.02, "pickle in torch.save": 0.1, "torch.save": 0.1, "parquet of tokens": 0.05, "sound": 0.2}
"""Readers that take milliseconds get so many times the inputs of the others."""


def fuzz(name: str, inputs: int, seed: int) -> dict[str, object]:
    """One reader in a process of its own. Returns what was done, and the faults."""
    kept = KEPT / name.replace(" ", "-")
    kept.mkdir(parents=True, exist_ok=True)
    options = [f"-runs={inputs}", f"-seed={seed + 1}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}"]
    limits = [f"-max_len={LONGEST}", f"-artifact_prefix={kept}/", "-verbosity=1", "-print_final_stats=1"]
    since = time.perf_counter()
    run = subprocess.run(
        [sys.executable, __file__, name, "--child", *options, *limits],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    told = {key: int(value) for key, value in re.findall(r"stat::(\w+):\s+(\d+)", run.stdout)}
    coverage = re.findall(r"cov: (\d+)", run.stdout)
    done = {
        "reader": name,
        "inputs": told.get("number_of_executed_units", 0),
        "branches": int(coverage[-1]) if coverage else 0,
        "peak_megabytes": told.get("peak_rss_mb", 0),
        "slowest_seconds": told.get("slowest_unit_time_sec", 0),
        "seconds": round(time.perf_counter() - since),
        "faults": 0 if run.returncode == 0 else 1,
    }
    if run.returncode:
        (kept / "log").write_text(run.stdout)
        print(f"{name}: see {kept}\n{_fault(run.stdout)}", file=sys.stderr)
    return done


def _fault(log: str) -> str:
    found = re.search(r"=== Uncaught Python exception: ===\n(.*?)\n\n?==", log, re.S)
    return found[1] if found else "\n".join(log.splitlines()[-8:])


def child(name: str, options: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["codebook_tools"], enable_loader_override=False):
        from targets import TARGETS, tried

    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    target.around(folder)
    seeds = folder / "seeds"
    seeds.mkdir()
    for i, data in enumerate(target.seeds()):
        (seeds / str(i)).write_bytes(data)

    def one(data: bytes) -> None:
        tried(target, folder, data)

    atheris.Setup([sys.argv[0], *options, str(seeds)], one)
    atheris.Fuzz()


def shares(names: list[str], inputs: int) -> dict[str, int]:
    weights = {name: SLOW.get(name, 1.0) for name in names}
    return {name: round(inputs * weight / sum(weights.values())) for name, weight in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, metavar="FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given, options = parser.parse_known_args()
    if given.child:
        child(given.readers[0], options)
    from record import record
    from targets import TARGETS, tried

    unknown = set(given.readers) - set(TARGETS)
    if unknown or options:
        parser.error(f"no {', '.join([*unknown, *options])}; the readers are {', '.join(TARGETS)}")
    if given.again:
        target = TARGETS[given.readers[0]]
        with tempfile.TemporaryDirectory() as folder:
            target.around(Path(folder))
            print(tried(target, Path(folder), given.again.read_bytes()) or "it can be read")
        return
    os.chdir(ROOT)
    found = []
    for name, inputs in shares(given.readers or [*TARGETS], given.inputs).items():
        found.append(fuzz(name, inputs, given.seed))
        print(json.dumps(found[-1]), file=sys.stderr)
    if not given.readers:
        record(
            "fuzz",
            f"python benchmarks/trust/fuzz.py --inputs {given.inputs} --seed {given.seed}",
            {
                "atheris": version("atheris"),
                "limits": {"seconds": SECONDS, "megabytes": MEGABYTES, "longest": LONGEST},
                "inputs": sum(int(str(one["inputs"])) for one in found),
                "readers": found,
            },
        )
    sys.exit(any(one["faults"] for one in found))


if __name__ == "__main__":
    main()
