"""Codes of another length than the latents: few of them are ever the nearest, and the others never move."""

from __future__ import annotations

from codebook_tools.diagnosis.checks.not_installed import BORN
from codebook_tools.diagnosis.evidence import BookEvidence
from codebook_tools.diagnosis.explained_by import explained_by
from codebook_tools.diagnosis.finding import Finding
from codebook_tools.diagnosis.initialization import born_dead


def scale_mismatch(book: BookEvidence) -> Finding:
    """Found where the same codes, longer or shorter, fit; and where many codes are dead since their initialization."""
    return explained_by(book, "scale", _length_of_dead(book))


def _length_of_dead(book: BookEvidence) -> Finding:
    born = born_dead(book.codebook.vectors, book.dead)
    share, count = int(born.sum()) / book.codebook.size, int(born.sum())
    if count and book.counted and not book.filling:
        length = (book.codebook.vectors[born].square().sum(1).mean() / book.latents.square().sum(1).mean()).sqrt()
        summary = (
            f"{count} of {book.codebook.size} codes are dead and lie where an initialization drew them, "
            f"{float(length):.2g} times as long as latents"
        )
        return Finding("found" if share > BORN else "suspicious", share, BORN, summary)
    chosen = book.codebook.vectors[book.codes]
    times = float((chosen.square().sum(1).mean() / book.latents.square().sum(1).mean().clamp(min=1e-30)).sqrt())
    return Finding("ok", times, None, f"the codes that are chosen are {times:.2g} times as long as their latents")
