"""Semantic ids of 20,000 generated items: what a collapsed RQ-VAE, Re-Fit and Re-Fit --balance make of them.

    python benchmarks/semantic_ids.py [SEED ...] [--k 256] [--steps 400]

Writes benchmarks/results/semantic_ids/seed-SEED.json, and table.md of all seeds that are there. Items have topics of
Zipf's sizes and unlike widths, heavy tails (Student's t) and near-duplicates. Three levels are trained from random
codes by LC-Rec's recipe (AdamW, its rate of 1e-3, decay 1e-4, 1,024 items, commitment 0.25, codes within 1/K of 0)
until 30 % of the codes are in use or fewer. Figures are of all items, as the collision rate depends on their number.
Errors are over the variance. Each row's last steps are a fine-tuning of `--steps` steps of 256 items, if it has one.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor, nn

import codebook_tools as ct
from codebook_tools.evaluation.tables import in_markdown

RESULTS = Path(__file__).parent / "results" / "semantic_ids"
ITEMS, DIM, LEVELS, WIDTHS = 20_000, 128, 3, (256, 128, 32)
COLLAPSED, EVERY, AT_MOST = 0.3, 50, 1000  # share of codes in use; training steps
BATCH = 256  # of fine-tuning
ROWS = {
    "k-means": (False, False),
    "k-means, fine-tuned": (False, True),
    "balanced": (True, False),
    "balanced, fine-tuned": (True, True),
}
"""Strategies by name: whether Re-Fit balances, and whether a fine-tuning follows."""


def items(seed: int, count: int = ITEMS, topics: int = 400, freedom: int = 4, copies: float = 0.03) -> Tensor:
    """(count, DIM) item embeddings; copies: share of items that are near-duplicates of others."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    of_kinds = normal(40, DIM)[torch.randint(40, (topics,), generator=random)]
    centers = of_kinds + 0.6 * normal(topics, DIM)
    sizes = (1 / torch.arange(1.0, topics + 1))[torch.randperm(topics, generator=random)]
    widths, directions = 0.35 * (0.6 * normal(topics)).exp(), normal(topics, 12, DIM) / 12**0.5
    topic = torch.multinomial(sizes, count, True, generator=random)
    tails = normal(count, freedom).square().mean(1).sqrt()
    inner = torch.einsum("nk,nkd->nd", normal(count, 12), directions[topic])
    embeddings = centers[topic] + (widths[topic] / tails)[:, None] * inner + 0.1 * normal(count, DIM)
    order, many = torch.randperm(count, generator=random), int(copies * count)
    embeddings[order[:many]] = embeddings[order[many : 2 * many]] + 0.02 * normal(many, DIM)
    return embeddings


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    layers = list[nn.Module]()
    for width, next_width in pairwise(widths):
        linear = nn.Linear(width, next_width)
        nn.init.xavier_normal_(linear.weight)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class RQVAE(nn.Module):
    """Items (n, DIM) through perceptrons and residual levels of codes."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.encoder, self.decoder = perceptron((DIM, *WIDTHS)), perceptron((*WIDTHS[::-1], DIM))
        codes = (2 * torch.rand(LEVELS, k, WIDTHS[-1]) - 1) / k
        self.levels = nn.ParameterList(map(nn.Parameter, codes))
        self.codebooks = tuple(f"levels.{i}" for i in range(LEVELS))

    def encode(self, rows: Tensor) -> Tensor:
        return torch.as_tensor(self.encoder(rows))

    def walk(self, latents: Tensor, quantize: Any) -> Tensor:
        left, total = latents, torch.zeros(())
        for level in range(LEVELS):
            quantized = quantize(level, left)
            left, total = left - quantized, total + quantized
        return total

    def decode(self, quantized: Tensor) -> Tensor:
        return torch.as_tensor(self.decoder(quantized))

    def loss(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss of a batch, and its codes of each level."""
        left, total, losses, ids = self.encoder(rows), torch.zeros(()), [], []
        for level in self.levels:
            ids.append(torch.cdist(left.detach(), level.detach()).argmin(1))
            code = level[ids[-1]]
            losses.append((code - left.detach()).square().mean() + 0.25 * (code.detach() - left).square().mean())
            passed = left + (code - left).detach()
            left, total = left - passed, total + passed
        return (self.decoder(total) - rows).square().mean() + torch.stack(losses).mean(), ids


