"""Surgeries as the commands do them, and what is promised of every file that they write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import State
from safetensors.torch import load_file
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.codebook import Strategy
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Prune, Quantize, Refit, Restart
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.operate import Result, operate
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.verify import verify_checkpoint

NO_STEPS = FineTune(steps=0)


@dataclass(frozen=True)
class Operation:
    """A command with its options. size: codes that there are afterwards, None where the data decide."""

    command: str
    strategy: Strategy | None
    size: int | None = None
    recipe: FineTune = NO_STEPS

    def __str__(self) -> str:
        return self.command if self.recipe == NO_STEPS else f"{self.command}, fine-tuned"


OPERATIONS = (
    Operation("prune", Prune()),
    Operation("refit", Refit(k=8), 8),
    Operation("quantize", Quantize(k=4), 4),
    Operation("restart", Restart(), 16),
    Operation("refit", Refit(k=8), 8, FineTune(steps=3, batch_size=16, lr=1e-3)),
)
"""On models of 16 codes."""


def operated(operation: Operation, request: Request) -> tuple[Result, Path]:
    """What was done, and where its result lies, which is sound: the original's tensors and config but for what follows
    the codes and what was trained."""
    done = operate(operation.command, request, operation.strategy, operation.recipe, Watch())
    model = Path(str(done.outputs["model"]))
    verified = verify_checkpoint(model, request.source)
    assert verified.ok, verified.differences
    assert done.kept == ("finetuned" if operation.recipe.steps else "surgery"), done.warnings
    return done, model


def state_of(path: Path) -> State:
    """The tensors of a file or of a directory, read without the package where it is no directory."""
    path = read_checkpoint(path).path
    if path.suffix == ".safetensors":
        return load_file(path)
    state: State = torch.load(path, weights_only=True)["state_dict"]
    return state


def assert_only_these_differ(result: Path, source: Path, owned: Iterable[str]) -> None:
    """Names and dtypes are the source's, and so is every bit but of tensors whose name holds one of `owned`."""
    before, after = state_of(source), state_of(result)
    assert sorted(before) == sorted(after)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        if not any(part in key for part in owned):
            assert torch.equal(after[key], tensor), key


def assert_averages_follow(codes: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Running sums are codes times running counts, and no count is so small that training would move its code.
    codes, sums: (..., size, dim); counts: (..., size)."""
    assert bool((counts >= 1).all())
    assert torch.allclose(sums, codes * counts[..., None], rtol=1e-6)


def assert_same_indices(ours: Iterable[Tensor], theirs: Iterable[Tensor], size: int) -> None:
    """Stage by stage, and within the codebook."""
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its) and int(its.max()) < size and len(its.unique()) > 1


def assert_loads_whole(info: dict[str, Any]) -> None:
    """The library misses nothing in the file, and ignores nothing of it."""
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
