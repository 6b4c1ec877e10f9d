"""Quantizers of another library in the tool's own fine-tuning, on a few images of the demo."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from places import BENCHMARKS
from torch import Tensor, nn

from codebook_tools.runtime.progress import Watch
from codebook_tools.training.recipe import FineTune
from codebook_tools.training.trainer import Trainer
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import Opened, open_request

pytestmark = pytest.mark.packaging

sys.path.append(str(BENCHMARKS))
peers, peer_rows, recipes = map(import_module, ("peers", "peer_rows", "recipes"))
K, STEPS = 8, 2


@cache
def opened() -> Opened:
    return open_request(Request(limit=80), Watch())


def in_training(name: str | None, times: float = 1.0) -> Trainer:
    """A trainer of a copy of the demo; of the tool itself for None."""
    of, recipe = opened(), FineTune(steps=STEPS)
    model, train = of.model.copy(deepcopy(of.model.network)), of.calibration.subset(of.splits.train)
    if name is None:
        return Trainer(model, train, recipe, [torch.ones(model.books[0].codebook.size)], 3, {}, {})
    return peers.PeerTrainer(peers.PEERS[name], K, times, model, train, recipe, 3)


def test_peers_train_on_the_batches_of_the_tool() -> None:
    drawn = []
    for name in (None, "EMA 0.99"):
        trainer, media = in_training(name), list[Tensor]()
        encode = trainer.model.network.encode
        trainer.model.network.encode = lambda batch, encode=encode, media=media: (media.append(batch), encode(batch))[1]
        for step in (1, 2):
            trainer.gradients()
            trainer.move(step)
        drawn.append(media)
    ours, theirs = drawn
    assert len(ours) == 2 and not ours[0].equal(ours[1])
    assert all(own.equal(of_peer) for own, of_peer in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", peers.PEERS)
def test_the_codes_that_are_evaluated_are_those_of_the_peer(name: str) -> None:
    trainer = in_training(name)
    for step in (1, 2):
        trainer.gradients()
        trainer.move(step)
    model, images = trainer.model, opened().test.load(opened().splits.test[:8])[1]
    with trainer.evaluation_mode(), torch.no_grad():
        mine = model.pass_through(images)
        rows = mine.latents[0].movedim(1, -1).flatten(1, -2)
        quantized, codes, _ = trainer.quantizer.eval()(rows)
        theirs = model.run(images, lambda _, latents: quantized.view(latents.movedim(1, -1).shape).movedim(-1, 1))
    assert torch.equal(mine.codes[0].flatten(1), codes)
    torch.testing.assert_close(mine.media, theirs, atol=1e-5, rtol=1e-4)


def test_without_learning_the_codes_stay_those_of_k_means() -> None:
    """DiVeQ's codes move by gradients alone. Revival is off: it moves codes whatever the learning rate."""
    diveq = peers.PEERS["DiVeQ"]
    still = replace(diveq, settings={**diveq.settings, "threshold_ema_dead_code": 1e-9})
    tuned = peers.trained(opened(), still, K, STEPS, 3, times=0.0)
    model, validation = opened().model, opened().calibration.subset(opened().splits.validation)
    random = torch.Generator().manual_seed(3)
    train = opened().splits.train
    order = torch.randperm(len(train), generator=random)[:64]
    _, first = opened().calibration.load([train[int(i)] for i in order])
    rows = model.encode(first).movedim(1, -1).flatten(0, -2).detach()
    torch.manual_seed(3)
    codes = lloyd(rows, K, 10)
    torch.testing.assert_close(tuned.model.books[0].vectors, codes, atol=1e-3, rtol=1e-3)
    images = validation.load(validation.items)[1]
    latents = model.encode(images).movedim(1, -1).detach()
    quantized = codes[torch.cdist(latents.flatten(0, -2), codes).argmin(1)].view(latents.shape).movedim(-1, 1)
    with torch.no_grad():
        error = (model.run(images, lambda *_: quantized).clamp(0, 1) - images).square().mean()
    assert tuned.best.validation_mse == pytest.approx(float(error), rel=1e-4)
    assert tuned.best.step == 1, "no later state is better"


def lloyd(rows: Tensor, k: int, iterations: int) -> Tensor:
    """k-means from rows drawn by torch's generator; a code without rows stays."""
    codes = rows[torch.randperm(len(rows))[:k]]
    for _ in range(iterations):
        nearest = torch.cdist(rows, codes).argmin(1)
        codes = torch.stack([rows[nearest == i].mean(0) if (nearest == i).any() else codes[i] for i in range(k)])
    return codes


def test_learned_parameters_of_a_peer_train_with_those_of_the_network() -> None:
    for name, count in (("EMA 0.8", 0), ("cosine", 0), ("DiVeQ", 1), ("SimVQ", 1)):
        trainer = in_training(name)
        learned = list(trainer.quantizer.parameters())
        before: list[nn.Parameter] = deepcopy(learned)
        trainer.gradients()
        trainer.move(1)
        assert len(learned) == count
        assert not any(torch.equal(now, then) for now, then in zip(learned, before, strict=True))


def test_rows_are_made_once_and_the_best_of_three_rates_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipes, "opened", lambda data, shared: (opened(), None, None))
    monkeypatch.setattr(peer_rows, "ProcessPoolExecutor", Inline)
    command = ["EMA 0.99", "--k", "8", "--steps", "2", "--seeds", "2", "--data", "demo", "--output", str(tmp_path)]
    peer_rows.main(command)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    trials, runs = [row for row in rows if row["steps"] == 1], [row for row in rows if row["steps"] == 2]
    assert len(trials) == 3 and [row["seed"] for row in runs] == [0, 1]
    best = min(trials, key=lambda row: row["validation_mse"])
    assert {row["lr"] for row in runs} == {best["lr"]}
    assert [*runs[0]["tried"].values()] == [row["validation_mse"] for row in trials]
    assert runs[0]["size"] == 8 >= runs[0]["used"] and 1 <= runs[0]["step"] <= 2
    assert f"{sum(row['mse'] for row in runs) / 2:.6f} ± " in (tmp_path / "table.md").read_text()
    capsys.readouterr()
    monkeypatch.setattr(peer_rows, "done", None)  # raises where a row is made again
    peer_rows.main(command)
    assert "demo, K = 8, 2 steps" in capsys.readouterr().out


class Inline:
    """A pool of processes that is none."""

    def __init__(self, jobs: int, context: object) -> None: ...

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *error: object) -> None: ...

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*arguments))
        return future


def test_a_run_that_fails_does_not_cost_the_rows_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [peer_rows.Run("demo", name, K, STEPS, 0) for name in ("EMA 0.8", "SimVQ", "DiVeQ")]

    def done(run: Any, shared: str) -> dict[str, Any]:
        if run.name == "EMA 0.8":
            raise ValueError("diverged")
        return asdict(run) | {"validation_mse": 0.1, "mse": 0.2, "settings": run.settings()}

    monkeypatch.setattr(peer_rows, "done", done)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="diverged"):
            peer_rows.Rows(tmp_path, "", pool).of(runs)
        monkeypatch.setattr(peer_rows, "done", None)  # rows that are kept are not made again
        rows = peer_rows.Rows(tmp_path, "", pool).of(runs[1:])
    assert [row["name"] for row in rows] == ["SimVQ", "DiVeQ"]


def test_the_table_is_that_of_its_rows() -> None:
    rows = json.loads((peer_rows.RESULTS / "rows.json").read_text())["rows"]
    table = (peer_rows.RESULTS / "table.md").read_text(encoding="utf-8")
    assert peer_rows.tables(row for row in rows if "tried" in row) == table
