"""The model card of a written directory: what was done, by what, on what data, and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path

from codebook_tools.checkpoints.layout import is_directory_output, split_others
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.evaluation.figures import Measurement, in_markdown, stage_rows
from codebook_tools.runtime.options import declared
from codebook_tools.runtime.version import VERSION
from codebook_tools.strategies import declaration, find_strategy

CARD = "README.md"

_LIBRARIES = {"_class_name": "diffusers", "model_type": "transformers"}
"""By the entry of a config that only that library writes."""


def cards(
    output: Path,
    original: Checkpoint,
    command: str,
    settings: Mapping[str, object],
    sizes: Mapping[str, int],
    stages: Mapping[str, Measurement | None],
    kept: str,
) -> dict[str, bytes]:
    """The original's card with a section on what was done; where it has none, one with the Hub's front matter.

    It names no times and no paths, so that the same work gives the same bytes.

    Args:
        output: Of the checkpoint; a file has no card.
        original: The checkpoint before the surgery.
        command: As the command line has it.
        settings: Of surgery and fine-tuning.
        sizes: New codes by key of the codebook.
        stages: Figures by phase.
        kept: The phase that is written.

    Returns:
        Bytes by file name; empty without a card.
    """
    if not is_directory_output(output):
        return {}
    go_along = split_others(original.folder, original.files)[0] if original.folder else []
    card = next((path for path in go_along if path.name == CARD), None)
    before = card.read_bytes() if card else _head(original).encode()  # of any encoding: it goes on as it is
    return {CARD: before.rstrip() + f"\n\n{_section(command, settings, sizes, stages, kept)}".encode()}


def _head(original: Checkpoint) -> str:
    """The front matter that the Hub reads, and a title."""
    library = next((name for entry, name in _LIBRARIES.items() if entry in (original.config or {})), None)
    lines = [f"library_name: {library}"] if library else []
    return "\n".join(
        ["---", *lines, "tags:", "- vector-quantization", "- codebook-surgery", "---", "", "# Repaired model"]
    )


def _section(
    command: str,
    settings: Mapping[str, object],
    sizes: Mapping[str, int],
    stages: Mapping[str, Measurement | None],
    kept: str,
) -> str:
    codes = ", ".join(f"`{key}`: {size}" for key, size in sizes.items())
    paragraphs = [f"`codebook {command}` of Codebook Tools {VERSION}. Codes: {codes}."]
    images = settings.get("images")
    if isinstance(images, dict):
        counts = ", ".join(f"{count:,} {name}" for name, count in images.items())
        paragraphs.append(f"Data: {counts}; figures are of those for testing, which no gradient and no choice saw.")
    reported = {name: settings[name] for name in _reported(command) if settings.get(name) not in (None, False)}
    if reported:
        paragraphs.append("Settings: " + ", ".join(f"{name} {value}" for name, value in sorted(reported.items())) + ".")
    if any(stages.values()):
        paragraphs.append(in_markdown(stage_rows(stages, kept)))
    return "\n\n".join(["## Codebook surgery", *paragraphs]).rstrip() + "\n"


def _reported(command: str) -> set[str]:
    """Settings that a card names: what the command's own options are, and the fine-tuning's main ones."""
    own = find_strategy(command) if declaration(command, "summary") else None
    return {*(declared(own) if is_dataclass(own) else ()), *_OF_TRAINING}


_OF_TRAINING = ("steps", "train", "codebook_update", "batch_size", "lr", "loss")
