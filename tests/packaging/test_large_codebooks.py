"""The benchmark of large codebooks, at small sizes."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
from places import BENCHMARKS

pytestmark = [pytest.mark.packaging, pytest.mark.slow]

sys.path.append(str(BENCHMARKS))
large_codebooks = import_module("large_codebooks")


def test_surgeries_steps_and_pages_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    name, settings = large_codebooks.surgeries(64)["quantize --method pnn"]
    measured = large_codebooks.operated(name, settings, 500, 64, 4)
    assert measured["k"] == 16 and measured["seconds"] >= 0 and measured["memory_mb"] < 1024
    step = large_codebooks.step_seconds(large_codebooks.Request(None, ()), (8, 16), 1, 1)
    assert step["seconds"].keys() == {"8", "16"} and step["ratio"] > 0
    monkeypatch.setattr(large_codebooks, "PAGES", ("measure",))
    assert 1000 < large_codebooks.page_bytes(500, 64, 4)["measure"] < 5_000_000
