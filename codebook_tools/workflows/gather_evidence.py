"""From the files of a request to the evidence: one pass over the data, and the outputs on a few items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.metric import prepared
from codebook_tools.clustering.seeding import count_distinct
from codebook_tools.codebook import Codebook
from codebook_tools.data.dataset import Media
from codebook_tools.diagnosis.alternatives import cut_rows, cut_wrongly, of_companions, of_original, of_range, scaled
from codebook_tools.diagnosis.close_look import (
    Close,
    few_of,
    look,
    look_at_rows,
    range_errors,
    recognized_range,
    rows_of,
)
from codebook_tools.diagnosis.evidence import Alternative, BookEvidence, Evidence, Pair
from codebook_tools.diagnosis.fit import centroids, distortion, fit_of, left_of, variance_of
from codebook_tools.diagnosis.stored_ema import Companions, companions_of
from codebook_tools.diagnosis.training_trace import read_trace
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.coverage import POINTS
from codebook_tools.evaluation.usage import tally
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.pipeline import on_cpu
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.target import LatentsTarget, Opened, Streamed
from codebook_tools.workflows.without_network import open_target

_CURVE = (1, 2, 4, 8, 16, 32, 64)
_CURVED = 8192  # latents that the curve is of
_ALIKE = 1e-3  # of the latents' spread: nearer together, and they are one

_UNSEEN = "neither encoder nor decoder was looked at, for there are latents alone; give --data"


@dataclass(frozen=True, eq=False)
class _Looked:
    """The model and, where there is one, the original, both with their outputs on the same few items.

    few: the items; None for rows of files. ranges: as Evidence.ranges.
    """

    opened: Streamed
    few: Media | None
    close: Close
    original: Streamed | None
    beside: Close | None
    ranges: Mapping[tuple[float, float], float]

    @property
    def seed(self) -> int:
        return self.opened.request.seed


def gather(request: Request, against: Path | None, trace: Path | None, watch: Watch) -> tuple[Streamed, Evidence]:
    """Open the files, and gather all that the checks need.

    Args:
        request: The model and its data.
        against: The original; None without one.
        trace: The JSON of a training; None without one.
        watch: Progress and seconds by phase.

    Returns:
        The opened model, and the evidence.

    Raises:
        CodebookError: A file cannot be opened, or the two models do not take the same data.
    """
    training = read_trace(trace) if trace else None
    original = open_target(replace(request, model=against), watch) if against else None
    opened = open_target(_with_keys(request, original), watch)
    model = opened.model
    if original and original.model.modality is not model.modality:
        theirs, ours = original.model.modality.many, model.modality.many
        raise CodebookError(f"--against {against} takes {theirs}, the model {ours}")
    with watch.phase("measure"):
        looked = _by_rows(opened, original) if isinstance(opened, LatentsTarget) else _by_items(opened, original)
    with watch.phase("encode"):
        source, seed = opened.source("calibration", "tokens"), request.seed
        sums, samples = tally(model, source, seed=seed, limit=POINTS, watch=watch)
        tests, _ = tally(model, opened.source("test", "tokens"), seed=seed, limit=1, watch=watch)
    with watch.phase("measure"):
        books = tuple(
            _book(looked, stage, samples[stage].vectors, sums.books[stage].counts, tests.books[stage].counts)
            for stage in model.chosen
        )
    whole = looked.close.latents[0].flatten(1)
    return opened, Evidence(
        books=books,
        curve=curve_of(Codebook(whole[:1]), whole, request.seed) if looked.few is not None else {},
        mse=looked.close.mse,
        original_mse=looked.beside.mse if looked.beside else None,
        flat_mse=looked.close.flat_mse,
        ranges=looked.ranges,
        input_range=model.input_range,
        command=model.checkpoint.metadata.get(PREFIX + "command", ""),
        trace=training,
        unseen="" if looked.few is not None else _UNSEEN,
    )


def _by_items(opened: Opened, original: Streamed | None) -> _Looked:
    """Both models on a few items, in the input range that is the network's."""
    request, model, batch = opened.request, opened.model, opened.request.batch_size
    ranges = range_errors(model, opened.calibration, batch, request.seed)
    if original:
        model.input_range = original.model.input_range
    elif ranges and request.input_range is None:
        model.input_range = recognized_range(ranges, model.input_range)
    few = few_of(model, opened.calibration, request.seed)
    beside = look(original.model, few, batch) if original else None
    return _Looked(opened, few, look(model, few, batch), original, beside, ranges)


