"""The outcome of a check: a verdict, the number behind it, its limit, and the repair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from codebook_tools.diagnosis.evidence import BookEvidence, Evidence

Verdict = Literal["ok", "suspicious", "found", "not-checked"]

_WORSE = ("not-checked", "ok", "suspicious", "found")


@dataclass(frozen=True)
class Finding:
    """The outcome of a check for one codebook, or for all.

    Attributes:
        verdict: How sure it is.
        value: That is compared with the limit, free of scale; None where nothing was measured.
        limit: Of the value; None where there is none.
        evidence: The numbers behind it, in one line.
    """

    verdict: Verdict
    value: float | None
    limit: float | None
    evidence: str


@dataclass(frozen=True)
class Check(Finding):
    """A finding under its name.

    Attributes:
        name: Of the cause.
        fix: The command that repairs it, in one line.
    """

    name: str
    fix: str

    def to_json(self) -> dict[str, object]:
        """The promised keys, of numbers that json can write."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


CheckFunction = Callable[[Evidence], Finding]


def judged(value: float, limit: float, doubtful: float | None = None) -> Verdict:
    """Found above the limit, suspicious above `doubtful`, else ok."""
    if value > limit:
        return "found"
    return "suspicious" if doubtful is not None and value > doubtful else "ok"


def not_checked(why: str) -> Finding:
    """A finding without a number. why: in one line."""
    return Finding("not-checked", None, None, why)


def worst(findings: Iterable[Finding]) -> Finding:
    """The worst of several, the first among equals."""
    return max(findings, key=lambda finding: _WORSE.index(finding.verdict))


def of_each_book(look: Callable[[BookEvidence], Finding]) -> CheckFunction:
    """A check of every codebook: the worst finding; of several codebooks it says which."""

    def looked(evidence: Evidence) -> Finding:
        findings = [look(book) for book in evidence.books]
        return worst(findings) if len(findings) == 1 else worst(_named(evidence.books, findings))

    return looked


def of_each_book_in(look: Callable[[Evidence, BookEvidence], Finding]) -> CheckFunction:
    """As `of_each_book`, for a check that also needs what is known of the whole model."""
    return lambda evidence: of_each_book(lambda book: look(evidence, book))(evidence)


def _named(books: Sequence[BookEvidence], findings: Sequence[Finding]) -> Iterable[Finding]:
    for book, finding in zip(books, findings, strict=True):
        yield Finding(finding.verdict, finding.value, finding.limit, f"{book.key}: {finding.evidence}")
