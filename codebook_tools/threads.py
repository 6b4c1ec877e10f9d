"""Work in threads: parts of a large array side by side, each on one core."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    running: deque[Future[_R]] = deque()
    try:
        for part in parts:
            running.append(pool.submit(work, part))
            if len(running) == 2 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what threads to come start with is one number for all of them
