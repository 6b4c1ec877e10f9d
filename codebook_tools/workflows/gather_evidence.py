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
from codebook_tools.diagnosis.close_look import Close, few_of, look, range_errors, recognized_range, rows_of
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
from codebook_tools.workflows.session import Opened, open_request

_CURVE = (1, 2, 4, 8, 16, 32, 64)
_CURVED = 8192  # latents that the curve is of
_ALIKE = 1e-3  # of the latents' spread: nearer together, and they are one


@dataclass(frozen=True, eq=False)
class _Looked:
    """The model and, where there is one, the original, both with their outputs on the same few items."""

    opened: Opened
    few: Media
    close: Close
    original: Opened | None
    beside: Close | None

    @property
    def seed(self) -> int:
        return self.opened.request.seed


def gather(request: Request, against: Path | None, trace: Path | None, watch: Watch) -> tuple[Opened, Evidence]:
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
    original = open_request(replace(request, model=against), watch) if against else None
    opened = open_request(_with_keys(request, original), watch)
    model, batch = opened.model, request.batch_size
    if original and original.model.modality is not model.modality:
        theirs, ours = original.model.modality.many, model.modality.many
        raise CodebookError(f"--against {against} takes {theirs}, the model {ours}")
    with watch.phase("measure"):
        ranges = range_errors(model, opened.calibration, batch, request.seed)
        if original:
            model.input_range = original.model.input_range
        elif ranges and request.input_range is None:
            model.input_range = recognized_range(ranges, model.input_range)
        few = few_of(model, opened.calibration, request.seed)
        beside = look(original.model, few, batch) if original else None
        looked = _Looked(opened, few, look(model, few, batch), original, beside)
    with watch.phase("encode"):
        sums, samples = tally(model, opened.calibration, seed=request.seed, limit=POINTS, batch=batch, watch=watch)
        tests, _ = tally(model, opened.test, seed=request.seed, limit=1, batch=batch, watch=watch)
    with watch.phase("measure"):
        books = tuple(
            _book(looked, stage, samples[stage].vectors, sums.books[stage].counts, tests.books[stage].counts)
            for stage in model.chosen
        )
    whole = looked.close.latents[0].flatten(1)
    return opened, Evidence(
        books=books,
        curve=curve_of(Codebook(whole[:1]), whole, request.seed),
        mse=looked.close.mse,
        original_mse=beside.mse if beside else None,
        flat_mse=looked.close.flat_mse,
        ranges=ranges,
        input_range=model.input_range,
        command=model.checkpoint.metadata.get(PREFIX + "command", ""),
        trace=training,
    )


def _with_keys(request: Request, original: Opened | None) -> Request:
    """With the codebooks of the original: a tensor that should follow it and does not looks like another codebook."""
    if original is None or request.codebook_key:
        return request
    keys = tuple(original.model.books[stage].key for stage in original.model.chosen)
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
    cut = cut_rows(looked.close.latents[stage], codebook.dim, looked.seed)
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
        left_when_cut=left_of(codebook, cut),
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
    if theirs.shape != ours.shape:
        return Pair(codebook, used, None, None)
    return Pair(codebook, used, rows, rows_of(ours, looked.seed))


def _alternatives(
    looked: _Looked, stage: int, latents: Tensor, companions: Companions, pair: Pair | None
) -> Iterator[Alternative]:
    model, seed = looked.opened.model, looked.seed
    codebook, batch = on_cpu(model.books[stage]), looked.opened.request.batch_size
    yield from scaled(codebook, latents, seed)
    yield from cut_wrongly(codebook, looked.close.latents[stage], seed)
    if companions.codes is not None and companions.codes.shape == codebook.vectors.shape:
        yield from of_companions(codebook, companions.codes, latents, seed)
    if pair and pair.latents is not None:
        yield from of_original(codebook, pair.latents, seed)
    for bounds in model.modality.input_ranges:
        if bounds != model.input_range:
            yield from of_range(codebook, look(model, looked.few, batch, bounds).latents[stage], bounds, seed)


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
