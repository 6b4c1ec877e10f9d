"""Several processes that work on one command, as torchrun starts them; by itself a process is the first of one.

Every process runs the same code on its part of the data. What they found is summed or gathered here, and the same on
all of them afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

_T = TypeVar("_T")


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, if it did: by NCCL where networks run on GPUs, else by gloo.

    device: "auto", "cpu" or "cuda". With several GPUs each process takes its own.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def part() -> tuple[int, int]:
    """Which part of the data is this process' own, of how many: as Media.part."""
    return rank(), count()


def summed(values: Tensor) -> Tensor:
    """The sum of all processes' values, of one shape and dtype; `values` itself is left as it is."""
    if count() == 1:
        return values
    total = _carried(values).clone()
    distributed.all_reduce(total)
    return total.to(values.device)


def gathered(rows: Tensor) -> Tensor:
    """All processes' rows, (n, ...) each, one after another in order of rank."""
    if count() == 1:
        return rows
    sent = _carried(rows.contiguous())
    lengths = summed(torch.nn.functional.one_hot(torch.tensor(rank()), count()) * len(rows)).tolist()
    padded = sent.new_zeros((max(lengths), *rows.shape[1:]))  # NCCL gathers tensors of one shape only
    padded[: len(sent)] = sent
    received = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(received, padded)
    return torch.cat([of[:length] for of, length in zip(received, lengths, strict=True)]).to(rows.device)


def of_first(value: _T) -> _T:
    """The first process' value, on all of them; anything that pickles."""
    if count() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def _carried(values: Tensor) -> Tensor:
    """On the device that the backend carries tensors of."""
    return values.cuda() if distributed.get_backend() == "nccl" else values.cpu()
