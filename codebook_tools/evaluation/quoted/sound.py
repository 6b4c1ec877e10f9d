"""What figures of sound have in common: one channel, and a sampling rate that a measure was made for."""

from __future__ import annotations

from abc import abstractmethod
from math import gcd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.data.audio import Waveforms
from codebook_tools.evaluation.quoted.figure import ItemMean

Wave = NDArray[np.floating[Any]]
"""(samples,) float64."""


def resampled(wave: Wave, rate: int, to: int) -> Wave:
    """A waveform at another sampling rate, by a polyphase filter."""
    if rate == to:
        return wave
    from scipy.signal import resample_poly

    divisor = gcd(rate, to)
    result: Wave = resample_poly(wave, to // divisor, rate // divisor)
    return result


class SoundMean(ItemMean):
    """A mean over clips."""

    @property
    def rate(self) -> int:
        """Sampling rate of the clips, in Hz."""
        assert isinstance(self.modality, Waveforms)
        return self.modality.rate


class SpeechMean(SoundMean):
    """A mean over clips of a measure of two waveforms in numpy. Channels are averaged before."""

    @abstractmethod
    def score(self, clip: Wave, reconstruction: Wave) -> float:
        """Of one clip (samples,) at the modality's rate; nan where the measure is not defined."""

    def scores(self, media: Tensor, reconstructed: Tensor) -> Tensor:
        pairs = zip(mono(media).numpy(), mono(reconstructed).numpy(), strict=True)
        return torch.tensor([self.score(*pair) for pair in pairs], dtype=torch.float64)


def mono(waves: Tensor) -> Tensor:
    """(n, channels, samples) as (n, samples) float64 on the CPU: the mean of the channels."""
    return waves.cpu().double().mean(1)
