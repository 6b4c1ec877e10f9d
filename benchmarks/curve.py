"""Draw the traces of results that `--json` printed, or that a benchmark wrote, one line each.

python benchmarks/curve.py benchmarks/results/demo.json --output demo.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from codebook_tools.report.html.curves import draw_traces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help=".png, .svg or .pdf")
    given = parser.parse_args()
    found = {path.stem: json.loads(path.read_text()) for path in given.results}
    draw_traces({name: said.get("result", said)["trace"] for name, said in found.items()}, given.output)


if __name__ == "__main__":
    main()
