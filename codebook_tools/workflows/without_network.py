"""Surgeries on codebooks alone: no network and no images, but counts, or latents, or neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.write import write_checkpoint
from codebook_tools.clustering.assignment import nearest, unit
from codebook_tools.codebook import Codebook, Emit, Latents, Strategy, Surgery
from codebook_tools.data.latent_files import FileLatents, latents_dim, limited_latents, open_latents, split_latents
from codebook_tools.data.latents import StoredLatents
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.accumulators import BookSums, Sums, Totals, exact
from codebook_tools.evaluation.coverage import POINTS, reference_distance
from codebook_tools.evaluation.figures import CodebookUse, Measurement, use_of
from codebook_tools.evaluation.one_pass import LatentSource, run_pass
from codebook_tools.evaluation.stats_file import Part, Stats, holds_sample, read_sample, read_stats, write_part
from codebook_tools.evaluation.usage import Survey, survey
from codebook_tools.models.choose import along_latents, choose_codebook, choose_codebooks, with_twins
from codebook_tools.models.evidence import told_by_file, uninitialised
from codebook_tools.models.output import remarks, written_config
from codebook_tools.models.proof import Proof, prove_file, read_partial
from codebook_tools.models.registry import (
    CUSTOM,
    FAMILIES,
    METRICS,
    are_unit,
    check_stated,
    family_of,
    guessed,
    lookup_of,
    metric_of,
    size_entry,
    unit_warning,
)
from codebook_tools.models.remarks import dependents_warning, stale_state
from codebook_tools.models.stored_codes import changed_codebook, effective_rows, owned_keys, rounded
from codebook_tools.models.transforms import refuse_unknown, transforms_beside
from codebook_tools.models.twins import twin_warning
from codebook_tools.remapping.nearest_map import nearest_map
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import device_of
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import on_device
from codebook_tools.strategies.padding import common_sizes, filled, remark
from codebook_tools.strategies.quantize import packed_bytes
from codebook_tools.workflows.model_card import cards
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import Result, check_request_output, provenance, settings_of, weights_bytes


def goes_without_images(request: Request, strategy: Strategy | None) -> bool:
    """Whether the request is to be done on the codebooks alone.

    Raises CodebookError where it would have to be, and the strategy needs more than it was given.
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
            raise CodebookError("--stats holds counts, and this looks at latents; give images with --data")
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
    """The codebooks that would be operated on: those named, else all; latents are one codebook's."""
    if request.latents or _takes_sample(request, strategy):
        return [with_twins(checkpoint, choose_codebook(checkpoint, request.codebook_key))]
    found, taken = list[FoundCodebook](), set[str]()
    for book in choose_codebooks(checkpoint, request.codebook_key):
        if book.key not in taken:
            found.append(with_twins(checkpoint, book))
            taken |= {place.key for place in found[-1].places}
    return found


def _takes_sample(request: Request, strategy: Strategy | None) -> bool:
    """Whether the latents that were kept with counts are looked at."""
    return request.stats is not None and getattr(strategy, "needs", "latents") == "latents"


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of one codebook's use. calibration, seen, test: its latents; stats: of a pass; or nothing."""

    found: FoundCodebook
    old: Codebook
    calibration: FileLatents | None = None
    seen: Survey | None = None
    test: FileLatents | None = None
    stats: Stats | None = None

    @property
    def counts(self) -> Tensor:
        if self.seen is not None:
            return self.seen.counts
        return self.stats.counts if self.stats else torch.zeros(self.old.size, dtype=torch.int64)

    def hits(self, codes: Tensor, size: int) -> Tensor:
        """(size,) float64: of all latents, by the codes of the sample."""
        assert self.seen is not None
        return torch.bincount(codes, minlength=size).double() * (self.seen.total / len(codes))

    def operated(self, strategy: Strategy) -> Surgery:
        latents: Latents = self.seen.sample if self.seen else StoredLatents(torch.empty(0, self.old.dim))
        if self.seen and self.seen.sampled and getattr(strategy, "exact", False):
            if self.calibration is None:
                few, all_ = len(self.seen.sample), self.seen.total
                raise CodebookError(
                    f"--exact goes over all {all_:,} latents, and --stats holds a sample of {few:,}: give --latents or "
                    "--data, or leave --exact out"
                )
            latents = self.calibration
        return strategy(self.old, latents, self.counts)


