"""Latents, codes and centroids in one plane, by one projection."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Literal, cast

import torch
from torch import Tensor

from codebook_tools.codebook import Engine
from codebook_tools.data.items import Item
from codebook_tools.data.splits import limited
from codebook_tools.evaluation.accumulators import Draw
from codebook_tools.evaluation.one_pass import Accumulator, Batch, LatentSource, run_pass
from codebook_tools.evaluation.receptive_field import Place, latent_grid, patches, receptive_side
from codebook_tools.models.from_latents import WalkedLatents
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Refit
from codebook_tools.strategies._validation import check_k
from codebook_tools.workflows.pipeline import calibrate, encoder_latents, measure_stage
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import SUBJECT, ResultHeader, header
from codebook_tools.workflows.session import Opened, open_shown
from codebook_tools.workflows.target import LatentsTarget
from codebook_tools.workflows.without_network import open_latents_of

POINTS = 3000
"""Latents that are drawn."""

CODES = 2048
"""Codes that are drawn, and centroids, at most: a page of more is larger than 5 MB, and UMAP takes minutes."""

_IMAGES = 1000  # that they are of, at most: neighbors in an image are alike

Method = Literal["umap", "pca"]

Projection = Callable[[Tensor], Tensor]
"""(n, dim) -> (n, 2)."""


@dataclass(frozen=True, kw_only=True)
class Map(ResultHeader):
    """The result of `map`.

    Attributes:
        method: By which the plane was made.
        k: Number of centroids.
        size: Codes of the codebook.
        used: Codes with at least one calibration latent.
        coverage: Of the codes, on the test data; None where it is unknown.
        latents: (n, 2), a sample of the calibration latents in the plane.
        codes: (m, 2) in the plane, all codes or, of more than CODES, evenly as many.
        indices: (m,) int64, which codes these are.
        centroids: (k, 2) in the plane, of a k-means of the calibration latents.
        counts: (size,) int64, of each code on the calibration data.
        chosen: (n,) int64, the code of each latent.
        places: Item, row and column of each latent; empty for latents from files.
        patches: (n, 3, height, width) in [0, 1], the receptive field of each latent, or the part of an array around it;
            (0,) for latents from files.
    """

    method: Method
    k: int
    size: int
    used: int
    coverage: float | None
    latents: Tensor = field(repr=False, compare=False)
    codes: Tensor = field(repr=False, compare=False)
    indices: Tensor = field(repr=False, compare=False)
    centroids: Tensor = field(repr=False, compare=False)
    counts: Tensor = field(repr=False, compare=False)
    chosen: Tensor = field(repr=False, compare=False)
    places: tuple[Place, ...] = field(repr=False, compare=False)
    patches: Tensor = field(repr=False, compare=False)

    json_keys = (*SUBJECT, "method", "k", "size", "used", "coverage", "seconds", "outputs", "command", "version")


def look_at_map(request: Request, k: int | None, method: Method, watch: Watch, engine: Engine = "auto") -> Map:
    """Project latents, codes and centroids into one plane.

    Args:
        request: The model, and data or latents.
        k: Number of centroids; None for as many as there are codes in use, at most CODES.
        method: "umap" or "pca"; umap falls back on pca, with a warning, where umap-learn is not installed.
        watch: Progress and seconds by phase.
        engine: Of the k-means; see clustering/engines.py.

    Raises:
        CodebookError: k is below 1, or model or data cannot be opened.
    """
    distributed.require_one("map")
    if k is not None:
        check_k(k)
    opened = open_latents_of(request, watch) if request.latents else open_shown(request, watch)
    model, stage = opened.model, opened.model.chosen[0]
    calibration = calibrate(opened, watch)
    counts, sample = calibration.tokens[stage].counts, calibration.first.sample
    used = int((counts > 0).sum())
    codebook = model.books[stage].codebook
    measurement = measure_stage(opened, encoder_latents(opened), watch)
    with watch.phase("strategy"):
        refit = Refit(min(max(1, used), CODES) if k is None else k, seed=request.seed, engine=engine)
        own = replace(codebook, vectors=codebook.vectors.cpu())
        centroids = refit(own, sample, counts).codebook
    with watch.phase("encode"):
        if isinstance(opened, LatentsTarget):
            rows, chosen = _drawn_rows(opened, stage)
            places, patch_images = list[Place](), torch.empty(0)
        else:
            rows, chosen, places, patch_images = _drawn(opened, stage)
    watch.progress("project", 0, None)
    with watch.phase("strategy"):
        points = own.metric.prepare(rows)
        by, project = _projection(points, method, request.seed)
        indices = torch.arange(min(own.size, CODES)) * own.size // min(own.size, CODES)
        drawn = own.metric.prepare(own.emitted[indices]), own.metric.prepare(centroids.emitted)
        planes = [project(rows) for rows in (points, *drawn)]
    return Map(
        **header("map", opened, *(() if by == method else (_WITHOUT_UMAP,))),
        method=by,
        k=centroids.size,
        size=codebook.size,
        used=used,
        coverage=measurement.codebooks[stage].coverage,
        latents=planes[0],
        codes=planes[1],
        indices=indices,
        centroids=planes[2],
        counts=counts,
        chosen=chosen,
        places=tuple(places),
        patches=patch_images,
        seconds=watch.seconds,
    )


class _Points(Accumulator):
    """As many latents of each image, drawn by seed, with their codes and places."""

    def __init__(self, each: int, columns: int | None, seed: int) -> None:
        self.latents, self.codes, self.places = list[Tensor](), list[Tensor](), list[Place]()
        self._each, self._columns, self._random = each, columns, torch.Generator().manual_seed(seed)

    def add(self, batch: Batch) -> None:
        items = cast("list[Item]", batch.items)
        latents, codes = (torch.chunk(of.cpu(), len(items)) for of in (batch.latents[0], batch.codes[0]))
        for item, rows, chosen in zip(items, latents, codes, strict=True):
            at = torch.randperm(len(rows), generator=self._random)[: self._each].sort().values
            self.latents.append(rows[at])
            self.codes.append(chosen[at])
            columns = self._columns or len(rows)
            for position in at.tolist():
                row, column = divmod(position, columns)
                self.places.append(Place(item, row, column, len(rows)))


def _drawn_rows(opened: LatentsTarget, stage: int) -> tuple[Tensor, Tensor]:
    """(n, dim) latents that meet a codebook, of rows of files, and their codes."""
    draw = Draw(opened.model.books[stage].codebook, ("latents", "codes"), opened.request.seed, POINTS)
    latents = WalkedLatents(opened.drawn(POINTS), opened.model, stage)
    run_pass(LatentSource(latents, opened.model.books[stage].codebook), [draw], Watch())
    rows, codes = draw.sampler.columns()
    return rows, codes


def _drawn(opened: Opened, stage: int) -> tuple[Tensor, Tensor, list[Place], Tensor]:
    """(n, dim) latents, as many of each of some images, with their codes, their places, and their patches."""
    model, request = opened.model, opened.request
    few = opened.calibration.subset(limited(opened.calibration.items, _IMAGES, request.seed))
    grid = latent_grid(model, few, stage)
    points = _Points(-(-POINTS // len(few)), grid[1] if len(grid) == 2 else None, request.seed)
    latents = model.latents(few, request.batch_size, stage)
    run_pass(LatentSource(latents, model.books[stage].codebook), [points], Watch())
    places = points.places[:POINTS]
    side = receptive_side(model, opened.calibration, stage)
    images = patches(opened.calibration, places, grid, side, request.batch_size)
    return torch.cat(points.latents)[:POINTS], torch.cat(points.codes)[:POINTS], places, images


_WITHOUT_UMAP = "umap-learn is not installed: this is a projection on principal components; pip install umap-learn"


def _projection(rows: Tensor, method: Method, seed: int) -> tuple[Method, Projection]:
    """The method in use, and what puts vectors into the plane: UMAP fitted to `rows`, or principal components."""
    if method == "pca" or find_spec("umap") is None:
        return "pca", principal(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of threads that a seed rules out, and of tensorflow
        from umap import UMAP  # type: ignore[import-untyped]

        fitted = UMAP(n_neighbors=min(15, len(rows) - 1), random_state=seed % 2**32).fit(rows.numpy())

        def project(vectors: Tensor) -> Tensor:
            if vectors is rows:
                return torch.from_numpy(fitted.embedding_).float()
            return torch.from_numpy(fitted.transform(vectors.numpy())).float()

    return "umap", project


def principal(rows: Tensor) -> Projection:
    """A projection on the first two principal components of `rows` (n, dim)."""
    mean = rows.double().mean(0)
    _, _, directions = torch.linalg.svd(rows.double() - mean, full_matrices=False)
    axes = torch.zeros(rows.shape[1], 2, dtype=torch.float64)
    axes[:, : min(2, len(directions))] = directions[:2].T
    return lambda vectors: ((vectors.double() - mean) @ axes).float()
