"""The settings of a remapping, declared without torch, for `--help` reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from codebook_tools.checkpoints.layout import SUFFIX, named
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.options import Option

OnRemoved = str | int
"""What the id of a removed code becomes: "error", "nearest", or the id of a mask token."""

_WITHIN = {"offset": (0, 1 << 32), "special": (0, 1 << 32), "pad_to_multiple": (1, 1 << 20)}
"""The least and the largest value of a field; no vocabulary needs more."""

PRIOR_SUFFIXES = {SUFFIX, ".pt", ".pth", ".ckpt", ".bin"}


def parse_on_removed(text: str) -> OnRemoved:
    """Parse error, nearest or mask=ID.

    Raises:
        CodebookError: The text is none of these.
    """
    if text in ("error", "nearest"):
        return text
    name, _, number = text.partition("=")
    if name == "mask" and re.fullmatch(r"-?\d{1,18}", number, re.ASCII):
        return int(number)
    raise CodebookError(f"--on-removed {text}: expected error, nearest, or mask=ID with the new id of a mask token")


@dataclass(frozen=True)
class RemapRequest:
    """Sources to rewrite, index maps to rewrite them by, and how. A field with an Option is typed under its name.

    Attributes:
        sources: Token files and priors.
        maps: Index maps, in the order of the surgeries.

    Raises:
        CodebookError: A number is out of range, or one output is named for several sources.
    """

    sources: tuple[Path, ...]
    maps: tuple[Path, ...]
    on_removed: Annotated[
        OnRemoved,
        Option(
            "What the token of a removed code becomes; for a prior, where new codes have their rows from.",
            metavar="error|nearest|mask=ID",
            panel="Tokens",
            parse=parse_on_removed,
        ),
    ] = "error"
    offset: Annotated[
        int, Option("The id of code 0. Ids below it are special and stay.", metavar="N", panel="Tokens")
    ] = 0
    special: Annotated[
        int,
        Option(
            "How many special ids follow the codes in token files; they move with their end.",
            metavar="N",
            panel="Tokens",
        ),
    ] = 0
    codebook_key: Annotated[
        tuple[str, ...],
        Option(
            "The codebook whose tokens these are; repeated, those along --axis in order.", metavar="KEY", panel="Tokens"
        ),
    ] = ()
    axis: Annotated[
        int | None,
        Option(
            "The axis of the tokens that runs over several codebooks, from 0. Left out: 1, as `encode` has it.",
            metavar="N",
            panel="Tokens",
        ),
    ] = None
    key: Annotated[
        tuple[str, ...],
        Option(
            "The tensor, column or ending of tar members that holds tokens. Repeatable.", metavar="NAME", panel="Tokens"
        ),
    ] = ()
    embedding_key: Annotated[
        tuple[str, ...],
        Option("A prior's input embedding, where its name does not tell.", metavar="KEY", panel="Priors"),
    ] = ()
    head_key: Annotated[
        tuple[str, ...],
        Option("Its output head. Repeatable, as --embedding-key is.", metavar="KEY", panel="Priors"),
    ] = ()
    pad_to_multiple: Annotated[
        int, Option("Pad a prior's vocabulary at its end to such a size.", metavar="N", panel="Priors")
    ] = 1
    output: Annotated[
        Path | None,
        Option(
            "Left out: beside each, <name>.remapped, of its kind.",
            metavar="PATH",
            names=("--output", "-o"),
            panel="Output",
        ),
    ] = None
    force: Annotated[bool, Option("Replace the output if it exists.", panel="Output")] = False

    def __post_init__(self) -> None:
        for name, (least, most) in _WITHIN.items():
            if not least <= getattr(self, name) <= most:
                raise CodebookError(f"{name.replace('_', '-')}={getattr(self, name)} is not within {least} and {most}")
        if self.output is not None and len(self.sources) > 1:
            raise CodebookError(f"--output {self.output} is one place for {len(self.sources)} files; leave it out")

    def output_of(self, source: Path) -> Path:
        """Output of a source: the one asked for, or `<name>.remapped` beside it, of the same kind."""
        if self.output is not None:
            return self.output
        source = named(source)
        ending = "" if source.is_dir() else source.suffix
        written = SUFFIX if ending in PRIOR_SUFFIXES else ending
        return source.with_name(source.name.removesuffix(ending) + ".remapped" + written)
