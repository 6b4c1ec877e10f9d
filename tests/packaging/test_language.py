"""Text that users read is in American spelling; what scripts rely on keeps its letters."""

from __future__ import annotations

import ast
import re

import pytest
from places import ROOT

pytestmark = pytest.mark.packaging

BRITISH = re.compile(r"quantis|neighbour|colour|initialis|normalis|centre\b|\bgrey\b|behaviour|favour|looks without")
PROMISES = {"neighbours", "uninitialised-flag", "quantiser "}
"""A key of JSON, a check of `diagnose`, and the beginning of a key in snapshots of fine-tunings."""


def test_texts_are_in_american_spelling() -> None:
    british = []
    for file in [*ROOT.glob("codebook_tools/**/*.py"), *ROOT.glob("cli/**/*.py")]:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            text = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
            text = text.replace("\n        neighbours: ", "") if isinstance(text, str) else None  # as an attribute
            if isinstance(text, str) and BRITISH.search(text) and text not in PROMISES and "html" not in file.parts:
                british.append(f"{file.relative_to(ROOT)}:{node.lineno} {BRITISH.search(text)[0]}")
    assert british == []
