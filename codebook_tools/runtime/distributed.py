"""Several processes that work on one command, as torchrun starts them; by itself a process is the first of one.

Every process runs the same code on its part of the data. What they found is summed or gathered here, and the same on
all of them afterwards. Only those that `joined` brought together count: a program that has processes of its own, and
calls the library from one of them, is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from codebook_tools.errors import CodebookError

if TYPE_CHECKING:  # imported where it is used: a command that fails says so before torch would be there
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

_T = TypeVar("_T")

_PATIENCE = timedelta(hours=2)  # with processes that have more to do; one that ends ends the others at once
_LAST_WORDS = timedelta(seconds=10)  # of a process that fails, before the others end, too


@dataclass
class _Together:
    """store: what the processes share besides the tensors that they send; None where there is but one."""

    rank: int = 0
    count: int = 1
    store: Store | None = None


_together = _Together()


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, if it did: by NCCL where networks run on GPUs, else by gloo.

    device: as devices.device_of takes it. With several GPUs each process takes its own. Raises CodebookError where
    there are fewer GPUs than processes.
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
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    _together.rank, _together.count = rank, count
    _together.store = PrefixStore("codebook_tools", store)
    try:
        yield
    finally:
        _together.rank, _together.count, _together.store = 0, 1, None
        distributed.destroy_process_group()


def _own_gpu(there: int) -> int:
    """The GPU of this process, of those there are on its machine."""
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if own >= there:
        here = os.environ.get("LOCAL_WORLD_SIZE", own + 1)
        raise CodebookError(f"{here} processes on {there} GPUs: start as many as there are, or use --device cpu")
    return own


def count() -> int:
    """How many processes there are."""
    return _together.count


def require_one(command: str) -> None:
    """Raise CodebookError where a command that works in one process was started in several."""
    if count() > 1:
        raise CodebookError(f"{command} works in one process, not {count()}; start it without torchrun")


def rank() -> int:
    """Which of them this is, from 0."""
    return _together.rank


def part() -> tuple[int, int]:
    """Which part of the data is this process' own, of how many: as Media.part."""
    return rank(), count()


def own_slice(n: int) -> slice:
    """Which of n things in a row are this process' own: all processes' slices, in order of rank, are the whole."""
    return slice(n * rank() // count(), n * (rank() + 1) // count())


def summed(values: Tensor) -> Tensor:
    """The sum of all processes' values, of one shape and dtype; `values` itself is left as it is."""
    if count() == 1:
        return values
    from torch import distributed

    total = _carried(values).clone()
    distributed.all_reduce(total)
    return total.to(values.device)


def gathered(rows: Tensor) -> Tensor:
    """All processes' rows, (n, ...) each, one after another in order of rank."""
    if count() == 1:
        return rows
    import torch
    from torch import distributed

    sent, lengths = _carried(rows.contiguous()), each(len(rows))
    padded = sent.new_zeros((max(lengths), *rows.shape[1:]))  # NCCL gathers tensors of one shape only
    padded[: len(sent)] = sent
    received = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(received, padded)
    return torch.cat([of[:length] for of, length in zip(received, lengths, strict=True)]).to(rows.device)


def each(value: _T) -> list[_T]:
    """Every process' value, in order of rank; anything that pickles."""
    if count() == 1:
        return [value]
    from torch import distributed

    values: list[_T | None] = [None] * count()
    distributed.all_gather_object(values, value)
    return cast("list[_T]", values)


def of_first(value: _T) -> _T:
    """The first process' value, on all of them; anything that pickles."""
    if count() == 1:
        return value
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def by_first(work: Callable[[], _T]) -> _T:
    """What `work` returns on the first process, which alone does it while the others wait; on all of them."""
    return of_first(work() if rank() == 0 else cast("_T", None))


def follow_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors of all processes, without gradients, by those of the first."""
    if count() == 1:
        return
    from torch import distributed

    for tensor in tensors:
        carried = _carried(tensor.detach()).contiguous()
        distributed.broadcast(carried, src=0)
        tensor.detach().copy_(carried)


@contextmanager
def alike(kind: type[Exception]) -> Iterator[None]:
    """An error of that kind in one process is one in all, when they have come to the end of this block."""
    problem = None
    try:
        yield
    except kind as error:
        if count() == 1:
            raise
        problem = error
    met = [error for error in each(problem) if error is not None]
    if met:
        raise met[0]


def fail(code: int, say: Callable[[], None]) -> int:
    """Say why this process fails, unless another has failed before it: then it fails alike, or because of that.

    Returns the exit code of all: the first's. torchrun ends all processes when one has ended, so that the others wait
    until the first has said why.
    """
    store = _together.store
    if store is None or not _has_failed_already(store):
        say()
        if store is not None:
            with suppress(RuntimeError):
                store.set("code", str(code))
        return code
    store.set_timeout(_LAST_WORDS)
    with suppress(RuntimeError):  # the first did not live to say so
        code = int(store.get("code"))
    return code


def is_left_alone(error: Exception) -> bool:
    """Whether the error says that another process is no longer there."""
    said = str(error).lower()
    lost = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "remote process exited")
    return count() > 1 and isinstance(error, RuntimeError) and any(words in said for words in lost)


def _has_failed_already(store: Store) -> bool:
    try:
        return store.add("failed", 1) > 1
    except RuntimeError:  # who keeps the words is gone: rather twice than never
        return False


def _carried(values: Tensor) -> Tensor:
    """On the device that the backend carries tensors of."""
    from torch import distributed

    return values.cuda() if distributed.get_backend() == "nccl" else values.cpu()
