"""Strategies by name, with their settings as text: ours, and those that other distributions add."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file

from codebook_tools.codebook import REMOVED
from codebook_tools.errors import CodebookError
from codebook_tools.strategies import STRATEGIES, Prune, Refit, find_strategy, make_strategy


def test_settings_are_json_or_else_text() -> None:
    assert [find_strategy(name) for name in STRATEGIES] == [*STRATEGIES.values()]
    assert make_strategy("prune", ["keep=null", "threshold=3"]) == Prune(threshold=3)
    assert make_strategy("refit", ["k=8", "init=afkmc2"]) == make_strategy("refit", ["k=8", 'init="afkmc2"'])
    assert make_strategy("refit", ["k=8", "device=3"]) == Refit(8, device="3"), "a field of text takes any"


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("prune", ["threshold"], "--set threshold: expected FIELD=VALUE"),
    ("prune", ["no_such=1"], "strategy prune cannot be made from .*no_such"),
    ("refit", [], "strategy refit cannot be made from .*'k'"),
    ("prune", ["threshold=many"], "strategy prune: threshold is 'many'; expected a whole number"),
    ("prune", ["keep=true"], "strategy prune: keep is True; expected a whole number"),
    ("refit", ["k=" + "[" * 100_000], "strategy refit: k is '\\[+...\\[+'; expected a whole number"),
    ("refit", ["k=8", "init=lucky"], "strategy refit: init is 'lucky'; expected one of kmeans"),
    ("prune", ["threshold=-1"], "threshold=-1 is below 0"),
    ("refitt", [], r"no strategy 'refitt'; there are .*prune.*, refit"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_the_users_error(name: str, settings: list[str], message: str) -> None:
    with pytest.raises(CodebookError, match=message):
        make_strategy(name, settings)


EVERY_NTH = """
from dataclasses import dataclass, replace

import torch

from codebook_tools.codebook import REMOVED, Surgery


@dataclass(frozen=True)
class EveryNth:
    step: int = 2

    def __call__(self, codebook, latents, counts):
        codes = torch.arange(codebook.size)
        index_map = torch.where(codes % self.step == 0, codes // self.step, REMOVED)
        return Surgery(replace(codebook, vectors=codebook.vectors[:: self.step].clone()), index_map)
"""
"""A strategy as a third party would write it: keeps every step-th code."""

ENTRY_POINTS = """[codebook_tools.strategies]
every-nth = every_nth_strategy:EveryNth
not-there = every_nth_strategy:NoSuchClass
no-module = no_such_module_anywhere:Strategy
prune = every_nth_strategy:EveryNth
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with a tiny distribution, as an installer would leave it in site-packages."""
    folder = tmp_path / "site"
    information = folder / "every_nth-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "every_nth_strategy.py").write_text(EVERY_NTH)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: every-nth\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


@pytest.fixture
def importable(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on this process's path."""
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.delitem(sys.modules, "every_nth_strategy", raising=False)


@pytest.mark.usefixtures("importable")
def test_an_added_strategy_is_found_listed_and_made_by_its_entry_point() -> None:
    strategy: Any = make_strategy("every-nth", ["step=3"])
    assert type(strategy).__name__ == "EveryNth" and type(strategy) is find_strategy("every-nth")
    assert strategy.step == 3 and find_strategy("prune") is Prune, "it cannot take the name of ours"
    listed = r"there are condense, every-nth, grow, .*no-module, not-there, prune,.* refit"
    with pytest.raises(CodebookError, match=listed):
        find_strategy("other")
    with pytest.raises(CodebookError, match=r"strategy every-nth cannot be made from .*stride"):
        make_strategy("every-nth", ["stride=3"])
    for name in ("not-there", "no-module"):
        with pytest.raises(CodebookError, match=f"strategy {name}, installed as .*, does not load"):
            find_strategy(name)


@pytest.mark.usefixtures("importable")
def test_an_added_strategy_runs_as_a_command_on_a_users_model(codebook: Run, tiny: Path, images_folder: Path) -> None:
    done = codebook("every-nth", tiny, "--set", "step=3", "--data", images_folder, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.json["command"] == "every-nth" and done.json["settings"]["step"] == 3
    assert done.json["stages"]["surgery"]["codebooks"][0]["size"] == 6
    old, new = load_file(tiny), load_file(done.json["outputs"]["model"])
    key = "_vq_vae._embedding.weight"
    assert torch.equal(new[key], old[key][::3])
    assert all(torch.equal(new[name], old[name]) for name in old if name != key)
    index_map = load_file(done.json["outputs"]["index_map"])[f"{key}/index_map"]
    assert index_map.tolist() == [i // 3 if i % 3 == 0 else REMOVED for i in range(16)]
    assert codebook("verify", done.json["outputs"]["model"], "--against", tiny).exit_code == 0


def test_an_added_strategy_has_a_command_of_its_own_with_help(installed: Path, tmp_path: Path) -> None:
    def printed(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "200"}
        command = [sys.executable, "-m", "codebook_tools", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    options = printed("every-nth", "--help")
    assert all(words in options for words in ("every-nth [OPTIONS] [MODEL]", "--set", "--steps"))
    (installed / "every_nth_strategy.py").write_text("raise ImportError")  # the list must not import any of them
    assert "The strategy every-nth" in printed("--help")
