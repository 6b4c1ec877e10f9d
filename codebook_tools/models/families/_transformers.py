"""Models of the transformers library: recognised by tensors and config, and built by that library from the config."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.errors import CodebookError

if TYPE_CHECKING:
    from torch.nn import Module

CONFIG_KEY = "codebook_size"


def prefix_of(checkpoint: Checkpoint, model_type: str, axes: Mapping[str, int]) -> str | None:
    """The empty prefix where the file has tensors of so many axes and its config is of that type, None otherwise.

    A file without a config is recognised too, so that it is the config that is asked for.
    """
    if any(len(checkpoint.shapes.get(key, ())) != count for key, count in axes.items()):
        return None
    config = checkpoint.config
    described = config is None or config.get("model_type", model_type if CONFIG_KEY in config else None) == model_type
    return "" if described else None


def built(shapes: Shapes, checkpoint: Checkpoint, name: str, wrap: Callable[[Any], Module]) -> Module:
    """The library's own model `name` after the config, with fresh weights, as the family's module.

    Raises CodebookError where there is no config or no such class, where the library refuses, and where the file's
    codebooks are not those that the config makes: weights beyond these would pass for tensors that nobody knows.
    """
    network: Any = wrap(_build(checkpoint, name))
    size, patterns = network.model.config.codebook_size, {_numberless(key) for key in network.codebooks}
    held = [key for key in shapes if _numberless(key) in patterns]
    other = next((key for key in held if shapes[key][:1] != (size,)), None)
    if other is not None:
        raise CodebookError(
            f"{checkpoint.config_path} says {CONFIG_KEY}={size}, but {other} is {shapes[other]}: they are of two "
            "models; mend one"
        )
    if set(held) != set(network.codebooks):
        raise CodebookError(
            f"{checkpoint.config_path} makes {len(network.codebooks)} quantisers, but the file has the codebooks of "
            f"{len(held)}: they are of two models; mend one"
        )
    return cast("Module", network)


def pretrained(folder: Path, name: str, wrap: Callable[[Any], Module]) -> tuple[Module, list[str], list[str]]:
    """The library's own model `name` as it loads a directory, as the family's module, with the keys that it missed and
    those that it did not expect."""
    import transformers

    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    return wrap(model), list(info["missing_keys"]), list(info["unexpected_keys"])


def _numberless(key: str) -> str:
    return re.sub(r"\d+", "#", key)


def _build(checkpoint: Checkpoint, name: str) -> Any:
    config, path = checkpoint.config, checkpoint.config_path
    if config is None:
        raise CodebookError(
            f"{checkpoint.path} is a transformers {name} without its config; put that beside it, as config.json"
        )
    try:
        import transformers

        described, model = getattr(transformers, name.replace("Model", "Config")), getattr(transformers, name)
    except (ImportError, RuntimeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise CodebookError(
            f"{name} is built by the transformers library: {reason}; pip install -U transformers"
        ) from error
    try:
        return model(described.from_dict(dict(config)))
    except Exception as error:  # whatever the library makes of a config that is amiss
        reason = " ".join(str(error).split())
        raise CodebookError(f"transformers makes no {name} of {path}: {type(error).__name__}: {reason}") from error


def file_key(name: str, shapes: Shapes, older: Mapping[str, str]) -> str:
    """The key under which the file holds what the network calls `name`: the library's own, or an older one of it.

    older: how a part of a name was written before.
    """
    key = name.removeprefix("model.")
    before = next((key.replace(new, old) for new, old in older.items() if new in key), key)
    return before if key not in shapes and before in shapes else key
