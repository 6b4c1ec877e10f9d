"""The page of a map, and its files: latents blue, centroids green, codes red, dead ones hollow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from codebook_tools.checkpoints.atomic import partial_file, put_in_place
from codebook_tools.errors import CodebookError
from codebook_tools.report.html.page import STYLE, Hover, Page, Plot
from codebook_tools.report.html.result_page import result_page
from codebook_tools.workflows.latent_map import Map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (9.0, 7.0)  # inches, of the files
_ON_PAGE = (5.0, 4.4)
_AXES = 0.15, 0.11, 0.83, 0.87  # left, bottom, width and height, as shares of the figure's
_MARGIN = 0.03  # of the plane, on each side
_TIP = " A pointer or a finger on a latent brings up its part of the item, and its code."
_LATENTS, _CENTROIDS, _CODES = "#4477cc", "#339966", "#cc4455"


def mapped_page(result: Map, command: str) -> Page:
    """The page of `codebook map`."""
    covered = "" if result.coverage is None else f"; they cover {result.coverage:.1%} of the latents"
    headline = f"{result.used} of {result.size} codes are used{covered}."
    return result_page(result, headline, [map_plot(result)], command)


def map_plot(result: Map) -> Plot:
    """Latents, centroids and codes in the plane, with the patch of a latent where the pointer is."""
    name = {"umap": "UMAP", "pca": "Principal components"}[result.method]
    labels = [
        f"code {code}; {place.item}, row {place.row}, column {place.column}"
        for code, place in zip(result.chosen.tolist(), result.places, strict=False)
    ]
    kinds, points = _points(result)
    dead = int((result.counts[result.indices] == 0).sum())
    low, high = _bounds(result)
    corner, side = torch.tensor(_AXES).reshape(2, 2)
    from_left = corner + side * (result.latents - low) / (high - low)
    places = torch.stack([from_left[:, 0], 1 - from_left[:, 1]], 1)
    part = f" {len(result.codes):,} of {result.size:,} codes are drawn." if len(result.codes) < result.size else ""
    return Plot(
        f"{name} of {len(result.latents):,} latents, {len(result.codes):,} codes and {result.k:,} centroids",
        f"Latents in blue, centroids of a k-means in green, codes in red, {dead} dead ones hollow.",
        [lambda figure: draw_map(result, figure)],
        {"kind": kinds, "x": points[:, 0].tolist(), "y": points[:, 1].tolist()},
        _ON_PAGE,
        f"One projection, fitted on the latents, has all points.{part}{_TIP if len(result.patches) else ''}",
        Hover(places, result.patches, labels) if len(result.patches) else None,
    )


def _points(result: Map) -> tuple[list[str], Tensor]:
    """The kind of each point, and all points, (n, 2)."""
    kinds = ("latent", result.latents), ("centroid", result.centroids), ("code", result.codes)
    return [kind for kind, points in kinds for _ in points], torch.cat([points for _, points in kinds])


def _bounds(result: Map) -> tuple[Tensor, Tensor]:
    """Lowest and highest corner of the plane that is drawn, (2,) each."""
    _, points = _points(result)
    low, high = points.amin(0), points.amax(0)
    margin = _MARGIN * (high - low).clamp(min=1e-6)
    return low - margin, high + margin


def draw_map(result: Map, figure: Figure) -> None:
    """Draw the map in the rectangle _AXES of an empty figure, so that the places of points are known."""
    figure.set_layout_engine("none")
    axes = figure.add_axes(_AXES)
    (left, bottom), (right, top) = (corner.tolist() for corner in _bounds(result))
    name = {"umap": "UMAP", "pca": "principal component"}[result.method]
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel=f"{name} 1", ylabel=f"{name} 2")
    axes.ticklabel_format(scilimits=(-1, 3))  # longer numbers would push the label of the axis out of the figure
    dead = result.counts[result.indices] == 0

    def dots(label: str, points: Tensor, **style: Any) -> None:
        axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), label=f"{len(points):,} {label}", **style)

    scale = figure.get_figwidth() / _SIZE[0]
    dots("latents", result.latents, s=3 * scale, color=_LATENTS, alpha=0.4, linewidths=0)
    dots("centroids", result.centroids, s=22 * scale, color=_CENTROIDS, marker="s", linewidths=0)
    dots("codes in use", result.codes[~dead], s=22 * scale, color=_CODES, linewidths=0)
    if bool(dead.any()):
        dots("dead codes", result.codes[dead], s=18 * scale, facecolors="none", edgecolors=_CODES, linewidths=0.8)
    legend = axes.legend(loc="best")
    for handle in filter(None, legend.legend_handles):
        handle.set(sizes=[22 * scale], alpha=1)  # one dot of the latents is too small to see


def check_beside(page: Path) -> None:
    """Protect files beside the page that do not belong to an earlier one.

    Raises:
        CodebookError: One of them would be replaced.
    """
    for kind in ("png", "svg", "parquet"):
        if (path := page.with_suffix(f".{kind}")).exists() and not page.exists():
            raise CodebookError(f"{path} is there, and is of no page; give --report another name")


def write_map(result: Map, page: Path) -> dict[str, str]:
    """Write PNG, SVG and, where pyarrow is installed, a parquet table of all points beside the page.

    Returns:
        Paths by format.
    """
    import matplotlib
    from matplotlib.figure import Figure

    written = dict[str, str]()
    with matplotlib.rc_context({**STYLE, "text.color": "black"}):
        figure = Figure(figsize=_SIZE)
        draw_map(result, figure)
        for kind in ("png", "svg"):
            path = page.with_suffix(f".{kind}")
            about = {"Date": None} if kind == "svg" else None
            with partial_file(path, force=True) as target:
                figure.savefig(target, format=kind, dpi=150, transparent=False, metadata=about)
                put_in_place(path)
            written[kind] = str(path)
    table = _table(result)
    if table is not None:
        import pyarrow.parquet

        path = page.with_suffix(".parquet")
        with partial_file(path, force=True) as target:
            pyarrow.parquet.write_table(table, target)
            put_in_place(path)
        written["parquet"] = str(path)
    return written


def _table(result: Map) -> object:
    """A row for each point, for viewers of embeddings; None without pyarrow."""
    try:
        import pyarrow
    except ImportError:
        return None
    kinds, points = _points(result)
    nothing = [None] * (len(kinds) - len(result.places))
    return pyarrow.table(
        {
            "kind": kinds,
            "x": points[:, 0].numpy(),
            "y": points[:, 1].numpy(),
            "code": [*result.chosen.tolist(), *[None] * result.k, *result.indices.tolist()],
            "image": [*(str(place.item) for place in result.places), *nothing],
            "row": [*(place.row for place in result.places), *nothing],
            "column": [*(place.column for place in result.places), *nothing],
        }
    )
