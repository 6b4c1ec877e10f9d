"""Tiny audio codecs that transformers wrote, and what its own forward makes of waveforms."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from families import loaded
from round_trips import assert_loads_whole
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.models.families import dac, encodec, mimi, xcodec
from codebook_tools.models.family import Family

K = 16
WEIGHTS = "model.safetensors"
HUBERT = {
    "model_type": "hubert", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8,
    "conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [4, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
ENCODEC = {
    "target_bandwidths": [1.6, 3.2], "sampling_rate": 1600, "hidden_size": 8, "num_filters": 4,
    "upsampling_ratios": [4, 2], "num_lstm_layers": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A tiny codec. quantisers: that its config makes. more: entries of its config, beside the codebook size."""

    name: str
    family: Family
    quantisers: int
    more: dict[str, Any] = field(default_factory=dict)


CASES = {
    "encodec": Case("Encodec", encodec.FAMILY, 4, ENCODEC),
    "encodec, chunks": Case(
        "Encodec", encodec.FAMILY, 4, ENCODEC | {"normalize": True, "audio_channels": 2, "chunk_length_s": 0.05,
        "overlap": 0.15, "norm_type": "time_group_norm", "use_causal_conv": False},
    ),
    "dac": Case(
        "Dac", dac.FAMILY, 3, {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "decoder_hidden_size": 16,
        "n_codebooks": 3, "codebook_dim": 4, "sampling_rate": 1600},
    ),
    "mimi": Case(
        "Mimi", mimi.FAMILY, 4, {"sampling_rate": 1600, "hidden_size": 16, "num_filters": 4,
        "upsampling_ratios": [4, 2], "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 4,
        "num_semantic_quantizers": 2, "upsample_groups": 16, "num_hidden_layers": 1, "intermediate_size": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 20, "layer_scale_initial_scale": 1.0},
    ),
    "xcodec": Case(
        "Xcodec", xcodec.FAMILY, 3, {"target_bandwidths": [0.9, 2.5], "sample_rate": 1600,
        "semantic_model_config": HUBERT, "acoustic_model_config": {"model_type": "dac", "encoder_hidden_size": 4,
        "decoder_hidden_size": 16, "downsampling_ratios": [4, 2], "upsampling_ratios": [4, 2], "hidden_size": 8}},
    ),
}  # fmt: skip
CASES["dac, odd ratio"] = Case("Dac", dac.FAMILY, 3, CASES["dac"].more | {"downsampling_ratios": [2, 5, 2]})
CASES["mimi, no projection"] = Case(
    "Mimi", mimi.FAMILY, 4, CASES["mimi"].more | {"vector_quantization_hidden_dimension": 16, "codebook_dim": 16}
)


def waveforms(network: Any, positions: int = 28) -> Tensor:
    noise = torch.randn(2, network.channels, positions * network.hop, generator=torch.Generator().manual_seed(1))
    return (noise * torch.tensor([0.1, 0.3])[:, None, None]).clamp(-1, 1)


def effective(state: dict[str, Tensor], key: str) -> Tensor:
    if not key.endswith("embed_sum"):
        return state[key]
    return state[key] / state[key.replace("embed_sum", "cluster_usage")].clamp(min=1e-5)[:, None]


class Nearest:
    """A quantise callback: nearest codes by torch.cdist, and the indices it found, by stage."""

    def __init__(self, codes: list[Tensor], cosine: bool = False, straight: bool = False) -> None:
        self.codes, self.cosine, self.straight, self.found = codes, cosine, straight, dict[int, Tensor]()

    def __call__(self, stage: int, latents: Tensor) -> Tensor:
        assert stage == len(self.found)
        rows, codes = latents.detach().movedim(1, -1), self.codes[stage]
        scaled = (functional.normalize(rows, dim=-1), functional.normalize(codes, dim=-1))
        a, b = scaled if self.cosine else (rows, codes)
        self.found[stage] = torch.cdist(a, b[None]).argmin(-1)
        quantised = codes[self.found[stage]].movedim(-1, 1)
        return latents + (quantised - latents).detach() if self.straight else quantised


def save(case: Case, folder: Path) -> Path:
    """A directory that the library wrote, with random weights, and the codes of each stage drawn from its latents."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.name}Config")(codebook_size=K, **case.more)
    model = getattr(transformers, f"{case.name}Model")(config)
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d) and not hasattr(module, "parametrizations"):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear").data.mul_(0.7)
    model.save_pretrained(folder)
    network, _ = load(case, read_checkpoint(folder))
    state, drawn = load_file(folder / WEIGHTS), list[Tensor]()

    def draw(stage: int, latents: Tensor) -> Tensor:
        rows = latents.movedim(1, -1).flatten(0, -2)
        drawn.append(rows[torch.randperm(len(rows))[:K]] * 0.9)
        return drawn[-1][torch.cdist(rows, drawn[-1]).argmin(-1)].reshape(latents.movedim(1, -1).shape).movedim(-1, 1)

    with torch.no_grad():
        network.walk(network.encode(waveforms(network)), draw)
    for key, codes in zip(network.codebooks, drawn, strict=True):
        stem, _, leaf = key.rpartition(".")
        counts = torch.linspace(0, 40, K)  # the first of them is held at the library's least
        sums = codes * counts.clamp(min=1e-5)[:, None]
        values = {"embed_sum": sums, "cluster_usage": counts} if leaf == "embed_sum" else {leaf: codes}
        values |= {"embed_avg": codes * counts[:, None], "cluster_size": counts} if leaf == "embed" else {}
        state |= {f"{stem}.{name}": value for name, value in values.items()}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    return folder


def load(case: Case, checkpoint: Checkpoint) -> tuple[Any, list[Tensor]]:
    """Our module with the file's weights, and the effective codes of its stages."""
    network, state = loaded(case.family, checkpoint), checkpoint.tensors()
    keys = {case.family.file_key(name, checkpoint.shapes) for name in network.state_dict()}
    assert keys == checkpoint.shapes.keys() and case.family.prefix(checkpoint) == ""
    return network, [effective(state, key) for key in network.codebooks]


def by_library(case: Case, path: Path, sound: Tensor) -> tuple[Tensor, Tensor]:
    """The same, at the highest bandwidth, of the library's own forward, which must have found its every weight."""
    cls: Any = getattr(transformers, f"{case.name}Model")
    model, told = cls.from_pretrained(path, output_loading_info=True)
    assert_loads_whole(told)
    rates = getattr(model.config, "target_bandwidths", None)
    with torch.no_grad():
        made = model.eval()(sound, **({"bandwidth": rates[-1]} if rates else {}))
        codes = made.audio_codes
        if case.name == "Encodec":  # (chunks, n, quantisers, positions), the last one padded
            short = model.encode(sound, bandwidth=rates[-1]).last_frame_pad_length
            codes = torch.cat(list(codes), -1)[..., : codes.shape[0] * codes.shape[-1] - short]
    assert codes.shape[1] == case.quantisers
    return codes, made.audio_values.reshape(len(sound), sound.shape[1], -1)
