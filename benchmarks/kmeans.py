"""k-means: inertia against time, ours and every other one that is installed.

    python benchmarks/kmeans.py [--case latents-512 ...] [--model FILE --data PATH ...] [--device cpu|cuda] [--runs 5]

Cases: `latents-K`, a million latents of the model (the bundled demo has fewer) in K clusters, and `mixture-K`, 200,000
points of 256 dimensions drawn from a thousand normal distributions. All take turns in one process, with another seed in
each run; seeding counts. Ours runs with several tolerances, from a rough one to a strict one, and on samples, as faiss
does by default: each is a run of its own, timed from the beginning. What a run found is judged by the mean squared
distance of all points to their nearest centroid. Writes its cases into benchmarks/results/kmeans.json, or --output, and
draws one plot a case beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from torch import Tensor

from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.codebook import Codebook
from codebook_tools.evaluation.usage import survey
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_request

RESULTS = Path(__file__).parent / "results"
DEFAULT = 5e-4
TOLERANCES = (1e-2, 1e-3, DEFAULT, 1e-4, 3e-5, 1e-5)
DEFAULT_OF_FAISS, ALL_POINTS, SCIKIT_LEARN = "faiss, its defaults", "faiss, all points, 60 iterations", "scikit-learn"

Clusterer = Callable[[Tensor, int, int], Any]
"""Called with points (n, dim), k and a seed; returns centroids (k, dim)."""


def ours(tolerance: float, points_per_centroid: int = 10**9, iterations: int = 300) -> Clusterer:
    def run(points: Tensor, k: int, seed: int) -> Tensor:
        head = points[: points_per_centroid * k]
        return kmeans(head, k, seed=seed, tolerance=tolerance, iterations=iterations, watch=Watch()).centroids

    return run


OURS = {
    "ours, 32 points a centroid, 8 iterations": ours(DEFAULT, 32, 8),
    **{
        f"ours, {few} points a centroid": ours(tolerance, few)
        for few, tolerance in ((128, 1e-2), (256, 1e-2), (512, 1e-3))
    },
    **{f"ours, tolerance {tolerance:g}": ours(tolerance) for tolerance in TOLERANCES},
}


def scikit_learn(points: Tensor, k: int, seed: int) -> Any:
    from sklearn.cluster import KMeans

    return KMeans(k, random_state=seed).fit(points.numpy()).cluster_centers_


def faiss_kmeans(points: Tensor, k: int, seed: int, **more: int) -> Any:
    import faiss

    clustering = faiss.Kmeans(points.shape[1], k, seed=seed, **more)
    clustering.train(points.numpy())
    return clustering.centroids


def all_points_in_faiss(points: Tensor, k: int, seed: int) -> Any:
    return faiss_kmeans(points, k, seed, niter=60, max_points_per_centroid=len(points))


def fast_kmeans(points: Tensor, k: int, seed: int) -> Any:
    from fastkmeans import FastKMeans

    found = FastKMeans(points.shape[1], k, seed=seed, gpu=points.is_cuda, max_points_per_centroid=None)
    found.train(points.cpu().numpy())
    return found.centroids


def flash_kmeans(points: Tensor, k: int, seed: int) -> Any:
    from flash_kmeans import batch_kmeans_Euclid

    torch.manual_seed(seed)
    return batch_kmeans_Euclid(points[None], k, max_iters=60, tol=0.0)[1][0]


PEERS: dict[str, tuple[str, Clusterer, tuple[str, ...]]] = {
    SCIKIT_LEARN: ("sklearn", scikit_learn, ("cpu",)),
    ALL_POINTS: ("faiss", all_points_in_faiss, ("cpu",)),
    DEFAULT_OF_FAISS: ("faiss", faiss_kmeans, ("cpu",)),
    "fastkmeans, all points": ("fastkmeans", fast_kmeans, ("cpu", "cuda")),
    "flash-kmeans, 60 iterations": ("flash_kmeans", flash_kmeans, ("cuda",)),
}
"""By name: the module that must be there, the call, and where it runs."""


def latents_of(given: argparse.Namespace) -> Tensor:
    """(n, dim), a million at most, in the order in which a survey draws them."""
    opened = open_request(Request(given.model, tuple(given.data or ()), device=given.device), Watch())
    stream = opened.model.latents(opened.calibration, opened.request.batch_size)
    return survey(stream, opened.model.books[0].codebook, seed=0, watch=Watch()).sample.vectors


def mixture() -> Tensor:
    """(200,000, 256): standard normal around a thousand standard normal means."""
    drawn = torch.Generator().manual_seed(0)
    means = torch.randn(1000, 256, generator=drawn)
    return means[torch.randint(1000, (200_000,), generator=drawn)] + torch.randn(200_000, 256, generator=drawn)


def judged(points: Tensor, centroids: Any) -> float:
    """Mean squared distance to the nearest centroid."""
    codebook = Codebook(torch.as_tensor(np.asarray(torch.as_tensor(centroids).cpu()), dtype=torch.float32))
    slabs = torch.split(points.cpu(), 65_536)
    return sum(float(squared_errors(x, codebook, nearest(x, codebook)).double().sum()) for x in slabs) / len(points)


def race(points: Tensor, k: int, ways: dict[str, Clusterer], runs: int) -> dict[str, dict[str, Any]]:
    """Seconds and inertias of all ways, in turn."""
    for way in ways.values():
        way(points[: 20 * k], k, 0)  # whatever is done once
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for seed in range(runs):
        for name, way in ways.items():
            since = time.perf_counter()
            centroids = way(points, k, seed)
            if points.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - since
            found[name].append((seconds, judged(points, centroids)))
            print(f"  {seed} {name}: {found[name][-1][0]:.2f} s, inertia {found[name][-1][1]:.5f}", flush=True)
    return {
        name: {
            "seconds": {"median": statistics.median(s for s, _ in its), "all": [round(s, 3) for s, _ in its]},
            "inertia": {"median": statistics.median(i for _, i in its), "all": [round(i, 6) for _, i in its]},
        }
        for name, its in found.items()
    }


def told(mine: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How much sooner ours is where a peer ends, and what ours has found at the time when a peer has ended."""
    said = dict[str, Any]()
    by_time = sorted(mine.values(), key=lambda its: float(its["seconds"]["median"]))
    for name, its in theirs.items():
        seconds, inertia = its["seconds"]["median"], its["inertia"]["median"]
        there = next((one for one in by_time if one["inertia"]["median"] <= inertia), None)
        then = [one["inertia"]["median"] for one in by_time if one["seconds"]["median"] <= seconds]
        said[name] = {
            "sooner": round(seconds / there["seconds"]["median"], 2) if there else None,
            "inertia_at_its_end": {"ours": min(then, default=None), "its": inertia},
        }
    return said


