"""All network families by name, and what they say of a checkpoint: how it is searched, where its K stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, TypeVar, cast

from codebook_tools.checkpoints.config import Config, entry_of
from codebook_tools.checkpoints.detect import Detection, FoundCodebook, find_codebooks
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.clustering.metric import METRICS
from codebook_tools.codebook import Metric
from codebook_tools.errors import CodebookError
from codebook_tools.models.families import (
    dac,
    diffusers_vqmodel,
    encodec,
    janus,
    mimi,
    mishalaskin,
    pytorch_vae,
    recognized_only,
    rosinality,
    taming,
    xcodec,
    zalando,
)
from codebook_tools.models.family import Family

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = {
    "zalando": zalando.FAMILY,
    "mishalaskin": mishalaskin.FAMILY,
    "pytorch-vae": pytorch_vae.FAMILY,
    "rosinality": rosinality.FAMILY,
    "rosinality-2019": rosinality.FAMILY_OF_2019,
    "diffusers-vqmodel": diffusers_vqmodel.FAMILY,
    "taming": taming.FAMILY,
    **janus.FAMILIES,
    "encodec": encodec.FAMILY,
    "dac": dac.FAMILY,
    "mimi": mimi.FAMILY,
    "xcodec": xcodec.FAMILY,
    **recognized_only.FAMILIES,
}
"""Of several that recognise a file, the first counts: LlamaGen's names are those of the original Janus, too."""

CUSTOM = "custom"
"""The user's own network, or none."""

_Found = TypeVar("_Found")


def _once(find: Callable[[Checkpoint], _Found]) -> Callable[[Checkpoint], _Found]:
    """What is found out about a checkpoint is found out once, however many ask."""

    @wraps(find)
    def found(checkpoint: Checkpoint) -> _Found:
        if find.__name__ not in checkpoint.memory:
            checkpoint.memory[find.__name__] = find(checkpoint)
        return cast("_Found", checkpoint.memory[find.__name__])

    return found


@_once
def family_of(checkpoint: Checkpoint) -> str | None:
    """The first family that recognises tensors and config."""
    return next((name for name, family in FAMILIES.items() if family.prefix(checkpoint) is not None), None)


@_once
def detected(checkpoint: Checkpoint) -> Detection:
    """The codebooks of a checkpoint, searched as its family does, and along the axis that it says: a square does not
    tell which."""
    found, name = find_codebooks(checkpoint.shapes, checkpoint.dtypes), family_of(checkpoint)
    if name is None:
        return found
    return replace(
        found, codebooks=tuple(_as_used(book, FAMILIES[name], checkpoint.shapes) for book in found.codebooks)
    )


def _as_used(found: FoundCodebook, family: Family, shapes: Shapes) -> FoundCodebook:
    if found.search == "logits":
        return found
    axis, shape = found.axis if family.axis is None else family.axis, shapes[found.key]
    if axis != found.axis:
        found = replace(found, axis=axis, size=shape[axis], dim=shape[1 - axis])
    return replace(found, search=METRICS[family.metric].search)


def metric_of(family: str | None, metric: str | None) -> Metric:
    """That of a name, else the family's, else the Euclidean one."""
    return METRICS[metric or (FAMILIES[family].metric if family in FAMILIES else "euclidean")]


def guessed(found: FoundCodebook, family: str | None, metric: str | None) -> list[str]:
    """What to warn of where nobody says how the codes are searched, and their names do not speak for distance."""
    if metric is not None or family in FAMILIES or found.search == "euclidean":
        return []
    told = "nothing says" if found.search == "unknown" else f"its names suggest {found.search}, but do not say"
    return [f"{told} how {found.key} is searched: Euclidean distance is taken; --metric says otherwise"]


def are_unit(codes: Tensor) -> bool:
    """Whether codes (size, dim) all have unit length, as those of a cosine search mostly do."""
    return codes.shape[1] > 1 and bool(((codes.norm(dim=1) - 1).abs() <= _UNIT).all())


_UNIT = 5e-3  # which bfloat16 keeps


def unit_warning(key: str) -> str:
    """What to warn of where codes have unit length and nobody says how they are searched."""
    return (
        f"the codes of {key} have unit length, and nothing says how they are searched: unit codes are written, with "
        "which Euclidean and cosine search choose the same; --metric says otherwise"
    )


@dataclass(frozen=True)
class SizeEntry:
    """How the config that goes with a checkpoint knows K. key: its entry, dots between levels. stated: what it says.
    power_of_two: whether it takes no other number."""

    key: str
    stated: object
    power_of_two: bool
    family: Family
    config: Config

    def values(self, size: int) -> Mapping[str, object]:
        """What the config says of `size` codes: all entries that follow, by dotted key."""
        return {self.key: size, **self.family.follow(self.config, size)}


def size_entry(checkpoint: Checkpoint) -> SizeEntry | None:
    """Where K stands in the checkpoint's config; None without a config, or where its family knows of no entry.

    A part of a model has the entries of its own level alone: levels that the config lacks are left out. An entry that
    is missing is none, unless the library has a default for it.
    """
    name = family_of(checkpoint)
    family = FAMILIES[name] if name else None
    if family is None or family.config_key is None or checkpoint.config is None:
        return None  # in this order: a config beside a file of another family may be anyone's, and is not read
    config = checkpoint.config
    levels = family.config_key.split(".")
    for start in range(len(levels)):
        key = ".".join(levels[start:])
        stated = entry_of(config, key)
        if stated is not None:
            return SizeEntry(key, stated, family.power_of_two, family, config)
    if family.default_size is None:
        return None
    return SizeEntry(levels[-1], family.default_size, family.power_of_two, family, config)


def check_stated(checkpoint: Checkpoint, books: Sequence[FoundCodebook]) -> None:
    """Raise CodebookError where the config says a K that none of the codebooks has.

    Of several codebooks it may be about one alone: TiTok's config says nothing of pixel_quantize.
    """
    entry = size_entry(checkpoint)
    if entry is None or not books or (type(entry.stated) is int and entry.stated in {book.size for book in books}):
        return
    raise CodebookError(
        f"{checkpoint.config_path} says {entry.key}={entry.stated!r}, but {books[0].key} has {books[0].size} codes: "
        "they are of two models, and one is to be mended; or it is about another codebook, which --codebook-key names"
    )
