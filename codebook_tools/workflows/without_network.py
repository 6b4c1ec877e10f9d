"""Codebooks without data: their latents come from files, or their counts from an earlier pass."""

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
from codebook_tools.evaluation.accumulators import BookSums, Sums
from codebook_tools.evaluation.coverage import POINTS
from codebook_tools.evaluation.exact import exact
from codebook_tools.evaluation.figures import Measurement, use_of
from codebook_tools.evaluation.stats_file import Stats, holds_sample, read_sample, read_stats
from codebook_tools.evaluation.usage import Survey, Tokens
from codebook_tools.models.agreement import LEAST
from codebook_tools.models.choose import along_latents, choose_codebook, choose_codebooks, with_twins
from codebook_tools.models.evidence import uninitialized
from codebook_tools.models.from_latents import from_latents, refuse_entry
from codebook_tools.models.load import load_model, own_metric
from codebook_tools.models.model import Book, Model
from codebook_tools.models.network import walks
from codebook_tools.models.proof import Proof, prove_file, prove_opened
from codebook_tools.models.registry import CUSTOM, FAMILIES, check_stated, family_of, metric_of, size_entry
from codebook_tools.models.remarks import stale_state
from codebook_tools.models.settling import settle
from codebook_tools.models.stored_codes import effective_rows, owned_keys
from codebook_tools.models.twins import twin_warning
from codebook_tools.remapping.nearest_map import nearest_map
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import device_of
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_request
from codebook_tools.workflows.target import LatentsTarget, Opened, Target, written_books


def goes_without_images(request: Request, strategy: Strategy | None) -> bool:
    """Whether the request is to be done on the codebooks alone.

    Raises:
        CodebookError: It would have to be, and the strategy needs counts or latents that are missing; or options
            exclude each other.
    """
    needs = getattr(strategy, "needs", "latents")
    if request.latents:
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
    if request.metrics:
        raise CodebookError("--metrics is of reconstructions: give --data, or leave it out")
    return True


def refuse_steps(steps: int) -> None:
    """Raise CodebookError where a fine-tuning of so many steps is asked for, without data."""
    if steps:
        raise CodebookError(f"{steps} steps of fine-tuning need images; give --data, or --steps 0")


def books_without_images(
    request: Request, checkpoint: Checkpoint, strategy: Strategy | None = None
) -> list[FoundCodebook]:
    """The codebooks that would be operated on: those named, else all; a sample kept with counts is of one."""
    if _takes_sample(request, strategy):
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
    """Codebooks in a file, and their counts.

    Attributes:
        surveys: Of each codebook, counts and a sample of its calibration latents; counts alone, or zeros, where there
            is no more.
        stats: Of each codebook, the counts of an earlier pass; empty where there is none.
    """

    surveys: tuple[Survey, ...] = ()
    stats: tuple[Stats, ...] = ()

    def survey(self, stage: int, watch: Watch) -> Survey:
        return self.surveys[stage]

    def tokens(self, watch: Watch) -> tuple[Tokens, ...]:
        return tuple(Tokens(each.counts, each.codes) for each in self.surveys)

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
                counted = index_maps[stage].masked_fill(known.counts == 0, 0)  # the others move nothing anywhere
                moved = nearest_map(counted, old[stage], book.codebook)
                counts = torch.zeros(book.codebook.size, dtype=torch.float64)
                counts.index_add_(0, moved, known.counts.double())
            tokens.append(Tokens(counts, codes))
        return tuple(tokens)

    def all_latents(self, stage: int, survey: Survey) -> Latents:
        few, whole = len(survey.sample), survey.total
        raise CodebookError(
            f"--exact goes over all {whole:,} latents, and --stats holds a sample of {few:,}: give --latents or "
            "--data, or leave --exact out"
        )

    def reference_latents(self, stage: int) -> Tensor:
        return self.surveys[stage].sample.vectors[:POINTS]

    def sums(self, references: Sequence[Tensor | None], watch: Watch, *, compared: bool = True) -> Sums:
        """The counts of an earlier pass, by the codebooks as they were."""
        images = self.stats[0].images if self.stats else 0
        books = tuple(
            BookSums(place.key, place.dim, of.counts, exact(of.error), near=None)
            for place, of in zip(self.codebooks, self.stats, strict=False)
        )
        return Sums(images, 0, Fraction(0), None, books)

    def measurement(self, sums: Sums) -> Measurement | None:
        if not sums.books:
            return None
        return Measurement(self.stats[0].split, sums.images or None, None, None, None, tuple(map(use_of, sums.books)))

    def prove(self, written: Checkpoint, media: Sequence[Tensor]) -> Proof:
        return prove_file(written, written_books(self.model))


