"""Running sums that are not those of the codes: the first step of training puts other codes in their place."""

from __future__ import annotations

from codebook_tools.diagnosis.evidence import BookEvidence, Evidence
from codebook_tools.diagnosis.finding import Finding, judged, not_checked, of_each_book, worst

APART = 0.1
"""Squared distance from a code to what its sums stand for, of the variance of the codes in use: rounding stays far
below, sums of other codes are at 1 and more."""

STALE, SOME = 0.1, 0.0
"""Shares of the codes in use."""

KEPT = 0.5
"""Share of the codes in use that the first step of a training leaves."""


def stale_ema(evidence: Evidence) -> Finding:
    """From the sums in the file, and from a trace whose first step emptied the codebook."""
    return worst([of_each_book(_of_book)(evidence), _of_trace(evidence)])


def _of_book(book: BookEvidence) -> Finding:
    state, alternative = book.companions, book.explanation
    if state.unlike:
        summary = (
            f"{state.unlike[0]} follows the codebook in the original, and does not have its {book.codebook.size} codes"
        )
        return Finding("found", None, None, summary)
    if state.unknown:
        return not_checked(state.unknown)
    used = ~book.dead
    if state.moved is None or not bool(used.any()):
        return not_checked("no running sums beside the codebook")
    rows = book.codebook.vectors[used].double()
    spread = float((rows - rows.mean(0)).square().sum(1).mean()) or float(rows.square().sum(1).mean())
    stale = ~(state.moved[used] <= APART * spread)
    share, count = float(stale.double().mean()), int(stale.sum())
    summary = f"the running sums of {count} of the {int(used.sum())} codes in use stand for other codes"
    if alternative and alternative.name == "companions":
        return Finding("ok", share, STALE, f"{summary}, and it is the sums that fit the latents")
    return Finding(judged(share, STALE, SOME), share, STALE, summary)


def _of_trace(evidence: Evidence) -> Finding:
    trace = evidence.trace
    if trace is None or trace.first is None:
        return not_checked("no trace with a step 1")
    lost = 1 - trace.first.used / max(trace.start, 1)
    summary = f"{trace.start} codes in use before the first step of the training, {trace.first.used} after it"
    return Finding(judged(lost, 1 - KEPT), lost, 1 - KEPT, summary)
