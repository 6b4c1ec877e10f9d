"""The operation, whole: measure, operate on the codebook, install, measure, fine-tune, measure, write, read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.assignment import nearest
from codebook_tools.checkpoints.layout import index_map_path
from codebook_tools.checkpoints.reading import read_checkpoint
from codebook_tools.checkpoints.writing import write_checkpoint
from codebook_tools.codebook import REMOVED, Codebook, Strategy
from codebook_tools.errors import CodebookError, VerificationError
from codebook_tools.finetune import FineTuned, Recipe, TracePoint
from codebook_tools.latents import survey
from codebook_tools.measure import Measurement
from codebook_tools.models.companions import rows_of
from codebook_tools.models.model import Model
from codebook_tools.opening import Opened, Request, open_request
from codebook_tools.output import check_output, default_output, remarks
from codebook_tools.stages import (
    encoder_latents,
    measure_stage,
    on_cpu,
    run_stages,
    sample_counts,
    survey_calibration,
)
from codebook_tools.strategies.quantize import packed_bytes
from codebook_tools.version import VERSION
from codebook_tools.watch import Watch


@dataclass(frozen=True)
class Result:
    """What was done: the JSON of a command. before, surgery, finetuned: measured on the test data, None where there is
    no such stage. kept: the stage that the written file holds. outputs: paths. bytes: of weights, and what a codebook
    that was rounded to few bits would pack to. seconds: by phase."""

    command: str
    model: str
    family: str
    settings: Mapping[str, object]
    seed: int
    warnings: tuple[str, ...]
    before: Measurement | None
    surgery: Measurement | None = None
    finetuned: Measurement | None = None
    kept: str | None = None
    trace: tuple[TracePoint, ...] = ()
    outputs: Mapping[str, str | None] = field(default_factory=lambda: dict.fromkeys(("model", "index_map", "report")))
    bytes: Mapping[str, int | None] = field(default_factory=lambda: dict.fromkeys(("before", "after", "packed")))
    seconds: Mapping[str, float] = field(default_factory=dict)
    version: str = VERSION

    @property
    def stages(self) -> dict[str, Measurement | None]:
        return {"before": self.before, "surgery": self.surgery, "finetuned": self.finetuned}

    def to_json(self) -> dict[str, object]:
        """The promised keys, of types that json can write."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in self.stages}
        stages = {name: asdict(stage) if stage else None for name, stage in self.stages.items()}
        return {**plain, "warnings": list(self.warnings), "stages": stages, "trace": [asdict(p) for p in self.trace]}


def measure_model(request: Request, watch: Watch) -> Result:
    """Usage, perplexity, distortion and reconstruction error of a checkpoint on the test data."""
    opened = open_request(request, watch, measuring=True)
    with watch.phase("measure"):
        before = measure_stage(opened, encoder_latents(opened), watch)
    sizes = {"before": _bytes(request.source), "after": None, "packed": None}
    return _result("measure", request, opened, watch, before=before, bytes=sizes)


def operate(command: str, request: Request, strategy: Strategy | None, recipe: Recipe, watch: Watch) -> Result:
    """One surgery and its fine-tuning, measured at each stage, installed, written and read back.

    strategy: None fine-tunes the codebook as it is. A surgery's file holds the better of `surgery` and `finetuned` by
    validation error, a fine-tuning's the better of `before` and `finetuned`. Raises CodebookError, before any long
    work where that is possible, and leaves no file then.
    """
    _check_output(request, request.output or _default_output(request, command, 0))
    opened = open_request(request, watch)
    model = opened.model
    asked = _asked_size(strategy, model.found.size)
    if asked:
        _check_output(request, request.output or _default_output(request, command, asked))
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
    output = request.output or _default_output(request, command, surgery.codebook.size if surgery else old.size)
    _check_output(request, output)

    done = run_stages(opened, surgery, seen, recipe, seed=request.seed, watch=watch)
    opened.warnings += done.warnings
    if done.kept == "finetuned":
        seen = survey_calibration(opened, watch)
    new = on_cpu(model.codebook)
    counts, new_codes = sample_counts(seen, new)
    opened.settings |= settings_of(strategy) | settings_of(recipe)
    key = model.found.key
    opened.warnings += remarks(model, output)
    with watch.phase("write"):
        map_path = write_checkpoint(
            model.checkpoint,
            output,
            model.changed(counts),
            _provenance(command, request, opened, done.kept, done.tuned),
            {
                f"{key}/index_map": done.index_map,
                f"{key}/nearest": _nearest_map(done.index_map, old_codes, new_codes, old, new),
            },
            model.config,
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
            "before": _bytes(request.source),
            "after": _bytes(output),
            "packed": packed_bytes(new, bits) if bits else None,
        },
    )


def require_training_data(opened: Opened, recipe: Recipe) -> None:
    """Raise CodebookError where there is to be fine-tuning, and nothing for its gradients or its choice of state."""
    if recipe.steps and not (opened.splits.train and opened.splits.validation):
        count = len(opened.calibration)
        raise CodebookError(
            f"{count} calibration images leave the training or validation split empty; give more --data"
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
    opened = open_request(request, watch)
    model, old = opened.model, opened.model.found.size
    size = _asked_size(strategy, old)
    output = request.output or (_default_output(request, command, size) if size else None)
    if output is not None:
        _check_output(request, output)
    nbytes = _bytes(request.source)
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
        outputs={
            "model": str(output) if output else None,
            "index_map": str(index_map_path(output)) if output else None,
        },
        bytes={"before": nbytes, "after": model.file_bytes(size) if size else nbytes},
        seconds={"estimate": seconds},
    )


def _check_output(request: Request, output: Path) -> None:
    """Raise CodebookError where the output cannot be written, has no layout that is, or would replace the model."""
    check_output(read_checkpoint(request.source), output, request.force)


def _asked_size(strategy: Strategy | None, old: int) -> int | None:
    """Codes that there will be, where that is known before anything is counted."""
    asked: int | None = getattr(strategy, "k", None) or getattr(strategy, "keep", None)
    return asked if strategy else old


def _default_output(request: Request, command: str, size: int) -> Path:
    """Beside the model; the bundled demo's goes into the current folder."""
    folder = None if request.model else Path()
    return default_output(read_checkpoint(request.source), command, size, folder)


def _bytes(path: Path) -> int:
    """Size of a model's weights."""
    return read_checkpoint(path).path.stat().st_size


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


def settings_of(thing: Strategy | Recipe | None) -> dict[str, object]:
    """The printed fields of a dataclass."""
    if thing is None or not is_dataclass(thing):
        return {}
    return {entry.name: getattr(thing, entry.name) for entry in fields(thing) if entry.repr}


def _provenance(command: str, request: Request, opened: Opened, kept: str, tuned: FineTuned | None) -> dict[str, str]:
    """What the written file says of itself: no times and no paths, so that the same work gives the same bytes."""
    private = {"data", "test_data", "images", "device", "network"}
    settings = {key: value for key, value in opened.settings.items() if key not in private}
    trained = tuned if tuned and kept == "finetuned" else None
    return {
        "command": command,
        "version": VERSION,
        "settings": json.dumps({**settings, "seed": request.seed}, sort_keys=True),
        "codebook": opened.model.found.key,
        "kept": kept,
        "trained": ",".join(trained.groups) if trained else "",
        "trained_tensors": json.dumps(trained.trained if trained else []),
        "source_sha256": opened.model.checkpoint.sha256,
    }


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
