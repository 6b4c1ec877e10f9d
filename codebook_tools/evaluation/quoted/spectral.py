"""Distances of spectrograms over several windows, as descript-audio-codec measures them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from codebook_tools.evaluation.quoted.sound import SoundMean
from codebook_tools.runtime.optional import require

WINDOWS = (2048, 512)
"""Samples of each Hann window; a hop is a quarter of it."""

BANDS = (150, 80)
"""Mel bands for each window."""

LOWEST = 1e-5
"""Of a magnitude, before its logarithm."""


class STFTDistance(SoundMean):
    """Mean absolute difference of magnitudes plus that of log10 of their squares, summed over WINDOWS.

    At the model's rate. It is not defined for clips under half of the longest window.
    """

    def scores(self, media: Tensor, reconstructed: Tensor) -> Tensor:
        if media.shape[-1] <= max(WINDOWS) // 2:  # the ends are mirrored
            return torch.full((len(media),), torch.nan)
        total = torch.zeros(len(media), dtype=torch.float64)
        for i, window in enumerate(WINDOWS):
            ours, theirs = (self.reduced(magnitudes(waves, window), i) for waves in (media, reconstructed))
            logs = [of.clamp(min=LOWEST).square().log10() for of in (ours, theirs)]
            for one, other in ((ours, theirs), logs):
                total += (one - other).abs().flatten(1).mean(1)
        return total

    def reduced(self, spectra: Tensor, window: int) -> Tensor:
        """What is compared of spectra (n, channels, frequencies, frames). window: index in WINDOWS."""
        return spectra


class MelDistance(STFTDistance):
    """The same of mel bands: triangles of equal area on Slaney's scale, from 0 Hz to half of the rate."""

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        (bank,) = require(f"--metrics {self.name}", "audio", "transformers.audio_utils", "mel_filter_bank")
        rate, scale = self.rate, "slaney"
        with warnings.catch_warnings(action="ignore"):  # of bands between two frequencies, which are 0 here as there
            self._banks: Sequence[Tensor] = [
                torch.from_numpy(bank(1 + window // 2, bands, 0.0, rate / 2, rate, norm=scale, mel_scale=scale))
                for window, bands in zip(WINDOWS, BANDS, strict=True)
            ]

    def reduced(self, spectra: Tensor, window: int) -> Tensor:
        return torch.einsum("ncft,fm->ncmt", spectra, self._banks[window])


def magnitudes(waves: Tensor, window: int) -> Tensor:
    """(n, channels, frequencies, frames) float64: the absolute values of a short-time Fourier transform, on the CPU."""
    flat = waves.cpu().double().flatten(0, 1)
    spectra = torch.stft(flat, window, window // 4, window=_hann(window), center=True, return_complex=True)
    return torch.as_tensor(spectra.abs().reshape(*waves.shape[:2], *spectra.shape[1:]))


@cache
def _hann(window: int) -> Tensor:
    return torch.hann_window(window, dtype=torch.float64)
