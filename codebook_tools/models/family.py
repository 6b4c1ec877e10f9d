"""What a network family is to us: a record that says how its files are recognised, made, and written back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from codebook_tools.checkpoints.config import Config
from codebook_tools.checkpoints.reading import Checkpoint
from codebook_tools.codebook import Emit, Lookup

Shapes = Mapping[str, tuple[int, ...]]

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


class Listening(Network, Protocol):
    """A network of waveforms. sampling_rate: in Hz. hop: samples a latent; inputs are cut to multiples of it.
    channels: of its waveforms."""

    sampling_rate: int
    hop: int
    channels: int


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints, and the network that goes with it.

    prefix: what stands before the family's own key names ("" for nothing), None where tensors or config are another
    layout's. make: a network with fresh weights, from the shapes without that prefix and the checkpoint (its config);
    None where there is none to be had, and then `why_not` says in a sentence why. file_key: the file's key, without
    prefix, of what the network calls a name; shapes may differ in axes of length 1. lookup, emit: how its codes are
    found and given out.
    config_key: the config's entry that is K, dots between levels; None for a family that knows no config. default_size:
    K where that entry is missing, None where the library has no default.
    power_of_two: whether the config takes no other K. follow: further entries of the config that K decides, by dotted
    name: (config, new K) -> values. axis: of the codes in their tensors, None where that can be told from the names.
    caveat: what to warn of.
    """

    prefix: Callable[[Checkpoint], str | None]
    make: Callable[[Shapes, Checkpoint], nn.Module] | None
    file_key: Callable[[str, Shapes], str] = lambda name, shapes: name
    why_not: str = ""
    lookup: Lookup = Lookup.EUCLIDEAN
    emit: Emit = Emit.RAW
    config_key: str | None = None
    default_size: int | None = None
    power_of_two: bool = False
    follow: Callable[[Config, int], Mapping[str, object]] = lambda config, size: {}
    axis: int | None = None
    caveat: Callable[[Checkpoint], str | None] = lambda checkpoint: None