def measure_detached(request: Request, watch: Watch, stats: Path | None) -> Result:
    """How one codebook is used by latents from files; see `measure_model` for the rest."""
    goes_without_images(request, None)
    checkpoint = request.checkpoint
    known, settings = _look(request, checkpoint, watch)
    before = _measured(request, known, [one.old for one in known])
    if stats is not None:
        books = tuple(_sums(one.found, one.seen.counts, one.seen.error) for one in known if one.seen)
        counted = Sums(0, 0, Fraction(0), None, books)
        part = Part(checkpoint.sha256, "calibration", {}, (1, 1), counted, {})
        distributed.by_first(lambda: write_part(stats, part, request.force))
        settings["stats"] = str(stats)
    return Result(
        command="measure",
        model=str(request.source),
        family=request.family or family_of(checkpoint) or CUSTOM,
        settings=settings,
        seed=request.seed,
        warnings=(*_guesses(request, checkpoint, known), *told_by_file(checkpoint, [one.found for one in known])),
        before=before,
        bytes={"before": request.checkpoint.nbytes, "after": None},
        seconds=watch.seconds,
    )


def operate_detached(command: str, request: Request, strategy: Strategy, watch: Watch) -> Result:
    """Operate on the codebooks of a file, write them, and read them back; see `operate` for the rest.

    Measured are the codebooks alone: on latents before and after, on counts before, else not at all.
    """
    checkpoint = request.checkpoint
    known, settings = _look(request, checkpoint, watch, strategy)
    warnings = _guesses(request, checkpoint, known)
    warnings += stale_state(checkpoint, [one.found for one in known])
    warnings += [twin_warning(one.found.places, ", equal bit by bit") for one in known if one.found.also]
    if not request.latents and not request.stats:
        weights = "" if getattr(strategy, "bits", None) else "all codes weigh alike, and "
        warnings.append(f"neither --data nor --stats: {weights}nothing is measured")
    for one in known:
        warnings += one.seen.remarks(getattr(strategy, "exact", False)) if one.seen else []
    with watch.phase("strategy"):
        strategy = on_device(strategy, device_of(request.device))
        surgeries = [distributed.of_first(one.operated(strategy)) for one in known]
    asked, keys = [surgery.codebook.size for surgery in surgeries], [one.found.key for one in known]
    entry = size_entry(checkpoint)
    sizes = common_sizes([one.old.size for one in known], asked, entry is not None and entry.power_of_two)
    warnings += remark(keys, asked, sizes)
    output = check_request_output(request, command, max(sizes))
    old_size = known[0].old.size
    warnings += remarks(checkpoint, old_size, max(sizes), output)
    owned = {key for one in known for key in owned_keys(checkpoint, one.found)}
    warnings += dependents_warning(checkpoint, owned, old_size, max(sizes))
    settings |= {"codes": f"{old_size} -> {max(sizes)}", **settings_of(strategy)}
    changed, maps, new = dict[str, Tensor](), dict[str, Tensor](), list[Codebook]()
    for one, surgery, size in zip(known, surgeries, sizes, strict=True):
        surgery = filled(surgery, one.old, one.counts, size)
        book = _stored(checkpoint, one.found, surgery.codebook)
        samples = (one.seen.codes, nearest(one.seen.sample.vectors, book)) if one.seen else None
        moved = nearest_map(surgery.index_map, one.old, book, samples)
        hits = one.hits(samples[1], size) if samples else _carried_over(one.counts, moved, size)
        changed |= changed_codebook(checkpoint, one.found, book.vectors, hits, surgery.index_map)
        for place in one.found.places:
            maps |= {f"{place.key}/index_map": surgery.index_map, f"{place.key}/nearest": moved}
        new.append(book)
    stages = {
        "before": _measured(request, known, [one.old for one in known]),
        "surgery": _measured(request, known, new) if request.latents else None,
    }
    with watch.phase("write"):
        by_key = {place.key: size for one, size in zip(known, sizes, strict=True) for place in one.found.places}
        about = provenance(
            command, request, checkpoint, by_key, settings, "surgery", books=[one.found for one in known]
        )
        config = written_config(checkpoint, max(sizes))
        told = cards(output, checkpoint, command, settings, by_key, stages, "surgery")

        proofs = list[Proof]()

        def check() -> None:
            meant = [(one.found.resized(book.size), book) for one, book in zip(known, new, strict=True)]
            proofs.append(prove_file(read_partial(output), meant))

        def write() -> tuple[Path, int, Proof]:
            map_path = write_checkpoint(
                checkpoint, output, changed, about, maps, config, told, force=request.force, check=check
            )
            return map_path, weights_bytes(output), proofs[0]

        map_path, nbytes, proof = distributed.by_first(write)
    bits = surgeries[0].bits
    return Result(
        command=command,
        model=str(request.source),
        family=request.family or family_of(checkpoint) or CUSTOM,
        settings=settings,
        seed=request.seed,
        warnings=tuple(warnings),
        before=stages["before"],
        surgery=stages["surgery"],
        kept="surgery",
        proof=proof,
        outputs={"model": str(output), "index_map": str(map_path), "report": None},
        bytes={
            "before": request.checkpoint.nbytes,
            "after": nbytes,
            **({"packed": sum(packed_bytes(book, bits) for book in new)} if bits else {}),
        },
        seconds=watch.seconds,
    )


