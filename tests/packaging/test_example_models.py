"""The examples that hold arrays: their table is that of their results, and their networks take their data."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import pytest
import torch
from places import BENCHMARKS

EXAMPLES = BENCHMARKS / "examples"
sys.path.append(str(EXAMPLES))
tables, training, repairs = map(import_module, ("example_tables", "train", "repair"))
RESULTS = sorted((BENCHMARKS / "results" / "examples").glob("*.json"))
SHAPES = {"signals": (2, 1, 256), "motion": (2, 64, 29), "items": (2, 768), "clips": (2, 1, 8, 32, 32)}


def test_the_table_is_that_of_the_results() -> None:
    text = (tables.RESULTS / "README.md").read_text(encoding="utf-8")
    assert text == tables.HEAD + tables.table(tables.results())
    assert [path.stem for path in RESULTS] == sorted(training.RECIPES) == sorted(repairs.REPAIRS)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_an_example_collapsed_by_itself_and_every_command_is_there(path: Path) -> None:
    result = json.loads(path.read_text())
    (before,) = tables.measurements(result, "measure", "before")
    books = before["codebooks"]
    assert sum(book["used"] for book in books) <= 0.3 * sum(book["size"] for book in books)
    assert [run["command"] for run in result["runs"]] == repairs.commands(result["name"])
    assert all(run["exit"] == (3 if " diagnose " in run["command"] else 0) for run in result["runs"])
    recipe = json.loads(json.dumps(asdict(training.RECIPES[result["name"]])))
    assert result["training"]["recipe"] == recipe and result["training"]["cpu_seconds"] < 180


@pytest.mark.parametrize("name", SHAPES)
def test_a_network_takes_its_data(name: str) -> None:
    network = import_module(name).make(8).eval()
    media = torch.rand(SHAPES[name])
    walk = getattr(network, "walk", lambda latents, quantize: latents)
    with torch.no_grad():
        assert network.decode(walk(network.encode(media), lambda level, latents: latents)).shape == media.shape
    assert {*training.RECIPES[name].codebooks} <= {*network.state_dict()}
