"""Which tensors of a checkpoint are codebooks to operate on, and how they lie there."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.detect import Detection, FoundCodebook
from codebook_tools.checkpoints.matrices import FEW, FLOATS, listed, matrices
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.ema_state import follow_by_numbers
from codebook_tools.models.registry import detected
from codebook_tools.models.stored_codes import stored_rows
from codebook_tools.models.twins import twins

if TYPE_CHECKING:
    from torch import Tensor


def choose_codebooks(checkpoint: Checkpoint, keys: Sequence[str]) -> list[FoundCodebook]:
    """The codebooks to operate on.

    Args:
        checkpoint: The file.
        keys: Their tensors; empty for all codebooks that detection is sure of.

    Raises:
        CodebookError: There is none, one is unsure and must be named, or one cannot be operated on.
    """
    detection = detected(checkpoint)
    if keys:
        return [operable(checkpoint, named(checkpoint, detection, key)) for key in keys]
    if not detection.codebooks:
        raise CodebookError(f"{checkpoint.path} has no codebook: {detection.reason}{listed(matrices(checkpoint))}")
    unsure = [book.key for book in detection.codebooks if book.confidence == "low"]
    if unsure:
        keys = " ".join(f"--codebook-key {book.key}" for book in detection.codebooks)
        way_out = "if it is, say so with" if len(detection.codebooks) == 1 else "give those that are one:"
        raise CodebookError(f"{', '.join(unsure)} is only perhaps a codebook; {way_out} {keys}")
    books = [operable(checkpoint, book) for book in detection.codebooks]
    following = {key for book in books for key in book.companions}
    return [book for book in books if book.key not in following]


def choose_codebook(checkpoint: Checkpoint, keys: Sequence[str]) -> FoundCodebook:
    """The one codebook to operate on, as `choose_codebooks`. Raises CodebookError where there are several."""
    books = choose_codebooks(checkpoint, keys)
    if len(books) > 1:
        names = [book.key for book in books]
        raise CodebookError(
            f"{checkpoint.path} has {len(names)} codebooks, and this takes one: choose with --codebook-key, "
            f"of {', '.join(names)}"
        )
    return books[0]


def with_twins(checkpoint: Checkpoint, book: FoundCodebook) -> FoundCodebook:
    """The codebook with `also` set: other tensors of the file that are equal to its own bit by bit."""
    detection = detected(checkpoint)
    books = {book.key: book for book in detection.codebooks if book.search != "logits" and book.heads == 1}
    numberless = re.sub(r"\d+", "", book.key)
    for key in checkpoint.shapes:  # stages of the same name, which detection may not know
        if key not in books and re.sub(r"\d+", "", key) == numberless and key != book.key:
            books[key] = replace(named(checkpoint, detection, key), search=book.search)
    others = twins(checkpoint, book, list(books.values()))
    others = tuple(_along_as(checkpoint, place, book) for place in others)
    return replace(book, also=others) if others else book


def _along_as(checkpoint: Checkpoint, place: FoundCodebook, book: FoundCodebook) -> FoundCodebook:
    """Another place of a codebook, with the first one's layout and its own companions."""
    padding = checkpoint.shapes[book.key][book.axis] - book.size
    beside = along(checkpoint, place, book.axis, padding)
    return replace(beside, companions=tuple(sorted({*beside.companions, *place.companions})))


def operable(checkpoint: Checkpoint, book: FoundCodebook) -> FoundCodebook:
    """The codebook with all of its companions. Raises CodebookError where it has heads or is chosen by logits."""
    if book.heads > 1 or book.search == "logits":
        kind = "chosen by logits" if book.search == "logits" else f"of {book.heads} heads"
        raise CodebookError(f"{book.key} is a codebook {kind}: it can be inspected, not operated on")
    followers = _taken_for_codebooks(checkpoint, book)
    return replace(book, companions=tuple(sorted({*book.companions, *followers}))) if followers else book


def _taken_for_codebooks(checkpoint: Checkpoint, book: FoundCodebook) -> list[str]:
    """Keys in the codebook's module that detection lists as codebooks, but that follow this one.

    They are EMA sums, by their numbers or their name, and candidates that detection is unsure of.
    """
    others = {other.key: other for other in detected(checkpoint).codebooks if other.key != book.key}
    near = [key for key in _beside(checkpoint, book.key, book.size, book.dim, others) if key in others]
    if not near:
        return []
    rows = stored_rows(checkpoint.tensor(book.key), book)
    with_all = replace(book, companions=tuple(sorted({*book.companions, *near})))
    stored = {key: checkpoint.tensor(key) for key in with_all.companions}
    own = follow_by_numbers(with_all, rows, stored)
    return [key for key in near if key in own or others[key].confidence == "low"]


