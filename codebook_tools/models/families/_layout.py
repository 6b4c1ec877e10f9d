"""Recognition of a layout by its names, and whether a network has all layers of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.errors import CodebookError

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True)
class Signature:
    """How a layout's files are recognized, behind any prefix.

    Attributes:
        has: Names of tensors in every file.
        lacks: Beginnings of names that no file has.
    """

    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()

    def prefix(self, checkpoint: Checkpoint) -> str | None:
        """The shortest prefix of the layout's names ("", "first_stage_model."); None for another layout.

        The shortest, for a copy of a model (its moving average) has a longer one.
        """
        keys, first = checkpoint.entries.keys(), self.has[0]
        prefixes = (key.removesuffix(first) for key in keys if key == first or key.endswith(f".{first}"))
        return min((prefix for prefix in prefixes if self._fits(prefix, keys)), key=len, default=None)

    def _fits(self, prefix: str, keys: Iterable[str]) -> bool:
        inner = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        return set(self.has) <= set(inner) and not any(key.startswith(self.lacks) for key in inner)


def count(shapes: Shapes, place: str) -> int:
    """How many numbered modules are direct children of `place`, such as "encoder.down"."""
    below = (key.removeprefix(f"{place}.") for key in shapes if key.startswith(f"{place}."))
    return len({name.partition(".")[0] for name in below})


def check_whole(
    network: Module, shapes: Shapes, file_key: Callable[[str, Shapes], str], path: Path, library: str
) -> None:
    """Check that encoder, decoder and the layers between them and the codes are the network's.

    Tensors that a network lacks are copied to the result: an extra layer in the file would silently not be run.

    Args:
        network: As built for the file.
        shapes: Of the file's tensors, by key without prefix.
        file_key: As in Family.
        path: The file, for the message.
        library: The network's, for the message.

    Raises:
        CodebookError: A layer is missing, extra, or of another shape.
    """
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    stored = {key: _squeezed(shape) for key, shape in shapes.items() if key.startswith(parts)}
    wanted = {file_key(name, shapes): _squeezed(tensor.shape) for name, tensor in network.state_dict().items()}
    wanted = {key: shape for key, shape in wanted.items() if key.startswith(parts)}
    unlike = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    if unlike:
        key, more = unlike[0], f" and {len(unlike) - 1} more" if len(unlike) > 1 else ""
        raise CodebookError(
            f"{library}, which is to run {path}, cannot be built like it: {key}{more} would be "
            f"{wanted.get(key, 'missing')}, not {stored.get(key, 'missing')}; give your network with --network "
            "FILE.py:FUNCTION"
        )


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(length for length in shape if length > 1)
