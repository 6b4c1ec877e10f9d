"""Work in threads: parts of a large array side by side, each on one core."""

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
    """work(part) of each part, in order; as many at a time as torch has threads, which get one each.

    Small steps (a product, its minima) wait less for each other this way than if each were split over all threads, and
    what they compute does not depend on how many there are. Results wait for their turn: at most two a thread.
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
        torch.set_num_threads(threads)  # what threads to come start with is one number for all of them


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept: it takes longer to start threads than they have to do for a small batch."""
    return ThreadPoolExecutor(threads, initializer=_with_one_thread)


def _with_one_thread() -> None:
    torch.get_num_threads()  # the first question of a thread gives it as many as the others have
    torch.set_num_threads(1)
