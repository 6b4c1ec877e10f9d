"""`codebook map`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..options import DATA, LATENTS, LONG_RUN, MODEL, EngineOption, ModelArgument, command
from ..run import named_after, request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.latent_map import Map


@command("Look", "codebook map model.safetensors --data images/", DATA, LATENTS, MODEL, LONG_RUN)
def map_(
    options: dict[str, Any],
    model: ModelArgument = None,
    k: Annotated[
        int | None,
        typer.Option("--k", "-k", metavar="K", help="Centroids. Left out: as many as codes in use, at most 2,048."),
    ] = None,
    method: Annotated[
        Literal["umap", "pca"], typer.Option(help="umap keeps neighbors together, pca distances.")
    ] = "umap",
    engine: EngineOption = "auto",
) -> None:
    """Latents, codes and k-means centroids in one plane: a page to move over, a PNG, an SVG and a parquet.

    The page goes to --report, the others beside it; left out: <name>.map.html in the current folder.
    """

    def work(watch: Watch) -> Map:
        from codebook_tools.report.html.map import check_beside
        from codebook_tools.workflows.latent_map import look_at_map

        check_beside(page)
        return look_at_map(request_of(model, options), k, method, watch, engine)

    page = options["report"] or named_after(model, ".map.html")
    run_and_show(work, {**options, "report": page})
