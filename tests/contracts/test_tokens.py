"""Tokens of every kind of model: `encode` writes those that the model's own library chooses, `decode` gives back what
that library decodes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import audio_codecs
import image_models
import numpy as np
import pytest
import soundfile
import torch
from image_models import OWN, QUANTIZERS
from PIL import Image
from torch import Tensor

import codebook_tools as ct
from codebook_tools.evaluation.tokens import TokenDecoder, tokens_of
from codebook_tools.models.user_network import make_network
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_network

Own = Callable[[Path, Tensor], tuple[Tensor, Tensor]]
"""(model, images in [-1, 1]) -> reconstructions alike, and tokens (n, [levels,] *grid), by the library alone."""


def by_vq_library(path: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    network: Any = make_network(f"{path.parent / 'own.py'}:make", 16).eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    latents = network.encode(images)
    quantized, indices, *_ = network.vq(latents.flatten(2).mT)
    if indices.ndim == 4:  # (groups, n, positions, stages)
        indices = indices.movedim(0, -2).flatten(-2)
    codes = indices.reshape(len(images), *latents.shape[2:], -1).movedim(-1, 1)
    return network.decode(quantized.mT.unflatten(2, latents.shape[2:])), codes.squeeze(1)


def save_own(name: str, folder: Path) -> Path:
    """A network around a quantizer of vector-quantize-pytorch, all of whose codes lie among the latents."""
    (folder / "own.py").write_text(OWN.replace("QUANTIZER", QUANTIZERS[name]))
    torch.manual_seed(1)
    state = make_network(f"{folder / 'own.py'}:make", 16).state_dict()
    for key, tensor in state.items():
        if key.endswith("_codebook.embed"):
            state[key] = torch.nn.functional.normalize(torch.randn(tensor.shape), dim=-1) * 0.6
        elif key.endswith("initted"):
            state[key] = torch.ones_like(tensor)
    torch.save(state, folder / "own.pt")
    return folder / "own.pt"


def of_one(own: Callable[[Path, Tensor], image_models.Computed]) -> Own:
    return lambda path, images: (lambda decoded, codes: (decoded, codes[0]))(*own(path, images))


IMAGES: dict[str, tuple[Callable[[Path], Path], Own]] = {
    "VQModel": (image_models.save_vqmodel, of_one(image_models.by_vqmodel)),
    "JanusVQVAE": (image_models.save_janus, of_one(image_models.by_janus)),
    **{
        name: (lambda folder, name=name: save_own(name, folder), by_vq_library)
        for name in ("VectorQuantize", "ResidualVQ", "GroupedResidualVQ")
    },
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "JanusVQVAE" else name for name in IMAGES]
)
def test_tokens_of_images_are_those_of_the_own_library(
    name: str, images_folder: Path, image_tensor: Tensor, tmp_path: Path
) -> None:
    save, own = IMAGES[name]
    source = save(tmp_path)
    network = f"{tmp_path}/own.py:make" if name in QUANTIZERS else None
    model = ct.load(source, network=network, input_range=(-1, 1))
    done = ct.encode(model, ct.Data(images_folder, batch_size=25), tmp_path / "tokens.npy")
    with torch.no_grad():
        expected, codes = own(source, image_tensor * 2 - 1)
    tokens = np.load(tmp_path / "tokens.npy")
    assert tokens.dtype == np.int32 and len(np.unique(tokens)) > 4
    assert np.array_equal(tokens, codes.numpy()) and done.shape == tokens.shape
    assert done.levels == (1 if codes.ndim == 3 else codes.shape[1])
    opened = open_network(model.request)
    opened.input_range = (-1, 1)
    levels = [codes] if done.levels == 1 else [*codes.unbind(1)]
    decoded = TokenDecoder(opened, opened.modality.of(opened.network, None))(levels)
    expected = ((expected + 1) / 2).clamp(0, 1)
    assert torch.allclose(decoded, expected, atol=1e-5) and expected.std() > 1e-2
    ct.decode(tmp_path / "tokens.npy", model, tmp_path / "back")
    names = (tmp_path / "tokens.npy.items.txt").read_text().split()
    assert names == sorted(path.relative_to(images_folder).as_posix() for path in images_folder.rglob("*.png"))
    for i in (0, 59):
        pixels = np.asarray(Image.open(tmp_path / "back" / names[i]), dtype=np.float32).transpose(2, 0, 1) / 255
        assert np.abs(pixels - expected[i].numpy()).max() <= 0.5 / 255 + 1e-5


@pytest.mark.parametrize(
    "name", ["encodec", "dac", *(pytest.param(name, marks=pytest.mark.slow) for name in ("encodec, chunks", "mimi"))]
)
def test_tokens_of_sound_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = audio_codecs.CASES[name]
    source = audio_codecs.save(case, tmp_path / "model")
    model = open_network(Request(source))
    sound = audio_codecs.waveforms(model.network)
    for i, wave in enumerate(sound):
        soundfile.write(tmp_path / f"{i}.wav", wave.T.numpy(), model.network.sampling_rate, subtype="FLOAT")
    files = [tmp_path / "0.wav", tmp_path / "1.wav"]
    loaded = ct.load(source)
    done = ct.encode(loaded, ct.Data(files, size=sound.shape[-1]), tmp_path / "tokens.safetensors")
    codes, expected = audio_codecs.by_library(case, source, sound)
    assert done.shape == tuple(codes.shape) and done.levels == case.quantisers
    assert [use.used > 1 for use in done.usage] == [True] * done.levels
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tokens_of(model, sound), codes.unbind(1), strict=True))
    with pytest.warns(ct.CodebookWarning, match="loudness") if "chunks" in name else nullcontext():
        ct.decode(tmp_path / "tokens.safetensors", loaded, tmp_path / "back")
    for i, wave in enumerate(expected):
        values, rate = soundfile.read(tmp_path / "back" / f"{i}.wav#0.wav", dtype="float32", always_2d=True)
        assert rate == model.network.sampling_rate and values.T.shape == wave.shape
        if "chunks" not in name:
            assert np.allclose(values.T, wave.numpy(), atol=1e-5) and wave.std() > 1e-3


def test_loudness_of_a_chunk_is_that_of_no_sound_in_particular(tmp_path: Path) -> None:
    """What is decoded is what the library decodes without scales."""
    import transformers

    case = audio_codecs.CASES["encodec, chunks"]
    source = audio_codecs.save(case, tmp_path / "model")
    model = open_network(Request(source))
    sound = audio_codecs.waveforms(model.network)
    codes = tokens_of(model, sound)
    decoded = TokenDecoder(model, model.modality.of(model.network, None))(codes)
    library = transformers.EncodecModel.from_pretrained(source).eval()
    with torch.no_grad():
        made = library.encode(sound, bandwidth=library.config.target_bandwidths[-1])
        ones = [torch.ones_like(scale) for scale in made.audio_scales]
        short = made.last_frame_pad_length
        expected = library.decode(made.audio_codes, ones, last_frame_pad_length=short).audio_values
    expected = expected[..., : sound.shape[-1]]
    assert decoded.shape == sound.shape and torch.allclose(decoded, expected, atol=1e-5) and expected.std() > 1e-3
