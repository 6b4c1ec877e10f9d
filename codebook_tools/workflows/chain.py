"""Surgeries in a row, written as one surgery on the first model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from torch import Tensor

from codebook_tools.checkpoints.atomic import partial_folder
from codebook_tools.checkpoints.layout import CARD, PREFIX, index_map_path, is_directory_output, own_card_path
from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.write import write_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.output import written_config
from codebook_tools.models.proof import Proof
from codebook_tools.models.verification import listed, same_bytes
from codebook_tools.remapping.index_map import IndexMap, read_index_maps
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.recipe_file import Step
from codebook_tools.workflows.dry_run import Plan, plan
from codebook_tools.workflows.gallery import GalleryImage, gallery_of_files
from codebook_tools.workflows.operate import operate_in_memory
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import (
    Result,
    ResultHeader,
    check_published,
    check_request_output,
    provenance,
    published,
)


@dataclass(frozen=True, kw_only=True)
class Chain(ResultHeader):
    """The result of `run`. `settings` are those on which all steps agree.

    Attributes:
        steps: The result of each, on what the one before it left.
        outputs: Paths of the model, its index map and the recipe.
        bytes: Of the weights, "before" and "after".
        gallery: Test images by the model before and after each step, where the request asks for them.
        proof: Of what the last step left, whose tensors are those that were written.
    """

    steps: tuple[Result, ...]
    outputs: Mapping[str, str]
    bytes: Mapping[str, int]
    gallery: tuple[GalleryImage, ...]
    proof: Proof | None

    json_keys = (
        *("model", "family", "seed", "warnings", "outputs", "bytes", "seconds", "settings", "command", "version"),
        *("proof", "steps"),
    )


@dataclass(frozen=True)
class ChainPlan:
    """What a chain would do, step by step.

    Attributes:
        plans: A dry run of each step.
        warnings: Always none.
    """

    plans: tuple[Plan, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The promised keys."""
        return {"command": "run", "dry_run": True, "steps": [each.to_json() for each in self.plans]}


def plan_chain(request: Request, steps: Sequence[Step], watch: Watch) -> ChainPlan:
    """A dry run of each step, at the size that the steps before it ask for; times are those on the original.

    Raises:
        CodebookError: There is no step, or one cannot be done.
    """
    _refuse_none(steps)
    plans, size = list[Plan](), None
    for step in steps:
        planned = plan(step.command, replace(request, output=None), step.strategy, step.recipe, watch)
        before = planned.size["before"] if size is None else size
        size = planned.size["after"] if step.strategy else before
        sizes = {"before": before, "after": size}
        plans.append(replace(planned, size=sizes, outputs={"model": None, "index_map": None}))
    return ChainPlan(tuple(plans))


def run_chain(request: Request, steps: Sequence[Step], watch: Watch) -> Chain:
    """Do the steps one after another, and write the last state as one surgery, its index map beside it.

    Each step writes a checkpoint into a folder beside the output, which is removed at the end, on errors too.

    Raises:
        CodebookError: As `operate`; there is no output then.
    """
    _refuse_none(steps)
    distributed.require_one("run")
    output = check_request_output(request, "run", None)
    check_published(request)
    request.require_trainable(max(step.recipe.steps for step in steps))
    request = replace(request, sample=request.model is None)  # for steps whose model is no longer the demo, but of it
    with partial_folder(output.with_name(f"{output.name}.steps"), force=True) as folder:
        results, written = list[Result](), list[Path]()
        model = request.model
        for i, step in enumerate(steps, 1):
            place = folder / f"{i}-{step.command}{output.suffix}"
            asked = replace(request, model=model, output=place, force=False, resume=False, gallery=False)
            run = operate_in_memory(step.command, asked, step.strategy, step.recipe, watch, written=True)
            results.append(run.write(place))
            model = place
            written.append(place)
            request = request.alike(results[-1].settings)
        maps = _composed([read_index_maps([index_map_path(path)]) for path in written])
        output = check_request_output(request, "run", max(entry.size for entry in maps.values()))
        labels = [f"{i}, {step.command}" for i, step in enumerate(steps, 1)]
        gallery = tuple[GalleryImage, ...]()
        if request.gallery and request.modality != "auto":
            models = {"before": request.model, **dict(zip(labels, written, strict=True))}
            asked = replace(request, output=None)
            with watch.phase("measure"):
                gallery = gallery_of_files({name: replace(asked, model=model) for name, model in models.items()}, watch)
        with watch.phase("write"):
            index_map = _write(request, output, steps, written, maps)
    last = results[-1]
    labeled = zip(labels, results, strict=True)
    return Chain(
        command="run",
        model=request.title,
        family=last.family,
        settings=_shared([result.settings for result in results]),
        seed=request.seed,
        warnings=tuple(f"{label}: {warning}" for label, result in labeled for warning in result.warnings),
        steps=tuple(replace(result, model=request.title, outputs={}) for result in results),
        outputs={"model": str(output), "index_map": str(index_map), **published(request, output, watch)},
        bytes={"before": request.checkpoint.nbytes, "after": read_checkpoint(output).nbytes},
        gallery=gallery,
        proof=last.proof,
        seconds=watch.seconds,
    )


