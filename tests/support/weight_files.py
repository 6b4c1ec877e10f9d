"""Weights in every format that is read: safetensors files, shards with an index, files of torch.save."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import State
from safetensors import safe_open
from safetensors.torch import save_file

CODEBOOK = "quantize.embedding.weight"
STATE: State = {
    "a.half": torch.linspace(-1, 1, 6).half(),
    "a.brain": torch.linspace(-1, 1, 3).bfloat16(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "count": torch.tensor(7),
    CODEBOOK: torch.linspace(-1, 1, 12).reshape(4, 3),
    "flag ü": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 4),
}
NEW = torch.linspace(0, 1, 6).reshape(2, 3)
"""A smaller codebook."""

INDEX = "model.safetensors.index.json"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {A: {key: STATE[key] for key in list(STATE)[:4]}, B: {key: STATE[key] for key in list(STATE)[4:]}}
TOTAL = sum(tensor.numel() * tensor.element_size() for tensor in STATE.values())


def save_pickle(content: object, path: Path, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def save_shards(folder: Path, shards: Mapping[str, State] = SHARDS) -> Path:
    """As transformers writes them, but for the metadata."""
    for name, state in shards.items():
        save_file(state, folder / name, {"format": "pt", "shard": name})
    places = {key: name for name, state in shards.items() for key in state}
    edit_index(folder, lambda index: index.update(metadata={"total_size": TOTAL, "by": "others"}, weight_map=places))
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text()) if path.exists() else {}
    change(index)
    path.write_text(json.dumps(index, indent=3))


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, by its specification: 8 bytes of length, JSON, data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def safetensors_bytes(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def metadata_of(path: Path) -> dict[str, str]:
    """As the library reads them."""
    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata()
        return metadata


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
