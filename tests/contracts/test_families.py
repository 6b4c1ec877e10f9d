"""Models of every family go through surgeries, and their own code loads the result and computes what ours does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import audio_codecs
import numpy as np
import pytest
import soundfile
import torch
from audio_codecs import WEIGHTS, K, by_library, waveforms
from families import State
from image_models import CASES
from round_trips import (
    OPERATIONS,
    Operation,
    assert_averages_follow,
    assert_only_these_differ,
    assert_same_indices,
    operated,
)
from safetensors.torch import load_file, save_file

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Grow, Prune, Quantize, Refit
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.compare import compare
from codebook_tools.workflows.operate import measure_model, operate
from codebook_tools.workflows.request import Request

BY_COMMAND = {str(operation): operation for operation in OPERATIONS}
FEW = ("prune", "refit, fine-tuned")
"""A K that the data decide, and new codes in a trained network; the other commands write as these do."""


def pairs(names: Any, whole: str) -> list[Any]:
    """Each name with FEW operations, and `whole` with all."""
    return [(name, command) for name in names for command in (BY_COMMAND if name == whole else FEW)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "command"), pairs(CASES, whole="VQModel"))
def test_the_own_code_of_an_image_tokenizer_computes_what_is_reported(
    name: str, command: str, images_folder: Path, image_tensor: torch.Tensor, tmp_path: Path
) -> None:
    case, operation = CASES[name], BY_COMMAND[command]
    source = case.save(tmp_path)
    network = str(tmp_path / case.network) if case.network else None
    output = tmp_path / ("result" if source.is_dir() else "result.safetensors")
    request = Request(source, (str(images_folder),), limit=30, network=network, input_range=(-1.0, 1.0), output=output)
    done, result = operated(operation, request)
    assert done.family == case.family
    if not operation.recipe.steps:
        assert_only_these_differ(result, source, case.owned)
    model = load_model(read_checkpoint(result), network=network)
    (size,) = {book.codebook.size for book in model.books}
    assert size == operation.size or (operation.size is None and size <= 16)
    with torch.no_grad():
        ours = model.pass_through(image_tensor[:4])
        decoded, indices = case.compute(result, image_tensor[:4] * 2 - 1)
    assert_same_indices(ours.codes, indices, size)
    assert torch.allclose(ours.media * 2 - 1, decoded.float(), atol=2e-5) and decoded.std() > 1e-3


# --- audio codecs of transformers ------------------------------------------------------------------------------------

LENGTH = 224
"""Samples of a clip: 28 latents."""
ALIVE = 6
"""Codes of a stage in use; the others are copies of the first, which win no latent."""
CODECS = ("encodec", "encodec, chunks", "dac", "mimi", "xcodec")
POWERS_ONLY = ("encodec", "dac", "mimi")
RequestFor = Callable[..., Request]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A folder of 30 short waveforms, noise over a tone, as loud as the codes were drawn from."""
    folder, random = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for i in range(30):
        tone = np.sin(np.arange(LENGTH) * random.uniform(0.05, 1.0)) * random.uniform(0, 0.3)
        noise = random.normal(0, random.uniform(0.1, 0.3), LENGTH)
        soundfile.write(folder / f"{i:02d}.wav", (tone + noise).clip(-1, 1), 1600, subtype="FLOAT")
    return (str(folder),)


@pytest.fixture
def request_for(clips: tuple[str, ...], tmp_path: Path) -> RequestFor:
    """request_for("dac"): a model alone in tmp_path, of whose codes ALIVE are in use, and the clips."""

    def make(name: str, **more: Any) -> Request:
        model = audio_codecs.save(audio_codecs.CASES[name], tmp_path / "model")
        state = load_file(model / WEIGHTS)
        for key, tensor in state.items():
            if ".codebook." in key and tensor.shape[0] == K:
                state[key] = torch.cat([tensor[:ALIVE], tensor[:1].expand_as(tensor)])[:K].contiguous()
        save_file(state, model / WEIGHTS, {"format": "pt"})
        return Request(model=model, **{"data": clips, "size": LENGTH, "batch_size": 16} | more)

    return make


def assert_the_library_agrees(name: str, result: Path, size: int) -> Model:
    """It finds all that it wants in the file, and codes and waveforms are ours, at its highest bandwidth."""
    case, model = audio_codecs.CASES[name], load_model(read_checkpoint(result))
    assert [book.codebook.size for book in model.books] == [size] * case.quantisers
    assert json.loads((result / "config.json").read_text())["codebook_size"] == size
    sound = waveforms(model.network)
    with torch.no_grad():
        ours = model.pass_through(sound)
    codes, values = by_library(case, result, sound)
    assert_same_indices(ours.codes, codes.unbind(1), size)
    assert torch.allclose(ours.media, values, atol=1e-5) and ours.media.std() > 1e-3
    return model


