"""Steps of fine-tuning a second: ours against a bare PyTorch loop with the same network, batches and losses.

    python benchmarks/finetune.py [--model MODEL --data PATH ...] [--k K] [--device cpu|cuda] [--runs 5]

All in one process, in turn, block after block, each from the same state. The bare loop has Adam; ours has it, too, and
Muon in a further run. The bare loop quantises by torch.cdist and
argmin, moves the codes by an average that index_add feeds, revives none and looks at no validation image; ours does all
that it does for a user, with one validation image. Writes benchmarks/results/finetune.json, or --output.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from machine import machine
from torch import Tensor
from torch.nn import functional

from codebook_tools.codebook import Codebook
from codebook_tools.data.dataset import Media
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.codebook_ema import DECAY
from codebook_tools.training.finetune import FineTune, finetune
from codebook_tools.training.losses.reconstruction import COMMITMENT, Scales, scales_of
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_request

ROOT = Path(__file__).parents[1]


class Clock:
    """Seconds between the first and the last report of progress, and the steps between them."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, float]] = []

    def __call__(self, what: str, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        self.reports.append((done, time.perf_counter()))

    @property
    def rate(self) -> float:
        (first, since), (last, until) = self.reports[0], self.reports[-1]
        return (last - first) / (until - since)


def ours(model: Model, train: Media, recipe: FineTune) -> float:
    """Steps a second; the preparations before the first are left out."""
    clock = Clock()
    counts = [torch.ones(book.codebook.size) for book in model.books]
    finetune(model, train, train.subset(train.items[:1]), recipe, counts, seed=0, watch=Watch(clock))
    return clock.rate


def bare(model: Model, images: Tensor, scales: Scales, recipe: FineTune) -> float:
    """Steps a second of the loop that one would write by hand for this network. images: all of them, in memory."""
    network, device, (low, high) = model.network, model.device, model.input_range
    codes = model.books[0].vectors.clone()
    shares = torch.full((len(codes),), 1 / len(codes), device=device)
    sums = codes * shares[:, None]
    parameters = list(network.requires_grad_(True).train().parameters())
    optimiser = torch.optim.Adam(parameters, lr=recipe.lr or 1e-3)
    batches = shuffled(images, recipe.batch_size)

    def step() -> Tensor:
        media = next(batches).to(device)
        latents = network.encode(media * (high - low) + low).float()
        rows = latents.detach().movedim(1, -1).flatten(0, -2)
        nearest = torch.cdist(rows, codes).argmin(1)
        quantised = codes[nearest].reshape(latents.movedim(1, -1).shape).movedim(-1, 1)
        shown = (network.decode(latents + (quantised - latents).detach()) - low) / (high - low)
        loss = functional.mse_loss(shown, media) / scales.pixels
        loss = loss + COMMITMENT * functional.mse_loss(latents, quantised) / scales.latents[0]
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        shares.lerp_(torch.bincount(nearest, minlength=len(codes)).float() / len(rows), 1 - DECAY)
        sums.lerp_(torch.zeros_like(sums).index_add_(0, nearest, rows) / len(rows), 1 - DECAY)
        codes.copy_(sums / shares[:, None])
        return loss

    step()
    finish(device)
    since = time.perf_counter()
    for _ in range(recipe.steps - 1):
        step()
    finish(device)
    return (recipe.steps - 1) / (time.perf_counter() - since)


def shuffled(images: Tensor, size: int) -> Iterator[Tensor]:
    """Endless batches of images (n, channels, height, width)."""
    while True:
        for chosen in torch.split(torch.randperm(len(images)), size):
            if len(chosen) == size:
                yield images[chosen]


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def spread(rates: list[float]) -> dict[str, object]:
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "all": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model of one codebook; left out: the bundled demo")
    parser.add_argument("--data", action="append", help="left out: the bundled sample")
    parser.add_argument("--k", type=int, help="the first K codes only")
    parser.add_argument("--limit", type=int, default=2000, help="images, at most")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="of a block")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "finetune.json")
    given = parser.parse_args()
    request = Request(given.model, tuple(given.data or ()), limit=given.limit, device=given.device)
    opened = open_request(request, Watch())
    train = opened.calibration.subset(opened.splits.train)
    _, images = train.load(train.items)  # decoded once, for both
    model, scales = opened.model, scales_of(opened.model, train)
    if given.k:
        model.install(Codebook(model.books[0].codebook.vectors[: given.k].cpu()))
    recipe = FineTune(steps=given.steps, batch_size=min(given.batch_size, len(train)), optimizer="adam")

    def fresh() -> Model:
        return model.copy(copy.deepcopy(model.network))

    loops: dict[str, Callable[[], float]] = {
        "ours": lambda: ours(fresh(), train, recipe),
        "bare": lambda: bare(fresh(), images, scales, recipe),
        "ours with Muon": lambda: ours(fresh(), train, replace(recipe, optimizer="muon")),
    }
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()  # whatever is done once
    for _ in range(given.runs):
        for name, loop in loops.items():
            rates[name].append(loop())
    ratios = [mine / bare for mine, bare in zip(rates["ours"], rates["bare"], strict=True)]
    by_muon = [muon / adam for muon, adam in zip(rates["ours with Muon"], rates["ours"], strict=True)]
    found = {
        "machine": machine(given.device),
        "model": given.model.name if given.model else "the bundled demo",
        "codes": model.books[0].codebook.size,
        "images": {"train": len(train), "shape": list(images.shape[1:])},
        "recipe": {"steps": recipe.steps, "batch_size": recipe.batch_size},
        "steps_per_second": {name: spread(of) for name, of in rates.items()},
        "ours_to_bare": spread(ratios),
        "muon_to_adam": spread(by_muon),
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(found, indent=2) + "\n")
    for name, of in rates.items():
        print(f"{name}: {statistics.median(of):.2f} steps a second")
    for name, of in {"ours to bare": ratios, "Muon to Adam": by_muon}.items():
        print(f"{name}: {statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})")


if __name__ == "__main__":
    main()
