"""Fine-tuning with the original encoder and decoder, so that a repaired codebook stays repaired."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.assignment import unit
from codebook_tools.codebook import Emit
from codebook_tools.errors import CodebookError
from codebook_tools.measure import Measurement, NotFiniteError, measure
from codebook_tools.media import Media
from codebook_tools.models.model import Book, Model
from codebook_tools.watch import Watch

DECAY = 0.99  # of the EMA codebook, van den Oord et al. 2017, appendix A.1
COMMITMENT = 0.25  # weight of the term that moves latents to codes, ibid., equation 3
REVIVE_EVERY = 10
REVIVE_UNTIL = 0.9  # of the run: the last codes placed need time to settle
DEAD_BELOW = 0.03  # of the mean hits of a code: fewer, and it is dead
WARM_UP, FLOOR = 100, 0.05  # steps of linear warm-up; share of the learning rate that cosine decay ends at


@dataclass(frozen=True)
class Recipe:
    """steps: of the optimiser, 0 for none. train: which networks. codebook_update: how the codes move; `ema` also
    revives dead ones. batch_size: images. lr: Adam's, at the end of warm-up. loss: of the reconstruction."""

    steps: int = 1000
    train: Literal["all", "decoder", "none"] = "all"
    codebook_update: Literal["ema", "gradient", "frozen"] = "ema"
    batch_size: int = 64
    lr: float = 1e-3
    loss: Literal["mse", "l1"] = "mse"

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise CodebookError(f"{name}={getattr(self, name)} is below {least}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise CodebookError(f"lr={self.lr} is no learning rate; try --lr 0.001")
        if self.steps and self.train == "none" and self.codebook_update == "frozen":
            raise CodebookError("train=none with codebook_update=frozen leaves nothing to train; use --steps 0")


@dataclass(frozen=True)
class TracePoint:
    """One look at a run, over all validation images. loss: of the batch, None at step 0. used: codes; revived: those
    so far; of all codebooks together. perplexity and distortion: the mean over codebooks."""

    step: int
    loss: float | None
    validation_mse: float
    used: int
    perplexity: float
    distortion: float
    revived: int


@dataclass(frozen=True, eq=False)
class State:
    """Weights of a network and codes of its books at a step. revived: (size,) bool of each book, the codes that were
    moved to a latent up to then."""

    step: int
    validation_mse: float
    weights: dict[str, Tensor] = field(repr=False)
    vectors: tuple[Tensor, ...] = field(repr=False)
    revived: tuple[Tensor, ...] = field(repr=False)

    def restore(self, model: Model) -> None:
        model.network.load_state_dict(self.weights)
        for book, vectors in zip(model.books, self.vectors, strict=True):
            book.vectors = vectors.to(model.device)


@dataclass(frozen=True, eq=False)
class FineTuned:
    """start: before the first step. best: the lowest validation error after it. trained: file keys of the parameters
    that took part, and groups: which networks they are. diverged: the step whose loss, or network, was not finite."""

    start: State
    best: State
    trace: tuple[TracePoint, ...]
    trained: tuple[str, ...]
    groups: tuple[str, ...]
    diverged: int | None


def finetune(
    model: Model,
    train: Media,
    validation: Media,
    recipe: Recipe,
    counts: Sequence[Tensor],
    *,
    seed: int,
    watch: Watch,
) -> FineTuned:
    """Train `model` in place, and leave it in the state with the lowest validation error after at least one step.

    counts: (size,) int64 or float of each book, assignments per code over the calibration data, where the EMA starts.
    Only the chosen books move. The loss is free of scale: reconstruction error over the media's variance, plus
    COMMITMENT times the squared distance of latents to codes over the latents' variance, a mean over the books.
    Gradients pass the quantisers straight through (Bengio, Leonard and Courville 2013).
    """
    # Two streams: the batches must not depend on how many codes a strategy leaves to be revived.
    shuffling, reviving = (torch.Generator().manual_seed(seed + stream) for stream in (0, 1))
    first, pixels = train.load(train.items[: recipe.batch_size])
    if not first:
        raise CodebookError(f"none of the first training {model.takes} can be read")
    groups = {"all": ("encoder", "decoder"), "decoder": ("decoder",), "none": ()}[recipe.train]
    names = _trained_names(model, pixels[:1], groups)
    if recipe.train != "none" and not names:
        raise CodebookError(
            f"train={recipe.train}: no gradient reaches the network's parameters through encode or decode"
        )
    parameters: list[Tensor] = list(_set_trainable(model, names))
    scale, latent_scales = _scales(model, train)
    quantisers = [_Quantiser(model, stage, recipe, hits, reviving) for stage, hits in enumerate(counts)]
    by_gradient = recipe.codebook_update == "gradient"
    if by_gradient:
        parameters += [model.books[stage].vectors.requires_grad_(True) for stage in model.chosen]
    optimiser = torch.optim.Adam(parameters, lr=recipe.lr) if parameters else None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: _rate(s, recipe.steps)) if optimiser else None

    looks = _looks(recipe.steps)
    trace: list[TracePoint] = []

    def look(step: int, loss: float | None) -> State:
        found = measure(model, validation, split="validation", structure=False, watch=Watch())
        revived = tuple(quantiser.revived.clone() for quantiser in quantisers)
        trace.append(_point(step, loss, found, sum(int(codes.sum()) for codes in revived)))
        weights = {name: tensor.detach().cpu().clone() for name, tensor in model.network.state_dict().items()}
        vectors = tuple(book.vectors.detach().cpu().clone() for book in model.books)
        return State(step, found.error, weights, vectors, revived)

    start = look(0, None)
    best: State | None = None
    diverged = None
    batches = _batches(train, recipe.batch_size, shuffling)
    _training_mode(model.network)
    for step in range(1, recipe.steps + 1):
        media = next(batches).to(model.device, non_blocking=True)
        seen = list[tuple[Tensor, Tensor, Tensor]]()

        def through(stage: int, latents: Tensor, seen: list[tuple[Tensor, Tensor, Tensor]] = seen) -> Tensor:
            codes, quantised = quantisers[stage](latents)
            seen.append((latents, codes, quantised))
            return latents + (quantised - latents).detach()

        shown = model.run(media, through)
        if recipe.loss == "mse":
            loss = functional.mse_loss(shown, media) / scale
        else:
            loss = functional.l1_loss(shown, media) / scale**0.5
        for latent_scale, (latents, _, quantised) in zip(latent_scales, seen, strict=True):
            unit_of_loss = latent_scale * len(seen)
            loss = loss + COMMITMENT * functional.mse_loss(latents, quantised.detach()) / unit_of_loss
            if by_gradient:
                loss = loss + functional.mse_loss(quantised, latents.detach()) / unit_of_loss
        value = float(loss.detach())
        if not math.isfinite(value):
            diverged = step
            break
        if optimiser is not None and schedule is not None:
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
        for quantiser, (latents, codes, _) in zip(quantisers, seen, strict=True):
            quantiser.update(latents.detach(), codes, step)
        watch.progress("fine-tune", step, recipe.steps, loss=value, used=sum(q.in_use for q in quantisers))
        if step in looks:
            model.network.eval()
            try:
                state = look(step, value)
            except NotFiniteError:
                diverged = step
                break
            _training_mode(model.network)
            if best is None or state.validation_mse < best.validation_mse:
                best = state
    model.network.eval().requires_grad_(False)
    (best or start).restore(model)
    if best is None:
        raise CodebookError(f"fine-tuning diverged at step {diverged}: its numbers are not finite; try a lower --lr")
    keys = sorted({model.keys[name] for name in _written_names(model.network, names)})
    return FineTuned(start, best, tuple(trace), tuple(keys), groups, diverged)


