"""What a checkpoint holds, what its codes do and why: commands that change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import reported, show_result
from .options import (
    DataOptions,
    JsonFlag,
    LatentsOption,
    LongRunOptions,
    ModelArgument,
    ModelOptions,
    Plane,
    RunOptions,
    Sort,
    takes,
)
from .run import named_after, request_of, run_and_show

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.code_cards import Codes
    from codebook_tools.workflows.diagnose import Diagnosis
    from codebook_tools.workflows.latent_map import Map
    from codebook_tools.workflows.result import Result

looks = typer.Typer()


@looks.command(epilog="Example: codebook inspect model.safetensors", rich_help_panel="Look")
def inspect(model: ModelArgument = None, json_: JsonFlag = False) -> None:
    """Which codebooks a checkpoint holds, and what depends on them. Reads its header, codebooks and counts."""
    with reported():
        from codebook_tools.models.demo import DEMO
        from codebook_tools.report.terminal.inspection import inspection_table
        from codebook_tools.workflows.inspect_checkpoint import inspect_checkpoint

        show_result(inspect_checkpoint(model or DEMO), inspection_table, json_)


@looks.command(
    epilog="Example: codebook measure model.safetensors --data images/ --test-data held-out/", rich_help_panel="Look"
)
@takes(DataOptions, ModelOptions, RunOptions)
def measure(
    given: dict[str, Any],
    model: ModelArgument = None,
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="More files of --merge, as a pattern names them.", show_default=False),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write counts and a sample of latents of the --data, or else of the --test-data, for --stats there.",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Part I, from 1, of N of the data alone, into --stats; for --merge."),
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Add what all shards wrote, in place of data: one pass, in any order."),
    ] = None,
    latents: LatentsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace that file if it exists.")] = False,
) -> None:
    """Usage, perplexity, distortion and reconstruction error on the test data."""
    if more and not merge:
        raise typer.BadParameter(f"{more[0]}: one MODEL at a time; more files go with --merge")

    def work(watch: Watch) -> Result:
        from codebook_tools.workflows.measure_shards import parse_shard
        from codebook_tools.workflows.operate import measure_model

        request = request_of(model, {**given, "latents": latents, "force": force})
        part = parse_shard(shard) if shard else None
        return measure_model(request, watch, stats, part, [*(merge or ()), *(more or ())])

    run_and_show(work, given)


@looks.command(
    epilog="Example: codebook diagnose model.refit-k128.safetensors --against model.safetensors --data images/",
    rich_help_panel="Look",
)
@takes(DataOptions, ModelOptions, RunOptions)
def diagnose(
    given: dict[str, Any],
    model: ModelArgument = None,
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The original, before the surgery or the training.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `refit --json` or `finetune --json` wrote of its training."),
    ] = None,
) -> None:
    """Why a codebook collapsed: cause by cause, with the number that says so. Exit code 3 where one is found."""

    def work(watch: Watch) -> Diagnosis:
        from codebook_tools.workflows.diagnose import diagnose as run_diagnose

        return run_diagnose(request_of(model, given), watch, against, trace)

    run_and_show(work, given)


@looks.command(epilog="Example: codebook codes model.safetensors --data images/ --sort error", rich_help_panel="Look")
@takes(DataOptions, ModelOptions, RunOptions)
def codes(
    given: dict[str, Any],
    model: ModelArgument = None,
    top: Annotated[int, typer.Option("--top", metavar="N", help="Patches of each kind for a code.")] = 6,
    most: Annotated[int, typer.Option("--most", metavar="N", help="At most so many codes.")] = 512,
    sort: Annotated[Sort, typer.Option(help="Which codes come first; map: by what they look like.")] = Sort.SHARE,
) -> None:
    """What each code stands for: its patches, what it decodes to, its neighbours; and images with their tokens.

    The page goes to --report; left out: <name>.codes.html in the current folder.
    """

    def work(watch: Watch) -> Codes:
        from codebook_tools.workflows.code_cards import look_at_codes

        return look_at_codes(request_of(model, given), top, most, sort.value, watch)

    run_and_show(work, {**given, "report": given["report"] or named_after(model, ".codes.html")})


@looks.command("map", epilog="Example: codebook map model.safetensors --data images/", rich_help_panel="Look")
@takes(DataOptions, ModelOptions, LongRunOptions)
def map_(
    given: dict[str, Any],
    model: ModelArgument = None,
    k: Annotated[
        int | None, typer.Option("--k", "-k", metavar="K", help="Centroids. Left out: as many as codes in use.")
    ] = None,
    method: Annotated[Plane, typer.Option(help="umap keeps neighbours together, pca distances.")] = Plane.UMAP,
) -> None:
    """Latents, codes and k-means centroids in one plane: a page to move over, a PNG, an SVG and a parquet.

    The page goes to --report, the others beside it; left out: <name>.map.html in the current folder.
    """

    def work(watch: Watch) -> Map:
        from codebook_tools.report.html.map import check_beside
        from codebook_tools.workflows.latent_map import look_at_map

        check_beside(page)
        return look_at_map(request_of(model, given), k, method.value, watch)

    page = given["report"] or named_after(model, ".map.html")
    run_and_show(work, {**given, "report": page})
