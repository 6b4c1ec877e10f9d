"""The table of benchmarks/results/examples/README.md, from the JSON beside it.

python benchmarks/examples/example_tables.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "examples"
COLUMNS = ("example", "state", "codes", "used", "perplexity", "mse", "nmse", "seeds")
STATES = (  # a command, a phase of it, and what the table calls it
    ("measure", "before", "before"),
    ("prune", "surgery", "prune"),
    ("finetune", "finetuned", "fine-tuning alone"),
    ("refit", "surgery", "Re-Fit, before training"),
    ("refit", "finetuned", "Re-Fit, fine-tuned"),
)


def results() -> list[dict[str, Any]]:
    """What repair.py wrote, by name of the example."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def measurements(result: dict[str, Any], command: str, phase: str) -> list[dict[str, Any]]:
    """The measurements of a phase of all runs of a command, a run each seed."""
    runs = [run["result"] for run in result["runs"] if run["result"].get("command") == command]
    return [run["stages"][phase] for run in runs if run["stages"][phase]]


def table(examples: Sequence[dict[str, Any]]) -> str:
    """In Markdown, a line for each state of each example."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for result in examples:
        for command, phase, state in STATES:
            if stages := measurements(result, command, phase):
                lines.append(f"| {' | '.join((result['name'], state, *_cells(stages)))} |")
    return "\n".join(lines) + "\n"


def _cells(stages: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    levels = [[stage["codebooks"][level] for stage in stages] for level in range(len(stages[0]["codebooks"]))]
    return (
        " + ".join(f"{uses[0]['size']}" for uses in levels),
        " + ".join(_spread([use["used"] for use in uses], ".0f") for uses in levels),
        ", ".join(_spread([use["perplexity"] for use in uses], ".1f") for uses in levels),
        *(_spread([stage[name] for stage in stages], ".3g") for name in ("mse", "nmse")),
        str(len(stages)),
    )


def _spread(values: Sequence[float], form: str) -> str:
    """The mean, and the sample standard deviation where runs differ."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(set(values)) > 1 else mean


HEAD = """# Arrays: four models repaired

Each model was trained by `benchmarks/examples/train.py`, by a published recipe, and repaired by
`benchmarks/examples/repair.py`, by the command line alone; the JSON beside this page has every command and its output.
Figures are of test data, as mean ± sample standard deviation over seeds of the repair. `mse` is in the data's own
units, `nmse` over their variance. Codes of several levels are added, their perplexities listed.

*Fine-tuning alone* is the control: `codebook finetune`, which revives dead codes and keeps their number, for as many
steps. The models of signals, motion and items were trained on all rows, so their test rows are new to the repair alone;
the test clips are new to both.

"""


def write() -> None:
    """Write the page."""
    (RESULTS / "README.md").write_text(HEAD + table(results()), encoding="utf-8")


if __name__ == "__main__":
    write()
