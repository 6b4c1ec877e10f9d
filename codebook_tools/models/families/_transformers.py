"""Audio codecs of the transformers library: recognized by tensors and config, built by that library from the config."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.errors import CodebookError
from codebook_tools.models.family import Family
from codebook_tools.runtime.optional import require

if TYPE_CHECKING:
    from torch.nn import Module

CONFIG_KEY = "codebook_size"


def _prefix_of(checkpoint: Checkpoint, model_type: str, axes: Mapping[str, int]) -> str | None:
    """The empty prefix where the file has certain tensors and its config is of a type; None for another layout.

    A file without a config is recognized too, so that the user is asked for the config.
    """
    if any(len(checkpoint.shapes.get(key, ())) != count for key, count in axes.items()):
        return None
    config = checkpoint.config
    described = config is None or config.get("model_type", model_type if CONFIG_KEY in config else None) == model_type
    return "" if described else None


def _built(shapes: Shapes, checkpoint: Checkpoint, name: str, wrap: Callable[[Any], Module]) -> Module:
    """The library's model `name` for the config, with fresh weights, as the family's module.

    Raises CodebookError where there is no config or no such class, where the library refuses, and where the file's
    codebooks are not those of the config: others would pass for tensors that no network has.
    """
    network: Any = wrap(_build(checkpoint, name))
    size, patterns = network.model.config.codebook_size, {_numberless(key) for key in network.codebooks}
    stored_keys = [key for key in shapes if _numberless(key) in patterns]
    other = next((key for key in stored_keys if shapes[key][:1] != (size,)), None)
    if other is not None:
        raise CodebookError(
            f"{checkpoint.config_path} says {CONFIG_KEY}={size}, but {other} is {shapes[other]}: they are of two "
            "models; mend one"
        )
    if set(stored_keys) != set(network.codebooks):
        raise CodebookError(
            f"{checkpoint.config_path} makes {len(network.codebooks)} quantizers, but the file has the codebooks of "
            f"{len(stored_keys)}: they are of two models; mend one"
        )
    return cast("Module", network)


def _pretrained(folder: Path, name: str, wrap: Callable[[Any], Module]) -> tuple[Module, list[str], list[str]]:
    """The library's model `name` as it loads a directory, as the family's module; missing and unexpected keys."""
    import transformers

    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    return wrap(model), list(info["missing_keys"]), list(info["unexpected_keys"])


def codec(
    model_type: str,
    axes: Mapping[str, int],
    network: Callable[[], Callable[[Any], Module]],
    older: Mapping[str, str] = MappingProxyType({}),
    **more: Any,
) -> Family:
    """The record of a codec whose network is the library's own.

    Args:
        model_type: In the config; the library's class is that name, capitalized, and "Model".
        axes: Tensors that every file has, with their numbers of axes.
        network: Imports the class that makes the family's module of the library's.
        older: How parts of the library's names were written before.
        more: Further fields of the record.
    """
    name = f"{model_type.capitalize()}Model"
    return Family(
        prefix=lambda checkpoint: _prefix_of(checkpoint, model_type, axes),
        make=lambda shapes, checkpoint: _built(shapes, checkpoint, name, network()),
        file_key=lambda name, shapes: _file_key(name, shapes, older),
        config_key=CONFIG_KEY,
        pretrained=lambda folder: _pretrained(folder, name, network()),
        **more,
    )


def _numberless(key: str) -> str:
    return re.sub(r"\d+", "#", key)


def _build(checkpoint: Checkpoint, name: str) -> Any:
    config, path = checkpoint.config, checkpoint.config_path
    if config is None:
        raise CodebookError(
            f"{checkpoint.path} is a transformers {name} without its config; put that beside it, as config.json"
        )
    described, model = require(name, "transformers", "transformers", name.replace("Model", "Config"), name)
    try:
        return model(described.from_dict(dict(config)))
    except Exception as error:  # whatever the library makes of a config that is amiss
        reason = " ".join(str(error).split())
        raise CodebookError(f"transformers makes no {name} of {path}: {type(error).__name__}: {reason}") from error


def _file_key(name: str, shapes: Shapes, older: Mapping[str, str]) -> str:
    """The file's key of the tensor that the network calls `name`: the library's current name, or an older one."""
    key = name.removeprefix("model.")
    before = next((key.replace(new, old) for new, old in older.items() if new in key), key)
    return before if key not in shapes and before in shapes else key
