"""The GPU section of docs/performance.md, from the files that `gpu.sh` left in benchmarks/results/gpu/.

python benchmarks/gpu/tables.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "gpu", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- gpu -->\n", "<!-- end of gpu -->"
NOTHING = (
    "Nothing was measured on a GPU yet. `bash benchmarks/gpu.sh --out benchmarks/results/gpu` does it within nine "
    "minutes, and\n`python benchmarks/gpu/tables.py` writes its figures here.\n"
)


def section(folder: Path = RESULTS) -> str:
    """Markdown of all parts that left a file."""
    makers = {
        "commands": _commands,
        "finetuning": _finetuning,
        "throughput": _throughput,
        "clustering": _clustering,
        "nearest": _nearest,
    }
    found = {name: json.loads(path.read_text()) for name in makers if (path := folder / f"{name}.json").is_file()}
    if not found:
        return NOTHING
    about = next(iter(found.values()))["machine"]
    lines = [f"On one {about.get('gpu', about['cpu'])}, torch {about['torch']}; `bash benchmarks/gpu.sh`."]
    for name, one in found.items():
        lines += ["", *makers[name](one)]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join(['---', *['---:'] * (len(head) - 1)])} |"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _commands(found: dict[str, Any]) -> Iterator[str]:
    ran = found["commands"]
    differ = [name for name, one in ran.items() if one.get("differ") or one.get("failed")]
    counts, same = found["counts"], found["deterministic"]["same_bytes"]
    yield (
        f"**The same results.** {len(ran)} commands ran on the demo on both devices; {len(differ)} differ from the CPU"
        f"{': ' + ', '.join(differ) if differ else ''}. Of {counts['latents']:,} latents {counts['moved']:,} chose "
        f"another code. Two runs with `--deterministic` wrote {'the same' if same else 'other'} bytes."
    )


def _finetuning(found: dict[str, Any]) -> Iterator[str]:
    yield "**Fine-tuning**, steps a second, against a bare loop of the same network in turn:"
    yield ""
    rows = (
        (
            name,
            f"{rate('ours', one)}",
            f"{rate('bare', one)}",
            _spread(one["ours_to_bare"]),
            _mebibytes(one["peak_bytes"]),
        )
        for name, one in found["rates"].items()
        if "failed" not in one
    )
    yield from _table(("codes, precision", "ours", "bare loop", "ours to bare", "peak memory"), rows)
    if "whole" in found:
        whole, stages = found["whole"], found["whole"]["stages"]
        kept = stages[whole["kept"]]
        yield ""
        yield (
            f"A Re-Fit and {whole['steps']:,} steps took {whole['wall_seconds']:.0f} s: error "
            f"{stages['before']['mse']:.6f} before, {kept['mse']:.6f} after, {kept['codebooks'][0]['used']} codes used."
        )


def rate(name: str, one: dict[str, Any]) -> str:
    return f"{one['steps_per_second'][name]['median']:.1f}"


def _throughput(found: dict[str, Any]) -> Iterator[str]:
    yield "**A VQGAN of the size that diffusers ships**, images of 256 pixels a second, from file to written result:"
    yield ""
    rows = (
        (
            precision,
            *(f"{found[precision][way]['images_per_second']:.1f}" for way in ("bare_encoder", "measure", "refit")),
            _mebibytes(found[precision]["peak_bytes"]),
        )
        for precision in ("fp32", "bf16")
        if precision in found
    )
    yield from _table(("precision", "bare encoder", "`measure`", "`refit --steps 0`", "peak memory"), rows)


def _clustering(found: dict[str, Any]) -> Iterator[str]:
    yield "**k-means**, seconds and mean squared distance:"
    yield ""
    rows = (
        (f"{case}: {row['way']}", f"{row['seconds']:.2f}", f"{row['inertia']:.5f}", _mebibytes(row["peak_bytes"]))
        for case, ways in found.items()
        if isinstance(ways, list) and case != "skipped"
        for row in ways
    )
    yield from _table(("case", "seconds", "inertia", "peak memory"), rows)
    yield from (f"\n{why[0].upper()}{why[1:]}." for why in found["skipped"])


def _nearest(found: dict[str, Any]) -> Iterator[str]:
    yield "**The nearest code**, seconds:"
    yield ""
    rows = (
        (
            case,
            *(f"{one['seconds'][way]['median']:.3f}" for way in ("ours", "torch.cdist")),
            _spread(one["ours_to_cdist"]),
            _mebibytes(one["peak_bytes"]),
        )
        for case, one in found.items()
        if isinstance(one, dict) and "ours_to_cdist" in one
    )
    yield from _table(("case", "ours", "torch.cdist", "ours to it", "peak memory of ours"), rows)


def _spread(of: dict[str, float]) -> str:
    return f"{of['median']:.2f} ({of['min']:.2f} to {of['max']:.2f})"


def _mebibytes(nbytes: int | None) -> str:
    return "–" if nbytes is None else f"{nbytes / 2**20:,.0f} MiB"


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{section()}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
