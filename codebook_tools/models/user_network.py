"""The user's own network, made by a function in their Python file: the one place where code that is not ours runs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from codebook_tools.errors import CodebookError
from codebook_tools.models.networks.vector_quantize_pytorch import give_walk

NetworkMaker = str | Callable[..., nn.Module]
"""FILE.py:FUNCTION, or a function: called with codebook_size=K, it returns a module for so many codes."""


def make_network(spec: NetworkMaker, codebook_size: int) -> nn.Module:
    """The module for so many codes that a function returns.

    Its `encode` stops before the quantiser, its `decode` starts after it. Where it has no `walk` and `codebooks`, and
    holds a quantiser of vector-quantize-pytorch, it gets those.
    Raises CodebookError where file or function is missing or fails, or the module has no `encode` and `decode`.
    """
    make, told = (_function_of(spec), spec) if isinstance(spec, str) else (spec, name_of(spec))
    try:
        network = make(codebook_size=codebook_size)
    except CodebookError:
        raise
    except Exception as error:
        raise CodebookError(f"{told}(codebook_size={codebook_size}) failed: {type(error).__name__}: {error}") from error
    missing = [name for name in ("encode", "decode") if not callable(getattr(network, name, None))]
    if not isinstance(network, nn.Module) or missing:
        raise CodebookError(
            f"{told} returned {type(network).__name__} without {' and '.join(missing) or 'being a torch module'}: "
            "it must be a module with encode(images) -> latents and decode(quantised) -> images"
        )
    give_walk(network)
    return network


def name_of(spec: NetworkMaker) -> str:
    return spec if isinstance(spec, str) else getattr(spec, "__name__", type(spec).__name__)


def _function_of(spec: str) -> Callable[..., nn.Module]:
    """What is called FUNCTION in FILE.py."""
    file, colon, function = spec.rpartition(":")
    if not colon or not file:
        raise CodebookError(f"--network {spec}: expected FILE.py:FUNCTION")
    path = Path(file)
    if not path.is_file():
        raise CodebookError(f"no such network file: {path}")
    module_spec = importlib.util.spec_from_file_location(f"codebook_network_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise CodebookError(f"{path} is no Python file; --network takes FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickles look their module up there
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # as for a script: the file may import its neighbours
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the user's code: whatever it raises is theirs to read
        raise CodebookError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    make: Callable[..., nn.Module] | None = getattr(module, function, None)
    if make is None:
        raise CodebookError(f"{path} has no {function}; --network takes FILE.py:FUNCTION")
    return make
