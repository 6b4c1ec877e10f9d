"""A checkpoint: a file of weights, shards with an index, or a directory of either. Headers are read at once, tensors
when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.config import Config, parse_config
from codebook_tools.checkpoints.hashing import State, is_hashed_ahead, state_of
from codebook_tools.checkpoints.hashing import file_sha256 as file_sha256
from codebook_tools.checkpoints.layout import AS_STORED as AS_STORED
from codebook_tools.checkpoints.layout import DECLARED, INDEX, PREFIX, SUFFIX, config_beside, config_in, weights_in
from codebook_tools.checkpoints.safetensors_file import PICKLED, read_safetensors
from codebook_tools.checkpoints.shards import read_shards
from codebook_tools.checkpoints.tensors import Entry, Stored, Weights
from codebook_tools.checkpoints.tensors import torch_dtype as torch_dtype
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.safe_io import check_regular, parse_json

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """Weights whose files are sound, and what goes with them.

    Attributes:
        path: Of the file, or of the index of shards.
        entries: Tensors by key, in the order of their bytes.
        metadata: Of the header; of shards, joined.
        files: All files of weights, an index before its shards; empty for weights in memory.
        folder: The directory that was named in place of a file, or in which an index lies.
        config_path: Of the config that goes with the weights.
        left_behind: Dotted names of what lies beside the weights in a pickle and is not read.
        states: Of `files` when they were read.
        stated: What the user states of tensors beside a codebook, by key: a role, or AS_STORED.
        memory: Results derived from the checkpoint, cached by name.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    files: tuple[Path, ...]
    folder: Path | None = None
    config_path: Path | None = None
    left_behind: tuple[str, ...] = ()
    states: tuple[State, ...] = ()
    stated: Mapping[str, str] = field(default_factory=dict)
    memory: dict[str, object] = field(default_factory=dict, init=False, repr=False, compare=False)
    _expected: list[tuple[str, CodebookError]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def declared(self) -> dict[str, str]:
        """What the user states of tensors beside a codebook, by key, now or when the file was written."""
        return {**declared_in(self.metadata), **self.stated}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by key."""
        return {key: entry.shape for key, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Of all tensors, by key, as safetensors names them ("F32")."""
        return {key: entry.dtype for key, entry in self.entries.items()}

    @property
    def sharded(self) -> bool:
        """Whether the weights lie in several files, with an index."""
        return len(self.files) > 1

    @property
    def nbytes(self) -> int:
        """Bytes of the files of weights, without an index; of a pickle, of its tensors alone."""
        if not all(isinstance(entry, Stored) for entry in self.entries.values()):
            return sum(entry.nbytes for entry in self.entries.values())
        return sum(file.stat().st_size for file in self.files[self.sharded :])

    def tensor(self, key: str) -> Tensor:
        """Read one tensor, in its stored dtype."""
        return self.entries[key].tensor()

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors into memory, in their stored dtypes."""
        return {key: entry.tensor() for key, entry in self.entries.items()}

    def chunks(self, key: str) -> Iterator[bytes]:
        """Read the bytes of a tensor as safetensors stores them, at most `tensors.CHUNK` at a time."""
        return self.entries[key].chunks()

    @property
    def warnings(self) -> list[str]:
        """One line that names what a pickle holds beside the weights; empty where there is nothing."""
        if not self.left_behind:
            return []
        few = ", ".join(self.left_behind[:3]) + (", ..." if len(self.left_behind) > 3 else "")
        return [f"{self.path.name} holds more than the weights that were read; {few} is left behind"]

    def check_unchanged(self) -> None:
        """Check that all files are as they were read, since a result would otherwise mix two checkpoints.

        Raises:
            CodebookError: A file has changed or is gone.
        """
        for file, was in zip(self.files, self.states, strict=True):
            try:
                changed = state_of(file) != was
            except OSError as error:
                raise CodebookError(f"{file} is gone since it was read; nothing is written") from error
            if changed:
                raise CodebookError(f"{file} has changed since it was read; nothing is written; begin again")

    @cached_property
    def config(self) -> Config | None:
        """The config, None where there is none; read when asked for, as a config.json beside a file may be another's.

        Raises:
            CodebookError: It is no JSON object.
        """
        return parse_config(self.config_path) if self.config_path else None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file; of an index and its shards that of `joined_sha256`; in memory that of the tensors."""
        if self._expected:
            return self._expected[0][0]
        if not self.files:
            digest = hashlib.sha256()
            for key in sorted(self.entries):
                digest.update(f"{key} {self.entries[key].dtype} {self.entries[key].shape}\n".encode())
                for chunk in self.chunks(key):
                    digest.update(chunk)
            return digest.hexdigest()
        return joined_sha256(self.digests)

    def expect_sha256(self, sha256: str, otherwise: CodebookError) -> None:
        """Check the SHA-256. While files are still hashed ahead it is taken for this one, and `check_sha256` checks it.

        Raises:
            CodebookError: `otherwise`: it is another.
        """
        if any(map(is_hashed_ahead, self.files)):
            self._expected[:] = [(sha256, otherwise)]
        elif sha256 != self.sha256:
            raise otherwise

    def check_sha256(self) -> None:
        """Check what `expect_sha256` took for granted, before anything that depends on it is kept.

        Raises:
            CodebookError: The SHA-256 is another.
        """
        for sha256, otherwise in self._expected:
            if sha256 != joined_sha256(self.digests):
                raise otherwise

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file, by name."""
        return {file.name: file_sha256(file) for file in self.files}


def declared_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """What the user stated of tensors when the file was written, by key; empty where the entry is no JSON object."""
    try:
        declared = parse_json(metadata.get(PREFIX + DECLARED, "{}"))
    except ValueError:
        return {}
    if not isinstance(declared, dict):
        return {}
    return {key: role for key, role in declared.items() if isinstance(role, str)}


def joined_sha256(digests: Mapping[str, str]) -> str:
    """One hash of several files: the SHA-256 of what `sha256sum` prints of them.

    Args:
        digests: SHA-256 by file name, in the order of the output; that of a single file is returned as it is.
    """
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest() if len(digests) > 1 else next(iter(digests.values()))


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a safetensors file, an index of shards or a file of torch.save, or the one in a directory.

    An index stands for its directory.

    Raises:
        CodebookError: The file is none of these, which the message says with what it is; or a directory lacks weights
            or a config.
    """
    try:
        weights = weights_in(path) if path.is_dir() else path
        sharded = weights.suffix == Path(INDEX).suffix
        folder = path if path.is_dir() else weights.parent if sharded else None
        config_path = config_in(path) if folder and not sharded else config_beside(weights)
        content = read_shards(weights) if sharded else _read_file(weights)
        states = tuple(map(state_of, content.files))
    except FileNotFoundError as error:
        raise CodebookError(f"no such file: {path}") from error
    except OSError as error:
        raise CodebookError(f"cannot read {path}: {error.strerror or error}") from error
    checkpoint = Checkpoint(
        weights, content.entries, content.metadata, content.files, folder, config_path, content.left_behind, states
    )
    if folder:
        _ = checkpoint.config  # the user named it with the directory, so it must be sound
    return checkpoint


def _read_file(path: Path) -> Weights:
    """Read a file by its first bytes, not its name; but a name in .safetensors must be true.

    The length of a safetensors header may look like the first bytes of a pickle; the brace after it decides.
    """
    check_regular(path)
    with path.open("rb") as file:
        head = file.read(9)
    pickled = head.startswith(PICKLED) and head[8:] != b"{"
    if not pickled or path.suffix == SUFFIX:
        return read_safetensors(path)
    from codebook_tools.checkpoints.torch_file import read_pickle  # it needs torch

    return read_pickle(path)
