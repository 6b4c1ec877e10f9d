"""The user's own network, made by a function in their Python file."""

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
    """Make the user's network for a number of codes.

    Its `encode` stops before the quantizer, its `decode` starts after it. A network that holds a quantizer of
    vector-quantize-pytorch, and has no `walk` and `codebooks`, gets those.

    Args:
        spec: FILE.py:FUNCTION, or a function.
        codebook_size: The number of codes, which the function is called with.

    Raises:
        CodebookError: File or function is missing or fails, or the module has no `encode` and `decode`.
    """
    make, caller = (_function_of(spec), spec) if isinstance(spec, str) else (spec, name_of(spec))
    try:
        network = make(codebook_size=codebook_size)
    except CodebookError:
        raise
    except Exception as error:
        call = f"{caller}(codebook_size={codebook_size})"
        raise CodebookError(f"{call} failed: {type(error).__name__}: {error}") from error
    missing = [name for name in ("encode", "decode") if not callable(getattr(network, name, None))]
    if not isinstance(network, nn.Module) or missing:
        raise CodebookError(
            f"{caller} returned {type(network).__name__} without {' and '.join(missing) or 'being a torch module'}: "
            "it must be a module with encode(images) -> latents and decode(quantized) -> images"
        )
    give_walk(network)
    return network


def name_of(spec: NetworkMaker) -> str:
    """What messages call a network: FILE.py:FUNCTION, or the name of the function or of its class."""
    return spec if isinstance(spec, str) else getattr(spec, "__name__", type(spec).__name__)


def _function_of(spec: str) -> Callable[..., nn.Module]:
    """Import FUNCTION from FILE.py."""
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
    sys.path.insert(0, folder)  # as for a script: the file may import its neighbors
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the user's code: whatever it raises is theirs to read
        raise CodebookError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    make: Callable[..., nn.Module] | None = getattr(module, function, None)
    if make is None:
        raise CodebookError(f"{path} has no {function}; --network takes FILE.py:FUNCTION")
    return make
