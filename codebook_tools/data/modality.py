"""Modality: how data of one kind become items and tensors, and what can be asked of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from codebook_tools.data.items import Item, Values
from codebook_tools.data.sources import Source
from codebook_tools.errors import CodebookError

if TYPE_CHECKING:
    from torch import Tensor

AS_IT_IS = (0.0, 1.0)
"""The input range that changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Modality(ABC):
    """One kind of data.

    A subclass is a kind, and its class attributes hold of all of it; an instance is how one network takes it. The
    defaults are those of numbers that mean nothing in particular, and go to the network as they are.

    Attributes:
        one: What an item is called.
        many: What several are called.
        suffixes: Endings of files that hold items.
        archives: By suffix, how files are read that count only where they themselves are given.
        mixes: What `in_channels` makes of channels that the network has not, in words.
        remedy: How items of unlike shapes get one, in words.
        full: Full scale of values that may go beyond it on either side; None: none can.
        input_ranges: Ranges of values that networks are trained on, where data are in [0, 1]: of several, each is
            tried; of one there is no question.
        bounds: Lowest and highest value of an item, to which reconstructions are clamped; None: they are not.
        figures: Which of psnr (1 is the peak), ssim and sharpness a reconstruction has.
        pictures: Whether an item is (1 or 3, height, width) in `bounds`: pages show it, patches are cut from it, LPIPS
            and a discriminator judge it.
        size: Length of a side of an item, as the user asked for it; None for the usual one.
        channels: Of an item, as the network takes it.
        stride: Sides are multiples of it.
    """

    one: ClassVar[str]
    many: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    archives: ClassVar[Mapping[str, Callable[[Path], list[Item]]]] = {}
    mixes: ClassVar[str] = ""
    remedy: ClassVar[str] = "give items of one shape"
    full: ClassVar[float | None] = None
    input_ranges: ClassVar[tuple[tuple[float, float], ...]] = (AS_IT_IS,)
    bounds: ClassVar[tuple[float, float] | None] = None
    figures: ClassVar[frozenset[str]] = frozenset()
    pictures: ClassVar[bool] = False

    size: int | None = None
    channels: int = 1
    stride: int = 1

    @classmethod
    @abstractmethod
    def accepts(cls, network: object) -> bool:
        """Whether a network takes data of this kind; the first of MODALITIES that accepts it is the network's."""

    @classmethod
    def of(cls, network: Any, size: int | None) -> Self:
        """How the network takes data, as far as it says so. Raises CodebookError for a size that it cannot take."""
        return cls(size=size)

    def probed(self, items: list[Item], encode: Callable[[Tensor], Tensor], skip_bad: bool) -> Self:
        """How the network takes data, which some only show when they encode.

        Args:
            items: The data, one at least.
            encode: Media (n, ...) to latents (n, dim, *grid).
            skip_bad: Whether an item that cannot be read is passed over.

        Raises:
            CodebookError: No item can be read, or the network does not encode it.
        """
        return self

    @abstractmethod
    def items(self, source: Source) -> list[Item]:
        """What a file with one of `suffixes` holds. What cannot be read is one item, which says so when decoded."""

    @abstractmethod
    def rows(self, name: str, array: Values) -> list[Item]:
        """What an array in memory holds, (n, ...), under a name. Raises CodebookError for one of another kind."""

    @classmethod
    def sample(cls) -> list[Item]:
        """The bundled sample. Raises CodebookError where there is none."""
        raise CodebookError(f"no --data: there is no bundled sample of {cls.many}; give some")

    def in_channels(self, values: Values, how: str | None) -> Values | None:
        """Decoded values in `channels`.

        Args:
            values: (channels, ...), in the channels that the item has.
            how: One of channels.MIXINGS, by which channels may be lost; None: none may.

        Returns:
            None where channels would be lost that must not be.
        """
        return values

    def fitted(self, values: Values) -> Values:
        """Values as the network takes them: float32, or uint8 that counts 255ths. Raises ValueError where they cannot
        be made so."""
        return values

    @classmethod
    def clamped(cls, media: Tensor) -> Tensor:
        """Reconstructions within `bounds`."""
        return media if cls.bounds is None else media.clamp(*cls.bounds)

    @classmethod
    def written(cls, shape: Sequence[int]) -> str:
        """The shape of an item, as messages have it."""
        return "x".join(map(str, shape))
