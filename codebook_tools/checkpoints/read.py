"""A checkpoint: a file of weights, or several with an index, or the directory around them. Read lazily: what lies where
at once, tensors when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.config import Config, parse_config
from codebook_tools.checkpoints.hashing import State, state_of
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
    """Weights that were found sound. entries: by key, in the order of their bytes.

    path: of the file, or of the index. files: all of the weights', an index before its shards. folder: the directory
    that was named in its place, or that an index lies in. config_path: of the config that goes with it. left_behind:
    dotted names of what lies beside the weights in a pickle, and is not read. states: of the files as they were read.
    stated: what the user says of tensors beside a codebook, by key: a role, or AS_STORED.
    memory: what was found out about it, by name.
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

    @property
    def declared(self) -> dict[str, str]:
        """What is said of tensors beside a codebook, by key: by the user now, or when the file was written."""
        return {**declared_in(self.metadata), **self.stated}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: entry.shape for key, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {key: entry.dtype for key, entry in self.entries.items()}

    @property
    def sharded(self) -> bool:
        return len(self.files) > 1

    @property
    def nbytes(self) -> int:
        """Of the files of weights, without an index; of a pickle, of its tensors alone."""
        if not all(isinstance(entry, Stored) for entry in self.entries.values()):
            return sum(entry.nbytes for entry in self.entries.values())
        return sum(file.stat().st_size for file in self.files[self.sharded :])

    def tensor(self, key: str) -> Tensor:
        """One tensor, in its stored dtype; no other is read."""
        return self.entries[key].tensor()

    def tensors(self) -> dict[str, Tensor]:
        """All of them, in their stored dtypes: in memory, however large."""
        return {key: entry.tensor() for key, entry in self.entries.items()}

    def chunks(self, key: str) -> Iterator[bytes]:
        """The bytes of a tensor as safetensors stores them, at most 4 MiB at a time."""
        return self.entries[key].chunks()

    @property
    def warnings(self) -> list[str]:
        """What to warn of in what was read: of a pickle, all that is no weights of the model."""
        if not self.left_behind:
            return []
        few = ", ".join(self.left_behind[:3]) + (", ..." if len(self.left_behind) > 3 else "")
        return [f"{self.path.name} holds more than the weights that were read; {few} is left behind"]

    def check_unchanged(self) -> None:
        """Raise CodebookError where a file is not what it was when it was read: half of a result would be another's."""
        for file, was in zip(self.files, self.states, strict=True):
            try:
                changed = state_of(file) != was
            except OSError as error:
                raise CodebookError(f"{file} is gone since it was read; nothing is written") from error
            if changed:
                raise CodebookError(f"{file} has changed since it was read; nothing is written; begin again")

    @cached_property
    def config(self) -> Config | None:
        """Read when asked for: a config.json beside a file may be anyone's. Raises CodebookError where it is none."""
        return parse_config(self.config_path) if self.config_path else None

    @cached_property
    def sha256(self) -> str:
        """Of the file; of an index and its shards, as `joined_sha256` has it; in memory, of the tensors by key."""
        if not self.files:
            digest = hashlib.sha256()
            for key in sorted(self.entries):
                digest.update(f"{key} {self.entries[key].dtype} {self.entries[key].shape}\n".encode())
                for chunk in self.chunks(key):
                    digest.update(chunk)
            return digest.hexdigest()
        return joined_sha256({file.name: file_sha256(file) for file in self.files})


def declared_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """What was said of tensors when a file was written."""
    try:
        said = parse_json(metadata.get(PREFIX + DECLARED, "{}"))
    except ValueError:
        return {}
    return {key: role for key, role in said.items() if isinstance(role, str)} if isinstance(said, dict) else {}


def joined_sha256(digests: Mapping[str, str]) -> str:
    """One for several files, by name, in this order: the SHA-256 of what sha256sum prints of them. Of one, its own."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest() if len(digests) > 1 else next(iter(digests.values()))


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a safetensors file, an index of shards or a file of torch.save, or the one in a directory.

    An index stands for its directory. Raises CodebookError with what the file is, where it is none of these, and with
    what the directory lacks.
    """
    try:
        weights = weights_in(path) if path.is_dir() else path
        sharded = weights.suffix == Path(INDEX).suffix
        folder = path if path.is_dir() else weights.parent if sharded else None
        config_path = config_in(path) if folder and not sharded else config_beside(weights)
        found = read_shards(weights) if sharded else _read_file(weights)
        states = tuple(map(state_of, found.files))
    except FileNotFoundError as error:
        raise CodebookError(f"no such file: {path}") from error
    except OSError as error:
        raise CodebookError(f"cannot read {path}: {error.strerror or error}") from error
    checkpoint = Checkpoint(
        weights, found.entries, found.metadata, found.files, folder, config_path, found.left_behind, states
    )
    if folder:
        _ = checkpoint.config  # part of what was named, so it must be sound
    return checkpoint


def _read_file(path: Path) -> Weights:
    """Told by how it begins, not by its name; but what is called safetensors must be that.

    A header's length may begin as a pickle does: what follows it, a brace, tells them apart.
    """
    check_regular(path)
    with path.open("rb") as file:
        head = file.read(9)
    pickled = head.startswith(PICKLED) and head[8:] != b"{"
    if not pickled or path.suffix == SUFFIX:
        return read_safetensors(path)
    from codebook_tools.checkpoints.torch_file import read_pickle  # which torch is needed for

    return read_pickle(path)