def draw(path: Path, title: str, mine: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    if find_spec("matplotlib") is None:
        print("  no plot: matplotlib is not installed")
        return
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    curve = [(one["seconds"]["median"], one["inertia"]["median"]) for one in mine.values()]
    axes.plot(*zip(*curve, strict=True), "o-", label="ours, by tolerance")
    for (name, its), marker in zip(theirs.items(), "sD^vP", strict=False):
        axes.plot(its["seconds"]["all"], its["inertia"]["all"], marker, alpha=0.7, label=name)
    axes.set(xscale="log", xlabel="seconds, seeding included", ylabel="mean squared distance", title=title)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="latents-K or mixture-K; repeatable")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", action="append")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "kmeans.json")
    given = parser.parse_args()
    results = json.loads(given.output.read_text()) if given.output.exists() else {}
    peers = {name: call for name, (module, call, where) in PEERS.items() if find_spec(module) and given.device in where}
    for case in given.case or ["latents-512", "latents-128", "mixture-1024"]:
        kind, _, size = case.partition("-")
        points = (latents_of(given) if kind == "latents" else mixture()).to(given.device)
        k = int(size)
        print(f"{case}: {len(points):,} x {points.shape[1]}", flush=True)
        found = race(points, k, OURS | peers, given.runs)
        curve, theirs = {name: found[name] for name in OURS}, {name: found[name] for name in peers}
        results[case] = {
            "machine": machine(given.device),
            "points": list(points.shape),
            "k": k,
            "of": [
                given.model.name if given.model else "the bundled demo",
                *(Path(path).name for path in given.data or []),
            ]
            if kind == "latents"
            else "mixture",
            "default": f"ours, tolerance {DEFAULT:g}",
            "ours": curve,
            "peers": theirs,
            "against": told(curve, theirs),
        }
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(results, indent=2) + "\n")
        draw(
            given.output.with_name(f"kmeans-{case}.png"), f"{len(points):,} x {points.shape[1]}, K = {k}", curve, theirs
        )
        for name, its in results[case]["against"].items():
            print(f"  against {name}: {its}")


if __name__ == "__main__":
    main()
