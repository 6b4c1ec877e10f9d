"""One surgery on a running model, in memory: measure, install, measure, fine-tune, measure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codebook_tools.assignment import nearest
from codebook_tools.codebook import REMOVED, Codebook, Surgery
from codebook_tools.coverage import reference_distance, reference_latents
from codebook_tools.errors import CodebookError
from codebook_tools.finetune import FineTuned, Recipe, finetune
from codebook_tools.latents import Survey, survey
from codebook_tools.measure import Measurement, measure
from codebook_tools.opening import Opened
from codebook_tools.watch import Watch


@dataclass(frozen=True, eq=False)
class Stages:
    """before, surgery, finetuned: measured on the test data, None where there is no such stage.

    kept: the stage that the model is left in. index_map: as Surgery's, without the codes that fine-tuning revived.
    """

    before: Measurement
    surgery: Measurement | None
    finetuned: Measurement | None
    kept: str
    index_map: Tensor
    tuned: FineTuned | None
    warnings: tuple[str, ...] = ()


def require_training_data(opened: Opened, recipe: Recipe) -> None:
    """Raise CodebookError where there is to be fine-tuning, and nothing for its gradients or its choice of state."""
    if recipe.steps and not (opened.splits.train and opened.splits.validation):
        count = len(opened.calibration)
        raise CodebookError(
            f"{count} calibration images leave the training or validation split empty; give more --data"
        )


def survey_calibration(opened: Opened, watch: Watch) -> Survey:
    """Encode, count and sample the calibration data with the model as it is."""
    request, model = opened.request, opened.model
    with watch.phase("encode"):
        return survey(
            model.latents(opened.calibration, request.batch_size), model.codebook, seed=request.seed, watch=watch
        )


def sample_counts(seen: Survey, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """(size,) float64 counts, scaled from the sample to all latents, and the sample's codes."""
    codes = nearest(seen.sample.vectors, codebook)
    return torch.bincount(codes, minlength=codebook.size).double() * (seen.total / len(seen.sample)), codes


def on_cpu(codebook: Codebook) -> Codebook:
    return replace(codebook, vectors=codebook.vectors.cpu())


def encoder_latents(opened: Opened) -> Tensor | None:
    """The calibration latents that the codes of the model as it is are held against."""
    request = opened.request
    return reference_latents(opened.model, opened.calibration, seed=request.seed, batch=request.batch_size)


def measure_stage(opened: Opened, latents: Tensor | None, watch: Watch) -> Measurement:
    """Measure the model as it is on the test data. latents: of its encoder, as `encoder_latents` gives them."""
    request, model = opened.request, opened.model
    reference = reference_distance(latents, model.codebook, seed=request.seed)
    return measure(model, opened.test, batch=request.batch_size, reference=reference, watch=watch)


def run_stages(
    opened: Opened,
    surgery: Surgery | None,
    seen: Survey,
    recipe: Recipe,
    *,
    seed: int,
    before: Measurement | None = None,
    watch: Watch,
) -> Stages:
    """Install a surgery in `opened.model` and fine-tune it; the model is left in the better state by validation error.

    surgery: None fine-tunes the codebook as it is. seen: the calibration data, as the model's encoder sees it. seed: of
    the fine-tuning. before: the first measurement, where it is known already.
    """
    model = opened.model
    with watch.phase("measure"):
        latents = encoder_latents(opened)
        before = before or measure_stage(opened, latents, watch)
    kept, after, finetuned, tuned = "before", None, None, None
    index_map = surgery.index_map if surgery else torch.arange(model.codebook.size)
    if surgery:
        model.install(surgery.codebook)
        with watch.phase("measure"):
            kept, after = "surgery", measure_stage(opened, latents, watch)
    warnings = []
    if recipe.steps:
        counts, _ = sample_counts(seen, on_cpu(model.codebook))
        tuned = _finetune(opened, recipe, counts, seed, watch)
        if tuned.diverged:
            warnings.append(f"fine-tuning diverged at step {tuned.diverged}; an earlier state was taken")
        with watch.phase("measure"):
            finetuned = measure_stage(opened, encoder_latents(opened), watch)
        if tuned.best.validation_mse < tuned.start.validation_mse:
            kept = "finetuned"
            gone = torch.isin(index_map, tuned.best.revived.nonzero()[:, 0])
            index_map = index_map.masked_fill(gone, REMOVED)
        else:
            tuned.start.restore(model)
            model.round_to_stored()
            stage = {"before": "the original", "surgery": "the state after surgery"}[kept]
            warnings.append(f"fine-tuning did not lower the validation error below that of {stage}: {stage} is kept")
    return Stages(before, after, finetuned, kept, index_map, tuned, tuple(warnings))


def _finetune(opened: Opened, recipe: Recipe, counts: Tensor, seed: int, watch: Watch) -> FineTuned:
    train, validation = (opened.calibration.subset(part) for part in (opened.splits.train, opened.splits.validation))
    with watch.phase("finetune"):
        tuned = finetune(opened.model, train, validation, recipe, counts, seed=seed, watch=watch)
    opened.model.round_to_stored()
    return tuned
