"""What an encoder made of batches, kept while its weights stay as they are: a surgery looks at its data many times."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from typing import Any

from torch import Tensor, nn

LIMIT = 1 << 30
"""Bytes that are kept; what comes later is encoded each time."""


class Kept:
    """Encoded batches by their content. A training step, or weights that are loaded, empty it. limit: in bytes."""

    def __init__(self) -> None:
        self.limit = LIMIT
        self._version = -1
        self._found: dict[object, Any] = {}
        self._nbytes = 0

    def encoded(self, network: nn.Module, media: Tensor, about: object, encode: Callable[[], Any]) -> Any:
        """What `encode` returns for `media`, or returned before. about: what else that depends on."""
        version = sum(tensor._version for tensor in chain(network.parameters(), network.buffers()))
        if version != self._version:
            self._version, self._nbytes = version, 0
            self._found.clear()
        digest = hashlib.blake2b(media.cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
        key = (digest, tuple(media.shape), about)
        if key in self._found:
            return deepcopy(self._found[key])
        made = encode()
        nbytes = _bytes_of(made)
        if self._nbytes + nbytes <= self.limit:  # a copy: what comes after the encoder may write into what it was given
            self._found[key], self._nbytes = deepcopy(made), self._nbytes + nbytes
        return made


def _bytes_of(made: Any) -> int:
    """Of all tensors in it."""
    if isinstance(made, Tensor):
        return made.nbytes
    parts = made.values() if isinstance(made, dict) else made if isinstance(made, tuple | list) else ()
    return sum(map(_bytes_of, parts))
