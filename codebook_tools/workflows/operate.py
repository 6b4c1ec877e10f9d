"""The operation, whole: measure, operate on the codebooks, install, measure, fine-tune, measure, write, read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from codebook_tools.checkpoints.atomic import check_apart, check_free
from codebook_tools.checkpoints.layout import training_path
from codebook_tools.checkpoints.write import write_checkpoint
from codebook_tools.codebook import Codebook, Strategy, Surgery
from codebook_tools.data.items import items_sha256
from codebook_tools.data.rows import Rows
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.beam import beam_gain, check_beam
from codebook_tools.evaluation.figures import Measurement
from codebook_tools.evaluation.model_card import Done, cards
from codebook_tools.evaluation.quality_warnings import blur_warnings, worse_warnings
from codebook_tools.evaluation.stats_file import write_part
from codebook_tools.evaluation.usage import Tokens
from codebook_tools.models.evidence import told_by_file
from codebook_tools.models.load import check_size_follows
from codebook_tools.models.output import remarks, written_config
from codebook_tools.models.proof import Proof, read_partial
from codebook_tools.models.remarks import dependents_warning, stale_state
from codebook_tools.remapping.nearest_map import nearest_map
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.runtime.version import VERSION
from codebook_tools.strategies.quantize import packed_bytes
from codebook_tools.training.finetune import FineTune
from codebook_tools.training.resume import SnapshotFile
from codebook_tools.training.tracking import Tracker, figures_by_phase, require_tracker, tracked
from codebook_tools.workflows.gallery import GalleryImage, gallery_of_run
from codebook_tools.workflows.measure_shards import check_shard, in_part, merge, of_part, part_of
from codebook_tools.workflows.pipeline import (
    Stages,
    calibrate,
    current_tokens,
    encoder_latents,
    on_cpu,
    perform,
    require_training_data,
    run_stages,
)
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import (
    Result,
    asked_size,
    check_published,
    check_request_output,
    header,
    provenance_of,
    published,
    request_output,
    settings_of,
)
from codebook_tools.workflows.session import open_request
from codebook_tools.workflows.target import Opened, Streamed, Target
from codebook_tools.workflows.without_network import (
    FileTarget,
    goes_without_images,
    open_file,
    open_latents_of,
    open_target,
    refuse_steps,
)


def measure_model(
    request: Request,
    watch: Watch,
    stats: Path | None = None,
    shard: tuple[int, int] | None = None,
    merging: Sequence[Path] = (),
    beam: int = 1,
) -> Result:
    """Usage, perplexity, distortion and reconstruction error of a checkpoint on the test data.

    Args:
        request: The model and its data.
        watch: Progress and seconds by phase.
        stats: Where to write the counts of the calibration data, or of the test data where there are no others, and the
            sums of the measurement; None for nowhere.
        shard: I, from 1, and N, of the part of the data to measure; None for all.
        merging: Files of all parts, in place of data.
        beam: Above 1: also measure what a beam search of this width over residual levels gains.

    Raises:
        CodebookError: Model or data cannot be opened, or options exclude each other.
    """
    if beam != 1 and (shard is not None or merging or request.latents):
        raise CodebookError(f"--beam {beam} is measured on all data; leave out --shard, --merge and --latents")
    if shard is not None:
        check_shard(request, stats, merging)
    if stats is not None:
        check_free(stats, request.force)
        check_apart([stats], (*request.read, *merging))
        if not stats.absolute().parent.is_dir():
            raise CodebookError(f"--stats {stats}: there is no folder {stats.parent}; make it first")
    if merging:
        return merge(request, merging, stats, watch)
    target = open_target(request, watch, measuring=True)
    if isinstance(target, Opened):
        check_beam(target.model, beam, target.few if beam > 1 else [])
        if isinstance(target.test.items, Rows):
            target.pass_once()
    target.warnings += told_by_file(target.model.checkpoint, target.codebooks)
    target.settings["metric"] = target.model.books[target.model.chosen[0]].metric.name
    with watch.phase("measure"):
        latents = encoder_latents(target)  # of all data, so that all parts have the same reference
    if isinstance(target, Opened) and shard is not None:
        target = in_part(target, shard)
        target.settings["shard"] = f"{shard[0]}/{shard[1]}"
    sums = target.sums(latents, watch, compared=False)
    if stats is not None:
        part = part_of(target, sums, shard or (1, 1), watch) if isinstance(target, Opened) else target.part(watch)
        with watch.phase("write"):
            distributed.by_first(lambda: write_part(stats, part, request.force))
        target.settings["stats"] = str(stats)
    before = None if shard and not sums.images else target.measurement(of_part(target, sums) if shard else sums)
    gallery, gain = tuple[GalleryImage, ...](), None
    if isinstance(target, Opened) and beam > 1:
        with watch.phase("measure"):
            gain = beam_gain(target.model, target.test.whole(), beam, target.batch, watch)
    if isinstance(target, Opened) and request.gallery and not shard:
        with watch.phase("measure"):
            gallery = gallery_of_run(target, target.model.books, False, None, watch)
    agreed = target.agreed
    proof = Proof("quantizer", agreed.agree, agreed.of, agreed.near_ties) if agreed else None
    return Result(
        **header("measure", target),
        before=before,
        bytes={"before": target.model.checkpoint.nbytes, "after": None},
        gallery=gallery,
        proof=proof,
        seconds=watch.seconds,
        beam=gain,
    )


@dataclass(eq=False)
class Run:
    """A surgery and its fine-tuning, done in memory and measured; `write` makes a file of it.

    Attributes:
        command: As the command line has it.
        opened: The codebooks, in the state that is kept, and their data.
        before: Figures on the test data; None where nothing is known of it.
        done: Figures and index maps of surgery and fine-tuning.
        surgeries: By index of the codebook; none where there was a fine-tuning alone.
        old: Each codebook before anything changed, on the CPU.
        tokens: Of the calibration data by the kept state, of each codebook.
        maps: Of the index map file: (old size,) int64 by name.
        gallery: A few test images, for a page.
        watch: Progress and seconds by phase.
        dependents: Warnings that follow those of the output.
    """

    command: str
    opened: Target
    before: Measurement | None
    done: Stages
    surgeries: Mapping[int, Surgery]
    old: Sequence[Codebook]
    tokens: Sequence[Tokens]
    maps: Mapping[str, Tensor]
    gallery: tuple[GalleryImage, ...]
    watch: Watch
    dependents: list[str]

    @property
    def kept(self) -> str:
        """The phase that is kept: "before", "surgery" or "finetuned"."""
        return self.done.kept

    @property
    def stages(self) -> dict[str, Measurement | None]:
        """Figures on the test data by phase; None where there is no such phase."""
        return {"before": self.before, "surgery": self.done.surgery, "finetuned": self.done.finetuned}

    def changed(self) -> dict[str, Tensor]:
        """Every tensor in which the kept state differs from the original, by key, as a file stores it."""
        counts = {stage: self.tokens[stage].counts for stage in self.done.index_maps}
        return self.opened.model.changed(counts, self.done.index_maps)

    def sizes(self) -> dict[str, int]:
        """New number of codes by key of each codebook that was operated on."""
        books = self.opened.model.books
        return {
            place.key: books[stage].codebook.size
            for stage in sorted(self.done.index_maps)
            for place in books[stage].stored.places
        }

    def write(self, output: Path) -> Result:
        """Write the kept state and its index map, read both back, and prove them through the model that loads them.

        Raises:
            CodebookError: The file cannot be written or does not hold what was meant; there is none then.
        """
        target, done, watch = self.opened, self.done, self.watch
        request, model = target.request, target.model
        checkpoint, size = model.checkpoint, target.size
        target.warnings += remarks(checkpoint, self.old[model.chosen[0]].size, size, output)
        target.warnings += self.dependents
        with watch.phase("write"):
            media, sizes = target.media(), self.sizes()
            config = written_config(checkpoint, size)
            about = provenance_of(self.command, target, sizes, done.kept, done.tuned, sorted(done.index_maps))
            surgery = Done(self.command, target.settings, sizes, self.stages, done.kept)
            card = cards(output, checkpoint, surgery, bool(request.push_to_hub))

            def write() -> tuple[Path, int, Proof]:
                contents = (self.changed(), about, self.maps, config, card)
                map_path = write_checkpoint(checkpoint, output, *contents, force=request.force, check=check)
                return map_path, *proven[0]

            proven = list[tuple[int, Proof]]()

            def check() -> None:
                written = read_partial(output)
                proven.append((written.nbytes, target.prove(written, media)))

            map_path, nbytes, proof = distributed.by_first(write)
        bits = next(iter(self.surgeries.values())).bits if self.surgeries and done.kept == "surgery" else None
        packed = sum(packed_bytes(on_cpu(model.books[stage]), bits) for stage in self.surgeries) if bits else 0
        return Result(
            **header(self.command, target),
            before=self.before,
            surgery=done.surgery,
            finetuned=done.finetuned,
            kept=done.kept,
            trace=done.tuned.trace if done.tuned else (),
            outputs={"model": str(output), "index_map": str(map_path), "report": None},
            gallery=self.gallery,
            proof=proof,
            bytes={"before": checkpoint.nbytes, "after": nbytes, **({"packed": packed} if bits else {})},
            seconds=watch.seconds,
        )


def operate(command: str, request: Request, strategy: Strategy | None, recipe: FineTune, watch: Watch) -> Result:
    """One surgery and its fine-tuning, measured in each phase, installed, written and read back.

    The file of a surgery holds the better of `surgery` and `finetuned` by validation error, that of a fine-tuning alone
    the better of `before` and `finetuned`.

    Args:
        command: As the command line has it.
        request: The model, its data and the output.
        strategy: None fine-tunes the codebooks as they are.
        recipe: The fine-tuning; of 0 steps for none.
        watch: Progress and seconds by phase.

    Raises:
        CodebookError: Something does not fit or cannot be done, before any long work where that is possible; there is
            no file then.
    """
    check_request_output(request, command, asked_size(strategy, 0))
    check_published(request)
    run = operate_in_memory(command, request, strategy, recipe, watch, written=True)
    output = request_output(request, command, run.opened.size)
    result = run.write(output)
    result = replace(result, outputs={**result.outputs, **published(request, output, watch)})
    if isinstance(run.opened, Opened):
        distributed.by_first(lambda: training_path(output).unlink(missing_ok=True))
    return result


def operate_in_memory(
    command: str, request: Request, strategy: Strategy | None, recipe: FineTune, watch: Watch, *, written: bool = False
) -> Run:
    """As `operate`, up to where something would be written.

    Args:
        command: As the command line has it.
        request: The model and its data.
        strategy: None fine-tunes the codebooks as they are.
        recipe: The fine-tuning; of 0 steps for none.
        watch: Progress and seconds by phase.
        written: Whether the result will be written to the request's output, which is then checked before any work.
    """
    if written and strategy and goes_without_images(request, strategy):
        refuse_steps(recipe.steps)
        open_ = open_latents_of if request.latents else open_file
        target: Target = open_(request, watch, strategy)
    else:
        target = _opened(command, request, strategy, recipe, watch, written)
    with tracked(request.tracking(command, settings_of(strategy) | settings_of(recipe))) as tracker:
        return _operate(command, target, strategy, recipe, watch, written, tracker)


def _operate(
    command: str,
    target: Target,
    strategy: Strategy | None,
    recipe: FineTune,
    watch: Watch,
    written: bool,
    tracker: Tracker,
) -> Run:
    request, model = target.request, target.model
    calibration = calibrate(target, watch)
    target.warnings += calibration.first.remarks(getattr(strategy, "exact", False))
    with watch.phase("measure"):
        latents = encoder_latents(target)
    before = target.measurement(target.sums(latents, watch))
    old, books = [on_cpu(book) for book in model.books], tuple(map(replace, model.books))
    surgeries = perform(target, strategy, calibration, watch) if strategy else {}
    output = check_request_output(request, command, target.size) if written else None
    check_size_follows(model, target.size)
    first = model.books[model.chosen[0]]
    known = {*model.keys.values()} - {*model.carried}
    dependents = dependents_warning(model.checkpoint, known, first.stored.size, target.size)
    target.settings["metric"] = first.metric.name
    gallery, saving = tuple[GalleryImage, ...](), None
    if isinstance(target, Opened):
        target.warnings += dependents
        dependents = []
        target.settings |= settings_of(strategy) | settings_of(recipe)
        saving = SnapshotFile(training_path(output), _made_with(command, target), request.resume) if output else None
        if saving and recipe.steps and request.resume and not saving.path.exists():
            target.warnings.append(f"--resume: there is no {saving.path}; the fine-tuning began at step 0")
    else:
        target.settings |= {"codes": f"{old[0].size} -> {target.size}", **settings_of(strategy)}
    if isinstance(target, Streamed):
        done = run_stages(
            target, surgeries, calibration, latents, recipe, before=before,
            seed=request.seed, watch=watch, saving=saving, log=tracker.log,
        )  # fmt: skip
        if done.tuned:
            target.settings |= {name: getattr(done.tuned, name) for name in ("lr", "optimizer", "augment")}
        if request.gallery and isinstance(target, Opened):
            with watch.phase("measure"):
                gallery = gallery_of_run(target, books, bool(surgeries), done.tuned, watch)
        if before and done.kept == "finetuned" and done.finetuned:
            target.warnings += blur_warnings(before, done.finetuned)
        tokens = done.tokens or (
            target.tokens(watch)
            if done.kept == "finetuned"
            else current_tokens(target, calibration, done.kept == "surgery", watch)
        )
    else:
        assert isinstance(target, FileTarget)
        index_maps = {stage: surgery.index_map for stage, surgery in surgeries.items()}
        done = Stages(None, None, "surgery", index_maps, None)
        tokens = target.tokens_after(old, index_maps)
    for surgery in surgeries.values():
        if surgery.engine:
            target.settings |= {"engine": surgery.engine, "engine_reason": surgery.engine_reason}
    maps = dict[str, Tensor]()
    for stage, index_map in done.index_maps.items():
        samples = (calibration.tokens[stage].sample, tokens[stage].sample)
        nearest = nearest_map(index_map, old[stage], on_cpu(model.books[stage]), samples)
        for place in model.books[stage].stored.places:
            maps |= {f"{place.key}/index_map": index_map, f"{place.key}/nearest": nearest}
    run = Run(command, target, before, done, surgeries, old, tokens, maps, gallery, watch, dependents)
    tracker.conclude(figures_by_phase(run.stages))
    if before:
        target.warnings += worse_warnings(before, run.stages[done.kept])
    return run


def _opened(
    command: str, request: Request, strategy: Strategy | None, recipe: FineTune, watch: Watch, written: bool
) -> Opened:
    """A network that runs, after all is checked that a fine-tuning needs."""
    require_tracker(request.tracking(command))
    if recipe.steps and recipe.codebook_update == "gradient" and getattr(strategy, "balance", False):
        raise CodebookError(
            "--codebook-update gradient lowers the mean error alone, which undoes --balance; use ema or frozen"
        )
    request.require_trainable(recipe.steps)
    opened = open_request(request, watch)
    model = opened.model
    opened.warnings += stale_state(model.checkpoint, [opened.codebooks[stage] for stage in model.chosen])
    if not recipe.steps and len(model.books) == 1:
        opened.pass_once()
    if written and (asked := asked_size(strategy, model.books[model.chosen[0]].codebook.size)):
        check_request_output(request, command, asked)
    require_training_data(opened, recipe)
    return opened


def _made_with(command: str, opened: Opened) -> dict[str, object]:
    """All that a fine-tuning depends on."""
    return {
        "version": VERSION,
        "command": command,
        "seed": opened.request.seed,
        "model": opened.model.checkpoint.sha256,
        "data": items_sha256(opened.splits.calibration),
        **{name: value for name, value in opened.settings.items() if name not in ("data", "test_data", "metrics")},
    }