def collapsed(rows: Tensor, k: int, seed: int) -> tuple[RQVAE, int]:
    """A network of which few codes are in use, and the number of its training steps."""
    torch.manual_seed(seed)
    network = RQVAE(k)
    adam = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-4)
    for step in range(1, AT_MOST + 1):
        loss, _ = network.loss(rows[torch.randint(len(rows), (1024,))])
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        if step % EVERY == 0 and step >= 4 * EVERY:
            with torch.no_grad():
                used = sum(int((torch.bincount(ids) > 0).sum()) for ids in network.loss(rows)[1])
            if used <= COLLAPSED * k * LEVELS:
                return network.eval(), step
    raise SystemExit(f"seed {seed}: {used} of {k * LEVELS} codes are in use after {AT_MOST} steps")


def figures(network: RQVAE, rows: Tensor) -> dict[str, float]:
    """Of all items."""
    measured = ct.measure(ct.wrap(network, metric="euclidean"), ct.Data(test=rows))
    assert measured.ids is not None
    used = sum(use.used for use in measured.codebooks) / sum(use.size for use in measured.codebooks)
    error = measured.error / float(rows.var(0).mean())
    by_level = {f"perplexity {i}": use.perplexity for i, use in enumerate(measured.codebooks)}
    largest = {f"largest {i}": use.top_share * use.size for i, use in enumerate(measured.codebooks)}
    return {"collision rate": measured.ids.collision_rate, "nmse": error, "used": used, **by_level, **largest}


def of_seed(seed: int, k: int, steps: int) -> dict[str, dict[str, float]]:
    """The figures of each row."""
    rows = items(seed)
    network, trained = collapsed(rows, k, seed)
    measured = {"before": {**figures(network, rows), "steps": float(trained)}}
    for name, (balance, tuned) in ROWS.items():
        own, since = copy.deepcopy(network), time.perf_counter()
        data = ct.Data(rows, batch_size=BATCH)
        recipe = ct.FineTune(steps=steps * tuned, batch_size=BATCH)
        strategy = ct.strategies.Refit(k=k, balance=balance, seed=seed)
        run = ct.operate(ct.wrap(own, metric="euclidean"), data, strategy, recipe, seed=seed)
        after = run.finetuned or run.surgery
        assert after is not None and after.ids is not None and after.ids.changed is not None
        measured[name] = {**figures(own, rows), "changed": after.ids.changed}
        print(seed, name, measured[name], f"{time.perf_counter() - since:.0f} s", flush=True)
    return measured


def spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def bars(of: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ratios that were promised to be at most 0.5, 0.8 and 1.03, and that to fine-tuned k-means."""
    best, plain, tuned = (of[name] for name in ("balanced, fine-tuned", "k-means", "k-means, fine-tuned"))
    return {
        "collisions / before": best["collision rate"] / of["before"]["collision rate"],
        "collisions / k-means": best["collision rate"] / plain["collision rate"],
        "nmse / k-means, fine-tuned": best["nmse"] / tuned["nmse"],
        "collisions / k-means, fine-tuned": best["collision rate"] / tuned["collision rate"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--k", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    asked = parser.parse_args()
    warnings.simplefilter("ignore", ct.CodebookWarning)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in asked.seeds:
        began = time.perf_counter()
        rows = of_seed(seed, asked.k, asked.steps)
        about = {"seed": seed, "k": asked.k, "steps": asked.steps, "machine": machine()}
        about |= {"seconds": round(time.perf_counter() - began), "rows": rows, "ratios": bars(rows)}
        (RESULTS / f"seed-{seed}.json").write_text(json.dumps(about, indent=1) + "\n")
    done = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("seed-*.json"))]
    columns = ("collision rate", "nmse", "used", *(f"perplexity {i}" for i in range(LEVELS)), "largest 0")
    lines: list[Sequence[str]] = [("codes", *columns)]
    for name in done[0]["rows"]:
        lines.append((name, *(spread([of["rows"][name][column] for of in done]) for column in columns)))
    lasts = [("ratio", "mean ± deviation")]
    lasts += [(name, spread([of["ratios"][name] for of in done])) for name in done[0]["ratios"]]
    (RESULTS / "table.md").write_text(f"{in_markdown(lines)}\n{in_markdown(lasts)}")
    print((RESULTS / "table.md").read_text())


if __name__ == "__main__":
    main()
