"""A remapped prior held against the original: its tables are those that the maps make, and all else is as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from codebook_tools.checkpoints.config import parse_config, same_config, with_entries
from codebook_tools.checkpoints.layout import CONFIG, PREFIX
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.safetensors_file import read_safetensors
from codebook_tools.errors import CodebookError
from codebook_tools.models.verification import Difference, listed, same_bytes
from codebook_tools.remapping.index_map import read_index_maps
from codebook_tools.remapping.priors import RemappedPrior, about_remapping, remapped
from codebook_tools.remapping.vocabulary import Vocabulary
from codebook_tools.runtime.safe_io import parse_json
from codebook_tools.runtime.type_checks import fits


def prior_differences(written: Checkpoint, original: Checkpoint, maps: Sequence[Path]) -> Iterator[Difference]:
    """What is not as it must be. maps: as they were given to the remapping; it is done once more, in memory.

    Raises CodebookError where there are no maps, or they cannot be those.
    """
    if not maps:
        raise CodebookError(f"{written.path} is a remapped prior: name the maps that it followed with --map")
    settings = _settings(written)
    vocabularies = [
        Vocabulary(one, settings["offset"], settings["pad_to_multiple"])
        for one in read_index_maps(maps, listed(written, "codebooks"))
    ]
    keys = (settings["embedding_keys"], settings["head_keys"])
    meant = remapped(original, vocabularies, settings["on_removed"], *keys)
    version = written.metadata.get(PREFIX + "version", "")
    about = about_remapping(original, vocabularies, settings["on_removed"], *keys, version)
    yield from _metadata(written, original, {PREFIX + name: value for name, value in about.items()})
    yield from _tensors(written, original, meant)
    yield from _configs(written, original, meant)


def _settings(written: Checkpoint) -> dict[str, Any]:
    """How the metadata say that it was done. Raises CodebookError where nobody could have asked for that."""
    try:
        settings = parse_json(written.metadata.get(PREFIX + "settings", ""))
        settings = settings if isinstance(settings, dict) else {}
    except ValueError:
        settings = {}
    rows = max((shape[0] for shape in written.shapes.values() if shape), default=0)
    sound = all(name in settings and fits(settings[name], kind) for name, kind in _KINDS.items())
    if not sound or settings["offset"] < 0 or not 1 <= settings["pad_to_multiple"] <= rows:
        raise CodebookError(f"{written.path} does not say how it was remapped: its metadata are damaged")
    return settings


_KINDS = {
    "on_removed": Literal["error", "nearest"],
    "offset": int,
    "pad_to_multiple": int,
    "embedding_keys": list[str],
    "head_keys": list[str],
}


def _metadata(written: Checkpoint, original: Checkpoint, about: Mapping[str, str]) -> Iterator[Difference]:
    """In each file of weights they are the original's, and what is told of the remapping; a shard without a table is
    the original's copy."""
    if written.metadata.get(PREFIX + "source_sha256") != original.sha256:
        yield Difference("__metadata__", f"{original.path.name} is not the prior that was remapped")
    shards = {path.name: read_safetensors(path).metadata for path in original.files[1:]}
    for path in written.files[written.sharded :]:
        found, before = read_safetensors(path).metadata, shards.get(path.name, original.metadata)
        if written.sharded and found == before:
            continue
        meant = {"format": "pt", **before, **about}
        for name in sorted(name for name in {**meant, **found} if meant.get(name) != found.get(name)):
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
