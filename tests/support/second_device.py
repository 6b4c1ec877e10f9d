"""A second device without hardware: it computes on the CPU, and takes no tensors of other devices.

PyTorch lets Python stand in for a device of its own (PrivateUse1, torch >= 2.9). Here a tensor of the device `twin`
holds a tensor of the CPU, on which every operator runs. As on CUDA, operators that mix devices raise, and `.numpy()`
does. What a GPU would make the host wait for is counted. Streams, memory and speed it does not know.

Registration is for the whole process and for good: only on_second_device.py does it, in a process of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "twin"

AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")

counts = Counter[str]()
"""OPERATORS that ran, READS and UPLOADS so far."""

OPERATORS, READS, UPLOADS = "operators", "reads", "uploads"
"""Reads are numbers that the host waits for; uploads, copies to the device that it waits for: not `non_blocking`."""

_aten = torch.ops.aten

_COPIES = (_aten.copy_, _aten._to_copy)

_INDEXED = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)
"""Operators whose indices may lie on the CPU."""

_SHAPED_BY_NUMBERS = (
    *(_aten.nonzero, _aten.masked_select, _aten.bincount, _aten.unique_dim, _aten._unique, _aten._unique2),
    *(_aten.unique_consecutive, _aten.repeat_interleave, _aten.equal, _aten._local_scalar_dense),
)
"""Operators whose results the host cannot know the shapes, or values, of before the device has computed them."""

_FACTORIES = ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "eye.m")
"""Operators that make a tensor of none; all others that do are made of these."""


class _Settings:
    """float64: whether the device has it; mps has none. largest: bytes of the largest tensor that was computed."""

    float64 = True
    largest = 0


settings = _Settings()


class TwinTensor(Tensor):
    """A tensor of the second device. held: the tensor of the CPU, of the same shape and strides, that it stands for."""

    held: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> TwinTensor:
        if held.dtype == torch.float64 and not settings.float64:
            raise TypeError(f"{NAME} has no float64")
        settings.largest = max(settings.largest, held.nbytes)
        made: TwinTensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operator that meets a tensor of the second device, below autograd."""
        kwargs = dict(kwargs or {})
        _refuse_mixed(func, args, kwargs)
        _count(func, args, kwargs)
        held_args, held_kwargs = tree_map_only(TwinTensor, lambda tensor: tensor.held, (args, kwargs))
        if held_kwargs.get("device") is not None:
            held_kwargs["device"] = "cpu"
        found = _KERNELS.get(func.overloadpacket, func)(*held_args, **held_kwargs)
        if _device_named(kwargs) == "cpu":
            return found
        if _written(func, args, kwargs):
            return return_and_correct_aliasing(func, args, kwargs, found)
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, TwinTensor, found))

    def tolist(self) -> Any:
        return self.cpu().tolist()  # which PyTorch has for its own classes alone

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.held!r} on {NAME}"


def register(float64: bool = True) -> None:
    """Give this process the device; `torch.device("twin")` names it from here on."""
    settings.float64 = float64
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(_aten, packet), overload or "default")
        _library.impl(name, partial(_made, operator), "PrivateUse1")
    _library.impl("_copy_from", _copied, "PrivateUse1")
    _all_operators.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # it computes in what it is given


_library = torch.library.Library("aten", "IMPL")  # kernels go with these objects
_all_operators = torch.library.Library("_", "IMPL")


