"""What a verification finds, and what every one asks: which bytes are the original's, which names the metadata say."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.models.proof import Proof
from codebook_tools.runtime.safe_io import parse_json


@dataclass(frozen=True)
class Difference:
    """key: the tensor, metadata or config that is not as it must be. what: how, in a few words."""

    key: str
    what: str


@dataclass(frozen=True)
class Verification:
    """differences: empty where the checkpoint is what it says it is. proof: how it was held against its network, None
    where the file alone was looked at."""

    model: str
    against: str
    index_map: str
    differences: tuple[Difference, ...]
    proof: Proof | None = None

    @property
    def ok(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, object]:
        """The promised keys."""
        proof = {"proof": self.proof.to_json()} if self.proof else {}
        return {"ok": self.ok, "differences": [asdict(difference) for difference in self.differences], **proof}


def listed(written: Checkpoint, entry: str) -> list[str]:
    """Names in the metadata, a list of them or the keys of an object; none where it is neither."""
    try:
        names = parse_json(written.metadata.get(PREFIX + entry, "[]"))
    except ValueError:
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list | dict) else []


def same_bytes(a: Checkpoint, b: Checkpoint, key: str) -> bool:
    return all(one == other for one, other in zip(a.chunks(key), b.chunks(key), strict=True))
