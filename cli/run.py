"""From the options given to the library's settings, and how a command shows what it does."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import typer

from codebook_tools.runtime.options import values
from codebook_tools.training.recipe import FineTune
from codebook_tools.workflows.request import Request

from .errors import reported, show_result

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.report.terminal.tables import Found
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.chain import ChainPlan
    from codebook_tools.workflows.dry_run import Plan

_Number = TypeVar("_Number", int, float)


def request_of(model: Path | None, given: Mapping[str, Any]) -> Request:
    """What is to be worked on. given: the options of a command, by name; those that it lacks are left out."""
    exhibit = given["report"] is not None
    return Request(model=model, typed=True, exhibit=exhibit, **values(Request, given))


def finetuning_of(request: Request, given: Mapping[str, Any]) -> FineTune:
    """How it is to be fine-tuned; not at all where there are no data of the model's own, unless that is asked for."""
    settings = values(FineTune, given)
    if settings["steps"] is None:
        settings["steps"] = FineTune.steps if request.trainable else 0
    return FineTune(batch_size=given["batch_size"], **settings)


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
    from codebook_tools.workflows.result import Result

    typed = shlex.join(["codebook", *sys.argv[1:]])
    if isinstance(found, Result | Chain) and found.shown and found.outputs.get("model") and distributed.count() == 1:
        request = request_of(Path(found.outputs["model"] or ""), given)
        low, high = cast(list[float], found.settings["input_range"])
        page = page_with_model(found, typed, replace(request, output=None, input_range=(low, high)), watch)
    else:
        page = page_of(found, typed)
    written = distributed.by_first(lambda: write_report(found, page, given["report"]))
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
