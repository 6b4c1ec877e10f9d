"""Parts of one pass over data, each done by itself on any machine, and added in any order."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import count, islice
from operator import add
from pathlib import Path

from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.data.rows import Rows
from codebook_tools.data.sampling import smallest
from codebook_tools.data.splits import Splits
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.accumulators import Sums
from codebook_tools.evaluation.figures import measurement_of
from codebook_tools.evaluation.quoted.registry import QUOTED
from codebook_tools.evaluation.quoted.tally import remarks
from codebook_tools.evaluation.stats_file import Part, read_hashed, read_part, write_part
from codebook_tools.evaluation.usage import tally
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.runtime.version import VERSION
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import Result
from codebook_tools.workflows.session import Opened
from codebook_tools.workflows.target import Split, Target

SAMPLE = 131_072
"""Latents of a codebook that are kept with its counts, at most."""

SAMPLE_BYTES = 256 << 20
"""Of all codebooks' together: of many, or of wide ones, fewer are kept."""

_OPTIONS = {"seed": "--seed", "batch_size": "--batch-size", "limit": "--limit", "size": "--size"}


def sample_limit(dims: Sequence[int]) -> int:
    """Latents of each codebook that are kept with its counts. dims: of all codebooks."""
    return min(SAMPLE, SAMPLE_BYTES // sum(4 * dim + 8 for dim in dims))


def parse_shard(text: str) -> tuple[int, int]:
    """Part I, from 1, of N, from "I/N".

    Raises:
        CodebookError: There is no such part.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)  # more are a slip: no scheduler begins a million jobs
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise CodebookError(
            f"--shard {text}: expected I/N, I from 1 to N, such as 3/8 for the third of eight, N below a million; in a "
            "Slurm array, --array=1-8 and --shard $SLURM_ARRAY_TASK_ID/8"
        )
    return i, n


def check_shard(request: Request, stats: Path | None, merging: Sequence[Path]) -> None:
    """Check that a part of the data can be measured by itself.

    Args:
        request: The model and its data.
        stats: Where the counts go.
        merging: Files of parts that are to be added.

    Raises:
        CodebookError: Options exclude each other, or torchrun's processes share the data already.
    """
    if merging:
        raise CodebookError("--shard measures a part and --merge adds parts; give one of the two")
    if stats is None:
        raise CodebookError("--shard without --stats: give a FILE to write, or there is nothing to merge")
    if request.latents:
        raise CodebookError("--shard is a part of the images; --latents are read in one pass, leave out --shard")
    if distributed.count() > 1:
        raise CodebookError(f"torchrun's {distributed.count()} processes part the data already; leave out --shard")


def in_part(opened: Opened, shard: tuple[int, int]) -> Opened:
    """The same, with passes over one part of its data. shard: I, from 1, and N."""
    i, n = shard
    calibration, test = (replace(data, part=(i - 1, n)) for data in (opened.calibration, opened.test))
    return replace(opened, calibration=calibration, test=test)


def of_part(opened: Target, measured: Sums) -> Sums:
    """The sums of a part without figures that say nothing of it, for which there is a warning."""
    whole = [name for name in measured.quoted if QUOTED[name].of_set]
    opened.warnings += [f"{name} is of a whole set, not of its shards: --merge gives it" for name in whole]
    return replace(measured, quoted={name: of for name, of in measured.quoted.items() if name not in whole})


def part_of(opened: Opened, measured: Sums, shard: tuple[int, int], watch: Watch) -> Part:
    """Count the codes of the calibration data, or of the test data where there are no others.

    Args:
        opened: With passes over its part of the data.
        measured: The sums of a measurement of it.
        shard: I, from 1, and N.
        watch: Progress and seconds by phase.
    """
    request, model = opened.request, opened.model
    split: Split = "calibration" if len(opened.calibration) else "test"
    limit = sample_limit([book.codebook.dim for book in model.books])
    with watch.phase("encode"):
        source = opened.source(split, "tokens")
        total, samples = tally(model, source, seed=request.seed, limit=limit, watch=watch)
    first = model.books[0]
    about = {
        "family": model.family,
        "metric": first.metric.name,
        "seed": request.seed,
        "batch_size": request.batch_size,
        "data": _digest(opened.splits),
        "version": VERSION,
        **{name: opened.settings[name] for name in _SETTINGS},
        **({} if "psnr" in model.modality.figures else {"psnr": False}),
        **{name: opened.settings[name] for name in ("metrics",) if name in opened.settings},
    }
    return Part(model.checkpoint.sha256, split, about, shard, total, opened.unreadable(), measured, samples)


_SETTINGS = (
    *("images", "limit", "size", "crop", "channels", "modality", "latent_axis", "group"),
    *("skip_bad", "input_range", "precision"),
)


def _digest(splits: Splits) -> str:
    """SHA-256 of the names of all items, by split."""
    names = hashlib.sha256()
    for items in (splits.train, splits.validation, splits.test):
        names.update(len(items).to_bytes(8, "big"))
        digests = [bytes.fromhex(items.sha256)] if isinstance(items, Rows) else [item.digest for item in items]
        names.update(b"".join(digests))
    return names.hexdigest()


def merge(request: Request, files: Sequence[Path], stats: Path | None, watch: Watch) -> Result:
    """The measurement of all data, from files of its parts, in any order.

    Args:
        request: The model.
        files: One for each part.
        stats: Where to write the counts of all; None for nowhere.
        watch: Progress and seconds by phase.

    Raises:
        CodebookError: The files are not all of one pass over that model, or a part is missing or there twice.
    """
    if request.data or request.test_data or request.latents:
        raise CodebookError("--merge adds what was measured before; leave out --data, --test-data and --latents")
    if request.metrics:
        raise CodebookError("--merge gives the --metrics of the shards; leave it out")
    checkpoint = request.checkpoint
    if f"{PREFIX}shard" in checkpoint.metadata:
        raise CodebookError(f"{request.source} is a part itself; MODEL comes first: measure MODEL --merge FILE...")
    with watch.phase("load"):
        whole = merged([(path, read_part(path)) for path in files], checkpoint.sha256, request.source)
    assert whole.measured is not None
    if stats is not None:
        with watch.phase("write"):
            distributed.by_first(lambda: write_part(stats, whole, request.force))
    few = [f"{name} ({why})" for name, why in sorted(whole.bad.items())]
    return Result(
        command="measure",
        model=request.title,
        family=str(whole.about["family"]),
        settings={**whole.about, "merged": [str(path) for path in files], **({"stats": str(stats)} if stats else {})},
        seed=int(str(whole.about["seed"])),
        warnings=(
            *([f"{len(few)} unreadable items were skipped: {'; '.join(few[:3])}"] if few else []),
            *remarks(whole.measured.quoted, "items"),
        ),
        before=measurement_of(whole.measured, "test", () if "psnr" in whole.about else ("psnr",)),
        bytes={"before": checkpoint.nbytes, "after": None},
        seconds=watch.seconds,
    )


def merged(parts: Sequence[tuple[Path, Part]], checkpoint: str, model: Path) -> Part:
    """All parts as one.

    Args:
        parts: Path and content of each.
        checkpoint: SHA-256 of the model.
        model: Path of the model, for messages.

    Raises:
        CodebookError: The parts are not all of one pass over that model, or one is missing or there twice.
    """
    for path, part in parts:
        if part.checkpoint != checkpoint:
            raise CodebookError(f"{path} was measured of another checkpoint than {model}; name its own as MODEL")
    (first_path, first), *others = parts
    for path, part in others:
        _check_alike(first_path, first, path, part)
    by_number = dict[int, tuple[Path, Part]]()
    for path, part in parts:
        number, of = part.shard
        if number in by_number:
            raise CodebookError(f"{path} and {by_number[number][0]} are both shard {number} of {of}; give each once")
        by_number[number] = path, part
    if missing := first.shard[1] - len(by_number):
        few = list(islice((number for number in count(1) if number not in by_number), min(missing, 5)))
        raise CodebookError(_how_to_mend(few, missing, first, model))
    limit = sample_limit([book.dim for book in first.counted.books])
    paths = [path for path, _ in parts]
    return replace(
        first,
        shard=(1, 1),
        counted=reduce(add, (part.counted for _, part in parts)),
        measured=reduce(add, (part.measured for _, part in parts if part.measured)),
        bad={name: why for _, part in parts for name, why in part.bad.items()},
        samples=tuple(smallest((read_hashed(path, book) for path in paths), limit) for book in first.counted.books),
    )


def _check_alike(first_path: Path, first: Part, path: Path, part: Part) -> None:
    """Raise CodebookError, with the first setting that differs, unless two parts are of one pass."""
    ours, theirs = (
        {"shards": of.shard[1], "split": of.split, "codebooks": [b.key for b in of.counted.books], **of.about}
        for of in (first, part)
    )
    for name in sorted(ours.keys() | theirs.keys(), key=lambda name: (name == "data", name)):  # others say more
        if ours.get(name) != theirs.get(name):
            what = name.replace("_", " ")
            both = f"{path} is of {what} {theirs.get(name)}, {first_path} of {ours.get(name)}"
            if name == "data":
                both = f"{path} and {first_path} are of different data: names and splits of the items are not the same"
            raise CodebookError(f"{both}; shards of one pass share all settings and data")


def _how_to_mend(few: Sequence[int], missing: int, of: Part, model: Path) -> str:
    """few: the first of the missing shards."""
    named = ", ".join(map(str, few)) + (f" and {missing - len(few)} more" if missing > len(few) else "")
    settings = {option: of.about.get(name) for name, option in _OPTIONS.items()}
    texts = {option: ",".join(map(str, of)) if isinstance(of, list) else of for option, of in settings.items()}
    options = " ".join(f"{option} {value}" for option, value in texts.items() if value is not None)
    command = f"codebook measure {model} --shard {few[0]}/{of.shard[1]} --stats FILE {options}"
    shards = "shards" if missing > 1 else "shard"
    return f"{shards} {named} of {of.shard[1]} missing; run `{command}`, with --data and the rest as it was"
