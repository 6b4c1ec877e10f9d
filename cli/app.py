"""The commands. Each parses, makes one call into the library, and gives one output."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .calls import named_after, numbers, operate_on, recipe_of, request_of, run_and_show
from .completion import rows
from .exits import one_voice, reported, show_result
from .options import (
    DataOptions,
    FolderOptions,
    Init,
    JsonFlag,
    LatentsOption,
    LongRunOptions,
    MergeMethod,
    ModelArgument,
    ModelOptions,
    NoStepsTrainOptions,
    Plane,
    RemapOptions,
    RestartMethod,
    ResultOptions,
    RunOptions,
    Sort,
    StatsOption,
    TrainOptions,
    WriteOptions,
    takes,
)
from .recipes import run_recipe

if TYPE_CHECKING:  # imported where it is used: --help must not import torch
    from codebook_tools.codebook import Strategy
    from codebook_tools.codes import Codes
    from codebook_tools.comparison import Comparison
    from codebook_tools.diagnosis.diagnose import Diagnosis
    from codebook_tools.mapping import Map
    from codebook_tools.outcome import Result
    from codebook_tools.sweep import Sweep
    from codebook_tools.watch import Watch


class Commands(TyperGroup):
    """Our commands, and one for each strategy that another distribution adds."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(_added_strategies())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        ours = super().get_command(ctx, cmd_name)
        return _added_command(cmd_name) if ours is None and cmd_name in _added_strategies() else ours


