"""Files of torch.save: their tensors alone, mapped rather than read, and nothing in them is ever run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.entries import Held, Weights, can_hold
from codebook_tools.errors import CodebookError

WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "params_ema", "params", "ema", "net", "generator",
)  # fmt: skip
"""Names under which people save a state dict beside other things: the first that holds tensors is it."""

_DEPTH = 4
_REFUSED = re.compile(r"(?:GLOBAL|global|class|function) ((?:\w+\.)+\w+)")
"""What torch says of a global that it does not let a pickle have."""
_LONGEST_REPEATED = 64 << 20
"""Bytes of a tensor that a file need not hold so many of: masks and constants are expanded, and saved so; no weights
are, and a file of nothing could claim any size."""


def read_pickle(path: Path) -> Weights:
    """The state dict in a file of torch.save, out of its wrappers. Raises CodebookError for all that is not plain data.

    A wrapper is a name of WRAPPERS; or, beside scalars, the only mapping that holds tensors.
    """
    found = _load(path)
    names, state = _unwrapped(path, found)
    left = [*_siblings(found, names)]
    prefix = "".join(f"{name}." for name in names)
    entries = {}
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            entries[key] = Held(key, _plain(path, key, value))
        else:
            left.append(f"{prefix}{key}")
    return Weights((path,), {**entries}, {}, tuple(left))


def _load(path: Path) -> object:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"  # older files are read whole: they cannot be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of such files is said better below
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except OSError:
        raise
    except Exception as error:  # a file that is not sound makes the unpickler fail in any way
        raise CodebookError(f"{path} {_why_not(str(error))}") from error


def _why_not(error: str) -> str:
    refused = _REFUSED.search(error)
    if refused:
        return (
            f"wants {refused[1]}, more than tensors: it was refused, and nothing of it was run; where you trust "
            "its origin, load it with its own code and save model.state_dict() alone"
        )
    if "TorchScript" in error:
        return "is a TorchScript program, which is not run; save torch.jit.load(...).state_dict() instead"
    told = " ".join(error.rpartition("WeightsUnpickler error: ")[2].split())
    return f"is no sound PyTorch file ({told[:100] or 'it ends too early'}); fetch it again"


def _unwrapped(path: Path, found: object) -> tuple[list[str], dict[object, object]]:
    """The names that lead to the state dict, and the state dict."""
    names, answers = list[str](), dict[tuple[int, int], bool]()
    while isinstance(found, dict) and len(names) < _DEPTH:
        inside = [name for name, value in found.items() if isinstance(name, str) and _holds_tensors(value, answers)]
        known = [name for name in WRAPPERS if name in inside]
        own = [value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)]
        if not known and (any(value.ndim for value in own) or (own and not inside)):
            return names, found
        if not known and len(inside) > 1:
            several = f"{path} holds {len(inside)} state dicts ({', '.join(inside[:4])})"
            raise CodebookError(f"{several}, none called {WRAPPERS[0]}; save the one meant alone")
        if not inside:
            break
        names.append((known or inside)[0])
        found = found[names[-1]]
    raise CodebookError(f"{path} holds no tensors by name; save model.state_dict() with torch.save, or as safetensors")


def _holds_tensors(found: object, answers: dict[tuple[int, int], bool], depth: int = _DEPTH) -> bool:
    """Whether it is a mapping with tensors in it, or in mappings below; by name, as an optimiser's numbers are not.

    answers: given so far, by mapping and depth, since one mapping may stand in a file under any number of names.
    """
    if not isinstance(found, dict) or depth == 0:
        return False
    asked = id(found), depth
    if asked not in answers:
        answers[asked] = any(
            isinstance(name, str) and (isinstance(value, Tensor) or _holds_tensors(value, answers, depth - 1))
            for name, value in found.items()
        )
    return answers[asked]


def _siblings(found: object, names: list[str]) -> Iterator[str]:
    """What stands beside the way to the state dict, by dotted name."""
    prefix = ""
    for name in names:
        assert isinstance(found, dict)
        yield from (f"{prefix}{other}" for other in found if other != name)
        prefix, found = f"{prefix}{name}.", found[name]


def _plain(path: Path, key: str, value: Tensor) -> Tensor:
    """A tensor's plain numbers. Raises CodebookError where safetensors has no form for it, or none that is sane."""
    value = Tensor.detach(value)  # without the attributes of a parameter, which may bear the names of methods
    if value.layout != torch.strided or value.is_nested or value.is_meta or not can_hold(value.dtype):
        kind = f"{value.layout} of {value.dtype} on {value.device}".replace("torch.", "")
        raise CodebookError(f"{key} in {path} is {kind}, which safetensors cannot hold; save it as a plain tensor")
    whole, kept = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if whole > max(_LONGEST_REPEATED, kept):
        raise CodebookError(
            f"{key} in {path} repeats {kept:,} bytes to {whole:,}, as expand() does; save what it repeats"
        )
    return value.resolve_conj().resolve_neg()
