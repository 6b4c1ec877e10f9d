"""Files with the sums of a pass over data, for surgeries without images and for merging parts of a pass."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.sealed_file import Sealed
from codebook_tools.checkpoints.write import write_tensors
from codebook_tools.data.sampling import Sample
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.accumulators import BookSums, Sums
from codebook_tools.evaluation.exact import LIMBS, from_limbs, limbs
from codebook_tools.evaluation.ids import Distinct
from codebook_tools.evaluation.quoted.tally import Tally
from codebook_tools.runtime.safe_io import parse_json


@dataclass(frozen=True, eq=False)
class Stats:
    """Usage of one codebook.

    Attributes:
        counts: (size,) int64, assignments per code.
        error: Sum of squared distances from latents to their codes.
        split: Split of the latents, "calibration" or "test".
        images: Number of images; 0 where there were only latents.
    """

    counts: Tensor
    error: float
    split: str
    images: int


@dataclass(frozen=True, eq=False)
class Part:
    """Sums of a pass over data, or of one of its parts.

    Attributes:
        checkpoint: SHA-256 of the model's file.
        split: Split of the counted latents.
        about: Other JSON values that all parts of a pass share.
        shard: Number of the part, from 1, and of all parts.
        counted: Sums of the counted latents, without reconstructions.
        bad: Reasons by name of unreadable items.
        measured: Sums of the test data; None where latents came from files.
        samples: A sample of the counted latents of each codebook; empty where latents came from files.
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
    """Write a part with its samples.

    Args:
        path: A .safetensors file.
        part: The sums.
        force: Whether an existing file is replaced.

    Raises:
        CodebookError: The file exists and `force` is off, or writing fails.
    """
    tensors = dict[str, Tensor]()
    for book in part.counted.books:
        tensors |= {f"{book.key}/counts": book.counts, f"{book.key}/squared_error": limbs(book.error)}
    for book, sample in zip(part.counted.books, part.samples, strict=False):
        tensors |= {f"{book.key}/sample": sample.vectors, f"{book.key}/sample_hashes": sample.hashes}
    if part.measured is not None:
        tensors |= dict(zip(_MEASURED, part.measured.packed(), strict=True))
        if (ids := part.measured.ids) is not None:
            tensors[_IDS] = torch.from_numpy(ids.hashes.view(np.int64))
            tensors[f"{_IDS}/counted"] = torch.tensor([ids.items, ids.halved])
        for name, tally in part.measured.quoted.items():
            tensors |= dict(zip(_quoted(name), tally.packed(), strict=True))
    about = {
        "checkpoint_sha256": part.checkpoint,
        "split": part.split,
        "images": str(part.counted.images),
        "shard": f"{part.shard[0]}/{part.shard[1]}",
        "codebooks": json.dumps([(book.key, len(book.counts), book.dim) for book in part.counted.books]),
        "about": json.dumps(part.about, sort_keys=True),
        "bad": json.dumps(part.bad, sort_keys=True),
    }
    if part.measured is not None and part.measured.rate is not None:
        about["rate"] = str(part.measured.rate)
    write_tensors(path, tensors, {PREFIX + name: value for name, value in about.items()}, force=force)


_MEASURED = ("measured/integers", "measured/floats")
_IDS = "measured/ids"
_QUOTED = "measured/quoted/"


def _quoted(name: str) -> tuple[str, str]:
    return f"{_QUOTED}{name}/integers", f"{_QUOTED}{name}/floats"


def read_part(path: Path) -> Part:
    """Read a part without its samples.

    Raises:
        CodebookError: The file is no part of a pass over images, or is damaged.
    """
    stored = _opened(path)
    about = _about(stored)
    if "shard" not in about or _MEASURED[0] not in stored.entries:
        raise CodebookError(f"{path} is no part of a pass over images; `codebook measure --shard I/N --stats FILE` is")
    try:
        books = [(key, int(size), int(dim)) for key, size, dim in parse_json(about["codebooks"])]
        i, n = map(int, about["shard"].split("/"))
        if not 1 <= i <= n:
            raise ValueError(f"it says that it is part {i} of {n}")
        tensor = stored.tensor
        of_books = tuple(
            BookSums(key, dim, tensor(f"{key}/counts"), from_limbs(tensor(f"{key}/squared_error")), near=None)
            for key, _, dim in books
        )
        rate = Fraction(about["rate"]) if "rate" in about else None
        counted = Sums(int(about["images"]), 0, Fraction(0), None, of_books, rate=rate)
        measured = counted.unpacked(*map(tensor, _MEASURED))
        return Part(
            checkpoint=about["checkpoint_sha256"],
            split=about["split"],
            about=parse_json(about["about"]),
            shard=(i, n),
            counted=counted,
            bad=parse_json(about["bad"]),
            measured=replace(measured, ids=_read_ids(stored), quoted=_read_quoted(stored)),
        )
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CodebookError(f"{path} is damaged: {error}; measure that part anew") from error


