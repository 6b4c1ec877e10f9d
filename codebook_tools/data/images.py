"""Images: pictures in folders and tars, rows of arrays, and the bundled sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.data.array_files import row_items, stored_arrays
from codebook_tools.data.channels import FIRST, in_channels
from codebook_tools.data.dataset import Media
from codebook_tools.data.image_decoding import decode_picture, decode_row, luma, square
from codebook_tools.data.items import Item, Values
from codebook_tools.data.modality import Modality
from codebook_tools.data.sources import Source
from codebook_tools.errors import CodebookError

LONGEST_SIDE = 1 << 14
"""Pixels of a side that images are resized to: 3 GB in float32, and an encoder makes a multiple of it."""
SAMPLE = "sample"
"""Stands for the bundled sample in messages: patches of the two photographs that scikit-learn ships."""


def _stored_items(path: Path) -> list[Item]:
    return [item for array in stored_arrays(path, Images.many) for item in array_items(path.name, array)]


@dataclass(frozen=True, kw_only=True)
class Images(Modality):
    """Pictures in folders and tars, one an item; .npy and .npz files, one item a row. In memory, (channels, height,
    width) in [0, 1].

    Attributes:
        size: Side of a square that the center of every image is cut and resized to; None: all must have one size.
        channels: 1 or 3.
        stride: Height and width are cut to a multiple of it, from the center.

    Raises:
        CodebookError: A size that no image has.
    """

    one = "image"
    many = "images"
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
    archives = dict.fromkeys((".npy", ".npz"), _stored_items)
    mixes = "the luma of colours, or the first of them; alpha goes"
    remedy = "give --size N, and the centre square of each is resized to so many pixels"
    input_ranges = ((-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5))  # the file does not say what its network was trained on
    bounds = (0, 1)
    figures = frozenset({"psnr", "ssim", "sharpness"})
    pictures = True

    channels: int = 3

    def __post_init__(self) -> None:
        if self.size is not None and self.size > LONGEST_SIDE:
            raise CodebookError(f"--size {self.size} is longer than {LONGEST_SIDE} pixels")

    @classmethod
    def accepts(cls, network: object) -> bool:
        return True

    def probed(self, items: list[Item], encode: Callable[[Tensor], Tensor], skip_bad: bool) -> Self:
        height, width = self._first_size(items, skip_bad) if self.size is None else (self.size, self.size)
        channels, stride = probe(encode, height, width)
        return replace(self, channels=channels, stride=stride)

    def _first_size(self, items: list[Item], skip_bad: bool) -> tuple[int, int]:
        """Height and width of the first readable image, as the network will see it but for the stride."""
        for item in items:
            _, pixels = Media(items, Images(), skip_bad, mixing=FIRST).load([item])
            if len(pixels):
                return pixels.shape[2], pixels.shape[3]
        raise CodebookError(f"none of {len(items)} images can be read, the last {items[-1].name}")

    def items(self, source: Source) -> list[Item]:
        return [Item(source.name, source, partial(_picture, source))]

    def rows(self, name: str, array: Values) -> list[Item]:
        return array_items(name, array)

    @classmethod
    def sample(cls) -> list[Item]:
        return sample_images()

    def in_channels(self, values: Values, how: str | None) -> Values | None:
        """Alpha goes, where any channel may."""
        colors = values[:-1] if len(values) in (2, 4) else values
        if how is None and len(colors) < len(values):
            return None
        return in_channels(colors, self.channels, how, luma)

    def fitted(self, values: Values) -> Values:
        """The center of a picture, with sides that `stride` divides. Raises ValueError for one smaller than that."""
        if self.size is not None and values.shape[1:] != (self.size, self.size):
            values = square(values, self.size)
        height, width = (side - side % self.stride for side in values.shape[1:])
        if not height or not width:
            raise ValueError(f"{self.written(values.shape)} is smaller than the model's stride of {self.stride}")
        top, left = (values.shape[1] - height) // 2, (values.shape[2] - width) // 2
        return np.ascontiguousarray(values[:, top : top + height, left : left + width])

    @classmethod
    def written(cls, shape: Sequence[int]) -> str:
        return f"{shape[2]}x{shape[1]}"


def _picture(source: Source) -> Values:
    return decode_picture(source.read())


@torch.no_grad()
def probe(encode: Callable[[Tensor], Tensor], height: int, width: int) -> tuple[int, int]:
    """Find out channels and stride of a network by encoding an empty image of that size, or one of 64 or 256 pixels.

    Args:
        encode: Images (n, channels, height, width) to latents (n, dim, *grid). A model with several codebooks is of a
            family, whose first one says the stride of all.
        height: In pixels.
        width: In pixels.

    Returns:
        Channels, 1 or 3, and pixels to a position along a side; 1 where latents have no grid of two axes.

    Raises:
        CodebookError: No number of channels goes through.
    """
    problems = dict[int, CodebookError]()
    for sides in ((height, width), (64, 64), (256, 256)):
        for channels in (3, 1):
            try:
                grid = encode(torch.zeros(1, channels, *sides)).shape[2:]
            except CodebookError as error:
                problems.setdefault(channels, error)  # of the size that was asked for
                continue
            return channels, _stride(encode, channels, sides[-1], grid[-1]) if len(grid) == 2 else 1
    raise CodebookError(f"the network encodes neither RGB images ({problems[3]}) nor grey ones ({problems[1]})")


def _stride(encode: Callable[[Tensor], Tensor], channels: int, side: int, positions: int) -> int:
    """Pixels to a position along a side. Where few positions leave that open (a network of stride 4 makes 2 of 10
    pixels, too), a larger side decides, if the network takes it."""
    stride = max(1, side // positions)
    if stride * positions == side and positions >= stride:
        return stride
    larger = side << max(0, (256 // side).bit_length() - 1)
    try:
        latents = encode(torch.zeros(1, channels, larger, larger))
    except CodebookError:
        return stride
    return max(1, round(larger / latents.shape[-1]))


def array_items(name: str, array: NDArray[np.generic]) -> list[Item]:
    """One item a row, named NAME#row, from (n, height, width) or (n, height, width, 1|3) or (n, 1|3, height, width).

    uint8, or floating point in [0, 1].
    """
    if array.ndim not in (3, 4) or (array.ndim == 4 and not {1, 3} & {array.shape[1], array.shape[3]}):
        raise CodebookError(
            f"{name} has shape {array.shape}: expected (n, h, w), (n, h, w, 1 or 3) or (n, 1 or 3, h, w)"
        )
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise CodebookError(f"{name} has dtype {array.dtype}: expected uint8, or floating point in [0, 1]")
    if 0 in array.shape:
        what = "images without pixels" if len(array) else "no rows, which images are"
        raise CodebookError(f"{name} has shape {array.shape}: it holds {what}")
    return row_items(name, array, decode_row)


def sample_photographs() -> dict[str, NDArray[np.uint8]]:
    """The two photographs that scikit-learn ships, (427, 640, 3) uint8 each, by name."""
    from sklearn.datasets import load_sample_images

    loaded = load_sample_images()
    return {Path(name).stem: image for name, image in zip(loaded.filenames, loaded.images, strict=True)}


def sample_images() -> list[Item]:
    """The bundled sample: 3,072 patches of 32x32 from both photographs.

    Each photograph is cut into blocks that do not overlap, and a block stays whole in any split, so that no test patch
    shares a pixel with a training patch. Patches of a block do overlap, at offsets that no model's stride divides.
    """
    side, block, offset = 32, 53, 7
    return [
        replace(*row_items(region, patch[None], decode_row), name=f"{SAMPLE}/{region}/{y:03d}-{x:03d}", group=region)
        for name, photograph in sample_photographs().items()
        for top in range(0, photograph.shape[0] - block + 1, block)
        for left in range(0, photograph.shape[1] - block + 1, block)
        for region in [f"{name}/{top}-{left}"]
        for y in range(top, top + block - side + 1, offset)
        for x in range(left, left + block - side + 1, offset)
        for patch in [photograph[y : y + side, x : x + side]]
    ]
