"""Work in threads: in order, few results at a time, and torch's number of threads as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from codebook_tools.runtime.threads import spread


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_whatever_takes_longest(threads: int) -> None:
    first = threading.Event()

    def work(part: int) -> int:
        if part == 0 and threads > 1:
            assert first.wait(10)  # set by a later part: so that one is done before
        if part == 1:
            first.set()
        return part * part

    assert list(spread(work, range(20))) == [n * n for n in range(20)]
    assert torch.get_num_threads() == threads


def test_each_thread_computes_with_one(threads: int) -> None:
    assert set(spread(lambda part: torch.get_num_threads(), range(8))) == {1}


def test_parts_are_taken_as_results_are(threads: int) -> None:
    taken = []
    results = spread(lambda part: part, (taken.append(n) or n for n in range(100)))
    assert next(results) == 0
    assert len(taken) <= 2 * threads
    results.close()
    assert len(taken) <= 2 * threads and torch.get_num_threads() == threads


def test_what_fails_in_a_thread_fails_here(threads: int) -> None:
    def work(part: int) -> int:
        if part == 5:
            raise ValueError("five")
        return part

    with pytest.raises(ValueError, match="five"):
        list(spread(work, range(10)))
    assert torch.get_num_threads() == threads
