"""The harnesses of docs/trust.md, each for some seconds: that they still run, and find nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from places import TRUST
from processes import ran

pytestmark = pytest.mark.packaging

ELSEWHERE = "import record, runpy, sys; from pathlib import Path; record.RESULTS = Path(sys.argv.pop(1)); \
del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kills", ("prune", "sharded", "finetune", "--kills", "5", "--megabytes", "8")),
        ("flips", ("--flips", "16")),
        ("soak", ("--minutes", "0.3")),
    ],
)
def test_a_harness_runs_and_finds_nothing(name: str, options: tuple[str, ...], tmp_path: Path) -> None:
    results = tmp_path / "trust.json"
    command = (sys.executable, "-c", ELSEWHERE, results, TRUST / f"{name}.py", *options)
    # What forks may not have used more than one thread before.
    environment = os.environ | {"PYTHONPATH": f"{TRUST}{os.pathsep}{TRUST.parents[1]}", "OMP_NUM_THREADS": "1"}
    done = ran(*command, env=environment, cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    counts = json.loads(results.read_text())[name]
    assert counts["command"]
    if name == "kills":
        assert [command["survived"] for command in counts["commands"].values()] == [5, 5, 5]
