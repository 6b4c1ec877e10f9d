"""The options of commands: those that fields of the library's settings declare, and those of every command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from codebook_tools.codebook import Engine
from codebook_tools.runtime.options import Declared, Option, declared
from codebook_tools.training.recipe import FineTune
from codebook_tools.workflows.request import Request

from .completion import devices, families
from .hub import on_disk

ModelArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL",
        help="A .safetensors, .pt or .ckpt file, a directory of diffusers or transformers, or org/name[@revision] or "
        "hf://org/name[@revision]/path on the Hugging Face hub. Left out: the demo.",
        show_default=False,
    ),
]
EngineOption = Annotated[
    Engine,
    typer.Option(metavar="NAME", help="Which k-means runs (auto, native, faiss, sklearn).", rich_help_panel="k-means"),
]
BeamOption = Annotated[
    int,
    typer.Option(metavar="N", help="Choose codes of residual levels jointly, keeping N partial sums of each latent."),
]
_WIDEST = 20  # characters of choices in the column beside an option; more would narrow that of its help
_COMPLETIONS: Mapping[str, Callable[[str], list[str]]] = {"device": devices, "family": families}


@dataclass(frozen=True)
class Shell:
    """Settings of the command line alone: how a command shows what it does."""

    dry_run: Annotated[
        bool, Option("Say what would be done and written, its size and time; write nothing.", panel="Output")
    ] = False
    no_config: Annotated[bool, Option("Do not read codebook.toml in the current folder.", panel="Running")] = False
    deterministic: Annotated[bool, Option("Only algorithms that repeat bit by bit, on a GPU too.", panel="Running")] = (
        False
    )
    report: Annotated[
        Path | None,
        Option("Also write a page: figures, plots and pictures in one file.", metavar="FILE.html", panel="Output"),
    ] = None
    json_: Annotated[
        bool, Option("One JSON object on stdout, nothing else there.", names=("--json",), panel="Output")
    ] = False
    quiet: Annotated[bool, Option("No progress and no warnings.", panel="Output")] = False
    verbose: Annotated[bool, Option("Also settings, seconds by phase and the trace.", panel="Output")] = False


def parameters(settings: type, *names: str, **changes: Any) -> list[inspect.Parameter]:
    """Options of a settings class as parameters of a command.

    Args:
        settings: The class.
        names: Of fields; all for none.
        changes: Of their Option.
    """
    options = declared(settings)
    return [parameter(replace(one, option=replace(one.option, **changes))) for one in
            (options[name] for name in names or options)]  # fmt: skip


def panel(settings: type, heading: str) -> list[inspect.Parameter]:
    """The options of a settings class under one heading."""
    return [parameter(one) for one in declared(settings).values() if one.option.panel == heading]


def parameter(one: Declared) -> inspect.Parameter:
    """A field that is an option as a parameter of a command."""
    option = one.option
    names = option.names or ((f"--{one.name.replace('_', '-')}",) if one.kind is bool else ())
    kind = list[one.kind] | None if one.repeated else one.kind | None if one.default is None else one.kind  # type: ignore[name-defined]
    text, metavar = option.help, option.metavar
    if get_origin(one.kind) is Literal:
        choices = get_args(one.kind)
        metavar = "|".join(choices)
        if len(metavar) > _WIDEST:
            text, metavar = f"{text.removesuffix('.')} ({', '.join(choices)}).", "NAME"
    annotation = typer.Option(
        *names,
        help=text,
        metavar="" if one.kind is bool else metavar,
        rich_help_panel=option.panel,
        show_default=True,
        autocompletion=_COMPLETIONS.get(one.name),
    )
    default = inspect.Parameter.empty if one.default is MISSING else None if one.repeated else one.default
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, annotation]
    )


def _training(steps: int | None, **changes: Any) -> list[inspect.Parameter]:
    """The options of a fine-tuning. steps: their default. changes: of the Option of steps."""
    first, *others = declared(FineTune).values()
    first = replace(first, default=steps, option=replace(first.option, **changes))
    return [parameter(one) for one in (first, *others)]


DATA = [*parameters(Request, "data"), *(one for one in panel(Request, "Data") if one.name not in ("stats", "latents"))]
MODEL = [*parameters(Request, "network"), *panel(Request, "Model")]
TRAIN = _training(None)
TRAIN_IF_ASKED = _training(0, help="Fine-tuning steps after the surgery, 0 for none.")
FIGURES = parameters(Request, "metrics")
LATENTS, COUNTS = parameters(Request, "latents"), parameters(Request, "stats")
RESULT = [*parameters(Request, "output", "force", "push_to_hub", "private"), *parameters(Shell, "dry_run")]
WRITE = [*RESULT, *parameters(Request, "resume", "track", "log_dir")]
FOLDER = parameters(Request, "output", metavar="FOLDER", help="Left out: <name>.compare in the current folder.")
RUN = [
    *parameters(Request, "batch_size", "workers", "device", "precision", "compiled", "seed"),
    *parameters(Shell, "no_config", "deterministic", "report", "json_", "quiet", "verbose"),
]
PASS = [one for one in RUN if one.name != "report"]
REPLACE = parameters(Request, "force", help="Replace that file if it exists.", panel=None)
JSON = parameters(Shell, "json_", panel=None)
QUIET = parameters(Shell, "quiet", help="No warnings.", panel=None)
LONG_RUN = [*RUN, *parameters(Request, "latents_cache")]


def OUTPUT(text: str, *names: str) -> list[inspect.Parameter]:  # noqa: N802 (a group of options, as those above)
    """--output with a help of its own, and --force."""
    return [*parameters(Request, "output", help=text), *parameters(Request, "force")]


META = ("config", "notes")
"""What config.py leaves with the context of a command; options, too, by these names."""
_MODELS = ("model", "against")
"""Parameters that may be ids of the hub."""

_CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)


def command(
    heading: str, example: str, *shared: Sequence[inspect.Parameter]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate command(options, own options...): the shared options arrive in the dict `options`, by name.

    Args:
        heading: Of the panel in `codebook --help`.
        example: A line to type, for the command's own `--help`.
        shared: Groups of options that other commands have too.
    """
    return partial(_joined, heading, example, [parameter for group in shared for parameter in group])


