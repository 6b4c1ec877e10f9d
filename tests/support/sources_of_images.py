"""Images as the tests name them: items and their settings in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codebook_tools.data import images
from codebook_tools.data.dataset import Media
from codebook_tools.data.items import Item, find_items
from codebook_tools.runtime.progress import Watch


class Images(Media):
    """Media of images: (n, channels, height, width) float32 in [0, 1]."""

    def __init__(
        self, items: list[Item], channels: int, stride: int = 1, size: int | None = None, *, skip_bad: bool = False,
        watch: Watch | None = None, **more: Any,
    ) -> None:  # fmt: skip
        modality = images.Images(size=size, channels=channels, stride=stride)
        super().__init__(items, modality, skip_bad, watch or Watch(), **more)


def find_images(paths: Sequence[str | Path]) -> list[Item]:
    """Every image under the paths, as `find_items` finds them."""
    return find_items(paths, images.Images())
