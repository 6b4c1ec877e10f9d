"""A safetensors file or the directory around it, read lazily: its header at once, its tensors when asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.config import Config, parse_config
from codebook_tools.checkpoints.layout import config_beside, config_in, weights_in
from codebook_tools.errors import CodebookError

_CHUNK = 16 << 20


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies. dtype: as safetensors names it ("F32"). start, end: byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors file that was found sound. entries: by key, in the order of their bytes.

    path: of the file. folder: the directory that was named in its place. config_path: of the config that goes with it.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    folder: Path | None = None
    config_path: Path | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: entry.shape for key, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {key: entry.dtype for key, entry in self.entries.items()}

    def tensor(self, key: str) -> Tensor:
        """One tensor, in its stored dtype."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of them, in their stored dtypes."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in self.entries}

    def chunks(self, key: str) -> Iterator[bytes]:
        """The stored bytes of a tensor, at most 16 MiB at a time."""
        entry = self.entries[key]
        with self.path.open("rb") as file:
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise CodebookError(f"{self.path} was cut short while it was read, at {key}")
                left -= len(chunk)
                yield chunk

    @cached_property
    def config(self) -> Config | None:
        """Read when asked for: a config.json beside a file may be anyone's. Raises CodebookError where it is none."""
        return parse_config(self.config_path) if self.config_path else None

    @cached_property
    def sha256(self) -> str:
        return file_sha256(self.path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a safetensors file, or the one in a directory in diffusers layout, and read its header.

    Raises CodebookError with what the file is, where it is none, and with what the directory lacks.
    """
    from safetensors import SafetensorError, safe_open

    folder = None
    try:
        if path.is_dir():
            folder, path = path, weights_in(path)
        config_path = config_in(folder) if folder else config_beside(path)
        with path.open("rb") as file:
            head = file.read(8)
            with safe_open(path, framework="pt"):  # the library's own checks of offsets, overlaps and dtypes
                pass
            length = int.from_bytes(head, "little")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CodebookError(f"no such file: {path}") from error
    except OSError as error:
        raise CodebookError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CodebookError(f"{path} is not a sound safetensors file: {_what_it_is(path, error)}") from error
    metadata = header.pop("__metadata__", None) or {}
    entries = {
        key: Entry(value["dtype"], tuple(value["shape"]), *(8 + length + offset for offset in value["data_offsets"]))
        for key, value in header.items()
    }
    ordered = dict(sorted(entries.items(), key=lambda entry: (entry[1].start, entry[0])))
    checkpoint = Checkpoint(path, ordered, metadata, folder, config_path)
    if folder:
        _ = checkpoint.config  # part of what was named, so it must be sound
    return checkpoint


def _what_it_is(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as problem:
        return str(problem)
    if not head:
        return "it is empty"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return (
            "it is a PyTorch pickle; convert it with torch.load(..., weights_only=True) and safetensors.torch.save_file"
        )
    if head.lstrip()[:1] == b"<":
        return "it is an HTML or XML page, perhaps a failed download"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with git lfs pull"
    return f"{error} (truncated or of another format)"


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name. Raises CodebookError for one that this torch does not know."""
    known = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool,
    }  # fmt: skip
    if name not in known:
        raise CodebookError(f"tensors of dtype {name} cannot be handled; there are {', '.join(known)}")
    return known[name]