class _Backend(getattr(backend_registration, "_DummyBackendModule", object)):  # type: ignore[misc]
    """What `torch.twin` answers."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def set_device(self, device: object) -> None:
        """There is one."""


def _made(operator: Callable[..., Tensor], *args: Any, **kwargs: Any) -> TwinTensor:
    return TwinTensor(operator(*args, **(kwargs | {"device": "cpu", "pin_memory": False})))


def _copied(source: Tensor, into: Tensor, non_blocking: bool = False) -> Tensor:
    """Of `torch.tensor` alone, which goes past `__torch_dispatch__`."""
    return TwinTensor.__torch_dispatch__(_aten.copy_.default, (TwinTensor,), (into, source, non_blocking))


def _refuse_mixed(func: Any, args: Any, kwargs: Any) -> None:
    """Raise RuntimeError where an operator is given tensors of two devices. Numbers, tensors without an axis, may lie
    on the CPU, unless they are written to; and so may indices."""
    if func.overloadpacket in _COPIES:
        return
    if func.overloadpacket in _INDEXED:
        args = (args[0], *args[2:])
    written = _written(func, args, kwargs)
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if not any(isinstance(tensor, TwinTensor) for tensor in tensors):
        raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor (cpu): {func}")
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, TwinTensor)]
    if any(tensor.ndim or any(tensor is one for one in written) for tensor in elsewhere):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! ({func})"
        )


def _count(func: Any, args: Any, kwargs: Any) -> None:
    packet = func.overloadpacket
    counts[OPERATORS] += 1
    if packet in _SHAPED_BY_NUMBERS or _device_named(kwargs) == "cpu":
        counts[READS] += 1
    elif packet is _aten.copy_:
        into, source = args[:2]
        blocking = not (kwargs.get("non_blocking") or any(args[2:]))
        if not isinstance(into, TwinTensor):
            counts[READS] += 1
        elif not isinstance(source, TwinTensor) and source.ndim and blocking:
            counts[UPLOADS] += 1
    elif packet in _INDEXED:
        indices = [index for index in args[1] if index is not None]
        counts[READS] += any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        counts[UPLOADS] += any(not isinstance(index, TwinTensor) for index in indices)


def _lstm_cell(
    inputs: Tensor, hidden: Tensor, cell: Tensor, input_bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What GPUs compute in one kernel, of gates (n, 4 * size) and cells (n, size): hidden state, cells, and gates."""
    sums = inputs + hidden
    if input_bias is not None and hidden_bias is not None:
        sums = sums + input_bias + hidden_bias
    raw = sums.chunk(4, 1)
    enter, forget, new, leave = raw[0].sigmoid(), raw[1].sigmoid(), raw[2].tanh(), raw[3].sigmoid()
    after = forget * cell + enter * new
    return leave * after.tanh(), after, torch.cat([enter, forget, new, leave], 1)


def _lstm_cell_backward(
    to_hidden: Tensor | None, to_after: Tensor | None, cell: Tensor, after: Tensor, gates: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `_lstm_cell`, of those to its first two results: to the sums of gates, the cells, and the biases."""
    enter, forget, new, leave = gates.chunk(4, 1)
    shown = after.tanh()
    hidden = torch.zeros_like(cell) if to_hidden is None else to_hidden
    total = hidden * leave * (1 - shown * shown) + (0 if to_after is None else to_after)
    to_gates = torch.cat(
        [
            total * new * enter * (1 - enter),
            total * cell * forget * (1 - forget),
            total * enter * (1 - new * new),
            hidden * shown * leave * (1 - leave),
        ],
        1,
    )
    return to_gates, total * forget, to_gates.sum(0) if has_bias else None


_KERNELS: dict[Any, Callable[..., Any]] = {
    _aten._thnn_fused_lstm_cell: _lstm_cell,
    _aten._thnn_fused_lstm_cell_backward_impl: _lstm_cell_backward,
}
"""Operators that the CPU has not, for torch asks only other devices for them."""


def _device_named(kwargs: Any) -> str | None:
    device = kwargs.get("device")
    return None if device is None else torch.device(device).type


def _written(func: Any, args: Iterable[Any], kwargs: Any) -> list[Tensor]:
    """The arguments that an operator writes to: of those in place, and of those with `out`."""
    given = dict(zip((entry.name for entry in func._schema.arguments), args, strict=False)) | kwargs
    writes = {entry.name for entry in func._schema.arguments if entry.alias_info and entry.alias_info.is_write}
    return [value for name, value in given.items() if name in writes and isinstance(value, Tensor)]
