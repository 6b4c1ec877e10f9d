"""Every strategy and the controls on a checkpoint: the figures of the README and of docs/comparison.md.

    python benchmarks/compare.py [NAME ...] [--seeds N] [--shared ../shared]
    python benchmarks/compare.py --peers [...]        quantizers of another library instead: see peer_rows.py

Without a name it is the bundled demo. Rows, table, settings and machine go to benchmarks/results/compare/NAME/; rows
that are there already, made with the same model, data, settings and version, are not run again: they are printed with
their day, which stands under "made" in summary.json. `demo-age-...` want the snapshots that `python
benchmarks/train_demo.py` keeps. excerpts.py then copies rows into the documents.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path

import torch

from codebook_tools.models.demo import DEMO
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies.comparison_entries import ENTRIES
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.compare import compare
from codebook_tools.workflows.comparison_rows import Comparison, Row, RowStore, markdown_table
from codebook_tools.workflows.request import Request

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks") / "results" / "compare"
ALL = tuple(ENTRIES)


@dataclass(frozen=True)
class Run:
    """model: None for the demo. parts: sizes, and the rows to be run with each. steps: of fine-tuning."""

    parts: Mapping[int, tuple[str, ...]]
    model: str | None = None
    data: str | None = None
    test_data: str | None = None
    network: str | None = None
    steps: int = 1000

    def request(self, shared: str) -> Request:
        def path(text: str | None) -> str | None:
            return text and text.format(shared=shared)

        model, data, test, network = map(path, (self.model, self.data, self.test_data, self.network))
        return Request(
            model=Path(model) if model else None,
            data=(data,) if data else (),
            test_data=(test,) if test else (),
            network=network,
        )


CONTROLS = ("untouched+textbook", "untouched+same-recipe", "refit+textbook")
AGES = ("untouched", "untouched+same-recipe", "prune", "refit", "grow")
RUNS = {
    "demo": Run({128: ALL}),
    "cifar10": Run(
        {
            128: ("untouched", "refit", "condense", "top-k", "prune", *CONTROLS),
            512: ("refit",),
            32: ("refit", "condense"),
            64: ("refit",),
            256: ("refit",),
        },
        "{shared}/checkpoints/cifar10-vqvae-k512.safetensors",
        "{shared}/data/cifar10-train.tar",
        "{shared}/data/cifar10-test.tar",
        steps=500,
    ),
    "fashion": Run(
        {32: ALL, 64: ("refit", "grow"), 128: ("refit",)},
        "{shared}/checkpoints/fashion-vqvae-k128.safetensors",
        "{shared}/data/fashion-train.tar",
        "{shared}/data/fashion-test.tar",
        "{shared}/models/fashion_vqvae.py:make",
        steps=300,
    ),
    **{f"demo-age-{age}": Run({128: AGES}, f"build/demo-{age}.safetensors") for age in (250, 1000, 4000)},
}


def run(name: str, shared: str, seeds: int) -> Comparison:
    """All parts of a run, as one comparison."""
    asked, folder = RUNS[name], RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    request, recipe, found = asked.request(shared), FineTune(steps=asked.steps), []
    before = days(folder)
    for k, names in asked.parts.items():
        _said.clear()
        found.append(compare(request, k, names, recipe, seeds=seeds, folder=folder, watch=Watch(_say)))
    whole = replace(found[0], rows=tuple(row for part in found for row in part.rows))
    (folder / "table.md").write_text(markdown_table(whole.summaries))
    made = {label(row): before.get(label(row), datetime.now(UTC).date().isoformat()) for row in whole.rows}
    old = [f"{key} of {day}" for key, day in made.items() if key in before]
    if old:
        print(f"{len(old)} of {len(made)} rows are old ones, not run again: {'; '.join(old)}", file=sys.stderr)
    about = whole.to_json()
    del about["rows"], about["seconds"]
    about |= {
        "model": str(asked.model or DEMO.relative_to(ROOT)).format(shared=shared),
        "command": f"python benchmarks/compare.py {name} --seeds {seeds}",
        "made": made,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    (folder / "summary.json").write_text(json.dumps(about, indent=1) + "\n")
    return whole


def label(row: Row) -> str:
    """What identifies a row, and what it was made with."""
    return f"{row.strategy}, K {row.k}, seed {row.seed} ({row.made_with[:8]})"


def days(folder: Path) -> dict[str, str]:
    """The day of each row of a folder, by label: of the summary, else that on which git has the rows, or their file."""
    rows, summary = folder / "rows.json", folder / "summary.json"
    if not rows.exists():
        return {}
    said = json.loads(summary.read_text()).get("made", {}) if summary.exists() else {}
    log = ["git", "log", "-1", "--format=%as", "--", str(rows)]
    committed = subprocess.run(log, capture_output=True, text=True, check=False).stdout.strip()
    day = committed or date.fromtimestamp(rows.stat().st_mtime).isoformat()
    return {label(row): said.get(label(row), day) for row in RowStore(folder).rows}


_said: set[str] = set()


def _say(what: str, done: int, total: int | None, figures: Mapping[str, float]) -> None:
    row = what.partition(":")[0]
    if row not in _said:
        _said.add(row)
        print(row, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; left out: demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shared", default="../shared")
    given = parser.parse_args()
    unknown = set(given.names) - set(RUNS)
    if unknown:
        parser.error(f"no run {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    os.chdir(ROOT)
    for name in given.names or ["demo"]:
        print(f"{name}: {RESULTS / name}", file=sys.stderr)
        print(markdown_table(run(name, given.shared, given.seeds).summaries), flush=True)


if __name__ == "__main__":
    if "--peers" in sys.argv:
        import peer_rows

        peer_rows.main([argument for argument in sys.argv[1:] if argument != "--peers"])
    else:
        main()
