"""Files of our own say what they held when they were written, so that damage shows when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.tensors import Entry, Held
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.safe_io import parse_json

if TYPE_CHECKING:
    from torch import Tensor

SEAL = PREFIX + "seal"


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with a seal: SHA-256 of every tensor, and of all that is said beside them."""
    digests = {name: _digest(Held(name, tensor)) for name, tensor in sorted(tensors.items())}
    said = {"format": "pt", **metadata}
    return {**said, SEAL: json.dumps({"tensors": digests, "said": _said(digests, said)})}


@dataclass(frozen=True, eq=False)
class Sealed:
    """What a file with a seal holds. Each tensor is held against it as it is read. mend: what to do about damage."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    mend: str

    def check(self) -> None:
        """Raise CodebookError where what is said beside the tensors, or which there are, is not what was written."""
        if self._digests.keys() != self.entries.keys():
            raise self._broken("its list of tensors")

    def tensor(self, name: str) -> Tensor:
        """Raises CodebookError where it is not what was written."""
        self.check()
        if _digest(self.entries[name]) != self._digests[name]:
            raise self._broken(name)
        return self.entries[name].tensor()

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.tensor(name) for name in self.entries}

    @cached_property
    def _digests(self) -> dict[str, str]:
        rest = {name: value for name, value in self.metadata.items() if name != SEAL}
        try:
            seal = parse_json(self.metadata[SEAL])
            digests = dict(seal["tensors"])
            whole = seal["said"] == _said(digests, rest)
        except (KeyError, ValueError, TypeError) as error:
            raise self._broken("its seal") from error
        if not whole:
            raise self._broken("its header")
        return digests

    def _broken(self, what: str) -> CodebookError:
        return CodebookError(f"{self.path} is damaged: {what} is not what was written; {self.mend}")


def _said(digests: Mapping[str, str], metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([sorted(digests.items()), sorted(metadata.items())]).encode()).hexdigest()


def _digest(entry: Entry) -> str:
    digest = hashlib.sha256(f"{entry.dtype} {list(entry.shape)} ".encode())
    for chunk in entry.chunks():
        digest.update(chunk)
    return digest.hexdigest()
