"""The page of a map, and its files: latents blue, centroids green, codes red, dead ones hollow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from codebook_tools.checkpoints.atomic import partial_file, put_in_place
from codebook_tools.errors import CodebookError
from codebook_tools.report.html.operate import about
from codebook_tools.report.html.page import STYLE, Hover, Page, Plot
from codebook_tools.workflows.latent_map import Map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (9.0, 7.0)
_MARGIN = 0.03  # of the plane, on each side
_LATENTS, _CENTROIDS, _CODES = "#4477cc", "#339966", "#cc4455"


def mapped_page(found: Map, command: str) -> Page:
    """command: what the user typed."""
    covered = "" if found.coverage is None else f"; they cover {found.coverage:.1%} of the latents"
    return Page(
        title=f"codebook map: {found.model}",
        headline=f"{found.used} of {found.size} codes are used{covered}.",
        parts=[map_plot(found), *about(found.settings, found.seconds, found.version, found.seed)],
        command=command,
        warnings=found.warnings,
    )


def map_plot(found: Map) -> Plot:
    name = {"umap": "UMAP", "pca": "Principal components"}[found.method]
    labels = [
        f"code {code}; {place.item}, row {place.row}, column {place.column}"
        for code, place in zip(found.chosen.tolist(), found.places, strict=True)
    ]
    kinds = [("latent", found.latents), ("centroid", found.centroids), ("code", found.codes)]
    low, high = _bounds(found)
    from_left = (found.latents - low) / (high - low)
    places = torch.stack([from_left[:, 0], 1 - from_left[:, 1]], 1)
    return Plot(
        f"{name} of {len(found.latents):,} latents, {found.size:,} codes and {found.k:,} centroids",
        f"Latents in blue, centroids of a k-means in green, codes in red, {found.size - found.used} dead ones hollow.",
        lambda figure: draw_map(found, figure),
        {
            "kind": [kind for kind, points in kinds for _ in points],
            "x": [float(x) for _, points in kinds for x in points[:, 0]],
            "y": [float(y) for _, points in kinds for y in points[:, 1]],
        },
        _SIZE,
        "Latents blue, centroids green, codes red, dead ones hollow. One projection, fitted on the latents, shows all.",
        Hover(places, found.patches, labels),
    )


def _bounds(found: Map) -> tuple[Tensor, Tensor]:
    """Of what is drawn: the lowest and the highest corner."""
    points = torch.cat([found.latents, found.codes, found.centroids])
    low, high = points.amin(0), points.amax(0)
    margin = _MARGIN * (high - low).clamp(min=1e-6)
    return low - margin, high + margin


def draw_map(found: Map, figure: Figure) -> None:
    """All over the figure, so that a place in the plane is one in the picture."""
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    (left, bottom), (right, top) = (corner.tolist() for corner in _bounds(found))
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.axis("off")
    dead = found.counts == 0

    def dots(label: str, points: Tensor, **style: Any) -> None:
        axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), label=f"{len(points):,} {label}", **style)

    dots("latents", found.latents, s=3, color=_LATENTS, alpha=0.4, linewidths=0)
    dots("centroids", found.centroids, s=22, color=_CENTROIDS, marker="s", linewidths=0)
    dots("codes in use", found.codes[~dead], s=22, color=_CODES, linewidths=0)
    if bool(dead.any()):
        dots("dead codes", found.codes[dead], s=18, facecolors="none", edgecolors=_CODES, linewidths=0.8)
    axes.legend(loc="best")


def check_beside(page: Path) -> None:
    """Raise CodebookError where files that are no part of an earlier page would be replaced."""
    for kind in ("png", "svg", "parquet"):
        if (path := page.with_suffix(f".{kind}")).exists() and not page.exists():
            raise CodebookError(f"{path} is there, and is of no page; give --report another name")


def write_map(found: Map, page: Path) -> dict[str, str]:
    """PNG, SVG and, where pyarrow is installed, a parquet of all points beside the page. Returns their paths."""
    import matplotlib
    from matplotlib.figure import Figure

    written = dict[str, str]()
    with matplotlib.rc_context({**STYLE, "text.color": "black"}):
        figure = Figure(figsize=_SIZE)
        draw_map(found, figure)
        for kind in ("png", "svg"):
            path = page.with_suffix(f".{kind}")
            about = {"Date": None} if kind == "svg" else None
            with partial_file(path, force=True) as target:
                figure.savefig(target, format=kind, dpi=150, transparent=False, metadata=about)
                put_in_place(path)
            written[kind] = str(path)
    table = _table(found)
    if table is not None:
        import pyarrow.parquet

        path = page.with_suffix(".parquet")
        with partial_file(path, force=True) as target:
            pyarrow.parquet.write_table(table, target)
            put_in_place(path)
        written["parquet"] = str(path)
    return written


def _table(found: Map) -> object:
    """All points, for viewers of embeddings; None without pyarrow."""
    try:
        import pyarrow
    except ImportError:
        return None
    nothing = [None] * (found.k + found.size)
    kinds = [("latent", found.latents), ("centroid", found.centroids), ("code", found.codes)]
    return pyarrow.table(
        {
            "kind": [kind for kind, points in kinds for _ in points],
            "x": torch.cat([points[:, 0] for _, points in kinds]).numpy(),
            "y": torch.cat([points[:, 1] for _, points in kinds]).numpy(),
            "code": [*found.chosen.tolist(), *[None] * found.k, *range(found.size)],
            "image": [*(str(place.item) for place in found.places), *nothing],
            "row": [*(place.row for place in found.places), *nothing],
            "column": [*(place.column for place in found.places), *nothing],
        }
    )
