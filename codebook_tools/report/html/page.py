"""A page: a headline, tables, plots and pictures in one HTML file that needs no network and no script."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from codebook_tools.errors import CodebookError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#0a0b0c"
"""Of lines and letters in a plot: the page's own colour of text takes its place, by day and by night."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters
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
    """rows: cells as text, the first of each names it. marked: the rows that stand out."""

    kind: ClassVar[str] = "table"
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Hover:
    """What is seen at points of a plot. places: (n, 2), from its left and its top, as shares of its size. tiles: (n, 3,
    side, side) in [0, 1]. labels: of each."""

    places: Tensor
    tiles: Tensor
    labels: Sequence[str]

    @property
    def columns(self) -> int:
        return math.ceil(math.sqrt(len(self.tiles)))

    @property
    def sheet(self) -> str:
        """All tiles in rows, as one picture."""
        blank = self.tiles.new_zeros(-len(self.tiles) % self.columns, *self.tiles.shape[1:])
        rows = torch.split(torch.cat([self.tiles, blank]), self.columns)
        return Picture(torch.cat([torch.cat([*row], 2) for row in rows], 1), "", small=True).uri

    @property
    def told(self) -> dict[str, object]:
        """For the script."""
        places = [[round(float(at), 4) for at in place] for place in self.places]
        return {"places": places, "labels": [*self.labels], "columns": self.columns}


@dataclass(frozen=True, eq=False)
class Plot:
    """draw: onto an empty figure. said: what it shows, for who cannot see it. columns: all that is drawn, by name.
    hover: what is seen at a point where there are scripts."""

    kind: ClassVar[str] = "plot"
    title: str
    said: str
    draw: Callable[[Figure], None]
    columns: Mapping[str, Sequence[object]]
    size: tuple[float, float] = (7.5, 2.8)
    note: str = ""
    hover: Hover | None = None

    @property
    def svg(self) -> str:
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
        into = io.StringIO()
        writer = csv.writer(into, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(zip(*self.columns.values(), strict=True))
        return into.getvalue()


@dataclass(frozen=True, eq=False)
class Picture:
    """pixels: (3, height, width) in [0, 1], or one channel of grey. said: what it shows, for who cannot see it.
    caption: beneath it. small: a few bytes matter more than that every pixel is as it was."""

    pixels: Tensor
    said: str
    caption: str = ""
    small: bool = False

    @property
    def uri(self) -> str:
        from PIL import Image

        shown = (self.pixels.clamp(0, 1) * 255).round().byte().movedim(0, -1)
        image = Image.fromarray(shown.expand(*shown.shape[:2], 3).contiguous().cpu().numpy())
        into, kind = io.BytesIO(), "webp" if self.small else "png"
        image.save(into, kind, **({"quality": 80, "method": 4} if self.small else {"optimize": True}))
        return _data_uri(into.getvalue(), f"image/{kind}")


@dataclass(frozen=True, eq=False)
class Gallery:
    """rows: of pictures, by name; those of one row belong together. head: what the columns are. height: of a picture,
    in rem; None for pictures of one width."""

    kind: ClassVar[str] = "gallery"
    title: str
    rows: Mapping[str, Sequence[Picture]]
    note: str = ""
    head: tuple[str, ...] = ()
    height: float | None = None


@dataclass(frozen=True)
class Listing:
    """Names and values, of settings say. folded: shown when asked for."""

    kind: ClassVar[str] = "listing"
    title: str
    values: Mapping[str, str]
    folded: bool = True


Part = Table | Plot | Gallery | Listing


@dataclass(frozen=True, eq=False)
class Page:
    """headline: what came out, in a sentence. command: that makes it again."""

    title: str
    headline: str
    parts: Sequence[Part]
    command: str
    warnings: Sequence[str] = field(default=())


def require_plots() -> None:
    """Raise CodebookError now, not after an hour, where a page cannot be drawn."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise CodebookError(f"--report wants {' and '.join(missing)}: pip install 'codebook-tools[report]'")


def html(page: Page) -> str:
    """The page as one file, the same for the same page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    room = Environment(
        loader=PackageLoader("codebook_tools.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    room.filters["data_uri"] = _data_uri
    return room.get_template("page.html").render(page=page)


def _data_uri(content: str | bytes, kind: str) -> str:
    raw = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"
