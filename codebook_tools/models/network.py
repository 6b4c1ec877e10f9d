"""What a network can do: a family's module, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

Quantise = Callable[[int, Tensor], Tensor]
"""quantise(stage, latents (n, dim, *grid)) -> what the decoder gets of their codes, of the same shape.

Whoever calls it decides what that is: the nearest codes, those and a straight-through gradient, a look at the latents.
"""


class Network(Protocol):
    """What a family's module, or the user's own, can do. What `encode` returns, only `walk` looks into.

    encode: images (n, channels, height, width) in the model's range, or waveforms (n, channels, samples) in [-1, 1].
    decode: what `walk` returned -> media of the same shape.
    """

    def encode(self, media: Tensor, /) -> Any: ...

    def decode(self, quantised: Any, /) -> Tensor: ...


class Walking(Network, Protocol):
    """A network of several codebooks, or of one that latents are projected for. Without these two members: of one
    codebook, and `encode` returns its latents, (n, dim, *grid).

    codebooks: file keys, without the family's prefix, in the order of the stages.
    walk: what `encode` returned -> what `decode` takes. It calls quantise(stage, latents) once a stage, in order,
    and lets gradients through: a residual stage hands on `residual - quantised`, without detaching it.
    """

    codebooks: tuple[str, ...]

    def walk(self, encoded: Any, quantise: Quantise, /) -> Any: ...


class Quantizing(Network, Protocol):
    """A network with a quantizer of its own, which what we compute is held against.

    quantize: what `encode` returned -> the same, quantized as `walk` returns it, and codes int64: (n, *grid) of one
    codebook, (n, levels, *grid) of several. In training mode it also does what training does to the codes, such as a
    step of their moving average.
    """

    def quantize(self, encoded: Any, /) -> tuple[Any, Tensor]: ...