def _read_quoted(stored: Sealed) -> dict[str, Tally]:
    names = {key.split("/")[2] for key in stored.entries if key.startswith(_QUOTED)}
    return {name: Tally.unpacked(*map(stored.tensor, _quoted(name))) for name in sorted(names)}


def _read_ids(stored: Sealed) -> Distinct | None:
    if _IDS not in stored.entries:
        return None
    items, halved = stored.tensor(f"{_IDS}/counted").tolist()
    return Distinct(items, stored.tensor(_IDS).numpy().view(np.uint64), halved)


def read_hashed(path: Path, book: BookSums) -> Sample:
    """Read the sample of a codebook with its hashes.

    Raises:
        CodebookError: The file holds none of that codebook's dimensions.
    """
    stored, keys = _opened(path), (f"{book.key}/sample_hashes", f"{book.key}/sample")
    shapes = [stored.entries[key].shape if key in stored.entries else () for key in keys]
    if shapes[1][1:] != (book.dim,) or shapes[0] != shapes[1][:1]:
        raise CodebookError(f"{path} is damaged: it holds no sample of {book.key}; measure that part anew")
    return Sample(*map(stored.tensor, keys))


def read_stats(path: Path, checkpoint: Checkpoint, codebook: FoundCodebook) -> Stats:
    """Read the counts of a codebook.

    Args:
        path: File of a whole pass.
        checkpoint: The one that was measured.
        codebook: One of its codebooks.

    Raises:
        CodebookError: The file is of another checkpoint or of a part of a pass, lacks the codebook, or is damaged.
    """
    stored = _opened(path)
    about = _about(stored)
    if "checkpoint_sha256" not in about or f"{codebook.key}/counts" not in stored.entries:
        raise CodebookError(f"{path} holds no counts of {codebook.key}; `codebook measure --stats FILE` writes them")
    other = f"{path} counts the codes of another checkpoint; measure {checkpoint.path} with a --stats of its own"
    checkpoint.expect_sha256(about["checkpoint_sha256"], CodebookError(other))
    shard = about.get("shard", _WHOLE)
    if shard != _WHOLE:
        raise CodebookError(
            f"{path} is part {shard} of a pass; `codebook measure --merge FILE... --stats OUT` adds all parts"
        )
    counts = stored.tensor(f"{codebook.key}/counts")
    error = (
        stored.tensor(f"{codebook.key}/squared_error") if f"{codebook.key}/squared_error" in stored.entries else None
    )
    images = stored.metadata.get(PREFIX + "images", "")
    sound = counts.dtype == torch.int64 and counts.shape == (codebook.size,) and not bool((counts < 0).any())
    if not sound or error is None or error.numel() not in (1, LIMBS) or not images.isdecimal() or len(images) > 18:
        checkpoint.check_sha256()  # what does not fit may be of another checkpoint
        raise CodebookError(f"{path} is damaged: its counts are not those of {codebook.size} codes; measure anew")
    return Stats(counts, float(error.sum()), about.get("split", ""), int(images))


_WHOLE = "1/1"


def _opened(path: Path) -> Sealed:
    stored = read_checkpoint(path)
    return Sealed(path, stored.entries, stored.metadata, "measure anew")


def _about(stored: Sealed) -> dict[str, str]:
    """The metadata that `write_part` wrote."""
    return {name.removeprefix(PREFIX): value for name, value in stored.metadata.items() if name.startswith(PREFIX)}


def holds_sample(path: Path) -> bool:
    """Whether a file holds latents beside the counts."""
    return any(key.endswith("/sample") for key in _opened(path).entries)


def read_sample(path: Path, codebook: FoundCodebook) -> Tensor:
    """Read the sample of latents of a codebook.

    Returns:
        (n, dim) float32, in a random order.

    Raises:
        CodebookError: The file holds no latents of that codebook.
    """
    stored, key = _opened(path), f"{codebook.key}/sample"
    rows = stored.tensor(key) if key in stored.entries else torch.empty(0)
    if rows.ndim != 2 or rows.shape[1] != codebook.dim or rows.dtype != torch.float32 or not len(rows):
        raise CodebookError(f"{path} holds no latents of {codebook.key}; measure anew, or give images with --data")
    return rows
