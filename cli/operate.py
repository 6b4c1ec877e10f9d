"""A surgery or a fine-tuning: what their commands have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codebook_tools.training.recipe import FineTune

from .errors import reported
from .run import finetuning_of, request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.codebook import Strategy
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.dry_run import Plan
    from codebook_tools.workflows.result import Result


def operate_on(
    command: str, model: Path | None, strategy: Callable[[Watch], Strategy] | None, options: dict[str, Any]
) -> None:
    """Do a surgery, or say what it would do, and show the result.

    Args:
        command: As it is typed.
        model: A file or directory; None for the bundled demo.
        strategy: Makes the strategy, which reports progress to a watch; None fine-tunes.
        options: Of the command, by name.
    """
    if options.get("stats") and not options["dry_run"]:
        _hash_ahead(model)

    def work(watch: Watch) -> Result | Plan:
        from codebook_tools.workflows.dry_run import plan
        from codebook_tools.workflows.operate import operate

        chosen, request = strategy(watch) if strategy else None, request_of(model, options)
        finetuning = finetuning_of(request, options)
        if strategy is None and options["steps"] is None:  # there is nothing else to do
            finetuning = replace(finetuning, steps=FineTune.steps)
        return (plan if options["dry_run"] else operate)(command, request, chosen, finetuning, watch)

    run_and_show(work, options)


def _hash_ahead(model: Path | None) -> None:
    """Hash the checkpoint in a thread while torch is imported: counts are identified by its SHA-256."""
    with reported():
        from codebook_tools.checkpoints.hashing import hash_ahead
        from codebook_tools.checkpoints.read import read_checkpoint
        from codebook_tools.models.demo import DEMO

        hash_ahead(read_checkpoint(model or DEMO).files)
