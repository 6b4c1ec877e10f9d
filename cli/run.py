"""From the options given to the library's words, and the one call that a command makes."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import typer

from .errors import reported, show_result

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.codebook import Strategy
    from codebook_tools.report.terminal.tables import Found
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.training.finetune import FineTune
    from codebook_tools.workflows.chain import ChainPlan
    from codebook_tools.workflows.dry_run import Plan
    from codebook_tools.workflows.result import Result
    from codebook_tools.workflows.session import Request

_Number = TypeVar("_Number", int, float)


def request_of(model: Path | None, given: dict[str, Any]) -> Request:
    """What is to be worked on. given: the options of a command, by name; those that it lacks are left out."""
    from codebook_tools.workflows.session import Request

    metric, channels = given["metric"], given["channels"]
    return Request(
        model=model,
        typed=True,
        data=tuple(given["data"] or ()),
        test_data=tuple(given["test_data"] or ()),
        limit=given["limit"],
        size=given["size"],
        channels=channels.value if channels else None,
        skip_bad=given["skip_bad"],
        network=given["network"],
        family=given["family"],
        codebook_keys=tuple(given["codebook_key"] or ()),
        companions=tuple(given.get("companion") or ()),
        as_stored=tuple(given.get("as_stored") or ()),
        metric=metric.value if metric else None,
        input_range=_input_range(given["input_range"]),
        latents_cache=given.get("latents_cache"),
        batch_size=given["batch_size"],
        workers=given["workers"],
        compiled=given["compiled"],
        device=given["device"],
        precision=given["precision"].value,
        seed=given["seed"],
        stats=given.get("stats"),
        latents=tuple(given.get("latents") or ()),
        output=given.get("output"),
        force=given.get("force", False),
        resume=given.get("resume", False),
        log_dir=given.get("log_dir"),
        exhibit=given["report"] is not None,
    )


def _input_range(text: str | None) -> tuple[float, float] | None:
    from codebook_tools.errors import CodebookError

    if text is None:
        return None
    try:
        low, high = (float(number) for number in text.split(","))
    except ValueError:
        raise CodebookError(f"--input-range {text}: expected two numbers, such as 0,1") from None
    return low, high


def numbers(text: str, kind: type[_Number]) -> list[_Number]:
    """Of an option that takes several, between commas."""
    try:
        return [kind(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected numbers with commas between them, such as 16,32,64") from None


def named_after(model: Path | None, ending: str) -> Path:
    """In the current folder."""
    from codebook_tools.models.demo import DEMO

    source = (model or DEMO).absolute()
    return Path(f"{source.name if source.is_dir() else source.stem}{ending}")


def recipe_of(request: Request, given: dict[str, Any]) -> FineTune:
    """How it is to be fine-tuned; not at all where there are no data of the model's own, unless that is asked for."""
    from codebook_tools.training.finetune import FineTune

    steps = given["steps"]
    return FineTune(
        steps=(FineTune.steps if request.trainable else 0) if steps is None else steps,
        train=given["train"].value,
        codebook_update=given["codebook_update"].value,
        batch_size=given["batch_size"],
        lr=given["lr"],
        loss=given["loss"].value,
        perceptual=given["perceptual"],
        adversarial=given["adversarial"],
        distill=given["distill"],
        entropy=given["entropy"],
        **{name: given[name] for name in ("accumulate", "clip", "weight_ema", "patience", "min_usage")},
    )


def operate_on(
    command: str, model: Path | None, strategy: Callable[[Watch], Strategy] | None, given: dict[str, Any]
) -> None:
    """Do a surgery, or say what it would do, and show what came of it. strategy: None fine-tunes."""
    if given.get("stats") and not given["dry_run"]:
        _hash_ahead(model)

    def work(watch: Watch) -> Result | Plan:
        from codebook_tools.workflows.dry_run import plan
        from codebook_tools.workflows.operate import operate

        chosen, request = strategy(watch) if strategy else None, request_of(model, given)
        recipe = recipe_of(request, given)
        if strategy is None and given["steps"] is None:  # there is nothing else to do
            recipe = replace(recipe, steps=type(recipe).steps)
        return (plan if given["dry_run"] else operate)(command, request, chosen, recipe, watch)

    run_and_show(work, given)


def _hash_ahead(model: Path | None) -> None:
    """Counts are of one checkpoint, told by its SHA-256: a thread finds that out while torch is imported."""
    with reported():
        from codebook_tools.checkpoints.hashing import hash_ahead
        from codebook_tools.checkpoints.read import read_checkpoint
        from codebook_tools.models.demo import DEMO

        hash_ahead(read_checkpoint(model or DEMO).files)


def run_and_show(work: Callable[[Watch], Found | Plan | ChainPlan], given: dict[str, Any]) -> None:
    """Do the work, with progress, and print what came of it; with others where torchrun started several processes."""
    with reported():
        from codebook_tools.runtime.distributed import joined

        with joined(given["device"]), reported():  # while they are joined, they agree on who reports
            _run_and_show(work, given)


def _with_report(found: Found, given: dict[str, Any], watch: Watch) -> Found:
    """Write the page of what was found, which then names it."""
    from codebook_tools.report.html.pages import page_of, page_with_model, write_report
    from codebook_tools.runtime import distributed
    from codebook_tools.workflows.chain import Chain
    from codebook_tools.workflows.diagnose import Diagnosis
    from codebook_tools.workflows.result import Result

    typed = shlex.join(["codebook", *sys.argv[1:]])
    if isinstance(found, Result | Chain) and found.shown and found.outputs.get("model") and distributed.count() == 1:
        request = request_of(Path(found.outputs["model"] or ""), given)
        low, high = cast(list[float], found.settings["input_range"])
        page = page_with_model(found, typed, replace(request, output=None, input_range=(low, high)), watch)
    else:
        page = page_of(found, typed)
    written = distributed.by_first(lambda: write_report(found, page, given["report"]))
    if isinstance(found, Diagnosis):
        return found
    outputs: dict[str, Any] = {**found.outputs, **written}
    return replace(found, outputs=outputs)


def _run_and_show(work: Callable[[Watch], Found | Plan | ChainPlan], given: dict[str, Any]) -> None:
    from codebook_tools.report.terminal.tables import details_table, table_of
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.chain import ChainPlan
    from codebook_tools.workflows.dry_run import Plan

    from .output import ProgressShow, print_table, print_warnings

    if given["deterministic"]:
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for to repeat itself
        torch.use_deterministic_algorithms(True, warn_only=True)  # it names those that have none
    if given["report"]:
        from codebook_tools.report.html.pages import check_report

        check_report(given["report"])
    with ProgressShow(given["quiet"]) as show:
        found = work(Watch(show))
        if given["report"] and not isinstance(found, Plan | ChainPlan):
            found = _with_report(found, given, Watch(show))
    print_warnings(found.warnings, given["quiet"])
    show_result(found, table_of, given["json_"])
    if given["verbose"] and not isinstance(found, Plan | ChainPlan) and not given["json_"]:
        print_table(details_table(found))
    if not getattr(found, "healthy", True):
        raise typer.Exit(3)
