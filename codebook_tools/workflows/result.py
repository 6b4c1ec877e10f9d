"""The result of a command, the path of its output, and the metadata of the written file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from codebook_tools.checkpoints.layout import (
    CARD,
    DECLARED,
    index_map_path,
    is_directory_output,
    own_card_path,
    own_config_path,
    training_path,
)
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.codebook import Strategy
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.beam import BeamGain
from codebook_tools.evaluation.figures import Measurement
from codebook_tools.evaluation.model_card import has_card
from codebook_tools.models.choose import layouts
from codebook_tools.models.output import check_output, check_size, default_output
from codebook_tools.models.proof import Proof
from codebook_tools.runtime import distributed
from codebook_tools.runtime.hub_ids import copy_of
from codebook_tools.runtime.hub_upload import Place, check_place, committed
from codebook_tools.runtime.progress import Watch
from codebook_tools.runtime.version import VERSION
from codebook_tools.training.finetune import FineTune, FineTuned, TracePoint
from codebook_tools.workflows.gallery import GalleryImage
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.target import Target


@dataclass(frozen=True, kw_only=True)
class ResultHeader:
    """What the result of every command says of itself.

    Attributes:
        command: As the command line has it.
        model: Path of the model.
        family: Of the model's layout, or "custom".
        settings: All that was asked for, chosen or detected.
        seed: Of everything that was drawn.
        warnings: A line each.
        outputs: Paths of what was written, by what it is.
        seconds: By phase, and in total.
        version: Of this package.
    """

    command: str
    model: str
    family: str
    settings: Mapping[str, object]
    seed: int
    warnings: tuple[str, ...] = ()
    outputs: Mapping[str, str | None] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    version: str = VERSION

    json_keys: ClassVar[tuple[str, ...]]
    """Attributes that are in the JSON, in its order."""

    def to_json(self) -> dict[str, Any]:
        """The promised keys, of types that json can write."""
        return {key: plain(getattr(self, key)) for key in self.json_keys}


SUBJECT = ("model", "family", "settings", "seed", "warnings")
"""What most results begin with in JSON."""


def plain(value: Any) -> Any:
    """A value of a result, of types that json can write."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple) else value


def header(command: str, target: Target, *more: str) -> dict[str, Any]:
    """The fields of a `ResultHeader` that follow from what was opened. more: warnings, after those of the data."""
    request = target.request
    return {
        "command": command,
        "model": request.title,
        "family": target.model.family,
        "settings": target.settings | ({"config": request.config} if request.config else {}),
        "seed": request.seed,
        "warnings": (*request.notes, *target.warnings, *target.of_data(), *more),
    }


@dataclass(frozen=True, kw_only=True)
class Result(ResultHeader):
    """What was measured or done.

    Attributes:
        before: Figures on the test data; None where nothing is known of it.
        surgery: Figures after the surgery; None without one.
        finetuned: Figures after fine-tuning; None without it.
        kept: The phase that the written file holds; None where none was written.
        trace: History of the fine-tuning.
        bytes: Of weights, "before" and "after"; "packed" is what a codebook rounded to few bits would pack to.
        gallery: Test images for a page; not in the JSON.
        proof: How the figures were compared with the model that loads the file.
        beam: What a beam search gains, where that was measured; else no key of the JSON.
    """

    before: Measurement | None
    surgery: Measurement | None = None
    finetuned: Measurement | None = None
    kept: str | None = None
    trace: tuple[TracePoint, ...] = ()
    outputs: Mapping[str, str | None] = field(default_factory=lambda: dict.fromkeys(("model", "index_map", "report")))
    bytes: Mapping[str, int | None] = field(default_factory=lambda: dict.fromkeys(("before", "after")))
    gallery: tuple[GalleryImage, ...] = ()
    proof: Proof | None = None
    beam: BeamGain | None = None

    json_keys = ("command", *SUBJECT, "kept", "trace", "outputs", "bytes", "seconds", "version", "proof", "stages")

    def to_json(self) -> dict[str, Any]:
        """The promised keys, and `beam` where there is one."""
        return super().to_json() | ({"beam": plain(self.beam)} if self.beam else {})

    @property
    def stages(self) -> dict[str, Measurement | None]:
        """Figures on the test data by phase; None where there is no such phase."""
        return {"before": self.before, "surgery": self.surgery, "finetuned": self.finetuned}

    @property
    def kept_stage(self) -> Measurement | None:
        """Figures of what the written file holds; None where nothing was measured."""
        return self.stages[self.kept or "before"]


def check_request_output(request: Request, command: str, size: int | None) -> Path:
    """The path of the output, once it is checked by the first process.

    Args:
        request: The model, its data and the output.
        command: As the command line has it.
        size: Codes that there will be; None or 0 where that is not known yet.

    Raises:
        CodebookError: It cannot be written, has no known layout, or would replace something; or the model's config
            refuses so many codes.
    """
    return distributed.by_first(lambda: _checked_output(request, command, size))


