"""`codebook run`: a recipe's options and those of the command line, as one; and the run of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codebook_tools.errors import CodebookError
from codebook_tools.runtime.hub_ids import title_of
from codebook_tools.runtime.options import Declared, Option, declared
from codebook_tools.workflows.request import Request

from ..config import source_of
from ..errors import reported
from ..hub import on_disk
from ..options import DATA, FIGURES, LONG_RUN, META, MODEL, RESULT, ModelArgument, Shell, command
from ..run import request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.chain import Chain, ChainPlan

_OPTIONS = {
    "model": Declared("model", Path, False, None, Option("")),
    **declared(Request),
    "deterministic": declared(Shell)["deterministic"],
}
"""That a recipe may set, where the command has them."""

_OF_THE_CALL = (*META, "json_", "quiet", "verbose", "dry_run", "force", "report", "recipe", "no_config")


@command("Operate", "codebook run recipe.yaml --data images/", DATA, FIGURES, MODEL, RESULT, LONG_RUN)
def run(
    options: dict[str, Any],
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file with a list of surgeries.")],
    model: ModelArgument = None,
) -> None:
    """Surgeries in a row, by a recipe, written as one. What is given here comes before what the recipe says."""
    run_recipe(context, recipe, model, options)


def run_recipe(context: typer.Context, path: Path, model: Path | None, options: dict[str, Any]) -> None:
    """Do what a recipe says, and write the recipe that repeats it beside the result.

    Args:
        context: Of the command, which knows which options were typed.
        path: Of the recipe.
        model: As typed; None for the recipe's.
        options: Of the command, by name.
    """
    typed = {name for name in (*options, "model") if source_of(context, name) == "COMMANDLINE"}
    with reported():
        from codebook_tools.training.recipe_file import read_recipe

        recipe = read_recipe(path)
        combined = merged(recipe.options, {**options, "model": model}, typed)
        combined["model"] = combined["model"] and on_disk(combined["model"], options["quiet"])

    def work(watch: Watch) -> Chain | ChainPlan:
        from codebook_tools.checkpoints.atomic import write_text
        from codebook_tools.training.recipe_file import RecipeFile, steps_of, without_nothing
        from codebook_tools.workflows.chain import plan_chain, run_chain

        request = request_of(combined["model"], combined)
        steps = steps_of(recipe, batch_size=combined["batch_size"], seed=combined["seed"])
        if options["dry_run"]:
            return plan_chain(request, steps, watch)
        done = run_chain(request, steps, watch)
        output = Path(done.outputs["model"])
        again = output.with_name(f"{output.name.removesuffix('.safetensors')}.recipe.yaml")
        if again.exists() and again.samefile(path):
            return replace(done, warnings=(*done.warnings, f"{again} is the recipe that was read, and stays as it is"))
        if again.exists() and not combined["force"]:
            return replace(done, warnings=(*done.warnings, f"{again} is there and stays as it is; --force replaces it"))
        settings = {name: value for name, value in combined.items() if name not in _OF_THE_CALL}
        settings["model"] = combined["model"] and title_of(combined["model"])
        write_text(again, RecipeFile(without_nothing({**settings, "output": output}), recipe.surgeries).text())
        return replace(done, outputs={**done.outputs, "recipe": str(again)})

    run_and_show(work, combined)


def merged(recipe: Mapping[str, Any], options: dict[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """The options of the command, with those of the recipe where none was typed.

    Raises:
        CodebookError: The recipe has an option that the command lacks, or one that is not of its type.
    """
    both = dict(options)
    for name, value in recipe.items():
        if name not in options or name in _OF_THE_CALL:
            known = ", ".join(sorted(option.replace("_", "-") for option in options if option not in _OF_THE_CALL))
            raise CodebookError(f"a recipe has no {name.replace('_', '-')}; it has surgeries, {known}")
        if name not in typed:
            both[name] = _as_option(_OPTIONS[name], value)
    return both


def _as_option(option: Declared, value: Any) -> Any:
    from codebook_tools.runtime.type_checks import check_kind

    if option.option.parse:  # typed as text, such as 0,1; a recipe may also say it as YAML's numbers
        numbers = value if isinstance(value, list) else [value]
        if all(type(one) in (int, float) for one in numbers):
            value = ",".join(map(str, numbers))
    several = value if option.repeated and isinstance(value, list) else [value]
    for one in several:
        check_kind(option.name.replace("_", "-"), one, option.kind)
    return several if option.repeated else Path(value) if option.kind is Path else value
