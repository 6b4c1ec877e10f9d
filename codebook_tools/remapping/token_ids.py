"""Translates ids of an old vocabulary to the new one: codes by the index map; special ids move with the codes' end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codebook_tools.codebook import REMOVED
from codebook_tools.errors import CodebookError
from codebook_tools.remapping.index_map import IndexMap
from codebook_tools.remapping.request import OnRemoved

Ids = NDArray[Any]
"""Integers of any width."""


@dataclass(frozen=True)
class Counts:
    """How many ids were translated.

    Attributes:
        tokens: All ids.
        changed: Those whose number is another one now.
        removed: Those whose code lost its identity.
        nearest: Of the removed, those that became the nearest code.
    """

    tokens: int = 0
    changed: int = 0
    removed: int = 0
    nearest: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))


@dataclass(eq=False)
class Translation:
    """Translates ids and counts them.

    Attributes:
        maps: One for each quantizer stage.
        on_removed: What an id becomes whose code was removed: "error", "nearest", or the id of a mask token.
        offset: The id of code 0; lower ids are special and stay.
        special: How many special ids follow the codes.
        counts: Of all calls so far.
    """

    maps: tuple[IndexMap, ...]
    on_removed: OnRemoved = "error"
    offset: int = 0
    special: int = 0
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._sizes = np.array([one.old_size for one in self.maps])
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._shifts = np.array([one.size - one.old_size if self.special else 0 for one in self.maps])
        self._removed = np.concatenate([(one.index_map == REMOVED).numpy() for one in self.maps])
        new = np.concatenate([one.nearest.numpy() for one in self.maps]) + self.offset
        self._new = np.where(self._removed, self.on_removed, new) if isinstance(self.on_removed, int) else new

    def __call__(self, ids: Ids, stages: NDArray[np.int64] | int, where: Callable[[int], str]) -> Ids:
        """Translate ids.

        Args:
            ids: (n,) integers of any width.
            stages: The quantizer stage of each, (n,), or one of all.
            where: Names the nth id in an error.

        Returns:
            (n,) in the dtype of `ids`.

        Raises:
            CodebookError: An id is out of range, is a removed code where that is an error, or its new id does not fit
                the dtype. The message names the first such id.
        """
        wide = ids.astype(np.int64)  # uint64 beyond int64 wraps to a negative number, which is no id
        codes, sizes = wide - self.offset, np.broadcast_to(self._sizes[stages], ids.shape)
        self._refuse(
            (wide < 0) | (codes >= sizes + self.special), ids, where,
            lambda i: f"is not within 0 and {self.offset + sizes[i] + self.special - 1}, the ids of the map's "
            f"{sizes[i]} codes and of what --offset and --special name; is the map of another checkpoint?",
        )  # fmt: skip
        coded = (codes >= 0) & (codes < sizes)
        rows = self._starts[stages] + np.where(coded, codes, 0)
        removed = coded & self._removed[rows]
        if self.on_removed == "error":
            self._refuse(
                removed, ids, where,
                lambda i: "is a code that was removed; --on-removed nearest puts the nearest code in its place, "
                "mask=ID a mask token, and `codebook encode` makes tokens anew",
            )  # fmt: skip
        new = np.where(coded, self._new[rows], np.where(codes < 0, wide, wide + self._shifts[stages]))
        limits = np.iinfo(ids.dtype)
        self._refuse(
            (new < limits.min) | (new > limits.max), ids, where,
            lambda i: f"becomes {new[i]}, for which {ids.dtype} has no room; store the tokens in a wider dtype first",
        )  # fmt: skip
        lost = int(removed.sum())
        by_nearest = lost if self.on_removed == "nearest" else 0
        self.counts += Counts(len(ids), int((new != wide).sum()), lost, by_nearest)
        return new.astype(ids.dtype)

    def _refuse(self, bad: NDArray[np.bool_], ids: Ids, where: Callable[[int], str], why: Callable[[int], str]) -> None:
        if bad.any():
            first = int(bad.argmax())
            raise CodebookError(f"{where(first)}: token {ids[first]} {why(first)}")
