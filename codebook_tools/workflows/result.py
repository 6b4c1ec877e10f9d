"""What an operation ends in: its result, where that goes, and what the written file says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.layout import DECLARED, training_path
from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.codebook import Strategy
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.figures import Measurement
from codebook_tools.models.choose import layouts
from codebook_tools.models.output import check_output, check_size, default_output
from codebook_tools.models.proof import Proof
from codebook_tools.runtime import distributed
from codebook_tools.runtime.version import VERSION
from codebook_tools.training.finetune import FineTune, FineTuned, TracePoint
from codebook_tools.workflows.gallery import Shown
from codebook_tools.workflows.request import Request


@dataclass(frozen=True)
class Result:
    """What was done: the JSON of a command. before, surgery, finetuned: measured on the test data, None where there is
    no such stage. kept: the stage that the written file holds. outputs: paths. bytes: of weights, and what a codebook
    that was rounded to few bits would pack to. seconds: by phase. shown: for a page, not in the JSON. proof: how the
    figures were held against the model that loads the file."""

    command: str
    model: str
    family: str
    settings: Mapping[str, object]
    seed: int
    warnings: tuple[str, ...]
    before: Measurement | None
    surgery: Measurement | None = None
    finetuned: Measurement | None = None
    kept: str | None = None
    trace: tuple[TracePoint, ...] = ()
    outputs: Mapping[str, str | None] = field(default_factory=lambda: dict.fromkeys(("model", "index_map", "report")))
    bytes: Mapping[str, int | None] = field(default_factory=lambda: dict.fromkeys(("before", "after")))
    seconds: Mapping[str, float] = field(default_factory=dict)
    version: str = VERSION
    shown: tuple[Shown, ...] = ()
    proof: Proof | None = None

    @property
    def stages(self) -> dict[str, Measurement | None]:
        return {"before": self.before, "surgery": self.surgery, "finetuned": self.finetuned}

    @property
    def kept_stage(self) -> Measurement | None:
        """Of what the written file holds; None where nothing was measured."""
        return self.stages[self.kept or "before"]

    def to_json(self) -> dict[str, object]:
        """The promised keys, of types that json can write."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in _NOT_PLAIN}
        stages = {name: stage.to_json() if stage else None for name, stage in self.stages.items()}
        proof = self.proof.to_json() if self.proof else None
        return {
            **plain,
            "proof": proof,
            "warnings": list(self.warnings),
            "stages": stages,
            "trace": [asdict(p) for p in self.trace],
        }


_NOT_PLAIN = ("before", "surgery", "finetuned", "shown", "proof")


def check_request_output(request: Request, command: str, size: int | None) -> Path:
    """Where the result goes. Raises CodebookError where that cannot be written, has no layout that is, or would replace
    the model; and where the model's config refuses `size` codes (None or 0: not known yet). The first process looks."""
    return distributed.by_first(lambda: _checked_output(request, command, size))


def _checked_output(request: Request, command: str, size: int | None) -> Path:
    checkpoint = request.checkpoint
    check_size(checkpoint, size)
    output = request_output(request, command, size or 0)
    check_output(checkpoint, output, request.force, request.read)
    unfinished = training_path(output)
    if unfinished.exists() and not (request.resume or request.force):
        raise CodebookError(f"{unfinished} is of an interrupted run: --resume goes on from it, --force begins anew")
    return output


def asked_size(strategy: Strategy | None, old: int) -> int | None:
    """Codes that there will be, where that is known before anything is counted. old: without a strategy, as many."""
    asked: int | None = getattr(strategy, "k", None) or getattr(strategy, "keep", None)
    return asked if strategy else old


def request_output(request: Request, command: str, size: int) -> Path:
    """The one asked for, or one beside the model; the bundled demo's goes into the current folder."""
    if request.output is not None:
        return request.output
    folder = None if request.model else Path()
    return default_output(request.checkpoint, command, size, folder)


def weights_bytes(path: Path) -> int:
    """Size of a model's weights."""
    return read_checkpoint(path).nbytes


def settings_of(thing: Strategy | FineTune | None) -> dict[str, object]:
    """The printed fields of a dataclass."""
    if thing is None or not is_dataclass(thing):
        return {}
    return {entry.name: getattr(thing, entry.name) for entry in fields(thing) if entry.repr}


def provenance(
    command: str,
    request: Request,
    checkpoint: Checkpoint,
    sizes: Mapping[str, int],
    settings: Mapping[str, object],
    kept: str,
    tuned: FineTuned | None = None,
    books: Sequence[FoundCodebook] = (),
) -> dict[str, str]:
    """What the written file says of itself: no times and no paths, so that the same work gives the same bytes.

    sizes: new codes by codebook key, in the order of the stages. books: where those lie in the original.
    """
    private = {"data", "test_data", "stats", "latents", "images", "device", "network"}
    public = {name: value for name, value in settings.items() if name not in private}
    if public.get("perceptual"):
        public["perceptual"] = True  # wherever the weights lay
    trained = tuned if kept == "finetuned" else None
    declared = {DECLARED: json.dumps(checkpoint.declared, sort_keys=True)} if checkpoint.declared else {}
    turned = layouts(checkpoint, books)
    return {
        **declared,
        **({"layouts": json.dumps(turned, sort_keys=True)} if turned else {}),
        "command": command,
        "version": VERSION,
        "settings": json.dumps({**public, "seed": request.seed}, sort_keys=True),
        "codebooks": json.dumps(sizes),
        "kept": kept,
        "trained": ",".join(trained.groups) if trained else "",
        "trained_tensors": json.dumps(trained.trained if trained else []),
        "source_sha256": checkpoint.sha256,
    }
