"""A guard against configs of unknown origin: no network is made that is far larger than its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from codebook_tools.errors import CodebookError

SLACK = 4
"""Factor by which a network may exceed the file's tensors and numbers: buffers are not stored, layers may be shared."""

_FEW, _SMALL = 1000, 1_000_000  # modules and numbers that any network may have


@dataclass
class _Guard:
    """Counts what is registered while a network is made.

    Attributes:
        modules: Modules and tensors that may still be registered.
        numbers: Elements of tensors that may still be.
        refused: Why the network was not made; None where it was.
    """

    modules: int
    numbers: int
    refused: str | None = None

    def module(self, *_: object) -> None:
        self.modules -= 1
        if self.modules < 0:
            self._refuse("many times as many layers")

    def tensor(self, _module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        self.module()
        self.numbers -= tensor.numel() if tensor is not None else 0
        if self.numbers < 0:
            self._refuse("many times as many weights")

    def _refuse(self, what: str) -> None:
        self.refused = f"it has {what}"
        raise ValueError(self.refused)  # through the library that makes it, which may put words around it


def bounded(make: Callable[[], nn.Module], tensors: int, numbers: int, what: str) -> nn.Module:
    """Make a network of at most `SLACK` times the size of a file, first on the meta device, then on the CPU.

    Args:
        make: Returns the network.
        tensors: How many the file has.
        numbers: How many elements they have.
        what: What messages call the config.

    Raises:
        CodebookError: The network would be larger. This is raised before it takes time or memory.
    """
    for place in ("meta", "cpu"):
        guard = _Guard(SLACK * tensors + _FEW, SLACK * numbers + _SMALL)
        try:
            with _watched(guard), torch.device(place):
                made = make()
        except Exception as error:
            if guard.refused:
                raise CodebookError(f"{what} describes another model than its weights: {guard.refused}") from error
            if place == "cpu":  # some networks cannot be made without memory, and are then made with it
                raise
    return made


@contextmanager
def _watched(guard: _Guard) -> Iterator[None]:
    hooks = [
        register_module_module_registration_hook(guard.module),
        register_module_parameter_registration_hook(guard.tensor),
        register_module_buffer_registration_hook(guard.tensor),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
