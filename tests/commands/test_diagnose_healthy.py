"""Surgeries and fine-tuned models of several families and seeds, in which a diagnosis finds nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from audio_codecs import CASES as CODECS
from audio_codecs import save
from image_models import CASES
from safetensors.torch import load_file, save_file
from surgeries import NO_STEPS, do

from codebook_tools.codebook import Strategy
from codebook_tools.models.demo import DEMO
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Grow, Prune, Quantize, Refit, Restart
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.diagnose import diagnose
from codebook_tools.workflows.request import Request

pytestmark = pytest.mark.slow

SHORT = FineTune(steps=40, batch_size=32, lr=3e-4)
TINY_STEPS = FineTune(steps=3, batch_size=16)
LENGTH = 224


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 short waveforms, noise over a tone."""
    folder, random = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for i in range(60):
        tone = np.sin(np.arange(LENGTH) * random.uniform(0.05, 1.0)) * random.uniform(0, 0.3)
        noise = random.normal(0, random.uniform(0.1, 0.3), LENGTH)
        soundfile.write(folder / f"{i:02d}.wav", (tone + noise).clip(-1, 1), 1600, subtype="FLOAT")
    return folder


DEMOS: dict[str, tuple[Strategy, FineTune]] = {
    "refit": (Refit(k=128), NO_STEPS),
    "refit, few codes, another seed": (Refit(k=16, init="afkmc2", seed=5), NO_STEPS),
    "refit, from the codes in use": (Refit(k=96, init="used"), NO_STEPS),
    "refit, fine-tuned": (Refit(k=64, seed=1), SHORT),
    "refit, decoder and codes by gradient": (
        Refit(k=64), FineTune(steps=40, batch_size=32, lr=3e-4, train="decoder", codebook_update="gradient"),
    ),
    "prune": (Prune(), NO_STEPS),
    "top k": (Prune(keep=32), NO_STEPS),
    "grow, fine-tuned": (Grow(k=96), SHORT),
    "restart": (Restart(), NO_STEPS),
    "quantize": (Quantize(k=40), NO_STEPS),
}  # fmt: skip


def assert_nothing_is_found(source: Path, strategy: Strategy, recipe: FineTune, output: Path, **more: Any) -> Request:
    """By itself, and beside the original. Returns how the result is asked for."""
    do(Request(None if source == DEMO else source, output=output, **more), strategy, recipe)
    asked = Request(output, **more)
    for against in (None, source):
        found = diagnose(asked, Watch(), against)
        assert found.healthy, found.checks
    return asked


@pytest.mark.parametrize("name", DEMOS)
def test_nothing_is_found_in_surgeries_of_the_demo(name: str, tmp_path: Path) -> None:
    seed = getattr(DEMOS[name][0], "seed", 0)
    assert_nothing_is_found(DEMO, *DEMOS[name], tmp_path / "result.safetensors", limit=200, seed=seed)


@pytest.mark.parametrize("name", CASES)
def test_image_tokenizers_are_healthy_but_for_a_flag_that_is_not_set(
    name: str, images_folder: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    source = case.save(tmp_path)
    network = str(tmp_path / case.network) if case.network else None
    output = tmp_path / ("result" if source.is_dir() else "result.safetensors")
    more: dict[str, Any] = {"data": (str(images_folder),), "network": network, "input_range": (-1.0, 1.0)}
    request = assert_nothing_is_found(source, Refit(k=8), TINY_STEPS, output, **more)
    state = load_file(output) if output.is_file() else {}
    for flag in [key for key in state if key.endswith("initted")][-1:]:
        save_file(state | {flag: torch.zeros_like(state[flag])}, tmp_path / "faulty.safetensors")
        found = diagnose(replace(request, model=tmp_path / "faulty.safetensors"), Watch())
        assert [check.name for check in found.failed] == ["uninitialised-flag"], found.checks
        assert flag in found.failed[0].evidence


@pytest.mark.parametrize("name", ["encodec", "dac", "mimi", "xcodec"])
def test_nothing_is_found_in_audio_codecs(name: str, clips: Path, tmp_path: Path) -> None:
    source = save(CODECS[name], tmp_path / "model")
    recipe = replace(TINY_STEPS, lr=1e-4)
    assert_nothing_is_found(source, Refit(k=8), recipe, tmp_path / "result", data=(str(clips),), size=LENGTH)
