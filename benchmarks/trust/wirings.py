"""Small modules with random wiring, operated on by the package, written, loaded, and run by their own forward.

    python benchmarks/trust/wirings.py [--count 10000] [--first 0] [--only SEED] [--out FILE.jsonl] [--tag TAG]

Each seed draws a module (wiring_draws.py), one surgery, and 0 or 5 fine-tuning steps. The written file is loaded into
the module (wired_modules.py), which shares no table and no code with the package, and held against what was reported:

- its error on the test images, and the codes that it uses there, except for counted near-ties;
- one training-mode forward, with the module's own EMA update, leaves 0.9 of the used codes and 1.1 of the distortion;
- a shared codebook is the same, bit by bit, under all of its names;
- unknown wiring is refused, and the message names the tensor.

Every 20th module goes through the command line. Each result is a line of a work file, and seeds that it has are not run
again; the summary goes to benchmarks/results/trust.json.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record
from safetensors.torch import save_file
from wiring import Wiring
from wiring_checks import Data, Reported, check_written, unknown_key
from wiring_draws import kinds_of, pictures, state_of, wiring_of

ROOT = Path(__file__).parents[2]
BATCH = 32
BY_COMMAND = 20
"""Every so many modules one goes through the command line."""

NETWORK = """\
import json
import sys
from pathlib import Path

sys.path.insert(0, {folder!r})
from wired_modules import build
from wiring import wiring_from


def make(codebook_size):
    return build(wiring_from(json.loads(Path(__file__).with_name("wiring.json").read_text())), codebook_size)