def open_file(request: Request, watch: Watch, strategy: Strategy) -> FileTarget:
    """The codebooks that are named, and all that is known of their counts.

    Args:
        request: The model, and counts or nothing.
        watch: Progress and seconds by phase.
        strategy: What is to be done to them.

    Raises:
        CodebookError: Something cannot be read, or does not fit.
    """
    checkpoint = request.checkpoint
    with watch.phase("load"):
        model = _alone(request, checkpoint, books_without_images(request, checkpoint, strategy))
        guesses, _ = settle(model, [], request.metric) if model.family == CUSTOM else ([], None)
        model.family = request.family or model.family
    target = FileTarget(request=request, model=model)
    target.warnings += [*checkpoint.warnings, *uninitialized(checkpoint, target.codebooks), *guesses]
    _read_counts(target, strategy)
    target.settings["metric"] = model.books[0].metric.name
    target.warnings += _remarks(target)
    if not request.stats:
        weights = "" if getattr(strategy, "bits", None) else "all codes weigh alike, and "
        target.warnings.append(f"neither --data nor --stats: {weights}nothing is measured")
    return target


def _remarks(target: Target) -> list[str]:
    """Warnings before a surgery, of state beside codebooks and of twins."""
    twins = [twin_warning(book.places, ", equal bit by bit") for book in target.codebooks if book.also]
    return [*stale_state(target.model.checkpoint, target.codebooks), *twins]


def open_target(request: Request, watch: Watch, *, measuring: bool = False) -> Opened | LatentsTarget:
    """What a command works on that needs no decoder: latents from files where there are some, else data.

    Args:
        request: The model, and latents or data.
        watch: Progress and seconds by phase.
        measuring: Whether the test split alone is needed.

    Raises:
        CodebookError: Something cannot be read, or does not fit.
    """
    return open_latents_of(request, watch) if request.latents else open_request(request, watch, measuring=measuring)


def open_latents_of(request: Request, watch: Watch, strategy: Strategy | None = None) -> LatentsTarget:
    """Codebooks, and the files of latents that stand in for data.

    A file is of the first codebook, and walks through the network to the others. Where one codebook is named, or is all
    that there is, it is of that one, and no network is needed.

    Args:
        request: The model and the files.
        watch: Progress and seconds by phase.
        strategy: What is to be done; None to look.

    Raises:
        CodebookError: Something cannot be read, or does not fit.
    """
    if request.stats is not None or request.data:
        raise CodebookError("--latents stand in for images and for --stats; leave out --data and --stats")
    if request.latents_cache is not None:
        raise CodebookError("--latents lie on disk already; leave out --latents-cache")
    checkpoint, paths = request.checkpoint, [Path(path) for path in request.latents]
    with watch.phase("load"):
        dim = latents_dim(paths[0])
        around = _around(request, checkpoint, dim)
        loaded = around or _of_one(request, checkpoint, dim)
        walked = dim if around and walks(around.network) else None
        calibration, test = _rows(request, paths, walked or loaded.books[0].codebook.dim)
        rows = torch.cat(list(limited_latents(calibration, LEAST, request.seed)))
        known = request
        try:
            model = from_latents(loaded, rows, paths[0].name)
        except CodebookError:
            if len(loaded.books) > 1 or loaded.books[0].codebook.dim != dim:
                raise
            # They are those behind the network's projection, which one codebook meets.
            named = own_metric(loaded.network)
            known = replace(request, metric=request.metric or (named.name if named else None))
            model = from_latents(_of_one(known, checkpoint, dim), rows, paths[0].name)
        warnings, agreed = settle(model, [rows], known.metric) if model.family == CUSTOM else ([], None)
        model.family = request.family or model.family
    target = LatentsTarget(
        request=request,
        model=model,
        calibration=replace(calibration, part=distributed.part()),
        test=test,
        agreed=agreed,
        warnings=[*model.caveats, *checkpoint.warnings],
    )
    target.warnings += [*uninitialized(checkpoint, target.codebooks), *warnings]
    if strategy is not None:
        target.warnings += _remarks(target)
    target.settings |= {
        "latents": list(request.latents),
        "test_data": [str(one) for one in request.test_data],
        "rows": {"calibration": len(calibration), "test": len(test)},
        "limit": request.limit,
        "metric": model.books[model.chosen[0]].metric.name,
    }
    return target


