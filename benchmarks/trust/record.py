"""What the checks of trust found, in one file, benchmarks/results/trust.json, and as a table beside it."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "trust.json"


def record(part: str, command: str, found: Mapping[str, object]) -> None:
    """Replace what the file has of this part, and the table."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[part] = {
        "command": command,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **found,
    }
    RESULTS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(known))


def recorded(part: str, command: str) -> dict[str, Any]:
    """What the file has of this part, where the same command found it."""
    known = json.loads(RESULTS.read_text()).get(part, {}) if RESULTS.exists() else {}
    return known if known.get("command") == command else {}


def table(found: Mapping[str, Any]) -> str:
    """In Markdown: a line for each part that was run."""
    lines = ["| run | cases | found |", "| --- | --- | --- |"]
    for name, told in _SAID.items():
        if name in found:
            cases, what = told(found[name])
            lines.append(f"| `{found[name]['command'].removeprefix('python ')}` | {cases} | {what} |")
    return "\n".join(lines) + "\n"


def _fuzz(its: Mapping[str, Any]) -> tuple[str, str]:
    readers = its["readers"]
    slowest, largest = (max(reader[name] for reader in readers) for name in ("slowest_seconds", "peak_megabytes"))
    faults = sum(reader["faults"] for reader in readers)
    return (
        f"{its['inputs']:,} inputs to {len(readers)} readers",
        f"{faults} faults; the slowest input took under {slowest + 1} s, the most memory was {largest} MB",
    )


def _kills(its: Mapping[str, Any]) -> tuple[str, str]:
    commands = its["commands"]
    return (
        ", ".join(f"{one['kills']} of `{name}`" for name, one in commands.items()),
        ", ".join(f"{one['survived']}" for one in commands.values()) + " survived",
    )


def _flips(its: Mapping[str, Any]) -> tuple[str, str]:
    return f"{its['flips']:,} bits of {len(its['by file'])} files", f"{its['found']:,} found by `codebook verify`"


def _repeats(its: Mapping[str, Any]) -> tuple[str, str]:
    outputs, counts = sum(its["outputs"].values()), sum(its["counts on one thread and two"].values())
    return (
        f"{its['commands']} commands with {outputs} outputs, and {counts:,} codes counted on one thread and on two",
        f"{len(its['differ'])} differ",
    )


def _twins(its: Mapping[str, Any]) -> tuple[str, str]:
    widest = max(one["largest relative difference"] for one in its["metrics"].values())
    return f"{its['draws of each']:,} inputs to each of {len(its['metrics'])}", f"at most {widest:.0e} apart"


def _soak(its: Mapping[str, Any]) -> tuple[str, str]:
    memory, files = ([f"{number:g}" for number in its[f"{what}, by quarter"]] for what in ("megabytes", "open files"))
    return (
        f"{its['commands']:,} commands in {its['minutes']:g} minutes, {its['killed']} of them killed",
        f"{len(its['faults'])} faults; by quarter {', '.join(memory)} MB and {', '.join(files)} open files",
    )


def _wirings(part: Mapping[str, Any]) -> tuple[str, str]:
    unknown, kinds = part["unknown wiring"], part["kinds"].values()
    least = min((kind["operated on"] / kind["drawn"] for kind in kinds), default=0)
    return (
        f"{part['modules']:,} modules of {len(part['kinds'])} kinds of wiring, {part['by command']:,} of them through "
        f"the command line, and {unknown['drawn']:,} of them of unknown wiring",
        f"{part['silent disagreements']} silent disagreements and {part['faults']} faults; of each kind at least "
        f"{math.floor(1000 * least) / 10:.1f} % operated on, {unknown['refused by name']:,} of unknown wiring refused "
        "by name",
    )


_SAID = {
    "fuzz": _fuzz,
    "kills": _kills,
    "flips": _flips,
    "repeats": _repeats,
    "twins": _twins,
    "soak": _soak,
    "wirings": _wirings,
}
