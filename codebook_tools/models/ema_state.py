"""EMA state, flags and copies beside a codebook: what each tensor is, by its numbers first, and its new value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.errors import CodebookError
from codebook_tools.models.evidence import FLAG, beside, flags


class Role(StrEnum):
    """What a companion holds, where n are the running counts (K,) and c the codes (K, dim) as stored.

    Attributes:
        SUMS: c n.
        COUNTS: n.
        SHARES: n / sum n.
        COPY: c.
        FLAG: Whether the codebook was initialized.
        FRESH: The state before training: ones for a number per code, c for a row per code.
        RECENT: Tokens that were used last.
    """

    SUMS = "sums"
    COUNTS = "counts"
    SHARES = "shares"
    COPY = "copy"
    FLAG = "flag"
    FRESH = "fresh"
    RECENT = "recent"


GIVEN = (Role.SUMS, Role.COUNTS, Role.COPY, Role.FLAG, Role.FRESH)
"""Roles that a user can name."""


@dataclass(frozen=True)
class Companion:
    """A tensor that follows a codebook.

    Attributes:
        key: Of the tensor.
        role: What it holds.
        axis: Along which the codes lie; None where it has no number per code.
        stale: Whether it is called sums, but its numbers are not those of the codes.
    """

    key: str
    role: Role
    axis: int | None = None
    stale: bool = False


# Names decide where numbers do not: for untrained, stale or lone tensors. The first pattern that matches counts.
NAMES = (
    (Role.SUMS, re.compile(
        r"emb\w*_?(?:avg|sum|ema$)|ema_?(?:w(?:eights?)?$|embed|dw|vec|code|m$)|(?:^|_)(?:\w+_)?(?:sums?|totals?)$"
        r"|k_sum|z_avg|m_i_ts|(?:^|_)dw$|(?:^|_)(?:running|moving)_(?:emb|mean|code|weight|avg)\w*$|(?:code\w*|vec\w*)_avg$",
        re.IGNORECASE,
    )),
    (Role.COUNTS, re.compile(
        r"cluster|usage|count|_size|k_elem|n_i_ts|hits?(?:_|$)|freq|(?:^|_)num(?:_|$)|(?:^|_)n$|elem", re.IGNORECASE
    )),
    (Role.SHARES, re.compile(r"prob", re.IGNORECASE)),
    (Role.COPY, re.compile(r"embed|weight|codebook", re.IGNORECASE)),
)  # fmt: skip
RECENT = re.compile(r"(?:^|\.)codebook_used$")
"""LlamaGen keeps indices of recent tokens there, not rows: they refer to the old codes, whatever their number."""

_CLOSE = 1e-3  # relative: what smoothing and float32 leave between codes and sums over counts
_ROUNDINGS = 3  # that may add up: of codes, sums and counts
_COUNTED = 1.0  # hits above which smoothing does not show

SMOOTHINGS = (0.0, 1e-5, 1e-3)
"""Epsilons of the Laplace smoothing of counts, as tutorials and libraries write it; the first is none."""


def companions_of(
    book: FoundCodebook, codes: Tensor, stored: Mapping[str, Tensor], declared: Mapping[str, str]
) -> tuple[Companion, ...]:
    """The role of each tensor beside a codebook.

    Args:
        book: The codebook, with the keys of its companions.
        codes: (size, dim) float, the rows as stored.
        stored: The file's tensors by key: the companions, and what else may be a flag.
        declared: Roles that the user named, by key.

    Raises:
        CodebookError: Neither numbers nor name say what a companion is.
    """
    by_numbers = _by_numbers(book, codes, stored)
    known = {key: _companion(key, book, stored[key], by_numbers, declared) for key in book.companions}
    if unknown := [key for key, one in known.items() if one is None]:
        described = ", ".join(f"{key} {list(stored[key].shape)}" for key in unknown)
        options = " ".join(f"--companion {key}={'|'.join(GIVEN)}" for key in unknown)
        raise CodebookError(
            f"{described} has numbers for each code of {book.key}, and neither they nor its name say what they are; "
            f"say so with {options}"
        )
    companions = [one for one in known.values() if one is not None]
    companions += [Companion(key, Role.FLAG) for key in flags(book.key, stored) if key not in book.companions]
    companions += [Companion(key, Role.RECENT) for key in recent(book.key, stored) if key not in book.companions]
    return tuple(companions)


def follow_by_numbers(book: FoundCodebook, codes: Tensor, stored: Mapping[str, Tensor]) -> set[str]:
    """Keys of the companions that are EMA sums of the codes, by their numbers or their name."""
    known = _by_numbers(book, codes, stored)
    sums = {key for key, one in known.items() if one.role is Role.SUMS}
    return sums | {key for key in book.companions if _named(key) is Role.SUMS and key not in known}


def _by_numbers(book: FoundCodebook, codes: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Companion]:
    """The companions whose role follows from their numbers, by key."""
    keys, known = book.companions, dict[str, Companion]()
    vectors = {key: stored[key].reshape(-1).double() for key in keys if stored[key].numel() == book.size}
    for key in keys:
        tolerance = _tolerance(book, stored[key].dtype)
        for axis, rows in _rows_along_each_axis(stored[key], book):
            others = {name: n for name, n in vectors.items() if name != key}
            counts = next((name for name, n in others.items() if _are_sums(rows, n, codes, tolerance)), None)
            if counts is not None:
                known[key] = Companion(key, Role.SUMS, axis)
                shares = abs(float(vectors[counts].sum()) - 1) < 1e-2
                known[counts] = Companion(counts, Role.SHARES if shares else Role.COUNTS, _axis(stored[counts], book))
            elif key not in known and _are_equal(rows, codes, tolerance):
                known[key] = Companion(key, Role.COPY, axis)
    copied = any(one.role is Role.COPY for one in known.values())
    for key, numbers in vectors.items():
        if key in known:
            continue
        if stored[key].dtype == torch.bool:
            known[key] = Companion(key, Role.FLAG, _axis(stored[key], book))
        elif copied and _named(key) is None and bool((numbers == 1).all()):
            # Counts before the first step, beside sums that equal the codes. Or a scale of 1 beside a copy: both hold.
            known[key] = Companion(key, Role.FRESH, _axis(stored[key], book))
    return known


def _companion(
    key: str, book: FoundCodebook, tensor: Tensor, by_numbers: Mapping[str, Companion], declared: Mapping[str, str]
) -> Companion | None:
    """A companion with the role that the user declared, else of its numbers, else of its name; None without any."""
    axis, named = _axis(tensor, book), _named(key)
    holds_rows = any(True for _ in _rows_along_each_axis(tensor, book))
    if key in declared:
        return Companion(key, Role(declared[key]), axis)
    if named is Role.RECENT:
        return Companion(key, Role.RECENT)
    if key in by_numbers:
        one = by_numbers[key]
        # Sums begin as the codes, and so they are where nothing was counted yet.
        return replace(one, role=Role.SUMS) if (one.role, named) == (Role.COPY, Role.SUMS) else one
    if named is Role.SUMS and holds_rows:
        return Companion(key, Role.SUMS, axis, stale=True)
    per_code = book.dim == 1 or not holds_rows
    fits = {Role.COPY: holds_rows, Role.COUNTS: per_code, Role.SHARES: per_code, Role.FLAG: per_code}
    if named is not None and fits.get(named, False):
        return Companion(key, named, axis)
    return None


def _named(key: str) -> Role | None:
    """The role that a name suggests."""
    if RECENT.search(key):
        return Role.RECENT
    if FLAG.search(key):
        return Role.FLAG
    return next((role for role, leaf in NAMES if leaf.search(key.rpartition(".")[2])), None)


def _axis(tensor: Tensor, book: FoundCodebook) -> int:
    """The axis of the codes in a companion: the codebook's own, where its length fits."""
    axes = [axis for axis, length in enumerate(tensor.shape) if length == book.size]
    return book.axis if book.axis in axes else axes[0]