def named(checkpoint: Checkpoint, detection: Detection, key: str) -> FoundCodebook:
    """The codebook of a key, detected or not. Raises CodebookError where there is no such matrix in the file."""
    for book in detection.codebooks:
        if book.key == key:
            return book
    entry = checkpoint.entries.get(key)
    candidates = ", ".join([book.key for book in detection.codebooks] or matrices(checkpoint)[:FEW]) or "none"
    if entry is None:
        raise CodebookError(f"--codebook-key {key}: no such tensor in {checkpoint.path}; the candidates: {candidates}")
    stacked = len(entry.shape) == 3 and entry.shape[0] == 1
    shape = entry.shape[1:] if stacked else entry.shape
    if len(shape) != 2 or not min(shape) or entry.dtype not in FLOATS:
        raise CodebookError(
            f"--codebook-key {key}: {entry.dtype} {entry.shape} is no matrix of codes; the candidates: {candidates}"
        )
    plain = FoundCodebook(key, *shape, 0, 1, entry.dtype, "unknown", (), "high")
    padded = along(checkpoint, plain, int(stacked), 1) if shape[0] > 1 else plain
    # A row more than there are counts is padding, as in RQ-VAE.
    counted = any(math.prod(checkpoint.shapes[other]) == padded.size for other in padded.companions)
    whole = along(checkpoint, plain, int(stacked), 0)
    return padded if counted and not whole.companions else whole


def along(checkpoint: Checkpoint, book: FoundCodebook, axis: int, padding: int) -> FoundCodebook:
    """The codebook with its codes along `axis`, `padding` rows after them, and its companions found anew."""
    shape = checkpoint.shapes[book.key]
    size = shape[axis] - padding
    dim = math.prod(shape) // shape[axis]
    own = _beside(checkpoint, book.key, size, dim)
    return replace(book, axis=axis, size=size, dim=dim, companions=tuple(sorted(own)))


def _beside(checkpoint: Checkpoint, key: str, size: int, dim: int, also: Collection[str] = ()) -> list[str]:
    """Tensors of a codebook's module with a number or a row per code, without codebooks that detection is sure of.

    Args:
        also: Keys that are listed although they are such codebooks.
    """
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
    """The module that holds the codebook, or its embedding."""
    return (key.removesuffix(".weight")).rpartition(".")[0]


def along_latents(checkpoint: Checkpoint, book: FoundCodebook, dim: int | None) -> FoundCodebook:
    """The codebook with axes such that codes have `dim` dimensions, those of its latents, where that is possible."""
    shape = [length for length in checkpoint.shapes[book.key] if length > 1]
    if dim is None or book.dim == dim or sorted(shape) != sorted([dim, book.dim]):
        return book
    turned = along(checkpoint, book, checkpoint.shapes[book.key].index(book.dim), 0)
    return turned if turned.dim == dim else book


def find_book(checkpoint: Checkpoint, key: str, layout: Sequence[int] = ()) -> FoundCodebook:
    """The codebook of a key.

    Args:
        checkpoint: The file.
        key: A tensor that is known to be a codebook.
        layout: Its axis and size, as from `layouts`; empty where names and shapes tell them.
    """
    book = operable(checkpoint, named(checkpoint, detected(checkpoint), key))
    if len(layout) != 2 or layout[0] not in range(len(checkpoint.shapes[key])):
        return book
    axis, padding = layout[0], checkpoint.shapes[key][layout[0]] - layout[1]
    return along(checkpoint, book, axis, padding) if 0 <= padding < checkpoint.shapes[key][axis] else book


def layouts(checkpoint: Checkpoint, books: Iterable[FoundCodebook]) -> dict[str, tuple[int, int]]:
    """Axis and size, by key, of the codebooks for which names and shapes tell others."""
    detection = detected(checkpoint)
    by_name = {place.key: named(checkpoint, detection, place.key) for book in books for place in book.places}
    return {
        place.key: (place.axis, place.size)
        for book in books
        for place in book.places
        if (place.axis, place.size) != (by_name[place.key].axis, by_name[place.key].size)
    }


def declared_book(checkpoint: Checkpoint, key: str) -> FoundCodebook:
    """The codebook that a network declares. Raises CodebookError where the file has no such tensor."""
    if key not in checkpoint.entries:
        candidates = ", ".join(book.key for book in detected(checkpoint).codebooks) or "none"
        raise CodebookError(
            f"the network declares the codebook {key}, and {checkpoint.path} has no such tensor; the candidates: "
            f"{candidates}"
        )
    return find_book(checkpoint, key)


def grown_book(
    checkpoint: Checkpoint, small: Mapping[str, Tensor], large: Mapping[str, Tensor], prefix: str
) -> FoundCodebook | None:
    """The only matrix of a network that grows with codebook_size, where no name in the file says codebook.

    Args:
        checkpoint: The file.
        small: State of the network for some size.
        large: State of the network for one code more.
        prefix: Of the network's names in the file.
    """
    grown = [
        name for name, one in small.items() if one.ndim == 2 and name in large and large[name].shape != one.shape
    ]  # fmt: skip
    if len(grown) != 1 or prefix + grown[0] not in checkpoint.entries or detected(checkpoint).codebooks:
        return None
    return find_book(checkpoint, prefix + grown[0])


def lone_row(checkpoint: Checkpoint) -> FoundCodebook | None:
    """The only candidate, where its one row alone makes it unsure."""
    candidates = detected(checkpoint).codebooks
    return candidates[0] if len(candidates) == 1 and candidates[0].size == 1 else None


def laid_out_alike(book: FoundCodebook, first: FoundCodebook, checkpoint: Checkpoint) -> FoundCodebook:
    """A stage's codebook, laid out as that of another stage whose tensor has the same shape."""
    if book.key == first.key:
        return first
    if checkpoint.shapes[book.key] != checkpoint.shapes[first.key] or (book.axis, book.size) == (
        first.axis,
        first.size,
    ):
        return book
    return along(checkpoint, book, first.axis, checkpoint.shapes[first.key][first.axis] - first.size)
