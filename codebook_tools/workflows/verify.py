"""A written checkpoint and its index map, compared with the original: only what may differ differs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.config import same_config
from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.effective import effective
from codebook_tools.checkpoints.layout import CARD, PREFIX, split_others, stored_map
from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.write import map_metadata
from codebook_tools.clustering.metric import unit
from codebook_tools.codebook import REMOVED
from codebook_tools.errors import CodebookError
from codebook_tools.models.choose import find_book, with_twins
from codebook_tools.models.demo import DEMO
from codebook_tools.models.ema_state import Companion, Role, companion_values
from codebook_tools.models.output import written_config
from codebook_tools.models.proof import Proof
from codebook_tools.models.registry import size_entry
from codebook_tools.models.stored_codes import effective_rows, exact_rows, followers, owned_keys, rounded, stored_rows
from codebook_tools.models.verification import Difference, Verification, listed, same_bytes
from codebook_tools.remapping.verify_prior import prior_differences
from codebook_tools.runtime.hub_ids import title_of
from codebook_tools.runtime.safe_io import parse_json
from codebook_tools.strategies import declaration


def verify_checkpoint(
    model: Path, against: Path, maps: Sequence[Path] = (), prove: Callable[[], Proof] | None = None
) -> Verification:
    """Check a checkpoint that this package wrote against the original.

    A prior that was remapped is compared with the original prior and the maps that it followed.

    Args:
        model: The checkpoint that was written.
        against: The original.
        maps: Index maps; empty for the one beside the checkpoint.
        prove: Compares the file with the network that loads it, and raises CodebookError where they disagree; None to
            look at the files alone.

    Raises:
        CodebookError: A file is missing or unsound, or the checkpoint was not written by this package.
    """
    written, original = read_checkpoint(model), read_checkpoint(against)
    proof = None
    if written.metadata.get(PREFIX + "command") == "remap":
        paths, differences = list(maps), tuple(prior_differences(written, original, maps))
    else:
        paths = list(maps) or [stored_map(written.folder or model)]
        if len(paths) > 1:
            raise CodebookError(f"--map: {len(paths)} maps; a checkpoint that a surgery wrote has one")
        books = list(_books(written, original))
        differences = tuple(_differences(written, original, _map_of(paths[0]), books))
        if prove is not None:
            proof, more = proved(prove)
            differences += more
    return Verification(title_of(model), title_of(against), ", ".join(map(str, paths)), differences, proof)


def original_of(model: Path) -> Path:
    """The original of a checkpoint where none is named: the bundled demo, if the checkpoint says so.

    Raises:
        CodebookError: The file cannot be read, or its original is another file, which must be named.
    """
    metadata = read_checkpoint(model).metadata
    source, command = (metadata.get(PREFIX + name) for name in ("source_sha256", "command"))
    if source is None:
        raise CodebookError(
            f"{model} says nothing of a surgery: it was not written by codebook-tools; --network FILE.py:FUNCTION, or "
            "--data for a family that is known, checks it against the network that loads it"
        )
    if source != read_checkpoint(DEMO).sha256:
        raise CodebookError(
            f"--against is missing: give the original of {model}, the file that its {command} started from (SHA-256 "
            f"{source[:12]}...)"
        )
    return DEMO


def verify_alone(model: Path, prove: Callable[[], Proof]) -> Verification:
    """Compare any file with the network that loads it, without an original."""
    proof, differences = proved(prove)
    return Verification(title_of(model), "", "", differences, proof)


def proved(prove: Callable[[], Proof]) -> tuple[Proof | None, tuple[Difference, ...]]:
    """The proof, or None and why there is none."""
    try:
        return prove(), ()
    except CodebookError as error:
        return None, (Difference("__network__", str(error)),)


def _map_of(path: Path) -> Checkpoint:
    """The index map. Raises CodebookError where it is not there, or unsound."""
    if not path.exists():
        raise CodebookError(f"no such file: {path}; the index map lies beside the checkpoint, else give it with --map")
    return read_checkpoint(path)


def _differences(
    written: Checkpoint, original: Checkpoint, maps: Checkpoint, books: list[FoundCodebook]
) -> Iterator[Difference]:
    yield from _files(written, original, maps)
    yield from _config(written, original, books)
    yield from _beside(written, original)
    yield from _tensors(written, original, books)
    yield from _map_names(maps, books)
    yield from _twins(written, original, books)
    for book in books:
        yield from _book(written, original, maps, book)


def _books(written: Checkpoint, original: Checkpoint) -> Iterator[FoundCodebook]:
    """The codebooks that the written file names, as they are in the original."""
    keys = listed(written, "codebooks")
    if not keys:
        raise CodebookError(f"{written.path} says nothing of a surgery: it was not written by codebook-tools")
    for key in keys:
        if key not in original.entries:
            raise CodebookError(f"{original.path} has no {key}, a codebook of {written.path}: it is not the original")
        yield find_book(original, key, _layout(written, key))


def _layout(written: Checkpoint, key: str) -> tuple[int, ...]:
    """Axis and size of a codebook in the original, where the written file says them."""
    try:
        said = parse_json(written.metadata.get(PREFIX + "layouts", "{}"))
    except ValueError:
        return ()
    layout = said.get(key, ()) if isinstance(said, dict) else ()
    return tuple(layout) if isinstance(layout, list) and all(type(number) is int for number in layout) else ()


def _twins(written: Checkpoint, original: Checkpoint, books: list[FoundCodebook]) -> Iterator[Difference]:
    """Codebooks that are one tensor in the original, by their bytes, are one in the written file."""
    for book in books:
        for place in with_twins(original, book).also:
            if place.key not in written.entries or place.key < book.key:
                continue
            one, other = written.tensor(book.key), written.tensor(place.key)
            if one.shape != other.shape or not torch.equal(one, other):
                yield Difference(
                    place.key, f"differs from {book.key}: in the original they are equal, as one tensor is"
                )


def _files(written: Checkpoint, original: Checkpoint, maps: Checkpoint) -> Iterator[Difference]:
    """The three files belong together, and none was damaged since."""
    if written.metadata.get(PREFIX + "source_sha256") != original.sha256:
        yield Difference("__metadata__", f"{original.path.name} is not the file that the surgery was done on")
    if maps.metadata.get(PREFIX + "checkpoint_sha256") != written.sha256:
        yield Difference(
            "__metadata__", f"{maps.path.name} belongs to another checkpoint, or one of the two is damaged"
        )
    meant = map_metadata(maps.tensors(), maps.metadata.get(PREFIX + "checkpoint_sha256", ""), written.metadata)
    if maps.metadata != meant:
        yield Difference("__metadata__", f"{maps.path.name} is damaged")
    for name, value in original.metadata.items():
        if not name.startswith(PREFIX) and written.metadata.get(name) != value:
            yield Difference("__metadata__", f"the original's entry {name} was not kept")


def _config(written: Checkpoint, original: Checkpoint, books: list[FoundCodebook]) -> Iterator[Difference]:
    """The config is the original's but for K, which is the tensors', and what K decides."""
    entry = size_entry(original)
    if (entry is None and original.folder is None) or original.config is None:
        return  # none, or one beside the file that may be anyone's
    if written.config is None or written.config_path is None:
        yield Difference("config.json", "missing")
        return
    name, before, after = written.config_path.name, original.config, written.config
    sizes = {_size(written, original, book) for book in books if _shape(written, book)}
    if len(sizes) > 1:
        yield Difference(name, f"one config for codebooks of {len(sizes)} sizes: {sorted(sizes)}")
        return
    text = written_config(original, sizes.pop()) if sizes else None
    meant = json.loads(text) if text else before
    for key in {**meant, **after}:
        if key not in meant or key not in after or not same_config(meant[key], after[key]):
            what = (
                f"{after[key]!r} where {meant[key]!r} belongs" if key in meant and key in after else "extra or missing"
            )
            yield Difference(name, f"entry {key}: {what}")


def _beside(written: Checkpoint, original: Checkpoint) -> Iterator[Difference]:
    """Files that go along from directory to directory are the original's, except the card, which people edit."""
    if written.folder is None or original.folder is None:
        return
    for path in split_others(original.folder, original.files)[0]:
        other = written.folder / path.name
        if path.name != CARD and not (other.is_file() and other.read_bytes() == path.read_bytes()):
            yield Difference(path.name, "changed" if other.is_file() else "missing")