def assert_state_follows(state: State, model: Model) -> None:
    """What lies beside the codes is theirs: running averages, and in Mimi what they are themselves the quotient of."""
    for book in model.books:
        owner, _, leaf = book.key.rpartition(".")
        rows = state[book.key]
        if leaf == "embed_sum":
            usage = state[f"{owner}.cluster_usage"]
            rows = rows / usage.clamp(min=1e-5)[:, None]
            assert bool((usage >= 1).all()) and bool(state[f"{owner}.initialized"].all())
        elif leaf == "embed":
            assert_averages_follow(rows, state[f"{owner}.embed_avg"], state[f"{owner}.cluster_size"])
            assert bool(state[f"{owner}.inited"].all())
        assert torch.equal(rows, book.vectors)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "command"), pairs(CODECS, whole="encodec"))
def test_the_library_of_a_codec_computes_what_is_reported(name: str, command: str, request_for: RequestFor) -> None:
    operation = BY_COMMAND[command]
    done, result = operated(operation, request_for(name))
    filled = 8 if audio_codecs.CASES[name].family.power_of_two else ALIVE
    state = load_file(result / WEIGHTS)
    assert_state_follows(state, assert_the_library_agrees(name, result, operation.size or filled))
    if name in ("encodec", "xcodec"):  # whose clips are no chunks: one hit a latent, and one for codes without any
        images: Any = done.settings["images"]
        (*_, counts) = (tensor for key, tensor in state.items() if key.endswith("cluster_size"))
        latents = (images["train"] + images["validation"]) * 28
        assert 0 <= int(counts.sum()) - latents < (operation.size or filled)


TWELVE = {"prune": Prune(keep=12), "refit": Refit(k=12), "quantize": Quantize(k=12), "grow": Grow(k=12)}


@pytest.mark.parametrize(
    ("name", "command"),
    [*(("dac", command) for command in (*TWELVE, "compare")), ("encodec", "refit"), ("mimi", "refit")],
)
def test_a_size_that_the_config_does_not_take_is_refused_before_any_work(
    name: str, command: str, request_for: RequestFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in ("run", "encode"):
        monkeypatch.setattr(Model, work, lambda *_: pytest.fail("the model was run"))
    request, steps = request_for(name), FineTune(steps=0)
    run = {
        "compare": lambda: compare(request, 12, ["refit"], steps, seeds=1, folder=tmp_path / "rows", watch=Watch())
    }.get(command, lambda: operate(command, request, TWELVE[command], steps, Watch()))
    with pytest.raises(CodebookError, match=r"12 codes: .* takes powers of two only; the nearest are 8 and 16"):
        run()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_config_that_takes_any_size_gets_it(request_for: RequestFor) -> None:
    _, result = operated(Operation("refit", Refit(k=12)), request_for("xcodec"))
    assert_the_library_agrees("xcodec", result, 12)


def test_pruning_fills_up_to_what_the_config_takes_and_warns_of_it(request_for: RequestFor) -> None:
    done, result = operated(Operation("prune", Prune()), request_for("encodec"))
    (warning,) = (warning for warning in done.warnings if "dead codes fill them up" in warning)
    assert "one size that the config takes, 8" in warning and warning.partition(", 8: ")[2].count(" of quantizer.") == 3
    assert done.surgery is not None and done.before is not None and done.surgery.mse == done.before.mse
    assert [use.used for use in done.surgery.codebooks] == [use.used for use in done.before.codebooks]
    rates = json.loads((result / "config.json").read_text())["target_bandwidths"]
    assert rates == pytest.approx([1.2, 2.4], abs=1e-5)  # 4 bits a code have become 3


@pytest.mark.parametrize(("k", "size"), [(8, 16), (32, 32)])
def test_of_several_stages_one_may_be_chosen_and_all_keep_one_size(k: int, size: int, request_for: RequestFor) -> None:
    key = "quantizer.layers.1.codebook.embed"
    request = request_for("encodec", codebook_key=(key,))
    done, result = operated(Operation("refit", Refit(k=k)), request)
    assert_the_library_agrees("encodec", result, size)
    before, after = (load_file(path / WEIGHTS) for path in (request.source, result))
    for other in (name for name in before if name.endswith(".embed") and name != key):
        assert torch.equal(after[other][:K], before[other])
        assert torch.equal(after[other][K:], before[other][:1].expand(size - K, -1))
    assert len(after[key].unique(dim=0)) == k
    assert any("dead codes fill them up" in warning for warning in done.warnings)


def test_sound_beyond_full_scale_is_warned_of_by_its_share_and_peak(request_for: RequestFor, tmp_path: Path) -> None:
    """2 of 224 samples are 0.89 %."""
    wave = np.full(LENGTH, 0.5)
    wave[10], wave[20] = 1.5, -2.5
    soundfile.write(tmp_path / "loud.wav", wave, 1600, subtype="FLOAT")
    soundfile.write(tmp_path / "as-loud-as-can-be.wav", wave.clip(-1, 1), 1600, subtype="FLOAT")
    files = (str(tmp_path / "loud.wav"), str(tmp_path / "as-loud-as-can-be.wav"))
    (warning,) = measure_model(request_for("dac", data=(), test_data=files), Watch()).warnings
    assert warning.startswith("1 clips go beyond ±1: 0.89% of their samples, up to 2.5 in loud.wav#0; nothing is clip")
