"""A tensor of a checkpoint: in a file at known bytes, or held in memory. Nothing is read before it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from codebook_tools.errors import CodebookError

if TYPE_CHECKING:  # imported where a tensor is made: a header is read without waiting for torch
    import torch
    from torch import Tensor

CHUNK = 1 << 20

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""Of tensors, by name."""

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@cache
def _known() -> dict[str, torch.dtype]:
    """Those that this torch has, by the name that safetensors gives them."""
    import torch

    return {name: getattr(torch, its) for name, its in _DTYPES.items() if hasattr(torch, its)}


@cache
def _names() -> dict[torch.dtype, str]:
    return {dtype: name for name, dtype in _known().items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name. Raises CodebookError for one that this torch does not know."""
    known = _known()
    if name not in known:
        raise CodebookError(f"tensors of dtype {name} cannot be handled; there are {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. dtype: as safetensors names it ("F32"). start, end: byte offsets in the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def tensor(self) -> Tensor:
        """Read now, in the stored dtype. Raises CodebookError for a dtype that torch lacks."""
        import torch

        tensor = torch.empty(self.shape, dtype=torch_dtype(self.dtype))
        into, at = tensor.reshape(-1).view(torch.uint8).numpy(), 0
        for chunk in self.chunks():
            into[at : at + len(chunk)] = memoryview(chunk)
            at += len(chunk)
        return tensor

    def chunks(self) -> Iterator[bytes]:
        """The stored bytes, at most 4 MiB at a time."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                chunk = file.read(min(left, CHUNK))
                if not chunk:
                    raise CodebookError(f"{self.file} was cut short while it was read, at {self.key}")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor in memory, or mapped from a pickle, in whatever order its numbers lie there. Its dtype has a name."""

    key: str
    value: Tensor

    @property
    def dtype(self) -> str:
        return _names()[self.value.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def nbytes(self) -> int:
        return self.value.numel() * self.value.element_size()

    def tensor(self) -> Tensor:
        """A copy of its own."""
        import torch

        return self.value.clone(memory_format=torch.contiguous_format)

    def chunks(self) -> Iterator[bytes]:
        """The bytes that safetensors stores: little-endian, row by row, at most 4 MiB at a time."""
        import torch

        if self.nbytes:
            flat = self.value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            yield from (flat[at : at + CHUNK].tobytes() for at in range(0, len(flat), CHUNK))


Entry = Stored | Held


def can_hold(dtype: torch.dtype) -> bool:
    """Whether safetensors has a name for it."""
    return dtype in _names()


@dataclass(frozen=True)
class Weights:
    """What files of weights hold, in the order of their bytes. files: an index before its shards.

    left_behind: of a pickle, the dotted names of what was in it beside the weights.
    """

    files: tuple[Path, ...]
    entries: dict[str, Entry]
    metadata: dict[str, str]
    left_behind: tuple[str, ...] = ()
