"""How far the latents of the same items moved between two encoders."""

from __future__ import annotations

from codebook_tools.diagnosis.evidence import BookEvidence, Pair
from codebook_tools.diagnosis.fit import variance_of
from codebook_tools.evaluation.metrics import covariance_of

KIN = 0.5
"""Correlation of the latents of two encoders of which one was trained on from the other; of strangers it is about 0,
and of one that was trained by steps far too long, too."""

MOVED = 0.25
"""Of the latents' variance, or of their covariance: an encoder that was not trained stays at 0."""


def correlation(pair: Pair) -> float:
    """Correlation of the latents of both encoders, over all dimensions.

    Returns:
        1 for the same, 0 where they have nothing in common or are of other shapes.
    """
    if pair.latents is None or pair.moved is None:
        return 0.0
    ours, theirs = (rows.double() - rows.double().mean(0) for rows in (pair.moved, pair.latents))
    return float((ours * theirs).sum() / (ours.norm() * theirs.norm()).clamp(min=1e-30))


def shift(pair: Pair) -> tuple[float, float]:
    """How far the latents moved between the encoders.

    Returns:
        The squared distance between their means, over the variance of the original's latents; and the norm of the
        difference of their covariances, over that of the original's.
    """
    assert pair.latents is not None and pair.moved is not None
    mean = (pair.moved.mean(0) - pair.latents.mean(0)).double().square().sum()
    before, after = covariance_of(pair.latents), covariance_of(pair.moved)
    return (
        float(mean) / max(variance_of(pair.latents), 1e-30),
        float((after - before).norm() / before.norm().clamp(min=1e-30)),
    )


def strangers(book: BookEvidence) -> bool:
    """Whether the codes are unrelated to the latents: far off, and the encoder is not the original, trained on."""
    if book.fit is None or book.fit.good or not book.fit.strange:
        return False
    alternative = book.explanation
    moved = book.pair is not None and correlation(book.pair) >= KIN
    return alternative is None or (alternative.name == "original" and not moved)


def trained_on(book: BookEvidence) -> bool:
    """Whether the model may be the original after a training: nothing else explains where its latents are."""
    alternative = book.explanation
    return not strangers(book) and (alternative is None or alternative.name == "original")
