"""What the checks of trust found, in one file: benchmarks/results/trust.json, a part for each."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "trust.json"


def record(part: str, command: str, found: Mapping[str, object]) -> None:
    """Replace what the file has of this part."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[part] = {
        "command": command,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **found,
    }
    RESULTS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