def _shared(settings: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Settings on which no two steps disagree."""
    whole = reduce(lambda all_, each: {**all_, **each}, settings, dict[str, object]())
    return {name: value for name, value in whole.items() if all(value == each.get(name, value) for each in settings)}


def _refuse_none(steps: Sequence[Step]) -> None:
    if not steps:
        raise CodebookError("no surgery to do; name one, such as `surgeries: [prune]`")


def _write(
    request: Request, output: Path, steps: Sequence[Step], written: Sequence[Path], maps: Mapping[str, IndexMap]
) -> Path:
    """What the last step left, as one surgery on the first model; returns the index map's path."""
    original, models = request.checkpoint, [read_checkpoint(path) for path in written]
    last = models[-1]
    about = _provenance(original, steps, models, {key: entry.size for key, entry in maps.items()})
    tensors = dict[str, Tensor]()
    for key, entry in maps.items():
        tensors |= {f"{key}/index_map": entry.index_map, f"{key}/nearest": entry.nearest}
    changed = {key: last.tensor(key) for key in original.entries if not _same(original, last, key)}
    card = written[-1] / CARD if is_directory_output(output) else own_card_path(written[-1])
    others = {CARD: card.read_bytes()} if card.is_file() else {}
    config = written_config(original, max(entry.size for entry in maps.values()))
    return write_checkpoint(original, output, changed, about, tensors, config, others, force=request.force)


def _composed(steps: Sequence[Sequence[IndexMap]]) -> dict[str, IndexMap]:
    """By key, in the order of the stages. What a step left alone keeps its codes."""
    keys = dict.fromkeys(entry.key for maps in steps for entry in maps)
    by_key = [{entry.key: entry for entry in maps} for maps in steps]
    return {key: reduce(IndexMap.then, (maps[key] for maps in by_key if key in maps)) for key in keys}


def _same(a: Checkpoint, b: Checkpoint, key: str) -> bool:
    one, other = a.entries[key], b.entries[key]
    return (one.shape, one.dtype) == (other.shape, other.dtype) and same_bytes(a, b, key)


def _provenance(
    original: Checkpoint, steps: Sequence[Step], models: Sequence[Checkpoint], sizes: Mapping[str, int]
) -> dict[str, str]:
    """As of one surgery: no times and no paths; trained is what some step trained."""
    settings = [
        {"command": step.command, **json.loads(model.metadata[PREFIX + "settings"])}
        for step, model in zip(steps, models, strict=True)
    ]
    groups = dict.fromkeys(
        group for model in models for group in model.metadata[PREFIX + "trained"].split(",") if group
    )
    tensors = sorted({name for model in models for name in listed(model, "trained_tensors")})
    kept = models[-1].metadata[PREFIX + "kept"]
    return provenance("run", {"steps": settings}, sizes, kept, groups, tensors, original)