def _shape(written: Checkpoint, book: FoundCodebook) -> tuple[int, ...]:
    return written.entries[book.key].shape if book.key in written.entries else ()


def _size(written: Checkpoint, original: Checkpoint, book: FoundCodebook) -> int:
    """Codes in the written file: its rows without as much padding as the original has. Of another layout: -1."""
    shape = _shape(written, book)
    if len(shape) != len(original.entries[book.key].shape):
        return -1
    return shape[book.axis] - effective(book, original.shapes).padding


def _tensors(written: Checkpoint, original: Checkpoint, books: list[FoundCodebook]) -> Iterator[Difference]:
    """Keys, dtypes and bytes are the original's but for the codebooks, their companions and what was trained."""
    for key in sorted(original.entries.keys() ^ written.entries.keys()):
        yield Difference(key, "missing" if key in original.entries else "not in the original")
    follows = {key for book in books for key in (book.key, *book.companions)}
    owned = {key for book in books for key in owned_keys(original, book)}
    may_differ = owned | set(listed(written, "trained_tensors"))
    for key in sorted(original.entries.keys() & written.entries.keys()):
        before, after = original.entries[key], written.entries[key]
        if before.dtype != after.dtype:
            yield Difference(key, f"dtype {after.dtype} instead of {before.dtype}")
        elif key not in follows and before.shape != after.shape:
            yield Difference(key, f"shape {after.shape} instead of {before.shape}")
        elif key not in may_differ and not same_bytes(written, original, key):
            yield Difference(key, "changed, though nothing says that it was trained")
        elif key in may_differ and "F" in before.dtype and not bool(torch.isfinite(written.tensor(key).float()).all()):
            yield Difference(key, "not finite")


