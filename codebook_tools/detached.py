"""A surgery on the codebook alone: no network, no images, so nothing is measured but what was counted before."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from codebook_tools.assignment import nearest
from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.reading import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.writing import write_checkpoint
from codebook_tools.codebook import REMOVED, Codebook, Strategy, Surgery
from codebook_tools.errors import CodebookError, VerificationError
from codebook_tools.latents import StoredLatents
from codebook_tools.measure import Measurement, use_of
from codebook_tools.models.companions import changed_codebook, rounded, rows_of
from codebook_tools.models.load import CUSTOM, choose_codebook, family_of, lookup_of
from codebook_tools.opening import Request
from codebook_tools.outcome import (
    Result,
    check_request_output,
    provenance,
    request_output,
    settings_of,
    weights_bytes,
)
from codebook_tools.output import remarks, written_config
from codebook_tools.stats import Stats, read_stats
from codebook_tools.strategies.quantize import packed_bytes
from codebook_tools.watch import Watch


def goes_without_images(request: Request, strategy: Strategy | None) -> bool:
    """Whether the request is to be done on the codebook alone.

    Raises CodebookError where it would have to be, and the strategy needs more than it was given.
    """
    looks_at = getattr(strategy, "looks_at", "latents")
    if request.stats is not None:
        if looks_at == "latents":
            raise CodebookError("--stats holds counts, and this looks at latents; give images with --data")
        if request.data or request.test_data:
            raise CodebookError(
                "--stats stands in for images; leave out --data and --test-data, and measure what is written"
            )
        return True
    if request.model is None or request.data or looks_at == "latents":
        return False
    if looks_at == "counts":
        raise CodebookError(
            "it must be known how often each code is used: give images with --data, or counts with --stats"
        )
    if request.test_data:
        raise CodebookError("--test-data alone: give --data, too, or leave it out and measure what is written")
    return True


def operate_detached(command: str, request: Request, strategy: Strategy, watch: Watch) -> Result:
    """Operate on the codebook of a file, write it, and read it back; see `operate` for the rest.

    The result has the stage before as far as counts tell it, and no other.
    """
    with watch.phase("load"):
        checkpoint = read_checkpoint(request.source)
        found = choose_codebook(checkpoint, request.codebook_key)
        family = request.family or family_of(checkpoint)
        lookup, emit = lookup_of(family, request.metric)
        old = Codebook(_finite(checkpoint, found), lookup, emit)
        stats = read_stats(request.stats, checkpoint, found) if request.stats else None
    warnings = []
    if stats is None:
        weights = "" if getattr(strategy, "bits", None) else "all codes weigh alike, and "
        warnings.append(f"neither --data nor --stats: {weights}nothing is measured")
    with watch.phase("strategy"):
        counts = stats.counts if stats else torch.zeros(old.size, dtype=torch.int64)
        surgery = strategy(old, StoredLatents(torch.empty(0, old.dim)), counts)
    new = replace(surgery.codebook, vectors=rounded(checkpoint, found.key, surgery.codebook.vectors))
    output = request_output(request, command, new.size)
    check_request_output(request, output)
    counted = str(request.stats) if request.stats else None
    settings = {"stats": counted, "codes": f"{old.size} -> {new.size}", **settings_of(strategy)}
    warnings += remarks(checkpoint, old.size, new.size, output)
    moved = _nearest_map(surgery, old, new)
    with watch.phase("write"):
        map_path = write_checkpoint(
            checkpoint,
            output,
            changed_codebook(checkpoint, found, new.vectors, _carried_over(counts, moved, new.size)),
            provenance(command, request, checkpoint, found.key, settings, "surgery"),
            {f"{found.key}/index_map": surgery.index_map, f"{found.key}/nearest": moved},
            written_config(checkpoint, new.size),
        )
        written = rows_of(read_checkpoint(output).tensor(found.key), replace(found, size=new.size))
        if not torch.equal(written, new.vectors):
            raise VerificationError(f"{output}: {found.key} on disk is not the codebook that was meant")
    return Result(
        command=command,
        model=str(request.source),
        family=family or CUSTOM,
        settings=settings,
        seed=request.seed,
        warnings=tuple(warnings),
        before=_before(found, stats) if stats else None,
        kept="surgery",
        outputs={"model": str(output), "index_map": str(map_path), "report": None},
        bytes={
            "before": weights_bytes(request.source),
            "after": weights_bytes(output),
            **({"packed": packed_bytes(new, surgery.bits)} if surgery.bits else {}),
        },
        seconds=watch.seconds,
    )


def _finite(checkpoint: Checkpoint, found: FoundCodebook) -> Tensor:
    rows = rows_of(checkpoint.tensor(found.key), found)
    if not bool(torch.isfinite(rows).all()):
        raise CodebookError(f"{found.key} in {checkpoint.path} is not finite")
    return rows


def _before(found: FoundCodebook, stats: Stats) -> Measurement:
    distortion = stats.error / max(1, int(stats.counts.sum()))
    use = use_of(found.key, found.dim, stats.counts, distortion, coverage=None)
    return Measurement(stats.split, stats.images, None, None, None, (use,))


def _nearest_map(surgery: Surgery, old: Codebook, new: Codebook) -> Tensor:
    return torch.where(surgery.index_map == REMOVED, nearest(old.vectors, new), surgery.index_map)


def _carried_over(counts: Tensor, moved: Tensor, size: int) -> Tensor:
    """(size,) float64: each old code's counts go with it."""
    return torch.zeros(size, dtype=torch.float64).index_add_(0, moved, counts.double())
