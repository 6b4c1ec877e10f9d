"""What an operation would do and write: its size, and an estimate of its time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from codebook_tools.checkpoints.layout import index_map_path
from codebook_tools.codebook import Strategy
from codebook_tools.evaluation.usage import survey
from codebook_tools.models.output import check_size
from codebook_tools.models.registry import CUSTOM, family_of
from codebook_tools.models.stored_codes import added_bytes
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import SUBJECT, ResultHeader, asked_size, check_request_output, settings_of
from codebook_tools.workflows.session import open_request
from codebook_tools.workflows.target import Opened
from codebook_tools.workflows.without_network import (
    books_without_images,
    goes_without_images,
    open_latents_of,
    refuse_steps,
)


@dataclass(frozen=True, kw_only=True)
class Plan(ResultHeader):
    """What `operate` would do and write.

    Attributes:
        size: Codes "before" and "after"; None where only counting decides.
        bytes: Of the weights, "before" and "after"; the most where the size is not known.
        dry_run: Always true; in the JSON.
    """

    size: Mapping[str, int | None]
    bytes: Mapping[str, int]
    dry_run: bool = True

    json_keys = ("command", *SUBJECT, "size", "outputs", "bytes", "seconds", "version", "dry_run")


def plan(command: str, request: Request, strategy: Strategy | None, recipe: FineTune, watch: Watch) -> Plan:
    """Check what `operate` would check first, time one batch, and write nothing.

    Args:
        command: As the command line has it.
        request: The model and its data.
        strategy: None for a fine-tuning alone.
        recipe: The fine-tuning; of 0 steps for none.
        watch: Progress and seconds by phase.

    Returns:
        The plan; `seconds["estimate"]` is an extrapolation from one batch.

    Raises:
        CodebookError: As `operate` before its long work.
    """
    request.require_trainable(recipe.steps)
    check_size(request.checkpoint, asked_size(strategy, 0))
    settings: dict[str, object]
    if request.latents:
        refuse_steps(recipe.steps)
        target = open_latents_of(request, watch, strategy)
        family, warnings, seconds = target.model.family, target.warnings, 1.0
        settings = {"images": {}} | target.settings | settings_of(strategy)
        books = [target.codebooks[stage] for stage in target.model.chosen]
    elif strategy and goes_without_images(request, strategy):
        family = request.family or family_of(request.checkpoint) or CUSTOM
        settings = {"stats": str(request.stats) if request.stats else None, "images": {}}
        settings |= settings_of(strategy)
        warnings, seconds = list[str](), 1.0
        books = books_without_images(request, request.checkpoint, strategy)
    else:
        opened = open_request(request, watch)
        family, warnings, seconds = opened.model.family, opened.warnings, _estimate(opened, recipe)
        settings = opened.settings | settings_of(strategy) | settings_of(recipe)
        books = [opened.codebooks[stage] for stage in opened.model.chosen]
    checkpoint, old = request.checkpoint, books[0].size
    size = asked_size(strategy, old)
    output = check_request_output(request, command, size) if size or request.output else None
    added = sum(added_bytes(checkpoint, book, size or book.size) for book in books)
    return Plan(
        command=command,
        model=request.title,
        family=family,
        settings=settings,
        seed=request.seed,
        warnings=tuple(warnings),
        size={"before": old, "after": size},
        outputs={
            "model": str(output) if output else None,
            "index_map": str(index_map_path(output)) if output else None,
        },
        bytes={"before": checkpoint.nbytes, "after": checkpoint.nbytes + added},
        seconds={"estimate": seconds},
    )


def _estimate(opened: Opened, recipe: FineTune) -> float:
    """Seconds of the whole run, extrapolated from one batch."""
    batch, model, splits = opened.request.batch_size, opened.model, opened.splits
    few = opened.calibration.items[:batch]
    timed = Watch()
    with timed.phase("encode"):
        latents = model.latents(opened.calibration.subset(few), batch)
        survey(latents, model.books[0].codebook, seed=opened.request.seed, watch=Watch())
    # A pass of the decoder costs about one of the encoder, a training step three of both.
    passes = 2 * len(splits.calibration) + 6 * len(splits.test) + (30 * len(splits.validation) if recipe.steps else 0)
    return timed.seconds["encode"] / len(few) * (passes + 6 * recipe.steps * batch)
