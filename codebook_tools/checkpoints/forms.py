"""How a stored row becomes a code, as data: without torch and without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StepKind = Literal["matrix", "matrix-transposed", "scale", "one-plus-scale", "shift", "unit"]
"""What one step does to rows (n, dim): `rows @ M.T`, `rows @ M`, `rows * s`, `rows * (1 + s)`, `rows + t`; and
`rows / |rows|`, which takes no tensor and precedes all others."""


@dataclass(frozen=True)
class Effective:
    """How stored rows become codes.

    Attributes:
        kind: "rows": a row is the code. "ratio": row / count, as in Mimi. "projected": W row + b, as in SimVQ and
            VQGAN-LC. "network": through several layers, which this package cannot invert. "steps": through the tensors
            of `beside` one after another, confirmed by the model's quantizer. "opaque": by the model's own code alone,
            one row to one code.
        beside: Keys of the tensors that this takes: the counts; W and, where there is one, b; the layers' weights; a
            tensor a step.
        dim: Numbers of a code, which may differ from those of a stored row.
        padding: Rows that are stored after the last code, as in RQ-VAE.
        steps: What each step of kind "steps" does.
    """

    kind: Literal["rows", "ratio", "projected", "network", "steps", "opaque"]
    beside: tuple[str, ...]
    dim: int
    padding: int
    steps: tuple[StepKind, ...] = ()

    @property
    def unit_first(self) -> bool:
        """Whether rows are normalized to unit length before all other steps."""
        return self.steps[:1] == ("unit",)

    @property
    def with_tensors(self) -> tuple[StepKind, ...]:
        """The steps that take the tensors of `beside`, one each."""
        return self.steps[self.unit_first :]
