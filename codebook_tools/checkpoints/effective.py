"""How the codes that a model uses follow from the rows that its file stores."""

from __future__ import annotations

import re
from collections.abc import Mapping

from codebook_tools.checkpoints.detect import COUNTS, RECODE, FoundCodebook
from codebook_tools.checkpoints.forms import Effective as Effective
from codebook_tools.checkpoints.tensors import Shape

_SUM = re.compile(r"(^|.*[._])sum", re.IGNORECASE)
_OWN_NAME = re.compile(r"[^.]+(\.\d+)*(\.weight)?$")
_RECODER = re.compile(rf"\w*({RECODE})\w*(\.\w+)*\.weight", re.IGNORECASE)


def effective(found: FoundCodebook, shapes: Mapping[str, Shape]) -> Effective:
    """What a model makes of the rows of `found`, in a file of these shapes: as it was asked, else by names and shapes
    alone."""
    if found.form is not None:
        return found.form
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
