"""The protocols of a network: a family's module, or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, Protocol

from torch import Tensor

Quantize = Callable[[int, Tensor], Tensor]
"""quantize(stage, latents (n, dim, *grid)) -> what the decoder gets in their place, of the same shape.

The caller of `walk` decides what that is: the nearest codes, or those with a straight-through gradient.
"""


Search = Callable[[Tensor, Iterable[int], Quantize], Tensor]
"""search(latents (n, dim, *grid), stages, quantize) -> the sum of what residual stages quantize, of the same shape.

Each stage quantizes what those before it leave. The greedy search takes the nearest code at each; others may call
`quantize` with more items than n, and get back any multiple of them.
"""


class Network(Protocol):
    """A family's module, or the user's own, in the order encode, walk, decode."""

    def encode(self, media: Tensor, /) -> Any:
        """Images (n, channels, height, width) in the model's range, or waveforms (n, channels, samples) in [-1, 1] ->
        latents (n, dim, *grid), or, of a `Walking` network, anything that its `walk` takes."""

    def decode(self, quantized: Any, /) -> Tensor:
        """What `walk` returned -> media of the shape that `encode` took."""


class Walking(Network, Protocol):
    """A network of several codebooks, or with projections around one.

    Attributes:
        codebooks: File keys, without the family's prefix, in the order of the stages.
        not_in_tokens: A sentence on what `decode` uses beside the codes; None, or no attribute, where there is nothing.
    """

    codebooks: tuple[str, ...]

    def walk(self, encoded: Any, quantize: Quantize, /) -> Any:
        """What `encode` returned -> what `decode` takes.

        It calls quantize(stage, latents) once a stage, in order, and lets gradients through: a residual stage passes
        on `residual - quantized`, without detaching it.
        """


class Quantizing(Network, Protocol):
    """A network with a quantizer of its own, which our results are compared with."""

    def quantize(self, encoded: Any, /) -> tuple[Any, Tensor]:
        """What `encode` returned -> what `walk` returns for it, and codes int64.

        Codes are (n, *grid) of one codebook, (n, levels, *grid) of several. In training mode it also updates the codes
        as training does, such as by a step of their moving average.
        """


def searches(network: Any) -> bool:
    """Whether the `walk` of a network takes a Search for its residual stages, as its third argument."""
    return walks(network) and "search" in signature(network.walk).parameters


def walks(network: object) -> bool:
    """Whether a network has the two members of `Walking`."""
    return hasattr(network, "walk") and hasattr(network, "codebooks")


def declared_codebooks(network: object) -> tuple[str, ...]:
    """The names of a network's own codebooks where it says them in `codebooks`, which may also be a layer's name."""
    names = getattr(network, "codebooks", ())
    own = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    return tuple(names) if own else ()