app = typer.Typer(
    cls=Commands,
    help="Codebook surgery for pretrained VQ models: repair a collapsed codebook, and prove what it did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from codebook_tools.version import VERSION

        print(VERSION)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: codebook inspect model.safetensors", rich_help_panel="Look")
def inspect(model: ModelArgument = None, json_: JsonFlag = False) -> None:
    """Which codebooks a checkpoint holds, and what depends on them. Reads its header alone."""
    with reported():
        from codebook_tools.demo import DEMO
        from codebook_tools.inspection import inspect_checkpoint
        from codebook_tools.report.inspection import inspection_table

        show_result(inspect_checkpoint(model or DEMO), inspection_table, json_)


@app.command(
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
        from codebook_tools.merging import parse_shard
        from codebook_tools.operate import measure_model

        request = request_of(model, {**given, "latents": latents, "force": force})
        part = parse_shard(shard) if shard else None
        return measure_model(request, watch, stats, part, [*(merge or ()), *(more or ())])

    run_and_show(work, given)


@app.command(epilog="Example: codebook refit model.safetensors --k 128 --data images/", rich_help_panel="Operate")
@takes(TrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def refit(
    given: dict[str, Any],
    k: Annotated[int, typer.Option("--k", metavar="K", help="Codes of the new codebook.")],
    model: ModelArgument = None,
    init: Annotated[Init, typer.Option(help="Where k-means starts; used: at the codes in use.")] = Init.KMEANSPP,
    iterations: Annotated[int, typer.Option(metavar="N", help="At most so many Lloyd iterations.")] = 300,
    stats: StatsOption = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="k-means over all latents, not a million, of --latents or --latents-cache.")
    ] = False,
    latents: LatentsOption = None,
) -> None:
    """Re-Fit: a new codebook by k-means on the latents, then fine-tune with the original encoder and decoder."""

    def strategy(watch: Watch) -> Strategy:
        from codebook_tools.strategies import Refit

        return Refit(k=k, init=init.value, iterations=iterations, exact=exact, seed=given["seed"], watch=watch)

    operate_on("refit", model, strategy, {**given, "stats": stats, "latents": latents})


@app.command(epilog="Example: codebook prune model.safetensors --threshold 0 --data images/", rich_help_panel="Operate")
@takes(NoStepsTrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def prune(
    given: dict[str, Any],
    model: ModelArgument = None,
    threshold: Annotated[int, typer.Option(metavar="N", help="Drop codes that count N or fewer.")] = 0,
    keep: Annotated[int | None, typer.Option(metavar="K", help="Keep the K most used codes instead.")] = None,
    stats: StatsOption = None,
    latents: LatentsOption = None,
) -> None:
    """Drop the codes that are hardly used. Threshold 0 changes no reconstruction of what was counted."""

    def strategy(watch: Watch) -> Strategy:
        from codebook_tools.strategies import Prune

        return Prune(threshold=threshold, keep=keep)

    operate_on("prune", model, strategy, {**given, "stats": stats, "latents": latents})


@app.command(
    epilog="Example: codebook quantize model.safetensors --k 128 --method pnn --data images/", rich_help_panel="Operate"
)
@takes(NoStepsTrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def quantize(
    given: dict[str, Any],
    model: ModelArgument = None,
    k: Annotated[int | None, typer.Option("--k", metavar="K", help="Merge the codes into K.")] = None,
    method: Annotated[MergeMethod, typer.Option(help="How codes are merged.")] = MergeMethod.KMEANS,
    bits: Annotated[int | None, typer.Option(metavar="B", help="Round entries to B bits, 2 to 8, instead.")] = None,
    stats: StatsOption = None,
    latents: LatentsOption = None,
) -> None:
    """Merge codes that are alike, weighted by use, or round their entries to few bits. Latents are not looked at."""

    def strategy(watch: Watch) -> Strategy:
        from codebook_tools.strategies import Quantize

        return Quantize(k=k, method=method.value, bits=bits, seed=given["seed"])

    operate_on("quantize", model, strategy, {**given, "stats": stats, "latents": latents})


@app.command(
    epilog="Example: codebook restart model.safetensors --method error --data images/ --steps 1000",
    rich_help_panel="Operate",
)
@takes(NoStepsTrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def restart(
    given: dict[str, Any],
    model: ModelArgument = None,
    method: Annotated[
        RestartMethod,
        typer.Option(help="Where to: latents drawn by error or alike, used codes, or the nearest latent."),
    ] = RestartMethod.ERROR,
    threshold: Annotated[int, typer.Option(metavar="N", help="Move codes that count N or fewer.")] = 0,
    stats: StatsOption = None,
    latents: LatentsOption = None,
) -> None:
    """Move dead codes to where latents are. The codebook keeps its size, and codes in use stay as they are."""

    def strategy(watch: Watch) -> Strategy:
        from codebook_tools.strategies import Restart

        return Restart(method=method.value, threshold=threshold, seed=given["seed"])

    operate_on("restart", model, strategy, {**given, "stats": stats, "latents": latents})


@app.command(
    epilog="Example: codebook grow model.safetensors --k 128 --data images/ --steps 1000", rich_help_panel="Operate"
)
@takes(NoStepsTrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def grow(
    given: dict[str, Any],
    k: Annotated[int, typer.Option("--k", metavar="K", help="Codes of the new codebook, not fewer than are in use.")],
    model: ModelArgument = None,
    stats: StatsOption = None,
    latents: LatentsOption = None,
) -> None:
    """Keep the codes in use, drop the dead ones, and place new ones where the error is, up to K."""

    def strategy(watch: Watch) -> Strategy:
        from codebook_tools.strategies import Grow

        return Grow(k=k, seed=given["seed"])

    operate_on("grow", model, strategy, {**given, "stats": stats, "latents": latents})


@app.command(epilog="Example: codebook condense model.safetensors --k 128 --data images/", rich_help_panel="Operate")
@takes(TrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def condense(
    given: dict[str, Any],
    k: Annotated[int, typer.Option("--k", metavar="K", help="Codes of the new codebook.")],
    model: ModelArgument = None,
    stats: StatsOption = None,
    latents: LatentsOption = None,
) -> None:
    """Fine-tune with up to four times as many codes, and merge them into K on the way."""

    def strategy(watch: Watch) -> Strategy:
        from codebook_tools.strategies import Condense

        return Condense(k=k, seed=given["seed"])

    operate_on("condense", model, strategy, {**given, "stats": stats, "latents": latents})


@app.command(
    epilog="Example: codebook compare model.safetensors --k 128 --data images/ --seeds 3", rich_help_panel="Decide"
)
@takes(TrainOptions, DataOptions, ModelOptions, FolderOptions, LongRunOptions)
def compare(
    given: dict[str, Any],
    k: Annotated[int, typer.Option("--k", metavar="K", help="Codes, for the strategies that take a number.")],
    model: ModelArgument = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            autocompletion=rows,
            help="Rows to run, such as untouched+same-recipe,prune,refit; an unknown one lists them. Left out: every "
            "strategy and the controls.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each row, for mean and spread.")] = 1,
) -> None:
    """Every strategy and the controls, with the same data, batches and steps: one table. Goes on where it stopped."""

    def work(watch: Watch) -> Comparison:
        from codebook_tools.compare import compare as run_compare

        folder = given["output"] or named_after(model, ".compare")
        names = [name.strip() for name in strategies.split(",")] if strategies else []
        request = request_of(model, {**given, "output": None})
        return run_compare(request, k, names, recipe_of(given), seeds=seeds, folder=folder, watch=watch)

    run_and_show(work, given)


@app.command(
    epilog="Example: codebook sweep model.safetensors --k 16,32,64,128,256 --data images/", rich_help_panel="Decide"
)
@takes(DataOptions, ModelOptions, FolderOptions, LongRunOptions)
def sweep(
    given: dict[str, Any],
    model: ModelArgument = None,
    k: Annotated[str, typer.Option("--k", metavar="K,K,K", help="The sizes to try.")] = "16,32,64,128,256,512",
    lambda_: Annotated[
        str,
        typer.Option(
            "--lambda",
            metavar="L,L,L",
            help="Also Re-Fits that pay so much for a bit, in variances of the latents; 0.001,0.01 say.",
        ),
    ] = "",
) -> None:
    """How many codes? Error, distortion and bits over K, right after each surgery, and a K that suffices."""
    sizes, prices = numbers(k, int), numbers(lambda_, float)

    def work(watch: Watch) -> Sweep:
        from codebook_tools.sweep import sweep as run_sweep

        folder = given["output"] or named_after(model, ".sweep")
        request = request_of(model, {**given, "output": None})
        return run_sweep(request, sizes, prices, folder, watch)

    run_and_show(work, given)


@app.command(epilog="Example: codebook codes model.safetensors --data images/ --sort error", rich_help_panel="Look")
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
        from codebook_tools.codes import look_at_codes

        return look_at_codes(request_of(model, given), top, most, sort.value, watch)

    run_and_show(work, {**given, "report": given["report"] or named_after(model, ".codes.html")})


@app.command("map", epilog="Example: codebook map model.safetensors --data images/", rich_help_panel="Look")
@takes(DataOptions, ModelOptions, LongRunOptions)
def map_(
    given: dict[str, Any],
    model: ModelArgument = None,
    k: Annotated[
        int | None, typer.Option("--k", metavar="K", help="Centroids. Left out: as many as there are codes in use.")
    ] = None,
    method: Annotated[Plane, typer.Option(help="umap keeps neighbours together, pca distances.")] = Plane.UMAP,
) -> None:
    """Latents, codes and k-means centroids in one plane: a page to move over, a PNG, an SVG and a parquet.

    The page goes to --report, the others beside it; left out: <name>.map.html in the current folder.
    """

    def work(watch: Watch) -> Map:
        from codebook_tools.mapping import look_at_map

        return look_at_map(request_of(model, given), k, method.value, watch)

    run_and_show(work, {**given, "report": given["report"] or named_after(model, ".map.html")})


@app.command(epilog="Example: codebook run recipe.yaml --data images/", rich_help_panel="Operate")
@takes(DataOptions, ModelOptions, ResultOptions, LongRunOptions)
def run(
    given: dict[str, Any],
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file with a list of surgeries.")],
    model: ModelArgument = None,
) -> None:
    """Surgeries in a row, by a recipe, written as one. What is given here comes before what the recipe says."""
    run_recipe(context, recipe, model, given)


@app.command(
    epilog="Example: codebook finetune model.safetensors --data images/ --steps 2000", rich_help_panel="Operate"
)
@takes(TrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
def finetune(given: dict[str, Any], model: ModelArgument = None) -> None:
    """Train on with the original encoder and decoder; the codebook keeps its size, and dead codes are revived."""
    operate_on("finetune", model, None, given)


@app.command(
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
        from codebook_tools.diagnosis.diagnose import diagnose as run_diagnose

        return run_diagnose(request_of(model, given), watch, against, trace)

    run_and_show(work, given)


@app.command(
    epilog="Example: codebook verify model.refit-k128.safetensors --against model.safetensors",
    rich_help_panel="Check and carry over",
)
def verify(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The checkpoint that was written.")],
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The original. Left out: the bundled demo.")
    ] = None,
    map_: Annotated[
        list[Path] | None,
        typer.Option(
            "--map",
            metavar="FILE",
            help="Its index map. Left out: the one beside it. Of a prior: those that it followed. Repeatable.",
        ),
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Check a written checkpoint and its index map against the original. Exit code 3 where something is wrong."""
    with reported():
        from codebook_tools.demo import DEMO
        from codebook_tools.report.tables import verification_table
        from codebook_tools.verify import verify_checkpoint

        found = verify_checkpoint(model, against or DEMO, map_ or [])
        show_result(found, verification_table, json_)
        if not found.ok:
            raise typer.Exit(3)


@app.command(
    epilog="Example: codebook remap tokens.npy prior/ --map model.prune-k86.index_map.safetensors",
    rich_help_panel="Check and carry over",
)
@takes(RemapOptions)
def remap(
    given: dict[str, Any],
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="TOKENS|PRIOR...",
            help="Token files (.npy, .safetensors, .parquet, .tar), and priors: a .safetensors file or a directory.",
        ),
    ],
    maps: Annotated[
        list[Path],
        typer.Option("--map", metavar="FILE", help="The index map. Repeated: those of surgeries in a row, in order."),
    ],
) -> None:
    """Rewrite stored tokens, or a prior's embedding and head, by the index map of a surgery."""
    with reported():
        from codebook_tools.downstream.remap import RemapRequest
        from codebook_tools.downstream.remap import remap as run_remap
        from codebook_tools.downstream.translation import parse_on_removed
        from codebook_tools.report.tables import remap_table

        from .screen import print_warnings

        request = RemapRequest(
            sources=tuple(sources),
            maps=tuple(maps),
            on_removed=parse_on_removed(given["on_removed"]),
            offset=given["offset"],
            special=given["special"],
            codebook_key=tuple(given["codebook_key"] or ()),
            axis=given["axis"],
            key=tuple(given["key"] or ()),
            embedding_key=tuple(given["embedding_key"] or ()),
            head_key=tuple(given["head_key"] or ()),
            pad_to_multiple=given["pad_to_multiple"],
            output=given["output"],
            force=given["force"],
        )
        found = run_remap(request)
        print_warnings(found.warnings, given["quiet"])
        show_result(found, remap_table, given["json_"])


def _added_strategies() -> set[str]:
    return {point.name for point in entry_points(group="codebook_tools.strategies")}


def _added_command(name: str) -> Any:
    added = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)

    @added.command(name, help=f"The strategy {name}, which another installed distribution adds.")
    @takes(NoStepsTrainOptions, DataOptions, ModelOptions, WriteOptions, LongRunOptions)
    def run(
        given: dict[str, Any],
        model: ModelArgument = None,
        set_: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="FIELD=VALUE", help="A field of the strategy, as JSON or text. Repeatable."),
        ] = None,
    ) -> None:
        def strategy(watch: Watch) -> Strategy:
            from codebook_tools.strategies import make_strategy

            return make_strategy(name, set_ or [])

        operate_on(name, model, strategy, given)

    return typer.main.get_command(added)


def main() -> None:
    """The console script."""
    with one_voice():
        app()


if __name__ == "__main__":
    main()
