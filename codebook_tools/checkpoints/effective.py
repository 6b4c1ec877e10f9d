"""How the codes that a model uses follow from stored rows: as they are, as sums over counts, or projected."""

from __future__ import annotations

import re
from collections.abc import Mapping

from codebook_tools.checkpoints.detect import COUNTS, RECODE, FoundCodebook
from codebook_tools.checkpoints.forms import Effective as Effective
from codebook_tools.checkpoints.tensors import Shape

_SUM = re.compile(r"(^|.*[._])sum", re.IGNORECASE)
_OWN_NAME = re.compile(r"[^.]+(\.\d+)*(\.weight)?$")
_RECODER = re.compile(rf"\w*({RECODE})\w*(\.\w+)*\.weight", re.IGNORECASE)


def effective(book: FoundCodebook, shapes: Mapping[str, Shape]) -> Effective:
    """What a model makes of the stored rows of a codebook.

    The answer of the model itself (`book.form`) comes first; without it, names and shapes decide.

    Args:
        book: A codebook of the file.
        shapes: Of all tensors of the file, by key.
    """
    if book.form is not None:
        return book.form
    padding = shapes[book.key][book.axis] - book.size
    owner, name = _OWN_NAME.sub("", book.key), book.key.removesuffix(".weight")
    counts = [key for key in book.companions if COUNTS.search(key[len(owner) :])]
    if _SUM.fullmatch(name) and counts:
        return Effective("ratio", (counts[0],), book.dim, padding)
    layers = [key for key in shapes if key.startswith(owner) and _RECODER.fullmatch(key[len(owner) :])]
    if not layers:
        return Effective("rows", (), book.dim, padding)
    weight = layers[0]
    if len(layers) > 1 or len(shapes[weight]) != 2 or shapes[weight][1] != book.dim:
        return Effective("network", tuple(layers), book.dim, padding)
    bias = weight.removesuffix("weight") + "bias"
    return Effective("projected", (weight, bias) if bias in shapes else (weight,), shapes[weight][0], padding)
