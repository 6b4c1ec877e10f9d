"""Arrays of any shape: vectors, signals, motion, video; a row is an item, which goes to the network as it is."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.tensors import Stored
from codebook_tools.checkpoints.torch_file import load_object
from codebook_tools.data.array_files import map_entry, map_npy, stored_arrays
from codebook_tools.data.dataset import Media
from codebook_tools.data.items import Item, RaggedItem, Values
from codebook_tools.data.list_columns import list_items
from codebook_tools.data.modality import NUMBERS, Modality
from codebook_tools.data.rows import RowFile, Rows
from codebook_tools.data.sources import Source, file_and_entry
from codebook_tools.errors import CodebookError, few_of

_TRIED = 2  # items that a network is tried with: one could pass as an item without a batch


def read_rows(path: Path) -> Sequence[Item]:
    """The rows of a file of arrays, without reading them.

    Args:
        path: .npy, .npz, .pt, .pth or .safetensors; FILE:KEY where a file holds several arrays.

    Returns:
        Rows that are read by blocks: mapped into memory, but for .npz. A list of tensors of unlike length in a .pt file
        gives an item for each.

    Raises:
        CodebookError: The file cannot be read, holds no numbers, or several arrays of which none is named.
    """
    file, key = file_and_entry(path)
    suffix, name = file.suffix.lower(), file.name if key is None else f"{file.name}:{key}"
    if suffix == ".npy":
        return _rows(name, partial(map_npy, file), str(file))
    if suffix == ".npz":
        arrays = stored_arrays(path, Arrays.many)
        if not arrays:
            raise CodebookError(f"{file} holds no array")
        return Arrays().rows(name, arrays[0])
    if suffix == ".safetensors":
        entries = read_checkpoint(file).entries
        entry = entries[_key(file, key, list(entries))]
        assert isinstance(entry, Stored)
        return _rows(name, partial(map_entry, entry), str(file))
    return _torch_rows(file, key, name)


def _key(file: Path, key: str | None, keys: Sequence[str]) -> str:
    if key is None and len(keys) == 1:
        return keys[0]
    if key is None:
        raise CodebookError(f"{file} holds {len(keys)} arrays: {few_of(keys)}; say which: {file}:{(*keys, 'KEY')[0]}")
    if key not in keys:
        raise CodebookError(f"{file} holds no array {key}; its arrays: {few_of(keys) or 'none'}")
    return key


def _torch_rows(file: Path, key: str | None, name: str) -> Sequence[Item]:
    try:
        content = load_object(file)
    except OSError as error:
        raise CodebookError(f"cannot read {file}: {error.strerror or error}") from error
    if isinstance(content, dict):
        arrays = {str(name): value for name, value in content.items() if isinstance(value, Tensor | list)}
        content = arrays[_key(file, key, list(arrays))]
    elif key is not None:
        raise CodebookError(f"{file} holds no arrays by name; leave out :{key}")
    if isinstance(content, Tensor):
        return _rows(name, partial(_same, content.detach()), str(file))
    if not (isinstance(content, list) and content and all(isinstance(one, Tensor) and one.ndim for one in content)):
        raise CodebookError(f"{file} holds {type(content).__name__}; expected a tensor (n, ...), or a list of tensors")
    for one in content:
        _check_numbers(name, one.dtype)
    return [_in_memory(f"{name}#{i}", one.detach().numpy(), file) for i, one in enumerate(content)]


def _in_memory(name: str, values: Values, file: Path | None = None) -> RaggedItem:
    source = Source(name, values.nbytes, partial(_opened, values), None if file is None else str(file))
    return RaggedItem(name, source, partial(_plain, values), None, values.shape)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _rows(name: str, mapped: Callable[[], Tensor], path: str | None) -> Rows:
    stored = mapped()
    if stored.ndim < 2 or not stored.numel():
        raise CodebookError(f"{name} has shape {tuple(stored.shape)}: expected (n, ...), a row for each item")
    _check_numbers(name, stored.dtype)
    return Rows((RowFile.whole(name, mapped, path),))


def _check_numbers(name: str, dtype: torch.dtype) -> None:
    if dtype.is_complex or dtype == torch.bool:
        raise CodebookError(f"{name} has dtype {str(dtype).removeprefix('torch.')}: expected floats or integers")


@dataclass(frozen=True, kw_only=True)
class Arrays(Modality):
    """Rows of arrays, floats of any range or integers. Figures are in the data's own units.

    Attributes:
        whole_numbers: Whether the network takes integers as they are stored; else they are float32 for it.
    """

    name = "arrays"
    one = "item"
    many = "items"
    suffixes = ()
    archives = dict.fromkeys((".npy", ".npz", ".safetensors", ".pt", ".pth"), read_rows) | dict.fromkeys(
        (".parquet", ".arrow", ".feather"), list_items
    )
    columns = frozenset({NUMBERS})
    remedy = "give items of one shape; rows of a list column may differ in length"
    figures = frozenset({"nmse"})

    whole_numbers: bool = False

    @classmethod
    def accepts(cls, network: object) -> bool:
        """Whether the network's attribute `modality` says so."""
        return getattr(network, "modality", None) == "arrays"

    @classmethod
    def of(cls, network: Any, size: object, crop: str = "center") -> Self:
        """The modality. Raises CodebookError for a `size`: arrays are not resized."""
        if size is not None:
            raise CodebookError("--size is of images and sound; arrays go to the network as they are")
        return cls()

    def probed(self, items: Sequence[Item], encode: Callable[[Tensor], Tensor], skip_bad: bool) -> Self:
        """Whether the network takes integers as they are."""
        whole = replace(self, whole_numbers=True)
        _, media = first_items(items, whole, skip_bad)
        if media.is_floating_point():
            return self
        try:
            encode(media)
        except CodebookError:
            return self
        return whole

    def items(self, source: Source) -> list[Item]:
        """Raises CodebookError: arrays are read from files of their own, not from a tar."""
        raise CodebookError(f"{source.name}: arrays are not read from a tar; give .npy, .parquet or .safetensors files")

    def rows(self, name: str, array: Values) -> Sequence[Item]:
        """The rows of an array in memory, (n, ...)."""
        if array.dtype.kind not in "fiu":
            raise CodebookError(f"{name} has dtype {array.dtype}: expected floats or integers")
        return _rows(name, partial(_same, torch.from_numpy(array)), None)

    def joined(self, groups: Sequence[tuple[str, str, Sequence[Item]]]) -> Sequence[Item]:
        """As Modality.joined; rows of files stay rows. Raises CodebookError where files hold rows of unlike shapes."""
        if not all(isinstance(items, Rows) for _, _, items in groups):
            return super().joined([(label, path, list(items)) for label, path, items in groups])
        files = [
            (label, path, file) for label, path, items in groups if isinstance(items, Rows) for file in items.files
        ]
        names = [file.name for _, _, file in files]
        fronts = [label for label, _, _ in files]
        unique = dict[str, RowFile]()
        for label, path, file in files:
            if names.count(file.name) > 1:
                front = label if fronts.count(label) == 1 else path
                file = replace(file, name=front, kin=file.name)
            if file.name in unique:
                raise CodebookError(f"{file.name} stands twice in the data; give each path once")
            unique[file.name] = file
        ordered = [unique[name] for name in sorted(unique)]
        first, shape = ordered[0].name, ordered[0].mapped().shape[1:]
        for file in ordered[1:]:
            if (other := file.mapped().shape[1:]) != shape:
                raise CodebookError(
                    f"items of unlike shapes: {file.name} has rows of {self.written(other)}, {first} of "
                    f"{self.written(shape)}; {self.remedy}"
                )
        return Rows(tuple(ordered))

    def stacked(self, values: Sequence[Tensor]) -> Tensor:
        """As Modality.stacked; int64 where the network takes whole numbers."""
        return self.batched(torch.stack([*values]))

    def batched(self, stored: Tensor) -> Tensor:
        """Stored rows in the dtype that the network takes."""
        return stored.long() if self.whole_numbers and not stored.is_floating_point() else stored.float()


def _plain(values: Values) -> Values:
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def _opened(values: Values) -> io.BytesIO:
    return io.BytesIO(values.tobytes())


def first_items(items: Sequence[Item], modality: Modality, skip_bad: bool) -> tuple[Sequence[Item], Tensor]:
    """The first readable items of one shape, as a batch.

    Raises:
        CodebookError: None can be read.
    """
    batch = next(Media(items, modality, skip_bad).batches(_TRIED), None)
    if batch is None:
        raise CodebookError(f"none of {len(items)} {modality.many} can be read")
    return batch
