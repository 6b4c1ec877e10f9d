"""`codebook finetune`."""

from __future__ import annotations

from typing import Any

from ..operate import operate_on
from ..options import DATA, FIGURES, LONG_RUN, MODEL, TRAIN, WRITE, ModelArgument, command


@command(
    "Operate",
    "codebook finetune model.safetensors --data images/ --steps 2000",
    *(DATA, FIGURES, MODEL, TRAIN, WRITE, LONG_RUN),
)
def finetune(options: dict[str, Any], model: ModelArgument = None) -> None:
    """Train on with the original encoder and decoder; the codebook keeps its size, and dead codes are revived."""
    operate_on("finetune", model, None, options)
