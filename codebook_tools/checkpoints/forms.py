"""What becomes of a stored row before it is a code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StepKind = Literal["matrix", "matrix-transposed", "scale", "one-plus-scale", "shift", "unit"]
"""What one step does to rows (n, dim): `rows @ M.T`, `rows @ M`, `rows * s`, `rows * (1 + s)`, `rows + t`; and,
without a tensor, before all others: `rows / |rows|`."""


@dataclass(frozen=True)
class Effective:
    """kind: how a stored row becomes a code of `dim` numbers; beside: the keys of the tensors that this takes.

    "rows": it is the code. "ratio": row / count, beside the counts, as in Mimi. "projected": W row + b, beside W and,
    if there is one, b, as in SimVQ and VQGAN-LC. "network": through other layers, beside their weights: we cannot.
    "steps": through the tensors beside, one after another, each as `steps` says; confirmed by the model's quantizer.
    "opaque": by the model's own code alone, one row to one code.
    padding: how many rows are stored after the last code, as in RQ-VAE.
    """

    kind: Literal["rows", "ratio", "projected", "network", "steps", "opaque"]
    beside: tuple[str, ...]
    dim: int
    padding: int
    steps: tuple[StepKind, ...] = ()

    @property
    def unit_first(self) -> bool:
        """Whether rows are brought to unit length before all other steps."""
        return self.steps[:1] == ("unit",)

    @property
    def with_tensors(self) -> tuple[StepKind, ...]:
        """The steps that take the tensors of `beside`, one each."""
        return self.steps[self.unit_first :]
