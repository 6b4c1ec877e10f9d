"""Weights of the networks that figures are measured with: a file, or what torch's cache holds. None is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError


@dataclass(frozen=True)
class Weights:
    """Where the weights of a figure's network are.

    Attributes:
        name: Of the figure.
        file: As the user named it; None for torch's cache.
    """

    name: str
    file: Path | None

    def find(self, what: str, url: str) -> Path:
        """The file.

        Args:
            what: Which weights, in words.
            url: Where they are published; its last part is the file's name in the cache.

        Raises:
            CodebookError: There is none.
        """
        if self.file is not None:
            if not self.file.is_file():
                raise CodebookError(f"--metrics {self.name}={self.file}: there is no such file of {what}")
            return self.file
        cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not cached.is_file():
            raise CodebookError(
                f"--metrics {self.name} needs {what}: fetch {url} into {cached.parent}, "
                f"or name the file with {self.name}=FILE"
            )
        return cached


def tensors_of(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file by name, read without running any code in it.

    Args:
        path: .safetensors or .pth.
        prefix: Of the names that are read.

    Raises:
        CodebookError: It cannot be read.
    """
    stored = read_checkpoint(path)
    return {name: stored.tensor(name) for name in stored.entries if name.startswith(prefix)}