def _joined(
    heading: str, example: str, shared: list[inspect.Parameter], function: Callable[..., None]
) -> Callable[..., None]:
    hints = get_type_hints(function, include_extras=True)
    own = [
        one.replace(annotation=hints[one.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for one in inspect.signature(function).parameters.values()
        if one.name != "options"
    ]
    return joined(function.__name__.rstrip("_"), function.__doc__ or "", heading, example, own, shared, function)


def joined(
    name: str,
    doc: str,
    heading: str,
    example: str,
    own: Sequence[inspect.Parameter],
    shared: Sequence[inspect.Parameter],
    function: Callable[..., None],
) -> Callable[..., None]:
    """A function with all options in its signature, which calls another: shared options in a dict, its own by name.

    Args:
        name: Of the command.
        doc: Its help.
        heading: Of the panel in `codebook --help`.
        example: A line to type, for the command's own `--help`.
        own: Options of this command alone.
        shared: Options that other commands have too.
        function: Called with the dict, and its own options by name.
    """

    asks_context = any(one.annotation is typer.Context for one in own)
    all_ = [*own, *shared, *([] if asks_context else [_CONTEXT])]

    def run(**typed: Any) -> None:
        context = typed["context"]
        typed |= {name: on_disk(typed[name], typed.get("quiet", False)) for name in _MODELS if typed.get(name)}
        options = {one.name: typed[one.name] for one in shared} | {name: context.meta.get(name) for name in META}
        function(options, **{one.name: typed[one.name] for one in own})

    run.__name__, run.__doc__ = name, doc
    run.__signature__ = inspect.Signature(all_)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in all_}
    run.heading, run.example = heading, example  # type: ignore[attr-defined]
    return run
