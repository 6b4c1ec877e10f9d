"""Devices by name: which there are, and what is said of those that there are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from codebook_tools.errors import CodebookError
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import device_of

Devices = Callable[..., list[torch.device]]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    """devices(cuda=2): that many of each type from here on. Returns the list of those made the current one."""
    made_current = list[torch.device]()

    def set_up(**numbers: int) -> list[torch.device]:
        for kind in ("cuda", "xpu", "mps"):
            module, number = getattr(torch, kind), numbers.get(kind, 0)
            monkeypatch.setattr(module, "is_available", lambda number=number: number > 0, raising=False)
            monkeypatch.setattr(module, "device_count", lambda number=number: number)
            monkeypatch.setattr(module, "set_device", made_current.append, raising=False)
        return made_current

    return set_up


def test_auto_takes_the_first_type_there_is(devices: Devices) -> None:
    there: dict[str, int] = {}
    for expected, number in {"cpu": 0, "mps": 1, "xpu": 2, "cuda": 1}.items():
        devices(**(there := there | {expected: number}))
        assert (device_of("auto"), device_of("cpu")) == (torch.device(expected), torch.device("cpu"))


def test_a_device_with_a_number_becomes_the_current_one(devices: Devices) -> None:
    made_current = devices(cuda=2)
    assert device_of("cuda:0") == torch.device("cuda", 0) and device_of("cuda") == torch.device("cuda")
    assert not made_current
    assert device_of("cuda:1") == torch.device("cuda", 1)
    assert made_current == [torch.device("cuda", 1)]


@pytest.mark.parametrize("name", ["cuda:2", "mps", "cpu:1", "meta", "vulkan", "tpu", "cuda:", "1", ""])
def test_a_device_that_is_missing_is_refused_in_one_line(name: str, devices: Devices) -> None:
    devices(cuda=2)
    with pytest.raises(CodebookError, match=f"--device {name}: this torch finds no such device; use --device cpu or"):
        device_of(name)


def test_several_processes_share_no_device(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    devices(cuda=2, xpu=1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    assert device_of("auto") == device_of("cuda") == torch.device("cuda", 1)
    assert device_of("cpu") == torch.device("cpu")
    for name in ("cuda:1", "xpu"):
        with pytest.raises(CodebookError, match=f"--device {name}: of several processes each takes a CUDA device"):
            device_of(name)
    devices(xpu=1)
    assert device_of("auto") == torch.device("cpu")