def _checked_output(request: Request, command: str, size: int | None) -> Path:
    checkpoint = request.checkpoint
    check_size(checkpoint, size)
    output = request_output(request, command, size or 0)
    with_card = has_card(output, checkpoint, bool(request.push_to_hub))
    check_output(checkpoint, output, request.force, request.read, with_card)
    unfinished = training_path(output)
    if unfinished.exists() and not (request.resume or request.force):
        raise CodebookError(f"{unfinished} is of an interrupted run: --resume goes on from it, --force begins anew")
    return output


def asked_size(strategy: Strategy | None, old: int) -> int | None:
    """Codes that there will be, where that is known before anything is counted; without a strategy, `old`."""
    asked: int | None = getattr(strategy, "k", None) or getattr(strategy, "keep", None)
    return asked if strategy else old


def request_output(request: Request, command: str, size: int) -> Path:
    """The path asked for, or one beside the model; the bundled demo's is in the current folder."""
    if request.output is not None:
        return request.output
    folder = None if request.model else Path()
    return default_output(request.checkpoint, command, size, folder)


def check_published(request: Request) -> None:
    """Check before hours of work that the result can go to the hub, where it shall.

    Raises:
        CodebookError: The id is none, the hub does not let this user write there, or something is there already.
    """
    copy = copy_of(request.source)
    if request.private and not request.push_to_hub:
        raise CodebookError("--private is of --push-to-hub org/name; give both")
    if request.push_to_hub and copy and copy.model.repository == request.push_to_hub:
        raise CodebookError(f"--push-to-hub {request.push_to_hub} is the model itself, which is never overwritten")
    if request.push_to_hub:
        distributed.by_first(lambda: check_place(Place(str(request.push_to_hub), request.private, request.force)))


def published(request: Request, output: Path, watch: Watch) -> dict[str, str]:
    """Commit a written and verified result to the hub, where it shall go there. Returns its address by "hub".

    Raises:
        CodebookError: The hub does not take it; nothing is there then, and the result lies on the disk.
    """
    if not request.push_to_hub:
        return {}
    if is_directory_output(output):
        files = {path.name: path for path in sorted(output.iterdir()) if path.is_file()}
    else:
        config, card = own_config_path(output), own_card_path(output)
        files = {path.name: path for path in (output, config) if path.is_file()} | {CARD: card}
    files[index_map_path(output).name] = index_map_path(output)
    place = Place(request.push_to_hub, request.private, request.force)

    def commit() -> str:
        try:
            return committed(place, files, f"{output.name}, by codebook-tools {VERSION}", watch)
        except CodebookError as error:
            raise CodebookError(f"{output} is written and verified, but not on the hub: {error}") from error

    return {"hub": distributed.by_first(commit)}


def settings_of(thing: Strategy | FineTune | None) -> dict[str, object]:
    """The fields of a dataclass that its repr has; none of what is no dataclass."""
    if thing is None or not is_dataclass(thing):
        return {}
    return {entry.name: getattr(thing, entry.name) for entry in fields(thing) if entry.repr}


def provenance_of(
    command: str, target: Target, sizes: Mapping[str, int], kept: str, tuned: FineTuned | None, stages: Iterable[int]
) -> dict[str, str]:
    """The metadata of the file that a surgery on `target` writes.

    Args:
        command: As the command line has it.
        target: The codebooks, their file and the settings.
        sizes: New codes by key of the codebook, in the order of the stages.
        kept: The phase that is written.
        tuned: The fine-tuning; None without one.
        stages: Indices of the codebooks that were operated on.
    """
    checkpoint = target.model.checkpoint
    private = {"data", "test_data", "stats", "latents", "images", "device", "network", "metrics"}
    public = {name: value for name, value in target.settings.items() if name not in private}
    if public.get("perceptual"):
        public["perceptual"] = True  # wherever the weights lay
    public["seed"] = target.request.seed
    groups, tensors = (tuned.groups, tuned.trained) if tuned and kept == "finetuned" else ((), ())
    declared = {DECLARED: json.dumps(checkpoint.declared, sort_keys=True)} if checkpoint.declared else {}
    turned = layouts(checkpoint, [target.codebooks[stage] for stage in stages])
    return {
        **declared,
        **({"layouts": json.dumps(turned, sort_keys=True)} if turned else {}),
        **provenance(command, public, sizes, kept, groups, tensors, checkpoint),
    }


def provenance(
    command: str,
    settings: Mapping[str, object],
    sizes: Mapping[str, int],
    kept: str,
    groups: Iterable[str],
    tensors: Iterable[str],
    original: Checkpoint,
) -> dict[str, str]:
    """The metadata of every written file: no times and no paths, so that the same work gives the same bytes.

    Args:
        command: As the command line has it.
        settings: That json can write.
        sizes: New codes by key of the codebook.
        kept: The phase that is written.
        groups: Names of the networks that were trained.
        tensors: Keys of the tensors that were trained.
        original: The checkpoint before the surgery.
    """
    return {
        "command": command,
        "version": VERSION,
        "settings": json.dumps(settings, sort_keys=True),
        "codebooks": json.dumps(sizes),
        "kept": kept,
        "trained": ",".join(groups),
        "trained_tensors": json.dumps([*tensors]),
        "source_sha256": original.sha256,
    }
