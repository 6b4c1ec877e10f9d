"""Codebooks in a file of which no network is run: their latents come from files, their counts from an earlier pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook, Latents, Strategy
from codebook_tools.data.latent_files import FileLatents, latents_dim, limited_latents, open_latents, split_latents
from codebook_tools.data.latents import StoredLatents
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.accumulators import BookSums, Sums, Totals, exact
from codebook_tools.evaluation.coverage import POINTS
from codebook_tools.evaluation.figures import Measurement, use_of
from codebook_tools.evaluation.one_pass import LatentSource, run_pass
from codebook_tools.evaluation.stats_file import Part, Stats, holds_sample, read_sample, read_stats
from codebook_tools.evaluation.usage import Survey, Tokens, survey
from codebook_tools.models.choose import along_latents, choose_codebook, choose_codebooks, with_twins
from codebook_tools.models.evidence import uninitialized
from codebook_tools.models.model import Book, Model
from codebook_tools.models.registry import CUSTOM, FAMILIES, check_stated, family_of, metric_of, size_entry
from codebook_tools.models.remarks import stale_state
from codebook_tools.models.settling import settle
from codebook_tools.models.stored_codes import effective_rows, owned_keys
from codebook_tools.models.twins import twin_warning
from codebook_tools.remapping.nearest_map import nearest_map
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.target import Target


def goes_without_images(request: Request, strategy: Strategy | None) -> bool:
    """Whether the request is to be done on the codebooks alone.

    Raises:
        CodebookError: It would have to be, and the strategy needs counts or latents that are missing; or options
            exclude each other.
    """
    needs = getattr(strategy, "needs", "latents")
    if request.latents:
        if request.stats is not None or request.data:
            raise CodebookError("--latents stand in for images and for --stats; leave out --data and --stats")
        if request.latents_cache is not None:
            raise CodebookError("--latents lie on disk already; leave out --latents-cache")
        return True
    if request.stats is not None:
        if needs == "latents" and not holds_sample(request.stats):
            raise CodebookError("--stats holds counts, and this command needs latents; give images with --data")
        if request.data or request.test_data:
            raise CodebookError(
                "--stats stands in for images; leave out --data and --test-data, and measure what is written"
            )
        return True
    if request.knows_sample or request.data or needs == "latents":
        return False
    if needs == "counts":
        raise CodebookError(
            "it must be known how often each code is used: give images with --data, or counts with --stats"
        )
    if request.test_data:
        raise CodebookError("--test-data alone: give --data, too, or leave it out and measure what is written")
    return True


def books_without_images(
    request: Request, checkpoint: Checkpoint, strategy: Strategy | None = None
) -> list[FoundCodebook]:
    """The codebooks that would be operated on: those named, else all; latents are of one codebook."""
    if request.latents or _takes_sample(request, strategy):
        return [with_twins(checkpoint, choose_codebook(checkpoint, request.codebook_key))]
    codebooks, taken = list[FoundCodebook](), set[str]()
    for book in choose_codebooks(checkpoint, request.codebook_key):
        if book.key not in taken:
            codebooks.append(with_twins(checkpoint, book))
            taken |= {place.key for place in codebooks[-1].places}
    return codebooks


def _takes_sample(request: Request, strategy: Strategy | None) -> bool:
    """Whether the latents that were kept with counts are used."""
    return request.stats is not None and getattr(strategy, "needs", "latents") == "latents"


@dataclass(eq=False, kw_only=True)
class FileTarget(Target):
    """Codebooks in a file.

    Attributes:
        surveys: Of each codebook, counts and a sample of its calibration latents; counts alone, or zeros, where there
            is no more.
        calibration: Latents from files; None where there are none.
        test: Latents that figures are of; None where there are none.
        stats: Of each codebook, the counts of an earlier pass; empty where there is none.
    """

    surveys: tuple[Survey, ...] = ()
    calibration: FileLatents | None = None
    test: FileLatents | None = None
    stats: tuple[Stats, ...] = ()

    def survey(self, stage: int, watch: Watch) -> Survey:
        return self.surveys[stage]

    def tokens_after(self, old: Sequence[Codebook], index_maps: Mapping[int, Tensor]) -> tuple[Tokens, ...]:
        """Tokens by the codebooks as they are now: of the sample; without one, counts follow the index map.

        Args:
            old: Each codebook before the surgery.
            index_maps: (old size,) int64 by index of the codebook.
        """
        tokens = list[Tokens]()
        for stage, (known, book) in enumerate(zip(self.surveys, self.model.books, strict=True)):
            codes = nearest(known.sample.vectors, book.codebook)
            if len(codes):
                counts = torch.bincount(codes, minlength=book.codebook.size).double() * (known.total / len(codes))
            else:
                moved = nearest_map(index_maps[stage], old[stage], book.codebook)
                counts = torch.zeros(book.codebook.size, dtype=torch.float64)
                counts.index_add_(0, moved, known.counts.double())
            tokens.append(Tokens(counts, codes))
        return tuple(tokens)

    def all_latents(self, stage: int, survey: Survey) -> Latents:
        if self.calibration is None:
            few, whole = len(survey.sample), survey.total
            raise CodebookError(
                f"--exact goes over all {whole:,} latents, and --stats holds a sample of {few:,}: give --latents or "
                "--data, or leave --exact out"
            )
        return self.calibration

    def reference_latents(self, stage: int) -> Tensor:
        return self.surveys[stage].sample.vectors[:POINTS]

    def sums(self, references: Sequence[Tensor | None], watch: Watch) -> Sums:
        """Of the test latents; without them, the counts of an earlier pass, by the codebooks as they were."""
        if self.test is None:
            images = self.stats[0].images if self.stats else 0
            return Sums(images, 0, Fraction(0), None, self._counted(self.stats))
        (book,), (distance,) = self.model.books, self.reference_distances(references)
        totals = Totals([(book.key, book.codebook, distance)], measured=True)
        run_pass(LatentSource(self.test, book.codebook), [totals], Watch())
        return replace(totals.sums, images=0)

    def measurement(self, sums: Sums) -> Measurement | None:
        if not sums.books:
            return None
        split = self.stats[0].split if self.stats else "test"
        # The counts of latents from files are of no images.
        return Measurement(split, sums.images or None, None, None, None, tuple(map(use_of, sums.books)))

    def part(self) -> Part:
        """The counts, as `measure --stats` keeps them."""
        counted = Sums(0, 0, Fraction(0), None, self._counted(self.surveys))
        return Part(self.model.checkpoint.sha256, "calibration", {}, (1, 1), counted, {})

    def _counted(self, passes: Sequence[Survey | Stats]) -> tuple[BookSums, ...]:
        return tuple(
            BookSums(place.key, place.dim, of.counts, exact(of.error), near=None)
            for place, of in zip(self.codebooks, passes, strict=False)
        )


def open_file(request: Request, watch: Watch, strategy: Strategy | None = None) -> FileTarget:
    """The codebooks that are named, and all that is known of their latents.

    Args:
        request: The model, and latents or counts.
        watch: Progress and seconds by phase.
        strategy: None to measure them.

    Raises:
        CodebookError: Something cannot be read, or does not fit.
    """
    checkpoint = request.checkpoint
    with watch.phase("load"):
        model = _model(request, checkpoint, strategy)
        guesses, _ = settle(model, [], request.metric) if model.family == CUSTOM else ([], None)
        model.family = request.family or model.family
    target = FileTarget(request=request, model=model)
    codebooks, first = target.codebooks, model.books[0]
    target.warnings += [*checkpoint.warnings, *uninitialized(checkpoint, codebooks), *guesses]
    if request.latents:
        _read_latents(target, watch)
    else:
        _read_counts(target, strategy)
    target.settings["metric"] = first.metric.name
    if strategy is not None:
        target.warnings += stale_state(checkpoint, codebooks)
        target.warnings += [twin_warning(book.places, ", equal bit by bit") for book in codebooks if book.also]
        if not request.latents and not request.stats:
            weights = "" if getattr(strategy, "bits", None) else "all codes weigh alike, and "
            target.warnings.append(f"neither --data nor --stats: {weights}nothing is measured")
    return target


def _model(request: Request, checkpoint: Checkpoint, strategy: Strategy | None) -> Model:
    """The codebooks around an empty network."""
    family = request.family or family_of(checkpoint)
    codebooks = books_without_images(request, checkpoint, strategy)
    if request.latents:
        dim = latents_dim(Path(request.latents[0]))
        codebooks = [with_twins(checkpoint, along_latents(checkpoint, codebooks[0], dim))]
    for book in codebooks:
        check_stated(checkpoint, [book])  # each: K in the config will follow it
    stages, entry, metric = tuple(range(len(codebooks))), size_entry(checkpoint), metric_of(family, request.metric)
    return Model(
        family=family if family in FAMILIES else CUSTOM,
        checkpoint=checkpoint,
        network=nn.Module(),
        keys={key: key for book in codebooks for key in owned_keys(checkpoint, book)},
        books=tuple(Book(book, effective_rows(checkpoint, book), metric) for book in codebooks),
        chosen=stages,
        route=stages,
        build=lambda checkpoint, size: nn.Module(),
        power_of_two=entry is not None and entry.power_of_two,
    )


def _read_latents(target: FileTarget, watch: Watch) -> None:
    """Open the files of latents, and survey those for calibration."""
    request, codebook = target.request, target.model.books[0].codebook
    with watch.phase("load"):
        calibration = open_latents([Path(path) for path in request.latents], codebook.dim)
        if request.test_data:
            test = open_latents([Path(str(path)) for path in request.test_data], codebook.dim)
        else:
            calibration, test = split_latents(calibration)
        calibration, test = (limited_latents(rows, request.limit, request.seed) for rows in (calibration, test))
        target.calibration, target.test = replace(calibration, part=distributed.part()), test
    with watch.phase("encode"):
        target.surveys = (survey(target.calibration, codebook, seed=request.seed, watch=watch),)
    target.settings |= {
        "latents": list(request.latents),
        "test_data": [str(one) for one in request.test_data],
        "rows": {"calibration": len(target.calibration), "test": len(test)},
        "limit": request.limit,
    }


def _read_counts(target: FileTarget, strategy: Strategy | None) -> None:
    """The counts of an earlier pass, and the latents that were kept with them where the strategy uses those."""
    request, checkpoint, books = target.request, target.model.checkpoint, target.model.books
    path = request.stats
    target.settings["stats"] = str(path) if path else None
    if path is not None:
        target.stats = tuple(read_stats(path, checkpoint, book.stored) for book in books)
    if path is not None and _takes_sample(request, strategy):
        (book,), (stats,) = books, target.stats
        rows = read_sample(path, book.stored)
        codes = nearest(rows, book.codebook)
        target.surveys = (Survey(stats.counts, int(stats.counts.sum()), StoredLatents(rows), codes, stats.error),)
        return
    known = target.stats or [Stats(torch.zeros(book.codebook.size).long(), 0.0, "", 0) for book in books]
    target.surveys = tuple(
        Survey(of.counts, 0, StoredLatents(torch.empty(0, book.codebook.dim)), torch.empty(0).long(), of.error)
        for book, of in zip(books, known, strict=True)
    )
