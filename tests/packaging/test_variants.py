"""The recipes that are compared: each changes something that the library has."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import torch
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


def test_the_rotation_trick_by_hand() -> None:
    latents = torch.tensor([[2.0, 0.0]], requires_grad=True)
    quantized = torch.tensor([[0.0, 3.0]])
    rotated = variants.rotation(latents, quantized)
    torch.testing.assert_close(rotated, quantized)
    rotated.backward(torch.tensor([[0.0, 1.0]]))
    # A gradient along the code becomes one along the latent, 3 / 2 times as long.
    torch.testing.assert_close(latents.grad, torch.tensor([[1.5, 0.0]]))