def _by_rows(opened: LatentsTarget, original: Streamed | None) -> _Looked:
    """Both models on a few rows of files."""
    rows = opened.rows(POINTS)
    beside = look_at_rows(original.model, rows) if isinstance(original, LatentsTarget) else None
    return _Looked(opened, None, look_at_rows(opened.model, rows), original, beside, {})


def _with_keys(request: Request, original: Streamed | None) -> Request:
    """With the codebooks of the original: a tensor that should follow it and does not looks like another codebook."""
    if original is None or request.codebook_key:
        return request
    keys = tuple(original.model.books[stage].key for stage in original.model.chosen)
    if len(keys) == 1 and isinstance(original, LatentsTarget) and original.with_network:
        return request  # one key would say that latents are that codebook's own
    known = request.checkpoint.entries
    return replace(request, codebook_key=keys) if all(key in known for key in keys) else request


def _book(looked: _Looked, stage: int, latents: Tensor, counts: Tensor, held_out: Tensor) -> BookEvidence:
    model, original = looked.opened.model, looked.original
    book, codebook = model.books[stage], on_cpu(model.books[stage])
    paired = original is not None and stage < len(original.model.books)
    original_place = original.model.books[stage].stored if original and paired else None
    companions = companions_of(model.checkpoint, book.stored, original_place)
    pair = _pair(looked, stage) if paired else None
    fit = fit_of(codebook, latents, looked.seed)
    points = codebook.metric.prepare(latents)
    cut = cut_rows(looked.close.latents[stage], codebook.dim, looked.seed) if looked.few is not None else None
    return BookEvidence(
        key=book.key,
        codebook=codebook,
        counts=counts,
        held_out=held_out,
        latents=latents,
        codes=nearest(latents, codebook),
        fit=fit,
        alternatives=() if fit is None or fit.good else tuple(_alternatives(looked, stage, latents, companions, pair)),
        curve=curve_of(codebook, points[:_CURVED], looked.seed),
        distinct=_distinct(points, codebook.size),
        left=left_of(codebook, latents),
        left_when_cut=None if cut is None else left_of(codebook, cut),
        companions=companions,
        filling=PREFIX + "command" in model.checkpoint.metadata and (model.power_of_two or len(model.books) > 1),
        pair=pair,
    )


def _pair(looked: _Looked, stage: int) -> Pair:
    assert looked.original is not None and looked.beside is not None
    codebook = on_cpu(looked.original.model.books[stage])
    theirs, ours = looked.beside.latents[stage], looked.close.latents[stage]
    rows = rows_of(theirs, looked.seed)
    used = len(torch.unique(nearest(rows, codebook)))
    if theirs.shape != ours.shape or looked.few is None:
        return Pair(codebook, used, None, None)
    return Pair(codebook, used, rows, rows_of(ours, looked.seed))


def _alternatives(
    looked: _Looked, stage: int, latents: Tensor, companions: Companions, pair: Pair | None
) -> Iterator[Alternative]:
    model, seed, few = looked.opened.model, looked.seed, looked.few
    codebook, batch = on_cpu(model.books[stage]), looked.opened.request.batch_size
    yield from scaled(codebook, latents, seed)
    if few is not None:
        yield from cut_wrongly(codebook, looked.close.latents[stage], seed)
    if companions.codes is not None and companions.codes.shape == codebook.vectors.shape:
        yield from of_companions(codebook, companions.codes, latents, seed)
    if pair and pair.latents is not None:
        yield from of_original(codebook, pair.latents, seed)
    for bounds in model.modality.input_ranges:
        if few is not None and bounds != model.input_range:
            yield from of_range(codebook, look(model, few, batch, bounds).latents[stage], bounds, seed)


def curve_of(codebook: Codebook, points: Tensor, seed: int) -> Mapping[int, float]:
    """Share of the variance that so many centroids leave, on points that they were not fitted to.

    Args:
        codebook: With the metric that the points are searched by.
        points: (n, dim), prepared.
        seed: Of the k-means.

    Returns:
        By number of centroids: 1, 2, 4 ... 64, of those for which there are points enough; empty where all are alike.
    """
    like = prepared(codebook)
    half = len(points) // 2
    clustered, judged = points[:half], points[half:]
    variance = variance_of(judged)
    if variance == 0:
        return {}
    return {k: distortion(centroids(like, clustered, k, seed), judged)[0] / variance for k in _CURVE if k <= half // 8}


def _distinct(points: Tensor, enough: int) -> int:
    """Points (n, dim) that differ by more than _ALIKE of their spread, counted up to `enough`."""
    apart = points - points.mean(0)
    spread = float(apart.square().mean().sqrt())
    return 1 if spread == 0 else count_distinct((apart / (spread * _ALIKE)).round(), enough)
