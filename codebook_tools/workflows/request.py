"""What is asked of a workflow, as it is typed or given from Python: declared without torch, for `--help` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from codebook_tools.codebook import METRIC_NAMES
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.quoted.registry import Metrics, parse_metrics
from codebook_tools.models.demo import DEMO
from codebook_tools.runtime.hub_ids import title_of
from codebook_tools.runtime.options import Option

if TYPE_CHECKING:
    from codebook_tools.checkpoints.read import Checkpoint
    from codebook_tools.data.items import InMemory
    from codebook_tools.models.user_network import NetworkMaker
    from codebook_tools.models.wrapped import Wrapped
    from codebook_tools.training.tracking import Tracking
else:
    InMemory = NetworkMaker = Tracking = Wrapped = Any

_MOST_WORKERS = 1024
"""Processes that decode; each is a copy of this one, and no machine has more cores."""


def parse_range(text: str) -> tuple[float, float]:
    """The lowest and the highest value of an input, from "0,1".

    Raises:
        CodebookError: The text is not two numbers.
    """
    try:
        low, high = (float(number) for number in text.split(","))
    except ValueError:
        raise CodebookError(f"--input-range {text}: expected two numbers, such as 0,1") from None
    return low, high


def parse_size(text: str) -> int | tuple[int, int]:
    """The side of an image, or its height and width, from "64" or "48,64".

    Raises:
        CodebookError: The text is neither.
    """
    try:
        sides = [int(side) for side in text.split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise CodebookError(f"--size {text}: expected a number of pixels, such as 64, or height,width, such as 48,64")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


@dataclass(frozen=True)
class Request:
    """A model, its data, and how to work on them. A field with an Option is typed under its name.

    Attributes:
        model: A file or directory; None for the bundled demo.
        gallery: Whether a few test images are kept for a page, with their reconstruction in each phase.
        sample: Whether the bundled sample is data of the model, as it is of the demo.
        typed: Whether a user asks, whose model must not be trained on the bundled sample.
        wrapped: A module in memory, in place of a file.
        config: What was read from codebook.toml, by key.
        notes: Warnings that came up before the model was opened.

    Raises:
        CodebookError: A number is out of range.
    """

    model: Path | None = None
    data: Annotated[
        tuple[str | InMemory, ...],
        Option(
            "Images, sound for codecs, or arrays: a folder, .tar shards, .npy, .npz, .pt, .safetensors or .parquet (of "
            "several arrays or columns FILE:NAME), or hf://datasets/org/name[:split][:column]. Repeatable. Left out: "
            "the bundled sample.",
            metavar="PATH",
        ),
    ] = ()
    test_data: Annotated[
        tuple[str | InMemory, ...],
        Option("What is only reported on. Left out: a tenth of --data, or of --latents.", metavar="PATH", panel="Data"),
    ] = ()
    stats: Annotated[
        Path | None,
        Option("What `measure --stats` wrote, in place of images.", metavar="FILE", names=("--stats",), panel="Data"),
    ] = None
    latents: Annotated[
        tuple[str, ...],
        Option(
            "What the encoder makes, in place of images: .npy or .safetensors, (n, dim). Repeatable. With one "
            "--codebook-key: what that codebook meets.",
            metavar="FILE",
            panel="Data",
        ),
    ] = ()
    limit: Annotated[
        int | None,
        Option(
            "At most N items of each of --data and --test-data, drawn by seed; of data on the hub the first N.",
            metavar="N",
            panel="Data",
        ),
    ] = None
    size: Annotated[
        int | tuple[int, int] | None,
        Option(
            "Images are cropped and resized to N x N pixels, or to height,width; of sound, samples.",
            metavar="N|H,W",
            panel="Data",
            parse=parse_size,
        ),
    ] = None
    crop: Annotated[
        str,
        Option(
            "What of an image is kept: its center, in the shape that the network gets, or all of it, resized.",
            choices=("center", "none"),
            panel="Data",
        ),
    ] = "center"
    channels: Annotated[
        str | None,
        Option(
            "What becomes of channels that the network has not: luma or mean, or the first. Left out: refused.",
            choices=("mix", "first"),
            panel="Data",
        ),
    ] = None
    modality: Annotated[
        str,
        Option(
            "What the data are: images, audio or arrays, which go to a network of yours as they are. auto tries it.",
            metavar="NAME",
            panel="Data",
        ),
    ] = "auto"
    latent_axis: Annotated[
        int | None,
        Option("Axis of latents that holds the dimensions of a code, where two fit.", metavar="N", panel="Data"),
    ] = None
    group: Annotated[
        Path | None,
        Option(
            "One key a row of --data, .npy or text: rows of one key stay in one split.", metavar="FILE", panel="Data"
        ),
    ] = None
    skip_bad: Annotated[bool, Option("Go on past what cannot be read, and count it.", panel="Data")] = False
    network: Annotated[
        NetworkMaker | None,
        Option(
            "Your own model: FUNCTION(codebook_size=K) returns a module with encode and decode.",
            metavar="FILE.py:FUNCTION",
        ),
    ] = None
    family: Annotated[
        str | None, Option("The layout's family, where recognition errs.", metavar="NAME", panel="Model")
    ] = None
    codebook_key: Annotated[
        tuple[str, ...],
        Option("The codebook's tensor, where several fit or none is sure. Repeatable.", metavar="KEY", panel="Model"),
    ] = ()
    metric: Annotated[
        str | None,
        Option(
            "How the nearest code is found, where the family's way is not yours.",
            choices=METRIC_NAMES,
            panel="Model",
        ),
    ] = None
    companion: Annotated[
        tuple[str, ...],
        Option(
            "What a tensor beside a codebook holds: sums, counts, copy, flag or fresh. Repeatable.",
            metavar="KEY=ROLE",
            panel="Model",
        ),
    ] = ()
    as_stored: Annotated[
        tuple[str, ...],
        Option("This tensor beside a codebook does not change the codes. Repeatable.", metavar="KEY", panel="Model"),
    ] = ()
    input_range: Annotated[
        tuple[float, float] | None,
        Option(
            "Of the network's images. Left out: the best of -1,1; 0,1; -0.5,0.5.",
            metavar="LOW,HIGH",
            panel="Model",
            parse=parse_range,
        ),
    ] = None
    metrics: Annotated[
        Metrics | None,
        Option(
            "Also measure rfid, lpips, pesq, stoi, si-sdr, mel, stft, robustness; rfid=FILE, lpips=FILE: with weights.",
            metavar="A,B",
            panel="Figures",
            parse=parse_metrics,
        ),
    ] = None
    output: Annotated[
        Path | None,
        Option(
            "Where to write. Left out: beside MODEL (of the hub: here), <name>.<command>-k<K>.",
            metavar="PATH",
            names=("--output", "-o"),
        ),
    ] = None
    force: Annotated[bool, Option("Replace the output if it exists.", panel="Output")] = False
    push_to_hub: Annotated[
        str | None,
        Option("Also commit the verified result to this repository of the hub.", metavar="ORG/NAME", panel="Output"),
    ] = None
    private: Annotated[bool, Option("Make that repository private.", panel="Output")] = False
    resume: Annotated[
        bool,
        Option("Go on with an interrupted fine-tuning from what it left beside the output.", panel="Fine-tuning"),
    ] = False
    track: Annotated[
        str | None,
        Option(
            "Write losses, usage, perplexity and all figures for a tracker. Left out: tensorboard with --log-dir.",
            choices=("tensorboard", "trackio", "wandb"),
            panel="Fine-tuning",
        ),
    ] = None
    log_dir: Annotated[
        Path | None,
        Option("The tracker's folder. Left out: its own, of TensorBoard ./runs.", metavar="DIR", panel="Fine-tuning"),
    ] = None
    batch_size: Annotated[int, Option("Images at a time, in passes and in training.", metavar="N", panel="Running")] = (
        64
    )
    workers: Annotated[
        int | None,
        Option(
            "Processes that decode ahead, 0 for none. Left out: 0 on a CPU, up to 8 beside a GPU.",
            metavar="N",
            panel="Running",
        ),
    ] = None
    device: Annotated[
        str,
        Option(
            "Where networks run: cpu, cuda, cuda:1, xpu, mps. auto takes cuda, xpu or mps where one is there.",
            metavar="NAME",
            panel="Running",
        ),
    ] = "auto"
    precision: Annotated[
        str,
        Option(
            "For the networks; nearest codes are decided in fp32 either way.",
            choices=("fp32", "bf16"),
            panel="Running",
        ),
    ] = "fp32"
    compiled: Annotated[
        bool,
        Option(
            "Compile the network with torch.compile: worth its minute on long runs.",
            names=("--compile",),
            panel="Running",
        ),
    ] = False
    seed: Annotated[int, Option("Seed of everything that is drawn.", metavar="N", panel="Running")] = 0
    latents_cache: Annotated[
        Path | None,
        Option(
            "Keep the latents of the calibration data there: the next run reads them.", metavar="DIR", panel="Running"
        ),
    ] = None
    gallery: bool = False
    sample: bool = False
    typed: bool = False
    wrapped: Wrapped | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from codebook_tools.data.channels import MIXINGS

        for name in ("limit", "size", "batch_size"):
            value = getattr(self, name)
            if value is not None and min(value if isinstance(value, tuple) else (value,)) < 1:
                raise CodebookError(f"{name.replace('_', '-')}={value} is below 1")
        if self.crop not in ("center", "none"):
            raise CodebookError(f"crop={self.crop}: expected center or none")
        if self.latent_axis == 0:
            raise CodebookError("latent-axis=0 is the axis of the items; expected 1 or more, or -1 for the last")
        if self.workers is not None and not 0 <= self.workers <= _MOST_WORKERS:
            raise CodebookError(f"workers={self.workers} is not within 0 and {_MOST_WORKERS}")
        if self.channels not in (None, *MIXINGS):
            raise CodebookError(f"channels={self.channels}: expected {' or '.join(MIXINGS)}")
        if not 0 <= self.seed < 2**63:
            raise CodebookError(f"seed={self.seed} is not within 0 and {2**63 - 1}")
        if self.metrics and (self.latents or self.stats):
            raise CodebookError("--metrics is of reconstructions; --latents and --stats have none: give --data")

    @property
    def stated(self) -> dict[str, str]:
        """The stated roles of tensors beside a codebook, by key.

        Raises:
            CodebookError: A role is unknown.
        """
        from codebook_tools.checkpoints.read import AS_STORED
        from codebook_tools.models.ema_state import GIVEN

        said = dict.fromkeys(self.as_stored, AS_STORED)
        for text in self.companion:
            key, equals, role = text.rpartition("=")
            if not equals or not key or role not in GIVEN:
                raise CodebookError(f"--companion {text}: expected KEY=ROLE, a role being one of {', '.join(GIVEN)}")
            said[key] = role
        return said

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model's file, opened once, with the stated roles of its tensors.

        Raises:
            CodebookError: It cannot be read, or lacks a tensor that a role is stated of.
        """
        from codebook_tools.checkpoints.read import AS_STORED, read_checkpoint

        checkpoint = self.wrapped.checkpoint() if self.wrapped else read_checkpoint(self.source)
        stated = self.stated
        missing = next((key for key in stated if key not in checkpoint.entries), None)
        if missing is not None:
            option = "--as-stored" if stated[missing] == AS_STORED else "--companion"
            raise CodebookError(f"{option} {missing}: no such tensor in {checkpoint.path}")
        return replace(checkpoint, stated=stated)

    def alike(self, settings: Mapping[str, Any]) -> Request:
        """The request with what an earlier run chose, by its settings: the kind of data, and the input range."""
        if "modality" not in settings:
            return self
        bounds = settings["input_range"]
        return replace(
            self,
            modality=settings["modality"],
            input_range=None if bounds is None else (bounds[0], bounds[1]),
        )

    @property
    def knows_sample(self) -> bool:
        """Whether the bundled sample need not be asked for."""
        return (self.model is None and self.wrapped is None) or self.sample

    def tracking(self, command: str, settings: Mapping[str, object] | None = None) -> Tracking | None:
        """Where the run of a command is written for a tracker, with its settings; None for nowhere."""
        from codebook_tools.training.tracking import Tracking

        tracker = self.track or ("tensorboard" if self.log_dir else None)
        name = self.output.stem if self.output else f"{self.source.stem}.{command}"
        return Tracking(tracker, self.log_dir, name, self.resume, settings or {}) if tracker else None

    @property
    def trainable(self) -> bool:
        """Whether there are data that the model may be trained on: its own, not the bundled sample."""
        return not (self.latents or self.stats) and bool(self.data or self.knows_sample)

    def require_trainable(self, steps: int) -> None:
        """Check that a fine-tuning of so many steps has data of the model's own.

        Raises:
            CodebookError: A user's model would be trained on the bundled sample.
        """
        if self.typed and steps and not (self.data or self.knows_sample or self.latents or self.stats):
            raise CodebookError(
                f"{steps} steps of fine-tuning need data of the model's own: give some with --data; the bundled sample "
                "of two photographs is none"
            )

    @property
    def source(self) -> Path:
        """Path of the model; of a wrapped module, the name of its class."""
        return Path(self.wrapped.name) if self.wrapped else self.model or DEMO

    @property
    def title(self) -> str:
        """How results call the model: its path, or id and commit on the hub."""
        return self.wrapped.name if self.wrapped else title_of(self.source)

    @property
    def read(self) -> tuple[Path, ...]:
        """All paths that are named to be read."""
        stats = () if self.stats is None else (self.stats,)
        return (
            self.source,
            *stats,
            *(Path(name) for name in (*self.data, *self.test_data, *self.latents) if isinstance(name, str)),
        )
