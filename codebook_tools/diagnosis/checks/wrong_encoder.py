"""The codes are centroids, but of the latents of another encoder than the one beside them."""

from __future__ import annotations

from codebook_tools.diagnosis.encoder_shift import correlation, strangers
from codebook_tools.diagnosis.evidence import BookEvidence, Evidence
from codebook_tools.diagnosis.explained_by import NO_KMEANS
from codebook_tools.diagnosis.finding import Finding, Verdict, not_checked
from codebook_tools.diagnosis.initialization import untrained


def wrong_encoder(evidence: Evidence, book: BookEvidence) -> Finding:
    """Found where codes that are no noise fit no latents of this encoder, and a surgery may have put them there.

    They may fit the original's latents, if this encoder is unrelated to it. Suspicious where they are off by less.
    """
    fit, alternative = book.fit, book.explanation
    if fit is None:
        return not_checked(NO_KMEANS)
    noise = untrained(book.codebook.vectors, book.dead)
    if fit.good or noise or (alternative and alternative.name != "original"):
        return Finding("ok", fit.misfit, 1.0, fit.summary)
    if alternative and book.pair:
        kin = f"on the original's latents, which correlate with these by {correlation(book.pair):.2f}"
        summary = f"{fit.summary}; {kin}, {alternative.fit.ratio:.2g} times"
    else:
        summary = f"{fit.summary}; the codes are no noise: they are of other latents"
    # All stages have one encoder, and the first meets its latents as they are.
    foreign = strangers(book) and (book is evidence.books[0] or strangers(evidence.books[0]))
    verdict: Verdict = "found" if foreign else "ok" if alternative else "suspicious"
    if verdict == "found" and not (evidence.operated(book) or book.pair):
        verdict, summary = "suspicious", f"{summary}, or the encoder left them in its training"
    return Finding(verdict, fit.misfit, 1.0, summary)
