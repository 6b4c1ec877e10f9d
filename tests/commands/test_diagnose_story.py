"""Why did 128 centroids end as 13? Each fault of that story is seeded on a healthy surgery, and is named first."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from collapsing import nearest
from conftest import State
from safetensors.torch import load_file, save_file
from surgeries import do
from torch import Tensor, nn

from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.seeding import seeds
from codebook_tools.models.demo import DEMO
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Refit
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.diagnose import Diagnosis, diagnose
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import Opened, open_request

K = 64
COUNTS, SUMS = "_vq_vae._ema_cluster_size", "_vq_vae._ema_w"
ENCODER, FIRST_OF_DECODER = ("_encoder.", "_pre_vq_conv."), "_decoder._conv_1.weight"


@dataclass(frozen=True)
class Surgery:
    """A Re-Fit of the demo, with the running sums of a model trained by moving averages. state: its tensors."""

    original: Path
    opened: Opened
    state: State
    folder: Path

    def latents(self, model: Model | None = None, bounds: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
        """(n, dim, height, width) of all calibration data."""
        network = model or self.opened.model
        network.input_range = bounds
        with torch.no_grad():
            parts = [network.encode(pixels, keep=False) for _, pixels in self.opened.calibration.batches(64)]
        network.input_range = (-1.0, 1.0)
        return torch.cat(parts)

    def diagnosed(self, changes: State, against: bool = False, **more: Any) -> Diagnosis:
        """What is said of it once tensors were changed."""
        path = self.folder / "faulty.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in (self.state | changes).items()}, path)
        request = replace(self.opened.request, model=path)
        return diagnose(request, Watch(), self.original if against else None, **more)


@pytest.fixture(scope="module")
def surgery(tmp_path_factory: pytest.TempPathFactory) -> Surgery:
    folder = tmp_path_factory.mktemp("story")
    state = load_file(DEMO)
    counts = torch.rand(512, generator=torch.Generator().manual_seed(0)) * 9 + 1
    averages = {COUNTS: counts, SUMS: state[CODEBOOK] * counts[:, None]}
    save_file(state | averages, folder / "original.safetensors")
    request = Request(folder / "original.safetensors", limit=150, output=folder / "refit.safetensors")
    do(request, Refit(k=K))
    request = replace(request, output=None)
    return Surgery(request.source, open_request(request, Watch()), load_file(folder / "refit.safetensors"), folder)


def rows(latents: Tensor) -> Tensor:
    """(n, dim), shuffled."""
    vectors = latents.movedim(1, -1).flatten(0, -2)
    return vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))]


def centroids(latents: Tensor) -> Tensor:
    return kmeans(rows(latents), K, watch=Watch()).centroids


def swallowed(of: Surgery) -> State:
    """The codebook went into **kwargs: the model made its own, at U(-1/K, 1/K)."""
    return {CODEBOOK: torch.rand(K, 64, generator=torch.Generator().manual_seed(1)).mul_(2).sub_(1) / K}


def flattened(of: Surgery) -> State:
    """NCHW to rows without a permute."""
    return {CODEBOOK: centroids(of.latents().reshape(-1, 64)[:, :, None])}


def reinitialised(of: Surgery) -> State:
    fresh = of.opened.model.with_fresh_network(3).network.state_dict()
    return {key: tensor for key, tensor in fresh.items() if key.startswith(ENCODER)}


FAULTS: dict[str, tuple[str, Callable[[Surgery], State]]] = {
    "codebook argument swallowed": ("not-installed", swallowed),
    "swallowed beside the right sums": ("not-installed", lambda of: swallowed(of) | {COUNTS: of.state[COUNTS]}),
    "NCHW flattened without a permute": ("wrong-layout", flattened),
    "images in [0, 1]": ("wrong-input-range", lambda of: {CODEBOOK: centroids(of.latents(bounds=(0.0, 1.0)))}),
    "images in [-0.5, 0.5]": ("wrong-input-range", lambda of: {CODEBOOK: centroids(of.latents(bounds=(-0.5, 0.5)))}),
    "encoder re-initialised": ("wrong-encoder", reinitialised),
    "latents of a random encoder": (
        "wrong-encoder", lambda of: {CODEBOOK: centroids(of.latents(of.opened.model.with_fresh_network(4)))},
    ),
    "sums of the old codes": ("stale-ema", lambda of: {SUMS: load_file(of.original)[SUMS][:K]}),
    "sums never filled": ("stale-ema", lambda of: {SUMS: torch.zeros(K, 64)}),
    "counts never filled": ("stale-ema", lambda of: {COUNTS: torch.zeros(K)}),
    "codes shrunk to a half": ("scale-mismatch", lambda of: {CODEBOOK: of.state[CODEBOOK] / 2}),
    "codes shrunk to a hundredth": ("scale-mismatch", lambda of: {CODEBOOK: of.state[CODEBOOK] / 100}),
    "seeds without Lloyd": ("no-lloyd", lambda of: {CODEBOOK: seeds(rows(of.latents()), K, "kmeans++", 0)}),
    "AFK-MC² without Lloyd": ("no-lloyd", lambda of: {CODEBOOK: seeds(rows(of.latents()), K, "afkmc2", 0)}),
}  # fmt: skip


def changed(of: Surgery, name: str) -> State:
    changes = FAULTS[name][1](of)
    if CODEBOOK in changes and COUNTS not in changes:
        changes |= {SUMS: changes[CODEBOOK] * of.state[COUNTS][:, None]}
    return changes


def first(found: Diagnosis) -> str | None:
    return found.failed[0].name if found.failed else None


BESIDE = ("codebook argument swallowed", "encoder re-initialised", "sums of the old codes", "seeds without Lloyd")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "against"), [*((name, False) for name in FAULTS), *((name, True) for name in BESIDE)])
def test_the_right_cause_is_named_first(name: str, against: bool, surgery: Surgery) -> None:
    found = surgery.diagnosed(changed(surgery, name), against)
    assert first(found) == FAULTS[name][0] and not found.healthy, found.checks


@pytest.mark.slow
@pytest.mark.parametrize("against", [False, True], ids=["alone", "beside the original"])
def test_the_surgery_itself_is_healthy(against: bool, surgery: Surgery) -> None:
    found = surgery.diagnosed({}, against)
    assert found.healthy and not any(check.verdict == "suspicious" for check in found.checks), found.checks


def test_what_was_swallowed_is_found_with_its_numbers(surgery: Surgery) -> None:
    found = surgery.diagnosed(changed(surgery, "codebook argument swallowed"))
    (cause, *_) = found.failed
    assert cause.name == "not-installed" and cause.value is not None and cause.value > 5 and cause.limit == 1
    assert "drawn at random" in cause.evidence and "codebook refit" in cause.fix


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale"),
    [("codebook argument swallowed", 100.0), ("seeds without Lloyd", 0.01), ("images in [0, 1]", 100.0)],
)
def test_causes_do_not_hang_on_the_scale_of_the_latents(name: str, scale: float, surgery: Surgery) -> None:
    """The encoder's last layer gives out more, the decoder's first takes as much less."""
    changes = changed(surgery, name)
    weights = {**surgery.state, **changes}
    scaled = {key: weights[key] * scale for key in ("_pre_vq_conv.weight", "_pre_vq_conv.bias", CODEBOOK, SUMS)}
    found = surgery.diagnosed(scaled | {FIRST_OF_DECODER: weights[FIRST_OF_DECODER] / scale})
    assert first(found) == FAULTS[name][0], found.checks


@pytest.mark.slow
def test_sums_that_keep_the_old_size_are_told_by_the_original(surgery: Surgery) -> None:
    old = load_file(surgery.original)
    found = surgery.diagnosed({COUNTS: old[COUNTS], SUMS: old[SUMS]}, against=True)
    assert first(found) == "stale-ema", found.checks


@pytest.mark.slow
def test_data_of_three_modes_are_no_fault_of_the_codes(surgery: Surgery, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 256, (3, 1, 1, 3)) + np.zeros((3, 32, 32, 3))
    images = kinds[np.arange(240) % 3] + rng.normal(0, 4, (240, 32, 32, 3))
    np.save(tmp_path / "three.npy", images.clip(0, 255).astype(np.uint8))
    request = Request(surgery.original, (str(tmp_path / "three.npy"),), output=tmp_path / "refit.safetensors")
    do(request, Refit(k=K))
    for model in (request.output, surgery.folder / "refit.safetensors"):
        found = diagnose(replace(request, model=model), Watch())
        assert first(found) == "few-modes", found.checks
        assert "prune" in found.failed[0].fix


# --- steps that are too long
@pytest.mark.slow
def test_a_learning_rate_of_ten_times_is_seen_in_the_trace(surgery: Surgery, tmp_path: Path) -> None:
    for rate, expected in ((1e-2, "learning-rate"), (1e-3, None)):
        request = replace(surgery.opened.request, output=tmp_path / f"{rate}.safetensors")
        recipe = FineTune(steps=75, lr=rate, batch_size=16, codebook_update="gradient")
        done = do(request, Refit(k=K), recipe)
        (tmp_path / "trace.json").write_text(json.dumps(done.to_json(), default=str))
        found = diagnose(replace(request, model=request.output), Watch(), trace=tmp_path / "trace.json")
        assert first(found) == expected, found.checks


@pytest.mark.slow
def test_the_story_itself(surgery: Surgery) -> None:
    """The centroids were swallowed, and the model was trained on: a few codes moved, the others are where they were."""
    network, codes = trained(surgery, swallowed(surgery)[CODEBOOK], 1e-3, 100)
    changes = {**network, CODEBOOK: codes, SUMS: codes * surgery.state[COUNTS][:, None]}
    for against in (True, False):
        found = surgery.diagnosed(changes, against)
        assert first(found) == "not-installed", found.checks
        assert not against or "as an initialization draws them" in found.failed[0].evidence


def trained(of: Surgery, start: Tensor, rate: float, steps: int) -> tuple[State, Tensor]:
    """The network's tensors and the codes after so many steps of the tutorial's own loss. start: the codes before."""
    model = open_request(replace(of.opened.request, model=of.folder / "refit.safetensors"), Watch()).model
    network: nn.Module = model.network.requires_grad_(True).train()
    codes = nn.Parameter(start.clone())
    optimiser = torch.optim.Adam([*network.parameters(), codes], lr=rate)
    _, images = of.opened.calibration.load(of.opened.calibration.items)
    images, draws = images * 2 - 1, torch.Generator().manual_seed(0)
    for _ in range(steps):
        pixels = images[torch.randint(len(images), (16,), generator=draws)]
        latents = model.network.encode(pixels)
        quantised, _ = nearest(latents, codes)
        media = model.network.decode(latents + (quantised - latents).detach())
        loss = (media - pixels).square().mean() / images.var() + (quantised - latents.detach()).square().mean()
        loss = loss + 0.25 * (latents - quantised.detach()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    state = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}
    return {key: tensor for key, tensor in state.items() if key != CODEBOOK}, codes.detach().clone()
