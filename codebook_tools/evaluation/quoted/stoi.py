"""STOI (Taal et al. 2011): short-time objective intelligibility of speech, by the package pystoi."""

from __future__ import annotations

import warnings
from typing import Any

from codebook_tools.evaluation.quoted.sound import SpeechMean, Wave
from codebook_tools.runtime.optional import require

SHORTEST = 0.2
"""Seconds below which pystoi has no frame to begin with; it needs 0.4 of them, without silence."""


class STOI(SpeechMean):
    """At 10 kHz, to which pystoi resamples. It is not defined for clips with under 0.4 seconds that are not silent."""

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        (self._stoi,) = require(f"--metrics {self.name}", "quality", "pystoi", "stoi")

    def score(self, clip: Wave, reconstruction: Wave) -> float:
        if not clip.any() or len(clip) < SHORTEST * self.rate:
            return float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                return float(self._stoi(clip, reconstruction, self.rate))
            except RuntimeWarning:  # in place of which it would return 1e-5
                return float("nan")