def _look(
    request: Request, checkpoint: Checkpoint, watch: Watch, strategy: Strategy | None = None
) -> tuple[list[_Known], dict[str, object]]:
    """What there is to know of each codebook, and the settings that say where it came from."""
    family = request.family or family_of(checkpoint)
    lookup, emit = lookup_of(family, request.metric)
    with watch.phase("load"):
        found_books = books_without_images(request, checkpoint, strategy)
        if request.latents:
            dim = latents_dim(Path(request.latents[0]))
            found_books = [with_twins(checkpoint, along_latents(checkpoint, found_books[0], dim))]
        for found in found_books:
            check_stated(checkpoint, [found])  # each: K in the config will follow it
        if family not in FAMILIES:
            owned = {key for found in found_books for key in owned_keys(checkpoint, found)}
            for found in found_books:
                refuse_unknown(found, transforms_beside(checkpoint, found, owned), with_network=False)
        vectors = [effective_rows(checkpoint, found) for found in found_books]
        if _searched_unknown(request, family) and all(map(are_unit, vectors)):
            lookup, emit = METRICS["cosine-unit"]
        books = [_Known(found, Codebook(rows, lookup, emit)) for found, rows in zip(found_books, vectors, strict=True)]
    metric = {"metric": metric_of(lookup, emit)}
    if request.latents:
        one, settings = _with_latents(request, books[0], watch)
        return [one], settings | metric
    if request.stats is not None:
        books = [replace(one, stats=read_stats(request.stats, checkpoint, one.found)) for one in books]
        if _takes_sample(request, strategy):
            books = [_with_sample(one, request.stats) for one in books]
    return books, {"stats": str(request.stats) if request.stats else None, **metric}


