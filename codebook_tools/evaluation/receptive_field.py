"""The receptive field of a latent: the patch around its position that it mostly depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from codebook_tools.data.array_pictures import span
from codebook_tools.data.dataset import Media
from codebook_tools.data.items import Item
from codebook_tools.errors import CodebookError
from codebook_tools.models.model import Model

SHARE = 0.9
"""Share of the gradient's energy that a patch holds. The effective receptive field is smaller than the theoretical one,
which is all of the image in many networks (Luo et al. 2016, "Understanding the Effective Receptive Field", arXiv
1701.04128)."""

_IMAGES = 8
_LARGEST = 64  # pixels of a patch in a report


@dataclass(frozen=True)
class Place:
    """Position of a latent: its item, and its row and column in the grid of latents.

    Attributes:
        item: The image, clip or array.
        row: Of the grid; 0 where it has not two axes.
        column: Of the grid; the position in all of it where it has not two axes.
        positions: Latents of the item.
    """

    item: Item
    row: int
    column: int
    positions: int = 0


def latent_grid(model: Model, images: Media, stage: int = 0) -> tuple[int, ...]:
    """Lengths of the axes of the grid of an item's latents; none for one latent an item.

    Args:
        model: Encodes the first readable item.
        images: The data.
        stage: Index of the codebook.

    Raises:
        CodebookError: No item can be read.
    """
    pixels = next((pixels for _, pixels in images.batches(1)), None)
    if pixels is None:
        raise CodebookError(f"none of the calibration {model.modality.many} can be read")
    with torch.no_grad():
        return tuple(model.encode(pixels, stage, keep=False).shape[2:])


def receptive_side(model: Model, images: Media, stage: int = 0) -> int | None:
    """Side of the square around a latent's position that holds SHARE of the energy of its gradient.

    Args:
        model: Its encoder must be differentiable.
        images: The gradient is that of the central latents of a few of them.
        stage: Index of the codebook.

    Returns:
        Pixels, at least the stride; None for no images, and where latents have no grid of two axes.
    """
    if not model.modality.pictures:
        return None
    _, pixels = images.load(images.items[:_IMAGES])
    media = pixels.to(model.device).requires_grad_(True)
    with torch.enable_grad():
        latents = model.encode(media, stage, keep=False)
        if latents.ndim != 4:
            return None
        row, column = latents.shape[2] // 2, latents.shape[3] // 2
        signs = torch.randn(latents.shape[:2], generator=torch.Generator().manual_seed(0)).to(latents.device)
        (gradient,) = torch.autograd.grad((latents[:, :, row, column] * signs).sum(), media)
    energy = gradient.square().sum((0, 1)).cpu().double()
    high, wide = energy.shape
    middle = ((row + 0.5) * high / latents.shape[2], (column + 0.5) * wide / latents.shape[3])
    away = torch.maximum(
        (torch.arange(high) + 0.5 - middle[0]).abs()[:, None], (torch.arange(wide) + 0.5 - middle[1]).abs()[None]
    )
    order = away.flatten().argsort()
    within = energy.flatten()[order].cumsum(0)
    enough = int((within < SHARE * within[-1]).sum())
    half = float(away.flatten()[order[min(enough, len(order) - 1)]]) + 0.5
    stride = high // latents.shape[2]
    return min(max(round(2 * half), stride), high, wide)


def patches(images: Media, places: Sequence[Place], grid: tuple[int, ...], side: int | None, batch: int) -> Tensor:
    """Cut the patch around each place, or draw the part of an array around it; each item is read once.

    Args:
        images: All of the images of the places.
        places: n positions of latents.
        grid: Lengths of the axes of the grid of latents.
        side: Of a patch in pixels, beyond the edge of an image its border is repeated; None for whole images.
        batch: Images per batch.

    Returns:
        (n, 3, size, size) in [0, 1], reduced to at most 64 pixels; of arrays (n, 3, height, width).
    """
    of_item = dict[Item, list[int]]()
    for i, place in enumerate(places):
        of_item.setdefault(place.item, []).append(i)
    cut = dict[int, Tensor]()
    for items, pixels in images.subset([*of_item]).batches(batch):
        for item, image in zip(items, pixels, strict=True):
            for i in of_item[item]:
                pictures = images.modality.pictures
                cut[i] = _cut(image, places[i], grid, side) if pictures else _drawn(images, image, places[i], grid)
    return torch.stack([cut[i] for i in range(len(places))]) if places else torch.empty(0, 3, 1, 1)


def _drawn(media: Media, item: Tensor, place: Place, grid: tuple[int, ...]) -> Tensor:
    """(3, height, width): the part of an item around a place, small."""
    if len(grid) != 2:
        own = (place.positions,) if len(grid) == 1 else grid
        position = tuple(int(at) for at in np.unravel_index(place.column, own)) if own else ()
    else:
        own, position = grid, (place.row, place.column)
    bounds = float(item.min()), float(item.max())  # so that all parts of an item have one scale
    picture = media.modality.picture(span(item, position, own), bounds=bounds)
    return functional.interpolate(picture[None], (_LARGEST, 2 * _LARGEST), mode="area")[0]


def _cut(image: Tensor, place: Place, grid: tuple[int, ...], side: int | None) -> Tensor:
    high, wide = image.shape[1:]
    if side is not None:
        half = side // 2
        wider = functional.pad(image[None], (half, half, half, half), mode="replicate")[0]
        top = int((place.row + 0.5) * high / grid[0] - side / 2) + half
        left = int((place.column + 0.5) * wide / grid[1] - side / 2) + half
        image = wider[:, top : top + side, left : left + side]
    size = min(_LARGEST, *image.shape[1:])
    if size < max(image.shape[1:]):
        image = functional.interpolate(image[None], (size, size), mode="area")[0]
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
