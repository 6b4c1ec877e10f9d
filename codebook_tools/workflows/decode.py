"""Media from tokens: one file for each item in a folder that is built beside its place, or one array of all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from codebook_tools.checkpoints.atomic import check_leftovers, partial_folder, put_in_place
from codebook_tools.data.arrays import Arrays
from codebook_tools.data.channels import MIX
from codebook_tools.data.dataset import Media
from codebook_tools.data.images import Images
from codebook_tools.data.items import Item, find_items
from codebook_tools.data.modality import AS_IT_IS, Modality
from codebook_tools.data.registry import BY_NAME
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.choose_modality import AUTO, choose_modality
from codebook_tools.evaluation.measure import find_input_range
from codebook_tools.evaluation.tokens import TokenDecoder
from codebook_tools.models.model import Model
from codebook_tools.models.registry import CUSTOM
from codebook_tools.remapping.token_readers import TokenFile, check_range, open_tokens
from codebook_tools.remapping.token_writers import items_path
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import SUBJECT, ResultHeader
from codebook_tools.workflows.session import open_network

ARRAY = "decoded.npy"
"""Of all items, where a modality has no file for one; items of unlike length are .npy files of their own."""


@dataclass(frozen=True, kw_only=True)
class Decoding(ResultHeader):
    """The result of `decode`.

    Attributes:
        items: Decoded.
        shape: Of the first, (channels, ...).
    """

    items: int
    shape: tuple[int, ...]

    json_keys = ("command", *SUBJECT, "items", "shape", "outputs", "seconds", "version")


def decode(request: Request, tokens: Path, output: Path, watch: Watch) -> Decoding:
    """Decode all items of a file of tokens into a new folder.

    Args:
        request: The model. Its data, if any, only show the shape of an item and the range of images.
        tokens: As `encode` writes them.
        output: The folder, which does not exist yet.
        watch: Progress and seconds by phase.

    Raises:
        CodebookError: The tokens are none of this model, or the folder cannot be written. Nothing is left then.
    """
    distributed.require_one("decode")
    _check_free(output)
    with watch.phase("load"):
        file = open_tokens(tokens)
        model = open_network(request)
        model.compiled = request.compiled
        decoder, warnings = _decoder(request, model, file)
    with _writing(output) as folder:
        shape = _decode_all(decoder, file, folder, request.batch_size, watch)
    return Decoding(
        command="decode",
        model=request.title,
        family=model.family,
        settings={"tokens": str(tokens), "input_range": list(model.input_range), "device": str(model.device)},
        seed=request.seed,
        warnings=(*request.notes, *model.caveats, *warnings),
        items=file.items,
        shape=shape,
        outputs={"folder": str(output)},
        seconds=watch.seconds,
    )


def _decoder(request: Request, model: Model, file: TokenFile) -> tuple[TokenDecoder, list[str]]:
    """The decoder, in the input range of the images that were encoded, and warnings."""
    model.modality, warnings = _kind(request, model, file)
    model.input_range, model.latent_axis = model.modality.input_ranges[0], request.latent_axis
    modality = model.modality.of(model.network, request.size, request.crop)
    items = find_items(request.data, modality) if request.data else []
    shape = None
    if items:
        modality = modality.probed(items, model.encode, request.skip_bad)
        _, first = Media(items, modality, request.skip_bad, mixing=request.channels).load(items[:1])
        shape = tuple(first.shape[1:])
    if len(modality.input_ranges) > 1:
        bounds, unsure = _input_range(request, model, file, items, modality)
        model.input_range, warnings = bounds, [*warnings, *unsure]
    if (lost := getattr(model.network, "not_in_tokens", None)) is not None:
        warnings.append(lost)
    source = file.about.get("model_sha256")
    if source is not None and source != model.checkpoint.sha256:
        warnings.append(
            f"{file.path} was made by another checkpoint than {request.title}, unless it was remapped since"
        )
    return TokenDecoder(model, modality, shape), warnings


def _kind(request: Request, model: Model, file: TokenFile) -> tuple[type[Modality], list[str]]:
    """What is decoded: as asked, as the data or the file of tokens are, or for a user's network as the grid says."""
    kind = BY_NAME.get(file.about.get("modality", ""))
    if request.modality == AUTO and not request.data and kind is not None:
        return kind, []
    of_images = request.size is not None or request.input_range is not None
    chosen, warnings = choose_modality(model, request.data, request.modality, of_images=of_images)
    if chosen is Images and not (of_images or request.data) and request.modality == AUTO and model.family == CUSTOM:
        _, codes = next(file.batches(len(model.route), 1))
        if codes[0].ndim != 3:
            return Arrays, warnings
    return chosen, warnings


