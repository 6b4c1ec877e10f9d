"""Index maps drawn by hypothesis."""

from __future__ import annotations

import torch
from conftest import KEY
from hypothesis import strategies as st

from codebook_tools.codebook import REMOVED
from codebook_tools.remapping.index_map import IndexMap


@st.composite
def index_maps(draw: st.DrawFn, old: int | None = None) -> IndexMap:
    """A map from `old` codes, or from 1 to 8, to at most 6."""
    size = draw(st.integers(1, 6))
    nearest = draw(st.lists(st.integers(0, size - 1), min_size=old or 1, max_size=old or 8))
    kept = draw(st.lists(st.booleans(), min_size=len(nearest), max_size=len(nearest)))
    index_map = [n if keep else REMOVED for n, keep in zip(nearest, kept, strict=True)]
    return IndexMap(KEY, torch.tensor(index_map), torch.tensor(nearest), size)
