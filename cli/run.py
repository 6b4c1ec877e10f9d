"""From the options given to the library's settings, and how a command shows what it does."""

from __future__ import annotations

import gc
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from codebook_tools.runtime.hub_ids import copy_of
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


def request_of(model: Path | None, options: Mapping[str, Any]) -> Request:
    """The model, its data, and how to work on them. options: of a command, by name."""
    return Request(
        model=model,
        typed=True,
        gallery=options.get("report") is not None,
        config=options["config"] or {},
        notes=options["notes"] or (),
        **values(Request, options),
    )


def finetuning_of(request: Request, options: Mapping[str, Any]) -> FineTune:
    """How to fine-tune; without data of the model's own not at all, unless that is asked for."""
    settings = values(FineTune, options)
    if settings["steps"] is None:
        settings["steps"] = FineTune.steps if request.trainable else 0
    return FineTune(batch_size=options["batch_size"], **settings)


def numbers(text: str, kind: type[_Number]) -> list[_Number]:
    """Several numbers with commas between them.

    Raises:
        typer.BadParameter: The text is something else.
    """
    try:
        return [kind(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected numbers with commas between them, such as 16,32,64") from None


def named_after(model: Path | None, ending: str) -> Path:
    """The model's name with an ending, in the current folder."""
    from codebook_tools.models.demo import DEMO

    source = (model or DEMO).absolute()
    copy = copy_of(source)
    return Path(f"{copy.name if copy else source.name if source.is_dir() else source.stem}{ending}")


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def run_and_show(work: Callable[[Watch], Found | Plan | ChainPlan], options: dict[str, Any]) -> None:
    """Do the work, with progress, and print its result; with others where torchrun started several processes."""
    with reported():
        from codebook_tools.runtime.distributed import joined

        with joined(options["device"]), reported():  # while they are joined, they agree on who reports
            _run_and_show(work, options)


def _with_report(result: Found, options: dict[str, Any], watch: Watch) -> Found:
    """Write the page of a result, which then names it."""
    from codebook_tools.report.html.pages import page_of, page_with_model, write_report
    from codebook_tools.runtime import distributed
    from codebook_tools.workflows.chain import Chain
    from codebook_tools.workflows.result import Result

    typed = shlex.join(["codebook", *(word for word in sys.argv[1:] if word != "--quiet")])
    if (
        isinstance(result, Result | Chain)
        and result.gallery
        and result.outputs.get("model")
        and distributed.count() == 1
    ):
        request = request_of(Path(result.outputs["model"] or ""), options)
        page = page_with_model(result, typed, replace(request.alike(result.settings), output=None), watch)
    else:
        page = page_of(result, typed)
    written = distributed.by_first(lambda: write_report(result, page, options["report"]))
    outputs: dict[str, Any] = {**result.outputs, **written}
    return replace(result, outputs=outputs)


@contextmanager
def _importing() -> Iterator[None]:
    """Import torch without garbage collection, which would go through its objects many times, at the end, too.

    A thread that hashes a file meanwhile gets the interpreter's lock as soon as it asks for it.
    """
    if "torch" in sys.modules:  # then garbage may lie among what would be frozen
        yield
        return
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 10)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        sys.setswitchinterval(interval)


def _run_and_show(work: Callable[[Watch], Found | Plan | ChainPlan], options: dict[str, Any]) -> None:
    with _importing():
        from codebook_tools.report.terminal.tables import details_table, table_of
        from codebook_tools.runtime.progress import Watch
        from codebook_tools.workflows.chain import ChainPlan
        from codebook_tools.workflows.dry_run import Plan

    from .output import ProgressShow, print_note, print_table, print_warnings

    if options["deterministic"]:
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for to repeat itself
        torch.use_deterministic_algorithms(True, warn_only=True)  # it names those that have none
    if options["report"]:
        from codebook_tools.report.html.pages import check_report

        check_report(options["report"])
    with ProgressShow(options["quiet"]) as show:
        result = work(Watch(show))
        if options["report"] and not isinstance(result, Plan | ChainPlan):
            result = _with_report(result, options, Watch(show))
    print_warnings(result.warnings, options["quiet"])
    if options["config"] and not options["quiet"]:
        print_note("from codebook.toml: " + ", ".join(f"{key} {_words(of)}" for key, of in options["config"].items()))
    show_result(result, table_of, options["json_"])
    if options["verbose"] and not isinstance(result, Plan | ChainPlan) and not options["json_"]:
        print_table(details_table(result))
    if not getattr(result, "healthy", True):
        raise typer.Exit(3)
