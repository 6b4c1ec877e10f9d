"""Quantisers of the vector-quantize-pytorch library inside a user's network: their stages, walked without their code.

The library's own forward is never called: it would run k-means or EMA on the codebook, and look codes up itself.
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
from codebook_tools.models.network import Quantise

_LIBRARY = "vector_quantize_pytorch"
_MEMBERS = ("walk", "codebooks", "lookup", "quantize")

Code = Callable[[Tensor], Tensor]
"""What the next stage's codes make of its latents, (n, dim, *grid) -> the same shape."""


@dataclass(frozen=True)
class Kind:
    """A class of the library. codebooks: their names in it, in order of the stages. walk: latents -> quantised.
    codes: the library's indices and the shape (n, *grid) -> codes (n, *grid), or (n, levels, *grid) of several."""

    codebooks: Callable[[Any], list[str]]
    walk: Callable[[Any, Tensor, Code], Tensor]
    codes: Callable[[Tensor, tuple[int, ...]], Tensor]


def _projected(quantiser: Any, latents: Tensor, code: Code) -> Tensor:
    # The library's projections, where it has some, look at the last axis.
    inside = quantiser.project_in(latents.movedim(1, -1)).movedim(-1, 1)
    outside: Tensor = quantiser.project_out(code(inside).movedim(1, -1)).movedim(-1, 1)
    return outside


def _heads(quantiser: Any, latents: Tensor, code: Code) -> Tensor:
    """As `_projected`, and each position is cut into heads, which choose their codes from one codebook."""
    heads = quantiser.heads

    def of_heads(inside: Tensor) -> Tensor:  # (n, heads * dim, *grid) -> (n, dim, *grid, heads), and back
        cut = inside.reshape(len(inside), heads, -1, *inside.shape[2:]).movedim(1, -1)
        return code(cut).movedim(-1, 1).flatten(1, 2)

    return _projected(quantiser, latents, code if heads == 1 else of_heads)


def _residual(quantiser: Any, latents: Tensor, code: Code) -> Tensor:
    def stages(rest: Tensor) -> Tensor:
        total = torch.zeros_like(rest)
        for _ in quantiser.layers:
            quantised = code(rest)
            rest, total = rest - quantised, total + quantised
        return total

    return _projected(quantiser, latents, stages)


def _grouped(quantiser: Any, latents: Tensor, code: Code) -> Tensor:
    parts = latents.chunk(quantiser.groups, 1)
    return torch.cat([_residual(rvq, part, code) for rvq, part in zip(quantiser.rvqs, parts, strict=True)], 1)


def _layers(quantiser: Any) -> list[str]:
    return [f"layers.{i}._codebook.embed" for i in range(len(quantiser.layers))]


def _layers_of_groups(quantiser: Any) -> list[str]:
    return [f"rvqs.{g}.{name}" for g, rvq in enumerate(quantiser.rvqs) for name in _layers(rvq)]


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
    "SimVQ": Kind(lambda _: ["frozen_codebook"], lambda _, latents, code: code(latents), _codes),
}

# Options with which the codes are not rows that each stage looks up on its own: the class, whether it is on, its name.
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
    """A user network's walk. It holds the quantiser itself: in a deep copy of the network it is the copy's."""

    quantiser: nn.Module
    kind: Kind

    def __call__(self, latents: Tensor, quantise: Quantise) -> Tensor:
        """latents (n, dim, *grid), as the quantiser takes them -> what it hands to the decoder, of the same shape."""
        stages = count()
        return self.kind.walk(self.quantiser, latents, lambda inside: quantise(next(stages), inside))


@dataclass(frozen=True, eq=False)
class Own:
    """The library's own forward, for `Quantizing.quantize`."""

    quantiser: nn.Module
    kind: Kind

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents (n, dim, *grid) -> quantized alike, and codes (n, [levels,] *grid), a last axis of heads with it."""
        given, grid = self.quantiser, latents.shape[2:]
        images = getattr(given, "accept_image_fmap", False)
        first = images or getattr(given, "channel_first", False) or not getattr(given, "channel_last", True)
        flat = latents if images else latents.flatten(2) if first else latents.flatten(2).movedim(1, -1)
        quantized, indices, *_ = given(flat)
        quantized = quantized if first else quantized.movedim(-1, 1)
        codes = self.kind.codes(indices, (len(latents), *grid))
        return (quantized if images else quantized.reshape(latents.shape)), codes


def give_walk(network: nn.Module) -> None:
    """Give a network that holds a quantiser of the library, and has no walk of its own, what `Walking` asks for.

    Its metric, too, in `lookup`. With use_cosine_sim the library takes rows to be of unit length, and so do we.
    Raises CodebookError where there are several quantisers, or one that cannot be walked.
    """
    found = _outermost(network)
    if not found or (hasattr(network, "walk") and hasattr(network, "codebooks")):
        return
    way_out = f"; give {type(network).__name__} a `walk` and `codebooks` of its own"
    if len(found) > 1:
        raise CodebookError(f"the network holds {len(found)} quantisers, {', '.join(found)}{way_out}")
    ((name, quantiser),) = found.items()
    kind = _kind(quantiser)
    if kind not in KINDS:
        raise CodebookError(f"{name} is {kind}, and of its library only {', '.join(KINDS)} can be walked{way_out}")
    for module in quantiser.modules():
        for owner, has, option in _BEYOND:
            if _kind(module) == owner and has(module):
                raise CodebookError(f"{name} is a {kind} with {option}: that cannot be operated on{way_out}")
    own = hasattr(network, "quantize")  # a method, the user's word, or a layer: either comes before ours
    taken = [member for member in _MEMBERS if hasattr(network, member) and member != "quantize"]
    if taken:
        raise CodebookError(f"the network's `{taken[0]}` is in the way of its {kind}, {name}: rename it{way_out}")
    cosine = any(_is_cosine(module) for module in quantiser.modules())
    members = (
        Walk(quantiser, KINDS[kind]),
        tuple(f"{name}.{codebook}" for codebook in KINDS[kind].codebooks(quantiser)),
        COSINE_UNIT if cosine else EUCLIDEAN,
        Own(quantiser, KINDS[kind]),
    )
    for member, value in zip(_MEMBERS, members, strict=True):
        if member != "quantize" or not own:
            setattr(network, member, value)


def _outermost(network: nn.Module) -> dict[str, nn.Module]:
    """The library's modules by name, without those that lie in another one of them."""
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        if name and _kind(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _kind(module: nn.Module) -> str | None:
    """The library's name of a module's class, or of the one that it extends."""
    library = (c.__name__ for c in type(module).__mro__ if c.__module__.partition(".")[0] == _LIBRARY)
    return next(library, None)


def _is_cosine(module: nn.Module) -> bool:
    """Older versions have a class for it, newer ones an attribute."""
    return _kind(module) == "CosineSimCodebook" or (_kind(module) == "Codebook" and bool(module.use_cosine_sim))
