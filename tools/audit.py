"""Looks the pins of requirements files up in PyPI's list of known vulnerabilities, by pip-audit.

    python tools/audit.py requirements/tested.txt requirements/torch.txt

pip-audit passes over what its service does not know, and says that nothing was found where it could not look at all;
here that is an error.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def audit(path: Path) -> list[dict[str, Any]]:
    """What was found out about each pin of a file; ends the program where that is nothing."""
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--format", "json"]
    # The pins are all that is installed, so pip is not asked what else they need.
    done = subprocess.run(
        [*command, "--disable-pip", "--no-deps", "--requirement", str(path)], capture_output=True, text=True
    )
    try:
        dependencies: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        reason = (done.stderr.strip() or "pip-audit said nothing").splitlines()[-1]
        sys.exit(f"not audited: {path}: {reason}")
    skipped = [dependency["name"] for dependency in dependencies if "skip_reason" in dependency]
    if skipped or not dependencies:
        sys.exit(
            f"not audited: the service of vulnerabilities says nothing of {len(skipped)} of {len(dependencies)} pins "
            f"of {path}, {', '.join(skipped[:3])} ...: is PyPI itself reached from here, or a mirror without its JSON?"
        )
    return dependencies


def main() -> None:
    dependencies = [dependency for path in sys.argv[1:] for dependency in audit(Path(path))]
    found = [(dependency, vulnerability) for dependency in dependencies for vulnerability in dependency["vulns"]]
    for dependency, vulnerability in found:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
        print(f"{dependency['name']} {dependency['version']}: {vulnerability['id']}, mended in {fixed}")
    if found:
        sys.exit(1)
    print(f"{len(dependencies)} pins, none with a known vulnerability")


if __name__ == "__main__":
    main()
