"""The words that a page explains, each below the part where it first stands."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from codebook_tools.evaluation.terms import TERMS
from codebook_tools.strategies import STRATEGIES

_SPELLINGS = {
    "latents": "latents?",
    "assignments": "assignments?",
    "codes used": "used",
    "coverage": "cover(?:age)?",
    "bits per token": "bits",
    "principal components": "principal components?",
    "test data": "test (?:data|images?|items?|latents?)",
    "K": "(?-i:K)",
    "refit": "re-?fit",
}
"""How a term is matched where it is not the word or its plural."""


def explanations(texts: Iterable[str]) -> list[dict[str, str]]:
    """Explain each term once.

    Args:
        texts: Of the parts of a page, from top to bottom.

    Returns:
        For each text, the lines by term: of those in the text, and of those in these lines, without those of
        earlier texts.
    """
    known = set[str]()
    result = []
    for text in texts:
        lines = {term: line for term, line in _lines_in(text).items() if term not in known}
        known |= lines.keys()
        result.append(lines)
    return result


def _lines_in(text: str) -> dict[str, str]:
    """The lines of a text's terms, and of the terms in these lines."""
    lines: dict[str, str] = {}
    while (more := {term: line for term, line in _lines().items() if _pattern(term).search(text)}) != lines:
        lines, text = more, " ".join([text, *more.values()])
    return lines


@cache
def _lines() -> dict[str, str]:
    """TERMS, and the strategies that are commands."""
    summaries = {name: getattr(made, "summary", "") for name, made in STRATEGIES.items()}
    firsts = {name: line.partition(". ")[0].removeprefix("Re-Fit: ").rstrip(".") for name, line in summaries.items()}
    return TERMS | {name: f"strategy: {line[0].lower()}{line[1:]}" for name, line in firsts.items() if line}


@cache
def _pattern(term: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w/.-]){_SPELLINGS.get(term, re.escape(term) + 's?')}(?![\w/-])", re.IGNORECASE)
