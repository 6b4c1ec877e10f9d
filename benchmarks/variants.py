"""Recipes of fine-tuning that differ from the tool's own in one thing each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from codebook_tools.clustering.assignment import nearest
from codebook_tools.strategies import Refit
from codebook_tools.training import learning_rate, trainer
from codebook_tools.training.codebook_ema import DEAD_BELOW, CodebookEMA
from codebook_tools.training.losses import reconstruction
from codebook_tools.training.muon import Muon
from codebook_tools.training.parameters import trained_names
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


def rotation(latents: Tensor, quantised: Tensor) -> Tensor:
    """quantised, with gradients that are turned and scaled as latents are on their way to it: Fifty et al. 2024,
    "Restructuring Vector Quantization with the Rotation Trick" (arXiv 2410.06424), equation 4."""
    x, y = latents.movedim(1, -1), quantised.detach().movedim(1, -1)
    from_, to = functional.normalize(x.detach(), dim=-1), functional.normalize(y, dim=-1)
    middle = functional.normalize(from_ + to, dim=-1)
    scale = y.norm(dim=-1, keepdim=True) / x.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    turned = x - 2 * (x * middle).sum(-1, keepdim=True) * middle + 2 * (x * from_).sum(-1, keepdim=True) * to
    found: Tensor = (turned * scale).movedim(-1, 1)
    return found


def _placed(ema: CodebookEMA, dead: Tensor, vectors: Tensor) -> None:
    """As the tool places revived codes, at other vectors."""
    mean = 1 / len(ema.usage)
    ema.book.vectors[dead] = vectors
    ema.usage[dead] = mean
    ema.sums[dead] = vectors * mean
    ema.revived[dead.cpu()] = True


def _dead(ema: CodebookEMA) -> Tensor:
    return (ema.usage < DEAD_BELOW / len(ema.usage)).nonzero()[:, 0]


def revive_alike(ema: CodebookEMA, rows: Tensor, codes: Tensor) -> None:
    """Dead codes go to latents of the batch, all as likely."""
    dead = _dead(ema)
    _placed(ema, dead, rows[torch.randint(len(rows), (len(dead),), generator=ema.random)])


def revive_by_splits(ema: CodebookEMA, rows: Tensor, codes: Tensor) -> None:
    """Dead codes go beside the most used ones, and share with them (Linde, Buzo and Gray 1980)."""
    dead = _dead(ema)
    most = ema.usage.argsort(descending=True)[: len(dead)]
    noise = torch.randn(len(dead), rows.shape[1], generator=ema.random) * rows.std(0) * 0.01
    vectors, half = ema.book.vectors[most], ema.usage[most] / 2
    _placed(ema, dead, vectors + noise)
    for at in (dead, most):
        ema.usage[at] = half
        ema.sums[at] = ema.book.vectors[at] * half[:, None]


def anchors(ema: CodebookEMA, rows: Tensor, codes: Tensor) -> None:
    """All codes move towards the latents nearest to them, the less they are used the further: CVQ-VAE, Zheng and
    Vedaldi 2023, "Online Clustered Codebook" (arXiv 2307.15139), equations 4 to 6."""
    size, epsilon = len(ema.usage), 1e-3
    decay = torch.exp(-ema.usage * size * 10 / (1 - 0.99) - epsilon)[:, None]
    closest = torch.cdist(ema.book.vectors, rows).argmin(1)
    ema.book.vectors = ema.book.vectors * (1 - decay) + rows[closest] * decay
    ema.sums = ema.book.vectors * ema.usage[:, None]


_COMMITMENT, _straight_through = reconstruction.COMMITMENT, trainer.straight_through
_muon_step = Muon.step
_move, _update, _relative_rates = Trainer.move, CodebookEMA.update, learning_rate.relative_rates


def encoder_later(training: Trainer, step: int) -> None:
    """The encoder stays as it is for the first fifth of the run, and then moves further with each step for a while, as
    all does in the beginning."""
    of_decoder, fifth = _of_decoder(training), training.recipe.steps // 5
    encoder = [its for name, its in training.model.network.named_parameters() if name not in of_decoder]
    before = [parameter.detach().clone() for parameter in encoder]
    if step <= fifth:
        for parameter in encoder:
            parameter.grad = None  # Adam passes it over
    _move(training, step)
    if fifth < step < fifth + learning_rate.WARM_UP:
        for parameter, old in zip(encoder, before, strict=True):
            parameter.detach().copy_(old.lerp(parameter.detach(), (step - fifth) / learning_rate.WARM_UP))


def _of_decoder(training: Trainer) -> set[str]:
    if not hasattr(training, "of_decoder"):
        model = deepcopy(training.model)  # asking turns gradients on
        training.of_decoder = trained_names(model, training.batches.stand_in, ("decoder",))  # type: ignore[attr-defined]
    found: set[str] = training.of_decoder  # type: ignore[attr-defined]
    return found


def revived_as_well(ema: CodebookEMA, latents: Tensor, codes: Tensor, revive: bool) -> None:
    """Codes that gradients move are revived, too."""
    parameter = ema.book.vectors
    _update(ema, latents, codes, revive)
    if revive:
        with torch.no_grad():
            ema._revive(latents.movedim(1, -1).flatten(0, -2), codes.flatten())
            parameter.copy_(ema.book.vectors)
        ema.book.vectors = parameter


def adam_begins_again(training: Trainer, step: int) -> None:
    """Of codes that were revived, Adam forgets what it knew."""
    before = [parameter.detach().clone() for parameter in training.parameters]
    _move(training, step)
    for parameter, old in zip(training.parameters, before, strict=True):
        if any(parameter is book.vectors for book in training.model.books):
            moved = (parameter.detach() - old).norm(dim=1) > 0.1 * old.norm(dim=1).mean()  # no step of Adam goes so far
            for moment in ("exp_avg", "exp_avg_sq"):
                training.optimizers["adam"].state[parameter][moment][moved] = 0


def faster_codes(times: float) -> Callable[[Sequence[Tensor]], list[float]]:
    """The codes, which are the last parameters where gradients move them, learn so many times as fast."""

    def rates(parameters: Sequence[Tensor]) -> list[float]:
        *others, codes = _relative_rates(parameters)
        return [*others, times * codes]

    rates.__name__ = f"faster_codes({times})"
    return rates


def constant(rms: float) -> Callable[[int], float]:
    """The same size of Muon's updates whatever the number of steps."""

    def muon_rms(steps: int) -> float:
        return rms

    muon_rms.__name__ = f"constant({rms})"
    return muon_rms


