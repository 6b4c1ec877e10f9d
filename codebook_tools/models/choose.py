"""Which tensors of a checkpoint are codebooks to operate on, and how they lie there."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from codebook_tools.checkpoints.detect import Detection, FoundCodebook
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.ema_state import follow_by_numbers
from codebook_tools.models.registry import (
    detected,
)
from codebook_tools.models.stored_codes import stored_rows
from codebook_tools.models.twins import twins


def choose_codebooks(checkpoint: Checkpoint, keys: Sequence[str]) -> list[FoundCodebook]:
    """Those named, else all that are surely there. Raises CodebookError, with candidates, where that is not plain."""
    detection = detected(checkpoint)
    if keys:
        return [operable(checkpoint, named(checkpoint, detection, key)) for key in keys]
    if not detection.codebooks:
        raise CodebookError(f"{checkpoint.path} has no codebook: {detection.reason}")
    for found in detection.codebooks:
        if found.confidence == "low":
            raise CodebookError(
                f"{found.key} is only perhaps a codebook; if it is, say so with --codebook-key {found.key}"
            )
    books = [operable(checkpoint, found) for found in detection.codebooks]
    following = {key for book in books for key in book.companions}
    return [book for book in books if book.key not in following]


def choose_codebook(checkpoint: Checkpoint, keys: Sequence[str]) -> FoundCodebook:
    """The one codebook to work on. Raises CodebookError, with the candidates, where there are several."""
    found = choose_codebooks(checkpoint, keys)
    if len(found) > 1:
        names = [book.key for book in found]
        raise CodebookError(
            f"{checkpoint.path} has {len(names)} codebooks, and this takes one: choose with --codebook-key, "
            f"of {few_of(names)}"
        )
    return found[0]


def with_twins(checkpoint: Checkpoint, found: FoundCodebook) -> FoundCodebook:
    """A codebook with all names that it has in the file, by its bytes."""
    detection = detected(checkpoint)
    books = {book.key: book for book in detection.codebooks if book.search != "logits" and book.heads == 1}
    numberless = re.sub(r"\d+", "", found.key)
    for key in checkpoint.shapes:  # stages of the same name, which detection may not know
        if key not in books and re.sub(r"\d+", "", key) == numberless and key != found.key:
            books[key] = replace(named(checkpoint, detection, key), search=found.search)
    others = twins(checkpoint, found, list(books.values()))
    others = tuple(_along_as(checkpoint, place, found) for place in others)
    return replace(found, also=others) if others else found


def _along_as(checkpoint: Checkpoint, place: FoundCodebook, found: FoundCodebook) -> FoundCodebook:
    """A codebook's other place, laid out as the first, with what lies beside it there."""
    padding = checkpoint.shapes[found.key][found.axis] - found.size
    beside = along(checkpoint, place, found.axis, padding)
    return replace(beside, companions=tuple(sorted({*beside.companions, *place.companions})))


def operable(checkpoint: Checkpoint, found: FoundCodebook) -> FoundCodebook:
    if found.heads > 1 or found.search == "logits":
        kind = "chosen by logits" if found.search == "logits" else f"of {found.heads} heads"
        raise CodebookError(f"{found.key} is a codebook {kind}: it can be inspected, not operated on")
    followers = _taken_for_codebooks(checkpoint, found)
    return replace(found, companions=tuple(sorted({*found.companions, *followers}))) if followers else found


def _taken_for_codebooks(checkpoint: Checkpoint, found: FoundCodebook) -> list[str]:
    """Keys in the codebook's module that names alone take for codebooks too, and that follow this one: EMA sums, by
    their numbers or their name, and rows that are a codebook only perhaps."""
    others = {book.key: book for book in detected(checkpoint).codebooks if book.key != found.key}
    near = [key for key in _beside(checkpoint, found.key, found.size, found.dim, others) if key in others]
    if not near:
        return []
    rows = stored_rows(checkpoint.tensor(found.key), found)
    with_all = replace(found, companions=tuple(sorted({*found.companions, *near})))
    stored = {key: checkpoint.tensor(key) for key in with_all.companions}
    own = follow_by_numbers(with_all, rows, stored)
    return [key for key in near if key in own or others[key].confidence == "low"]


