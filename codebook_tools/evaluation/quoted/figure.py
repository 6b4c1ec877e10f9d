"""A quoted figure: what it adds up of a batch. And the accumulator of several, which are opened together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib import import_module

import torch
from torch import Tensor

from codebook_tools.data.modality import Modality
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.exact import exact
from codebook_tools.evaluation.one_pass import Accumulator, Batch
from codebook_tools.evaluation.quoted.registry import QUOTED, Metrics
from codebook_tools.evaluation.quoted.tally import Tally
from codebook_tools.evaluation.quoted.weights import Weights
from codebook_tools.models.model import Model
from codebook_tools.runtime import distributed


class QuotedFigure(ABC):
    """One of the figures. It is made before any pass, and refuses then what it cannot measure."""

    def __init__(self, name: str, modality: Modality, weights: Weights | None, device: torch.device, seed: int) -> None:
        """
        Args:
            name: As --metrics has it.
            modality: How the network takes the data.
            weights: Of its network; None where it has none.
            device: Where its network runs.
            seed: Of what it draws.
        """
        self.name, self.modality, self.device, self.seed = name, modality, device, seed
        self.sha256: str | None = None  # of the weights

    def begin(self, model: Model) -> None:  # noqa: B027 (most have nothing to do)
        """Get ready for a pass with the codebooks as they are."""

    @abstractmethod
    def tally(self, batch: Batch, model: Model) -> Tally:
        """The sums of a batch with reconstructions."""


class ItemMean(QuotedFigure):
    """A mean over items."""

    @abstractmethod
    def scores(self, media: Tensor, reconstructed: Tensor) -> Tensor:
        """(n,) scores of items, on their device; nan where the figure is not defined."""

    def tally(self, batch: Batch, model: Model) -> Tally:
        assert batch.media is not None
        media, reconstructed = batch.media
        scores = self.scores(media.to(reconstructed.device), reconstructed).cpu().double()
        defined = scores[~scores.isnan()]
        total = sum(map(exact, defined.tolist()), Fraction(0))
        return Tally(len(defined), len(scores) - len(defined), total)


class Tallies(Accumulator):
    """The sums of several figures.

    Attributes:
        done: By name of the figure.
    """

    def __init__(self, figures: Sequence[QuotedFigure], model: Model) -> None:
        self._figures, self._model = figures, model
        self.done = {figure.name: Tally() for figure in figures}
        for figure in figures:
            figure.begin(model)

    def add(self, batch: Batch) -> None:
        """Add the sums of a batch."""
        with torch.no_grad():
            for figure in self._figures:
                self.done[figure.name] += figure.tally(batch, self._model)

    def merge(self) -> None:
        """All-reduce the sums."""
        for name, tally in self.done.items():
            length = max(distributed.each(len(tally.packed()[0])))  # a process without data has no moments yet
            integers, floats = tally.packed()
            padded = torch.nn.functional.pad(integers, (0, length - len(integers)))
            self.done[name] = Tally.unpacked(distributed.summed(padded), distributed.summed(floats))


def open_figures(chosen: Metrics, modality: Modality, device: torch.device, seed: int) -> tuple[QuotedFigure, ...]:
    """The figures that were asked for, with their libraries and weights loaded.

    Raises:
        CodebookError: One does not apply to these data, or a library or weights are missing.
    """
    for name in chosen:
        entry = QUOTED[name]
        if entry.modality not in (None, modality.name):
            raise CodebookError(f"--metrics {name} is of {entry.kinds}; these data are {modality.many}: leave it out")
    figures = list[QuotedFigure]()
    for name, file in chosen.items():
        entry = QUOTED[name]
        module, _, kind = entry.place.partition(":")
        made = getattr(import_module(f"{__package__}.{module}"), kind)
        weights = Weights(name, file) if entry.weights else None
        figures.append(made(name, modality, weights, device, seed))
    return tuple(figures)


def weights_by_name(figures: Sequence[QuotedFigure]) -> Mapping[str, str | None]:
    """SHA-256 of the weights of each figure by name; None of one without."""
    return {figure.name: figure.sha256 for figure in figures}