def _around(request: Request, checkpoint: Checkpoint, dim: int | None) -> Model | None:
    """The model with the network that latents of `dim` dimensions walk through; None where one codebook is theirs.

    Raises:
        CodebookError: There are several codebooks, and no network that leads from one to the next.
    """
    if len(request.codebook_key) == 1:
        return None
    if request.network is None:
        name = request.family or family_of(checkpoint)
        books = choose_codebooks(checkpoint, request.codebook_key)
        alone = len(books) == 1 and dim in (books[0].dim, along_latents(checkpoint, books[0], dim).dim)
        if alone or name not in FAMILIES or FAMILIES[name].make is None:
            return None
    try:
        model = load_model(
            checkpoint,
            network=request.network,
            family=request.family,
            codebook_keys=request.codebook_key,
            metric=request.metric,
            device=device_of(request.device),
            bf16=request.precision == "bf16",
        )
        refuse_entry(model)
    except CodebookError as error:
        if "--codebook-key" in str(error):
            raise
        raise CodebookError(f"{error}; latents of one codebook need no network: name it with --codebook-key") from error
    if request.network is None and len(model.books) == 1 and getattr(model.network, "latent_dim", None) != dim:
        return None
    return model


def _of_one(request: Request, checkpoint: Checkpoint, dim: int | None) -> Model:
    """The codebook that latents of `dim` dimensions meet, without a network."""
    place = along_latents(checkpoint, choose_codebook(checkpoint, request.codebook_key), dim)
    return _alone(request, checkpoint, [with_twins(checkpoint, place)])


def _alone(request: Request, checkpoint: Checkpoint, codebooks: Sequence[FoundCodebook]) -> Model:
    """Codebooks around an empty network."""
    family = request.family or family_of(checkpoint)
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


def _rows(request: Request, paths: Sequence[Path], dim: int) -> tuple[FileLatents, FileLatents]:
    """The rows for calibration and those for test, of `dim` dimensions."""
    calibration = open_latents(paths, dim)
    if request.test_data:
        test = open_latents([Path(str(path)) for path in request.test_data], dim)
    else:
        calibration, test = split_latents(calibration)
    for name, rows in (("--latents", calibration), ("--test-data", test)):
        if not len(rows):
            raise CodebookError(f"{name}: there is not one latent in {rows.files[0].name}")
    calibration, test = (limited_latents(rows, request.limit, request.seed) for rows in (calibration, test))
    return calibration, test


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


def prove_request(request: Request, watch: Watch) -> Proof:
    """Compare a file with the network that loads it, on the data or the latents of the request.

    Raises:
        CodebookError: The network cannot be made, does not load the file, or disagrees with what is read.
    """
    opened = open_target(request, watch, measuring=True)
    if isinstance(opened, LatentsTarget) and not opened.with_network:
        raise CodebookError("no network loads the file: give --network, or leave out --codebook-key")
    with watch.phase("measure"):
        stale_state(opened.model.checkpoint, opened.codebooks)
        return prove_opened(opened.model, opened.agreed, opened.few if isinstance(opened, Opened) else opened.media())
