"""The codes are centroids, but of the latents of another encoder than the one beside them."""

from __future__ import annotations

import torch

from codebook_tools.diagnosis.check import Finding, not_checked
from codebook_tools.diagnosis.evidence import BookEvidence
from codebook_tools.diagnosis.freshness import drawn
from codebook_tools.diagnosis.movement import KIN, correlation


def wrong_encoder(book: BookEvidence) -> Finding:
    """Found where the codes fit the original's latents, and the model's have nothing to do with those; and without an
    original, where nothing else explains codes that fit no latents of this encoder, yet are no noise."""
    if book.fit is None:
        return not_checked("codes searched by the dot product have no k-means to be held against")
    rival, fit = book.explanation, book.fit
    if rival and rival.name == "original" and book.pair and correlation(book.pair) < KIN:
        told = f"{fit.told}; on the original's latents, which correlate with these by {correlation(book.pair):.2f}, "
        return Finding("found", fit.misfit, 1.0, f"{told}{rival.fit.ratio:.2g} times")
    if not fit.good and rival is None and not drawn(book.codebook.vectors):
        same = book.pair is not None and book.pair.latents is not None and torch.equal(*_both(book))
        whose = "the original's encoder is this one, so they" if same else "they"
        return Finding("found", fit.misfit, 1.0, f"{fit.told}; the codes are no noise: {whose} are of other latents")
    return Finding("ok", fit.misfit, 1.0, fit.told)


def _both(book: BookEvidence) -> tuple[torch.Tensor, torch.Tensor]:
    assert book.pair is not None and book.pair.latents is not None and book.pair.moved is not None
    return book.pair.latents, book.pair.moved
