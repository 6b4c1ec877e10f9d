"""The parts of a page (tables, plots, galleries, listings), rendered to one HTML file without network or scripts."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from codebook_tools.report.html.terms import explanations
from codebook_tools.runtime.optional import require_installed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#0a0b0c"
"""Color of lines and text in a plot; the page replaces it by its text color, in light and dark."""

PANEL = (5.0, 2.8)
"""Width and height of a plot in inches: its text is as large on a phone, which is 5 inches of 72 pixels wide."""

_NUMBER = re.compile(r"(?:[\d\s.,%()±/*+e–-]|of|to)*")
_PROSE = 40  # characters, above which a cell is a sentence
_SMOOTH_FROM = 64  # pixels of height
_FEW_COLUMNS = 5  # that a phone shows beside each other

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "codebook",
    "font.family": "sans-serif",
    "font.size": 10,
    "legend.frameon": False,
    "savefig.transparent": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": "cycler('color', ['#4477cc', '#cc4455', '#339966', '#bb8822', '#8866bb', '#2299aa'])",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: Its heading.
        head: Headings of the columns.
        rows: Cells; the first of each row names it.
        note: Below the table.
        marked: Indices of rows that stand out.
    """

    kind: ClassVar[str] = "table"
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marked: frozenset[int] = frozenset()

    @property
    def numeric(self) -> frozenset[int]:
        """Indices of the columns with numbers in most cells, which are aligned at the right."""
        columns = zip(*self.rows, strict=True)
        return frozenset(i for i, cells in enumerate(columns) if i and 2 * sum(map(_is_number, cells)) > len(cells))

    @property
    def has_prose(self) -> bool:
        """Whether it has sentences: a phone then shows each row as a block."""
        return any(len(cell) > _PROSE for row in self.rows for cell in row)

    @property
    def is_wide(self) -> bool:
        """Whether a phone scrolls it."""
        return len(self.head) > _FEW_COLUMNS and not self.has_prose

    @property
    def text(self) -> str:
        """All that it says."""
        return _joined(self.title, self.head, *self.rows, self.note)


@dataclass(frozen=True, eq=False)
class Hover:
    """Pictures that a script shows at points of a plot.

    Attributes:
        places: (n, 2), distance from the left and from the top, as shares of the plot's size.
        tiles: (n, 3, side, side) in [0, 1].
        labels: Of each point.
    """

    places: Tensor
    tiles: Tensor
    labels: Sequence[str]

    @property
    def columns(self) -> int:
        """Number of tiles in a row of the sheet."""
        return math.ceil(math.sqrt(len(self.tiles)))

    @property
    def sheet(self) -> str:
        """All tiles in rows, as one picture in a data URI."""
        blank = self.tiles.new_zeros(-len(self.tiles) % self.columns, *self.tiles.shape[1:])
        rows = torch.split(torch.cat([self.tiles, blank]), self.columns)
        return Picture(torch.cat([torch.cat([*row], 2) for row in rows], 1), "", small=True).uri

    @property
    def script_data(self) -> dict[str, object]:
        """The data of hover.js."""
        places = [[round(float(at), 4) for at in place] for place in self.places]
        return {"places": places, "labels": [*self.labels], "columns": self.columns}


