"""Models that were trained here, healthy ones and collapsed ones of five kinds, each cause made by training or by the
mistake itself; and the commands that a diagnosis suggests."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from collapsing import (
    CLIP,
    DIM,
    Data,
    centroids,
    collapsed,
    healthy,
    images_in,
    install,
    rows_of,
    sounds_in,
    train,
    write,
)
from conftest import Run
from torch import Tensor
from torch.nn import functional

from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.diagnose import Diagnosis, diagnose
from codebook_tools.workflows.request import Request

pytestmark = pytest.mark.slow

SIZE = {"cosine": 8}
AVERAGED = ("library", "cosine")
KINDS = ("plain", "sounds", "two stages", "library", "cosine")
COLLAPSES = [*((kind, 1.0) for kind in KINDS), ("plain", 0.3), ("library", 30.0)]
"""And how many times as far out as usual the codes began."""


class Bench:
    """Data, and networks that were trained on them: do not change those."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data: dict[str, Data] = dict.fromkeys(KINDS, images_in(folder)) | {"sounds": sounds_in(folder)}
        self.healthy = cache(lambda kind: healthy(kind, self.data[kind].media, SIZE.get(kind, 32), seed=1))
        self.collapsed = cache(lambda kind, scale: collapsed(kind, self.data[kind].media, scale=scale))

    def spoilt(self, mistake: str, kind: str) -> Any:
        network = deepcopy(self.healthy(kind))
        torch.manual_seed(5)
        with torch.no_grad():
            MISTAKES[mistake][0](network, kind, self.data[kind].media)
        return network

    def diagnosed(self, network: Any, kind: str, original: Any = None, limit: int | None = None) -> Diagnosis:
        """What is found, where each check has a sentence and a number of its own."""
        folder = Path(mkdtemp(dir=self.folder))
        against = write(original, kind, folder, "original")[0] if original is not None else None
        path, spec = write(network, kind, folder)
        more: dict[str, Any] = {"size": CLIP} if kind == "sounds" else {"input_range": (0.0, 1.0)}
        more |= {} if kind in AVERAGED else {"metric": "euclidean"}
        request = Request(path, (str(self.data[kind].path),), network=spec, limit=limit, **more)
        found = diagnose(request, Watch(), against)
        sentences = [check.evidence for check in found.checks if check.verdict != "not-checked"]
        assert len({*sentences}) == len(sentences)
        return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize(
    ("kind", "limit"), [*((kind, None) for kind in KINDS), ("plain", 10), ("two stages", 3), ("library", 3)]
)
def test_a_healthy_model_is_called_healthy_and_little_data_make_none_ill(
    kind: str, limit: int | None, bench: Bench
) -> None:
    found = bench.diagnosed(bench.healthy(kind), kind, limit=limit)
    allowed = {"few-modes", "counting"} if limit else set()
    assert {check.name for check in found.failed} <= allowed, found.checks


@pytest.mark.parametrize(("kind", "scale"), COLLAPSES)
def test_a_collapse_of_a_training_is_no_surgery_that_went_wrong(kind: str, scale: float, bench: Bench) -> None:
    found = bench.diagnosed(bench.collapsed(kind, scale), kind)
    names = {check.name for check in found.failed}
    assert names >= {"dead-codes", "scale-mismatch"}, found.checks
    wrong = {"not-installed", "wrong-encoder", "wrong-layout", "wrong-input-range", "stale-ema"}
    assert not names & wrong and not any("ORIGINAL" in check.fix for check in found.failed), found.checks


# --- mistakes
def unit(rows: Tensor, kind: str) -> Tensor:
    return functional.normalize(rows, dim=1) if kind == "cosine" else rows


def never_installed(network: Any, kind: str, media: Tensor) -> None:
    """The module was built anew, and nobody put the codes into it."""
    size = SIZE.get(kind, 32)
    for stage in range(len(network.keys)):
        install(network, stage, unit((torch.rand(size, DIM) * 2 - 1) / size, kind))


def channels_first(network: Any, kind: str, media: Tensor) -> None:
    """The latents were flattened as they lie."""
    rows = network.encode(media).contiguous().reshape(-1, DIM)
    for stage in range(len(network.keys)):
        install(network, stage, unit(centroids(rows, SIZE.get(kind, 32)), kind))


def reinitialised(network: Any, kind: str, media: Tensor) -> None:
    for layer in network.encoder:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()


