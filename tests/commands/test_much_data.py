"""Much data: refit --exact goes over all latents, of which k-means otherwise sees a sample; and memory does not grow
where nothing trains."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome, Run, assert_refused
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.codebook import Codebook
from codebook_tools.data import sampling
from codebook_tools.data.latents import StoredLatents
from codebook_tools.data.sampling import drawn_rows
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.usage import survey
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies.refit import Refit
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows import measure_shards
from codebook_tools.workflows import operate as operate_module
from codebook_tools.workflows.operate import operate
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_request

LIMIT = 100


class Stream:
    """More latents than the sample holds, which never lie in one tensor; how often they were gone through."""

    def __init__(self, rows: Tensor, batch: int = 64) -> None:
        self.rows, self.batch, self.passes = rows, batch, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield from torch.split(self.rows, self.batch)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SAMPLE_LIMIT", LIMIT)


@pytest.fixture
def rows() -> Tensor:
    """900 rows about 6 places."""
    random = torch.Generator().manual_seed(0)
    places = 4 * torch.randn(6, 3, generator=random)
    return places.repeat(150, 1) + torch.randn(900, 3, generator=random)


def step(rows: NDArray[np.float64], centroids: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """The means of the rows nearest to each centroid, and the error before: by hand."""
    squares = ((rows[:, None] - centroids) ** 2).sum(2)
    nearest = squares.argmin(1)
    return np.stack([rows[nearest == k].mean(0) for k in range(len(centroids))]), float(squares.min(1).sum())


def centroids_of(latents: Stream | StoredLatents, iterations: int = 300, exact: bool = True) -> NDArray[np.float64]:
    found = Refit(6, iterations=iterations, exact=exact)(Codebook(torch.zeros(2, 3)), latents, torch.zeros(2))
    return found.codebook.vectors.double().numpy()


def test_exact_is_lloyd_over_all_rows_from_the_k_means_of_a_sample(rows: Tensor) -> None:
    sample = drawn_rows(Stream(rows), seed=0)
    assert sample.shape == (LIMIT, 3)
    start = centroids_of(StoredLatents(sample))
    by_hand, before, wide = start, np.inf, rows.double().numpy()
    for _ in range(300):
        moved, error = step(wide, by_hand)
        if before - error <= 1e-4 * error:
            break
        by_hand, before = moved, error
    exact_error = step(wide, centroids_of(Stream(rows)))[1]
    # Where exactly it stops is k-means' own: both are as good as a step more or less.
    assert exact_error == pytest.approx(step(wide, by_hand)[1], rel=2e-3) and exact_error < step(wide, start)[1]


def test_one_iteration_is_one_step_by_hand(rows: Tensor) -> None:
    start = centroids_of(StoredLatents(drawn_rows(Stream(rows), seed=0)), iterations=1)
    moved, _ = step(rows.double().numpy(), start)
    np.testing.assert_allclose(centroids_of(Stream(rows), iterations=1), moved, rtol=1e-5, atol=1e-6)


def test_batches_do_not_matter_and_not_exact_sees_what_it_is_given(rows: Tensor) -> None:
    np.testing.assert_allclose(centroids_of(Stream(rows, 7)), centroids_of(Stream(rows, 900)), rtol=1e-5, atol=1e-6)
    stream = Stream(rows)
    centroids_of(stream, exact=False)
    assert stream.passes == 1
    with pytest.raises(CodebookError, match="k=6 asks for more codes than the 2 distinct latents"):
        centroids_of(Stream(rows[:2].repeat(200, 1)))


def test_the_draw_is_uniform_in_any_order_and_its_own_for_each_seed(rows: Tensor) -> None:
    drawn = drawn_rows(Stream(rows, 50), seed=1)
    assert torch.equal(drawn, drawn_rows(Stream(rows, 900), seed=1))
    assert not torch.equal(drawn, drawn_rows(Stream(rows), seed=2))
    numbers = torch.arange(900.0)[:, None]
    places = torch.cat([drawn_rows(Stream(numbers), seed=seed)[:50] for seed in range(40)])
    assert abs(float(places.mean()) - 449.5) < 20  # 2000 draws: the mean's deviation is 5.8


# --- as a command
def test_images_without_a_cache_and_a_sample_in_a_file_are_refused_where_the_sample_is_not_all(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refit(*words: object) -> Outcome:
        return codebook("refit", tiny, "--k", 6, "--steps", 0, "--force", "--json", *words)

    data = ("--data", images_folder)
    monkeypatch.setattr(survey, "__kwdefaults__", {"limit": LIMIT})
    message = "--exact goes over 912 latents many times: keep them with --latents-cache DIR"
    assert_refused(refit("--exact", *data), message)
    done = refit("--exact", *data, "--latents-cache", tmp_path / "cache")
    assert done.exit_code == 0, done
    assert "index maps see a sample of 100 of 912 latents" in done.json["warnings"]
    monkeypatch.setattr(survey, "__kwdefaults__", {"limit": 912})
    assert refit("--exact", *data).exit_code == 0
    stats = ("--stats", tmp_path / "stats.safetensors")
    monkeypatch.setattr(measure_shards, "SAMPLE", 200)
    assert codebook("measure", tiny, *data, *stats).exit_code == 0
    assert_refused(refit("--exact", *stats), "--exact goes over all 912 latents, and --stats holds a sample of 200")
    assert refit(*stats).exit_code == 0


def test_latents_from_files_are_gone_through(codebook: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tiny.parent / "l.npy", torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)).numpy())
    monkeypatch.setattr(survey, "__kwdefaults__", {"limit": LIMIT})
    distortions = []
    for more in (("--exact",), ()):
        done = codebook("refit", tiny, "--k", 6, "--latents", tiny.parent / "l.npy", "--force", "--json", *more)
        assert done.exit_code == 0, done
        distortions.append(done.json["stages"]["surgery"]["codebooks"][0]["distortion"])
        assert ("k-means and index maps see a sample of 100 of 1,799 latents" in done.json["warnings"]) != bool(more)
    assert distortions[0] < distortions[1]


# --- memory
@pytest.mark.parametrize("steps", [0, 1])
def test_calibration_data_are_kept_only_where_they_are_read_again(
    steps: int, tiny: Path, images_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_request(Request(tiny, (str(images_folder),), input_range=(-1.0, 1.0)), Watch())
    monkeypatch.setattr(operate_module, "open_request", lambda *_: opened)
    operate("refit", opened.request, Refit(k=4), FineTune(steps=steps), Watch())
    assert len(opened.calibration._cache.values) == (len(opened.calibration) if steps else 0)
    assert len(opened.test._cache.values) == len(opened.test)


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
