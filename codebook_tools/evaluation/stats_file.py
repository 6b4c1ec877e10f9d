"""What a pass over data counted, kept in a file: for surgeries without images, and to be added to other parts of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.sealed_file import Sealed
from codebook_tools.checkpoints.write import write_tensors
from codebook_tools.data.sampling import Sample
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.accumulators import LIMBS, BookSums, Sums, from_limbs, limbs
from codebook_tools.runtime.safe_io import parse_json


@dataclass(frozen=True, eq=False)
class Stats:
    """What is known of one codebook. counts: (size,) int64, assignments per code. error: sum of squared distances from
    latents to their codes. split: whose latents they are, "calibration" or "test". images: how many those were, 0 where
    there were only latents."""

    counts: Tensor
    error: float
    split: str
    images: int


@dataclass(frozen=True, eq=False)
class Part:
    """What a pass over data found, or one of the parts that it was cut into.

    checkpoint: SHA-256 of the model's. split: whose latents were counted. about: what else all parts of a pass share,
    as JSON has it. shard: which part, from 1, of how many. counted: without reconstructions. bad: items that could not
    be read, and the reasons. measured: of the test data, and samples: of the latents counted, of each codebook; neither
    where latents came from files.
    """

    checkpoint: str
    split: str
    about: Mapping[str, object]
    shard: tuple[int, int]
    counted: Sums
    bad: Mapping[str, str]
    measured: Sums | None = None
    samples: tuple[Sample, ...] = ()


def write_part(path: Path, part: Part, force: bool) -> None:
    """Raises CodebookError where the disk fails, or there is such a file and `force` is not given."""
    tensors = dict[str, Tensor]()
    for book in part.counted.books:
        tensors |= {f"{book.key}/counts": book.counts, f"{book.key}/squared_error": limbs(book.error)}
    for book, sample in zip(part.counted.books, part.samples, strict=False):
        tensors |= {f"{book.key}/sample": sample.vectors, f"{book.key}/sample_hashes": sample.hashes}
    if part.measured is not None:
        tensors |= dict(zip(_MEASURED, part.measured.packed(), strict=True))
    about = {
        "checkpoint_sha256": part.checkpoint,
        "split": part.split,
        "images": str(part.counted.images),
        "shard": f"{part.shard[0]}/{part.shard[1]}",
        "codebooks": json.dumps([(book.key, len(book.counts), book.dim) for book in part.counted.books]),
        "about": json.dumps(part.about, sort_keys=True),
        "bad": json.dumps(part.bad, sort_keys=True),
    }
    write_tensors(path, tensors, {PREFIX + name: value for name, value in about.items()}, force=force)


_MEASURED = ("measured/integers", "measured/floats")


def read_part(path: Path) -> Part:
    """All of a file but its samples. Raises CodebookError where it holds nothing that can be added to others."""
    stored = _opened(path)
    told = {name.removeprefix(PREFIX): value for name, value in stored.metadata.items() if name.startswith(PREFIX)}
    if "shard" not in told or _MEASURED[0] not in stored.entries:
        raise CodebookError(f"{path} is no part of a pass over images; `codebook measure --shard I/N --stats FILE` is")
    try:
        books = [(key, int(size), int(dim)) for key, size, dim in parse_json(told["codebooks"])]
        i, n = map(int, told["shard"].split("/"))
        if not 1 <= i <= n:
            raise ValueError(f"it says that it is part {i} of {n}")
        tensor = stored.tensor
        of_books = tuple(
            BookSums(key, dim, tensor(f"{key}/counts"), from_limbs(tensor(f"{key}/squared_error")), near=None)
            for key, _, dim in books
        )
        counted = Sums(int(told["images"]), 0, Fraction(0), None, of_books)
        return Part(
            checkpoint=told["checkpoint_sha256"],
            split=told["split"],
            about=parse_json(told["about"]),
            shard=(i, n),
            counted=counted,
            bad=parse_json(told["bad"]),
            measured=counted.unpacked(*map(tensor, _MEASURED)),
        )
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CodebookError(f"{path} is damaged: {error}; measure that part anew") from error


def read_hashed(path: Path, book: BookSums) -> Sample:
    """The latents that are kept of a codebook, and their hashes. Raises CodebookError where they do not fit."""
    stored, keys = _opened(path), (f"{book.key}/sample_hashes", f"{book.key}/sample")
    shapes = [stored.entries[key].shape if key in stored.entries else () for key in keys]
    if shapes[1][1:] != (book.dim,) or shapes[0] != shapes[1][:1]:
        raise CodebookError(f"{path} is damaged: it holds no sample of {book.key}; measure that part anew")
    return Sample(*map(stored.tensor, keys))


def read_stats(path: Path, checkpoint: Checkpoint, found: FoundCodebook) -> Stats:
    """The counts in it, and no more. Raises CodebookError where they are of another checkpoint, of a part of a pass, or
    damaged."""
    stored = _opened(path)
    made_for = stored.metadata.get(PREFIX + "checkpoint_sha256")
    if made_for is None or f"{found.key}/counts" not in stored.entries:
        raise CodebookError(f"{path} holds no counts of {found.key}; `codebook measure --stats FILE` writes them")
    if made_for != checkpoint.sha256:
        raise CodebookError(
            f"{path} counts the codes of another checkpoint; measure {checkpoint.path} with a --stats of its own"
        )
    shard = stored.metadata.get(PREFIX + "shard", _WHOLE)
    if shard != _WHOLE:
        raise CodebookError(
            f"{path} is part {shard} of a pass; `codebook measure --merge FILE... --stats OUT` adds all parts"
        )
    counts = stored.tensor(f"{found.key}/counts")
    error = stored.tensor(f"{found.key}/squared_error") if f"{found.key}/squared_error" in stored.entries else None
    images = stored.metadata.get(PREFIX + "images", "")
    sound = counts.dtype == torch.int64 and counts.shape == (found.size,) and not bool((counts < 0).any())
    if not sound or error is None or error.numel() not in (1, LIMBS) or not images.isdecimal() or len(images) > 18:
        raise CodebookError(f"{path} is damaged: its counts are not those of {found.size} codes; measure anew")
    return Stats(counts, float(error.sum()), stored.metadata.get(PREFIX + "split", ""), int(images))


_WHOLE = "1/1"


def _opened(path: Path) -> Sealed:
    stored = read_checkpoint(path)
    return Sealed(path, stored.entries, stored.metadata, "measure anew")


def holds_sample(path: Path) -> bool:
    """Whether there are latents with the counts."""
    return any(key.endswith("/sample") for key in _opened(path).entries)


def read_sample(path: Path, found: FoundCodebook) -> Tensor:
    """(n, dim) float32: the latents that are kept of a codebook, in an order that looks random.

    Raises CodebookError where there are none, or they are no latents of it.
    """
    stored, key = _opened(path), f"{found.key}/sample"
    rows = stored.tensor(key) if key in stored.entries else torch.empty(0)
    if rows.ndim != 2 or rows.shape[1] != found.dim or rows.dtype != torch.float32 or not len(rows):
        raise CodebookError(f"{path} holds no latents of {found.key}; measure anew, or give images with --data")
    return rows
