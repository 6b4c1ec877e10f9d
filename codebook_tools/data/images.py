"""Images: pictures in folders and tars, rows of arrays, and the bundled sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.data.array_files import row_items, stored_arrays
from codebook_tools.data.channels import FIRST, in_channels
from codebook_tools.data.dataset import Media
from codebook_tools.data.image_decoding import decode_picture, decode_row, luma, resized
from codebook_tools.data.items import Item, Values
from codebook_tools.data.modality import BINARY, IMAGE, Modality
from codebook_tools.data.parquet_images import parquet_images
from codebook_tools.data.sources import Source
from codebook_tools.errors import CodebookError

LONGEST_SIDE = 1 << 14
"""Largest --size in pixels: 3 GB in float32, and an encoder's activations are a multiple of it."""
SAMPLE = "sample"
"""Name of the bundled sample in messages: patches of the two photographs that scikit-learn ships."""


def _stored_items(path: Path) -> list[Item]:
    return [item for array in stored_arrays(path, Images.many) for item in array_items(path.name, array)]


@dataclass(frozen=True, kw_only=True)
class Images(Modality):
    """Picture files in folders and tars, one item each; .npy, .npz and .parquet files, one item per row.

    In memory an image is (channels, height, width) in [0, 1].

    Attributes:
        size: Side of a square, or height and width, that every image is cut and resized to; None: all must have one
            size.
        channels: 1 or 3.
        stride: Height and width are cropped about the center to multiples of it.
        whole: Whether images are resized as a whole, where otherwise their center is cut out.

    Raises:
        CodebookError: `size` is above LONGEST_SIDE.
    """

    name = "images"
    one = "image"
    many = "images"
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
    archives = dict.fromkeys((".npy", ".npz"), _stored_items) | {".parquet": parquet_images}
    columns = frozenset({IMAGE, BINARY})
    mixes = "the luma of colors, or the first of them; alpha goes"
    remedy = "give --size N, or H,W, and the center of each is resized to so many pixels"
    input_ranges = ((-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5))  # a checkpoint does not say which one
    bounds = (0, 1)
    figures = frozenset({"psnr", "ssim", "sharpness"})
    pictures = True
    ending = ".png"

    channels: int = 3
    whole: bool = False

    def __post_init__(self) -> None:
        if self.sides is not None and max(self.sides) > LONGEST_SIDE:
            raise CodebookError(f"--size {max(self.sides)} is longer than {LONGEST_SIDE} pixels")

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width that images are resized to; None for their own."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @classmethod
    def of(cls, network: Any, size: int | tuple[int, int] | None, crop: str = "center") -> Self:
        """The modality with what the user set."""
        return cls(size=size, whole=crop == "none")

    @classmethod
    def accepts(cls, network: object) -> bool:
        """True: images are the default."""
        return True

    def probed(self, items: Sequence[Item], encode: Callable[[Tensor], Tensor], skip_bad: bool) -> Self:
        """The modality with the channels and the stride that `probe` finds at the size of the first image."""
        height, width = self._first_size(items, skip_bad) if self.sides is None else self.sides
        channels, stride = probe(encode, height, width)
        if self.sides is not None and min(self.sides) < stride:
            raise CodebookError(
                f"--size {min(self.sides)} is smaller than the model's stride of {stride}; give a multiple of that"
            )
        return replace(self, channels=channels, stride=stride)

    def _first_size(self, items: Sequence[Item], skip_bad: bool) -> tuple[int, int]:
        """Height and width of the first readable image, before it is cropped to the stride."""
        for item in items:
            _, pixels = Media(items, Images(), skip_bad, mixing=FIRST).load([item])
            if len(pixels):
                return pixels.shape[2], pixels.shape[3]
        raise CodebookError(f"none of {len(items)} images can be read, the last {items[-1].name}")

    def items(self, source: Source) -> list[Item]:
        """The picture of a file."""
        return [Item(source.name, source, partial(_decode_source, source))]  # a partial can be pickled

    def rows(self, name: str, array: Values) -> list[Item]:
        """The rows of an array in memory; see `array_items`."""
        return array_items(name, array)

    @classmethod
    def sample(cls) -> list[Item]:
        """The bundled sample; see `sample_images`."""
        return sample_images()

    def in_channels(self, values: Values, how: str | None) -> Values | None:
        """The image in `channels`: alpha is dropped where `how` permits it; mixed channels are their luma."""
        colors = values[:-1] if len(values) in (2, 4) else values
        if how is None and len(colors) < len(values):
            return None
        return in_channels(colors, self.channels, how, luma)

    def fitted(self, values: Values) -> Values:
        """Resize to `size` if that is set, and crop about the center to multiples of `stride`, or resize to those.

        Args:
            values: (channels, height, width), uint8 or float32.

        Raises:
            ValueError: A side is smaller than the stride.
        """
        if self.sides is not None and values.shape[1:] != self.sides:
            values = resized(values, self.sides, self.whole)
        height, width = (side - side % self.stride for side in values.shape[1:])
        if self.whole and min(height, width) and (height, width) != values.shape[1:]:
            values = resized(values, (height, width), whole=True)
        if not height or not width:
            raise ValueError(f"{self.written(values.shape)} is smaller than the model's stride of {self.stride}")
        top, left = (values.shape[1] - height) // 2, (values.shape[2] - width) // 2
        return np.ascontiguousarray(values[:, top : top + height, left : left + width])

    def shape_of(self, grid: Sequence[int], encode: Callable[[Tensor], Tensor]) -> tuple[int, ...] | None:
        """Channels, height and width for a grid of rows and columns, by the channels and the stride that `probe` finds.

        Of a grid of another number of axes the sides are those of `size`; None where that is not set.
        """
        channels, stride = probe(encode, *(self.sides or (64, 64)))
        if stride > 1 and len(grid) != 2:  # a stride is known of grids of rows and columns alone
            raise CodebookError(f"tokens of {'x'.join(map(str, grid))} are not this model's: it makes rows and columns")
        if self.sides is None and len(grid) != 2:
            return None
        height, width = self.sides or (grid[0] * stride, grid[1] * stride)
        shape = (channels, height, width)
        made = tuple(encode(torch.zeros(1, *shape)).shape[2:])
        if made != tuple(grid):
            raise CodebookError(
                f"tokens of {'x'.join(map(str, grid))} are not this model's: it makes {'x'.join(map(str, made))} of "
                f"{self.written(shape)} pixels"
            )
        return shape

    def save(self, values: Values, path: Path) -> None:
        """Write a PNG of 8 bits; each value is rounded to the nearest 255th."""
        from PIL import Image

        pixels = np.rint(values.transpose(1, 2, 0) * 255).astype(np.uint8)
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path, "PNG")

    @classmethod
    def picture(cls, values: Tensor, like: Tensor | None = None, bounds: tuple[float, float] | None = None) -> Tensor:
        """The image itself."""
        return values

    @classmethod
    def written(cls, shape: Sequence[int]) -> str:
        """WIDTHxHEIGHT of (channels, height, width)."""
        return f"{shape[2]}x{shape[1]}"


