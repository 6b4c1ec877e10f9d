"""Weights in several safetensors files; the index that says which tensor lies in which is checked against all."""

from __future__ import annotations

import os
import re
from pathlib import Path

from codebook_tools.checkpoints.config import parse_config
from codebook_tools.checkpoints.layout import SUFFIX
from codebook_tools.checkpoints.safetensors_file import read_safetensors
from codebook_tools.checkpoints.tensors import Entry, Weights
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.hub_ids import lies_within


def read_shards(index: Path) -> Weights:
    """Read the headers of all shards of an index.

    Raises:
        CodebookError: Index and shards do not agree, or the index names a file that is missing or outside its folder.
    """
    places = _weight_map(index)
    names = sorted(set(places.values()))
    for name in names:
        _check_place(index, name)
    pattern = re.compile(re.escape(index.name.partition(SUFFIX)[0]) + r"-\d+-of-\d+" + re.escape(SUFFIX))
    strays = sorted({path.name for path in index.parent.iterdir() if pattern.fullmatch(path.name)} - {*names})
    if strays:
        raise CodebookError(f"{index} does not name {strays[0]}, which lies beside it; move that away if it is stale")
    entries, metadata = dict[str, Entry](), dict[str, str]()
    claimed = dict[str, str]()
    for name in names:
        shard = read_safetensors(index.parent / name)
        for key in shard.entries:
            if key in claimed:
                raise CodebookError(f"{key} lies in two shards of {index}, {claimed[key]} and {name}; restore them")
            claimed[key] = name
        entries |= shard.entries
        metadata = shard.metadata | metadata
    for key, name in places.items():
        if claimed.get(key) != name:
            where = f"it is in {claimed[key]}" if key in claimed else "no shard has it"
            raise CodebookError(f"{index} says that {key} is in {name}, but {where}; restore index and shards")
    if unnamed := sorted(claimed.keys() - places.keys()):
        raise CodebookError(f"{index} does not name {unnamed[0]}, which {claimed[unnamed[0]]} holds; restore the index")
    return Weights((index, *(index.parent / name for name in names)), entries, metadata)


def _weight_map(index: Path) -> dict[str, str]:
    """File name of the shard by tensor, as the index says."""
    content = parse_config(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not isinstance(content.get("metadata", {}), dict):
        raise CodebookError(f"{index} is no index of shards: it needs a weight_map of tensors, and metadata")
    for key, name in places.items():
        if not isinstance(name, str):
            raise CodebookError(f"{index} says that {key} is in {name!r}, which is no name of a file")
    return places


def _check_place(index: Path, name: str) -> None:
    """Raise CodebookError unless a shard is a file in the folder of its index, and no link out of it."""
    shard = index.parent / name
    odd = re.search(r"[\\\0\ud800-\udfff]", name)  # no file system can encode surrogates
    plain = name == os.path.basename(name) and name not in ("", ".", "..") and not odd
    if not plain:
        raise CodebookError(f"{index} names {name!r}, outside its folder; a shard lies beside its index")
    if not lies_within(shard, index.parent):
        raise CodebookError(f"{shard} is a link to outside its folder; copy the folder's files themselves (cp -rL)")
    if not shard.is_file():
        raise CodebookError(f"{index} names {name}, which is missing; fetch all shards of the model")
