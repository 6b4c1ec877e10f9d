"""Checkpoints of any size without a network, and what a surgery on them needs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from forks import run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from codebook_tools.models.demo import DEMO

KEY, SHARDS = "quantize.embedding.weight", 4


def demo(path: Path, megabytes: int) -> Path:
    """The bundled model, and so many megabytes that nothing asks for."""
    save_file(load_file(DEMO) | _carried(megabytes), path, metadata_of(DEMO))
    return path


def single(path: Path, megabytes: int) -> Path:
    """512 codes, and so many megabytes beside them."""
    save_file(_codes() | _carried(megabytes), path)
    return path


def sharded(folder: Path, megabytes: int) -> Path:
    """The same in four files, as libraries lay them out."""
    folder.mkdir()
    carried, places = list(_carried(megabytes).items()), dict[str, str]()
    for i in range(SHARDS):
        name = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = dict(carried[i::SHARDS]) | (_codes() if i == 1 else {})
        save_file(tensors, folder / name)
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text("{}")
    return folder


def latents(path: Path) -> Path:
    """Near 300 of the 512 codes, 20 at each."""
    save_file({"latents": _codes()[KEY][:300].repeat(20, 1)}, path)
    return path


def counts(model: Path, of: Path) -> Path:
    """How often those latents choose each code of a model: its --stats."""
    stats = of.with_name(f"{model.name}.stats")
    run(("measure", model, "--latents", of, "--stats", stats), of.with_name("said"))
    return stats


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _codes() -> dict[str, Tensor]:
    return {KEY: torch.randn(512, 16, generator=torch.Generator().manual_seed(1))}


def _carried(megabytes: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return {f"unet.{i}": torch.randn(megabytes << 15, generator=drawn) for i in range(8)}
