"""A recipe's options and those of the command line, as one; and the run of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .errors import reported
from .options import Channels, Metric
from .run import request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.chain import Chain, ChainPlan

_KINDS: Mapping[str, Any] = {
    **dict.fromkeys(("model", "output", "latents_cache", "report"), Path),
    **dict.fromkeys(("network", "family", "input_range"), str),
    **dict.fromkeys(("limit", "size", "workers"), int),
    "metric": Metric,
    "channels": Channels,
}
"""Of the options that are nothing by default, which says nothing of their kind."""

_LISTS = ("data", "test_data", "codebook_key", "companion", "as_stored")
_OF_THE_CALL = ("json_", "quiet", "verbose", "dry_run", "force", "report", "recipe")


def run_recipe(context: typer.Context, path: Path, model: Path | None, given: dict[str, Any]) -> None:
    """Do what a recipe says, and write the recipe that repeats it beside the result. context: of the command."""
    typed = {name for name in (*given, "model") if _is_typed(context, name)}
    with reported():
        from codebook_tools.workflows.recipe_file import read_recipe

        recipe = read_recipe(path)
        options = merged(recipe.options, {**given, "model": model}, typed)

    def work(watch: Watch) -> Chain | ChainPlan:
        from codebook_tools.checkpoints.atomic import write_text
        from codebook_tools.workflows.chain import plan_chain, run_chain
        from codebook_tools.workflows.recipe_file import RecipeFile, steps_of, without_nothing

        request = request_of(options["model"], options)
        steps = steps_of(recipe, batch_size=options["batch_size"], seed=options["seed"])
        if given["dry_run"]:
            return plan_chain(request, steps, watch)
        done = run_chain(request, steps, watch)
        output = Path(done.outputs["model"])
        again = output.with_name(f"{output.name.removesuffix('.safetensors')}.recipe.yaml")
        if again.exists() and again.samefile(path):
            return replace(done, warnings=(*done.warnings, f"{again} is the recipe that was read, and stays as it is"))
        if again.exists() and not options["force"]:
            return replace(done, warnings=(*done.warnings, f"{again} is there and stays as it is; --force replaces it"))
        set_ = {name: value for name, value in options.items() if name not in _OF_THE_CALL}
        plain = {name: value.value if isinstance(value, Enum) else value for name, value in set_.items()}
        write_text(again, RecipeFile(without_nothing({**plain, "output": output}), recipe.surgeries).text())
        return replace(done, outputs={**done.outputs, "recipe": str(again)})

    run_and_show(work, options)


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def merged(options: Mapping[str, Any], given: dict[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """What was typed, and what the recipe says where nothing was. Raises CodebookError for options there are not, and
    for what is not of their type."""
    from codebook_tools.errors import CodebookError

    found = dict(given)
    for name, value in options.items():
        if name not in given or name in _OF_THE_CALL:
            known = ", ".join(sorted(option.replace("_", "-") for option in given if option not in _OF_THE_CALL))
            raise CodebookError(f"a recipe has no {name.replace('_', '-')}; it has surgeries, {known}")
        if name not in typed:
            found[name] = _as_option(name, value, given[name])
    return found


def _as_option(name: str, value: Any, default: Any) -> Any:
    from codebook_tools.runtime.type_checks import check_kind

    several = value if name in _LISTS and isinstance(value, list) else [value]
    kind = str if name in _LISTS else _KINDS[name] if default is None else type(default)
    for one in several:
        check_kind(name.replace("_", "-"), one, kind)
    return several if name in _LISTS else kind(value)
