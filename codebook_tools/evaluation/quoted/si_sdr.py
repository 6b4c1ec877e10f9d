"""SI-SDR (Le Roux et al. 2019): energy of the waveform over that of its error at the best scale, by torchmetrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from codebook_tools.evaluation.quoted.figure import ItemMean
from codebook_tools.runtime.optional import require


class SISDR(ItemMean):
    """In dB, of each channel around its mean; a clip's is the mean over channels. It is not defined for silence."""

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        (self._si_sdr,) = require(
            f"--metrics {self.name}",
            "quality",
            "torchmetrics.functional.audio",
            "scale_invariant_signal_distortion_ratio",
        )

    def scores(self, media: Tensor, reconstructed: Tensor) -> Tensor:
        media, reconstructed = media.cpu().double(), reconstructed.cpu().double()
        values: Tensor = self._si_sdr(reconstructed, media, zero_mean=True)
        silent = (media - media.mean(-1, keepdim=True)).square().sum(-1) == 0
        return values.masked_fill(silent, torch.nan).nanmean(1)
