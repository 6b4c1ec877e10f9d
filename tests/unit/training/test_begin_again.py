"""A run that makes the model worse begins again from the start at a quarter of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Patch, Run
from runs import ROWS, BrokenError, breaking_at, tune, weights_of
from sources_of_images import Images, find_images

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.training import history, learning_rate
from codebook_tools.training.codebook_ema import ExtraCodes
from codebook_tools.training.finetune import FineTuned
from codebook_tools.training.history import has_risen
from codebook_tools.training.resume import SnapshotFile
from codebook_tools.training.state import TracePoint

COUNTS = [1] * 16
Tuned = Callable[..., tuple[Model, FineTuned]]


@pytest.fixture
def images(images_folder: Path) -> Images:
    return Images(find_images([images_folder])[:24], 3, 4)


@pytest.fixture
def risen_at(monkeypatch: Patch) -> Callable[[int], None]:
    """risen_at(6): every run is taken to be too fast after step 6."""

    def make(step: int) -> None:
        def risen(steps: int, trace: Sequence[TracePoint]) -> bool:
            return trace[-1].step == step

        monkeypatch.setattr(history, "has_risen", risen)

    return make


@pytest.mark.parametrize(
    ("steps", "errors", "expected"),
    [
        (1000, {0: 1.0, 100: 1.2, 200: 1.2}, False),  # of the warm-up
        (1000, {0: 1.0, 100: 1.2, 200: 1.2, 300: 1.11}, True),
        (1000, {0: 1.0, 100: 1.2, 200: 1.2, 300: 1.09}, False),
        (1000, {0: 1.0, 100: 1.4, 200: 1.3, 300: 1.21}, True),
        (1000, {0: 1.0, 100: 1.4, 200: 1.3, 300: 1.19}, False),  # half of the rise is gone
        (1000, {0: 1.0, 100: 0.5, 200: 1.2, 300: 1.04, 400: 2.0}, False),  # judged once
        (500, {0: 1.0, 100: 2.0}, False),
        (500, {0: 1.0, 100: 1.18, 150: 1.16}, True),
        (300, {0: 1.0, 120: 1.2, 150: 1.2}, True),
        (200, {0: 1.0, 120: 1.2, 140: 1.2, 160: 1.2}, False),  # too late
        (20, {0: 1.0, 6: 2.0}, False),
    ],
)
def test_a_run_is_judged_once_after_its_first_third(steps: int, errors: dict[int, float], expected: bool) -> None:
    trace = [TracePoint(step, None, error, 1, 1.0, 1.0, 0) for step, error in errors.items()]
    assert has_risen(steps, trace) == expected


@pytest.mark.parametrize(
    "recipe",
    [{}, {"optimizer": "adam", "weight_ema": 0.5}, {"codebook_update": "gradient"}, {"train": "decoder"}],
    ids=str,
)
def test_it_goes_as_a_shorter_run_at_a_quarter_of_the_rate(
    recipe: dict[str, Any], tuned: Tuned, risen_at: Callable[[int], None]
) -> None:
    """Of one image, which every batch is."""

    def run(steps: int, **more: Any) -> FineTuned:
        return tuned([0.0, 0.5, 1.0], [3, 1, 0], ROWS, steps=steps, augment="none", **recipe, **more)[1]

    whole_rate = run(2)
    risen_at(2)
    again = run(5)
    assert (again.begun, again.lr) == (2, whole_rate.lr / 4)
    assert again.trace[1].validation_mse == pytest.approx(run(5, lr=whole_rate.lr).trace[1].validation_mse, rel=1e-9)
    slow = run(3, lr=whole_rate.lr / 4)
    assert not slow.begun
    assert [point.validation_mse for point in again.trace[3:]] == [point.validation_mse for point in slow.trace[1:]]
    assert [point.perplexity for point in again.trace[3:]] == [point.perplexity for point in slow.trace[1:]]
    assert again.trace[3].validation_mse != again.trace[1].validation_mse


@pytest.mark.parametrize(
    "recipe",
    [{}, {"optimizer": "adam", "codebook_update": "gradient", "weight_ema": 0.9}],
    ids=str,
)
def test_a_run_broken_off_before_and_after_ends_in_the_bytes_of_another(
    recipe: dict[str, Any],
    tiny: Path,
    images: Images,
    tmp_path: Path,
    risen_at: Callable[[int], None],
    monkeypatch: Patch,
) -> None:
    risen_at(6)
    monkeypatch.setattr(learning_rate, "_LARGEST_RMS", 10.0)  # so that Muon's updates depend on how few steps are left
    saving = SnapshotFile(tmp_path / "x.training.safetensors", {}, resume=True)

    def run(saving: SnapshotFile | None = None, broken_at: int | None = None) -> dict[str, Any]:
        model = load_model(read_checkpoint(tiny))
        watch = breaking_at(broken_at) if broken_at else None
        tuned = tune(model, images, COUNTS, steps=20, batch_size=8, saving=saving, watch=watch, **recipe)
        assert tuned.begun == 6
        return {"trace": tuned.trace, "lr": tuned.lr} | {name: t.tolist() for name, t in weights_of(model).items()}

    whole = run()
    for step in (7, 11):  # from the snapshots of steps 6, which is not judged yet, and 10
        with pytest.raises(BrokenError):
            run(saving, step)
    assert run(saving) == whole


@pytest.mark.parametrize(
    "recipe", [{"lr": 0.01}, {"adversarial": True}, {"train": "none"}, {"more": {}}], ids=lambda recipe: str(*recipe)
)
def test_a_rate_that_was_asked_for_stays_as_do_others_that_are_not_to_blame(
    recipe: dict[str, Any], tiny: Path, images: Images, risen_at: Callable[[int], None]
) -> None:
    risen_at(2)
    model = load_model(read_checkpoint(tiny))
    if "more" in recipe:
        rows = torch.cat(list(model.latents(images, 8)))
        recipe = {"more": {0: ExtraCodes(rows[:20].clone(), torch.ones(20))}}
    assert tune(model, images, COUNTS, steps=6, **recipe).begun == 0


def test_a_warning_says_so(tiny: Path, images_folder: Path, codebook: Run, risen_at: Callable[[int], None]) -> None:
    risen_at(2)
    result = codebook("finetune", tiny, "--data", images_folder, "--steps", 4, "--input-range", "-1,1", "--json").json
    (warning,) = [warning for warning in result["warnings"] if "began again" in warning]
    assert warning.startswith("at step 2 ") and warning.endswith(f"lower learning rate {result['settings']['lr']:.2g}")
