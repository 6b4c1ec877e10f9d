"""refit --exact: Lloyd over all latents, where k-means otherwise sees a sample of them."""

from __future__ import annotations

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
from codebook_tools.strategies.refit import Refit
from codebook_tools.workflows import measure_shards

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
    stream = Stream(rows)
    sample = drawn_rows(stream, seed=0)
    assert sample.shape == (LIMIT, 3)
    start = centroids_of(StoredLatents(sample))
    by_hand, before = start, np.inf
    wide = rows.double().numpy()
    for _ in range(300):
        moved, error = step(wide, by_hand)
        if before - error <= 1e-4 * error:
            break
        by_hand, before = moved, error
    found = centroids_of(Stream(rows))
    # Where exactly it stops is k-means' own: both are as good as a step more or less.
    assert step(wide, found)[1] == pytest.approx(step(wide, by_hand)[1], rel=2e-3)
    assert step(wide, found)[1] < step(wide, start)[1]


def test_one_iteration_is_one_step_by_hand(rows: Tensor) -> None:
    start = centroids_of(StoredLatents(drawn_rows(Stream(rows), seed=0)), iterations=1)
    moved, _ = step(rows.double().numpy(), start)
    np.testing.assert_allclose(centroids_of(Stream(rows), iterations=1), moved, rtol=1e-5, atol=1e-6)


def test_batches_do_not_matter_and_not_exact_sees_what_it_is_given(rows: Tensor) -> None:
    np.testing.assert_allclose(centroids_of(Stream(rows, 7)), centroids_of(Stream(rows, 900)), rtol=1e-5, atol=1e-6)
    stream = Stream(rows)
    centroids_of(stream, exact=False)
    assert stream.passes == 1


def test_the_draw_is_uniform_in_any_order_and_its_own_for_each_seed(rows: Tensor) -> None:
    drawn = drawn_rows(Stream(rows, 50), seed=1)
    assert torch.equal(drawn, drawn_rows(Stream(rows, 900), seed=1))
    assert not torch.equal(drawn, drawn_rows(Stream(rows), seed=2))
    numbers = torch.arange(900.0)[:, None]
    places = torch.cat([drawn_rows(Stream(numbers), seed=seed)[:50] for seed in range(40)])
    assert abs(float(places.mean()) - 449.5) < 20  # 2000 draws: the mean's deviation is 5.8


# --- as a command
def refit(codebook: Run, model: Path, *arguments: object) -> Outcome:
    out = ("-o", model.parent / "out.safetensors", "--force", "--json")
    return codebook("refit", model, "--k", 6, "--steps", 0, "--exact", *out, *arguments)


def test_images_without_a_cache_are_refused_where_the_sample_is_not_all(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ("--data", images_folder)
    monkeypatch.setattr(survey, "__kwdefaults__", {"limit": LIMIT})
    refused = refit(codebook, tiny, *data)
    assert_refused(refused, "--exact goes over 912 latents many times: keep them with --latents-cache DIR")
    done = refit(codebook, tiny, *data, "--latents-cache", tmp_path / "cache")
    assert done.exit_code == 0, done
    assert "index maps see a sample of 100 of 912 latents" in done.json["warnings"]
    monkeypatch.setattr(survey, "__kwdefaults__", {"limit": 912})
    assert refit(codebook, tiny, *data).exit_code == 0


def test_latents_from_files_are_gone_through_as_they_lie(
    codebook: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    np.save(tmp_path / "l.npy", torch.randn(2000, 4, generator=random).numpy())
    monkeypatch.setattr(survey, "__kwdefaults__", {"limit": LIMIT})
    found = {}
    for name, more in {"exact": ("--exact",), "sample": ()}.items():
        out = tmp_path / f"{name}.safetensors"
        done = codebook("refit", tiny, "--k", 6, "--latents", tmp_path / "l.npy", "-o", out, "--json", *more)
        assert done.exit_code == 0, done
        found[name] = done.json["stages"]["surgery"]["codebooks"][0]["distortion"]
        assert ("k-means and index maps see a sample of 100 of 1,799 latents" in done.json["warnings"]) != bool(more)
    assert found["exact"] < found["sample"]


def test_a_sample_in_a_file_is_not_all(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = tmp_path / "stats.safetensors"
    monkeypatch.setattr(measure_shards, "SAMPLE", 200)
    assert codebook("measure", tiny, "--data", images_folder, "--stats", stats).exit_code == 0
    found = codebook("refit", tiny, "--k", 6, "--stats", stats, "--exact")
    assert_refused(found, "--exact goes over all 912 latents, and --stats holds a sample of 200")
    assert codebook("refit", tiny, "--k", 6, "--stats", stats).exit_code == 0


def test_too_few_latents_are_refused(rows: Tensor) -> None:
    with pytest.raises(CodebookError, match="k=6 asks for more codes than the 2 distinct latents"):
        centroids_of(Stream(rows[:2].repeat(200, 1)))
