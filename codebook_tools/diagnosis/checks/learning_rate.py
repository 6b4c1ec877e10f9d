"""Steps that were too long: codes fell out of use at once, and the reconstructions got worse with them."""

from __future__ import annotations

from codebook_tools.diagnosis.encoder_shift import MOVED, shift, trained_on
from codebook_tools.diagnosis.evidence import BookEvidence, Evidence
from codebook_tools.diagnosis.finding import Finding, judged, not_checked, of_each_book_in, worst
from codebook_tools.diagnosis.lost_codes import LOST, lost_since, too_fast


def learning_rate(evidence: Evidence) -> Finding:
    """From a trace; and from a model with fewer codes in use, moved latents and a larger error than the original."""
    return worst([of_each_book_in(_of_book)(evidence), _of_trace(evidence)])


def _of_book(evidence: Evidence, book: BookEvidence) -> Finding:
    if book.pair is None or book.pair.latents is None or evidence.original_mse is None or evidence.mse is None:
        return not_checked(evidence.unseen or "no original to compare the model with; give it with --against")
    lost, times = lost_since(book), evidence.mse / max(evidence.original_mse, 1e-30)
    summary = f"{lost:.0%} of the codes fell out of use, and the error is {times:.2g} times the original's"
    moved = max(shift(book.pair)) > MOVED and trained_on(book)
    return Finding(judged(lost, LOST) if moved and too_fast(evidence) else "ok", lost, LOST, summary)


def _of_trace(evidence: Evidence) -> Finding:
    trace = evidence.trace
    if trace is None:
        return not_checked("no trace of the training; give it with --trace")
    summary = f"codes in use fell from {trace.start} to {trace.lowest.used}, half of that by step {trace.halfway}, and"
    summary = f"{summary} the error rose {trace.rise:.2g} times" + (f", at a rate of {trace.lr:g}" if trace.lr else "")
    at_once = trace.first is not None and trace.first.used < trace.start / 2
    return Finding(judged(trace.fall, LOST) if trace.abrupt and not at_once else "ok", trace.fall, LOST, summary)
