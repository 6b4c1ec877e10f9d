"""The model card of a written checkpoint: what was done, by what, on what data, and the figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from codebook_tools.checkpoints.layout import CARD as CARD
from codebook_tools.checkpoints.layout import SMALL, is_directory_output, own_card_path, split_others
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.evaluation.figures import CodebookUse, Measurement, figures_of
from codebook_tools.evaluation.tables import in_markdown, stage_rows
from codebook_tools.runtime.hub_ids import copy_of, data_set_id
from codebook_tools.runtime.options import declared
from codebook_tools.runtime.version import VERSION
from codebook_tools.strategies import declaration, find_strategy

_LIBRARIES = {"_class_name": "diffusers", "model_type": "transformers"}
"""By the entry of a config that only that library writes."""

_TAGS = ("vector-quantization", "codebook-surgery")
_TASKS = {"images": "image-to-image", "audio": "audio-to-audio"}
"""What a model that reconstructs does, as the hub names it, by modality."""


@dataclass(frozen=True)
class Done:
    """What a card tells of a surgery.

    Attributes:
        command: As the command line has it.
        settings: Of surgery and fine-tuning, and of the data.
        sizes: New codes by key of the codebook.
        stages: Figures by phase.
        kept: The phase that is written.
    """

    command: str
    settings: Mapping[str, object]
    sizes: Mapping[str, int]
    stages: Mapping[str, Measurement | None]
    kept: str


def has_card(output: Path, original: Checkpoint, published: bool) -> bool:
    """Whether a card is written: of a directory, and of a file that has one, comes from the hub or goes there."""
    of_hub = published or copy_of(original.path) is not None
    return is_directory_output(output) or of_hub or _own(original) is not None


def _own(original: Checkpoint) -> bytes | None:
    """The card of the original, where it goes along."""
    if original.folder is None:
        card = own_card_path(original.path)
        return card.read_bytes() if card.is_file() and card.stat().st_size < SMALL else None
    along = split_others(original.folder, original.files)[0]
    return next((path.read_bytes() for path in along if path.name == CARD), None)


def cards(output: Path, original: Checkpoint, done: Done, published: bool = False) -> dict[str, bytes]:
    """The original's card with a section on what was done, and the hub's metadata; where it has none, a new one.

    It names no times and no paths, so that the same work gives the same bytes.

    Args:
        output: Of the checkpoint.
        original: The checkpoint before the surgery.
        done: The surgery.
        published: Whether the checkpoint goes to the hub.

    Returns:
        Bytes by file name; empty without a card.
    """
    if not has_card(output, original, published):
        return {}
    own = _own(original)
    head, body = _parted(own or b"")
    if head is None:  # metadata that cannot be read stay as they are
        return {CARD: body.rstrip() + f"\n\n{_section(done)}".encode()}
    if own is None:
        head, body = _of_base(original), _introduction(original)
    entries = {name: value for name, value in {**head, **_metadata(original, done, head)}.items() if value is not None}
    return {CARD: _front(entries) + body.strip(b"\r\n").rstrip() + f"\n\n{_section(done)}".encode()}


def _parted(card: bytes) -> tuple[dict[str, Any] | None, bytes]:
    """The metadata of a card and its text, of whatever encoding; None and all of it where metadata cannot be read."""
    import yaml

    parts = re.match(rb"---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|$)", card, re.DOTALL)
    if parts is None:
        return {}, card
    try:
        head = yaml.safe_load((parts[1] or b"").decode())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError):
        return None, card
    return (head or {}, card[parts.end() :]) if isinstance(head, dict | None) else (None, card)


def _front(entries: Mapping[str, object]) -> bytes:
    """Metadata as the front matter that the hub reads."""
    import yaml

    text = yaml.safe_dump(dict(entries), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n\n".encode()


def _of_base(original: Checkpoint) -> dict[str, object]:
    """The licence that the card of a model on the hub names, with a link that holds from elsewhere."""
    copy = copy_of(original.path)
    card = copy.blobs.parent / "snapshots" / str(copy.model.revision) / CARD if copy else None
    if copy is None or card is None or not card.is_file():
        return {}
    head = _parted(card.read_bytes())[0] or {}
    terms: dict[str, object] = {
        name: head[name] for name in ("license", "license_name", "license_link") if name in head
    }
    link = terms.get("license_link")
    if isinstance(link, str) and "://" not in link:
        terms["license_link"] = f"https://huggingface.co/{copy.model.repository}/blob/{copy.model.revision}/{link}"
    return terms


def _metadata(original: Checkpoint, done: Done, head: Mapping[str, Any]) -> dict[str, object]:
    """The entries that a surgery sets in the metadata of a card. head: those that are there."""
    copy, entries = copy_of(original.path), dict[str, object]()
    library = next((name for entry, name in _LIBRARIES.items() if entry in _config(original)), None)
    if library:
        entries["library_name"] = head.get("library_name", library)
    if copy:
        entries["base_model"] = copy.model.repository
    if copy or "base_model" in head:
        again = not copy and head.get("base_model_relation") == "quantized"
        entries["base_model_relation"] = "quantized" if again or done.command == "quantize" else "finetune"
    sets = _data_sets(done.settings)
    if sets:
        entries["datasets"] = [*dict.fromkeys([*_listed(head.get("datasets")), *sets])]
    entries["tags"] = [*dict.fromkeys([*_listed(head.get("tags")), *_TAGS])]
    figures = _figures(done.stages.get(done.kept))
    if figures:
        modality = str(done.settings.get("modality"))
        data = {"name": sets[0], "type": sets[0]} if len(sets) == 1 else {"name": "own data", "type": "own"}
        result = {"task": {"type": _TASKS.get(modality, "feature-extraction")}, "dataset": {**data, "split": "test"}}
        base = str({**head, **entries}.get("base_model", "model")).rpartition("/")[2]
        name = f"{base}.{done.command}-k{next(iter(done.sizes.values()), 0)}"
        entries["model-index"] = [{"name": name, "results": [{**result, "metrics": figures}]}]
    elif "model-index" in head:  # those are of other weights
        entries["model-index"] = None
    return entries


def _config(original: Checkpoint) -> Mapping[str, object]:
    """The config of a directory; that beside a file may be anyone's."""
    return (original.config or {}) if original.folder else {}


