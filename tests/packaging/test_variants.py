"""The recipes that are compared: each changes something that the library has."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
from places import BENCHMARKS

pytestmark = pytest.mark.packaging

sys.path.append(str(BENCHMARKS))
variants = import_module("variants")


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_what_a_variant_changes_is_there_and_comes_back(name: str) -> None:
    before, variant = dict(variants._library()), variants.VARIANTS[name]
    if variant.before is None:
        with variant.in_place(None, 0):  # raises AttributeError where the library has no such name any more
            changed = {where for where, value in dict(variants._library()).items() if value != before[where]}
            assert changed <= set(variant.inside)
    assert dict(variants._library()) == before
