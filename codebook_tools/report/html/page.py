"""The parts of a page (tables, plots, galleries, listings), rendered to one HTML file without network or scripts."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from codebook_tools.runtime.optional import require_installed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#0a0b0c"
"""Color of lines and text in a plot; the page replaces it by its text color, in light and dark."""

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
        draw: Draws it onto an empty figure.
        columns: All values that are drawn, by name, for a CSV file.
        size: Width and height in inches.
        note: Below the plot.
        hover: Pictures at its points; None for none.
    """

    kind: ClassVar[str] = "plot"
    title: str
    description: str
    draw: Callable[[Figure], None]
    columns: Mapping[str, Sequence[object]]
    size: tuple[float, float] = (7.5, 2.8)
    note: str = ""
    hover: Hover | None = None

    @property
    def svg(self) -> str:
        """The drawn plot."""
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure)
            into = io.StringIO()
            figure.savefig(into, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        text = into.getvalue()
        return text[text.index("<svg") :].replace(INK, "currentColor")

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
        head: Headings of the columns.
        height: Of a picture in rem; None for pictures of one width.
    """

    kind: ClassVar[str] = "gallery"
    title: str
    rows: Mapping[str, Sequence[Picture]]
    note: str = ""
    head: tuple[str, ...] = ()
    height: float | None = None


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
    return templates.get_template("page.html").render(page=page)


def _data_uri(content: str | bytes, kind: str) -> str:
    raw = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"
