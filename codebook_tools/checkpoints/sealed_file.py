"""Checksums inside the files that this package reads again, so that damage is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.tensors import Entry, InMemory
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.safe_io import parse_json

if TYPE_CHECKING:
    from torch import Tensor

SEAL = PREFIX + "seal"


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with a seal, which holds the SHA-256 of each tensor and that of the metadata.

    Args:
        tensors: All tensors of the file, by key.
        metadata: All other metadata of the file.
    """
    digests = {name: _digest(InMemory(name, tensor)) for name, tensor in sorted(tensors.items())}
    rest = {"format": "pt", **metadata}
    return {**rest, SEAL: json.dumps({"tensors": digests, "said": _header_sha256(digests, rest)})}


@dataclass(frozen=True, eq=False)
class Sealed:
    """The content of a sealed file; each tensor is checked as it is read.

    Attributes:
        path: Of the file, for messages.
        entries: Tensors by key.
        metadata: Of the file, the seal included.
        mend: The remedy that the message of a damaged file ends with.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    mend: str

    def check(self) -> None:
        """Check the metadata and the list of tensors.

        Raises:
            CodebookError: They are not what was written.
        """
        if self._digests.keys() != self.entries.keys():
            raise self._broken("its list of tensors")

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CodebookError: It is not what was written.
        """
        self.check()
        if _digest(self.entries[name]) != self._digests[name]:
            raise self._broken(name)
        return self.entries[name].tensor()

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors, as `tensor` does each."""
        return {name: self.tensor(name) for name in self.entries}

    @cached_property
    def _digests(self) -> dict[str, str]:
        """SHA-256 by key, from a seal that fits the metadata."""
        rest = {name: value for name, value in self.metadata.items() if name != SEAL}
        try:
            seal = parse_json(self.metadata[SEAL])
            digests = dict(seal["tensors"])
            intact = seal["said"] == _header_sha256(digests, rest)
        except (KeyError, ValueError, TypeError) as error:
            raise self._broken("its seal") from error
        if not intact:
            raise self._broken("its header")
        return digests

    def _broken(self, what: str) -> CodebookError:
        return CodebookError(f"{self.path} is damaged: {what} is not what was written; {self.mend}")


def _header_sha256(digests: Mapping[str, str], metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([sorted(digests.items()), sorted(metadata.items())]).encode()).hexdigest()


def _digest(entry: Entry) -> str:
    digest = hashlib.sha256(f"{entry.dtype} {list(entry.shape)} ".encode())
    for chunk in entry.chunks():
        digest.update(chunk)
    return digest.hexdigest()
