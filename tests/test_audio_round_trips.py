"""Audio codecs of transformers go through every command, and what comes out is what the library loads and computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from audio_codecs import CASES, WEIGHTS, Case, K, by_library, save, waveforms
from round_trips import OPERATIONS, Operation, assert_averages_follow, assert_same_indices, operated
from safetensors.torch import load_file, save_file

from codebook_tools.checkpoints.reading import read_checkpoint
from codebook_tools.models.load import load_model
from codebook_tools.opening import Request

LENGTH = 224
"""Samples of a clip: 28 latents."""

CODECS = ("encodec", "encodec, chunks", "dac", "mimi", "xcodec")
ALIVE = 6
"""Codes of a stage in use; the others are copies of the first, which win no latent."""

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A folder of 30 short waveforms, noise over a tone, as loud as the codes were drawn from."""
    folder, random = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for i in range(30):
        tone = np.sin(np.arange(LENGTH) * random.uniform(0.05, 1.0)) * random.uniform(0, 0.3)
        noise = random.normal(0, random.uniform(0.1, 0.3), LENGTH)
        soundfile.write(folder / f"{i:02d}.wav", (tone + noise).clip(-1, 1), 1600, subtype="FLOAT")
    return (str(folder),)


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """collapsed("dac"): the directory of a case, of whose codes ALIVE are in use: do not write into it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save(CASES[name], tmp_path_factory.mktemp("codec") / "model")
            state = load_file(made[name] / WEIGHTS)
            for key, tensor in state.items():
                if ".codebook." in key and tensor.shape[0] == K:
                    state[key] = torch.cat([tensor[:ALIVE], tensor[:1].expand_as(tensor)])[:K].contiguous()
            save_file(state, made[name] / WEIGHTS, {"format": "pt"})
        return made[name]

    return get


@pytest.fixture
def request_for(collapsed: Saved, clips: tuple[str, ...], tmp_path: Path) -> Callable[..., Request]:
    """request_for("dac"): a copy of the model, alone in tmp_path, and the clips."""

    def make(name: str, **more: Any) -> Request:
        model = Path(shutil.copytree(collapsed(name), tmp_path / "model"))
        return Request(model=model, **{"data": clips, "size": LENGTH, "batch_size": 16} | more)

    return make


def assert_the_library_agrees(case: Case, result: Path, size: int) -> None:
    """It finds all that it wants in the file, and codes and waveforms are ours, at its highest bandwidth."""
    model = load_model(read_checkpoint(result))
    assert [book.codebook.size for book in model.books] == [size] * case.quantisers
    assert json.loads((result / "config.json").read_text())["codebook_size"] == size
    sound = waveforms(model.network)
    with torch.no_grad():
        ours = model.pass_through(sound)
    codes, values = by_library(case, result, sound)
    assert_same_indices(ours.codes, codes.unbind(1), size)
    assert torch.allclose(ours.media, values, atol=1e-5) and ours.media.std() > 1e-3


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.parametrize("name", CODECS)
def test_what_is_written_the_library_loads_and_computes(
    name: str, operation: Operation, request_for: Callable[..., Request]
) -> None:
    case, request = CASES[name], request_for(name)
    _, result = operated(operation, request)
    filled = 8 if case.family.power_of_two else ALIVE
    assert_the_library_agrees(case, result, operation.size or filled)
    state = load_file(result / WEIGHTS)
    for key in state:
        stem = key.removesuffix("embed_avg")
        if stem != key:
            assert_averages_follow(state[f"{stem}embed"], state[key], state[f"{stem}cluster_size"])
            assert bool(state[f"{stem}inited"].all())
