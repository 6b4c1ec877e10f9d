"""Which figures `--metrics` takes, declared without torch: where each is, what it applies to, and how it is typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from codebook_tools.errors import CodebookError


@dataclass(frozen=True)
class Quoted:
    """A figure.

    Attributes:
        place: "module:class" below this package; the class is a QuotedFigure.
        modality: Name of the one that it applies to; None for any with reconstructions.
        weights: Whether a file of a network's weights may be named.
        of_set: Whether it is a figure of a whole set, and no mean over items: of a part it says nothing.
    """

    place: str
    modality: str | None = None
    weights: bool = False
    of_set: bool = False

    @property
    def kinds(self) -> str:
        """What it applies to, in words."""
        return {"images": "images", "audio": "sound"}.get(self.modality or "", "reconstructions")


QUOTED: Mapping[str, Quoted] = {
    "rfid": Quoted("rfid:RFID", "images", weights=True, of_set=True),
    "lpips": Quoted("lpips:LPIPS", "images", weights=True),
    "pesq": Quoted("pesq:PESQ", "audio"),
    "stoi": Quoted("stoi:STOI", "audio"),
    "si-sdr": Quoted("si_sdr:SISDR", "audio"),
    "mel": Quoted("spectral:MelDistance", "audio"),
    "stft": Quoted("spectral:STFTDistance", "audio"),
    "robustness": Quoted("robustness:Robustness"),
}

Metrics = Mapping[str, Path | None]
"""Figures by name, with the file of a network's weights where one was named."""


def parse_metrics(text: str) -> Metrics:
    """Figures by name, from "rfid=inception.pth,lpips".

    Raises:
        CodebookError: A name is unknown or there twice, or a file is named for a figure without weights.
    """
    chosen = dict[str, Path | None]()
    for word in filter(None, map(str.strip, text.split(","))):
        name, equals, file = word.partition("=")
        if name not in QUOTED:
            raise CodebookError(f"--metrics {name}: expected some of {', '.join(QUOTED)}, with commas between them")
        if name in chosen:
            raise CodebookError(f"--metrics {text}: {name} is there twice")
        if equals and not QUOTED[name].weights:
            raise CodebookError(f"--metrics {word}: {name} has no weights; leave out ={file}")
        chosen[name] = Path(file) if file else None
    return chosen


def field_of(name: str) -> str:
    """The field of a Measurement that holds a figure."""
    return name.replace("-", "_")
