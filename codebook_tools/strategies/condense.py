"""Condensing: fine-tuning starts with more codes than asked for, and merges them on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from codebook_tools.codebook import Codebook, Latents, Surgery
from codebook_tools.runtime.options import Option
from codebook_tools.strategies._validation import check_k
from codebook_tools.strategies.grow import Grow, grown
from codebook_tools.strategies.quantize import Quantize

if TYPE_CHECKING:
    from torch import Tensor

_TIMES = 4  # as many codes as are asked for, at first
_AT_MOST = 16_384  # codes at first: more make each step longer, and merging them takes a minute


@dataclass(frozen=True)
class Condense:
    """k codes: those in use, merged as pairs of nearest neighbors, or with more drawn by error where they are fewer.

    A fine-tuning starts with the codes in use and, up to four times k, latents drawn by squared error; it merges them
    into k on the way. More codes mean less quantization noise to learn from, and merging keeps most of the gain.

    Attributes:
        k: Size of the new codebook.
        seed: Of the drawing.
    """

    summary: ClassVar = "Fine-tune with up to four times as many codes, and merge them into K on the way."
    example: ClassVar = "codebook condense model.safetensors --k 128 --data images/"
    trains: ClassVar = True

    k: Annotated[int, Option("Codes of the new codebook.", metavar="K", names=("--k", "-k"))]
    seed: int = 0

    def __post_init__(self) -> None:
        check_k(self.k)

    def __call__(self, codebook: Codebook, latents: Latents, counts: Tensor) -> Surgery:
        """Merge the codes in use into k, or add latents up to k where fewer are in use."""
        in_use = int((counts > 0).sum())
        if in_use > self.k:
            surgery = Quantize(k=self.k, method="pnn")(codebook, latents, counts)
        else:
            surgery = Grow(self.k, self.seed)(codebook, latents, counts)
        size = max(in_use, min(_TIMES * self.k, _AT_MOST))
        first = grown(codebook, latents, counts, size, self.seed)
        return replace(surgery, first=first) if first.codebook.size > self.k else surgery
