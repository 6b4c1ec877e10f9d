"""Work in threads: in order, few results at a time, and torch's number of threads stays."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from codebook_tools.runtime.threads import spread


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_results_come_in_order_whatever_takes_longest(threads: int) -> None:
    second = threading.Event()

    def work(part: int) -> int:
        if part == 0 and threads > 1:
            assert second.wait(10), "part 1 ends before part 0"
        if part == 1:
            second.set()
        return part * part

    assert list(spread(work, range(20))) == [n * n for n in range(20)]


def test_each_thread_computes_with_one() -> None:
    assert set(spread(lambda part: torch.get_num_threads(), range(8))) == {1}


def test_parts_are_taken_as_results_are(threads: int) -> None:
    taken = []
    results = spread(lambda part: part, (taken.append(n) or n for n in range(100)))
    assert next(results) == 0 and len(taken) <= 2 * threads
    results.close()
    assert len(taken) <= 2 * threads


def test_what_fails_in_a_thread_fails_here() -> None:
    with pytest.raises(ZeroDivisionError):
        list(spread(lambda part: 1 // (part - 5), range(10)))
