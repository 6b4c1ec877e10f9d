"""What an operation would do and write: its size, and an estimate of its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.layout import index_map_path
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.codebook import Strategy
from codebook_tools.evaluation.usage import survey
from codebook_tools.models.output import check_size
from codebook_tools.models.registry import CUSTOM, family_of
from codebook_tools.models.stored_codes import added_bytes
from codebook_tools.runtime.progress import Watch
from codebook_tools.runtime.version import VERSION
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import asked_size, check_request_output, settings_of
from codebook_tools.workflows.session import open_request
from codebook_tools.workflows.without_network import books_without_images, goes_without_images


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


def plan(command: str, request: Request, strategy: Strategy | None, recipe: FineTune, watch: Watch) -> Plan:
    """Look at what `operate` would look at first, time one batch, and write nothing."""
    request.require_trainable(recipe.steps)
    check_size(request.checkpoint, asked_size(strategy, 0))
    if strategy and goes_without_images(request, strategy):
        return _plan_detached(command, request, strategy)
    opened = open_request(request, watch)
    model = opened.model
    books = [model.books[stage].found for stage in model.chosen]
    few = opened.calibration.items[: request.batch_size]
    timed = Watch()
    with timed.phase("encode"):
        latents = model.latents(opened.calibration.subset(few), request.batch_size)
        survey(latents, model.books[0].codebook, seed=request.seed, watch=Watch())
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
        seconds={"estimate": seconds},
        **_sizes(command, request, strategy, model.checkpoint, books),
    )


def _plan_detached(command: str, request: Request, strategy: Strategy) -> Plan:
    checkpoint = request.checkpoint
    return Plan(
        command=command,
        model=str(request.source),
        family=request.family or family_of(checkpoint) or CUSTOM,
        settings={"stats": str(request.stats) if request.stats else None, "images": {}} | settings_of(strategy),
        seed=request.seed,
        warnings=(),
        seconds={"estimate": 1.0},
        **_sizes(command, request, strategy, checkpoint, books_without_images(request, checkpoint, strategy)),
    )


def _sizes(
    command: str, request: Request, strategy: Strategy | None, checkpoint: Checkpoint, books: Sequence[FoundCodebook]
) -> dict[str, Any]:
    """The plan's size, outputs and bytes, the output checked."""
    size = asked_size(strategy, books[0].size)
    output = check_request_output(request, command, size) if size or request.output else None
    nbytes = request.checkpoint.nbytes
    return {
        "size": {"before": books[0].size, "after": size},
        "outputs": {
            "model": str(output) if output else None,
            "index_map": str(index_map_path(output)) if output else None,
        },
        "bytes": {
            "before": nbytes,
            "after": nbytes + sum(added_bytes(checkpoint, book, size or book.size) for book in books),
        },
    }
