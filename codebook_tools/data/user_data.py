"""Data of a Python caller: paths, arrays, tensors, or batches of a loader, which are kept in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from codebook_tools.data.items import InMemory
from codebook_tools.errors import CodebookError

PathLike = str | Path
Values = PathLike | Tensor | np.ndarray[Any, Any] | Iterable[Any]
"""Data: a path or several, an array or tensor (n, ...), or an iterable of batches, such as a DataLoader."""


@dataclass(frozen=True, eq=False)
class Data:
    """What a model is calibrated, trained and measured on.

    Attributes:
        train: Paths (folders, .tar, .npy, .npz, .parquet, single files, hf://datasets/...); or an array or tensor,
            images (n, channels, height, width), waveforms (n, channels, samples) or arrays (n, ...) for a network of
            yours; or a DataLoader of tensors, tuples or dicts, which is read once and kept in memory.
        test: As `train`; None for a tenth of `train`, drawn by name.
        key: Index or key of the images in a batch that is a tuple or a dict; None for the first entry.
        values: Lowest and highest value of floating-point images in memory, if not 0 and 1: (-1, 1) after the usual
            `Normalize(0.5, 0.5)`.
        limit: Items of `train` and of `test` at most, drawn by `seed` of the call.
        size: Side in pixels, or height and width, that images are cut and resized to; samples of a clip.
        crop: "center" to cut images to that shape, "none" to resize all of them.
        channels: "mix" or "first", for items with other channels than the network.
        group: A file with one key a row of `train`, .npy or text: rows of one key stay in one split.
        skip_bad: Leave out unreadable items.
        batch_size: Items per batch when data are encoded.
        workers: Processes that decode files ahead; None for a number that suits the machine.
        metrics: Figures that are measured beside the usual ones, as --metrics takes them: "rfid=FILE,lpips".

    Raises:
        CodebookError: `values` are not ascending, or `train` or `test` is no data.
    """

    train: Values | None = None
    test: Values | None = None
    key: str | int | None = None
    values: tuple[float, float] = (0.0, 1.0)
    limit: int | None = None
    size: int | tuple[int, int] | None = None
    crop: str = "center"
    channels: str | None = None
    group: PathLike | None = None
    skip_bad: bool = False
    batch_size: int = 64
    workers: int | None = None
    metrics: str = ""
    _sources: dict[str, tuple[str | InMemory, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.values[0] < self.values[1]:
            raise CodebookError(f"values={self.values}: the first number must be the smaller one")
        for name in ("train", "test"):
            self._sources[name] = self._read(name, getattr(self, name))

    def _read(self, name: str, source: Values | None) -> tuple[str | InMemory, ...]:
        if source is None:
            return ()
        if isinstance(source, str | Path):
            return (str(source),)
        if isinstance(source, list | tuple) and source and all(isinstance(one, str | Path) for one in source):
            return tuple(map(str, source))
        if isinstance(source, Tensor | np.ndarray):
            return (InMemory(self._array(name, source), name),)
        if not isinstance(source, Iterable):
            raise CodebookError(f"{name}= is a {type(source).__name__}; expected paths, an array, or a DataLoader")
        batches = [self._array(name, self._picked(name, batch)) for batch in source]
        if not batches:
            raise CodebookError(f"{name}= gave no batch")
        shapes = {batch.shape[1:] for batch in batches}
        if len(shapes) > 1:
            raise CodebookError(f"{name}= gave batches of items of unlike shapes: {sorted(shapes)[:3]}")
        return (InMemory(np.concatenate(batches), name),)

    def _picked(self, name: str, batch: Any) -> Any:
        """The entry of a batch that holds the items."""
        if isinstance(batch, Tensor | np.ndarray):
            return batch
        try:
            if isinstance(batch, dict):
                return batch[next(iter(batch)) if self.key is None else self.key]
            return batch[self.key or 0]
        except (KeyError, IndexError, TypeError, StopIteration) as error:
            has = f"keys {', '.join(map(repr, batch))}" if isinstance(batch, dict) else type(batch).__name__
            raise CodebookError(
                f"{name}= gave a batch with no entry {self.key!r} ({has}); say which with key="
            ) from error

    def _array(self, name: str, batch: Any) -> np.ndarray[Any, Any]:
        """The values as an array, mapped from `values` to [0, 1]."""
        if isinstance(batch, Tensor):
            batch = batch.detach().cpu()
            batch = batch.float().numpy() if batch.is_floating_point() else batch.numpy()
        if not isinstance(batch, np.ndarray):
            raise CodebookError(f"{name}= holds a {type(batch).__name__}; expected tensors or arrays; see key=")
        if batch.dtype.kind != "f" or self.values == (0.0, 1.0):
            return batch
        low, high = self.values
        return ((batch - low) / (high - low)).astype(np.float32)

    @property
    def options(self) -> dict[str, Any]:
        """How the data are read, by the names of the command line's options."""
        names = ("limit", "size", "crop", "channels", "skip_bad", "batch_size", "workers")
        group = None if self.group is None else Path(self.group)
        return {"group": group, **{name: getattr(self, name) for name in names}}

    @property
    def paths(self) -> tuple[tuple[str | InMemory, ...], tuple[str | InMemory, ...]]:
        """Paths or arrays of `train` and of `test`, for `find_items`."""
        return self._sources["train"], self._sources["test"]
