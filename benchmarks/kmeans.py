"""k-means: inertia against time, ours and every other one that is installed.

    python benchmarks/kmeans.py [--case latents-512 ...] [--model FILE --data PATH ...]
        [--device cpu|cuda] [--runs 5] [--without NAME ...]

Cases: `latents-K`, a million latents of the model (the bundled demo has fewer) in K clusters; `mixture-K`, 200,000
points of 256 dimensions drawn from a thousand normal distributions; `blobs-N-D-K`, N points of D dimensions around
3,000 means, such as blobs-200000-8-4096, and `cloud-N-D-K`, N points of one normal distribution. All take turns in one
process, with another seed in each run; seeding counts. What a run found is judged by the mean squared distance of all
points to their nearest centroid. On the first two, ours runs with several tolerances, from a rough one to a strict one,
and on samples, as faiss does by default: each is a run of its own, timed from the beginning. On the others it runs with
its defaults, and gives the inertia of each pass over all points, which is an upper bound of what its centroids have.
Writes its cases into benchmarks/results/kmeans.json, or --output, and draws one plot a case beside it.
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
BLOBS = 3000

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


def faiss_to_25(points: Tensor, k: int, seed: int) -> Any:
    return faiss_kmeans(points, k, seed, niter=25, max_points_per_centroid=len(points))


def super_kmeans(points: Tensor, k: int, seed: int, **more: Any) -> Any:
    from superkmeans import SuperKMeans

    return SuperKMeans(k, points.shape[1], seed=seed, **more).train(points.numpy()).copy()


def all_points_in_super_kmeans(points: Tensor, k: int, seed: int) -> Any:
    return super_kmeans(
        points, k, seed, hierarchical=False, iters=25, sampling_fraction=1.0, max_points_per_cluster=len(points)
    )


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
    "SuperKMeans, its defaults": ("superkmeans", super_kmeans, ("cpu",)),
    "SuperKMeans, all points, 25 iterations": ("superkmeans", all_points_in_super_kmeans, ("cpu",)),
    "flash-kmeans, 60 iterations": ("flash_kmeans", flash_kmeans, ("cuda",)),
}
"""By name: the module that must be there, the call, and where it runs."""

PEERS_OF_MANY: dict[str, tuple[str, Clusterer, tuple[str, ...]]] = {
    "faiss, all points, 25 iterations": ("faiss", faiss_to_25, ("cpu",)),
    **{name: peer for name, peer in PEERS.items() if name not in (SCIKIT_LEARN, ALL_POINTS)},
}


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


def drawn(kind: str, n: int, dim: int) -> Tensor:
    """(n, dim): standard normal, or a third of it around standard normal means."""
    random = torch.Generator().manual_seed(0)
    if kind == "cloud":
        return torch.randn(n, dim, generator=random)
    means = torch.randn(BLOBS, dim, generator=random)
    return means[torch.randint(BLOBS, (n,), generator=random)] + 0.3 * torch.randn(n, dim, generator=random)


class Curve:
    """Ours with its defaults; keeps the seconds and inertia of each pass over all points."""

    def __init__(self) -> None:
        self.runs: list[list[tuple[float, float]]] = []

    def __call__(self, points: Tensor, k: int, seed: int) -> Tensor:
        passes, since, of_all = list[tuple[float, float]](), time.perf_counter(), f"k-means on {len(points):,} latents"

        def see(what: str, done: int, total: int | None, figures: Any) -> None:
            if what == of_all:
                passes.append((round(time.perf_counter() - since, 3), round(figures["inertia"], 6)))

        self.runs.append(passes)
        return kmeans(points, k, seed=seed, watch=Watch(see)).centroids


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


def told_of_many(passes: list[list[tuple[float, float]]], theirs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """As `told`, by pairs of runs with one seed: when ours is where the peer ends, in parts of what the peer takes."""
    said = dict[str, Any]()
    for name, its in theirs.items():
        ratios, then = list[float | None](), list[float | None]()
        for run, seconds, end in zip(passes, its["seconds"]["all"], its["inertia"]["all"], strict=True):
            at = next((at for at, inertia in run if inertia <= end), None)
            ratios.append(None if at is None else round(at / seconds, 3))
            then.append(min((inertia for at, inertia in run if at <= seconds), default=None))
        reached = [ratio for ratio in ratios if ratio is not None]
        said[name] = {
            "ratio": {"median": statistics.median(reached) if len(reached) == len(ratios) else None, "all": ratios},
            "inertia_at_its_end": {"ours": then, "its": its["inertia"]["all"]},
        }
    return said


def draw(path: Path, title: str, line: list[tuple[float, float]], theirs: dict[str, dict[str, Any]]) -> None:
    if find_spec("matplotlib") is None:
        print("  no plot: matplotlib is not installed")
        return
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(*zip(*line, strict=True), ".-", label="ours")
    for (name, its), marker in zip(theirs.items(), "sD^vPX*", strict=False):
        axes.plot(its["seconds"]["all"], its["inertia"]["all"], marker, alpha=0.7, label=name)
    axes.set(xscale="log", xlabel="seconds, seeding included", ylabel="mean squared distance", title=title)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def points_of(case: str, given: argparse.Namespace) -> tuple[Tensor, int]:
    """The points (n, dim) of a case, and the number of clusters."""
    kind, *sizes = case.split("-")
    *shape, k = map(int, sizes)
    points = latents_of(given) if kind == "latents" else drawn(kind, *shape) if shape else mixture()
    return points.to(given.device), k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="latents-K, mixture-K, blobs-N-D-K or cloud-N-D-K; repeatable")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", action="append")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--without", default=(), nargs="+", metavar="NAME", help="peers left out, by how names begin")
    parser.add_argument("--output", type=Path, default=RESULTS / "kmeans.json")
    given = parser.parse_args()
    results = json.loads(given.output.read_text()) if given.output.exists() else {}
    for case in given.case or ["latents-512", "latents-128", "mixture-1024"]:
        points, k = points_of(case, given)
        print(f"{case}: {len(points):,} x {points.shape[1]}", flush=True)
        of_many = case.startswith(("blobs", "cloud"))
        peers = {
            name: call
            for name, (module, call, where) in (PEERS_OF_MANY if of_many else PEERS).items()
            if find_spec(module) and given.device in where and not name.startswith(tuple(given.without))
        }
        curve = Curve()
        ours: dict[str, Clusterer] = {"ours": curve} if of_many else OURS
        found = race(points, k, ours | peers, given.runs)
        mine, theirs = {name: found[name] for name in ours}, {name: found[name] for name in peers}
        passes = curve.runs[1:]  # the first is for whatever is done once
        results[case] = {
            "machine": machine(given.device),
            "points": list(points.shape),
            "k": k,
            "of": [
                given.model.name if given.model else "the bundled demo",
                *(Path(path).name for path in given.data or []),
            ]
            if case.startswith("latents")
            else case.partition("-")[0],
            "default": "ours" if of_many else f"ours, tolerance {DEFAULT:g}",
            "ours": mine,
            **({"passes": passes} if of_many else {}),
            "peers": theirs,
            "against": told_of_many(passes, theirs) if of_many else told(mine, theirs),
        }
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(results, indent=2) + "\n")
        line = passes[0] if of_many else [(one["seconds"]["median"], one["inertia"]["median"]) for one in mine.values()]
        title = f"{len(points):,} x {points.shape[1]}, K = {k:,}"
        draw(given.output.with_name(f"kmeans-{case}.png"), title, line, theirs)
        for name, its in results[case]["against"].items():
            print(f"  against {name}: {its}")


if __name__ == "__main__":
    main()
