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
    """What a companion holds, n being the running counts (K,) and c the codes (K, dim) as stored.

    sums: c n. counts: n. shares: n / sum n. copy: c. flag: whether the codebook was initialized. fresh: what satisfies
    a module that has not trained yet, ones for a number per code and c for a row per code. recent: tokens of the past.
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
    """A tensor that follows a codebook. axis: along which its codes lie, None where it has no number for each. stale:
    whether its name says what its numbers deny: sums that are not those of the codes."""

    key: str
    role: Role
    axis: int | None = None
    stale: bool = False


# Names decide where numbers do not: those of untrained, stale or lone tensors. The first pattern that is found counts.
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
"""LlamaGen keeps indices of recent tokens there, not rows: they are of the old codes, however many there are."""

_CLOSE = 1e-3  # relative: what smoothing and float32 leave between codes and sums over counts
_ROUNDINGS = 3  # that may add up: of codes, sums and counts
_COUNTED = 1.0  # hits above which smoothing does not show

SMOOTHINGS = (0.0, 1e-5, 1e-3)
"""Epsilons of the Laplace smoothing of counts, as tutorials and libraries write it; the first is none."""


def companions_of(
    found: FoundCodebook, codes: Tensor, stored: Mapping[str, Tensor], given: Mapping[str, str]
) -> tuple[Companion, ...]:
    """What each tensor beside a codebook is.

    Args:
        found: The codebook, with the keys of its companions.
        codes: (size, dim) float, the rows as stored.
        stored: The file's tensors by key: the companions, and what else may be a flag.
        given: Roles that the user named, by key.

    Raises:
        CodebookError: Neither numbers nor name say what a companion is. The message names it and the way out.
    """
    by_numbers = _by_numbers(found, codes, stored)
    companions = [_companion(key, found, stored[key], by_numbers, given) for key in found.companions]
    companions += [Companion(key, Role.FLAG) for key in flags(found.key, stored) if key not in found.companions]
    companions += [Companion(key, Role.RECENT) for key in recent(found.key, stored) if key not in found.companions]
    return tuple(companions)


def follow_by_numbers(found: FoundCodebook, codes: Tensor, stored: Mapping[str, Tensor]) -> set[str]:
    """Keys of companions that are EMA sums of the codes by their numbers, or by their name."""
    known = _by_numbers(found, codes, stored)
    sums = {key for key, one in known.items() if one.role is Role.SUMS}
    return sums | {key for key in found.companions if _named(key) is Role.SUMS and key not in known}


def _by_numbers(found: FoundCodebook, codes: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Companion]:
    """The companions whose numbers say what they are, by key."""
    keys, known = found.companions, dict[str, Companion]()
    vectors = {key: stored[key].reshape(-1).double() for key in keys if stored[key].numel() == found.size}
    for key in keys:
        tolerance = _tolerance(found, stored[key].dtype)
        for axis, rows in _rows_along_each_axis(stored[key], found):
            others = {name: n for name, n in vectors.items() if name != key}
            counts = next((name for name, n in others.items() if _are_sums(rows, n, codes, tolerance)), None)
            if counts is not None:
                known[key] = Companion(key, Role.SUMS, axis)
                shares = abs(float(vectors[counts].sum()) - 1) < 1e-2
                known[counts] = Companion(counts, Role.SHARES if shares else Role.COUNTS, _axis(stored[counts], found))
            elif key not in known and _are_equal(rows, codes, tolerance):
                known[key] = Companion(key, Role.COPY, axis)
    copied = any(one.role is Role.COPY for one in known.values())
    for key, numbers in vectors.items():
        if key in known:
            continue
        if stored[key].dtype == torch.bool:
            known[key] = Companion(key, Role.FLAG, _axis(stored[key], found))
        elif copied and _named(key) is None and bool((numbers == 1).all()):
            # Counts before the first step, beside sums that equal the codes. Or a scale of 1 beside a copy: both hold.
            known[key] = Companion(key, Role.FRESH, _axis(stored[key], found))
    return known


def _companion(
    key: str, found: FoundCodebook, tensor: Tensor, by_numbers: Mapping[str, Companion], given: Mapping[str, str]
) -> Companion:
    """One companion by what the user says of it, else by its numbers, else by its name."""
    axis, named = _axis(tensor, found), _named(key)
    holds_rows = any(True for _ in _rows_along_each_axis(tensor, found))
    if key in given:
        return Companion(key, Role(given[key]), axis)
    if named is Role.RECENT:
        return Companion(key, Role.RECENT)
    if key in by_numbers:
        one = by_numbers[key]
        # Sums begin as the codes, and so they are where nothing was counted yet.
        return replace(one, role=Role.SUMS) if (one.role, named) == (Role.COPY, Role.SUMS) else one
    if named is Role.SUMS and holds_rows:
        return Companion(key, Role.SUMS, axis, stale=True)
    per_code = found.dim == 1 or not holds_rows
    fits = {Role.COPY: holds_rows, Role.COUNTS: per_code, Role.SHARES: per_code, Role.FLAG: per_code}
    if named is not None and fits.get(named, False):
        return Companion(key, named, axis)
    raise CodebookError(
        f"{key} {list(tensor.shape)} has numbers for each code of {found.key}, and neither they nor its name say what "
        f"they are; say so with --companion {key}={'|'.join(GIVEN)}"
    )


def _named(key: str) -> Role | None:
    """What a name says."""
    if RECENT.search(key):
        return Role.RECENT
    if FLAG.search(key):
        return Role.FLAG
    return next((role for role, leaf in NAMES if leaf.search(key.rpartition(".")[2])), None)


def _axis(tensor: Tensor, found: FoundCodebook) -> int:
    """Along which a number, or a row, for each code lies: as in the codebook, where that is possible."""
    axes = [axis for axis, length in enumerate(tensor.shape) if length == found.size]
    return found.axis if found.axis in axes else axes[0]


def _rows_along_each_axis(tensor: Tensor, found: FoundCodebook) -> Iterator[tuple[int, Tensor]]:
    """Axes along which a tensor can hold a row for each code, and those rows, (size, dim) float64; the codebook's own
    axis first."""
    if not tensor.is_floating_point() or tensor.numel() != found.size * found.dim:
        return
    axes = [axis for axis, length in enumerate(tensor.shape) if length == found.size]
    for axis in sorted(axes, key=lambda axis: axis != found.axis):
        rows = tensor.movedim(axis, 0).reshape(found.size, -1).double()
        if rows.shape[1] == found.dim:
            yield axis, rows


def smoothed(counts: Tensor, epsilon: float) -> Tensor:
    """(size,) Laplace-smoothed counts (size,) that add up to the same."""
    total = counts.sum()
    return (counts + epsilon) / (total + len(counts) * epsilon) * total


def _are_sums(rows: Tensor, counts: Tensor, codes: Tensor, tolerance: float) -> bool:
    """Whether rows / counts are the codes, plain or smoothed, where more than one latent was counted; of counts that
    add up to 1, where more than the mean was."""
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
    """Codes of unit length are the directions of what was averaged."""
    if not bool(((codes.double().norm(dim=1) - 1).abs() <= tolerance).all()):
        return False
    return _are_equal(torch.nn.functional.normalize(means, dim=1), codes, tolerance)


def _are_equal(rows: Tensor, codes: Tensor, tolerance: float) -> bool:
    """Row by row, relative to the length of each code; of short codes, to the longest."""
    codes = codes.double()
    if rows.shape != codes.shape:
        return False
    apart, lengths = (rows - codes).norm(dim=1), codes.norm(dim=1)
    longest = float(lengths.max()) if len(lengths) else 0.0
    return longest > 0 and bool((apart <= tolerance * lengths + 1e-6 * longest).all())


def _tolerance(found: FoundCodebook, dtype: torch.dtype) -> float:
    coarse = {"BF16": torch.bfloat16, "F16": torch.float16}.get(found.dtype, torch.float32)
    kinds = [coarse, dtype] if dtype.is_floating_point else [coarse]
    return max(_CLOSE, *(_ROUNDINGS * torch.finfo(kind).eps for kind in kinds))


def laid_out(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    """rows (size, dim), or one number each, (size,), laid out and rounded as `like` is stored, with another size."""
    others = [length for i, length in enumerate(like.shape) if i != axis]
    return rows.reshape(len(rows), *others).movedim(0, axis).to(like.dtype).contiguous()


def companion_values(
    found: FoundCodebook,
    companions: Iterable[Companion],
    stored: Mapping[str, Tensor],
    codes: Tensor,
    counts: Tensor,
) -> dict[str, Tensor]:
    """New values of every companion of a codebook, by key, in their stored dtypes.

    Args:
        found: The codebook in the old file.
        companions: As `companions_of` has them.
        stored: The old tensors by key.
        codes: (new size, dim) float32, as stored.
        counts: (new size,) int64 or float. A float16 companion cannot hold those of a large data set, so they shrink
            together until it can.
    """
    companions = list(companions)
    weights = held(codes, counts, [stored[one.key].dtype for one in companions if one.key in found.companions])
    if any(one.role is Role.SUMS and stored[one.key].dtype in (torch.float16, torch.bfloat16) for one in companions):
        weights = weights.log2().round().exp2()  # then sums are exact, and stand for these very codes
    values = dict[str, Tensor]()
    for one in companions:
        old = stored[one.key]
        if one.role is Role.RECENT:
            if one.key not in found.companions:
                values[one.key] = torch.zeros_like(old)
        elif one.key not in found.companions:
            values[one.key] = torch.ones_like(old)
        else:
            values[one.key] = _value(one, found, old, codes, weights).contiguous()
    return values


def _value(one: Companion, found: FoundCodebook, old: Tensor, codes: Tensor, weights: Tensor) -> Tensor:
    """What a companion with an axis of length K holds for new codes and counts."""
    axis = _axis(old, found) if one.axis is None else one.axis
    if one.role in (Role.SUMS, Role.COPY) or (one.role is Role.FRESH and old.numel() == found.size * found.dim):
        return laid_out(codes * weights[:, None] if one.role is Role.SUMS else codes, old, axis)
    of_role = {Role.COUNTS: weights, Role.SHARES: weights / weights.sum().clamp(min=1)}
    numbers = of_role.get(one.role, torch.ones_like(weights))
    if old.numel() == found.size:
        return laid_out(numbers, old, axis)
    # A number per code, but repeated along other axes.
    numbers = numbers.reshape([-1 if i == axis else 1 for i in range(old.ndim)])
    return numbers.expand([len(codes) if i == axis else n for i, n in enumerate(old.shape)]).to(old.dtype)


def held(codes: Tensor, counts: Tensor, dtypes: Iterable[torch.dtype]) -> Tensor:
    """(size,) float32: the counts, or a share of them small enough for sums of so many codes to be held."""
    ceiling = min((torch.finfo(dtype).max for dtype in dtypes if dtype.is_floating_point), default=math.inf)
    weights = counts.float()
    most = float((weights * codes.abs().amax(1).clamp(min=1)).max())
    return weights * (ceiling / 2 / most) if most > ceiling else weights


def recent(codebook_key: str, keys: Iterable[str]) -> list[str]:
    """Keys beside the codebook that hold tokens of the past: they must be forgotten."""
    return beside(codebook_key, keys, RECENT)
