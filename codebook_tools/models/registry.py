"""All network families by name, and what they say of a checkpoint: its metric, its entry of K in the config."""

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
    recommenders,
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
    **recommenders.FAMILIES,
    **recognized_only.FAMILIES,
}
"""The first that recognizes a file counts: LlamaGen's names are those of the original Janus, too."""

CUSTOM = "custom"
"""The family name of the user's own network, or of no network."""

_Found = TypeVar("_Found")


def _once(find: Callable[[Checkpoint], _Found]) -> Callable[[Checkpoint], _Found]:
    """Memoize a function of a checkpoint in that checkpoint."""

    @wraps(find)
    def remembered(checkpoint: Checkpoint) -> _Found:
        if find.__name__ not in checkpoint.memory:
            checkpoint.memory[find.__name__] = find(checkpoint)
        return cast("_Found", checkpoint.memory[find.__name__])

    return remembered


@_once
def family_of(checkpoint: Checkpoint) -> str | None:
    """The name of the first family that recognizes tensors and config; None where there is none."""
    return next((name for name, family in FAMILIES.items() if family.prefix(checkpoint) is not None), None)


@_once
def detected(checkpoint: Checkpoint) -> Detection:
    """The codebooks of a checkpoint, with the search and the axis of its family."""
    detection, name = find_codebooks(checkpoint.shapes, checkpoint.dtypes), family_of(checkpoint)
    if name is None:
        return detection
    return replace(
        detection, codebooks=tuple(_as_used(book, FAMILIES[name], checkpoint.shapes) for book in detection.codebooks)
    )


def _as_used(book: FoundCodebook, family: Family, shapes: Shapes) -> FoundCodebook:
    if book.search == "logits":
        return book
    axis, shape = book.axis if family.axis is None else family.axis, shapes[book.key]
    if axis != book.axis:
        book = replace(book, axis=axis, size=shape[axis], dim=shape[1 - axis])
    return replace(book, search=METRICS[family.metric].search)


def metric_of(family: str | None, metric: str | None) -> Metric:
    """The metric of a name, else the family's, else the Euclidean one."""
    return METRICS[metric or (FAMILIES[family].metric if family in FAMILIES else "euclidean")]


def guessed(book: FoundCodebook, family: str | None, metric: str | None) -> list[str]:
    """A warning where neither family nor user says how codes are searched, and names do not suggest distance.

    Args:
        book: The codebook.
        family: A name of FAMILIES; None for an unknown layout.
        metric: The user's choice; None for none.
    """
    if metric is not None or family in FAMILIES or book.search == "euclidean":
        return []
    hint = "nothing says" if book.search == "unknown" else f"its names suggest {book.search}, but do not say"
    return [f"{hint} how {book.key} is searched: Euclidean distance is taken; --metric says otherwise"]


def are_unit(codes: Tensor) -> bool:
    """Whether codes (size, dim) all have unit length, as those of a cosine search mostly do."""
    return codes.shape[1] > 1 and bool(((codes.norm(dim=1) - 1).abs() <= _UNIT).all())


_UNIT = 5e-3  # which bfloat16 keeps


def unit_warning(key: str) -> str:
    """The warning where codes have unit length and nothing says how they are searched."""
    return (
        f"the codes of {key} have unit length, and nothing says how they are searched: unit codes are written, with "
        "which Euclidean and cosine search choose the same; --metric says otherwise"
    )


@dataclass(frozen=True)
class SizeEntry:
    """The entry of K in a checkpoint's config.

    Attributes:
        key: Of the entry, dots between levels.
        stated: Its value.
        power_of_two: Whether the config takes no other number.
        family: Whose config it is.
        config: The whole of it.
    """

    key: str
    stated: object
    power_of_two: bool
    family: Family
    config: Config

    def values(self, size: int) -> Mapping[str, object]:
        """The entries of a config with `size` codes, by dotted key: K, and what depends on it."""
        return {self.key: size, **self.family.follow(self.config, size)}


def size_entry(checkpoint: Checkpoint) -> SizeEntry | None:
    """The entry of K in the checkpoint's config; None without a config, or where the family has no such entry.

    The config of a part of a model has only the inner levels. Where the entry is missing, the library's default counts.
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

    One equal size is enough: TiTok's config says nothing of pixel_quantize.
    """
    entry = size_entry(checkpoint)
    if entry is None or not books or (type(entry.stated) is int and entry.stated in {book.size for book in books}):
        return
    raise CodebookError(
        f"{checkpoint.config_path} says {entry.key}={entry.stated!r}, but {books[0].key} has {books[0].size} codes: "
        "they are of two models, and one is to be mended; or it is about another codebook, which --codebook-key names"
    )
