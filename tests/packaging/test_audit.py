"""`make audit` reports success only where every pin was looked up."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from processes import ran

pytestmark = pytest.mark.packaging

CLEAN: dict[str, Any] = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (2)"}
BROKEN = {"name": "c", "version": "3", "vulns": [{"id": "PYSEC-1", "fix_versions": ["4"]}]}
SILENT = "not audited: the service of vulnerabilities says nothing of"


def printing(*dependencies: dict[str, Any]) -> str:
    return f"print({json.dumps(json.dumps({'dependencies': dependencies}))})"


@pytest.mark.parametrize(
    ("pip_audit", "code", "output"),
    [
        (printing(CLEAN), 0, "1 pins, none with a known vulnerability\n"),
        (printing(CLEAN, BROKEN), 1, "c 3: PYSEC-1, mended in 4\n"),
        (printing(CLEAN, SKIPPED), 1, f"{SILENT} 1 of 2 pins of pins.txt, b"),
        (printing(), 1, f"{SILENT} 0 of 0 pins"),
        ("raise ConnectionError('no such host')", 1, "not audited: pins.txt: ConnectionError: no such host\n"),
    ],
    ids=["clean", "vulnerable", "skipped", "empty", "unreached"],
)
def test_an_audit_says_what_it_did_not_look_up(pip_audit: str, code: int, output: str, tmp_path: Path) -> None:
    (tmp_path / "pip_audit.py").write_text(pip_audit)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = ran(sys.executable, ROOT / "tools" / "audit.py", "pins.txt", env=environment)
    assert done.exit_code == code and (done.stdout + done.stderr).startswith(output)
