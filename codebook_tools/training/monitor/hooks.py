"""Hooks on the calls of a quantizer in training, which copies of the module do not get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Before = Callable[[], None]
"""Called before a call."""

After = Callable[[tuple[Any, ...], dict[str, Any], Any], None]
"""Called with the arguments of a call and what it returned."""


class Hooks:
    """Hooks on one module.

    Those of a call that backward repeats, as gradient checkpointing does, are left out.
    """

    def __init__(self) -> None:
        self._removals: list[Callable[[], None]] = []

    def listen(self, module: nn.Module, method: str, before: Before, after: After) -> None:
        """Hook all calls of a module in training mode. method: "forward", or one that is called in its place."""

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def begin() -> None:
            if _counts(module):
                with torch.no_grad():
                    before()

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def end(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if _counts(module):
                with torch.no_grad():
                    after(args, kwargs, output)

        if method == "forward":
            handles = [
                module.register_forward_pre_hook(_Hook(lambda module, args: begin())),
                module.register_forward_hook(
                    _Hook(lambda module, args, kwargs, output: end(args, kwargs, output)), with_kwargs=True
                ),
            ]
            self._removals += [handle.remove for handle in handles]
        else:
            setattr(module, method, _Method(module, method, begin, end))
            self._removals.append(lambda: delattr(module, method))

    def add(self, handle: RemovableHandle) -> None:
        """Remove this one with the others."""
        self._removals.append(handle.remove)

    def remove(self) -> None:
        """Leave the modules as they were."""
        while self._removals:
            self._removals.pop()()


def _counts(module: nn.Module) -> bool:
    in_backward: bool = torch._C._current_graph_task_id() != -1
    return module.training and not in_backward


class _Hook:
    """A function as a hook; a copy, also one in a file, does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    """What copies of a hook do."""


class _Method:
    """A method of a module with functions around it; a copy of the module gets its own method back."""

    def __init__(self, module: nn.Module, name: str, begin: Before, end: After) -> None:
        self._module, self._name, self._begin, self._end = module, name, begin, end

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._begin()
        output = getattr(type(self._module), self._name)(self._module, *args, **kwargs)
        self._end(args, kwargs, output)
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, self._name)
