"""rFID (Heusel et al. 2017): the Fréchet distance of Inception features of images and of their reconstructions."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from codebook_tools.checkpoints.hashing import file_sha256
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.evaluation.one_pass import Batch
from codebook_tools.evaluation.quoted.figure import QuotedFigure
from codebook_tools.evaluation.quoted.lpips import in_color
from codebook_tools.evaluation.quoted.tally import Tally, moments_of
from codebook_tools.evaluation.quoted.weights import tensors_of
from codebook_tools.models.model import Model
from codebook_tools.runtime.optional import require

Features = Callable[[Tensor], Tensor]
"""(n, 3, height, width) uint8 -> (n, dim)."""

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


def inception(path: Path, option: str) -> torch.nn.Module:
    """TensorFlow's Inception of 2015 up to its pool, as torchmetrics takes it from torch-fidelity: (n, 2048) features.

    Args:
        path: Of its weights.
        option: What asked for it, for messages.

    Raises:
        CodebookError: A library is missing, or the file holds other weights.
    """
    require(option, "perceptual", "torch_fidelity")
    fid = require(option, "perceptual", "torchmetrics.image.fid")
    state = io.BytesIO()
    torch.save(tensors_of(path), state)  # torch-fidelity unpickles, and a file of the user's may hold code
    state.seek(0)
    try:
        with torch.random.fork_rng():
            made = fid.NoTrainInceptionV3("inception-v3-compat", ["2048"], state)
    except (KeyError, RuntimeError) as error:
        raise CodebookError(
            f"{option}: no weights of torch-fidelity's Inception ({shorten(one_line(error), 150)}); the file is {URL}"
        ) from error
    assert isinstance(made, torch.nn.Module)
    return made.requires_grad_(False)


class RFID(QuotedFigure):
    """Of images as they are measured, rounded to 8 bits as a file would hold them; Inception resizes to 299 pixels."""

    def __init__(self, *of: Any, features: Features | None = None) -> None:
        """features: in place of Inception's."""
        super().__init__(*of)
        if features is None:
            option = f"--metrics {self.name}"
            path = of[2].find("torch-fidelity's Inception", URL)
            self.sha256 = file_sha256(path)
            features = inception(path, f"{option}={path}").to(self.device)
        self._features = features

    def tally(self, batch: Batch, model: Model) -> Tally:
        assert batch.media is not None
        moments = []
        for images in batch.media:
            stored = (in_color(images).to(self.device) * 255).round().to(torch.uint8)
            moments.append(moments_of(self._features(stored)))
        return Tally(count=len(batch.items), moments=torch.stack(moments))
