"""Groups of codes that are kept from one search to the next, as most codes of a codebook in training do not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codebook_tools.clustering.groups import Centers, Groups

_SEARCHES = 50  # by the same centers: latents and codes move on, and others may leave fewer codes to compare with


@dataclass(frozen=True, eq=False)
class _Grouping:
    """How the codes of the last search were grouped.

    Attributes:
        centers: The centers.
        weights: (size, dim), of all codes.
        group: (size,) int16, the nearest center of each code.
        pays: Whether a search by groups is faster.
        searches: How many the centers have been used for.
    """

    centers: Centers
    weights: Tensor
    group: Tensor
    pays: bool
    searches: int = 1

    def of_next(self, weights: Tensor) -> _Grouping:
        """The grouping of codes with weights (size, dim), of which only those are compared that changed."""
        changed = torch.from_numpy((weights.numpy() != self.weights.numpy()).any(1))  # torch takes five times as long
        group = self.group.masked_scatter(changed, self.centers.groups_of(weights[changed]))
        return replace(self, weights=weights, group=group, searches=self.searches + 1)


class KeptGroups:
    """The groups of a codebook, brought up to date at each search instead of made anew.

    A code is always in the group of its nearest center, so no assignment depends on earlier searches: only how long it
    takes to find does.
    """

    def __init__(self) -> None:
        # One object, replaced at once: threads may search at the same time.
        self._last: _Grouping | None = None

    def of(self, weights: Tensor, norms: Tensor, pays: Callable[[Groups], bool]) -> Groups | None:
        """The groups of codes with weights (size, dim) and squared lengths (size,).

        Args:
            weights: Codes times -2, which nothing changes later.
            norms: Squared lengths.
            pays: Whether to search by these groups; asked each time that centers are chosen.

        Returns:
            The groups; None where a search by groups does not pay.
        """
        last = self._last
        if last is None or last.searches == _SEARCHES or last.weights.shape != weights.shape:
            centers = Centers.among(weights)
            group = centers.groups_of(weights)
            groups = Groups.of(centers, group, weights, norms)
            self._last = _Grouping(centers, weights, group, pays(groups))
            return groups if self._last.pays else None
        if not last.pays:
            self._last = replace(last, searches=last.searches + 1)
            return None
        self._last = last.of_next(weights)
        return Groups.of(last.centers, self._last.group, weights, norms)