def _decode_source(source: Source) -> Values:
    return decode_picture(source.read())


@torch.no_grad()
def probe(encode: Callable[[Tensor], Tensor], height: int, width: int) -> tuple[int, int]:
    """Determine channels and stride of a network by encoding black images of the given size, or of 64 or 256 pixels.

    Args:
        encode: Images (n, channels, height, width) to latents (n, dim, *grid) of the first codebook.
        height: In pixels.
        width: In pixels.

    Returns:
        Channels, 1 or 3, and pixels per latent position along a side; 1 where latents have no grid of two axes.

    Raises:
        CodebookError: The network encodes neither 3 channels nor 1.
    """
    problems = dict[int, CodebookError]()
    for sides in ((height, width), (64, 64), (256, 256)):
        for channels in (3, 1):
            try:
                grid = encode(torch.zeros(1, channels, *sides)).shape[2:]
            except CodebookError as error:
                problems.setdefault(channels, error)  # that of the given size
                continue
            return channels, _stride(encode, channels, sides[-1], grid[-1]) if len(grid) == 2 else 1
    raise CodebookError(f"the network encodes neither RGB images ({problems[3]}) nor gray ones ({problems[1]})")


def _stride(encode: Callable[[Tensor], Tensor], channels: int, side: int, positions: int) -> int:
    """Pixels per position along a side. Few positions leave that open, as a network of stride 4 makes 2 of 10 pixels
    too; then a larger image decides, if the network takes it."""
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
    """Make one image of each row of an array.

    Args:
        name: Of the array; a row is named NAME#row.
        array: (n, height, width), (n, height, width, 1|3) or (n, 1|3, height, width), uint8 or floating point in
            [0, 1].

    Raises:
        CodebookError: The array has another shape or dtype, or is empty.
    """
    if array.ndim not in (3, 4) or (array.ndim == 4 and not {1, 3} & {array.shape[1], array.shape[3]}):
        raise CodebookError(
            f"{name} has shape {array.shape}: expected images (n, h, w), (n, h, w, 1 or 3) or (n, 1 or 3, h, w); with "
            "a network of yours, --modality arrays hands rows of any shape to it as they are"
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
    """The bundled sample: 3,072 patches of 32x32 pixels from two photographs.

    Each photograph is cut into disjoint blocks, and the patches of a block are one group, so that no test patch shares
    a pixel with a training patch. Patches of a block overlap, at offsets that no stride of a model divides.
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
