"""Recipes of fine-tuning that differ from the tool's own in one thing each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from changes import (
    adam_begins_again,
    adam_from,
    aligned,
    anchors,
    constant,
    cosine,
    diveq,
    encoder_later,
    faster_codes,
    reconstruction_alone,
    revive_alike,
    revive_by_splits,
    revived_as_well,
    rotation,
    rows_alike,
    soap,
)
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.strategies import Refit
from codebook_tools.training import learning_rate, trainer
from codebook_tools.training.losses import reconstruction
from codebook_tools.training.trainer import Trainer
from codebook_tools.workflows.session import Opened


@dataclass(frozen=True)
class Variant:
    """recipe: fields of FineTune. inside: what else is another in the library while it runs, by MODULE:NAME. before:
    called with the opened model and the seed, before any surgery."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    inside: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[Opened, int], None] | None = None

    @contextmanager
    def in_place(self, opened: Opened, seed: int) -> Iterator[None]:
        with ExitStack() as stack:
            for where, value in self.inside.items():
                module, _, name = where.partition(":")
                owner, _, attribute = name.rpartition(".")
                place = import_module(f"codebook_tools.{module}")
                stack.enter_context(patch.object(getattr(place, owner) if owner else place, attribute, value))
            if self.before:
                self.before(opened, seed)
            yield

    def settings(self) -> dict[str, str]:
        """What a row depends on: the library's own numbers, and what is changed in them."""
        inside = {where: _told(value) for where, value in (_library() | dict(self.inside)).items()}
        return {**inside, **{name: str(value) for name, value in self.recipe.items()}, "before": _told(self.before)}


NUMBERS = (
    "training.losses.reconstruction:COMMITMENT",
    "training.codebook_ema:DECAY",
    "training.codebook_ema:REVIVE_EVERY",
    "training.codebook_ema:DEAD_BELOW",
    "training.trainer:REVIVE_UNTIL",
    "training.optimizers:BETAS",
    "training.learning_rate:_LARGEST_RMS",
    "training.learning_rate:_RMS_OF_ONE_STEP",
    "training.learning_rate:_RMS_DECAY",
    "training.muon:MOMENTUM",
    "training.learning_rate:WARM_UP",
    "training.learning_rate:_MOVED",
)
"""Of the library's recipe, by MODULE:NAME: a row that was made with others is run again."""


def _library() -> dict[str, Any]:
    found = dict[str, Any]()
    for where in NUMBERS:
        module, _, name = where.partition(":")
        value: Any = import_module(f"codebook_tools.{module}")
        for part in name.split("."):
            value = getattr(value, part)
        found[where] = value
    return found


def _told(value: Any) -> str:
    return getattr(value, "__name__", str(value))


_COMMITMENT, _straight_through, _move = reconstruction.COMMITMENT, trainer.straight_through, Trainer.move


