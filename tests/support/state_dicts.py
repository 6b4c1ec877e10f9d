"""State dicts as names and shapes, as published code makes them: layouts/, a tensor a line, repeats left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from places import SHARED

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Answer = dict[str, tuple[int, int, int, int]]
"""key -> size, dim, axis, heads."""

_LAYOUTS_JSON = SHARED / "data" / "layouts.json"
SURVEY: dict[str, Any] = json.loads(_LAYOUTS_JSON.read_text()) if _LAYOUTS_JSON.exists() else {}
"""Tensors, as shapes by key, and codebooks of state dicts by name, where the survey lies beside the repository."""

surveyed = pytest.mark.skipif(not SURVEY, reason="../shared/data/layouts.json is absent")


@dataclass(frozen=True)
class StateDict:
    """said: how codes are searched and, if so, "low" confidence; or a word of the reason why there is no codebook."""

    name: str
    said: list[str]
    shapes: Shapes
    codebooks: Answer


def convs(prefix: str = "", latent: int = 64, width: int = 128) -> Shapes:
    """The encoder and decoder of a plain convolutional autoencoder of images."""
    return {
        f"{prefix}encoder.conv_in.weight": (width, 3, 3, 3),
        f"{prefix}encoder.conv_in.bias": (width,),
        f"{prefix}encoder.conv_out.weight": (latent, width, 3, 3),
        f"{prefix}encoder.conv_out.bias": (latent,),
        f"{prefix}decoder.conv_in.weight": (width, latent, 3, 3),
        f"{prefix}decoder.conv_in.bias": (width,),
        f"{prefix}decoder.conv_out.weight": (3, width, 3, 3),
        f"{prefix}decoder.conv_out.bias": (3,),
    }


def read_layouts(name: str) -> list[StateDict]:
    """Of layouts/NAME.txt: a block is a name, what is said of it, and lines `KEY SHAPE [-> SIZE DIM AXIS HEADS]`.

    `{0-3}` in a key stands for four keys; `-` is the shape of a scalar; `@convs PREFIX LATENT WIDTH` for those above.
    """
    text = (Path(__file__).parent / "layouts" / f"{name}.txt").read_text()
    return [_state_dict(*block.splitlines()) for block in text.strip().split("\n\n")]


def _state_dict(title: str, *lines: str) -> StateDict:
    name, *said = title.split("; ")
    shapes, codebooks = Shapes(), Answer()
    for line in lines:
        tensor, _, found = line.partition(" -> ")
        pattern, *lengths = tensor.split()
        if pattern == "@convs":
            prefix, latent, width = lengths
            shapes |= convs(prefix.strip("-"), int(latent), int(width))
            continue
        for key in _keys(pattern):
            shapes[key] = tuple(int(length) for length in lengths if length != "-")
            if found:
                size, dim, axis, heads = map(int, found.split())
                codebooks[key] = size, dim, axis, heads
    return StateDict(name, said, shapes, codebooks)


def _keys(pattern: str) -> Iterator[str]:
    before, first, last, after = re.fullmatch(r"([^{]*)(?:\{(\d+)-(\d+)\}(.*))?", pattern).groups()  # type: ignore[union-attr]
    if not first:
        yield before
        return
    for number in range(int(first), int(last) + 1):
        yield from (f"{before}{number}{rest}" for rest in _keys(after))