def _map_names(maps: Checkpoint, books: list[FoundCodebook]) -> Iterator[Difference]:
    names = {f"{book.key}/{kind}" for book in books for kind in ("index_map", "nearest")}
    if set(maps.entries) != names or any(entry.dtype != "I64" for entry in maps.entries.values()):
        yield Difference(
            min(names), f"{maps.path.name} does not hold an index_map and nearest, int64, of each codebook"
        )


def _book(written: Checkpoint, original: Checkpoint, maps: Checkpoint, book: FoundCodebook) -> Iterator[Difference]:
    """Sizes agree everywhere, companions follow their codes, and codes that kept their identity kept their numbers."""
    shape = _shape(written, book)
    if not shape:
        return  # reported already
    size = _size(written, original, book)
    before = original.entries[book.key].shape
    wanted = tuple(before[axis] - book.size + size if axis == book.axis else n for axis, n in enumerate(before))
    if shape != wanted:
        yield Difference(book.key, f"shape {shape}, of which only axis {book.axis} may differ from the original's")
        return
    yield from _companions(written, original, book, size)
    names = (f"{book.key}/index_map", f"{book.key}/nearest")
    if any(name not in maps.entries or maps.entries[name].dtype != "I64" for name in names):
        return
    index_map, nearest = (maps.tensor(name) for name in names)
    for name, tensor, least in ((names[0], index_map, REMOVED), (names[1], nearest, 0)):
        if tuple(tensor.shape) != (book.size,):
            yield Difference(name, f"shape {tuple(tensor.shape)} for {book.size} old codes")
            return
        if bool(((tensor < least) | (tensor >= size)).any()):
            yield Difference(name, f"an entry outside {least} to {size - 1}")
            return
    kept = index_map != REMOVED
    if not torch.equal(index_map[kept], nearest[kept]):
        yield Difference(names[1], "a code that kept its identity is not its own nearest")
    command, phase = (written.metadata.get(PREFIX + name) for name in ("command", "kept"))
    if (phase == "surgery" and declaration(command, "keeps")) or (command, phase) == ("finetune", "before"):
        old, new = (effective_rows(file, replace(book, size=n)) for file, n in ((original, book.size), (written, size)))
        moved, at = new[index_map[kept]], torch.zeros(size, dtype=torch.bool).index_fill_(0, index_map[kept], True)
        # Rows that are given out at unit length are stored so; what no old code became copies row 0, which one did.
        same = any(torch.equal(moved, meant[kept]) for meant in (old, rounded(original, book, unit(old))))
        if torch.equal(moved, old[kept]) and effective(book, original.shapes).kind == "rows":
            # To the last digit, of which float64 has more.
            exact = exact_rows(written.tensor(book.key), replace(book, size=size))[index_map[kept]]
            same = torch.equal(exact, exact_rows(original.tensor(book.key), book)[kept])
        if not same or not bool(at[0]) or not bool((new[~at] == new[:1]).all()):
            yield Difference(book.key, "the codes are not the original's that the index map says were kept")


def _companions(written: Checkpoint, original: Checkpoint, book: FoundCodebook, size: int) -> Iterator[Difference]:
    """The tensors beside the codebook belong to its codes; a missing tensor was reported already."""
    try:
        companions = followers(replace(original, stated={**original.stated, **written.declared}), book)
    except CodebookError as error:
        yield Difference(book.key, str(error))
        return
    companions = tuple(one for one in companions if one.role is not Role.RECENT and one.key in written.entries)
    before = {one.key: original.tensor(one.key) for one in companions}
    after = {key: written.tensor(key) for key in before}
    weights = _weights(companions, after, size)
    resized = replace(book, size=size, form=None)
    summed = effective(book, original.shapes).kind == "ratio"
    codes = effective_rows(written, resized) if summed else stored_rows(written.tensor(book.key), resized)
    meant = companion_values(book, companions, before, codes, torch.ones(size) if weights is None else weights)
    for one in companions:
        tensor, expected = after[one.key], meant[one.key]
        if tensor.shape != expected.shape:
            yield Difference(one.key, f"shape {tuple(tensor.shape)} does not follow {size} codes")
        elif one.role is Role.FLAG:
            if not torch.equal(tensor, expected):
                yield Difference(one.key, "says that the codebook is not initialized")
        elif one.role is Role.SUMS and weights is None:
            continue
        elif not torch.allclose(expected.double(), tensor.double(), rtol=1e-2, atol=1e-6):
            yield Difference(one.key, "does not belong to the codes: training would move them at the first step")


def _weights(companions: Sequence[Companion], stored: dict[str, Tensor], size: int) -> Tensor | None:
    """The running counts beside the codebook, where there are some: they are the companions' only free numbers."""
    for one in companions:
        tensor, axis = stored[one.key], one.axis or 0
        if one.role in (Role.COUNTS, Role.SHARES, Role.FRESH) and tensor.shape[axis : axis + 1] == (size,):
            numbers = tensor.movedim(axis, 0).reshape(size, -1).float()
            if bool((numbers == numbers[:, :1]).all()):  # one for each code, or repeated along other axes
                return numbers[:, 0]
    return None
