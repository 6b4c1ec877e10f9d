"""One surgery on a running model, in memory: operate on each codebook, measure, fine-tune, measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import REMOVED, Codebook, Strategy, Surgery
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.figures import Measurement, with_changed
from codebook_tools.evaluation.usage import Survey, Tokens
from codebook_tools.models.model import Book
from codebook_tools.remapping.nearest_map import nearest_map
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import device_of
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import on_device
from codebook_tools.strategies.padding import common_sizes, filled, remark
from codebook_tools.training.codebook_ema import ExtraCodes
from codebook_tools.training.finetune import FineTune, FineTuned, finetune
from codebook_tools.training.losses.objective import judges
from codebook_tools.training.resume import SnapshotFile
from codebook_tools.training.tracking import Scalars
from codebook_tools.workflows.target import Opened, Streamed, Target

Latents = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Calibration:
    """The calibration data as the model encodes and assigns them before anything changes.

    Attributes:
        first: Counts and a sample of latents of the first codebook that is operated on.
        tokens: Of every codebook.
        codebooks: All of them, on the CPU.
    """

    first: Survey
    tokens: tuple[Tokens, ...]
    codebooks: tuple[Codebook, ...]


@dataclass(frozen=True, eq=False)
class Stages:
    """Figures and index maps of surgery and fine-tuning.

    Attributes:
        surgery: Figures on the test data after the surgery; None without one.
        finetuned: Figures on the test data after fine-tuning; None without it.
        kept: The phase that the model is left in.
        index_maps: As Surgery's, without the codes that fine-tuning revived, by index of each codebook that may have
            changed.
        tuned: The fine-tuning; None without it.
        tokens: Of the calibration data by the state that is kept, of every codebook; None where none were needed.
    """

    surgery: Measurement | None
    finetuned: Measurement | None
    kept: str
    index_maps: Mapping[int, Tensor]
    tuned: FineTuned | None
    tokens: tuple[Tokens, ...] | None = None


def require_training_data(opened: Opened, recipe: FineTune) -> None:
    """Check that a fine-tuning has what its gradients, its losses and its choice of a state need.

    Raises:
        CodebookError: A split is empty, a loss cannot judge these data, or codes would move that cannot be written.
    """
    moving = recipe.steps and recipe.codebook_update != "frozen"
    read = next((book.key for book in opened.model.books if moving and book.read is not None), None)
    if read is not None:
        raise CodebookError(
            f"fine-tuning moves the codes of {read}, which the model's quantize makes of its rows in a way that cannot "
            "be inverted: --codebook-update frozen, or --steps 0"
        )
    if recipe.steps and not (opened.splits.train and opened.splits.validation):
        calibration = f"{len(opened.calibration)} calibration {opened.model.modality.many}"
        raise CodebookError(f"{calibration} leave the training or validation split empty; give more --data")
    if recipe.steps and (recipe.perceptual or recipe.adversarial):
        items, pixels = opened.calibration.load(opened.splits.train[: recipe.batch_size])
        if items:
            judges(opened.model, recipe, pixels)  # now: it would raise after the surgery


def calibrate(target: Target, watch: Watch) -> Calibration:
    """Encode and assign the calibration data with the codebooks as they are."""
    first, books = target.survey(target.model.chosen[0], watch), tuple(map(on_cpu, target.model.books))
    if len(books) == 1:
        return Calibration(first, (Tokens(first.counts, first.codes),), books)
    return Calibration(first, target.tokens(watch), books)


def on_cpu(book: Book) -> Codebook:
    """The codebook with its vectors on the CPU."""
    return replace(book.codebook, vectors=book.codebook.vectors.cpu())


def encoder_latents(target: Target) -> Latents:
    """The calibration latents that coverage of each codebook is measured against, (n, dim), by the encoder as it is."""
    return tuple(map(target.reference_latents, range(len(target.model.books))))


def measure_stage(opened: Streamed, latents: Latents, watch: Watch) -> Measurement:
    """Measure the model as it is on the test data. latents: of `encoder_latents`."""
    return opened.measurement(opened.sums(latents, watch))


def perform(target: Target, strategy: Strategy, calibration: Calibration, watch: Watch) -> dict[int, Surgery]:
    """Operate on the chosen codebooks one after another, each on the residuals that those before it leave, and install.

    Codebooks of one size stay of one size, and sizes that the config would refuse are filled up with dead codes.

    Args:
        target: The codebooks and their latents.
        strategy: Called once for each chosen codebook.
        calibration: The data before anything changed.
        watch: Progress and seconds by phase.

    Returns:
        The surgeries by index of the codebook.

    Raises:
        CodebookError: The strategy refuses a codebook, which the message names where there are several.
    """
    model = target.model
    strategy = on_device(strategy, device_of(target.request.device))
    before = [on_cpu(book) for book in model.books]
    counts = {stage: tokens.counts for stage, tokens in enumerate(calibration.tokens)}
    surgeries = dict[int, Surgery]()
    for stage in model.chosen:
        survey = calibration.first if stage == model.chosen[0] else target.survey(stage, watch)
        counts[stage] = survey.counts
        several = isinstance(target, Streamed) and len(model.books) > 1
        with watch.phase("strategy"), _named(model.books[stage].key, several):
            whole = survey.sampled and getattr(strategy, "exact", False)
            latents = target.all_latents(stage, survey) if whole else survey.sample
            # Strategies see the same everywhere, but machines that differ may round differently.
            surgeries[stage] = distributed.of_first(strategy(before[stage], latents, survey.counts))
        model.install(surgeries[stage].codebook, stage)
    asked = [book.codebook.size for book in model.books]
    sizes = common_sizes([book.size for book in before], asked, model.power_of_two)
    for stage in (stage for stage, size in enumerate(sizes) if size > asked[stage]):
        unchanged = Surgery(before[stage], torch.arange(before[stage].size))
        surgeries[stage] = filled(surgeries.get(stage, unchanged), before[stage], counts[stage], sizes[stage])
        model.install(surgeries[stage].codebook, stage)
    target.warnings += remark([book.key for book in model.books], asked, sizes)
    return surgeries


@contextmanager
def _named(key: str, several: bool) -> Iterator[None]:
    """With several codebooks, an error names the one that it is about."""
    try:
        yield
    except CodebookError as error:
        raise (CodebookError(f"{key}: {error}") if several else error) from error


def run_stages(
    opened: Streamed,
    surgeries: Mapping[int, Surgery],
    calibration: Calibration,
    latents: Latents,
    recipe: FineTune,
    *,
    before: Measurement | None = None,
    seed: int,
    watch: Watch,
    saving: SnapshotFile | None = None,
    log: Scalars | None = None,
) -> Stages:
    """Measure what `perform` made, and fine-tune; the model is left in the better state by validation error.

    Args:
        opened: The model, with the new codebooks installed.
        surgeries: By index of the codebook; none to fine-tune the codebooks as they are.
        calibration: The data before the surgery.
        latents: Of `encoder_latents`, by the encoder as it is.
        recipe: The fine-tuning; of 0 steps for none.
        before: The figures before the surgery, which later ids are compared with.
        seed: Of the fine-tuning.
        watch: Progress and seconds by phase.
        saving: Where an interrupted fine-tuning is kept; None for nowhere.
        log: Gets the history of the fine-tuning; None for none.
    """
    model = opened.model
    kept, after, finetuned, tuned = "before", None, None, None
    index_maps = {stage: surgery.index_map for stage, surgery in surgeries.items()}
    if surgeries:
        several = len(model.books) > 1  # then what one leaves to the next is not what it was
        kept, after = "surgery", measure_stage(opened, encoder_latents(opened) if several else latents, watch)
    else:
        index_maps = {stage: torch.arange(model.books[stage].codebook.size) for stage in model.chosen}
    warnings, tokens = list[str](), None
    has_ids = before is not None and before.ids is not None
    if recipe.steps or (surgeries and has_ids):
        tokens = current_tokens(opened, calibration, bool(surgeries), watch)
    if after and tokens and has_ids:
        after = with_changed(after, before, _nearest(opened, calibration, index_maps, tokens))
    if recipe.steps:
        assert isinstance(opened, Opened) and tokens is not None, "latents from files are fine-tuned on"
        counts = [each.counts for each in tokens]
        more, first = _more(opened, surgeries, recipe, calibration, watch), index_maps
        if more:
            first = {stage: (surgeries[stage].first or surgeries[stage]).index_map for stage in index_maps}
        splits = opened.splits
        train, validation = (opened.calibration.subset(items) for items in (splits.train, splits.validation))
        with watch.phase("finetune"):
            tuned = finetune(
                model, train, validation, recipe, counts,
                seed=seed, watch=watch, saving=saving, log=log, more=more,
                powers={stage: surgery.power for stage, surgery in surgeries.items()},
            )  # fmt: skip
        model.round_to_stored()
        if tuned.diverged:
            warnings.append(f"{tuned.diverged}; an earlier state was taken")
        if tuned.begun:
            warnings.append(
                f"at step {tuned.begun} the validation error was above that at the start: the fine-tuning began again "
                f"from there, at the lower learning rate {tuned.lr:.2g}"
            )
        if tuned.stopped:
            warnings.append(tuned.stopped)
        finetuned = measure_stage(opened, encoder_latents(opened), watch)
        tuned_maps = {stage: _after(tuned, stage, index_map) for stage, index_map in first.items()}
        tuned_tokens = opened.tokens(watch) if has_ids else None
        if tuned_tokens:
            finetuned = with_changed(finetuned, before, _nearest(opened, calibration, tuned_maps, tuned_tokens))
        if tuned.gained:
            kept, index_maps, tokens = "finetuned", tuned_maps, tuned_tokens
            warnings += _collapse(after, finetuned)
        else:
            tuned.start.restore(model)
            model.round_to_stored()
            stage_kept = {"before": "the original", "surgery": "the state after surgery"}[kept]
            why = "lost codes" if tuned.collapsed else f"did not lower the validation error below that of {stage_kept}"
            warnings.append(f"fine-tuning {why}: {stage_kept} is kept")
    opened.warnings += warnings
    return Stages(after, finetuned, kept, index_maps, tuned, tokens)


def _after(tuned: FineTuned, stage: int, index_map: Tensor) -> Tensor:
    """The index map of a surgery after a fine-tuning, which may have merged and revived codes."""
    if stage in tuned.merged:
        index_map = torch.where(index_map == REMOVED, REMOVED, tuned.merged[stage][index_map])
    return index_map.masked_fill(torch.isin(index_map, tuned.best.revived[stage].nonzero()[:, 0]), REMOVED)


def _nearest(
    opened: Streamed, calibration: Calibration, index_maps: Mapping[int, Tensor], tokens: Sequence[Tokens]
) -> list[Tensor]:
    """Of each quantizer stage (old size,) int64: the nearest map from the codebooks of old to those of the model."""
    maps = list[Tensor]()
    for stage, old in enumerate(calibration.codebooks):
        samples = (calibration.tokens[stage].sample, tokens[stage].sample)
        new, index_map = on_cpu(opened.model.books[stage]), index_maps.get(stage)
        maps.append(torch.arange(old.size) if index_map is None else nearest_map(index_map, old, new, samples))
    return [maps[stage] for stage in opened.model.route]


def _more(
    opened: Opened, surgeries: Mapping[int, Surgery], recipe: FineTune, calibration: Calibration, watch: Watch
) -> dict[int, ExtraCodes]:
    """The larger codebooks that a fine-tuning is to begin with, by index, and the counts of their codes."""
    first = {stage: surgery.first for stage, surgery in surgeries.items() if surgery.first}
    if not first or recipe.codebook_update != "ema":
        return {}
    model, books = opened.model, opened.model.books
    for stage, surgery in first.items():
        model.install(surgery.codebook, stage)
    counts = [tokens.counts for tokens in current_tokens(opened, calibration, True, watch)]
    larger = {stage: ExtraCodes(model.books[stage].vectors, counts[stage]) for stage in first}
    model.books = books
    return larger


def _collapse(after: Measurement | None, finetuned: Measurement) -> list[str]:
    """A warning where fewer than half of the codes in use after the surgery are left after the fine-tuning."""
    before = sum(use.used for use in after.codebooks) if after else 0
    left = sum(use.used for use in finetuned.codebooks)
    if 2 * left >= before:
        return []
    return [f"fine-tuning lowered the error with {left} of {before} codes in use: --steps 0 keeps them, more steps may"]


def current_tokens(opened: Streamed, calibration: Calibration, moved: bool, watch: Watch) -> tuple[Tokens, ...]:
    """The tokens of the calibration data by the model as it is.

    Args:
        opened: The model and its data.
        calibration: The data at an earlier state of the codes.
        moved: Whether codes changed since then; networks did not. With one codebook the latents are the same, and are
            not encoded once more.
        watch: Progress and seconds by phase.
    """
    if not moved:
        return calibration.tokens
    if len(opened.model.books) > 1:
        return opened.tokens(watch)
    codebook, first = on_cpu(opened.model.books[0]), calibration.first
    rows, share = first.sample.vectors, len(first.sample) / first.total
    codes = nearest(rows, codebook)
    counts = torch.bincount(codes, minlength=codebook.size).double() / share
    return (Tokens(counts, codes),)
