"""Compares a remapped prior with its original: the tables are what the maps make of them, and all else is unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from codebook_tools.checkpoints.config import parse_config, same_config, with_entries
from codebook_tools.checkpoints.layout import CONFIG, PREFIX
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.safetensors_file import read_safetensors
from codebook_tools.errors import CodebookError
from codebook_tools.models.verification import Difference, listed, same_bytes
from codebook_tools.remapping.index_map import read_index_maps
from codebook_tools.remapping.priors import PriorSettings, RemappedPrior, about_remapping, remapped
from codebook_tools.runtime.safe_io import parse_json
from codebook_tools.runtime.type_checks import fits, kinds_of


def prior_differences(written: Checkpoint, original: Checkpoint, maps: Sequence[Path]) -> Iterator[Difference]:
    """Remap the original once more, in memory, and compare.

    Args:
        written: The remapped prior.
        original: The prior that it was made from.
        maps: Files of index maps, as they were named to the remapping.

    Yields:
        What differs and must not.

    Raises:
        CodebookError: No maps are named, or the remapping cannot have followed them.
    """
    if not maps:
        raise CodebookError(f"{written.path} is a remapped prior: name the maps that it followed with --map")
    settings = _settings(written)
    index_maps = read_index_maps(maps, listed(written, "codebooks"))
    meant = remapped(original, index_maps, settings)
    about = about_remapping(original, index_maps, settings, written.metadata.get(PREFIX + "version", ""))
    yield from _metadata(written, original, {PREFIX + name: value for name, value in about.items()})
    yield from _tensors(written, original, meant)
    yield from _configs(written, original, meant)


def _settings(written: Checkpoint) -> PriorSettings:
    """The settings in the metadata. Raises CodebookError where no command can have had them."""
    stored: Any = None
    with suppress(ValueError):
        stored = parse_json(written.metadata.get(PREFIX + "settings", ""))
    kinds = kinds_of(PriorSettings)
    if isinstance(stored, dict) and all(name in stored and fits(stored[name], kind) for name, kind in kinds.items()):
        settings = PriorSettings(**{name: stored[name] for name in kinds})
        rows = max((shape[0] for shape in written.shapes.values() if shape), default=0)
        padded = settings.offset >= 0 and 1 <= settings.pad_to_multiple <= rows
        if padded and settings.on_removed in ("error", "nearest"):
            return settings
    raise CodebookError(f"{written.path} does not say how it was remapped: its metadata are damaged")


def _metadata(written: Checkpoint, original: Checkpoint, about: Mapping[str, str]) -> Iterator[Difference]:
    """In each file of weights, the original's metadata and those of the remapping; a shard without a table is a copy
    of the original's."""
    if written.metadata.get(PREFIX + "source_sha256") != original.sha256:
        yield Difference("__metadata__", f"{original.path.name} is not the prior that was remapped")
    shards = {path.name: read_safetensors(path).metadata for path in original.files[1:]}
    for path in written.files[written.sharded :]:
        after, before = read_safetensors(path).metadata, shards.get(path.name, original.metadata)
        if written.sharded and after == before:
            continue
        meant = {"format": "pt", **before, **about}
        for name in sorted(name for name in {**meant, **after} if meant.get(name) != after.get(name)):
            yield Difference("__metadata__", f"entry {name} of {path.name} is not what the remapping writes")


def _tensors(written: Checkpoint, original: Checkpoint, meant: RemappedPrior) -> Iterator[Difference]:
    for key in sorted(original.entries.keys() ^ written.entries.keys()):
        yield Difference(key, "missing" if key in original.entries else "not in the original")
    for key in sorted(original.entries.keys() & written.entries.keys()):
        before, after = original.entries[key], written.entries[key]
        shape = tuple(meant.changed[key].shape) if key in meant.changed else before.shape
        if (after.dtype, after.shape) != (before.dtype, shape):
            yield Difference(key, f"{after.dtype} {after.shape} instead of {before.dtype} {shape}")
        elif key in meant.changed and not torch.equal(written.tensor(key), meant.changed[key]):
            yield Difference(key, "its rows are not those that the map makes of the original's")
        elif key not in meant.changed and not same_bytes(written, original, key):
            yield Difference(key, "changed, though no map is about it")


def _configs(written: Checkpoint, original: Checkpoint, meant: RemappedPrior) -> Iterator[Difference]:
    if written.folder is None:
        return
    texts = dict(meant.others) if meant.config is None else {CONFIG: meant.config, **meant.others}
    if written.sharded and original.sharded:
        total = sum(entry.nbytes for entry in written.entries.values())
        texts[written.path.name] = with_entries(original.path.read_bytes(), {"metadata.total_size": total})
    for name, text in texts.items():
        path = written.folder / name
        if not path.is_file() or not same_config(parse_config(path), json.loads(text)):
            yield Difference(name, "not what follows from the original's and the map")