def adam_from(share: float) -> Callable[[Trainer, int], None]:
    """Adam moves the kernels, too, after so much of the run."""

    def move(training: Trainer, step: int) -> None:
        if "muon" in training.optimizers and step > share * training.recipe.steps:
            for group in training.optimizers.pop("muon").param_groups:
                training.optimizers["adam"].add_param_group({"params": group["params"], "share": group["share"]})
        _move(training, step)

    move.__name__ = f"adam_from({share})"
    return move


def cosine(floor: float) -> Callable[[int, int], float]:
    """Linear warm-up, then cosine decay to a fraction of the rate; 1 for a constant rate."""

    def schedule(step: int, steps: int) -> float:
        warm_up = learning_rate.WARM_UP
        if step < warm_up:
            return (step + 1) / warm_up
        return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2

    schedule.__name__ = f"cosine({floor})"
    return schedule


def rows_alike(muon: Muon, closure: None = None) -> None:
    """Muon whose updates have rows of like size: NorMuon, Li et al. 2025 (arXiv 2510.05491), algorithm 1."""
    kernels = [kernel for group in muon.param_groups for kernel in group["params"]]
    before = [kernel.detach().clone() for kernel in kernels]
    _muon_step(muon)
    for kernel, old in zip(kernels, before, strict=True):
        update = kernel.detach() - old
        squares = update.flatten(1).square().mean(1)
        if not squares.any():
            continue
        shares = squares / squares.mean()
        average = muon.state[kernel].setdefault("rows", shares.clone()).lerp_(shares, 0.05)
        even = update / average.sqrt().clamp(min=1e-4).view(-1, *[1] * (kernel.ndim - 1))
        kernel.detach().copy_(old + even * (update.norm() / even.norm()))


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


def aligned(opened: Opened, seed: int) -> None:
    """The codes get the mean and the variance of the latents that choose them, dimension by dimension."""
    model = opened.model
    book, few = model.books[0], opened.calibration.subset(opened.calibration.items[:512])
    rows = torch.cat(list(model.latents(few, 64)))
    chosen = book.vectors[nearest(rows, book.codebook)]
    stretch = rows.std(0) / chosen.std(0).clamp(min=1e-6)
    book.vectors = (book.vectors - chosen.mean(0)) * stretch + rows.mean(0)


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
    "Muon, rows alike": Variant(inside={"training.muon:Muon.step": rows_alike}),
    **{
        f"continuous for {share}, commitment {weight}": ContinuousFirst(share, weight).variant()
        for share in (0.3, 0.5)
        for weight in (0.0, 0.1, 1.0)
    },
    "average of weights 0.98": Variant({"weight_ema": 0.98}),
}
"""One thing changed at a time. Those that name the tool's own number are the same as the default."""
