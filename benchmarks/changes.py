"""What a variant puts in the place of a part of the library: see variants.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from codebook_tools.clustering.assignment import nearest
from codebook_tools.training import learning_rate
from codebook_tools.training.codebook_ema import DEAD_BELOW, CodebookEMA
from codebook_tools.training.losses.reconstruction import Quantized, Reconstruction
from codebook_tools.training.muon import Muon
from codebook_tools.training.parameters import trained_names
from codebook_tools.training.trainer import Trainer
from codebook_tools.workflows.session import Opened

_muon_step = Muon.step
_move, _update, _relative_rates = Trainer.move, CodebookEMA.update, learning_rate.relative_rates


def rotation(latents: Tensor, quantised: Tensor) -> Tensor:
    """quantised, with gradients that are turned and scaled as latents are on their way to it: Fifty et al. 2024,
    "Restructuring Vector Quantization with the Rotation Trick" (arXiv 2410.06424), equation 4."""
    x, y = latents.movedim(1, -1), quantised.detach().movedim(1, -1)
    from_, to = functional.normalize(x.detach(), dim=-1), functional.normalize(y, dim=-1)
    middle = functional.normalize(from_ + to, dim=-1)
    scale = y.norm(dim=-1, keepdim=True) / x.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    turned = x - 2 * (x * middle).sum(-1, keepdim=True) * middle + 2 * (x * from_).sum(-1, keepdim=True) * to
    through: Tensor = (turned * scale).movedim(-1, 1)
    return through


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


def encoder_later(training: Trainer, step: int) -> None:
    """The encoder stays as it is for the first fifth of the run, and then moves further with each step for a while, as
    all does in the beginning."""
    of_decoder, fifth = _of_decoder(training), training.recipe.steps // 5
    encoder = [weight for name, weight in training.model.network.named_parameters() if name not in of_decoder]
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
    names: set[str] = training.of_decoder  # type: ignore[attr-defined]
    return names


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


def aligned(opened: Opened, seed: int) -> None:
    """The codes get the mean and the variance of the latents that choose them, dimension by dimension."""
    model = opened.model
    book, few = model.books[0], opened.calibration.subset(opened.calibration.items[:512])
    rows = torch.cat(list(model.latents(few, 64)))
    chosen = book.vectors[nearest(rows, book.codebook)]
    stretch = rows.std(0) / chosen.std(0).clamp(min=1e-6)
    book.vectors = (book.vectors - chosen.mean(0)) * stretch + rows.mean(0)


def diveq(noise: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Latents, moved by their distance to the code in a direction near the code's; the decoder's gradient reaches codes
    through the distance. DiVeQ: Vali, Bäckström and Solin 2025 (arXiv 2509.26469), but with noise in units of the
    distance, so that no direction depends on the scale of latents. Both (n, dim, *grid)."""

    def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
        error = quantized - latents
        toward = functional.normalize(error.detach(), dim=1)
        drawn = torch.randn(error.shape, device=error.device) * noise / math.sqrt(error.shape[1])
        moved: Tensor = latents + error.norm(dim=1, keepdim=True) * functional.normalize(toward + drawn, dim=1)
        return moved

    straight_through.__name__ = f"diveq({noise})"
    return straight_through


def reconstruction_alone(
    self: Reconstruction, reconstruction: Tensor, media: Tensor, outputs: Sequence[Quantized]
) -> dict[str, Tensor]:
    """No commitment, no codebook loss."""
    return {"reconstruction": self.error(reconstruction, media)}


def soap(times: float) -> Callable[[Sequence[Mapping[str, Any]], float], torch.optim.Optimizer]:
    """SOAP, Vyas et al. 2024 (arXiv 2409.11321), in Muon's place, at so many times Adam's rate. It takes `pip install
    --no-deps pytorch-optimizer`."""

    def make(groups: Sequence[Mapping[str, Any]], update_rms: float) -> torch.optim.Optimizer:
        from pytorch_optimizer import SOAP  # type: ignore[import-not-found]

        faster = [{**group, "share": times * group["share"]} for group in groups]
        optimizer: torch.optim.Optimizer = SOAP(faster, betas=(0.95, 0.95), weight_decay=0.0)
        return optimizer

    make.__name__ = f"soap({times})"
    return make
