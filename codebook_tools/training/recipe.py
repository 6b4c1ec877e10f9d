"""The settings of a fine-tuning, declared without torch and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from codebook_tools.errors import CodebookError
from codebook_tools.runtime.options import Option

ALONE = 0.25
"""Fraction of the run for which the discriminator trains alone: its gradients before are noise."""

Loss = Literal["mse", "l1"]
"""Error of reconstructions: mean of squares, or of absolute values."""

_option = partial(Option, panel="Fine-tuning")


@dataclass(frozen=True)
class FineTune:
    """How encoder, decoder and codes are trained on. Each field but `batch_size` is an option of the command line.

    Attributes:
        steps: Optimizer steps; 0 for no fine-tuning.
        train: The networks that train.
        codebook_update: How the codes move: codebook EMA with revival of dead codes, gradients, or not at all. Where
            networks train, gradients are those of the codebook loss; where none does, those of the reconstruction.
        batch_size: Items to a batch.
        augment: What is made of the items to train on: pictures are mirrored left to right in every other epoch.
        optimizer: What moves the kernels of the network; Adam moves everything else. "auto" is Muon where there are
            any, and Adam beside a discriminator, with which Muon was not measured.
        lr: Adam's learning rate after warm-up, for tensors of usual size; None for the one that suits the network
            (`learning_rate.py`), of which a quarter is taken where that made a model worse. Muon's updates are in
            proportion to it.
        loss: Of the reconstruction.
        perceptual: A file of VGG16's weights, or "auto", for LPIPS; None for none.
        adversarial: Whether a discriminator of patches trains along.
        distill: Weight of the distance to what the original model reconstructs.
        entropy: Weight of how undecided latents are about their codes, and how unevenly they choose.
        accumulate: Batches to a step, whose gradients are accumulated.
        clip: Largest norm of all gradients together; None for no limit.
        weight_ema: Decay of a moving average of all that gradients move, which is then validated and kept.
        patience: Evaluation steps without a lower validation error that end the run; None for no such end.
        min_usage: Share of the codes in use below which the run ends.

    Raises:
        CodebookError: A value is out of range, or two exclude each other.
    """

    steps: Annotated[int, Option("Fine-tuning steps. Left out: 1000; 0 without --data.", metavar="N")] = 1000
    train: Annotated[Literal["all", "decoder", "none"], _option("Which networks train.")] = "all"
    codebook_update: Annotated[
        Literal["ema", "gradient", "frozen"],
        _option("How the codes move; ema also revives dead ones, gradient with --train none suits the decoder."),
    ] = "ema"
    batch_size: int = 64
    augment: Annotated[
        Literal["mirror", "none"],
        _option("mirror: in every other epoch images are mirrored left to right; other data stay as they are."),
    ] = "mirror"
    optimizer: Annotated[
        Literal["auto", "adam", "muon"],
        _option("What moves the network's kernels; auto: muon, but not with a discriminator."),
    ] = "auto"
    lr: Annotated[
        float | None,
        _option("Adam's learning rate after warm-up. Left out: by the network's width and depth.", metavar="RATE"),
    ] = None
    loss: Annotated[Loss, _option("Error that reconstructions are trained on.")] = "mse"
    perceptual: Annotated[
        str | None, _option("Add LPIPS: VGG16's weights from torch's cache, or a file of them.", metavar="auto|FILE")
    ] = None
    adversarial: Annotated[
        bool,
        _option("Add a discriminator of patches, as VQGANs have; it first learns alone."),
    ] = False
    distill: Annotated[
        float, _option("Also stay near what the original model reconstructs; 1: as near.", metavar="WEIGHT")
    ] = 0.0
    entropy: Annotated[
        float, _option("Also make latents sure of their codes, and their choices even; 0.1, say.", metavar="WEIGHT")
    ] = 0.0
    accumulate: Annotated[int, _option("Batches to a step, where memory holds no larger ones.", metavar="N")] = 1
    clip: Annotated[
        float | None, _option("The most that the norm of all gradients may be. Left out: no limit.", metavar="NORM")
    ] = None
    weight_ema: Annotated[
        float | None, _option("Validate and keep a moving average of the weights, of 0.999 say.", metavar="DECAY")
    ] = None
    patience: Annotated[
        int | None,
        _option(
            "Stop after N evaluation steps without gain on validation data; they are a tenth of --steps apart.",
            metavar="N",
        ),
    ] = None
    min_usage: Annotated[
        float, _option("Stop where codes in use become fewer than SHARE of all. 0: never.", metavar="SHARE")
    ] = 0.0

    @property
    def by_muon(self) -> bool:
        """Whether Muon moves kernels."""
        return self.optimizer == "muon" or (self.optimizer == "auto" and not self.adversarial)

    @property
    def decoder_moves_codes(self) -> bool:
        """Whether codes follow the gradient of the reconstruction error, through a decoder that does not change."""
        return self.train == "none" and self.codebook_update == "gradient"

    @property
    def settled_from(self) -> int:
        """The first step at which all terms of the loss count."""
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
        if self.optimizer == "muon" and self.train == "none":
            raise CodebookError("optimizer=muon with train=none: no kernel trains; leave one out")
        if self.clip is not None and not (self.clip > 0 and math.isfinite(self.clip)):
            raise CodebookError(f"clip={self.clip} is no norm to keep gradients below; try --clip 1, or leave it out")
        if self.weight_ema is not None and not 0 <= self.weight_ema < 1:
            raise CodebookError(f"weight_ema={self.weight_ema} is not within 0 and 1; try --weight-ema 0.999")
        if not 0 <= self.min_usage <= 1:
            raise CodebookError(f"min_usage={self.min_usage} is no share of the codes; try --min-usage 0.5")
        if self.steps and self.train == "none" and self.codebook_update == "frozen":
            raise CodebookError("train=none with codebook_update=frozen leaves nothing to train; use --steps 0")