def _guesses(request: Request, checkpoint: Checkpoint, known: list[_Known]) -> list[str]:
    """What to warn of before anything is done: what was not read of the file, and what nobody says of its codes."""
    family = request.family or family_of(checkpoint)
    first = [*checkpoint.warnings, *uninitialised(checkpoint, [one.found for one in known])]
    if _searched_unknown(request, family) and known[0].old.emit is Emit.UNIT:
        return [*first, unit_warning(known[0].found.key)]
    return [*first, *(told for one in known for told in guessed(one.found, family, request.metric))]


def _searched_unknown(request: Request, family: str | None) -> bool:
    """Whether nobody says how the codes are searched."""
    return request.metric is None and family not in FAMILIES


def _with_latents(request: Request, one: _Known, watch: Watch) -> tuple[_Known, dict[str, object]]:
    with watch.phase("load"):
        calibration = open_latents([Path(path) for path in request.latents], one.old.dim)
        if request.test_data:
            test = open_latents([Path(str(path)) for path in request.test_data], one.old.dim)
        else:
            calibration, test = split_latents(calibration)
        calibration, test = (limited_latents(rows, request.limit, request.seed) for rows in (calibration, test))
        calibration = replace(calibration, part=distributed.part())
    with watch.phase("encode"):
        seen = survey(calibration, one.old, seed=request.seed, watch=watch)
    settings: dict[str, object] = {
        "latents": list(request.latents),
        "test_data": [str(one) for one in request.test_data],
        "rows": {"calibration": len(calibration), "test": len(test)},
        "limit": request.limit,
    }
    return replace(one, calibration=calibration, seen=seen, test=test), settings


def _with_sample(one: _Known, path: Path) -> _Known:
    """With the latents that were kept beside the counts; the counts are of all."""
    assert one.stats is not None
    rows = read_sample(path, one.found)
    total, codes = int(one.stats.counts.sum()), nearest(rows, one.old)
    return replace(one, seen=Survey(one.stats.counts, total, StoredLatents(rows), codes, one.stats.error))


def _stored(checkpoint: Checkpoint, found: FoundCodebook, codebook: Codebook) -> Codebook:
    """The codebook as the file will hold it; rows that are given out at unit length are stored so."""
    vectors = unit(codebook.vectors) if codebook.emit is Emit.UNIT else codebook.vectors
    return replace(codebook, vectors=rounded(checkpoint, found, vectors))


def _measured(request: Request, known: list[_Known], codebooks: list[Codebook]) -> Measurement | None:
    """On the test latents; else what the counts tell of the codebooks as they were; else nothing."""
    if request.latents:
        uses = [_use(one, codebook, request.seed) for one, codebook in zip(known, codebooks, strict=True)]
        return Measurement("test", None, None, None, None, tuple(uses))
    stats = {one.found: one.stats for one in known if one.stats}
    if not stats:
        return None
    first = next(iter(stats.values()))
    images = first.images or None  # the counts of latents from files have none
    return Measurement(first.split, images, None, None, None, _counted(stats))


def _counted(stats: Mapping[FoundCodebook, Stats]) -> tuple[CodebookUse, ...]:
    return tuple(use_of(_sums(found, of.counts, of.error)) for found, of in stats.items())


def _sums(found: FoundCodebook, counts: Tensor, error: float) -> BookSums:
    return BookSums(found.key, found.dim, counts, exact(error), near=None)


def _use(one: _Known, codebook: Codebook, seed: int) -> CodebookUse:
    assert one.test is not None and one.seen is not None
    reference = reference_distance(one.seen.sample.vectors[:POINTS], codebook, seed=seed)
    totals = Totals([(one.found.key, codebook, reference)], measured=True)
    run_pass(LatentSource(one.test, codebook), [totals], Watch())
    return use_of(totals.sums.books[0])


def _carried_over(counts: Tensor, moved: Tensor, size: int) -> Tensor:
    """(size,) float64: each old code's counts go with it."""
    return torch.zeros(size, dtype=torch.float64).index_add_(0, moved, counts.double())
