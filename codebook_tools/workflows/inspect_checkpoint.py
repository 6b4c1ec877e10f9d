"""What a checkpoint holds, from its header, its codebooks and their counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from codebook_tools.checkpoints.detect import Detection
from codebook_tools.checkpoints.matrices import matrices
from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.evidence import alive, uninitialized, untrained
from codebook_tools.models.registry import FAMILIES, check_stated, detected, family_of
from codebook_tools.models.twins import twin_groups, twin_warning
from codebook_tools.runtime.hub_ids import title_of


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`.

    Attributes:
        model: Path of the checkpoint.
        family: Of the layout; None where the user must give a network.
        detection: Codebooks and what depends on them.
        why_not: Why the family's network cannot be run; empty where it can.
        warnings: Of what was not read, and of what other commands refuse.
        remarks: On codebooks that no training has reached.
        matrices: Keys of what a codebook may be, where none was recognized.
        alive: Codes in use by the file's own running counts, by key of the codebooks that have some.
    """

    model: str
    family: str | None
    detection: Detection
    why_not: str = ""
    warnings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    alive: Mapping[str, int] = field(default_factory=dict)
    matrices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The promised keys."""
        return {
            "family": self.family,
            "reason": self.detection.reason,
            "codebooks": [
                {name: value for name, value in asdict(book).items() if name not in ("also", "form")}
                | {"companions": list(book.companions)}
                | ({"alive": self.alive[book.key]} if book.key in self.alive else {})
                for book in self.detection.codebooks
            ],
            "elsewhere": [{"key": key, "shape": list(shape)} for key, shape in self.detection.elsewhere],
        }


def inspect_checkpoint(path: Path) -> Inspection:
    """Find the codebooks of a file or directory.

    Raises:
        CodebookError: The file is missing or unsound.
    """
    checkpoint = read_checkpoint(path)
    detection = detected(checkpoint)
    family = family_of(checkpoint) if detection.codebooks else None
    why_not = FAMILIES[family].why_not if family else ""
    warnings = (*checkpoint.warnings, *_amiss(checkpoint, detection))
    remarks = (*uninitialized(checkpoint, detection.codebooks), *untrained(checkpoint, detection.codebooks))
    living = {book.key: alive(checkpoint, book) for book in detection.codebooks}
    counted = {key: count for key, count in living.items() if count is not None}
    others = () if detection.codebooks else (*matrices(checkpoint),)
    return Inspection(title_of(path), family, detection, why_not, warnings, remarks, counted, others)


def _amiss(checkpoint: Checkpoint, detection: Detection) -> Iterator[str]:
    """What every other command would refuse, or warn of."""
    yield from (twin_warning(places, ", equal bit by bit") for places in twin_groups(checkpoint, detection.codebooks))
    try:
        check_stated(checkpoint, detection.codebooks)
    except CodebookError as error:
        yield str(error)
