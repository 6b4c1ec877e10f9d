"""The encoder moved away from the codes, gradually, while it trained."""

from __future__ import annotations

from codebook_tools.diagnosis.encoder_shift import MOVED, shift, trained_on
from codebook_tools.diagnosis.evidence import BookEvidence, Evidence
from codebook_tools.diagnosis.finding import Finding, judged, not_checked, of_each_book_in, worst
from codebook_tools.diagnosis.lost_codes import LOST, lost_since, too_fast


def encoder_drift(evidence: Evidence) -> Finding:
    """From the latents of the same items by both encoders, and from a trace.

    In a trace, codes fell out of use slowly, while the error did not rise.
    """
    return worst([of_each_book_in(_of_book)(evidence), _of_trace(evidence)])


def _of_book(evidence: Evidence, book: BookEvidence) -> Finding:
    pair = book.pair
    if pair is None or pair.latents is None:
        return not_checked(evidence.unseen or "no original to compare the latents with; give it with --against")
    mean, covariance = shift(pair)
    moved = max(mean, covariance)
    summary = (
        f"since the original the latents' mean moved by {mean:.2g} of their variance, "
        f"their covariance by {covariance:.2g}"
    )
    if not trained_on(book) or too_fast(evidence):
        return Finding("ok", moved, MOVED, summary)
    if book.fit and book.explanation:
        return Finding("found", book.fit.misfit, 1.0, f"{summary}; the codes fit them as they were")
    lost = lost_since(book)
    if lost > LOST and moved > MOVED:
        return Finding("found", moved, MOVED, f"{summary}; {lost:.0%} of the codes fell out of use")
    return Finding("ok", moved, MOVED, summary)


def _of_trace(evidence: Evidence) -> Finding:
    trace = evidence.trace
    if trace is None:
        return not_checked("no trace of the training; give it with --trace")
    summary = f"codes in use fell from {trace.start} to {trace.lowest.used} by step {trace.lowest.step}"
    if trace.fall <= LOST:
        return Finding("ok", trace.fall, LOST, summary)
    early = trace.first is not None and trace.first.used < trace.start * (1 - LOST)
    return Finding(judged(trace.fall, LOST) if not (early or trace.abrupt) else "ok", trace.fall, LOST, summary)
