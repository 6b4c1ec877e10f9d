"""The state of a run at an evaluation step: the figures of its trace, and the tensors to restore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import mean

from torch import Tensor

from codebook_tools.evaluation.figures import Measurement
from codebook_tools.models.model import Model


@dataclass(frozen=True)
class TracePoint:
    """One evaluation of a run, over all validation items.

    Attributes:
        step: Optimizer steps so far.
        loss: Training loss of the step; None at step 0.
        validation_mse: Mean squared error of the reconstructions.
        used: Codes in use of all codebooks together, extra codes included.
        perplexity: Mean over codebooks.
        distortion: Mean over codebooks.
        revived: Codes revived so far, of all codebooks together.
        validation_loss: Sum of the loss terms that compare pictures; None where `validation_mse` stands for them.
    """

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
        """The validation error that chooses the best state."""
        return _error(self)

    @staticmethod
    def of(
        step: int, loss: float | None, measured: Measurement, revived: int, validation_loss: float | None = None
    ) -> TracePoint:
        """The point of a measurement."""
        uses = measured.codebooks
        perplexity, distortion = (mean(getattr(use, name) for use in uses) for name in ("perplexity", "distortion"))
        used = sum(use.used for use in uses)
        return TracePoint(step, loss, measured.error, used, perplexity, distortion, revived, validation_loss)


@dataclass(frozen=True, eq=False)
class State:
    """Weights and codes of a model at a step, on the CPU.

    Attributes:
        step: Optimizer steps so far.
        validation_mse: As in the trace.
        weights: The network's state dict.
        vectors: (size, dim) of each book.
        revived: (size,) bool of each book, the codes that were moved to a latent so far.
        validation_loss: As in the trace.
    """

    step: int
    validation_mse: float
    weights: dict[str, Tensor] = field(repr=False)
    vectors: tuple[Tensor, ...] = field(repr=False)
    revived: tuple[Tensor, ...] = field(repr=False)
    validation_loss: float | None = None

    @property
    def error(self) -> float:
        """The validation error that chooses the best state."""
        return _error(self)

    @staticmethod
    def of(model: Model, point: TracePoint, revived: Iterable[Tensor]) -> State:
        """A copy of the model's state, which was evaluated as `point`."""
        weights = {name: tensor.detach().cpu().clone() for name, tensor in model.network.state_dict().items()}
        vectors = tuple(book.vectors.detach().cpu().clone() for book in model.books)
        codes = tuple(codes.cpu().clone() for codes in revived)
        return State(point.step, point.validation_mse, weights, vectors, codes, point.validation_loss)

    def tensors(self) -> Tensors:
        """All tensors by name."""
        return joined({"weights": self.weights, "vectors": by_number(self.vectors), "revived": by_number(self.revived)})

    @staticmethod
    def of_tensors(point: TracePoint, tensors: Mapping[str, Tensor]) -> State:
        """The inverse of `tensors`, for the state that was evaluated as `point`."""
        vectors, revived = (tuple(numbered(part(tensors, name))) for name in ("vectors", "revived"))
        weights = part(tensors, "weights")
        return State(point.step, point.validation_mse, weights, vectors, revived, point.validation_loss)

    def restore(self, model: Model) -> None:
        """Put the state into a model."""
        model.network.load_state_dict(self.weights)
        for book, vectors in zip(model.books, self.vectors, strict=True):
            book.vectors = vectors.to(model.device)


def is_better(one: TracePoint | State, other: TracePoint | State, settled_from: int) -> bool:
    """Whether a later state replaces an earlier one.

    Args:
        one: The later state.
        other: The earlier state.
        settled_from: The first step at which all terms of the loss count: a state from before is always replaced.
    """
    return other.step < settled_from <= one.step or one.error < other.error


def _error(of: TracePoint | State) -> float:
    return of.validation_mse if of.validation_loss is None else of.validation_loss


@dataclass(frozen=True)
class Diverged:
    """Where a run diverged.

    Attributes:
        step: The first step whose loss or network was not finite.
        what: Which tensor, or term of the loss, was not, as a sentence.
    """

    step: int
    what: str

    def __str__(self) -> str:
        return f"fine-tuning diverged at step {self.step}: {self.what}"


@dataclass(frozen=True, eq=False)
class FineTuned:
    """The result of a fine-tuning.

    Attributes:
        start: The state before the first step.
        best: The state with the lowest validation error after it.
        trace: All evaluations.
        trained: File keys of the parameters that trained.
        groups: The halves of the network that trained.
        lr: The learning rate after warm-up.
        optimizer: What moved the network's kernels.
        augment: What was made of the items to train on.
        diverged: Where the run diverged; None if it did not.
        begun: The step after which it began again from the start at a lower rate; 0 if it did not.
        stopped: Why the run ended early otherwise; None if it did not.
        collapsed: Whether even the best state is below `min_usage`.
        settled_from: As FineTune's.
        merged: As Trainer's.
    """

    start: State
    best: State
    trace: tuple[TracePoint, ...]
    trained: tuple[str, ...]
    groups: tuple[str, ...]
    lr: float
    optimizer: str
    augment: str
    diverged: Diverged | None
    begun: int = 0
    stopped: str | None = None
    collapsed: bool = False
    settled_from: int = 0
    merged: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def gained(self) -> bool:
        """Whether the best state is better than the start, and has kept its codes."""
        return is_better(self.best, self.start, self.settled_from) and not self.collapsed


Tensors = dict[str, Tensor]


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    """One mapping of several, with names OWNER/NAME."""
    return {f"{owner}/{name}": tensor for owner, tensors in parts.items() for name, tensor in tensors.items()}


def part(tensors: Mapping[str, Tensor], owner: str) -> Tensors:
    """The mapping that `joined` had of an owner."""
    start = f"{owner}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def by_number(tensors: Iterable[Tensor]) -> Tensors:
    """The tensors by their index as text."""
    return {str(i): tensor for i, tensor in enumerate(tensors)}


def numbered(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The inverse of `by_number`."""
    return [tensors[name] for name in sorted(tensors, key=int)]