def _rows_along_each_axis(tensor: Tensor, book: FoundCodebook) -> Iterator[tuple[int, Tensor]]:
    """Axes along which a tensor can hold a row per code, and those rows, (size, dim) float64; the codebook's first."""
    if not tensor.is_floating_point() or tensor.numel() != book.size * book.dim:
        return
    axes = [axis for axis, length in enumerate(tensor.shape) if length == book.size]
    for axis in sorted(axes, key=lambda axis: axis != book.axis):
        rows = tensor.movedim(axis, 0).reshape(book.size, -1).double()
        if rows.shape[1] == book.dim:
            yield axis, rows


def smoothed(counts: Tensor, epsilon: float) -> Tensor:
    """(size,) counts after Laplace smoothing, with the same sum."""
    total = counts.sum()
    return (counts + epsilon) / (total + len(counts) * epsilon) * total


def _are_sums(rows: Tensor, counts: Tensor, codes: Tensor, tolerance: float) -> bool:
    """Whether rows / counts are the codes, plain or smoothed.

    Only codes with more than one hit are looked at; where counts sum to 1, those with more than the mean.
    """
    if rows.shape != codes.shape or not bool(torch.isfinite(counts).all()) or float(counts.min()) < 0:
        return False
    least = _COUNTED if float(counts.max()) > _COUNTED else float(counts.mean())
    used = counts > least
    if not bool(used.any()) or not bool(rows[used].any()):
        return False
    for epsilon in SMOOTHINGS:
        means = rows[used] / smoothed(counts, epsilon)[used][:, None]
        if _are_equal(means, codes[used], tolerance) or _are_unit_rows_of(means, codes[used], tolerance):
            return True
    return False


