"""Files of torch.save: tensors are mapped rather than read, and no code in the file is ever run.

Harmless objects beside the tensors are read as stand-ins: see `stand_ins`.
"""

from __future__ import annotations

import contextlib
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.stand_ins import allowed, own_classes
from codebook_tools.checkpoints.tensors import Entry, InMemory, Weights, can_hold
from codebook_tools.errors import CodebookError

WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "params_ema", "params", "ema", "net", "generator",
)  # fmt: skip
"""Names under which a state dict is saved beside other things, the preferred ones first."""

_DEPTH = 4
"""Mappings within each other that are searched for tensors."""
_REFUSED = re.compile(r"GLOBAL ((?:\w+\.)*\w+)|(?:global|class|function) ((?:\w+\.)+\w+)")
"""How torch names a global that it refuses; the second form is that of `builtins`."""
_LONGEST_SCANNED = 16 << 20
"""Bytes of a pickle that are searched for names; that of ten thousand tensors has 2 MB."""
_LEGACY_PICKLES = 4
"""Pickles in a file of torch before 1.6 up to the saved object: magic number, version, system, object."""
_LONGEST_REPEATED = 64 << 20
"""Bytes up to which a tensor may be larger than its storage, as masks and constants are that were expanded. Weights are
not, and a tiny file could otherwise claim any size."""


def read_pickle(path: Path) -> Weights:
    """Read the state dict in a file of torch.save, which may be wrapped in other mappings.

    A wrapper is a name of WRAPPERS; or, beside scalars, the only mapping that holds tensors.

    Raises:
        CodebookError: The file holds anything but plain data, no state dict, several between which the names do not
            decide, or a tensor that safetensors cannot hold.
        OSError: It cannot be read.
    """
    prefix, state, left_behind = _unwrapped(path, load_object(path))
    entries = dict[str, Entry]()
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            entries[key] = InMemory(key, _plain(path, key, value))
        else:
            left_behind.append(f"{prefix}{key}")
    return Weights((path,), entries, {}, tuple(left_behind))


class _RefusedError(CodebookError):
    """The file asks for a class or function that is not allowed."""


def load_object(path: Path) -> object:
    """The saved object, with stand-ins for harmless objects; tensors are mapped into memory where the file allows it.

    Raises:
        CodebookError: The file is damaged, or asks for code.
        OSError: It cannot be read.
    """
    try:
        return _attempt(path)
    except _RefusedError as refused:  # the class may be an enum of the file's own config
        own = own_classes(_names_in(path))
        if not own:
            raise
        try:
            return _attempt(path, own)
        except _RefusedError:
            raise
        except CodebookError:  # it is not used as an enum is; the first error names it
            raise refused from None


def _attempt(path: Path, own: Iterable[str] = ()) -> object:
    """Load the file; own: names of classes that are read as enums."""
    try:
        with allowed(own), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our errors say the same in one line
            # a file that is no zip cannot be mapped, so it is read whole
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=_is_zipped(path))
    except OSError:
        raise
    except Exception as error:  # on a damaged file the unpickler raises errors of any class
        raise _why_not(path, str(error)) from error


def _is_zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _names_in(path: Path) -> list[str]:
    """Dotted names of the globals in a file's pickle, as far as it can be parsed.

    They only choose which stand-ins are offered: whatever is misread here, torch gives no other globals.
    """
    names = []
    with path.open("rb") as file, contextlib.suppress(Exception):  # of a damaged file torch has reported the error
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
    """The error for a file that torch does not load, from the message of torch."""
    refused = _REFUSED.search(error)
    if refused:
        return _RefusedError(
            f"{path} wants {refused[1] or refused[2]}, more than tensors: it was refused, and nothing of it was run; "
            "where you trust its origin, load it with its own code and save model.state_dict() alone"
        )
    if "TorchScript" in error:
        program = "is a TorchScript program, which is not run; save torch.jit.load(...).state_dict() instead"
        return CodebookError(f"{path} {program}")
    names = _members(path)
    if names and not any(name.endswith("data.pkl") for name in names):
        what = "arrays of numpy" if all(name.endswith(".npy") for name in names) else "files that torch did not write"
        return CodebookError(f"{path} is an archive of {what}, and no checkpoint; give the file of the weights")
    reason = " ".join(error.rpartition("WeightsUnpickler error: ")[2].split())
    return CodebookError(f"{path} is no sound PyTorch file ({reason[:100] or 'it ends too early'}); fetch it again")


def _unwrapped(path: Path, content: object) -> tuple[str, dict[object, object], list[str]]:
    """The dotted prefix of the state dict, the state dict, and dotted names of what lies beside the way to it."""
    prefix, left_behind, answers = "", list[str](), dict[tuple[int, int], bool]()
    for _ in range(_DEPTH):
        if not isinstance(content, dict):
            break
        inside = [name for name, value in content.items() if isinstance(name, str) and _holds_tensors(value, answers)]
        known = [name for name in WRAPPERS if name in inside]
        own = [value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)]
        if not known and (any(value.ndim for value in own) or (own and not inside)):
            return prefix, content, left_behind
        if not known and len(inside) > 1:
            several = f"{path} holds {len(inside)} state dicts ({', '.join(inside[:4])})"
            raise CodebookError(f"{several}, none called {WRAPPERS[0]}; save the one meant alone")
        if not inside:
            break
        wrapper = (known or inside)[0]
        left_behind += [f"{prefix}{name}" for name in content if name != wrapper]
        prefix, content = f"{prefix}{wrapper}.", content[wrapper]
    raise CodebookError(f"{path} holds no tensors by name; save model.state_dict() with torch.save, or as safetensors")


def _holds_tensors(content: object, answers: dict[tuple[int, int], bool], depth: int = _DEPTH) -> bool:
    """Whether it is a mapping with tensors by name (an optimizer numbers them) in it or in mappings below.

    answers: By id of the mapping and depth, since a file may hold one mapping under any number of names.
    """
    if not isinstance(content, dict) or depth == 0:
        return False
    question = id(content), depth
    if question not in answers:
        answers[question] = any(
            isinstance(name, str) and (isinstance(value, Tensor) or _holds_tensors(value, answers, depth - 1))
            for name, value in content.items()
        )
    return answers[question]


def _plain(path: Path, key: str, value: Tensor) -> Tensor:
    """A tensor's plain numbers. Raises CodebookError where safetensors cannot hold it, or not in a sane size."""
    value = Tensor.detach(value)  # drops the attributes of a parameter, which could shadow methods
    if value.layout != torch.strided or value.is_nested or value.is_meta or not can_hold(value.dtype):
        kind = f"{value.layout} of {value.dtype} on {value.device}".replace("torch.", "")
        raise CodebookError(f"{key} in {path} is {kind}, which safetensors cannot hold; save it as a plain tensor")
    nbytes, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if nbytes > max(_LONGEST_REPEATED, stored):
        raise CodebookError(
            f"{key} in {path} repeats {stored:,} bytes to {nbytes:,}, as expand() does; save what it repeats"
        )
    return value.resolve_conj().resolve_neg()


def _members(path: Path) -> list[str]:
    """Names of the files in a zip archive; empty for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return []
