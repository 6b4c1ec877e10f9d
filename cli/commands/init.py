"""`codebook init`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from codebook_tools.errors import CodebookError

from ..config import NAME, as_toml, keys, source_of
from ..options import DATA, MODEL, REPLACE, RUN, ModelArgument, command
from ..run import request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.result import Result


@command("Look", "codebook init model.safetensors --data images/", REPLACE, DATA, MODEL, RUN)
def init(options: dict[str, Any], context: typer.Context, model: ModelArgument = None) -> None:
    """Try one batch of data on MODEL, and write codebook.toml: options that need not be typed in this folder."""

    def work(watch: Watch) -> Result:
        from codebook_tools.checkpoints.atomic import write_text
        from codebook_tools.models.registry import CUSTOM
        from codebook_tools.runtime import distributed
        from codebook_tools.workflows.operate import measure_model

        distributed.require_one("init")
        path = Path(NAME)
        if model is None:
            raise CodebookError("init wants a MODEL: codebook.toml says how to open one of yours")
        if path.exists() and not options["force"]:
            raise CodebookError(f"{path} exists; use --force to replace it, which keeps what is not typed anew")
        request = request_of(model, options)
        tried = measure_model(
            replace(request, limit=min(request.batch_size, request.limit or request.batch_size)), watch
        )
        chosen = {key: options[one.name] for key, one in keys().items() if source_of(context, one.name) in _SET}
        if bounds := tried.settings.get("input_range"):
            chosen["input-range"] = bounds
        if tried.family == CUSTOM and tried.settings["modality"] == "arrays":
            chosen.setdefault("modality", "arrays")
        if tried.family == CUSTOM and tried.proof is None:  # it was assumed, with a warning, which once is enough
            chosen.setdefault("metric", tried.settings["metric"])
        write_text(path, as_toml(chosen))
        settings = {**tried.settings, "config": chosen}
        return replace(tried, command="init", settings=settings, outputs={**tried.outputs, "config": str(path)})

    run_and_show(work, options)


_SET = ("COMMANDLINE", "DEFAULT_MAP")
"""Sources of an option that was typed, or is in the file that is replaced."""