def _are_unit_rows_of(means: Tensor, codes: Tensor, tolerance: float) -> bool:
    """Whether the codes have unit length and the directions of `means`."""
    if not bool(((codes.double().norm(dim=1) - 1).abs() <= tolerance).all()):
        return False
    return _are_equal(torch.nn.functional.normalize(means, dim=1), codes, tolerance)


def _are_equal(rows: Tensor, codes: Tensor, tolerance: float) -> bool:
    """Whether rows equal codes up to `tolerance` times the length of each, or 1e-6 of the longest."""
    codes = codes.double()
    if rows.shape != codes.shape:
        return False
    apart, lengths = (rows - codes).norm(dim=1), codes.norm(dim=1)
    longest = float(lengths.max()) if len(lengths) else 0.0
    return longest > 0 and bool((apart <= tolerance * lengths + 1e-6 * longest).all())


def _tolerance(book: FoundCodebook, dtype: torch.dtype) -> float:
    coarse = {"BF16": torch.bfloat16, "F16": torch.float16}.get(book.dtype, torch.float32)
    kinds = [coarse, dtype] if dtype.is_floating_point else [coarse]
    return max(_CLOSE, *(_ROUNDINGS * torch.finfo(kind).eps for kind in kinds))


def laid_out(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    """Rows in the layout and dtype of a stored tensor, with another number of codes.

    Args:
        rows: (size, dim), or (size,) for one number per code.
        like: The stored tensor.
        axis: Of the codes in it.
    """
    others = [length for i, length in enumerate(like.shape) if i != axis]
    return rows.reshape(len(rows), *others).movedim(0, axis).to(like.dtype).contiguous()


def companion_values(
    book: FoundCodebook,
    companions: Iterable[Companion],
    stored: Mapping[str, Tensor],
    codes: Tensor,
    counts: Tensor,
) -> dict[str, Tensor]:
    """New values of every companion of a codebook, by key, in their stored dtypes.

    Args:
        book: The codebook in the old file.
        companions: As from `companions_of`.
        stored: The old tensors by key.
        codes: (new size, dim) float32, as stored.
        counts: (new size,) int64 or float, scaled down together where a float16 companion cannot hold the sums.
    """
    companions = list(companions)
    weights = scaled_counts(codes, counts, [stored[one.key].dtype for one in companions if one.key in book.companions])
    if any(one.role is Role.SUMS and stored[one.key].dtype in (torch.float16, torch.bfloat16) for one in companions):
        weights = weights.log2().round().exp2()  # then sums are exact, and stand for these very codes
    values = dict[str, Tensor]()
    for one in companions:
        old = stored[one.key]
        if one.role is Role.RECENT:
            if one.key not in book.companions:
                values[one.key] = torch.zeros_like(old)
        elif one.key not in book.companions:
            values[one.key] = torch.ones_like(old)
        else:
            values[one.key] = _value(one, book, old, codes, weights).contiguous()
    return values


def _value(one: Companion, book: FoundCodebook, old: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
    """The new value of a companion that has an axis of length K."""
    axis = _axis(old, book) if one.axis is None else one.axis
    if one.role in (Role.SUMS, Role.COPY) or (one.role is Role.FRESH and old.numel() == book.size * book.dim):
        return laid_out(codes * weights[:, None] if one.role is Role.SUMS else codes, old, axis)
    of_role = {Role.COUNTS: weights, Role.SHARES: weights / weights.sum().clamp(min=1)}
    numbers = of_role.get(one.role, torch.ones_like(weights))
    if old.numel() == book.size:
        return laid_out(numbers, old, axis)
    # A number per code, but repeated along other axes.
    numbers = numbers.reshape([-1 if i == axis else 1 for i in range(old.ndim)])
    return numbers.expand([len(codes) if i == axis else n for i, n in enumerate(old.shape)]).to(old.dtype)


def scaled_counts(codes: Tensor, counts: Tensor, dtypes: Iterable[torch.dtype]) -> Tensor:
    """Counts, scaled down so that sums of the codes fit all dtypes.

    Args:
        codes: (size, dim).
        counts: (size,).
        dtypes: Those of the companions.

    Returns:
        (size,) float32.
    """
    ceiling = min((torch.finfo(dtype).max for dtype in dtypes if dtype.is_floating_point), default=math.inf)
    weights = counts.float()
    most = float((weights * codes.abs().amax(1).clamp(min=1)).max())
    return weights * (ceiling / 2 / most) if most > ceiling else weights


def recent(codebook_key: str, keys: Iterable[str]) -> list[str]:
    """Keys beside the codebook that hold recently used tokens, which new codes invalidate."""
    return beside(codebook_key, keys, RECENT)