def stale(network: Any, kind: str, media: Tensor) -> None:
    """Half of the codes were moved to latents, and their sums were not."""
    codes, rows = network.vq._codebook.embed[0].clone(), rows_of(network, media)
    half = len(codes) // 2
    codes[:half] = unit(rows[torch.randperm(len(rows))[:half]], kind)
    install(network, 0, codes, sums=False)


def unset(network: Any, kind: str, media: Tensor) -> None:
    network.vq._codebook.initted.zero_()


MISTAKES: dict[str, tuple[Callable[[Any, str, Tensor], None], str, tuple[str, ...]]] = {
    "the codes were never installed": (never_installed, "not-installed", ("plain", "two stages", "library")),
    "channels first": (channels_first, "wrong-layout", KINDS),
    "the encoder was made anew": (reinitialised, "wrong-encoder", ("plain", "two stages", "library", "cosine")),
    "sums of other codes": (stale, "stale-ema", ("library",)),
    "a flag says uninitialized": (unset, "uninitialised-flag", AVERAGED),
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, _, kinds) in MISTAKES.items() for kind in kinds])
def test_a_mistake_is_named_first(name: str, kind: str, bench: Bench) -> None:
    found = bench.diagnosed(bench.spoilt(name, kind), kind)
    assert found.failed and found.failed[0].name == MISTAKES[name][1], found.checks


@pytest.mark.parametrize("kind", ["sounds", "library"])
def test_long_steps_are_told_by_the_original(kind: str, bench: Bench) -> None:
    network = deepcopy(bench.healthy(kind))
    train(network, bench.data[kind].media, 60, 0.1)
    found = bench.diagnosed(network, kind, original=bench.healthy(kind))
    assert found.failed and found.failed[0].name == "learning-rate", found.checks


# --- what is suggested
@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        *(("collapsed", kind) for kind in KINDS),
        ("the codes were never installed", "plain"),
        ("channels first", "library"),
        ("sums of other codes", "library"),
        ("a flag says uninitialized", "library"),
    ],
)
def test_no_suggested_command_makes_the_model_worse(
    cause: str, kind: str, bench: Bench, tmp_path: Path, codebook: Run
) -> None:
    network = bench.collapsed(kind, 1.0) if cause == "collapsed" else bench.spoilt(cause, kind)
    path, spec = write(network, kind, tmp_path)
    given = ["--data", bench.data[kind].path, "--network", spec, "--limit", 150, "--seed", 3]
    given += ["--size", CLIP] if kind == "sounds" else ["--input-range=0,1"]
    given += [] if kind in AVERAGED else ["--metric", "euclidean"]
    outcome = codebook("diagnose", path, *given, "--json")
    assert outcome.exit_code == 3
    found = [check for check in outcome.json["checks"] if check["verdict"] == "found"]
    if (cause, kind) == ("collapsed", "plain"):
        (collapse,) = [check for check in found if check["name"] == "dimensional-collapse"]
        assert "effective dimension" in collapse["evidence"]
    commands = [command for check in found for command in commands_of(check["fix"])]
    assert commands
    for i, words in enumerate(dict.fromkeys(commands)):
        assert {str(option) for option in given if str(option).startswith("--")} <= {*words}
        short = ["--steps", "30"] if words[0] in ("refit", "finetune") else []
        done = codebook(*words, *short, "-o", tmp_path / f"{i}.safetensors", "--json")
        assert done.exit_code == 0, (words, done.stderr)
        stages = done.json["stages"]
        before, after = stages["before"]["mse"], stages[done.json["kept"]]["mse"]
        assert after <= before * 1.0005, (words, before, after)


def commands_of(fix: str) -> list[tuple[str, ...]]:
    """The commands in a remedy that operate on a file, without the words around them."""
    ends = ("merges", "sets", "writes", "revives", "drops", "replaces", "which", "keeps", "them", "it", "all;", "then")
    commands = list[tuple[str, ...]]()
    for part in fix.split("codebook ")[1:]:
        words = list[str]()
        for word in shlex.split(part.replace(";", " ;")):
            if word in ends or word == ";" or word.endswith(","):
                words += [word.rstrip(",")] if word.endswith(",") and word not in ends else []
                break
            words.append(word)
        if words[0] in ("refit", "prune", "finetune", "quantize"):
            commands.append(tuple(words))
    return commands