def _listed(entry: object) -> list[Any]:
    """An entry of metadata that may be a text or a list."""
    return [*entry] if isinstance(entry, list) else [] if entry is None else [entry]


def _data_sets(settings: Mapping[str, object]) -> list[str]:
    """Data sets on the hub, without repetition; other data are the user's own affair."""
    named = [settings.get(name) for name in ("data", "test_data")]
    ids = [data_set_id(str(one)) for names in named if isinstance(names, list) for one in names]
    return [*dict.fromkeys(one.repository for one in ids if one)]


def _figures(stage: Measurement | None) -> list[dict[str, object]]:
    """Metrics as the hub lists them; those of codebooks are means over all of them."""
    if stage is None:
        return []
    values = {name: getattr(stage, name) for name in figures_of(Measurement)}
    many = len(stage.codebooks)
    for name, figure in figures_of(CodebookUse).items():
        each = [getattr(book, name) for book in stage.codebooks]
        if figure.mean and each and None not in each:
            values[name] = sum(each) / many
    of = f", mean of {many} codebooks" if many > 1 else ""
    books = figures_of(CodebookUse)
    return [
        {"type": name, "name": f"{name}{of if name in books else ''}", "value": float(f"{value:.6g}")}
        for name, value in values.items()
        if isinstance(value, int | float)
    ]


def _introduction(original: Checkpoint) -> bytes:
    """The text of a new card, before its section."""
    copy = copy_of(original.path)
    if copy is None:
        return b"# Repaired model"
    name = copy.model.repository
    place = f"`{copy.model.inside}` of " if copy.model.inside else ""
    origin = f"The original is {place}[{name}](https://huggingface.co/{name}), commit `{copy.model.revision}`."
    return f"# Repaired {name.rpartition('/')[2]}\n\n{origin}".encode()


def _section(done: Done) -> str:
    command, settings, sizes, stages, kept = done.command, done.settings, done.sizes, done.stages, done.kept
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


_OF_TRAINING = ("steps", "train", "codebook_update", "batch_size", "augment", "lr", "optimizer", "loss")