class _Quantiser:
    """Nearest codes of one book in training, and their own movement: an exponential moving average, with revival."""

    def __init__(self, model: Model, stage: int, recipe: Recipe, counts: Tensor, random: torch.Generator) -> None:
        self.model, self.stage, self.recipe, self.random = model, stage, recipe, random
        self.moves = recipe.codebook_update == "ema" and stage in model.chosen
        self.revived = torch.zeros(len(counts), dtype=torch.bool)
        shares = counts.float() / counts.sum().clamp(min=1)
        self.shares = shares.to(model.device)  # of a batch's tokens, so that batch size does not matter
        self.sums = self.book.vectors.detach() * self.shares[:, None]

    @property
    def book(self) -> Book:
        return self.model.books[self.stage]

    @property
    def in_use(self) -> int:
        """Codes that are not dead, by the running average."""
        return int((self.shares >= DEAD_BELOW / len(self.shares)).sum())

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents (n, dim, *grid) -> codes (n, *grid), and what the decoder gets, with gradients to the codes."""
        codes = self.model.assign(latents.detach(), self.stage)
        return codes, self.model.embed_trained(codes, self.stage)

    def update(self, latents: Tensor, codes: Tensor, step: int) -> None:
        """Move the codes after a step: latents (n, dim, *grid), their codes (n, *grid) at its beginning."""
        rows, flat = latents.movedim(1, -1).flatten(0, -2).float(), codes.flatten()
        if self.book.emit is Emit.UNIT:
            rows = unit(rows)
        hits = torch.bincount(flat, minlength=len(self.shares)).float() / len(flat)
        self.shares.lerp_(hits, 1 - DECAY)
        if not self.moves:
            return
        found = torch.zeros_like(self.sums).index_add_(0, flat, rows) / len(flat)
        self.sums.lerp_(found, 1 - DECAY)
        vectors = self.book.vectors.clone()
        moved = hits > 0
        vectors[moved] = self.sums[moved] / self.shares[moved, None]
        if step % REVIVE_EVERY == 0 and step <= REVIVE_UNTIL * self.recipe.steps:
            self._revive(vectors, rows, flat)
        self.book.vectors = vectors

    def _revive(self, vectors: Tensor, rows: Tensor, codes: Tensor) -> None:
        """Put dead codes at latents of this batch, drawn by their squared error, with the mean share of a code."""
        dead = (self.shares < DEAD_BELOW / len(self.shares)).nonzero()[:, 0]
        errors = (rows - vectors[codes]).square().sum(1).cpu()
        dead = dead[: int((errors > 0).sum())]
        if not len(dead):
            return
        chosen = torch.multinomial(errors, len(dead), generator=self.random).to(rows.device)
        vectors[dead] = rows[chosen]
        self.shares[dead] = 1 / len(self.shares)
        self.sums[dead] = rows[chosen] / len(self.shares)
        self.revived[dead.cpu()] = True


def _looks(steps: int) -> set[int]:
    """Early steps tell a bad installation from a later collapse; then ten looks over the run."""
    return {step for step in (1, 10, 100) if step <= steps} | set(range(0, steps + 1, max(1, steps // 10))) | {steps}


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then cosine decay to FLOOR."""
    warm_up = min(WARM_UP, max(1, steps // 2))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def _batches(images: Media, size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Endless batches: every image once in a seeded order, then in another. The last, short batch is left out."""
    size = min(size, len(images))

    def places() -> Iterator[list[int]]:
        while True:
            order = torch.randperm(len(images), generator=random).tolist()
            yield from (order[start : start + size] for start in range(0, len(order) - size + 1, size))

    for _, pixels in images.stream(places()):
        yield pixels


def _scales(model: Model, images: Media) -> tuple[float, list[float]]:
    """Variance of pixels and of each book's latents about their means, over 512 items: the units of the losses."""
    few = images.subset(images.items[:512])
    pixels, latents = list[Tensor](), [list[Tensor]() for _ in model.books]
    with torch.no_grad():
        for _, batch in few.batches(64):
            pixels.append(batch)
            for rows, found in zip(latents, model.pass_through(batch).latents, strict=True):
                rows.append(found.movedim(1, -1).flatten(0, -2).cpu())
    return _variance(torch.cat(pixels).movedim(1, -1).flatten(0, -2)), [_variance(torch.cat(rows)) for rows in latents]


def _variance(rows: Tensor) -> float:
    return float(rows.double().var(0, correction=0).mean().clamp(min=1e-12))


def _trained_names(model: Model, pixels: Tensor, groups: tuple[str, ...]) -> set[str]:
    """Names of the parameters that belong to the groups: those that a gradient through encode or decode of images
    reaches.

    The encoder is all that latents depend on, those of later books, too: training the decoder alone must not move
    them.
    """
    parameters = {name: parameter for name, parameter in model.own_parameters() if parameter.is_floating_point()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    met = list[Tensor]()

    def cut(stage: int, latents: Tensor) -> Tensor:
        met.append(latents)
        return model.embed(model.assign(latents.detach(), stage), stage)

    shown = model.run(pixels, cut)
    encoder = set[str]().union(*(_reached(latents, parameters) for latents in met))
    decoder = _reached(shown, parameters) - encoder
    return (encoder if "encoder" in groups else set()) | (decoder if "decoder" in groups else set())


def _written_names(network: nn.Module, names: set[str]) -> set[str]:
    """The names, all others of the same parameters (a layer used many times), and those of the buffers beside them:
    a batch norm's running statistics train along."""
    chosen = {id(parameter) for name, parameter in network.named_parameters() if name in names}
    names = {name for name, parameter in network.named_parameters(remove_duplicate=False) if id(parameter) in chosen}
    owners = {name.rpartition(".")[0] for name in names}
    buffers = {name for name, _ in network.named_buffers() if name.rpartition(".")[0] in owners}
    return names | (buffers & network.state_dict().keys())


def _reached(output: Tensor, parameters: dict[str, nn.Parameter]) -> set[str]:
    if not output.requires_grad:  # a network that cuts its own gradients
        return set()
    gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True, retain_graph=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def _set_trainable(model: Model, names: set[str]) -> list[nn.Parameter]:
    chosen = []
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            chosen.append(parameter)
    return chosen


def _training_mode(network: nn.Module) -> None:
    """Training mode where something trains: a frozen encoder's batch norms must not drift."""
    for module in network.modules():
        module.training = any(parameter.requires_grad for parameter in module.parameters())


def _point(step: int, loss: float | None, found: Measurement, revived: int) -> TracePoint:
    uses = found.codebooks
    perplexity, distortion = (mean(getattr(use, name) for use in uses) for name in ("perplexity", "distortion"))
    return TracePoint(step, loss, found.error, sum(use.used for use in uses), perplexity, distortion, revived)
