"""Other quantizers in the place of ours: those of vector-quantize-pytorch, in the tool's own fine-tuning.

Checkpoint, batches, steps, optimizer, schedule, reconstruction loss and evaluation are the tool's. A peer brings its
codebook and how that moves, its commitment loss in the units of its latents, and the gradients that pass through it.
peer_rows.py runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import SimVQ, VectorQuantize  # type: ignore[import-untyped]

from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import EUCLIDEAN, Metric
from codebook_tools.data.dataset import Media
from codebook_tools.evaluation.figures import Measurement
from codebook_tools.evaluation.measure import measure
from codebook_tools.models.model import Model
from codebook_tools.runtime.devices import sent
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.history import History
from codebook_tools.training.learning_rate import evaluation_steps, relative_rates
from codebook_tools.training.recipe import FineTune
from codebook_tools.training.state import TracePoint
from codebook_tools.training.trainer import Trainer
from codebook_tools.workflows.session import Opened


@dataclass(frozen=True)
class Peer:
    """make: (rows (n, dim) of the first batch, K, **settings) -> a module that maps (n, positions, dim) to what the
    decoder gets, codes and a loss, with the property `codebook`. metric: how its codes are searched and emitted.
    optimizer: of the kernels of encoder and decoder."""

    make: Callable[..., nn.Module]
    settings: Mapping[str, Any]
    metric: Metric = EUCLIDEAN
    optimizer: Literal["auto", "adam"] = "auto"

    def recipe(self, steps: int) -> FineTune:
        return FineTune(steps=steps, optimizer=self.optimizer)

    def quantizer(self, rows: Tensor, k: int) -> nn.Module:
        return self.make(rows, k, **self.settings)

    def described(self) -> str:
        """The call that makes it."""
        words = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.make.__name__}({words})"


def vector_quantize(rows: Tensor, k: int, **settings: Any) -> nn.Module:
    """With k-means of the rows as its codebook: its own, which else would run in its first forward pass."""
    quantizer: nn.Module = VectorQuantize(rows.shape[1], k, kmeans_init=True, **settings)
    quantizer(rows[None], freeze_codebook=True)
    return quantizer


def sim_vq(rows: Tensor, k: int) -> nn.Module:
    """With random codes, as the library makes them."""
    quantizer: nn.Module = SimVQ(rows.shape[1], k)
    return quantizer


def sim_vq_at_latents(rows: Tensor, k: int) -> nn.Module:
    """With rows as its frozen codes and the identity as its linear map, so that it begins among the latents."""
    identity = nn.Linear(rows.shape[1], rows.shape[1], bias=False)
    nn.init.eye_(identity.weight)
    drawn = rows[torch.randperm(len(rows))[:k]]
    quantizer: nn.Module = SimVQ(rows.shape[1], k, codebook_transform=identity, init_fn=lambda _: drawn)
    return quantizer


_EMA = {"threshold_ema_dead_code": 2, "rotation_trick": False}
_DIVEQ = {"directional_reparam": True, "threshold_ema_dead_code": 2}
PEERS = {
    "EMA 0.8": Peer(vector_quantize, {**_EMA, "decay": 0.8}),
    "EMA 0.99": Peer(vector_quantize, {**_EMA, "decay": 0.99}),
    "EMA 0.8, rotation trick": Peer(vector_quantize, {**_EMA, "decay": 0.8, "rotation_trick": True}),
    "EMA 0.99, rotation trick": Peer(vector_quantize, {**_EMA, "decay": 0.99, "rotation_trick": True}),
    "cosine": Peer(vector_quantize, {"use_cosine_sim": True, "threshold_ema_dead_code": 2}, COSINE_UNIT),
    "DiVeQ": Peer(vector_quantize, _DIVEQ),
    "SimVQ": Peer(sim_vq, {}),
    # Not in the README, but better for what it was not written for: a pretrained encoder, and few latents to a code.
    "SimVQ, begun at latents": Peer(sim_vq_at_latents, {}),
    "EMA 0.99, dead below 0.25": Peer(vector_quantize, {**_EMA, "decay": 0.99, "threshold_ema_dead_code": 0.25}),
    # With the optimizer that is usual, in the place of the tool's.
    "EMA 0.8, by Adam": Peer(vector_quantize, {**_EMA, "decay": 0.8}, optimizer="adam"),
    "DiVeQ, by Adam": Peer(vector_quantize, _DIVEQ, optimizer="adam"),
}
"""By name. The library's default is the rotation trick, which the cosine and SimVQ have, too. Its README's threshold of
2 is latents to a code in a batch; at K=4,096 there is 1 here, so that nearly all codes are replaced in each step."""


class PeerTrainer(Trainer):
    """The tool's trainer with a peer's quantizer. Its effective codes are always those of the model's one book.

    Attributes:
        quantizer: The peer's.
    """

    def __init__(
        self, peer: Peer, k: int, times: float, model: Model, train: Media, recipe: FineTune, seed: int
    ) -> None:
        """times: of the tool's learning rate."""
        (book,) = model.books
        super().__init__(model, train, recipe, [torch.ones(book.codebook.size)], seed, {}, {})
        self.lr *= times
        self.codebooks = []  # the peer's moves by itself
        first = next(self._coming)
        self._coming = chain([first], self._coming)
        with torch.no_grad():
            rows = model.encode(sent(first[0], model.device), keep=False).movedim(1, -1).flatten(0, -2)
            self.quantizer = peer.quantizer(rows, k).to(model.device)
        model.books = (replace(book, vectors=self.codes, metric=peer.metric, rows=None),)
        learned = list(self.quantizer.parameters())
        shares = relative_rates([*self.parameters, *learned])[len(self.parameters) :]
        for parameter, share in zip(learned, shares, strict=True):
            self.optimizers["adam"].add_param_group({"params": [parameter], "share": share})
        self.parameters += learned

    @property
    def codes(self) -> Tensor:
        """(K, dim), the effective codes as they are now."""
        codebook: Tensor = self.quantizer.codebook  # type: ignore[assignment]
        return codebook.detach().clone()

    def gradients(self) -> dict[str, Tensor]:
        """As the tool's, with the peer's loss in the place of commitment."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        media = sent(next(self._coming)[0], self.model.device)
        terms = dict[str, Tensor]()

        def through(stage: int, latents: Tensor) -> Tensor:
            grid = latents.movedim(1, -1)
            quantized, _, terms["quantizer"] = self.quantizer(grid.flatten(1, -2))
            as_grid: Tensor = quantized.view(grid.shape).movedim(-1, 1)
            return as_grid

        reconstruction = self.model.run(media, through)
        terms["reconstruction"] = self.objective.error(reconstruction, media)
        torch.autograd.backward(list(terms.values()))
        return {name: term.detach() for name, term in terms.items()}

    def move(self, step: int) -> None:
        super().move(step)
        self.model.books[0].vectors = self.codes


@dataclass(frozen=True)
class Trained:
    """model: in the state with the lowest validation error after at least one step. best: that state's evaluation."""

    model: Model
    lr: float
    best: TracePoint

    def measured(self, opened: Opened) -> Measurement:
        """On the test data, with the weights and codes as a file would store them."""
        self.model.round_to_stored()
        return measure(self.model, opened.test, batch=opened.batch, watch=Watch())


def trained(opened: Opened, peer: Peer, k: int, steps: int, seed: int, times: float) -> Trained:
    """Fine-tune a copy of the opened model with a peer's quantizer, drawn and trained by `seed`.

    Raises:
        NotFiniteError: The training diverged.
    """
    model = opened.model.copy(deepcopy(opened.model.network))
    train, validation = map(opened.calibration.subset, (opened.splits.train, opened.splits.validation))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trainer = PeerTrainer(peer, k, times, model, train, peer.recipe(steps), seed)
        history = History(trainer, validation, None)
        for step in range(1, steps + 1):
            terms = trainer.gradients()
            trainer.move(step)
            if step in evaluation_steps(steps):
                history.evaluate(step, float(sum(terms.values())))
    assert history.best
    model.network.eval().requires_grad_(False)
    history.best.restore(model)
    return Trained(model, trainer.lr, next(point for point in history.trace if point.step == history.best.step))
