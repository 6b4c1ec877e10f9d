"""Models that were trained here, healthy ones and collapsed ones of five kinds, each cause made by training or by the
mistake itself; and the commands that a diagnosis suggests."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Data]:
    folder = tmp_path_factory.mktemp("data")
    (three := folder / "three").mkdir()
    images = images_in(folder)
    return dict.fromkeys(KINDS, images) | {"sounds": sounds_in(folder), "three": images_in(three, kinds=3)}


@pytest.fixture(scope="module")
def trained(data: dict[str, Data]) -> dict[str, Any]:
    """Healthy networks by kind: do not change them."""
    return {kind: healthy(kind, data[kind].media, SIZE.get(kind, 32), seed=1) for kind in KINDS}


@pytest.fixture(scope="module")
def collapses(data: dict[str, Data]) -> dict[tuple[str, float], Any]:
    """Collapsed networks by kind and by how many times as far out as usual their codes began: do not change them."""
    scales = [*((kind, 1.0) for kind in KINDS), ("plain", 0.3), ("library", 30.0)]
    return {(kind, scale): collapsed(kind, data[kind].media, scale=scale) for kind, scale in scales}


def request_of(kind: str, path: Path, network: str, given: Data) -> Request:
    sound = kind == "sounds"
    return Request(
        path,
        (str(given.path),),
        network=network,
        metric=None if kind in AVERAGED else "euclidean",
        size=CLIP if sound else None,
        input_range=None if sound else (0.0, 1.0),
    )


def diagnosed(network: Any, kind: str, given: Data, folder: Path, original: Any = None) -> Diagnosis:
    against = write(original, kind, folder, "original")[0] if original is not None else None
    return diagnose(request_of(kind, *write(network, kind, folder), given), Watch(), against)


def told(found: Diagnosis) -> str:
    return "\n".join(f"{check.verdict} {check.name} {check.value} {check.evidence}" for check in found.checks)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found_in_a_healthy_model(
    kind: str, trained: dict[str, Any], data: dict[str, Data], tmp_path: Path
) -> None:
    found = diagnosed(trained[kind], kind, data[kind], tmp_path)
    assert found.healthy, told(found)


@pytest.mark.parametrize(("kind", "limit"), [("plain", 10), ("two stages", 3), ("library", 3)])
def test_little_data_make_no_healthy_model_ill(
    limit: int, kind: str, trained: dict[str, Any], data: dict[str, Data], tmp_path: Path
) -> None:
    request = request_of(kind, *write(trained[kind], kind, tmp_path), data[kind])
    found = diagnose(replace(request, limit=limit), Watch())
    assert not {check.name for check in found.failed} - {"few-modes", "counting"}, told(found)


@pytest.mark.parametrize(("kind", "scale"), [*((kind, 1.0) for kind in KINDS), ("plain", 0.3), ("library", 30.0)])
def test_a_collapse_of_a_training_is_no_surgery_that_went_wrong(
    kind: str, scale: float, collapses: dict[tuple[str, float], Any], data: dict[str, Data], tmp_path: Path
) -> None:
    found = diagnosed(collapses[kind, scale], kind, data[kind], tmp_path)
    names = {check.name for check in found.failed}
    assert "dead-codes" in names and "scale-mismatch" in names, told(found)
    assert not names & {"not-installed", "wrong-encoder", "wrong-layout", "wrong-input-range", "stale-ema"}, told(found)
    assert not any("ORIGINAL" in check.fix for check in found.failed)


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
    with torch.no_grad():
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
def test_a_mistake_is_named_first(
    name: str, kind: str, trained: dict[str, Any], data: dict[str, Data], tmp_path: Path
) -> None:
    make, cause, _ = MISTAKES[name]
    network = deepcopy(trained[kind])
    torch.manual_seed(5)
    with torch.no_grad():
        make(network, kind, data[kind].media)
    found = diagnosed(network, kind, data[kind], tmp_path)
    assert found.failed and found.failed[0].name == cause, told(found)


@pytest.mark.parametrize("kind", ["sounds", "library"])
def test_steps_that_were_too_long_are_told_by_the_original(
    kind: str, trained: dict[str, Any], data: dict[str, Data], tmp_path: Path
) -> None:
    network = deepcopy(trained[kind])
    train(network, data[kind].media, 60, 0.1)
    found = diagnosed(network, kind, data[kind], tmp_path, original=trained[kind])
    assert found.failed and found.failed[0].name == "learning-rate", told(found)


@pytest.mark.parametrize("kind", ["library"])
def test_data_of_three_kinds_are_no_fault_of_the_codes(kind: str, data: dict[str, Data], tmp_path: Path) -> None:
    found = diagnosed(collapsed(kind, data["three"].media, scale=0.5), kind, data["three"], tmp_path)
    assert found.failed and found.failed[0].name == "few-modes", told(found)


def test_each_check_has_a_sentence_and_a_number_of_its_own(
    trained: dict[str, Any], collapses: dict[tuple[str, float], Any], data: dict[str, Data], tmp_path: Path
) -> None:
    for network in (trained["library"], collapses["library", 30.0]):
        checks = diagnosed(network, "library", data["library"], tmp_path).checks
        said = [check.evidence for check in checks if check.verdict != "not-checked"]
        assert len({*said}) == len(said)


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
    cause: str, kind: str, trained: dict[str, Any], collapses: dict[tuple[str, float], Any], data: dict[str, Data],
    tmp_path: Path, codebook: Run,
) -> None:  # fmt: skip
    torch.manual_seed(5)
    if cause == "collapsed":
        network = collapses[kind, 1.0]
    else:
        network = deepcopy(trained[kind])
        with torch.no_grad():
            MISTAKES[cause][0](network, kind, data[kind].media)
    path, spec = write(network, kind, tmp_path)
    sound = kind == "sounds"
    given = ["--data", data[kind].path, "--network", spec, "--limit", 150, "--seed", 3]
    given += ["--size", CLIP] if sound else ["--input-range=0,1"]
    given += [] if kind in AVERAGED else ["--metric", "euclidean"]
    found = codebook("diagnose", path, *given, "--json")
    assert found.exit_code == 3
    commands = [
        command
        for check in found.json["checks"]
        if check["verdict"] == "found"
        for command in commands_of(check["fix"])
    ]
    assert commands
    for i, words in enumerate(dict.fromkeys(commands)):
        for option in (one for one in given if str(one).startswith("--")):
            assert str(option) in words
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


def test_a_collapsed_encoder_is_told_in_json(
    collapses: dict[tuple[str, float], Any], data: dict[str, Data], tmp_path: Path, codebook: Run
) -> None:
    path, spec = write(collapses["plain", 1.0], "plain", tmp_path)
    words = ("--network", spec, "--data", data["plain"].path, "--metric", "euclidean", "--json")
    found = json.loads(codebook("diagnose", path, *words).stdout)
    (collapse,) = [check for check in found["checks"] if check["name"] == "dimensional-collapse"]
    assert collapse["verdict"] == "found" and "effective dimension" in collapse["evidence"]
