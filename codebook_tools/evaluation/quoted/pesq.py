"""PESQ (ITU-T P.862.2): predicted opinion of speech quality, by the package pesq."""

from __future__ import annotations

from typing import Any

from codebook_tools.evaluation.quoted.sound import SpeechMean, Wave, resampled
from codebook_tools.runtime.optional import require

WIDE, NARROW = 16_000, 8_000
"""Hz; what the standard is made for."""


class PESQ(SpeechMean):
    """Wide-band at 16 kHz, or narrow-band at 8 kHz where the model's rate is below 16 kHz.

    It is not defined for clips under a quarter of a second, and for clips in which no speech is detected.
    """

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        self._pesq = require(f"--metrics {self.name}", "quality", "pesq")

    def score(self, clip: Wave, reconstruction: Wave) -> float:
        rate = self.rate
        to, mode = (WIDE, "wb") if rate >= WIDE else (NARROW, "nb")
        pair = [resampled(wave, rate, to) for wave in (clip, reconstruction)]
        if not all(wave.any() for wave in pair):  # pesq divides by the peak
            return float("nan")
        try:
            return float(self._pesq.pesq(to, *pair, mode))
        except (self._pesq.NoUtterancesError, self._pesq.BufferTooShortError):
            return float("nan")
