"""The options that commands share, in groups; a command takes a group by naming it in `@takes`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .completion import devices, families


# The library's choices once more: --help and completion must not import the library, and with it torch.
class Train(StrEnum):
    ALL = "all"
    DECODER = "decoder"
    NONE = "none"


class Update(StrEnum):
    EMA = "ema"
    GRADIENT = "gradient"
    FROZEN = "frozen"


class Loss(StrEnum):
    MSE = "mse"
    L1 = "l1"


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"


class Init(StrEnum):
    KMEANSPP = "kmeans++"
    AFKMC2 = "afkmc2"
    USED = "used"
    RANDOM = "random"


class MergeMethod(StrEnum):
    KMEANS = "kmeans"
    PNN = "pnn"


class RestartMethod(StrEnum):
    ERROR = "error"
    RANDOM = "random"
    SPLIT = "split"
    NEAREST = "nearest"


class Sort(StrEnum):
    SHARE = "share"
    MAP = "map"
    ERROR = "error"


class Plane(StrEnum):
    UMAP = "umap"
    PCA = "pca"


class Metric(StrEnum):
    EUCLIDEAN = "euclidean"
    COSINE = "cosine"
    COSINE_UNIT = "cosine-unit"
    DOT = "dot"


class Channels(StrEnum):
    MIX = "mix"
    FIRST = "first"


def _group(panel: str) -> Callable[..., Any]:
    """Options of one panel of --help: names, then metavar and help."""

    def option(
        *names: str, help: str, metavar: str | None = None, complete: Callable[[str], list[str]] | None = None
    ) -> Any:
        return typer.Option(
            *names, help=help, metavar=metavar, rich_help_panel=panel, show_default=True, autocompletion=complete
        )

    return option


_data, _model, _train, _output, _run = map(_group, ("Data", "Model", "Fine-tuning", "Output", "Running"))
_tokens, _prior = map(_group, ("Tokens", "Priors"))

ModelArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL",
        help="A .safetensors, .pt, .pth or .ckpt file, or a directory as diffusers or transformers saves it; left out, "
        "the bundled demo.",
        show_default=False,
    ),
]
StatsOption = Annotated[
    Path | None, typer.Option("--stats", metavar="FILE", help="What `measure --stats` wrote, in place of images.")
]
LatentsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--latents",
        metavar="FILE",
        help="Latents in place of images: .npy or .safetensors, (n, dim). Repeatable. No network is needed then.",
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]


@dataclass(frozen=True)
class DataOptions:
    data: Annotated[
        list[str] | None,
        _data(
            metavar="PATH",
            help="Images to calibrate and train on: a folder, .tar shards ({0000..0009} too), .npy or .npz; for audio "
            "codecs, folders or shards of .wav and .flac. Repeatable. Left out: the bundled sample.",
        ),
    ] = None
    test_data: Annotated[
        list[str] | None,
        _data(metavar="PATH", help="What is only reported on. Left out: a tenth of --data, or of --latents."),
    ] = None
    limit: Annotated[
        int | None, _data(metavar="N", help="At most N items of each of --data and --test-data, drawn by seed.")
    ] = None
    size: Annotated[
        int | None,
        _data(metavar="N", help="Side of the square that images are cropped and resized to; of sound, samples."),
    ] = None
    channels: Annotated[
        Channels | None,
        _data(help="What becomes of channels that the network has not: luma or mean, or the first. Left out: refused."),
    ] = None
    skip_bad: Annotated[bool, _data("--skip-bad", help="Go on past what cannot be read, and count it.")] = False


@dataclass(frozen=True)
class ModelOptions:
    network: Annotated[
        str | None,
        _model(
            metavar="FILE.py:FUNCTION",
            help="Your own network: FUNCTION(codebook_size=K) returns a module with encode and decode. Runs that file.",
        ),
    ] = None
    family: Annotated[
        str | None, _model(metavar="NAME", complete=families, help="The layout's family, where recognition errs.")
    ] = None
    codebook_key: Annotated[
        list[str] | None,
        _model(metavar="KEY", help="The codebook's tensor, where several fit or none is sure. Repeatable."),
    ] = None
    metric: Annotated[
        Metric | None, _model(help="How the nearest code is found, where the family's way is not yours.")
    ] = None
    companion: Annotated[
        list[str] | None,
        _model(
            metavar="KEY=ROLE",
            help="What a tensor beside a codebook holds: sums, counts, copy, flag or fresh. Repeatable.",
        ),
    ] = None
    as_stored: Annotated[
        list[str] | None,
        _model(metavar="KEY", help="This tensor beside a codebook does not change the codes. Repeatable."),
    ] = None
    input_range: Annotated[
        str | None,
        _model(metavar="LOW,HIGH", help="Of the network's images. Left out: the best of -1,1; 0,1; -0.5,0.5."),
    ] = None


@dataclass(frozen=True)
class TrainOptions:
    steps: Annotated[
        int | None,
        _train(metavar="N", help="Fine-tuning steps, 0 for none. Left out: 1000; 0 without data of the model's own."),
    ] = None
    train: Annotated[Train, _train(help="Which networks train.")] = Train.ALL
    codebook_update: Annotated[Update, _train(help="How the codes move; ema also revives dead ones.")] = Update.EMA
    lr: Annotated[
        float | None,
        _train(metavar="RATE", help="Adam's learning rate after warm-up. Left out: by the network's width and depth."),
    ] = None
    loss: Annotated[Loss, _train(help="Error that reconstructions are trained on.")] = Loss.MSE
    perceptual: Annotated[
        str | None,
        _train(metavar="auto|FILE", help="Add LPIPS: VGG16's weights from torch's cache, or a file of them."),
    ] = None
    adversarial: Annotated[
        bool, _train("--adversarial", help="Add a discriminator of patches, as VQGANs have; it first learns alone.")
    ] = False
    distill: Annotated[
        float, _train(metavar="WEIGHT", help="Also stay near what the original model reconstructs; 1: as near.")
    ] = 0.0
    entropy: Annotated[
        float, _train(metavar="WEIGHT", help="Also make latents sure of their codes, and their choices even; 0.1, say.")
    ] = 0.0
    accumulate: Annotated[int, _train(metavar="N", help="Batches to a step, where memory holds no larger ones.")] = 1
    clip: Annotated[
        float | None, _train(metavar="NORM", help="The most that the norm of all gradients may be. Left out: no limit.")
    ] = None
    weight_ema: Annotated[
        float | None,
        _train(metavar="DECAY", help="Validate and keep a moving average of the weights, of 0.999 say."),
    ] = None
    patience: Annotated[
        int | None,
        _train(metavar="N", help="Stop after N looks at validation data, a tenth of the steps apart, without gain."),
    ] = None
    min_usage: Annotated[
        float, _train(metavar="SHARE", help="Stop where codes in use become fewer than SHARE of all. 0: never.")
    ] = 0.0


@dataclass(frozen=True)
class NoStepsTrainOptions(TrainOptions):
    """For commands that fine-tune only when asked to."""

    steps: Annotated[int | None, _train(metavar="N", help="Fine-tuning steps after the surgery, 0 for none.")] = 0


@dataclass(frozen=True)
class ResultOptions:
    """For commands that write a model."""

    output: Annotated[
        Path | None,
        _output("--output", "-o", metavar="PATH", help="Left out: beside MODEL, <name>.<command>-k<K>, of its kind."),
    ] = None
    force: Annotated[bool, _output("--force", help="Replace the output if it exists.")] = False
    dry_run: Annotated[
        bool, _output("--dry-run", help="Say what would be done and written, its size and time; write nothing.")
    ] = False


@dataclass(frozen=True)
class WriteOptions(ResultOptions):
    """After a fine-tuning or without."""

    resume: Annotated[
        bool, _train("--resume", help="Go on with an interrupted fine-tuning from what it left beside the output.")
    ] = False
    log_dir: Annotated[
        Path | None, _train(metavar="DIR", help="Write losses, usage and perplexity there, for TensorBoard.")
    ] = None


@dataclass(frozen=True)
class FolderOptions:
    output: Annotated[
        Path | None,
        _output("--output", "-o", metavar="FOLDER", help="Left out: <name>.compare in the current folder."),
    ] = None


@dataclass(frozen=True)
class RunOptions:
    batch_size: Annotated[int, _run(metavar="N", help="Images at a time, in passes and in training.")] = 64
    workers: Annotated[
        int | None,
        _run(metavar="N", help="Processes that decode ahead, 0 for none. Left out: 0 on a CPU, up to 8 beside a GPU."),
    ] = None
    device: Annotated[
        str,
        _run(
            metavar="NAME",
            complete=devices,
            help="Where networks run: cpu, cuda, cuda:1, xpu, mps. auto takes cuda, xpu or mps where one is there.",
        ),
    ] = "auto"
    precision: Annotated[Precision, _run(help="For the networks; nearest codes are decided in fp32 either way.")] = (
        Precision.FP32
    )
    compiled: Annotated[
        bool, _run("--compile", help="Compile the network with torch.compile: worth its minute on long runs.")
    ] = False
    seed: Annotated[int, _run(metavar="N", help="Seed of everything that is drawn.")] = 0
    deterministic: Annotated[
        bool, _run("--deterministic", help="Only algorithms that repeat bit by bit, on a GPU too.")
    ] = False
    report: Annotated[
        Path | None, _output(metavar="FILE.html", help="Also write a page: figures, plots and pictures in one file.")
    ] = None
    json_: JsonFlag = False
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no warnings.")] = False
    verbose: Annotated[bool, typer.Option("--verbose", help="Also settings, seconds by phase and the trace.")] = False


@dataclass(frozen=True)
class LongRunOptions(RunOptions):
    """For commands that go over the calibration data."""

    latents_cache: Annotated[
        Path | None,
        _run(metavar="DIR", help="Keep the latents of the calibration data there: the next run reads them."),
    ] = None


@dataclass(frozen=True)
class RemapOptions:
    on_removed: Annotated[
        str,
        _tokens(
            metavar="error|nearest|mask=ID",
            help="What the token of a removed code becomes; for a prior, where new codes have their rows from.",
        ),
    ] = "error"
    offset: Annotated[int, _tokens(metavar="N", help="The id of code 0. Ids below it are special and stay.")] = 0
    special: Annotated[
        int,
        _tokens(metavar="N", help="How many special ids follow the codes in token files; they move with their end."),
    ] = 0
    codebook_key: Annotated[
        list[str] | None,
        _tokens(metavar="KEY", help="The codebook whose tokens these are; repeated, those along --axis in order."),
    ] = None
    axis: Annotated[
        int | None, _tokens(metavar="N", help="The axis of the tokens that runs over several codebooks, from 0.")
    ] = None
    key: Annotated[
        list[str] | None,
        _tokens(metavar="NAME", help="The tensor, column or ending of tar members that holds tokens. Repeatable."),
    ] = None
    embedding_key: Annotated[
        list[str] | None, _prior(metavar="KEY", help="A prior's input embedding, where its name does not tell.")
    ] = None
    head_key: Annotated[
        list[str] | None, _prior(metavar="KEY", help="Its output head. Repeatable, as --embedding-key is.")
    ] = None
    pad_to_multiple: Annotated[int, _prior(metavar="N", help="Pad a prior's vocabulary at its end to such a size.")] = 1
    output: Annotated[
        Path | None,
        _output("--output", "-o", metavar="PATH", help="Left out: beside each, <name>.remapped, of its kind."),
    ] = None
    force: Annotated[bool, _output("--force", help="Replace the output if it exists.")] = False
    json_: JsonFlag = False
    quiet: Annotated[bool, typer.Option("--quiet", help="No warnings.")] = False


def takes(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate command(given, own options...): the groups' options join its own, and arrive in `given`, by name."""
    return partial(_joined, groups)


@cache
def _hints(group: type) -> dict[str, Any]:
    """Evaluated once, not for every option of every command: nobody waits for --help."""
    return get_type_hints(group, include_extras=True)


def _joined(groups: tuple[type, ...], command: Callable[..., None]) -> Callable[..., None]:
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command).parameters.values()
        if parameter.name != "given"
    ]
    shared = [
        inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=entry.default,
            annotation=_hints(group)[entry.name],
        )
        for group in groups
        for entry in fields(group)
    ]
    names = {parameter.name for parameter in own}

    def run(**values: Any) -> None:
        given = {name: value for name, value in values.items() if name not in names}
        command(given, **{name: values[name] for name in names})

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
    return run
