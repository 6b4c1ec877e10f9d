"""The figures of a measurement as text, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from codebook_tools.evaluation.measure import Measurement

STAGES = {"before": "before", "surgery": "after surgery", "finetuned": "after fine-tuning"}


def stage_rows(stages: Mapping[str, Measurement | None], kept: str | None) -> list[tuple[str, ...]]:
    """The headings, and the figures of each stage there is; a star is at the one that was kept, where there are others.
    kept: None of a measurement alone."""
    there = {name: stage for name, stage in stages.items() if stage is not None}
    names = {name: STAGES[name] if kept else "measured" for name in there}
    if len(there) > 1 and kept in there:
        names[kept] += " *"
    return rows_of({names[name]: stage for name, stage in there.items()})


def rows_of(stages: Mapping[str, Measurement | None]) -> list[tuple[str, ...]]:
    """The headings, and the figures of each, by name; those that none has are left out."""
    there = {name: stage for name, stage in stages.items() if stage is not None}
    found = [("", *there)]
    for label, show in _ROWS:
        cells = [show(stage) for stage in there.values()]
        if any(cell != "-" for cell in cells):
            found.append((label, *cells))
    return found


def _use(field: str, form: str) -> Any:
    """A figure of the codebook; of several, the lowest and the highest."""

    def show(stage: Measurement) -> str:
        values = [getattr(use, field) for use in stage.codebooks]
        if any(value is None for value in values):
            return "-"
        low, high = format(min(values), form), format(max(values), form)
        return low if low == high else f"{low} to {high}"

    return show


def _used(stage: Measurement) -> str:
    used, size = (sum(getattr(use, field) for use in stage.codebooks) for field in ("used", "size"))
    return f"{used} of {size} ({used / size:.1%})"


def _optional(field: str, form: str) -> Any:
    return lambda stage: "-" if getattr(stage, field) is None else format(getattr(stage, field), form)


_ROWS = (
    ("codes used", _used),
    ("codes with 10 hits", _use("used_10", "d")),
    ("perplexity", _use("perplexity", ".2f")),
    ("bits per token", _use("bits", ".2f")),
    ("distortion", _use("distortion", ".4g")),
    ("coverage", _use("coverage", ".1%")),
    ("mse", _optional("mse", ".6f")),
    ("PSNR, dB", _optional("psnr", ".2f")),
    ("SSIM", _optional("ssim", ".4f")),
    ("sharpness", _optional("sharpness", ".1%")),
)