"""


class RefusedError(Exception):
    """The package refuses the request, with exit code 1."""


class FaultError(Exception):
    """The package ends with another exit code, or with an exception that is no refusal."""


@dataclass(frozen=True)
class Desk:
    """The folder that all modules are worked on in, and the images, which are the same for all."""

    folder: Path
    data: Data

    @property
    def network(self) -> str:
        return f"{self.folder / 'network.py'}:make"


def desk_in(folder: Path) -> Desk:
    """A folder with the images and the network file."""
    data = Data(*(pictures(seed, count) for seed, count in ((1, 60), (2, 20))))
    np.save(folder / "calibration.npy", data.calibration_pixels.numpy())
    np.save(folder / "held_out.npy", data.test_pixels.numpy())
    (folder / "network.py").write_text(NETWORK.format(folder=str(Path(__file__).parent)))
    return Desk(folder, data)


def run_seed(seed: int, desk: Desk, by_command: bool = False) -> dict[str, Any]:
    """What comes of one seed, for a line of the work file.

    Returns:
        A dict with a `verdict`: "agrees", "disagrees" (silently), "refused" or "fault"; of unknown wiring "refused by
        name", "refused otherwise", "accepted" or "fault".
    """
    started, wiring = time.perf_counter(), wiring_of(seed)
    line: dict[str, Any] = {"seed": seed, "kinds": kinds_of(wiring), "unknown": wiring.unknown, "command": by_command}
    before, searched = set(desk.folder.iterdir()), list(sys.path)
    try:
        line |= _verdict(wiring, desk, by_command)
    except RefusedError as refusal:
        named = bool(wiring.unknown) and unknown_key(wiring) in str(refusal)
        verdict = "refused" if not wiring.unknown else f"refused {'by name' if named else 'otherwise'}"
        line |= {"verdict": verdict, "message": str(refusal).replace(str(desk.folder), "")}
    except FaultError as fault:
        line |= {"verdict": "fault", "message": str(fault)[-1500:]}
    finally:
        sys.path[:] = searched
        for path in set(desk.folder.iterdir()) - before:
            path.unlink()
    if line["verdict"] in ("disagrees", "fault", "accepted"):
        line["wiring"] = asdict(wiring)
    return {**line, "seconds": round(time.perf_counter() - started, 3)}


def _verdict(wiring: Wiring, desk: Desk, by_command: bool) -> dict[str, Any]:
    source, output = (desk.folder / f"{name}-{wiring.seed}.safetensors" for name in ("model", "written"))
    state = state_of(wiring, desk.data.calibration)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, source, {"format": "pt"})
    if wiring.detached:
        for name, latents in desk.data.latents(wiring, state).items():
            np.save(desk.folder / f"{name}-{wiring.seed}.npy", latents.numpy())
    else:
        (desk.folder / "wiring.json").write_text(json.dumps(asdict(wiring)))
    operate = _by_command if by_command else _in_process
    keys = [wiring.prefix + wiring.key(0)] if wiring.detached else []
    try:
        reported = operate(wiring, desk, source, output, keys)
    except RefusedError as refusal:
        if keys or "--codebook-key" not in str(refusal):
            raise
        # As the message says.
        keys = list(dict.fromkeys(wiring.prefix + wiring.key(stage) for stage in range(len(wiring.groups))))
        reported = operate(wiring, desk, source, output, keys)
    if wiring.unknown:
        return {"verdict": "accepted", "keys": keys}
    found = check_written(wiring, output, reported, desk.data)
    return {
        "verdict": "disagrees" if found.problems else "agrees",
        "problems": found.problems,
        "near ties": found.near_ties,
        "explained": found.explained,
        "inherent": found.inherent,
        "keys": keys,
    }


def _in_process(wiring: Wiring, desk: Desk, source: Path, output: Path, keys: list[str]) -> Reported:
    from codebook_tools.errors import CodebookError
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.strategies import STRATEGIES
    from codebook_tools.training.finetune import FineTune
    from codebook_tools.workflows.operate import operate
    from codebook_tools.workflows.request import Request

    calibration, held_out = _data(wiring, desk)
    try:
        request = Request(
            model=source,
            data=() if wiring.detached else (calibration,),
            latents=(calibration,) if wiring.detached else (),
            test_data=(held_out,),
            network=None if wiring.detached else desk.network,
            codebook_key=tuple(keys),
            metric=wiring.metric,
            input_range=None if wiring.detached else (0.0, 1.0),
            batch_size=BATCH,
            output=output,
        )
        strategy = STRATEGIES[wiring.strategy](**wiring.options)
        recipe = FineTune(steps=wiring.steps_of_training, batch_size=BATCH)
        result = operate(wiring.strategy, request, strategy, recipe, Watch())
    except CodebookError as error:
        raise (RefusedError if error.exit_code == 1 else FaultError)(f"{error}") from error
    except Exception as error:
        raise FaultError(traceback.format_exc()) from error
    return Reported.of(json.loads(json.dumps(result.to_json(), default=str)))


def _by_command(wiring: Wiring, desk: Desk, source: Path, output: Path, keys: list[str]) -> Reported:
    calibration, held_out = _data(wiring, desk)
    words = [wiring.strategy, str(source), "--latents" if wiring.detached else "--data", calibration]
    words += ["--test-data", held_out, "--output", str(output), "--batch-size", str(BATCH), "--json", "--quiet"]
    words += ["--steps", str(wiring.steps_of_training)]
    words += [] if wiring.detached else ["--network", desk.network, "--input-range", "0,1"]
    words += [word for name, value in wiring.options.items() for word in (f"--{name}", str(value))]
    words += ["--metric", wiring.metric] if wiring.metric else []
    words += [word for key in keys for word in ("--codebook-key", key)]
    script = Path(sys.executable).parent / "codebook"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([script, *words], env=environment, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode == 1 and done.stderr.startswith("error: "):
        raise RefusedError(done.stderr.removeprefix("error: ").strip())
    if done.returncode != 0:
        raise FaultError(f"exit code {done.returncode}: {done.stderr}")
    return Reported.of(json.loads(done.stdout))


def _data(wiring: Wiring, desk: Desk) -> tuple[str, str]:
    """Paths of calibration and test data."""
    ending = f"-{wiring.seed}.npy" if wiring.detached else ".npy"
    return str(desk.folder / f"calibration{ending}"), str(desk.folder / f"held_out{ending}")


# All seeds


def code_tag() -> str:
    """Twelve digits of a hash of the package and of this harness: results of other code are not counted."""
    digest = hashlib.sha256()
    for path in sorted(
        [*ROOT.glob("codebook_tools/**/*.py"), *ROOT.glob("cli/*.py"), *ROOT.glob("benchmarks/trust/*wir*.py")]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run_seeds(seeds: Iterable[int], out: Path, tag: str) -> list[dict[str, Any]]:
    """The lines of all seeds, those of the work file among them; what is new is appended there."""
    seeds, known = list(seeds), dict[int, dict[str, Any]]()
    for text in out.read_text().splitlines() if out.exists() else ():
        with contextlib.suppress(ValueError):  # a line that was cut when an earlier run was killed
            line = json.loads(text)
            if line["tag"] == tag:
                known[line["seed"]] = line
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wirings-") as place, out.open("a") as work:
        desk = desk_in(Path(place))
        work.write("\n" if work.tell() else "")  # after a line that was cut
        for number, seed in enumerate(seeds, 1):
            if seed not in known:
                text = json.dumps({"tag": tag, **run_seed(seed, desk, seed % BY_COMMAND == BY_COMMAND - 1)})
                print(text, file=work, flush=True)
                known[seed] = json.loads(text)
            if number % 100 == 0:
                verdicts = Counter(known[one]["verdict"] for one in seeds[:number])
                print(f"{number} of {len(seeds)}: {dict(verdicts.most_common())}", file=sys.stderr, flush=True)
    return [known[seed] for seed in seeds]


def summary_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What goes to trust.json."""
    known = [line for line in lines if not line["unknown"]]
    unknown = [line for line in lines if line["unknown"]]
    kinds = dict[str, Counter[str]]()
    for line in known:
        for kind in line["kinds"]:
            kinds.setdefault(kind, Counter()).update(["drawn", line["verdict"]])
    disagreeing = [line for line in lines if line["verdict"] == "disagrees"]
    return {
        "modules": len(lines),
        "by command": sum(line["command"] for line in lines),
        "silent disagreements": len(disagreeing),
        "faults": sum(line["verdict"] == "fault" for line in lines),
        "kinds": {kind: _kind(kinds[kind], len(known)) for kind in sorted(kinds)},
        "unknown wiring": {
            "drawn": len(unknown),
            "refused by name": sum(line["verdict"] == "refused by name" for line in unknown),
        },
        "near ties": sum(line.get("near ties", 0) for line in lines),
        "explained by near ties": sum(line.get("explained", 0) for line in lines),
        "training steps that no state could pass": sum(line.get("inherent", 0) for line in lines),
        "disagreeing seeds": [line["seed"] for line in disagreeing][:50],
        "faulty seeds": [line["seed"] for line in lines if line["verdict"] == "fault"][:50],
        "accepted seeds": [line["seed"] for line in unknown if line["verdict"] != "refused by name"][:50],
        "seconds": round(sum(line["seconds"] for line in lines)),
    }


