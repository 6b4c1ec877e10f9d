"""The centroids were never installed: codes are as an initialization drew them, or are not the new ones."""

from __future__ import annotations

from codebook_tools.diagnosis.evidence import FEW_HITS, BookEvidence, Evidence
from codebook_tools.diagnosis.explained_by import NO_KMEANS
from codebook_tools.diagnosis.finding import Finding, judged, not_checked, of_each_book_in, worst
from codebook_tools.diagnosis.initialization import born_dead
from codebook_tools.models.initialization import drawn

BORN = 0.25
"""Share of the codes that are still as drawn: a surgery leaves none."""

COLLAPSED = 0.5
"""Share of the codes in use at step 0, below which a surgery did not arrive."""


def not_installed(evidence: Evidence) -> Finding:
    """From the codes in the file, and from the first evaluation of a trace."""
    finding = of_each_book_in(_of_book)(evidence)
    return worst([finding, _of_trace(evidence)])


def _of_book(evidence: Evidence, book: BookEvidence) -> Finding:
    operated, size = evidence.operated(book), book.codebook.size
    born = int(born_dead(book.codebook.vectors, book.dead).sum())
    summary = f"{born} of {size} codes lie around zero as an initialization draws them"
    alternative = book.explanation
    if operated and book.fit and not book.fit.good and alternative is None and drawn(book.codebook.vectors):
        times = (book.codebook.vectors.square().sum(1).mean() / book.latents.square().sum(1).mean()).sqrt()
        summary = f"{book.fit.summary}; the codes look drawn at random, {float(times):.2g} times as long as the latents"
        return Finding("found", book.fit.misfit, 1.0, summary)
    if operated and not book.filling and book.counted and born > BORN * size:
        return Finding("found", born / size, BORN, summary)
    if book.fit is None:
        return not_checked(NO_KMEANS)
    if alternative and alternative.name == "companions":
        summary = f"{book.fit.summary}; {alternative.what} have {alternative.fit.ratio:.2g} times"
        return Finding("found", book.fit.misfit, 1.0, summary)
    if not operated and born > BORN * size:
        summary = f"{summary}, and nothing shows that a surgery was to replace them"
    return Finding("ok", born / size, BORN, summary)


def _of_trace(evidence: Evidence) -> Finding:
    trace = evidence.trace
    if trace is None or not trace.operated:
        return not_checked("no trace of a surgery")
    size = trace.size or sum(book.codebook.size for book in evidence.books)
    summary = f"{trace.start} of {size} codes are in use before the first step of the training"
    lost, most = 1 - trace.start / size, max(evaluation.used for evaluation in trace.history)
    # A small validation split cannot use many codes: its first evaluation is then compared with its best one.
    few = trace.latents is not None and trace.latents < FEW_HITS * size
    low = trace.start < COLLAPSED * (most if few else size)
    return Finding(judged(lost, 1 - COLLAPSED) if low else "ok", lost, 1 - COLLAPSED, summary)