def named(checkpoint: Checkpoint, detection: Detection, key: str) -> FoundCodebook:
    for found in detection.codebooks:
        if found.key == key:
            return found
    entry = checkpoint.entries.get(key)
    candidates = ", ".join(found.key for found in detection.codebooks) or "none"
    if entry is None:
        raise CodebookError(f"--codebook-key {key}: no such tensor in {checkpoint.path}; the candidates: {candidates}")
    stacked = len(entry.shape) == 3 and entry.shape[0] == 1
    shape = entry.shape[1:] if stacked else entry.shape
    if len(shape) != 2 or not min(shape) or entry.dtype not in ("F64", "F32", "F16", "BF16"):
        raise CodebookError(
            f"--codebook-key {key}: {entry.dtype} {entry.shape} is no matrix of codes; the candidates: {candidates}"
        )
    plain = FoundCodebook(key, *shape, 0, 1, entry.dtype, "unknown", (), "high")
    padded = along(checkpoint, plain, int(stacked), 1) if shape[0] > 1 else plain
    # A row more than there are counts is padding, as in RQ-VAE.
    counted = any(math.prod(checkpoint.shapes[other]) == padded.size for other in padded.companions)
    whole = along(checkpoint, plain, int(stacked), 0)
    return padded if counted and not whole.companions else whole


def along(checkpoint: Checkpoint, found: FoundCodebook, axis: int, padding: int) -> FoundCodebook:
    """A codebook whose codes lie along another axis of its tensor than was thought, or with rows of padding after them;
    what lies beside it in its module follows it."""
    shape = checkpoint.shapes[found.key]
    size = shape[axis] - padding
    dim = math.prod(shape) // shape[axis]
    own = _beside(checkpoint, found.key, size, dim)
    return replace(found, axis=axis, size=size, dim=dim, companions=tuple(sorted(own)))


def _beside(checkpoint: Checkpoint, key: str, size: int, dim: int, also: Collection[str] = ()) -> list[str]:
    """Tensors of a codebook's module with a number, or a row, for each of its codes, which are no codebook for sure.
    also: keys of codebooks that are listed all the same."""
    books = {book.key for book in detected(checkpoint).codebooks if book.confidence == "high"} - set(also) | {key}
    owner = _owner(key)
    direct = [other for other in checkpoint.shapes if other.rpartition(".")[0] in {owner, key.rpartition(".")[0]}]
    if owner:  # an average may be a module of its own
        inside = (other for other in checkpoint.shapes if other.startswith(f"{owner}."))
        direct += [other for other in inside if other.count(".") == owner.count(".") + 2 and other not in direct]
    stages = {other for other in direct if re.sub(r"\d+", "", other) == re.sub(r"\d+", "", key)}
    shapes = checkpoint.shapes
    return [
        other
        for other in direct
        if other not in books | stages and size in shapes[other] and math.prod(shapes[other]) in (size, size * dim)
    ]


def _owner(key: str) -> str:
    """The module beside whose tensors a codebook lies: that which holds it, or holds its embedding."""
    return (key.removesuffix(".weight")).rpartition(".")[0]


def along_latents(checkpoint: Checkpoint, found: FoundCodebook, dim: int | None) -> FoundCodebook:
    """A codebook as latents of so many dimensions meet it, where its names leave its axes open."""
    shape = [length for length in checkpoint.shapes[found.key] if length > 1]
    if dim is None or found.dim == dim or sorted(shape) != sorted([dim, found.dim]):
        return found
    turned = along(checkpoint, found, checkpoint.shapes[found.key].index(found.dim), 0)
    return turned if turned.dim == dim else found


def find_book(checkpoint: Checkpoint, key: str, layout: Sequence[int] = ()) -> FoundCodebook:
    """The codebook of that key, which is known to be one. layout: its axis and size, where names and shapes do not tell
    them, as `layouts` has them."""
    found = operable(checkpoint, named(checkpoint, detected(checkpoint), key))
    if len(layout) != 2 or layout[0] not in range(len(checkpoint.shapes[key])):
        return found
    axis, padding = layout[0], checkpoint.shapes[key][layout[0]] - layout[1]
    return along(checkpoint, found, axis, padding) if 0 <= padding < checkpoint.shapes[key][axis] else found


def layouts(checkpoint: Checkpoint, books: Iterable[FoundCodebook]) -> dict[str, tuple[int, int]]:
    """Axis and size of the codebooks that lie otherwise than names and shapes tell, by key."""
    detection = detected(checkpoint)
    told = {place.key: named(checkpoint, detection, place.key) for book in books for place in book.places}
    return {
        place.key: (place.axis, place.size)
        for book in books
        for place in book.places
        if (place.axis, place.size) != (told[place.key].axis, told[place.key].size)
    }


def few_of(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
