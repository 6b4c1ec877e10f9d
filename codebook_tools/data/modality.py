"""Modality: how data of one kind become items and tensors, and what can be asked of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from codebook_tools.data.items import Item, Values, joined_by_name
from codebook_tools.data.sources import Source
from codebook_tools.errors import CodebookError

if TYPE_CHECKING:
    from torch import Tensor

IMAGE, AUDIO, BINARY, NUMBERS = "Image", "Audio", "binary", "numbers"
"""Kinds of columns of a data set on the hub that may hold items."""

AS_IT_IS = (0.0, 1.0)
"""The identity as an input range."""


@dataclass(frozen=True, kw_only=True)
class Modality(ABC):
    """One kind of data.

    A subclass describes the kind by class attributes; an instance adds how one network takes it. The defaults suit
    plain numbers that go to the network unchanged.

    Attributes:
        name: As --modality has it.
        one: Noun for an item, in messages.
        many: Noun for several items.
        suffixes: Suffixes of files that hold items.
        archives: Reader of a file by suffix, for files that count only where the user names them, not within folders;
            .parquet files also in a folder without files that count.
        columns: Kinds of columns of a data set on the hub that hold items: IMAGE, AUDIO, BINARY or NUMBERS.
        mixes: What `in_channels` does to surplus channels, in words.
        remedy: How items of unlike shapes get one shape, in words.
        full: Absolute value at full scale, which values may exceed; None where they cannot.
        input_ranges: Ranges that networks are trained on, where data are in [0, 1]; of several, the one with the lowest
            reconstruction error is used.
        bounds: Lowest and highest value of an item, to which reconstructions are clamped; None for no clamping.
        figures: Which of psnr (with peak 1), ssim, sharpness and nmse are computed for reconstructions.
        pictures: Whether an item is (1 or 3, height, width) in `bounds`, so that LPIPS and a discriminator accept it,
            and patches are cut from it; pages show other items as `picture` draws them.
        ending: Of the file that `save` writes for one item; None where items are rows of one array.
        size: Side length of an item as the user set it; None for the default.
        channels: Channels that the network takes.
        stride: Divides the sides of an item.
    """

    name: ClassVar[str]
    one: ClassVar[str]
    many: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    archives: ClassVar[Mapping[str, Callable[[Path], Sequence[Item]]]] = {}
    columns: ClassVar[frozenset[str]] = frozenset()
    mixes: ClassVar[str] = ""
    remedy: ClassVar[str] = "give items of one shape"
    full: ClassVar[float | None] = None
    input_ranges: ClassVar[tuple[tuple[float, float], ...]] = (AS_IT_IS,)
    bounds: ClassVar[tuple[float, float] | None] = None
    figures: ClassVar[frozenset[str]] = frozenset()
    pictures: ClassVar[bool] = False
    ending: ClassVar[str | None] = None

    size: int | tuple[int, int] | None = None
    channels: int = 1
    stride: int = 1

    @classmethod
    @abstractmethod
    def accepts(cls, network: object) -> bool:
        """Whether a network takes data of this kind; the first of MODALITIES that accepts it is used."""

    @classmethod
    def of(cls, network: Any, size: int | tuple[int, int] | None, crop: str = "center") -> Self:
        """The modality with what attributes of the network say of its input.

        Args:
            network: One that `accepts` is true of.
            size: Side length of an item, or height and width, as the user set it.
            crop: "center" or "none", what of an image is kept.

        Raises:
            CodebookError: The network cannot take that size, or items have no such sides.
        """
        if isinstance(size, tuple):
            raise CodebookError(f"--size {size[0]},{size[1]}: height and width are of images; these are {cls.many}")
        return cls(size=size)

    def probed(self, items: Sequence[Item], encode: Callable[[Tensor], Tensor], skip_bad: bool) -> Self:
        """The modality with properties of the network's input that only a trial encoding reveals.

        Args:
            items: The data, at least one item.
            encode: Media (n, ...) to latents (n, dim, *grid).
            skip_bad: Whether unreadable items are skipped.

        Raises:
            CodebookError: No item can be read, or the network does not encode it.
        """
        return self

    @abstractmethod
    def items(self, source: Source) -> list[Item]:
        """The items of a file with one of `suffixes`. An unreadable file is one item whose decoding fails."""

    @abstractmethod
    def rows(self, name: str, array: Values) -> Sequence[Item]:
        """The items of an array in memory.

        Args:
            name: Prefix of the items' names.
            array: (n, ...).

        Raises:
            CodebookError: The array holds another kind of data.
        """

    def joined(self, groups: Sequence[tuple[str, str, Sequence[Item]]]) -> Sequence[Item]:
        """The items of several paths in order of name, under unique names.

        Args:
            groups: Of each path its last part, all of it, and its items. Names that several paths share are prefixed by
                the one, or by the other where that is shared too.

        Raises:
            CodebookError: An item stands twice in the data.
        """
        return joined_by_name(groups)

    @classmethod
    def sample(cls) -> list[Item]:
        """The bundled sample. Raises CodebookError where there is none."""
        raise CodebookError(f"no --data: there is no bundled sample of {cls.many}; give some")

    def in_channels(self, values: Values, how: str | None) -> Values | None:
        """Convert decoded values to `channels`.

        Args:
            values: (n, ...), in the item's own channels.
            how: One of channels.MIXINGS; None if no channel may be lost.

        Returns:
            (channels, ...); None where `how` does not permit the loss of channels.
        """
        return values

    def fitted(self, values: Values) -> Values:
        """Values in a shape that the network takes.

        Args:
            values: (channels, ...), float32, or uint8 in units of 1/255.

        Raises:
            ValueError: They cannot be brought into such a shape.
        """
        return values

    def stacked(self, values: Sequence[Tensor]) -> Tensor:
        """Values of items of one shape as one tensor (n, ...), for the network; float32, uint8 in units of 1/255."""
        import torch

        if len({one.dtype for one in values}) > 1:
            return torch.stack([self.batched(one) for one in values])
        return self.batched(torch.stack([*values]))

    def batched(self, stored: Tensor) -> Tensor:
        """Stored values, (n, ...) or of one item, in the dtype that the network takes."""
        values = stored.float()
        return values if stored.is_floating_point() else values.div_(255)

    @classmethod
    def picture(cls, values: Tensor, like: Tensor | None = None, bounds: tuple[float, float] | None = None) -> Tensor:
        """A picture of an item for pages.

        Args:
            values: The item, or a part of it.
            like: What it is a reconstruction of, which sets the scale; None for none.
            bounds: Lowest and highest value that is drawn; None for those of the item.

        Returns:
            (3 or 1, height, width) in [0, 1].
        """
        from codebook_tools.data.array_pictures import draw

        return draw(values, like, bounds)

    def shape_of(self, grid: Sequence[int], encode: Callable[[Tensor], Tensor]) -> tuple[int, ...] | None:
        """The shape of the items that latents on a grid are of.

        Args:
            grid: Positions of the first quantizer stage, by axis.
            encode: Media (n, channels, ...) to latents (n, dim, *grid) of that stage.

        Returns:
            (channels, ...); None where the grid does not tell it.

        Raises:
            CodebookError: The network makes no such grid.
        """
        return None

    def save(self, values: Values, path: Path) -> None:
        """Write one item.

        Args:
            values: (channels, ...) float32, as `in_channels` and `fitted` leave them.
            path: Of the file, which ends in `ending`.

        Raises:
            OSError: The file cannot be written.
        """
        raise AssertionError(f"{self.many} have no files of their own: `ending` is None")

    @classmethod
    def positions_per_second(cls, network: Any) -> Fraction | None:
        """Positions of the first quantizer stage in a second; None where data have no time."""
        return None

    @classmethod
    def clamped(cls, media: Tensor) -> Tensor:
        """Reconstructions within `bounds`."""
        return media if cls.bounds is None else media.clamp(*cls.bounds)

    @classmethod
    def written(cls, shape: Sequence[int]) -> str:
        """The shape of an item as text for messages."""
        return "x".join(map(str, shape))
