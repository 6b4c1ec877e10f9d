"""A tensor of a checkpoint: at known bytes of a file, or in memory. Nothing is read before it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from codebook_tools.errors import CodebookError

if TYPE_CHECKING:  # torch is imported where a tensor is made, so that reading a header does not wait for it
    import torch
    from torch import Tensor

CHUNK = 1 << 20
"""Bytes of a tensor that are in memory at once while it is copied."""

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""Of tensors, by key."""

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@cache
def _known() -> dict[str, torch.dtype]:
    """The dtypes that this torch has, by the name that safetensors gives them."""
    import torch

    return {name: getattr(torch, dtype) for name, dtype in _DTYPES.items() if hasattr(torch, dtype)}


@cache
def _names() -> dict[torch.dtype, str]:
    return {dtype: name for name, dtype in _known().items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name.

    Raises:
        CodebookError: This torch has no such dtype.
    """
    known = _known()
    if name not in known:
        raise CodebookError(f"tensors of dtype {name} cannot be handled; there are {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        key: Its name.
        dtype: As safetensors names it ("F32").
        shape: Of the tensor.
        file: That holds it.
        start: Offset of its first byte in the file.
        end: Offset after its last byte.
    """

    key: str
    dtype: str
    shape: Shape
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return self.end - self.start

    def tensor(self) -> Tensor:
        """Read the tensor, in the stored dtype.

        Raises:
            CodebookError: torch lacks the dtype, or the file has become too short.
        """
        import torch

        tensor = torch.empty(self.shape, dtype=torch_dtype(self.dtype))
        into, at = tensor.reshape(-1).view(torch.uint8).numpy(), 0
        for chunk in self.chunks():
            into[at : at + len(chunk)] = memoryview(chunk)
            at += len(chunk)
        return tensor

    def chunks(self) -> Iterator[bytes]:
        """Read the stored bytes, at most CHUNK at a time.

        Raises:
            CodebookError: The file has become too short.
        """
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
class InMemory:
    """A tensor in memory or mapped from a pickle, strided in any way, whose dtype safetensors can hold.

    Attributes:
        key: Its name.
        value: The tensor.
    """

    key: str
    value: Tensor

    @property
    def dtype(self) -> str:
        """As safetensors names it ("F32")."""
        return _names()[self.value.dtype]

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        return tuple(self.value.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as safetensors stores it."""
        return self.value.numel() * self.value.element_size()

    def tensor(self) -> Tensor:
        """A contiguous copy."""
        import torch

        return self.value.clone(memory_format=torch.contiguous_format)

    def chunks(self) -> Iterator[bytes]:
        """The bytes as safetensors stores them, little-endian and row by row, at most CHUNK at a time."""
        import torch

        if self.nbytes:
            flat = self.value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            yield from (flat[at : at + CHUNK].tobytes() for at in range(0, len(flat), CHUNK))


Entry = Stored | InMemory


def can_hold(dtype: torch.dtype) -> bool:
    """Whether safetensors has a name for the dtype."""
    return dtype in _names()


@dataclass(frozen=True)
class Weights:
    """The content of files of weights.

    Attributes:
        files: All of them, an index before its shards.
        entries: Tensors by key, in the order of their bytes.
        metadata: Of the header; of shards, joined.
        left_behind: Of a pickle, dotted names of what it holds beside the weights.
    """

    files: tuple[Path, ...]
    entries: dict[str, Entry]
    metadata: dict[str, str]
    left_behind: tuple[str, ...] = ()
