"""MODEL as an id of the Hugging Face hub: which of its files are needed, and the path of their copies in its cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from codebook_tools.checkpoints.config import parse_config
from codebook_tools.checkpoints.layout import (
    CARD,
    CONFIG,
    INDEX,
    INDEX_MAP,
    SMALL,
    chosen_weights,
    goes_along,
    index_map_path,
    own_config_path,
)
from codebook_tools.errors import CodebookError, few_of
from codebook_tools.runtime.hub import not_cached
from codebook_tools.runtime.hub_download import fetched, listed
from codebook_tools.runtime.hub_ids import ModelId, data_set_id, is_uri, model_id
from codebook_tools.runtime.progress import Watch


def located(model: str | Path, watch: Watch | None = None) -> Path:
    """The path of a model: as it is, or of its copy, for which the files that are needed are fetched.

    Args:
        model: A path, which goes first, or "org/name[@revision]" or "hf://org/name[@revision][/path]".
        watch: Is told the progress of the download.

    Raises:
        CodebookError: There is neither such a path nor such a model, or it cannot be fetched.
    """
    path = Path(model)
    asked = None if os.path.lexists(path) else model_id(model)
    if asked is None:
        if data_set_id(model):
            raise CodebookError(f"{model} is a data set; give it with --data")
        if is_uri(model):
            raise CodebookError(f"{model}: expected hf://org/name[@revision][/path]")
        return path
    try:
        return _fetched(asked, watch or Watch())
    except CodebookError as error:
        if is_uri(model):
            raise
        raise CodebookError(f"no such file: {path}; and as a model of the hub, {error}") from error


def _fetched(asked: ModelId, watch: Watch) -> Path:
    listing = listed(asked)
    if asked.inside in listing.files:
        folder, wanted = asked.inside.rpartition("/")[0], asked.inside.rpartition("/")[2]
    else:
        folder, wanted = asked.inside, ""
    front = f"{folder}/" if folder else ""
    names = [name.removeprefix(front) for name in listing.files if name.startswith(front)]
    flat = sorted(name for name in names if "/" not in name)
    if not names and listing.folder:
        raise not_cached(str(asked), "lacks it")
    if not names:
        raise CodebookError(f"{asked.repository} has no {asked.inside}; it has {few_of(sorted(listing.files))}")
    try:
        weights = wanted or _weights(asked, flat, names)
    except CodebookError as error:
        if listing.folder:
            raise not_cached(str(asked), "lacks its weights") from error
        raise
    whole = not wanted and CONFIG in flat
    wanted_files = [weights]
    if weights.endswith(INDEX):
        index = fetched(listing, [front + weights], watch) / (front + weights)
        places = parse_config(index).get("weight_map")
        shards = {name for name in places.values() if isinstance(name, str)} if isinstance(places, dict) else set()
        wanted_files += sorted(shards & set(flat))
    named = {CONFIG, own_config_path(Path(weights)).name, index_map_path(Path(weights)).name}
    small = [name for name in flat if listing.files[front + name] < SMALL]
    beside = [name for name in small if goes_along(name) or name in named or (whole and name.endswith(INDEX_MAP))]
    needed = [front + name for name in dict.fromkeys([*wanted_files, *beside])]
    needed += [CARD] if CARD in listing.files and CARD not in needed else []  # it has the licence of all parts
    top = fetched(listing, needed, watch)
    return top / folder if whole else top / (front + weights)


def _weights(asked: ModelId, flat: Sequence[str], names: Sequence[str]) -> str:
    """The name of the weights in the folder that was asked for; an error names what may have been meant."""
    try:
        return chosen_weights(flat, str(asked))
    except CodebookError as error:
        if any(name.endswith(INDEX) for name in flat):
            raise
        inside = f"{asked.inside}/" if asked.inside else ""
        endings = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
        files = [name for name in flat if name.endswith(endings)]
        folders = sorted({name.rpartition("/")[0] for name in names if "/" in name and name.endswith(endings)})
        if len(files) == 1:
            return files[0]
        meant = [str(replace(asked, inside=inside + name)) for name in files or folders]
        if not meant:
            raise CodebookError(f"{asked} has no weights: no file of it ends in {', '.join(endings)}") from error
        raise CodebookError(f"{asked} does not say which weights are meant; give {' or '.join(meant[:3])}") from error
