"""The recipes that are compared: each changes something that the library has."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from inspect import getsource

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


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_what_a_variant_changes_is_read_where_it_is_changed(name: str) -> None:
    for where in variants.VARIANTS[name].inside:
        module, _, changed = where.partition(":")
        read = {
            node.id
            for node in ast.walk(ast.parse(getsource(import_module(f"codebook_tools.{module}"))))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        assert "." in changed or changed in read, "another module has the name by its own import"
