"""Where the checkout lies, and what stands beside it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS, TRUST = ROOT / "benchmarks", ROOT / "benchmarks" / "trust"
SHARED = ROOT / ".." / "shared"
TESTS, SUPPORT = ROOT / "tests", ROOT / "tests" / "support"
