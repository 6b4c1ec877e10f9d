"""Which kind of data a model takes: by what was asked, by the network, and by trying it on the first rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codebook_tools.data.arrays import Arrays, first_items
from codebook_tools.data.hub import is_of_numbers
from codebook_tools.data.images import Images, probe
from codebook_tools.data.items import InMemory, Item, Values, find_items
from codebook_tools.data.modality import Modality
from codebook_tools.data.parquet_images import has_pictures
from codebook_tools.data.registry import BY_NAME, modality_of
from codebook_tools.data.sources import file_and_entry
from codebook_tools.errors import CodebookError
from codebook_tools.models.model import Model
from codebook_tools.models.network import axes_of_length, explained, walks
from codebook_tools.models.registry import CUSTOM
from codebook_tools.runtime.hub_ids import data_set_id

AUTO = "auto"
"""The choice of --modality that leaves it to `choose_modality`."""

_ROWS = 64  # whose values tell whether they may be pixels


def choose_modality(
    model: Model, paths: Sequence[str | InMemory], asked: str, *, of_images: bool
) -> tuple[type[Modality], list[str]]:
    """Choose the kind of data.

    Only for arrays and a user's network there is a choice. Its rows are images if the network encodes them as images
    alone, arrays if it takes them as they are alone; if both, images, with a warning.

    Args:
        model: As loaded.
        paths: The data.
        asked: A name of BY_NAME, or AUTO.
        of_images: Whether options were typed that only images have, such as --input-range.

    Returns:
        The modality, and warnings.

    Raises:
        CodebookError: There is no such kind, the network does not take it, or the first data cannot be read.
    """
    own = modality_of(model.network)
    if asked != AUTO:
        kind = BY_NAME.get(asked)
        if kind is None:
            raise CodebookError(f"--modality {asked}: expected {', '.join((AUTO, *BY_NAME))}")
        if kind is not Arrays and not kind.accepts(model.network):
            raise CodebookError(f"--modality {asked}: the network says nothing of a sampling rate; give it one")
        return kind, []
    if own is not Images or model.family != CUSTOM or of_images or not paths or not all(map(_holds_arrays, paths)):
        return own, []
    items = find_items([_alone(paths[0])], Arrays(), first=_ROWS)
    stored = _readable(items[:_ROWS])
    if not stored:
        return Arrays, []  # whose reading names the first row
    picture = _as_picture(stored[0].shape)
    if picture is None or stored[0].dtype.kind != "f":
        return (Images if picture and stored[0].dtype == np.uint8 else Arrays), []
    if any(bool(((row < 0) | (row > 1)).any()) for row in stored):
        return Arrays, []
    as_images = _encodes_pictures(model, picture[1:])
    few = first_items(items, Arrays(), skip_bad=True)[1]
    if as_images and passes(model, few):
        return Images, [
            "the data are read as images in [0, 1], mapped to the network's input range; where they are no images, "
            "--modality arrays hands them over as they are"
        ]
    return (Images if as_images or not encodes(model, few) else Arrays), []


def _readable(items: Sequence[Item]) -> list[Values]:
    """The values of the items that can be read and are not empty."""
    rows = list[Values]()
    for item in items:
        with suppress(ValueError, OSError):  # passes over all items report them
            rows.append(item.decode())
    return [row for row in rows if row.size]


def _alone(path: str | InMemory) -> str | InMemory:
    return path if isinstance(path, str) else InMemory(path.values[:_ROWS], path.name)


def _holds_arrays(path: str | InMemory) -> bool:
    """Whether a path is one of arrays, or a folder without pictures and with arrays."""
    if isinstance(path, InMemory):
        return True
    if asked := data_set_id(path):
        return is_of_numbers(asked)
    file, _ = file_and_entry(Path(path))
    if file.suffix.lower() == ".parquet":
        return not has_pictures(file)
    if file.is_dir():
        suffixes = {inside.suffix.lower() for inside in file.rglob("*") if inside.is_file()}
        return bool(suffixes & set(Arrays.archives)) and not suffixes & {*Images.suffixes, ".tar", ".parquet"}
    return file.suffix.lower() in Arrays.archives


def _as_picture(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Channels, height and width of a row as a picture; None where it cannot be one."""
    if len(shape) == 2:
        return 1, *shape
    if len(shape) != 3 or not {1, 3} & {shape[0], shape[2]}:
        return None
    first = shape[0] in (1, 3) and shape[2] not in (1, 3)
    return (shape[0], shape[1], shape[2]) if first else (shape[2], shape[0], shape[1])


def _encodes_pictures(model: Model, sides: tuple[int, int]) -> bool:
    try:
        probe(model.encode, *sides)
    except CodebookError:
        return False
    return True


def encodes(model: Model, media: Tensor) -> bool:
    """Whether a batch as it is gives latents of as many items."""
    try:
        with torch.no_grad():
            return len(model.encode(media, keep=False)) == len(media)
    except CodebookError:
        return False


def passes(model: Model, media: Tensor) -> bool:
    """Whether a batch as it is passes through encoder and decoder and comes back in its shape."""
    try:
        with torch.no_grad():
            return model.run(media, lambda stage, latents: latents).shape == media.shape
    except CodebookError:
        return False


def choose_latent_axis(model: Model, media: Tensor) -> int | None:
    """The axis of a user's network's latents that holds the dimensions of a code, found on a batch of arrays.

    Returns:
        The axis; None for a family's network, which has them in the second.

    Raises:
        CodebookError: Several axes fit at every quantizer stage, or the network fails.
    """
    if model.family != CUSTOM or model.latent_axis is not None:
        return model.latent_axis
    met = list[tuple[int, Tensor]]()

    def record(stage: int, latents: Tensor) -> Tensor:
        met.append((model.route[stage], latents))
        return latents

    with torch.no_grad():
        encoded = model.encode_media(media)
        if walks(model.network):
            with explained("walk", encoded):
                model.network.walk(encoded, record)
        elif isinstance(encoded, Tensor):
            record(0, encoded)
    shapes = [(tuple(latents.shape), model.books[stage].vectors.shape[1]) for stage, latents in met]
    fitting = [set(axes_of_length(latents, model.books[stage].vectors.shape[1])) for stage, latents in met]
    common = set.intersection(*fitting) if fitting else set()
    if len(common) < 2:
        return min(common, default=None)
    shape, dim = shapes[0]
    axes = " and ".join(map(str, sorted(common)))
    raise CodebookError(f"latents {shape}: axes {axes} have the length of a code, {dim}; say which with --latent-axis")
