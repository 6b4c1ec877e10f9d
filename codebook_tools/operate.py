"""The operation, whole: measure, operate on the codebook, install, measure, fine-tune, measure, write, read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.assignment import nearest
from codebook_tools.checkpoints.layout import index_map_path
from codebook_tools.checkpoints.reading import read_checkpoint
from codebook_tools.checkpoints.writing import write_checkpoint
from codebook_tools.codebook import REMOVED, Codebook, Strategy
from codebook_tools.detached import goes_without_images, operate_detached
from codebook_tools.errors import CodebookError, VerificationError
from codebook_tools.finetune import Recipe
from codebook_tools.latents import survey
from codebook_tools.models.companions import bytes_with, rows_of
from codebook_tools.models.load import CUSTOM, choose_codebook, family_of
from codebook_tools.models.model import Model
from codebook_tools.opening import Opened, Request, open_request
from codebook_tools.outcome import (
    Result,
    asked_size,
    check_request_output,
    provenance,
    request_output,
    settings_of,
    weights_bytes,
)
from codebook_tools.output import remarks, written_config
from codebook_tools.stages import (
    encoder_latents,
    measure_stage,
    on_cpu,
    require_training_data,
    run_stages,
    sample_counts,
    survey_calibration,
)
from codebook_tools.stats import Stats, write_stats
from codebook_tools.strategies.quantize import packed_bytes
from codebook_tools.version import VERSION
from codebook_tools.watch import Watch


def measure_model(request: Request, watch: Watch, stats: Path | None = None) -> Result:
    """Usage, perplexity, distortion and reconstruction error of a checkpoint on the test data.

    stats: where to write the counts of the calibration data, or of the test data where there are no others.
    """
    if stats is not None and stats.exists() and not request.force:
        raise CodebookError(f"{stats} exists; --force replaces it, another --stats writes elsewhere")
    opened = open_request(request, watch, measuring=True)
    with watch.phase("measure"):
        before = measure_stage(opened, encoder_latents(opened), watch)
    if stats is not None:
        _write_stats(stats, opened, watch)
        opened.settings["stats"] = str(stats)
    sizes = {"before": weights_bytes(request.source), "after": None}
    return _result("measure", request, opened, watch, before=before, bytes=sizes)


def _write_stats(path: Path, opened: Opened, watch: Watch) -> None:
    split = "calibration" if len(opened.calibration) else "test"
    images = opened.calibration if len(opened.calibration) else opened.test
    seen = survey_calibration(replace(opened, calibration=images), watch)
    with watch.phase("write"):
        read = len(images) - len({item.name for item in images.items} & images.bad.keys())
        stats = Stats(seen.counts, seen.error, split, read)
        write_stats(path, opened.model.checkpoint, opened.model.found.key, stats)


def operate(command: str, request: Request, strategy: Strategy | None, recipe: Recipe, watch: Watch) -> Result:
    """One surgery and its fine-tuning, measured at each stage, installed, written and read back.

    strategy: None fine-tunes the codebook as it is. A surgery's file holds the better of `surgery` and `finetuned` by
    validation error, a fine-tuning's the better of `before` and `finetuned`. Raises CodebookError, before any long
    work where that is possible, and leaves no file then.
    """
    check_request_output(request, request_output(request, command, 0))
    if strategy and goes_without_images(request, strategy):
        if recipe.steps:
            raise CodebookError(f"{recipe.steps} steps of fine-tuning need images; give --data, or --steps 0")
        return operate_detached(command, request, strategy, watch)
    opened = open_request(request, watch)
    model = opened.model
    asked = asked_size(strategy, model.found.size)
    if asked:
        check_request_output(request, request_output(request, command, asked))
    require_training_data(opened, recipe)
    seen = survey_calibration(opened, watch)
    if seen.sampled:
        opened.warnings.append(f"k-means and index maps see a sample of {len(seen.sample):,} of {seen.total:,} latents")
    old = on_cpu(model.codebook)
    old_codes = nearest(seen.sample.vectors, old)
    surgery = None
    if strategy:
        with watch.phase("strategy"):
            surgery = strategy(old, seen.sample, seen.counts)
    output = request_output(request, command, surgery.codebook.size if surgery else old.size)
    check_request_output(request, output)

    done = run_stages(opened, surgery, seen, recipe, seed=request.seed, watch=watch)
    opened.warnings += done.warnings
    if done.kept == "finetuned":
        seen = survey_calibration(opened, watch)
    new = on_cpu(model.codebook)
    counts, new_codes = sample_counts(seen, new)
    opened.settings |= settings_of(strategy) | settings_of(recipe)
    key = model.found.key
    opened.warnings += remarks(model.checkpoint, old.size, new.size, output)
    with watch.phase("write"):
        map_path = write_checkpoint(
            model.checkpoint,
            output,
            model.changed(counts),
            provenance(command, request, model.checkpoint, key, opened.settings, done.kept, done.tuned),
            {
                f"{key}/index_map": done.index_map,
                f"{key}/nearest": _nearest_map(done.index_map, old_codes, new_codes, old, new),
            },
            written_config(model.checkpoint, new.size),
        )
        _read_back(output, model)
    bits = surgery.bits if surgery and done.kept == "surgery" else None
    return _result(
        command,
        request,
        opened,
        watch,
        before=done.before,
        surgery=done.surgery,
        finetuned=done.finetuned,
        kept=done.kept,
        trace=done.tuned.trace if done.tuned else (),
        outputs={"model": str(output), "index_map": str(map_path), "report": None},
        bytes={
            "before": weights_bytes(request.source),
            "after": weights_bytes(output),
            **({"packed": packed_bytes(new, bits)} if bits else {}),
        },
    )


@dataclass(frozen=True)
class Plan:
    """What `operate` would do and write. size: codes before and after, None where only counting decides; bytes is then
    the most it can be. seconds: an estimate."""

    command: str
    model: str
    family: str
    settings: Mapping[str, object]
    seed: int
    warnings: tuple[str, ...]
    size: Mapping[str, int | None]
    outputs: Mapping[str, str | None]
    bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    version: str = VERSION
    dry_run: bool = True

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def plan(command: str, request: Request, strategy: Strategy | None, recipe: Recipe, watch: Watch) -> Plan:
    """Look at what `operate` would look at first, time one batch, and write nothing."""
    if strategy and goes_without_images(request, strategy):
        return _plan_detached(command, request, strategy)
    opened = open_request(request, watch)
    model, old = opened.model, opened.model.found.size
    size = asked_size(strategy, old)
    output = request_output(request, command, size or 0) if size or request.output else None
    if output is not None:
        check_request_output(request, output)
    nbytes = weights_bytes(request.source)
    few = opened.calibration.items[: request.batch_size]
    timed = Watch()
    with timed.phase("encode"):
        latents = model.latents(opened.calibration.subset(few), request.batch_size)
        survey(latents, model.codebook, seed=request.seed, watch=Watch())
    # A pass of the decoder costs about one of the encoder, a training step three of both.
    splits = opened.splits
    passes = 2 * len(splits.calibration) + 6 * len(splits.test) + (30 * len(splits.validation) if recipe.steps else 0)
    seconds = timed.seconds["encode"] / len(few) * (passes + 6 * recipe.steps * request.batch_size)
    opened.settings |= settings_of(strategy) | settings_of(recipe)
    return Plan(
        command=command,
        model=str(request.source),
        family=model.family,
        settings=opened.settings,
        seed=request.seed,
        warnings=tuple(opened.warnings),
        size={"before": old, "after": size},
        outputs=_planned(output),
        bytes={"before": nbytes, "after": bytes_with(model.checkpoint, model.found, size or old)},
        seconds={"estimate": seconds},
    )


def _plan_detached(command: str, request: Request, strategy: Strategy) -> Plan:
    checkpoint = read_checkpoint(request.source)
    found = choose_codebook(checkpoint, request.codebook_key)
    size = asked_size(strategy, found.size)
    output = request_output(request, command, size or 0) if size or request.output else None
    if output is not None:
        check_request_output(request, output)
    nbytes = weights_bytes(request.source)
    return Plan(
        command=command,
        model=str(request.source),
        family=request.family or family_of(checkpoint) or CUSTOM,
        settings={"stats": str(request.stats) if request.stats else None, "images": {}} | settings_of(strategy),
        seed=request.seed,
        warnings=(),
        size={"before": found.size, "after": size},
        outputs=_planned(output),
        bytes={"before": nbytes, "after": bytes_with(checkpoint, found, size or found.size)},
        seconds={"estimate": 1.0},
    )


def _planned(output: Path | None) -> dict[str, str | None]:
    return {
        "model": str(output) if output else None,
        "index_map": str(index_map_path(output)) if output else None,
    }


def _nearest_map(index_map: Tensor, old_codes: Tensor, new_codes: Tensor, old: Codebook, new: Codebook) -> Tensor:
    """(old size,) int64: where a code kept its identity, the new code; else the one that most of its latents go to,
    the lowest among equals, and the nearest one where it had no latents.

    old_codes, new_codes: of the same latents, before and after.
    """
    pairs, hits = torch.unique(old_codes * new.size + new_codes, return_counts=True)
    by_distance = nearest(old.vectors, new)
    most = torch.zeros(old.size, dtype=torch.int64)
    for pair, count in zip(pairs.tolist(), hits.tolist(), strict=True):
        code, target = divmod(pair, new.size)
        if count > most[code]:
            most[code], by_distance[code] = count, target
    return torch.where(index_map == REMOVED, by_distance, index_map)


def _read_back(path: Path, model: Model) -> None:
    """The codebook on disk is the one in the running model, bit by bit."""
    written = rows_of(read_checkpoint(path).tensor(model.found.key), model.found)
    if not torch.equal(written, model.codebook.vectors.cpu()):
        raise VerificationError(f"{path}: {model.found.key} on disk is not the codebook of the running model")


def _result(command: str, request: Request, opened: Opened, watch: Watch, **found: object) -> Result:
    bad = opened.calibration.bad | opened.test.bad
    if bad:
        first = "; ".join(f"{name} ({bad[name]})" for name in sorted(bad)[:3])
        opened.warnings.append(f"{len(bad)} unreadable images were skipped: {first}")
    return Result(
        command=command,
        model=str(request.source),
        family=opened.model.family,
        settings=opened.settings,
        seed=request.seed,
        warnings=tuple(opened.warnings),
        seconds=watch.seconds,
        **found,  # type: ignore[arg-type]
    )
