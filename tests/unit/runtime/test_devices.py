"""Devices by name: which there are, and what is said of those that there are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from codebook_tools.errors import CodebookError
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import device_of

Found = Callable[..., list[torch.device]]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Found:
    """found(cuda=2): as many devices of a kind are there from here on, and of the others none. Gives the list of those
    that were made the current one."""
    made_current = list[torch.device]()

    def set_up(**there: int) -> list[torch.device]:
        for kind in ("cuda", "xpu", "mps"):
            module, count = getattr(torch, kind), there.get(kind, 0)
            monkeypatch.setattr(module, "is_available", lambda count=count: count > 0, raising=False)
            monkeypatch.setattr(module, "device_count", lambda count=count: count)
            monkeypatch.setattr(module, "set_device", made_current.append, raising=False)
        return made_current

    return set_up


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({}, "cpu"),
        ({"mps": 1}, "mps"),
        ({"mps": 1, "xpu": 1}, "xpu"),
        ({"mps": 1, "xpu": 2, "cuda": 1}, "cuda"),
    ],
)
def test_auto_takes_the_first_kind_that_is_there(there: dict[str, int], expected: str, found: Found) -> None:
    found(**there)
    assert device_of("auto") == torch.device(expected)
    assert device_of("cpu") == torch.device("cpu")


def test_a_device_with_a_number_becomes_the_current_one(found: Found) -> None:
    made_current = found(cuda=2)
    assert device_of("cuda:0") == torch.device("cuda", 0) and device_of("cuda") == torch.device("cuda")
    assert not made_current
    assert device_of("cuda:1") == torch.device("cuda", 1)
    assert made_current == [torch.device("cuda", 1)]


@pytest.mark.parametrize("name", ["cuda:2", "xpu", "mps", "cpu:1", "meta", "vulkan", "tpu", "cuda:", "nn", "1", ""])
def test_what_is_not_there_is_refused_in_one_line(name: str, found: Found) -> None:
    found(cuda=2)
    with pytest.raises(CodebookError, match=f"--device {name}: this torch finds no such device; use --device cpu or"):
        device_of(name)


def test_several_processes_share_no_device(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    found(cuda=2, xpu=1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    assert device_of("auto") == device_of("cuda") == torch.device("cuda", 1)
    assert device_of("cpu") == torch.device("cpu")
    for name in ("cuda:1", "xpu"):
        with pytest.raises(CodebookError, match=f"--device {name}: of several processes each takes a CUDA device"):
            device_of(name)
    found(xpu=1)
    assert device_of("auto") == torch.device("cpu")
