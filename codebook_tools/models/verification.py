"""The result of a verification, and what all of them compare: bytes of tensors, names in metadata."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.models.proof import Proof
from codebook_tools.runtime.safe_io import parse_json


@dataclass(frozen=True)
class Difference:
    """A difference between a checkpoint and what it should be.

    Attributes:
        key: Of the tensor, metadata or config.
        what: In a few words.
    """

    key: str
    what: str


@dataclass(frozen=True)
class Verification:
    """The result of a verification.

    Attributes:
        model: The checkpoint.
        against: The original.
        index_map: The index map's file.
        differences: Empty where the checkpoint is what it should be.
        proof: How it was compared with its network; None where the file alone was read.
    """

    model: str
    against: str
    index_map: str
    differences: tuple[Difference, ...]
    proof: Proof | None = None

    @property
    def ok(self) -> bool:
        """Whether there are no differences."""
        return not self.differences

    def to_json(self) -> dict[str, object]:
        """The keys of the JSON output."""
        proof = {"proof": self.proof.to_json()} if self.proof else {}
        return {"ok": self.ok, "differences": [asdict(difference) for difference in self.differences], **proof}


def listed(written: Checkpoint, entry: str) -> list[str]:
    """Names in an entry of the metadata, a JSON list or the keys of an object; none where it is neither."""
    try:
        names = parse_json(written.metadata.get(PREFIX + entry, "[]"))
    except ValueError:
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list | dict) else []


def same_bytes(a: Checkpoint, b: Checkpoint, key: str) -> bool:
    """Whether a tensor of equal length has the same bytes in two checkpoints."""
    return all(one == other for one, other in zip(a.chunks(key), b.chunks(key), strict=True))
