"""The safetensors format: 8 bytes of length, a JSON header, and the tensors' bytes one after the other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from codebook_tools.checkpoints.layout import SUFFIX
from codebook_tools.checkpoints.tensors import Entry, Stored, Weights
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.safe_io import parse_json

PICKLED = (b"PK", b"\x80")
"""First bytes of a file of torch.save: a zip, or, before torch 1.6, a bare pickle."""

LONGEST_HEADER = 16 << 20
"""Bytes, enough for 100,000 tensors. The format allows six times that, which takes gigabytes to parse."""

_LONGEST_SIDE = 2**63 - 1


def read_safetensors(path: Path) -> Weights:
    """Read the header of a safetensors file.

    Raises:
        CodebookError: It is no sound one; the message says what it is.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if LONGEST_HEADER < length <= path.stat().st_size:
                raise CodebookError(f"{path}: a header of {length:,} bytes; the longest read has {LONGEST_HEADER:,}")
            # The library checks offsets, overlaps and dtypes; as no tensor is read, "np" spares the import of torch.
            with safe_open(path, framework="np"):
                pass
            header = parse_json(file.read(length))
            _check_sides(header)
    except (SafetensorError, ValueError) as error:
        kind = "safetensors file" if path.suffix == SUFFIX else "safetensors file, nor one of torch.save"
        raise CodebookError(f"{path} is not a sound {kind}: {_what_it_is(path, error)}") from error
    metadata = header.pop("__metadata__", None) or {}
    entries: list[Entry] = [
        Stored(key, info["dtype"], tuple(info["shape"]), path, *(8 + length + at for at in info["data_offsets"]))
        for key, info in sorted(header.items(), key=lambda item: (item[1]["data_offsets"][0], item[0]))
    ]
    return Weights((path,), {entry.key: entry for entry in entries}, metadata)


def _check_sides(header: Mapping[str, Any]) -> None:
    """Raise ValueError for a side that no tensor can have: the library checks their product alone, which may be 0."""
    for key, info in header.items():
        if key != "__metadata__" and any(side > _LONGEST_SIDE for side in info["shape"]):
            raise ValueError(f"{key} has the shape {info['shape']}")


def laid_out(entries: Iterable[Entry]) -> list[Entry]:
    """The entries in their order, or, where one would start at no multiple of its item size, larger items first."""
    ordered = list(entries)
    starts = accumulate((entry.nbytes for entry in ordered), initial=0)
    aligned = all(not start % (_item_size(entry) or 1) for start, entry in zip(starts, ordered, strict=False))
    return ordered if aligned else sorted(ordered, key=_item_size, reverse=True)


def _item_size(entry: Entry) -> int:
    """Bytes of one number; 0 of an empty tensor, and of dtypes that are narrower than a byte."""
    return entry.nbytes // max(1, math.prod(entry.shape))


def header_of(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds these entries in this order.

    Its keys are sorted, so that equal content gives equal bytes; it is padded to 8 bytes, as the format asks.

    Args:
        entries: Tensors in the order of their bytes.
        metadata: Written beside them, with "format" where it is missing.
    """
    # transformers of 2024 fails where "format" is missing.
    header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    tensors, offset = {}, 0
    for entry in entries:
        span = [offset, offset + entry.nbytes]
        tensors[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
        offset += entry.nbytes
    header.update(sorted(tensors.items()))
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data + b" " * (-len(data) % 8)


def _what_it_is(path: Path, error: Exception) -> str:
    """What a file that is no safetensors file is, by its first bytes, with a remedy where there is one."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as problem:
        return str(problem)
    if not head:
        return "it is empty"
    if head.startswith(PICKLED):
        return "it is a PyTorch pickle; rename it to .pt, and it is read as one"
    if head.lstrip()[:1] == b"<":
        return "it is an HTML or XML page, perhaps a failed download"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with git lfs pull"
    return f"{error} (truncated or of another format)"
