"""Memory does not grow with the data, where nothing trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Refit
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows import operate as operate_module
from codebook_tools.workflows.operate import operate
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import Opened, open_request


@pytest.mark.parametrize("steps", [0, 1])
def test_calibration_data_are_kept_only_where_they_are_read_again(
    steps: int, tiny: Path, images_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[Opened]()

    def opened(request: Request, watch: Watch) -> Opened:
        seen.append(open_request(request, watch))
        return seen[0]

    monkeypatch.setattr(operate_module, "open_request", opened)
    request = Request(model=tiny, data=(str(images_folder),), input_range=(-1.0, 1.0))
    operate("refit", request, Refit(k=4), FineTune(steps=steps), Watch())
    calibration, test = seen[0].calibration, seen[0].test
    assert len(calibration._cache.values) == (len(calibration) if steps else 0)
    assert len(test._cache.values) == len(test)


PROGRAM = """
import atexit, sys
import codebook_tools.evaluation.usage
codebook_tools.evaluation.usage.survey.__kwdefaults__["limit"] = 20_000
sys.argv = ["codebook", "refit", sys.argv[1], "--k", "4", "--iterations", "2", "--steps", "0", "--force", *sys.argv[2:]]
atexit.register(lambda: print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0], file=sys.stderr))
from codebook_cli.app import app
app()
"""


def peak(model: Path, option: str, array: NDArray[np.generic]) -> int:
    """The highest resident memory, in KiB, of a refit on a .npy of the array."""
    file = model.parent / "data.npy"
    np.save(file, array)
    command = [sys.executable, "-c", PROGRAM, str(model), option, str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stderr.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the highest resident memory")
def test_ten_times_the_data_take_hardly_more_memory(tiny: Path) -> None:
    data = np.random.default_rng(0).standard_normal((2_500_000, 4), dtype=np.float32)  # 250 MB of names
    few, many = (peak(tiny, "--latents", data[: len(data) // part]) for part in (10, 1))
    assert many - few < 150_000, (few, many)  # the allocator's holes
