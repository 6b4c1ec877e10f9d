"""Fine-tunings as the tests ask for them: in one call, and broken off in the middle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import State
from sources_of_images import Images

from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.codebook_ema import ExtraCodes
from codebook_tools.training.finetune import FineTune, FineTuned, finetune
from codebook_tools.training.resume import SnapshotFile
from codebook_tools.training.tracking import Tracking, tracked

ROWS = [[0.2, 0.2], [0.4, 0.8]]
"""An image of mean 0.4 and variance 0.06. The codes 0 and 1 get 3 of its pixels and 1, at a mean error of 0.07."""


def tune(
    model: Model,
    images: Images,
    counts: list[int],
    validation: Images | None = None,
    *,
    saving: SnapshotFile | None = None,
    watch: Watch | None = None,
    log_dir: Path | None = None,
    more: Mapping[int, ExtraCodes] | None = None,
    **recipe: Any,
) -> FineTuned:
    recipe.setdefault("batch_size", len(images))
    with tracked(Tracking("tensorboard", log_dir, "run") if log_dir else None) as tracker:
        return finetune(
            model,
            images,
            validation or images,
            FineTune(**recipe),
            [torch.tensor(counts)],
            seed=0,
            watch=watch or Watch(),
            saving=saving,
            log=tracker.log,
            more=more,
        )


def weights_of(model: Model) -> State:
    """The network's, and in the place of its own codebooks those that it runs with."""
    vectors = {book.key: book.vectors for book in model.books}
    return {name: tensor.detach().clone() for name, tensor in (model.network.state_dict() | vectors).items()}


class BrokenError(Exception):
    """The power cut."""


def breaking_at(step: int) -> Watch:
    """A watch under which a fine-tuning ends at that step, before anything more is kept."""

    def show(what: str, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        if what == "fine-tune" and done == step:
            raise BrokenError

    return Watch(show)
