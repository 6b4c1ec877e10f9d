"""Collectives over the processes that torchrun starts for one command; a single process is rank 0 of one.

Every process runs the same code on its part of the data; the functions here return the same on all of them. Only
processes that `joined` brought together count, and within `of_program` those of a program that joined them itself: such
a program may otherwise call the library from one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from codebook_tools.errors import CodebookError

if TYPE_CHECKING:  # imported where it is used, for a command may fail before it needs torch
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

_T = TypeVar("_T")

_TIMEOUT = timedelta(hours=2)  # for processes with more work; where one ends, torchrun ends the others at once
_FAILURE_TIMEOUT = timedelta(seconds=10)  # for the message of the process that failed first


@dataclass
class _Group:
    """The processes of this command. store: what they share beside tensors; None of a single process."""

    rank: int = 0
    count: int = 1
    store: Store | None = None


_group = _Group()


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, if any: by NCCL where networks run on GPUs, else by gloo.

    Args:
        device: As `devices.device_of` takes it. On CUDA each process takes its own GPU.

    Raises:
        CodebookError: There are fewer GPUs than processes.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    on_gpu = device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_own_gpu(torch.cuda.device_count()))
    store, rank, count = next(rendezvous("env://"))
    backend = "nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_TIMEOUT)
    _group.rank, _group.count, _group.store = rank, count, PrefixStore("codebook_tools", store)
    try:
        yield
    finally:
        _group.rank, _group.count, _group.store = 0, 1, None
        distributed.destroy_process_group()


@contextmanager
def of_program() -> Iterator[None]:
    """Within, the processes of a program that initialized torch.distributed itself count, all of which get here."""
    import torch

    torch_distributed = torch.distributed
    if _group.count > 1 or not (torch_distributed.is_available() and torch_distributed.is_initialized()):
        yield
        return
    _group.rank, _group.count = torch_distributed.get_rank(), torch_distributed.get_world_size()
    try:
        yield
    finally:
        _group.rank, _group.count = 0, 1


def _own_gpu(gpus: int) -> int:
    """The index of this process' GPU among those of its machine."""
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if own >= gpus:
        processes = os.environ.get("LOCAL_WORLD_SIZE", own + 1)
        raise CodebookError(f"{processes} processes on {gpus} GPUs: start as many as there are, or use --device cpu")
    return own


def count() -> int:
    """Number of processes."""
    return _group.count


def require_one(command: str) -> None:
    """Raise CodebookError where a command that works in one process was started in several."""
    if count() > 1:
        raise CodebookError(f"{command} works in one process, not {count()}; start it without torchrun")


def rank() -> int:
    """Index of this process, from 0."""
    return _group.rank


def part() -> tuple[int, int]:
    """Index of this process' part of the data, and number of parts, as in Media.part."""
    return rank(), count()


def own_slice(n: int) -> slice:
    """This process' contiguous slice of n items; the slices of all ranks, in order, are the whole."""
    return slice(n * rank() // count(), n * (rank() + 1) // count())


def summed(values: Tensor) -> Tensor:
    """Sum the values of all processes, of one shape and dtype; `values` itself does not change."""
    if count() == 1:
        return values
    from torch import distributed

    total = _carried(values).clone()
    distributed.all_reduce(total)
    return total.to(values.device)


def gathered(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes, (n, ...) each with an n of its own, in order of rank."""
    if count() == 1:
        return rows
    import torch
    from torch import distributed

    sent, lengths = _carried(rows.contiguous()), each(len(rows))
    padded = sent.new_zeros((max(lengths), *rows.shape[1:]))  # NCCL gathers tensors of one shape only
    padded[: len(sent)] = sent
    received = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(received, padded)
    return torch.cat([part[:length] for part, length in zip(received, lengths, strict=True)]).to(rows.device)


def each(value: _T) -> list[_T]:
    """The value of each process, in order of rank; anything that pickles."""
    if count() == 1:
        return [value]
    from torch import distributed

    values: list[_T | None] = [None] * count()
    distributed.all_gather_object(values, value)
    return cast("list[_T]", values)


def of_first(value: _T) -> _T:
    """The value of rank 0, on all processes; anything that pickles."""
    if count() == 1:
        return value
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def by_first(work: Callable[[], _T]) -> _T:
    """Run `work` on rank 0 alone while the others wait; all processes return its result."""
    return of_first(work() if rank() == 0 else cast("_T", None))


def follow_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors of all processes, without gradients, by those of rank 0."""
    if count() == 1:
        return
    from torch import distributed

    for tensor in tensors:
        carried = _carried(tensor.detach()).contiguous()
        distributed.broadcast(carried, src=0)
        tensor.detach().copy_(carried)


@contextmanager
def alike(kind: type[Exception]) -> Iterator[None]:
    """At the end of the block, raise an exception of this type on all processes if it was raised in one."""
    problem = None
    try:
        yield
    except kind as error:
        if count() == 1:
            raise
        problem = error
    problems = [error for error in each(problem) if error is not None]
    if problems:
        raise problems[0]


def fail(code: int, say: Callable[[], None]) -> int:
    """Report why this process fails, unless another failed before it, whose failure is then the same or its cause.

    torchrun ends all processes when one ends, so the later ones wait until the first has reported.

    Args:
        code: The exit code of this failure.
        say: Reports it.

    Returns:
        The exit code of the first process that failed.
    """
    store = _group.store
    if store is None or not _another_failed(store):
        say()
        if store is not None:
            with suppress(RuntimeError):
                store.set("code", str(code))
        return code
    store.set_timeout(_FAILURE_TIMEOUT)
    with suppress(RuntimeError):  # the first ended before it could store its code
        code = int(store.get("code"))
    return code


def is_left_alone(error: Exception) -> bool:
    """Whether the error comes from the loss of another process."""
    message = str(error).lower()
    lost = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "remote process exited")
    return count() > 1 and isinstance(error, RuntimeError) and any(words in message for words in lost)


def _another_failed(store: Store) -> bool:
    try:
        return store.add("failed", 1) > 1
    except RuntimeError:  # the process that serves the store is gone: rather report twice than never
        return False


def _carried(values: Tensor) -> Tensor:
    """The values on a device whose tensors the backend can send."""
    from torch import distributed

    return values.cuda() if distributed.get_backend() == "nccl" else values.cpu()
