"""Quantizers of the vector-quantize-pytorch library inside a user's network, walked stage by stage.

A walk does not call the library's forward, which would run k-means or EMA on the codebook, and search codes itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import EUCLIDEAN
from codebook_tools.errors import CodebookError
from codebook_tools.models.network import Quantize, Search
from codebook_tools.models.networks.residual import residual

_LIBRARY = "vector_quantize_pytorch"
_MEMBERS = ("walk", "codebooks", "lookup", "quantize")

Code = Callable[[Tensor], Tensor]
"""Quantizes the latents of the next stage, (n, dim, *grid) -> the same shape."""


@dataclass(frozen=True)
class Kind:
    """A class of the library.

    Attributes:
        codebooks: quantizer -> the names of its codebooks, in the order of the stages.
        walk: (quantizer, latents, code, search of residual stages) -> quantized latents.
        codes: (the library's indices, (n, *grid)) -> codes (n, *grid), or (n, levels, *grid) of several codebooks.
    """

    codebooks: Callable[[Any], list[str]]
    walk: Callable[[Any, Tensor, Code, Search], Tensor]
    codes: Callable[[Tensor, tuple[int, ...]], Tensor]


def _projected(quantizer: Any, latents: Tensor, code: Code) -> Tensor:
    # The library's projections, where it has some, look at the last axis.
    inside = quantizer.project_in(latents.movedim(1, -1)).movedim(-1, 1)
    outside: Tensor = quantizer.project_out(code(inside).movedim(1, -1)).movedim(-1, 1)
    return outside


def _heads(quantizer: Any, latents: Tensor, code: Code, search: Search) -> Tensor:
    """As `_projected`, with each position split into heads that share one codebook."""
    heads = quantizer.heads

    def of_heads(inside: Tensor) -> Tensor:  # (n, heads * dim, *grid) -> (n, dim, *grid, heads), and back
        cut = inside.reshape(len(inside), heads, -1, *inside.shape[2:]).movedim(1, -1)
        return code(cut).movedim(-1, 1).flatten(1, 2)

    return _projected(quantizer, latents, code if heads == 1 else of_heads)


def _residual(quantizer: Any, latents: Tensor, code: Code, search: Search) -> Tensor:
    def stages(rest: Tensor) -> Tensor:
        return search(rest, range(len(quantizer.layers)), lambda _, left: code(left))

    return _projected(quantizer, latents, stages)


def _grouped(quantizer: Any, latents: Tensor, code: Code, search: Search) -> Tensor:
    parts = latents.chunk(quantizer.groups, 1)
    return torch.cat([_residual(rvq, part, code, search) for rvq, part in zip(quantizer.rvqs, parts, strict=True)], 1)


def _layers(quantizer: Any) -> list[str]:
    return [f"layers.{i}._codebook.embed" for i in range(len(quantizer.layers))]


def _layers_of_groups(quantizer: Any) -> list[str]:
    return [f"rvqs.{g}.{name}" for g, rvq in enumerate(quantizer.rvqs) for name in _layers(rvq)]


def _codes(indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(n, positions), or with an axis of heads -> (n, *grid), heads last."""
    heads = indices.numel() // math.prod(shape)
    return indices.reshape(*shape, *((heads,) if heads > 1 else ()))


def _codes_of_stages(indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(n, positions, stages) -> (n, stages, *grid)."""
    return indices.movedim(-1, 1).reshape(shape[0], indices.shape[-1], *shape[1:])


def _codes_of_groups(indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(groups, n, positions, stages) -> (n, groups * stages, *grid)."""
    return torch.cat([_codes_of_stages(group, shape) for group in indices], 1)


KINDS = {
    "VectorQuantize": Kind(lambda _: ["_codebook.embed"], _heads, _codes),
    "ResidualVQ": Kind(_layers, _residual, _codes_of_stages),
    "GroupedResidualVQ": Kind(_layers_of_groups, _grouped, _codes_of_groups),
    "SimVQ": Kind(lambda _: ["frozen_codebook"], lambda _, latents, code, search: code(latents), _codes),
}

# Options with which a stage does not simply look up rows: the class, whether the option is on, its name.
_BEYOND: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("VectorQuantize", lambda vq: vq._codebook.num_codebooks > 1, "a codebook for each of its heads"),
    ("VectorQuantize", lambda vq: getattr(vq._codebook, "affine_param", False), "affine_param"),
    ("VectorQuantize", lambda vq: getattr(vq._codebook, "vq_bridge", None) is not None, "a vq_bridge"),
    ("ResidualVQ", lambda rvq: getattr(rvq, "implicit_neural_codebook", False), "an implicit_neural_codebook"),
    ("ResidualVQ", lambda rvq: getattr(rvq, "diveq", False), "diveq"),
    ("ResidualVQ", lambda rvq: (getattr(rvq, "eval_beam_size", None) or 1) > 1, "eval_beam_size > 1"),
    ("SimVQ", lambda vq: type(vq.code_transform) is not nn.Linear, "a codebook_transform that is not one linear layer"),
)


@dataclass(frozen=True, eq=False)
class Walk:
    """A user network's `walk`. In a deep copy of the network it refers to the copied quantizer."""

    quantizer: nn.Module
    kind: Kind

    def __call__(self, latents: Tensor, quantize: Quantize, search: Search = residual) -> Tensor:
        """latents (n, dim, *grid) that the quantizer takes -> what it returns for them, of the same shape."""
        stages = count()
        return self.kind.walk(self.quantizer, latents, lambda inside: quantize(next(stages), inside), search)


@dataclass(frozen=True, eq=False)
class Own:
    """The library's own forward, as `Quantizing.quantize`."""

    quantizer: nn.Module
    kind: Kind

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents (n, dim, *grid) -> quantized, of the same shape, and codes (n, [levels,] *grid [, heads])."""
        quantizer, grid = self.quantizer, latents.shape[2:]
        images = getattr(quantizer, "accept_image_fmap", False)
        first = images or getattr(quantizer, "channel_first", False) or not getattr(quantizer, "channel_last", True)
        flat = latents if images else latents.flatten(2) if first else latents.flatten(2).movedim(1, -1)
        quantized, indices, *_ = quantizer(flat)
        quantized = quantized if first else quantized.movedim(-1, 1)
        codes = self.kind.codes(indices, (len(latents), *grid))
        return (quantized if images else quantized.reshape(latents.shape)), codes


def give_walk(network: nn.Module) -> None:
    """Add the members of `Walking` and `Quantizing` to a network with a quantizer of the library.

    Its metric goes into the member `lookup`; with use_cosine_sim, rows are assumed to have unit length, as in the
    library. A network without such a quantizer, or with a walk of its own, stays as it is.

    Raises:
        CodebookError: There are several quantizers, one that cannot be walked, or a member is taken.
    """
    quantizers = _outermost(network)
    if not quantizers or (hasattr(network, "walk") and hasattr(network, "codebooks")):
        return
    way_out = f"; give {type(network).__name__} a `walk` and `codebooks` of its own"
    if len(quantizers) > 1:
        raise CodebookError(f"the network holds {len(quantizers)} quantizers, {', '.join(quantizers)}{way_out}")
    ((name, quantizer),) = quantizers.items()
    kind = _kind(quantizer)
    if kind not in KINDS:
        raise CodebookError(f"{name} is {kind}, and of its library only {', '.join(KINDS)} can be walked{way_out}")
    for module in quantizer.modules():
        for owner, has, option in _BEYOND:
            if _kind(module) == owner and has(module):
                raise CodebookError(f"{name} is a {kind} with {option}: that cannot be operated on{way_out}")
    own = hasattr(network, "quantize")  # the user's method or layer precedes ours
    taken = [member for member in _MEMBERS if hasattr(network, member) and member != "quantize"]
    if taken:
        raise CodebookError(f"the network's `{taken[0]}` is in the way of its {kind}, {name}: rename it{way_out}")
    cosine = any(_is_cosine(module) for module in quantizer.modules())
    members = (
        Walk(quantizer, KINDS[kind]),
        tuple(f"{name}.{codebook}" for codebook in KINDS[kind].codebooks(quantizer)),
        COSINE_UNIT if cosine else EUCLIDEAN,
        Own(quantizer, KINDS[kind]),
    )
    for member, value in zip(_MEMBERS, members, strict=True):
        if member != "quantize" or not own:
            setattr(network, member, value)


def _outermost(network: nn.Module) -> dict[str, nn.Module]:
    """The library's modules by name, without those inside of another one."""
    outermost: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        if name and _kind(module) and not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost[name] = module
    return outermost


def _kind(module: nn.Module) -> str | None:
    """The library's name of a module's class, or of the one that it extends."""
    library = (c.__name__ for c in type(module).__mro__ if c.__module__.partition(".")[0] == _LIBRARY)
    return next(library, None)


def _is_cosine(module: nn.Module) -> bool:
    """Whether a codebook is searched by cosine: older versions have a class for it, newer ones an attribute."""
    return _kind(module) == "CosineSimCodebook" or (_kind(module) == "Codebook" and bool(module.use_cosine_sim))
