"""How a module of `wirings.py` is wired: all that there is to say about it but the numbers in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """One step from stored rows to effective codes.

    Attributes:
        kind: "project", "scale", "shift" or "unit" (rows at unit length).
        name: Of its tensor, in the codebook's module or in the one above; empty for "unit".
        above: Whether it is in the module above, where all codebooks share it that lie there.
        layer: Whether a projection is an nn.Linear; else it is a parameter W, used as rows @ W.
        bias: Whether the layer has a bias.
        scalar: Whether a scale is one number; else it has one per dimension.
    """

    kind: str
    name: str = ""
    above: bool = False
    layer: bool = False
    bias: bool = False
    scalar: bool = False


@dataclass(frozen=True)
class Average:
    """Moving averages that follow a codebook, and how a training step updates them.

    Attributes:
        counts: Name of the running counts, in the codebook's module.
        sums: Name of the running sums.
        shape: Of the counts: "k", "1k" or "k1".
        turned: Whether the axes of the sums are the other way round than those of the codebook.
        smoothed: Whether codes are sums over Laplace-smoothed counts; else over the counts themselves.
        decay: Of both averages.
        trainable: Whether they are parameters; else buffers.
        state: "consistent" (codes = sums / counts), "zero" (never updated) or "stale" (of other codes).
    """

    counts: str
    sums: str
    shape: str
    turned: bool
    smoothed: bool
    decay: float
    trainable: bool
    state: str


@dataclass(frozen=True)
class Wiring:
    """A module without its numbers, and what is done to it.

    Attributes:
        seed: It was drawn from. dim: Of latents and codes. size: Codes of each codebook in the file.
        groups: The codebook of each stage; stages with the same number share one.
        paths: The module that holds the codebook, for each stage. Stages that share a codebook have it under several
            paths or under the same.
        leaf: Name of the codebook's tensor in that module. storage: "embedding", "parameter" or "buffer".
        layout: "rows" (K, dim), "columns" (dim, K) or "batched" (1, K, dim).
        padded: Whether a last row is a padding that is never chosen.
        steps: From stored rows to effective codes.
        cosine: Whether the nearest code is that of the largest cosine.
        average: EMA state, or None.
        unknown: What the package cannot know: "matrix", "scale", "shift", "counts", "rows"; else empty.
        companion: Name of an unknown companion, in the codebook's module.
        dtype: Of the file. prefix: Before every key of it.
        encoder: Name of the encoder. decoder: Of the decoder.
        bounded: Whether a tanh follows the encoder.
        walks: Whether the module has `walk` and `codebooks`. quantizes: Whether it has `quantize`.
        straight: Whether its quantizer returns latents + (quantized - latents) in evaluation mode, too.
        detached: Whether the package gets latents from files, and no network.
        metric: That the package is given; None leaves it to find out.
        strategy: Name of the surgery. options: Of it, by name. steps_of_training: Fine-tuning steps after it.
    """

    seed: int
    dim: int
    size: int
    groups: tuple[int, ...]
    paths: tuple[str, ...]
    leaf: str
    storage: str
    layout: str
    padded: bool
    steps: tuple[Step, ...]
    cosine: bool
    average: Average | None
    unknown: str
    companion: str
    dtype: str
    prefix: str
    encoder: str
    decoder: str
    bounded: bool
    walks: bool
    quantizes: bool
    straight: bool
    detached: bool
    metric: str | None
    strategy: str
    options: dict[str, Any]
    steps_of_training: int

    @property
    def books(self) -> int:
        """Number of codebooks, each of one or more stages."""
        return len(set(self.groups))

    @property
    def unit_codes(self) -> bool:
        """Whether codes are emitted at unit length."""
        return bool(self.steps) and self.steps[-1].kind == "unit"

    def key(self, stage: int) -> str:
        """State dict name of a stage's codebook."""
        return f"{self.paths[stage]}.{self.leaf}"

    def keys_of(self, group: int) -> list[str]:
        """All state dict names of a codebook."""
        return list(dict.fromkeys(self.key(stage) for stage, of in enumerate(self.groups) if of == group))

    def step_path(self, step: Step, stage: int = 0) -> str:
        """State dict name of a step's tensor, without `.weight` of a layer."""
        path = self.paths[stage].rpartition(".")[0] if step.above else self.paths[stage]
        return f"{path}.{step.name}".lstrip(".")


def wiring_from(plain: Mapping[str, Any]) -> Wiring:
    """The wiring of which `plain` is the dataclasses.asdict, after a way through JSON."""
    values = dict(plain)
    values["groups"], values["paths"] = tuple(values["groups"]), tuple(values["paths"])
    values["steps"] = tuple(Step(**step) for step in values["steps"])
    values["average"] = None if values["average"] is None else Average(**values["average"])
    return Wiring(**values)
