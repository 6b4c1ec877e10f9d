"""Pictures of arrays for pages: lines of a signal, a heat map of several channels, frames of a clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import ge, mod

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

HEIGHT, WIDTH = 96, 320
"""Pixels of a picture of lines, or of a heat map."""

_LINES = 4  # channels that are drawn as lines; more are a heat map
_FRAMES = 8  # of a clip, at most
_INKS = ((0x33, 0x66, 0xBB), (0xBB, 0x44, 0x44), (0x33, 0x88, 0x55), (0x99, 0x77, 0x22))
_BEHIND = (0xBB, 0xBB, 0xBB)
_SCALE = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])  # viridis
_OVER = 3  # times as large as it comes out, for smooth lines


def draw(values: Tensor, like: Tensor | None = None, bounds: tuple[float, float] | None = None) -> Tensor:
    """Draw an item.

    Args:
        values: Any shape. One axis is a line; two are (channels, t), lines or a heat map; of more, clips
            (channels, t, height, width) or (t, height, width) are frames side by side.
        like: An item of that shape, whose range is that of the picture, and whose lines lie behind; None for none.
        bounds: Lowest and highest value of the picture; None for those of `like`, or of the values.

    Returns:
        (3, height, width) in [0, 1].
    """
    array, behind = _squeezed(values), None if like is None else _squeezed(like)
    scale = array if behind is None else behind
    low, high = bounds or (float(scale.min()), float(scale.max()))
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin
    if array.ndim == 1 or (array.ndim == 2 and len(array) <= _LINES):
        return _lines(np.atleast_2d(array), low, high, None if behind is None else np.atleast_2d(behind))
    if array.ndim == 2:
        return _heat_map(array, low, high)
    if array.ndim == 3 and array.shape[0] == 3:
        return torch.from_numpy((array - low) / (high - low)).float().clamp(0, 1)
    return _frames(array, low, high)


def _squeezed(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    array = np.asarray(values.detach().cpu().double().numpy())
    return array.reshape([length for length in array.shape if length > 1] or [1])


def _lines(
    array: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    low: float,
    high: float,
    behind: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None,
) -> Tensor:
    picture = Image.new("RGB", (WIDTH * _OVER, HEIGHT * _OVER), "white")
    pen = ImageDraw.Draw(picture)

    def line(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], ink: tuple[int, ...]) -> None:
        across = np.linspace(0, picture.width - 1, max(2, len(values)))
        heights = (high - np.broadcast_to(values, across.shape) if len(values) < 2 else high - values) / (high - low)
        heights = heights.clip(0.01, 0.99) * (picture.height - 1)  # what is beyond the range runs along the edge
        pen.line([*zip(across.tolist(), heights.tolist(), strict=True)], fill=ink, width=2 * _OVER)

    for channel in () if behind is None else behind:
        line(channel, _BEHIND)
    for channel, ink in zip(array, _INKS, strict=False):
        line(channel, ink)
    return _pixels(picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX))


def _heat_map(array: np.ndarray[tuple[int, ...], np.dtype[np.float64]], low: float, high: float) -> Tensor:
    at = ((array - low) / (high - low)).clip(0, 1) * (len(_SCALE) - 1)
    first = np.minimum(at.astype(int), len(_SCALE) - 2)
    share = (at - first)[..., None]
    colors = (_SCALE[first] * (1 - share) + _SCALE[first + 1] * share).round().astype(np.uint8)
    picture = Image.fromarray(colors)
    size = max(WIDTH, picture.width) if picture.width < 4 * WIDTH else WIDTH, max(HEIGHT, min(picture.height, WIDTH))
    return _pixels(picture.resize(size, Image.Resampling.NEAREST))


def _frames(array: np.ndarray[tuple[int, ...], np.dtype[np.float64]], low: float, high: float) -> Tensor:
    """Frames of (3, t, height, width) or (t, height, width); further axes are laid on top of one another."""
    colored = array.ndim == 4 and array.shape[0] == 3
    frames = array.swapaxes(0, 1) if colored else array.reshape(-1, 1, *array.shape[-2:])
    chosen = frames[_chosen(len(frames))]
    pixels = torch.from_numpy((chosen - low) / (high - low)).float().clamp(0, 1)
    return torch.cat([*pixels.expand(-1, 3, -1, -1)], 2)


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).movedim(-1, 0).float() / 255


def span(values: Tensor, position: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The part of an item around a latent: its cell of the grid, and two to each side.

    Args:
        values: The item.
        position: Of the latent in the grid, an index an axis.
        grid: Lengths of the axes of the grid; none for a latent of the whole item.

    Returns:
        The part; the whole item where no axes of it follow the grid. Of several, those whose lengths it divides go
        first, then the last ones.
    """
    first = following(values.shape, grid)
    if first is None:
        return values
    cuts = [slice(None)] * values.ndim
    for axis, cells, at in zip(range(first, values.ndim), grid, position, strict=False):
        step = values.shape[axis] / cells
        cuts[axis] = slice(max(0, round((at - 2) * step)), min(values.shape[axis], max(1, round((at + 3) * step))))
    return values[tuple(cuts)]


def following(shape: Sequence[int], grid: Sequence[int]) -> int | None:
    """The first of the axes of an item that follow the axes of the grid of its latents; None for none."""
    axes = len(grid)
    places = range(len(shape) - axes, -1, -1) if axes else ()
    fitting = [first for first in places if all(map(ge, shape[first : first + axes], grid))]
    # An axis that is halved some times is a multiple of what is left; (t, channels) are as usual as (channels, t).
    return min(fitting, key=lambda first: any(map(mod, shape[first : first + axes], grid)), default=None)


def lay_out(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Lay out tokens as `draw` lays out their item, whose time must run along the picture.

    Args:
        tokens: (*grid).
        shape: Of the item.

    Returns:
        (rows, columns); of a clip, each frame that is drawn has the tokens of its time.
    """
    if tokens.ndim == 2:
        return tokens
    if tokens.ndim != 3:
        return tokens.reshape(1, -1)
    first = following(shape, tokens.shape)
    if first is None:
        return torch.cat([*tokens], 1)
    times, channels = shape[first], math.prod(shape[:first])
    frames = times if channels == 3 else times * channels  # three channels are colors, others frames of their own
    return torch.cat([tokens[frame % times * len(tokens) // times] for frame in _chosen(frames)], 1)


def _chosen(frames: int) -> list[int]:
    """The frames of a clip that are drawn."""
    chosen: list[int] = np.linspace(0, frames - 1, min(_FRAMES, frames)).round().astype(int).tolist()
    return chosen
