"""RQ-VAEs of item embeddings: their networks compute what an independent forward pass over the public names does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, State
from families import assert_close, claims, described, loaded, shapes_of
from points import looked_up, normal
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.models.load import load_model
from codebook_tools.models.registry import FAMILIES, detected

WIDTHS = (24, 16, 12, 6)
"""Of items, hidden layers and codes."""


def side(name: str, places: list[int], widths: tuple[int, ...], biased: bool, normed: bool) -> State:
    """The tensors of a perceptron whose linear layers are in these places."""
    state: State = {}
    for i, (place, inputs, outputs) in enumerate(zip(places, widths, widths[1:], strict=False)):
        state[f"{name}.{place}.weight"] = normal(outputs, inputs, seed=i) / inputs**0.5
        if biased:
            state[f"{name}.{place}.bias"] = normal(outputs, seed=10 + i)
        if normed:
            rows = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 3.0}
            state |= {
                f"{name}.{place + 1}.{leaf}": at + normal(outputs, seed=20 + i).abs() for leaf, at in rows.items()
            }
            state[f"{name}.{place + 1}.num_batches_tracked"] = torch.tensor(7)
    return state


def rqvae(layers: str, levels: str, first: int, step: int, biased: bool, normed: bool = False) -> State:
    places = [first + step * i for i in range(len(WIDTHS) - 1)]
    state = side(f"encoder.{layers}", places, WIDTHS, biased, normed)
    state |= side(f"decoder.{layers}", places, WIDTHS[::-1], biased, normed)
    return state | {f"{levels}.{i}.embedding.weight": normal(32, WIDTHS[-1], seed=30 + i) for i in range(3)}


CASES: dict[str, tuple[str, State]] = {
    "LC-Rec": ("lc-rec", rqvae("mlp_layers", "rq.vq_layers", 1, 3, True)),
    "LC-Rec, batch norm": ("lc-rec", rqvae("mlp_layers", "rq.vq_layers", 1, 4, True, True)),
    "RQ-VAE-Recommender": ("rq-vae-recommender", rqvae("mlp", "layers", 0, 2, False)),
    "RQ-VAE-Recommender, dropout": ("rq-vae-recommender", rqvae("mlp", "layers", 0, 3, False)),
    "RQ-VAE-Recommender of 2025": ("rq-vae-recommender-2025", rqvae("mlp", "layers", 0, 2, False)),
}


def computed(state: State, name: str, rows: Tensor, of_2025: bool) -> Tensor:
    """The forward pass of one side, layer after layer, in the order of the file's numbers."""
    inner = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
    places = sorted({int(key.partition(".")[0]) for key in inner})
    lines = [place for place in places if inner[f"{place}.weight"].ndim == 2]
    for place in lines:
        rows = functional.linear(rows, inner[f"{place}.weight"], inner.get(f"{place}.bias"))
        if place + 1 in places and place + 1 not in lines:
            mean, variance = inner[f"{place + 1}.running_mean"], inner[f"{place + 1}.running_var"]
            rows = (rows - mean) / (variance + 1e-5).sqrt() * inner[f"{place + 1}.weight"] + inner[f"{place + 1}.bias"]
        if place != lines[-1]:
            rows = rows * rows.sigmoid() if of_2025 else rows.clamp(min=0)
    return rows


@pytest.mark.parametrize("name", CASES)
def test_a_network_computes_what_the_public_names_say(name: str, tmp_path: Path) -> None:
    family, state = CASES[name]
    save_file({f"model.{key}": tensor for key, tensor in state.items()}, tmp_path / "model.safetensors")
    network, rows, of_2025 = loaded(FAMILIES[family], tmp_path / "model.safetensors"), normal(9, 24), "2025" in name
    layers, levels = ("mlp_layers", "rq.vq_layers") if family == "lc-rec" else ("mlp", "layers")
    latents = computed(state, f"encoder.{layers}", rows, of_2025)
    assert_close(network.encode(rows), latents)
    left, expected, chosen, ours = latents, torch.zeros_like(latents), list[Tensor](), list[Tensor]()
    for i in range(3):
        code, ids = looked_up(left, state[f"{levels}.{i}.embedding.weight"])
        left, expected = left - code, expected + code
        chosen.append(ids)

    def quantize(stage: int, found: Tensor) -> Tensor:
        code, ids = looked_up(found, network.get_parameter(network.codebooks[stage]).detach())
        ours.append(ids)
        return code

    total = network.walk(network.encode(rows), quantize)
    assert_close(total, expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, chosen, strict=True))
    decoded = computed(state, f"decoder.{layers}", expected, of_2025)
    if of_2025:
        decoded = decoded / decoded.norm(dim=1, keepdim=True)
    assert_close(network.decode(total), decoded)
    network.train().decode(network.encode(rows)).square().mean().backward()
    untouched = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert untouched == list(network.codebooks) and getattr(network, "modality", None) == "arrays"


@pytest.mark.parametrize("name", [name for name in CASES if "2025" not in name])
def test_a_layout_is_recognized_alone_and_its_codebooks_are_those_of_the_levels(name: str) -> None:
    family, state = CASES[name]
    for prefix in ("", "model."):
        checkpoint = described({prefix + key: shape for key, shape in shapes_of(state).items()})
        assert claims(checkpoint) == {family: prefix}
        keys = [book.key for book in detected(checkpoint).codebooks]
        assert keys == [key for key in checkpoint.shapes if key.endswith("embedding.weight")] and len(keys) == 3


@pytest.mark.parametrize("change", [
    {"layers.0.out_proj.0.weight": (6, 6)},  # SimVQ
    {"encoder.mlp.2.weight": (12, 17)}, {"decoder.mlp.4.weight": (25, 16)}, {"layers.1.embedding.weight": (32, 7)},
    {"encoder.mlp.0.bias": (16,)}, {"encoder.conv.weight": (3, 3, 3)},
])  # fmt: skip
def test_what_is_built_otherwise_is_not_recognized(change: dict[str, Any]) -> None:
    assert claims(described(shapes_of(CASES["RQ-VAE-Recommender"][1]) | change)) == {}


def test_inspect_names_the_family(codebook: Run, tmp_path: Path) -> None:
    torch.save({"iter": 3, "model": CASES["RQ-VAE-Recommender"][1], "model_config": {"n": 3}}, tmp_path / "model.pt")
    said = json.loads(codebook("inspect", tmp_path / "model.pt", "--json").stdout)
    assert (
        said["family"] == "rq-vae-recommender" and [(b["size"], b["dim"]) for b in said["codebooks"]] == [(32, 6)] * 3
    )
    model = load_model(read_checkpoint(tmp_path / "model.pt"))
    assert len(model.books) == 3 and "rq-vae-recommender-2025" in model.caveats[0]
