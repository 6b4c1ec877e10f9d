"""Surgeries as the tests ask for them, and what they wrote."""

from __future__ import annotations

from pathlib import Path

from conftest import State
from safetensors.torch import load_file
from torch import Tensor

from codebook_tools.codebook import Strategy
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.operate import operate
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import Result
from codebook_tools.workflows.verify import verify_checkpoint

NO_STEPS = FineTune(steps=0)


def do(request: Request, strategy: Strategy | None, recipe: FineTune = NO_STEPS) -> Result:
    """The result, once its file is found sound."""
    command = type(strategy).__name__.lower() if strategy else "finetune"
    result = operate(command, request, strategy, recipe, Watch())
    assert verify_checkpoint(output_of(result), request.source).differences == ()
    return result


def output_of(result: Result) -> Path:
    return Path(str(result.outputs["model"]))


def written(result: Result) -> State:
    state: State = load_file(output_of(result))
    return state


def maps_of(result: Result) -> dict[str, tuple[Tensor, Tensor]]:
    """Index map and nearest of each codebook, as the safetensors library reads them."""
    maps = load_file(str(result.outputs["index_map"]))
    keys = {name.rpartition("/")[0] for name in maps}
    assert maps.keys() == {f"{key}/{kind}" for key in keys for kind in ("index_map", "nearest")}
    return {key: (maps[f"{key}/index_map"], maps[f"{key}/nearest"]) for key in sorted(keys)}