def _kind(verdicts: Mapping[str, int], modules: int) -> dict[str, Any]:
    """Drawn as a count and a share of all known modules, operated on, refused; and how many are wrong."""
    drawn, refused = verdicts["drawn"], verdicts.get("refused", 0)
    return {
        "drawn": drawn,
        "share": round(drawn / modules, 4),
        "operated on": drawn - refused - verdicts.get("fault", 0),
        "refused": refused,
        "disagree": verdicts.get("disagrees", 0),
        "faults": verdicts.get("fault", 0),
    }


def messages_of(lines: list[dict[str, Any]]) -> Counter[str]:
    """How often each message comes: of a refusal or fault its first 120 characters, without keys and paths; of a
    disagreement what disagrees."""
    return Counter(f"{line['verdict']}: {_short(line)}" for line in lines if line["verdict"] in (*BAD, "refused"))


def _short(line: Mapping[str, Any]) -> str:
    if "problems" in line:
        return ", ".join(sorted({problem.partition(":")[0] for problem in line["problems"]}))
    last = line.get("message", "").strip().rpartition("\n")[2]
    return re.sub(r"\S*[._/]\w\S*", "*", last)[:120]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this seed alone and print its line")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "wirings.jsonl")
    parser.add_argument("--tag", help="of the code that is tested; left out: a hash of it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.only is not None:
        with tempfile.TemporaryDirectory(prefix="wirings-") as place:
            line = run_seed(given.only, desk_in(Path(place)), given.only % BY_COMMAND == BY_COMMAND - 1)
        print(json.dumps({**line, "wiring": asdict(wiring_of(given.only))}, indent=1))
        sys.exit(line["verdict"] in BAD)
    lines = run_seeds(range(given.first, given.first + given.count), given.out, given.tag or code_tag())
    for message, count in messages_of(lines).most_common():
        print(f"{count:6} {message}", file=sys.stderr)
    summary = summary_of(lines)
    record("wirings", f"python benchmarks/trust/wirings.py --count {given.count} --first {given.first}", summary)
    print(json.dumps(summary, indent=1))
    sys.exit(any(line["verdict"] in BAD for line in lines))


BAD = ("disagrees", "fault", "accepted", "refused otherwise")
"""Verdicts that there must be none of."""


if __name__ == "__main__":
    main()
