"""Snapshots of an unfinished run: one safetensors file beside the output, and resuming from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from codebook_tools.checkpoints.safetensors_file import read_safetensors
from codebook_tools.checkpoints.sealed_file import SEAL, Sealed
from codebook_tools.checkpoints.write import maps_sha256, write_tensors
from codebook_tools.errors import CodebookError
from codebook_tools.runtime import distributed
from codebook_tools.runtime.safe_io import parse_json
from codebook_tools.training.state import State, Tensors, TracePoint, joined, part


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run up to its last evaluation.

    Attributes:
        training: What `Trainer.load` takes.
        trace: All evaluations.
        best: The best state so far; None where there is none yet.
        begun_with: Hash of the state at step 0.
    """

    training: Tensors
    trace: tuple[TracePoint, ...]
    best: State | None
    begun_with: str

    def check(self, start: State, path: Path) -> None:
        """Raise CodebookError where this run starts with other weights or codes than the run of the snapshot did."""
        if maps_sha256(start.tensors()) != self.begun_with:
            raise CodebookError(
                f"{path} began with other weights or codes than there are now, whatever the reason; --force begins anew"
            )


@dataclass(frozen=True)
class SnapshotFile:
    """Where a run's snapshot is written, and whether to resume from it. Rank 0 writes, and all processes read.

    Attributes:
        path: The file, written atomically at each evaluation step and removed when the result is written.
        made_with: All that the run depends on, as JSON takes it.
        resume: Whether to go on from the file where it exists.
    """

    path: Path
    made_with: Mapping[str, object]
    resume: bool = False

    def write(
        self, training: Mapping[str, Tensor], trace: Sequence[TracePoint], start: State, best: State | None
    ) -> None:
        """Write a snapshot: the trainer's state, the trace, the hash of the start, and the best state."""
        about = {
            "made_with": json.dumps(self.made_with, default=str),
            "trace": json.dumps([asdict(point) for point in trace]),
            "begun_with": maps_sha256(start.tensors()),
            "best": str(best.step) if best else "none",
        }
        tensors = joined({"training": training, "best": best.tensors() if best else {}})
        distributed.by_first(lambda: write_tensors(self.path, tensors, about, force=True))

    def read(self) -> Snapshot | None:
        """Read the snapshot.

        Returns:
            The snapshot; None where there is none, or the run is not to be resumed.

        Raises:
            CodebookError: It is of another run, or the file is damaged.
        """
        if not self.resume or not distributed.of_first(self.path.exists()):
            return None
        weights = read_safetensors(self.path)
        if SEAL not in weights.metadata:
            raise CodebookError(f"{self.path} is no unfinished fine-tuning; move it away")
        mend = "--force without --resume begins anew"
        tensors = Sealed(self.path, weights.entries, weights.metadata, mend).tensors()
        try:
            about = {name: weights.metadata[name] for name in ("made_with", "trace", "begun_with", "best")}
        except KeyError as error:
            raise CodebookError(f"{self.path} is no unfinished fine-tuning: it has no {error}; move it away") from error
        try:
            made_with = dict(parse_json(about["made_with"]))
            trace = tuple(TracePoint(**point) for point in parse_json(about["trace"]))
            if not trace or not all(type(point.step) is int for point in trace):
                raise ValueError("it has no trace")
            at_best = [point for point in trace if str(point.step) == about["best"]]
            best = State.of_tensors(at_best[0], part(tensors, "best")) if at_best else None
        except (ValueError, TypeError, KeyError) as error:
            raise CodebookError(f"{self.path} is damaged ({error}); {mend}") from error
        self._check(made_with)
        return Snapshot(part(tensors, "training"), trace, best, about["begun_with"])

    def _check(self, theirs: Mapping[str, object]) -> None:
        ours = json.loads(json.dumps(self.made_with, default=str))
        for name in (*ours, *theirs):
            was, now = (str(of.get(name, "not there"))[:60] for of in (theirs, ours))
            if theirs.get(name) != ours.get(name):
                raise CodebookError(
                    f"{self.path} is of another fine-tuning: {name} was {was}, and is {now}; --resume needs the same, "
                    "--force without it begins anew"
                )

    def remove(self) -> None:
        """Delete the file, on rank 0, where it exists."""
        distributed.by_first(lambda: self.path.unlink(missing_ok=True))