@dataclass(frozen=True, eq=False)
class Plot:
    """A plot.

    Attributes:
        title: Its heading.
        description: What it shows, for readers who cannot see it.
        panels: Each draws a part of it onto an empty figure; a wide screen has two beside each other.
        columns: All values that are drawn, by name, for a CSV file.
        size: Width and height of a panel in inches.
        note: Below the plot.
        hover: Pictures at its points; None for none.
    """

    kind: ClassVar[str] = "plot"
    title: str
    description: str
    panels: Sequence[Callable[[Figure], None]]
    columns: Mapping[str, Sequence[object]]
    size: tuple[float, float] = PANEL
    note: str = ""
    hover: Hover | None = None

    @cached_property
    def svgs(self) -> list[str]:
        """The drawn panels."""
        return [_svg(panel, self.size) for panel in self.panels]

    @property
    def text(self) -> str:
        """All that it says, in the plot, too."""
        return _joined(self.title, *(re.findall(r">([^<>]+)</text>", svg) for svg in self.svgs), self.note)

    @property
    def csv(self) -> str:
        """The columns, with a header."""
        into = io.StringIO()
        writer = csv.writer(into, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(zip(*self.columns.values(), strict=True))
        return into.getvalue()


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture.

    Attributes:
        pixels: (3, height, width) in [0, 1], or one channel of gray.
        description: What it shows, for readers who cannot see it.
        caption: Below the picture.
        small: Whether to compress it with loss.
    """

    pixels: Tensor
    description: str
    caption: str = ""
    small: bool = False

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.pixels.shape[-1] / self.pixels.shape[-2]

    @property
    def smooth(self) -> bool:
        """Whether a browser may smooth it; the pixels of a small one stay squares."""
        return self.pixels.shape[-2] >= _SMOOTH_FROM

    @property
    def uri(self) -> str:
        """The picture as PNG, or WebP where it is small, in a data URI."""
        from PIL import Image

        pixels = (self.pixels.clamp(0, 1) * 255).round().byte().movedim(0, -1)
        image = Image.fromarray(pixels.expand(*pixels.shape[:2], 3).contiguous().cpu().numpy())
        into, kind = io.BytesIO(), "webp" if self.small else "png"
        image.save(into, kind, **({"quality": 80, "method": 4} if self.small else {"optimize": True}))
        return _data_uri(into.getvalue(), f"image/{kind}")


@dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures in rows.

    Attributes:
        title: Its heading.
        rows: Pictures by name of the row.
        note: Below the pictures.
        height: Of a picture in rem; None for pictures of one width.
    """

    kind: ClassVar[str] = "gallery"
    title: str
    rows: Mapping[str, Sequence[Picture]]
    note: str = ""
    height: float | None = None

    @property
    def text(self) -> str:
        """All that it says."""
        captions = (picture.caption for pictures in self.rows.values() for picture in pictures)
        return _joined(self.title, [*self.rows], [*captions], self.note)


@dataclass(frozen=True)
class Listing:
    """Names and values.

    Attributes:
        title: Its heading.
        values: By name.
        folded: Whether only the heading is visible at first.
    """

    kind: ClassVar[str] = "listing"
    title: str
    values: Mapping[str, str]
    folded: bool = True

    @property
    def text(self) -> str:
        """All that it says unless it is folded."""
        return "" if self.folded else _joined(self.title, [*self.values], [*self.values.values()])


Part = Table | Plot | Gallery | Listing


@dataclass(frozen=True, eq=False)
class Page:
    """A page.

    Attributes:
        title: Of the result.
        headline: What came out, in a sentence.
        parts: From top to bottom.
        command: What the user typed to make it.
        warnings: A line each.
    """

    title: str
    headline: str
    parts: Sequence[Part]
    command: str
    warnings: Sequence[str] = ()

    @property
    def explanations(self) -> list[dict[str, str]]:
        """A line for each term: those of the headline, and of each part those that no text before it has.

        What the warnings say is explained below the first part, so that the result is not far from the headline.
        """
        texts = [part.text for part in self.parts]
        return explanations([self.headline, _joined(self.warnings, *texts[:1]), *texts[1:]])


def require_plots() -> None:
    """Check before any work that pages can be drawn.

    Raises:
        CodebookError: jinja2 or matplotlib is missing.
    """
    require_installed("--report", "report", "jinja2", "matplotlib")


def html(page: Page) -> str:
    """Render a page to one file, reproducibly."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("codebook_tools.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["data_uri"] = _data_uri
    return templates.get_template("page.html").render(page=page, explanations=page.explanations)


def _svg(draw: Callable[[Figure], None], size: tuple[float, float]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        into = io.StringIO()
        figure.savefig(into, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = into.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell) is not None


def _joined(*texts: str | Sequence[str]) -> str:
    """Texts and sequences of texts, a line each."""
    return "\n".join(text if isinstance(text, str) else "\n".join(text) for text in texts)


def _data_uri(content: str | bytes, kind: str) -> str:
    raw = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"
