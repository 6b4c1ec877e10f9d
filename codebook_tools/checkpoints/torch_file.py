"""Files of torch.save: their tensors alone, mapped rather than read, and nothing in them is ever run.

Harmless objects beside the tensors are read as stand-ins: see `stand_ins`.
"""

from __future__ import annotations

import contextlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.stand_ins import allowed, own_classes
from codebook_tools.checkpoints.tensors import Held, Weights, can_hold
from codebook_tools.errors import CodebookError

WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "params_ema", "params", "ema", "net", "generator",
)  # fmt: skip
"""Names under which people save a state dict beside other things: the first that holds tensors is it."""

_DEPTH = 4
_REFUSED = re.compile(r"GLOBAL ((?:\w+\.)*\w+)|(?:global|class|function) ((?:\w+\.)+\w+)")
"""What torch says of a global that it does not let a pickle have; of one in `builtins` without that."""
_LONGEST_SCANNED = 16 << 20
"""Bytes of a pickle that are gone through for the names in it; one of ten thousand tensors has 2 MB."""
_LEGACY_PICKLES = 4
"""In files of torch before 1.6: magic number, version, system, and the object that was saved."""
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


class _RefusedError(CodebookError):
    """The file wants a class or function that it does not get."""


def _load(path: Path) -> object:
    """What the file holds, with stand-ins for harmless objects."""
    try:
        return _attempt(path)
    except _RefusedError as refused:  # which may be an enum of its own config
        own = own_classes(_names_in(path))
        if not own:
            raise
        try:
            return _attempt(path, own)
        except _RefusedError:
            raise
        except CodebookError:  # not in the form of an enum: the first attempt has its name
            raise refused from None


def _attempt(path: Path, own: Iterable[str] = ()) -> object:
    try:
        with allowed(own), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of such files is said better below
            # files that are no zip are read whole: they cannot be mapped
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=_is_zipped(path))
    except OSError:
        raise
    except Exception as error:  # a file that is not sound makes the unpickler fail in any way
        raise _why_not(path, str(error)) from error


def _is_zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _names_in(path: Path) -> list[str]:
    """Dotted names of the globals in a file's pickle, as far as it can be followed.

    They say which stand-ins to offer and nothing more: whatever is read wrong here, torch gives no other globals.
    """
    names = []
    with path.open("rb") as file, contextlib.suppress(Exception):  # a damaged file: torch says what is wrong
        if _is_zipped(path):
            with zipfile.ZipFile(file) as archive:
                (member,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
                pickles, count = archive.open(member).read(_LONGEST_SCANNED), 1
        else:
            pickles, count = file.read(_LONGEST_SCANNED), _LEGACY_PICKLES
        stream = BytesIO(pickles)
        for _ in range(count):
            names += [str(name).replace(" ", ".") for op, name, _ in pickletools.genops(stream) if op.name == "GLOBAL"]
    return names


def _why_not(path: Path, error: str) -> CodebookError:
    refused = _REFUSED.search(error)
    if refused:
        return _RefusedError(
            f"{path} wants {refused[1] or refused[2]}, more than tensors: it was refused, and nothing of it was run; "
            "where you trust its origin, load it with its own code and save model.state_dict() alone"
        )
    if "TorchScript" in error:
        program = "is a TorchScript program, which is not run; save torch.jit.load(...).state_dict() instead"
        return CodebookError(f"{path} {program}")
    told = " ".join(error.rpartition("WeightsUnpickler error: ")[2].split())
    return CodebookError(f"{path} is no sound PyTorch file ({told[:100] or 'it ends too early'}); fetch it again")


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
