"""Runs a function on parts of a large array in threads, each on one core."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

_P = TypeVar("_P")
_R = TypeVar("_R")


def spread(work: Callable[[_P], _R], parts: Iterable[_P]) -> Iterator[_R]:
    """Apply a function to parts, as many at a time as torch has threads.

    Each thread computes with one torch thread. Small steps (a product, its minima) wait less for each other this way
    than if each were split over all threads, and results do not depend on the number of threads.

    Args:
        work: Called in a thread.
        parts: Its arguments, taken at most two a thread ahead of the results.

    Yields:
        work(part), in the order of the parts. An exception of `work` is raised here.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(work, parts)
        return
    running: deque[Future[_R]] = deque()
    try:
        for part in parts:
            running.append(_pool(threads).submit(work, part))
            if len(running) == 2 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()
        torch.set_num_threads(threads)  # the worker threads set the default that new threads start with


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Cached: starting threads takes longer than their work on a small batch."""
    return ThreadPoolExecutor(threads, initializer=_with_one_thread)


def _with_one_thread() -> None:
    torch.get_num_threads()  # the first call in a thread overwrites its number by the default
    torch.set_num_threads(1)