def _input_range(
    request: Request, model: Model, file: TokenFile, items: Sequence[Item], modality: Modality
) -> tuple[tuple[float, float], list[str]]:
    """The range of the request, of the file, or the one in which data, or else the sample, are reconstructed best."""
    if request.input_range is not None:
        return request.input_range, []
    with suppress(ValueError, TypeError):
        low, high = map(float, json.loads(file.about.get("input_range", "")))
        if low < high:
            return (low, high), []
    remarks = []
    if not items:
        items = modality.sample()
        modality = modality.probed(items, model.encode, skip_bad=False)
        remarks = [] if request.knows_sample else [_GUESSED]
    errors = find_input_range(model, Media(items, modality, request.skip_bad, mixing=request.channels or MIX))
    return min(errors, key=lambda bounds: errors[bounds], default=AS_IT_IS), remarks


_GUESSED = (
    "the input range was chosen by two photographs that the model may never have seen: give --input-range as `encode` "
    "printed it, or --data"
)


def _decode_all(decoder: TokenDecoder, file: TokenFile, folder: Path, batch: int, watch: Watch) -> tuple[int, ...]:
    """Write every item. Returns the shape of the first."""
    model, modality = decoder.model, decoder.modality
    sizes = [model.books[book].codebook.size for book in model.route]
    in_files = (
        modality.ending is not None or len({codes[0].shape[1:] for _, codes in file.batches(len(sizes), batch)}) > 1
    )
    write = _Files(modality, folder, file.named) if in_files else _OneArray(folder, file.items)
    done, shape = 0, tuple[int, ...]()
    for names, codes in file.batches(len(model.route), batch):
        check_range(codes, sizes, names, file.path)
        with watch.phase("encode"):
            decoded = decoder([torch.from_numpy(level) for level in codes])
        with watch.phase("write"):
            write(names, decoded)
        done, shape = done + len(names), shape or tuple(decoded.shape[1:])
        watch.progress("decode", done, file.items)
    return shape


@dataclass(eq=False)
class _Files:
    """One file for each item, under its name: never outside of the folder."""

    modality: Modality
    folder: Path
    named: bool

    def __post_init__(self) -> None:
        self._taken = set[str]()

    def __call__(self, names: Sequence[str], decoded: Tensor) -> None:
        """decoded: (n, channels, ...)."""
        for name, values in zip(names, decoded.numpy(), strict=True):
            path = self.folder / self._place(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.modality.ending is None:
                np.save(path, values)
            else:
                self.modality.save(values, path)
            _flush(path)

    def _place(self, name: str) -> PurePosixPath:
        ending = self.modality.ending or ".npy"
        parts = [_UNSAFE.sub("_", part) for part in name.split("/") if part not in ("", ".", "..")]
        place = "/".join(parts)
        place = place if place.lower().endswith(ending) and len(place) > len(ending) else place + ending
        if place in self._taken or not parts:
            raise CodebookError(f"the item {name!r} has no file of its own: {place} is that of another; rename it")
        self._taken.add(place)
        return PurePosixPath(place)


_UNSAFE = re.compile(r'[\\:*?"<>|\x00-\x1f]')
"""What a name of a file may not hold on some system."""


class _OneArray:
    """All items in one array, and their names beside it."""

    def __init__(self, folder: Path, items: int) -> None:
        self._path, self._items, self._done = folder / ARRAY, items, 0

    def __call__(self, names: Sequence[str], decoded: Tensor) -> None:
        """decoded: (n, channels, ...)."""
        values, path = decoded.numpy(), self._path
        shape = (self._items, *values.shape[1:])
        if not self._done:
            array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        else:
            array = np.lib.format.open_memmap(path, "r+")
        if array.shape != shape:
            raise CodebookError(f"items decode to unlike shapes, {array.shape[1:]} and {shape[1:]}: give one at a time")
        array[self._done : self._done + len(values)] = values
        array.flush()
        with items_path(path).open("a", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in names)
        self._done += len(values)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _check_free(output: Path) -> None:
    """Raise CodebookError where the folder exists, for a folder of media is never replaced, or cannot be made."""
    if os.path.lexists(output):
        raise CodebookError(f"{output} exists, and a folder of media is never replaced; name another with --output")
    if not output.absolute().parent.is_dir():
        raise CodebookError(f"no such folder: {output.parent}; make it first, or write elsewhere with --output")
    check_leftovers(output)


@contextmanager
def _writing(output: Path) -> Iterator[Path]:
    """The folder under its temporary name; it gets its name when the context ends without an error."""
    try:
        with partial_folder(output, force=False) as folder:
            yield folder
            put_in_place(output)
    except OSError as error:
        raise CodebookError(f"cannot write {output}: {error.strerror or error}") from error
