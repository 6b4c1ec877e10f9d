"""Surgeries and fine-tuned models of several families and seeds, in which a diagnosis finds nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from audio_codecs import CASES as CODECS
from audio_codecs import save
from conftest import _pictures
from image_models import CASES
from safetensors.torch import load_file, save_file

from codebook_tools.codebook import Strategy
from codebook_tools.models.demo import DEMO
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Grow, Prune, Quantize, Refit, Restart
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.diagnose import diagnose
from codebook_tools.workflows.operate import operate
from codebook_tools.workflows.request import Request

pytestmark = pytest.mark.slow

NONE = FineTune(steps=0)
SHORT = FineTune(steps=40, batch_size=32, lr=3e-4)
TINY_STEPS = FineTune(steps=3, batch_size=16)
LENGTH = 224


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images of 16x16."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(_pictures(0, 120)):
        (folder / f"{i:03d}.png").write_bytes(picture)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 short waveforms, noise over a tone."""
    folder, random = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for i in range(60):
        tone = np.sin(np.arange(LENGTH) * random.uniform(0.05, 1.0)) * random.uniform(0, 0.3)
        noise = random.normal(0, random.uniform(0.1, 0.3), LENGTH)
        soundfile.write(folder / f"{i:02d}.wav", (tone + noise).clip(-1, 1), 1600, subtype="FLOAT")
    return folder


@dataclass(frozen=True)
class Operation:
    strategy: Strategy | None
    recipe: FineTune = NONE
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        return type(self.strategy).__name__.lower() if self.strategy else "finetune"


DEMOS = {
    "refit": Operation(Refit(k=128)),
    "refit, few codes, another seed": Operation(Refit(k=16, init="afkmc2", seed=5), more={"seed": 5}),
    "refit, from the codes in use": Operation(Refit(k=96, init="used")),
    "refit, fine-tuned": Operation(Refit(k=64, seed=1), SHORT, {"seed": 1}),
    "refit, decoder and codes by gradient": Operation(
        Refit(k=64), FineTune(steps=40, batch_size=32, lr=3e-4, train="decoder", codebook_update="gradient")
    ),
    "prune": Operation(Prune()),
    "top k": Operation(Prune(keep=32)),
    "grow, fine-tuned": Operation(Grow(k=96), SHORT),
    "restart": Operation(Restart()),
    "quantize": Operation(Quantize(k=40)),
}


def assert_nothing_is_found(source: Path, operation: Operation, output: Path, **more: Any) -> Request:
    """By itself, and beside the original. Returns how the result is asked for."""
    request = Request(None if source == DEMO else source, output=output, **more | operation.more)
    operate(operation.command, request, operation.strategy, operation.recipe, Watch())
    for against in (None, source):
        found = diagnose(Request(output, **more | operation.more), Watch(), against)
        assert found.healthy, [(check.name, check.value, check.evidence) for check in found.failed]
    return Request(output, **more | operation.more)


@pytest.mark.parametrize("name", DEMOS)
def test_nothing_is_found_in_surgeries_of_the_demo(name: str, tmp_path: Path) -> None:
    assert_nothing_is_found(DEMO, DEMOS[name], tmp_path / "result.safetensors", limit=200)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_found_in_image_tokenizers_but_a_flag_that_says_uninitialised(
    name: str, pictures: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    source = case.save(tmp_path)
    network = str(tmp_path / case.network) if case.network else None
    output = tmp_path / ("result" if source.is_dir() else "result.safetensors")
    more: dict[str, Any] = {"data": (str(pictures),), "network": network, "input_range": (-1.0, 1.0)}
    request = assert_nothing_is_found(source, Operation(Refit(k=8), TINY_STEPS), output, **more)
    state = load_file(output) if output.is_file() else {}
    for flag in [key for key in state if key.endswith("initted")][-1:]:
        save_file(state | {flag: torch.zeros_like(state[flag])}, output)
        found = diagnose(request, Watch())
        assert [check.name for check in found.failed] == ["uninitialised-flag"], found.checks
        assert flag in found.failed[0].evidence


@pytest.mark.parametrize("name", ["encodec", "dac", "mimi", "xcodec"])
def test_nothing_is_found_in_audio_codecs(name: str, clips: Path, tmp_path: Path) -> None:
    source = save(CODECS[name], tmp_path / "model")
    operation = Operation(Refit(k=8), replace(TINY_STEPS, lr=1e-4))
    assert_nothing_is_found(source, operation, tmp_path / "result", data=(str(clips),), size=LENGTH)
