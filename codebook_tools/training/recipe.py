"""The settings of a fine-tuning, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from codebook_tools.errors import CodebookError
from codebook_tools.training.losses.reconstruction import Loss

ALONE = 0.25
"""Share of the run for which a discriminator only learns: what it says before is noise."""


@dataclass(frozen=True)
class FineTune:
    """steps: of the optimiser, 0 for none. train: which networks. codebook_update: how the codes move; `ema` also
    revives dead ones. batch_size: images. lr: Adam's, at the end of warm-up, of tensors of usual size; None for
    the one that suits the network (learning_rate.py). loss: of the reconstruction.

    perceptual: a file of VGG16's weights, or "auto"; None for no LPIPS. adversarial: a discriminator trains along.
    distill: weight of the distance to what the original model reconstructs. entropy: of how undecided latents are
    about codes, and how unevenly they choose.

    accumulate: batches to a step. clip: the most that the norm of all gradients may be. weight_ema: decay of a moving
    average of all that gradients move; it is then what is validated and kept. patience: looks without a lower
    validation error that end the run. min_usage: share of the codes; to fall below it ends the run, too.
    """

    steps: int = 1000
    train: Literal["all", "decoder", "none"] = "all"
    codebook_update: Literal["ema", "gradient", "frozen"] = "ema"
    batch_size: int = 64
    lr: float | None = None
    loss: Loss = "mse"
    perceptual: str | None = None
    adversarial: bool = False
    distill: float = 0.0
    entropy: float = 0.0
    accumulate: int = 1
    clip: float | None = None
    weight_ema: float | None = None
    patience: int | None = None
    min_usage: float = 0.0

    @property
    def settled_from(self) -> int:
        """The step from which on all terms of the loss count."""
        return round(ALONE * self.steps) + 1 if self.adversarial else 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("accumulate", 1), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise CodebookError(f"{name}={value} is below {least}")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise CodebookError(f"lr={self.lr} is no learning rate; try --lr 0.001, or leave it out")
        for name, such_as in (("distill", "1"), ("entropy", "0.1")):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise CodebookError(f"{name}={value} is no weight; try --{name} {such_as}")
        if self.adversarial and self.train == "none":
            raise CodebookError("adversarial with train=none: no decoder is there to learn from it; leave one out")
        if self.clip is not None and not (self.clip > 0 and math.isfinite(self.clip)):
            raise CodebookError(f"clip={self.clip} is no norm to keep gradients below; try --clip 1, or leave it out")
        if self.weight_ema is not None and not 0 <= self.weight_ema < 1:
            raise CodebookError(f"weight_ema={self.weight_ema} is not within 0 and 1; try --weight-ema 0.999")
        if not 0 <= self.min_usage <= 1:
            raise CodebookError(f"min_usage={self.min_usage} is no share of the codes; try --min-usage 0.5")
        if self.steps and self.train == "none" and self.codebook_update == "frozen":
            raise CodebookError("train=none with codebook_update=frozen leaves nothing to train; use --steps 0")
