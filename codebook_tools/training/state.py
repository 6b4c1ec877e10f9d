"""What is known of a run at a step: the figures of its trace, and the state that can be gone back to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import mean

from torch import Tensor

from codebook_tools.evaluation.figures import Measurement
from codebook_tools.models.model import Model


@dataclass(frozen=True)
class TracePoint:
    """One look at a run, over all validation images. loss: of the batch, None at step 0. used: codes, also those that
    are yet to be merged; revived: those so far; of all codebooks together. perplexity and distortion: the mean over
    codebooks. validation_loss: of all terms that compare pictures, None where the squared error stands for them."""

    step: int
    loss: float | None
    validation_mse: float
    used: int
    perplexity: float
    distortion: float
    revived: int
    validation_loss: float | None = None

    @property
    def error(self) -> float:
        return _error(self)

    @staticmethod
    def of(
        step: int, loss: float | None, found: Measurement, revived: int, validation_loss: float | None = None
    ) -> TracePoint:
        uses = found.codebooks
        perplexity, distortion = (mean(getattr(use, name) for use in uses) for name in ("perplexity", "distortion"))
        used = sum(use.used for use in uses)
        return TracePoint(step, loss, found.error, used, perplexity, distortion, revived, validation_loss)


@dataclass(frozen=True, eq=False)
class State:
    """Weights of a network and codes of its books at a step. revived: (size,) bool of each book, the codes that were
    moved to a latent up to then. validation_mse, validation_loss: as in the look at it."""

    step: int
    validation_mse: float
    weights: dict[str, Tensor] = field(repr=False)
    vectors: tuple[Tensor, ...] = field(repr=False)
    revived: tuple[Tensor, ...] = field(repr=False)
    validation_loss: float | None = None

    @property
    def error(self) -> float:
        return _error(self)

    @staticmethod
    def of(model: Model, point: TracePoint, revived: Iterable[Tensor]) -> State:
        """The model's as it is now. point: the look at it."""
        weights = {name: tensor.detach().cpu().clone() for name, tensor in model.network.state_dict().items()}
        vectors = tuple(book.vectors.detach().cpu().clone() for book in model.books)
        codes = tuple(codes.cpu().clone() for codes in revived)
        return State(point.step, point.validation_mse, weights, vectors, codes, point.validation_loss)

    def tensors(self) -> Tensors:
        """All of it, by name."""
        return joined({"weights": self.weights, "vectors": by_number(self.vectors), "revived": by_number(self.revived)})

    @staticmethod
    def of_tensors(point: TracePoint, tensors: Mapping[str, Tensor]) -> State:
        """The inverse of `tensors`, at the step of a look."""
        vectors, revived = (tuple(numbered(part(tensors, name))) for name in ("vectors", "revived"))
        weights = part(tensors, "weights")
        return State(point.step, point.validation_mse, weights, vectors, revived, point.validation_loss)

    def restore(self, model: Model) -> None:
        model.network.load_state_dict(self.weights)
        for book, vectors in zip(model.books, self.vectors, strict=True):
            book.vectors = vectors.to(model.device)


def is_better(one: TracePoint | State, other: TracePoint | State, settled_from: int) -> bool:
    """Whether a later state is to be kept in place of an earlier one: its error is lower, or not all terms of the loss
    counted in the other, as they do from that step on."""
    return other.step < settled_from <= one.step or one.error < other.error


def _error(of: TracePoint | State) -> float:
    """What chooses the state that is kept."""
    return of.validation_mse if of.validation_loss is None else of.validation_loss


@dataclass(frozen=True)
class Diverged:
    """step: the first whose loss, or network, was not finite. what: which tensor, or term of the loss, was not."""

    step: int
    what: str

    def __str__(self) -> str:
        return f"fine-tuning diverged at step {self.step}: {self.what}"


@dataclass(frozen=True, eq=False)
class FineTuned:
    """start: before the first step. best: the lowest validation error after it. trained: file keys of the parameters
    that took part, and groups: which networks they are. lr: Adam's, at the end of warm-up. diverged: where it
    did. stopped: why the run ended before its last step otherwise. collapsed: whether the best has lost codes that a
    guard was to keep. settled_from: as FineTune's. merged: as Training's."""

    start: State
    best: State
    trace: tuple[TracePoint, ...]
    trained: tuple[str, ...]
    groups: tuple[str, ...]
    lr: float
    diverged: Diverged | None
    stopped: str | None = None
    collapsed: bool = False
    settled_from: int = 0
    merged: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def gained(self) -> bool:
        """Whether the best is one to keep."""
        return is_better(self.best, self.start, self.settled_from) and not self.collapsed


Tensors = dict[str, Tensor]


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    return {f"{owner}/{name}": tensor for owner, its in parts.items() for name, tensor in its.items()}


def part(tensors: Mapping[str, Tensor], owner: str) -> Tensors:
    """What `joined` got from that owner."""
    start = f"{owner}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def by_number(tensors: Iterable[Tensor]) -> Tensors:
    return {str(i): tensor for i, tensor in enumerate(tensors)}


def numbered(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The inverse of `by_number`."""
    return [tensors[name] for name in sorted(tensors, key=int)]