class ContinuousFirst:
    """The decoder gets latents in place of codes for the first share of a run; k-means on the latents then places the
    codes anew: "continuous first, discrete later" (arXiv 2605.06870).

    Attributes:
        share: Of the steps.
        commitment: Its weight until then.
    """

    def __init__(self, share: float, commitment: float) -> None:
        self.share, self.commitment, self.is_continuous = share, commitment, False

    def variant(self) -> Variant:
        inside = {
            "training.trainer:straight_through": self.straight_through,
            "training.trainer:Trainer.move": self.move,
        }
        return Variant(inside=inside, before=self.begin)

    def begin(self, opened: Opened, seed: int) -> None:
        self.is_continuous, reconstruction.COMMITMENT = True, self.commitment

    def straight_through(self, latents: Tensor, quantized: Tensor) -> Tensor:
        return latents if self.is_continuous else _straight_through(latents, quantized)

    @property
    def move(self) -> Callable[[Trainer, int], None]:
        def move(training: Trainer, step: int) -> None:
            _move(training, step)
            if step == round(self.share * training.recipe.steps):
                self.is_continuous, reconstruction.COMMITMENT = False, _COMMITMENT
                images = training.batches.images
                few = images.subset(images.items[: len(images) // 3])
                with training.evaluation_mode(), torch.no_grad():
                    rows = torch.cat(list(training.model.latents(few, 64)))
                for ema in training.codebooks:
                    ema.book.vectors = Refit(len(ema.usage))(ema.book.codebook, [rows], ema.usage).codebook.vectors
                    ema.begin(torch.bincount(nearest(rows, ema.book.codebook), minlength=len(ema.usage)))

        move.__name__ = f"continuous for {self.share}, commitment {self.commitment}"
        return move


RATES = (("half", 0.5), ("twice", 2.0), ("four times", 4.0))
VARIANTS = {
    "default": Variant(),
    # Which way the codes move.
    "codes by gradient, none revived": Variant({"codebook_update": "gradient"}),
    "codes by gradient, revived": Variant(
        {"codebook_update": "gradient"}, inside={"training.codebook_ema:CodebookEMA.update": revived_as_well}
    ),
    "codes by gradient, revived, their moments forgotten": Variant(
        {"codebook_update": "gradient"},
        inside={
            "training.codebook_ema:CodebookEMA.update": revived_as_well,
            "training.trainer:Trainer.move": adam_begins_again,
        },
    ),
    "codes by gradient, revived, at 10 times the rate": Variant(
        {"codebook_update": "gradient"},
        inside={
            "training.codebook_ema:CodebookEMA.update": revived_as_well,
            "training.optimizers:relative_rates": faster_codes(10),
        },
    ),
    "codes frozen": Variant({"codebook_update": "frozen"}),
    "codes alone": Variant({"train": "none"}),
    **{
        f"codes alone by the decoder, moved {moved}": Variant(
            {"train": "none", "codebook_update": "gradient"}, inside={"training.learning_rate:_CODES_MOVED": moved}
        )
        for moved in (0.003, 0.01, 0.03)
    },
    "decoder alone": Variant({"train": "decoder"}),
    **{
        f"decoder alone, at {name} the rate": Variant(
            {"train": "decoder"}, inside={"training.learning_rate:_MOVED": share * learning_rate._MOVED}
        )
        for name, share in RATES
    },
    "encoder frozen for a fifth": Variant(inside={"training.trainer:Trainer.move": encoder_later}),
    "codes aligned with the latents first": Variant(before=aligned),
    **{f"EMA decay {decay}": Variant(inside={"training.codebook_ema:DECAY": decay}) for decay in (0.9, 0.95, 0.99)},
    # Gradients through the quantizer.
    "rotation trick": Variant(inside={"training.trainer:straight_through": rotation}),
    "DiVeQ": Variant(
        {"codebook_update": "gradient"},
        inside={
            "training.trainer:straight_through": diveq(0.2),
            "training.losses.reconstruction:Reconstruction.__call__": reconstruction_alone,
            "training.codebook_ema:CodebookEMA.update": revived_as_well,
            "training.codebook_ema:DECAY": 0.8,
            "training.codebook_ema:DEAD_BELOW": 1 / 16,
            "training.trainer:REVIVE_EVERY": 1,
        },
    ),
    # Revival.
    "none revived": Variant(inside={"training.trainer:REVIVE_UNTIL": 0.0}),
    "revived alike": Variant(inside={"training.codebook_ema:CodebookEMA._revive": revive_alike}),
    "revived by splits": Variant(inside={"training.codebook_ema:CodebookEMA._revive": revive_by_splits}),
    "CVQ anchors": Variant(inside={"training.codebook_ema:CodebookEMA._revive": anchors}),
    **{f"revived every {n}": Variant(inside={"training.trainer:REVIVE_EVERY": n}) for n in (10, 50)},
    **{f"dead below {share}": Variant(inside={"training.codebook_ema:DEAD_BELOW": share}) for share in (0.03, 0.3)},
    **{f"revived until {share}": Variant(inside={"training.trainer:REVIVE_UNTIL": share}) for share in (0.5, 0.9)},
    # The images.
    "none mirrored": Variant({"augment": "none"}),
    # The loss.
    **{
        f"commitment {w}": Variant(inside={"training.losses.reconstruction:COMMITMENT": w})
        for w in (0.1, 0.25, 1.0, 4.0)
    },
    "entropy 0.1": Variant({"entropy": 0.1}),
    # The optimiser.
    **{
        f"{name} the rate": Variant(inside={"training.learning_rate:_MOVED": share * learning_rate._MOVED})
        for name, share in RATES
    },
    **{f"warm-up {n}": Variant(inside={"training.learning_rate:WARM_UP": n}) for n in (1, 100)},
    **{
        f"cosine decay to {share}": Variant(inside={"training.trainer:schedule": cosine(share)})
        for share in (0.05, 1.0)
    },
    **{f"Adam's second decay {b}": Variant(inside={"training.optimizers:BETAS": (0.9, b)}) for b in (0.95, 0.999)},
    "Adam": Variant({"optimizer": "adam"}),
    **{
        f"Adam from {share}": Variant(inside={"training.trainer:Trainer.move": adam_from(share)})
        for share in (0.5, 0.8)
    },
    **{f"Muon's momentum {m}": Variant(inside={"training.muon:MOMENTUM": m}) for m in (0.9, 0.95, 0.98)},
    **{
        f"Muon's updates {rms}": Variant(inside={"training.optimizers:muon_rms": constant(rms)})
        for rms in (0.05, 0.1, 0.2, 0.3, 0.4)
    },
    **{
        f"SOAP at {times} times the rate": Variant(inside={"training.optimizers:Muon": soap(times)})
        for times in (0.3, 1.0, 3.0)
    },
    "Muon, rows alike": Variant(inside={"training.muon:Muon.step": rows_alike}),
    **{
        f"continuous for {share}, commitment {weight}": ContinuousFirst(share, weight).variant()
        for share in (0.3, 0.5)
        for weight in (0.0, 0.1, 1.0)
    },
    "average of weights 0.98": Variant({"weight_ema": 0.98}),
}
"""One thing changed at a time. Those that name the tool's own number are the same as the default."""
