"""How the codes that a model uses follow from the rows that its file stores, told from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from codebook_tools.checkpoints.detect import COUNTS, RECODE, FoundCodebook
from codebook_tools.checkpoints.entries import Shape

_SUM = re.compile(r"(^|.*[._])sum", re.IGNORECASE)
_OWN_NAME = re.compile(r"[^.]+(\.\d+)*(\.weight)?$")
_RECODER = re.compile(rf"\w*({RECODE})\w*(\.\w+)*\.weight", re.IGNORECASE)


@dataclass(frozen=True)
class Effective:
    """kind: how a stored row becomes a code of `dim` numbers; beside: the keys of the tensors that this takes.

    "rows": it is the code. "ratio": row / count, beside the counts, as in Mimi. "projected": W row + b, beside W and,
    if there is one, b, as in SimVQ and VQGAN-LC. "network": through other layers, beside their weights: we cannot.
    padding: how many rows are stored after the last code, as in RQ-VAE.
    """

    kind: Literal["rows", "ratio", "projected", "network"]
    beside: tuple[str, ...]
    dim: int
    padding: int


def effective(found: FoundCodebook, shapes: Mapping[str, Shape]) -> Effective:
    """What a model makes of the rows of `found`, in a file of these shapes."""
    padding = shapes[found.key][found.axis] - found.size
    owner, name = _OWN_NAME.sub("", found.key), found.key.removesuffix(".weight")
    counts = [key for key in found.companions if COUNTS.search(key[len(owner) :])]
    if _SUM.fullmatch(name) and counts:
        return Effective("ratio", (counts[0],), found.dim, padding)
    layers = [key for key in shapes if key.startswith(owner) and _RECODER.fullmatch(key[len(owner) :])]
    if not layers:
        return Effective("rows", (), found.dim, padding)
    weight = layers[0]
    if len(layers) > 1 or len(shapes[weight]) != 2 or shapes[weight][1] != found.dim:
        return Effective("network", tuple(layers), found.dim, padding)
    bias = weight.removesuffix("weight") + "bias"
    return Effective("projected", (weight, bias) if bias in shapes else (weight,), shapes[weight][0], padding)
