"""Every strategy and the controls on one model: the same data, the same batches, the same number of steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path

from codebook_tools.checkpoints.atomic import write_text
from codebook_tools.codebook import Strategy
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.figures import STAGES, Measurement
from codebook_tools.models.output import check_size
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import find_strategy
from codebook_tools.strategies.comparison_entries import ENTRIES, Entry, find_entry
from codebook_tools.strategies.padding import power_of_two
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.comparison_rows import (
    Comparison,
    Row,
    RowStore,
    check_folder,
    made_with,
    markdown_table,
)
from codebook_tools.workflows.pipeline import (
    Calibration,
    Latents,
    calibrate,
    encoder_latents,
    measure_stage,
    perform,
    require_training_data,
    run_stages,
)
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import header, settings_of
from codebook_tools.workflows.target import Opened, Streamed
from codebook_tools.workflows.without_network import open_target, refuse_steps


@dataclass(frozen=True, eq=False)
class _Task:
    """A row to run. k: the size asked for; None where the strategy has no k."""

    name: str
    entry: Entry
    k: int | None
    seed: int

    def strategy(self) -> Strategy | None:
        """Made with the settings of the entry, and with k and seed where it has such fields."""
        if self.entry.strategy is None:
            return None
        make = find_strategy(self.entry.strategy)
        offered = {"seed": self.seed} | ({} if self.k is None else {"k": self.k})
        own = {name: value for name, value in offered.items() if name in signature(make).parameters}
        try:
            return make(**own, **self.entry.settings)
        except TypeError as error:  # somebody else's strategy, with settings that have no default
            raise CodebookError(f"{self.entry.strategy} cannot be made of k and seed alone: {error}") from error

    def settings(self) -> dict[str, object]:
        """The strategy's; none where it cannot be made."""
        try:
            return settings_of(self.strategy())
        except CodebookError:
            return {}


def compare(
    request: Request, k: int, names: Sequence[str], recipe: FineTune, *, seeds: int, folder: Path, watch: Watch
) -> Comparison:
    """Run the rows with `seeds` seeds each, from request.seed on.

    Rows go to folder/rows.json one by one, and those that are there, of the same model, data, settings and version,
    are not run again; folder/table.md is the table of all. Where `prune` is among the rows, `refit` is also done at the
    size that it leaves. The seed of a row is that of its strategy and its fine-tuning; data and splits are the same in
    all.

    Args:
        request: The model and its data.
        k: Number of codes, for the strategies that take one.
        names: Of rows; empty for ENTRIES.
        recipe: The fine-tuning of every row.
        seeds: Runs of each row.
        folder: For the rows and the table; made where it is missing.
        watch: Progress and seconds by phase.

    Returns:
        All rows; one that could not be run says why in `error`.

    Raises:
        CodebookError: No row can be run.
    """
    distributed.require_one("compare")
    for name, value in (("k", k), ("seeds", seeds)):
        if value < 1:
            raise CodebookError(f"{name}={value} is below 1; use --{name} 1 or more")
    entries = {name: find_entry(name) for name in names or ENTRIES}
    check_folder(folder)
    request.require_trainable(recipe.steps)
    store = RowStore(folder)
    check_size(request.checkpoint, k)
    if request.latents:
        refuse_steps(recipe.steps)
    opened = open_target(request, watch)
    if isinstance(opened, Opened):
        require_training_data(opened, recipe)
    calibration = calibrate(opened, watch)
    tasks = list(_tasks(entries, k, _in_use(opened, calibration), request.seed, seeds))
    hashes = {task: _made_with(opened, task, recipe) for task in tasks}
    before: tuple[Measurement, Latents] | None = None
    rows = []
    for i, task in enumerate(tasks):
        row = store.find(task.name, task.k, task.seed, hashes[task])
        if row is None:
            if before is None:
                latents = encoder_latents(opened)
                before = measure_stage(opened, latents, watch), latents
            row_watch = watch.within(f"{i + 1} of {len(tasks)}, {task.name}")
            row = _run(task, opened, calibration, *before, recipe, hashes[task], row_watch)
            if row.error is None:
                store.add(row)
        rows.append(row)
    order = {name: i for i, name in enumerate(entries)}
    rows.sort(key=lambda row: (order[row.strategy], row.k, row.seed))
    warned = dict[str, list[str]]()
    for row in rows:
        for warning in row.warnings:
            warned.setdefault(warning, []).append(f"{row.strategy} of {row.k}, seed {row.seed}")
    table = folder / "table.md"
    opened.settings |= {"k": k, "seeds": seeds} | (settings_of(recipe) if isinstance(opened, Opened) else {})
    comparison = Comparison(
        **header("compare", opened, *(f"{warning} ({'; '.join(who)})" for warning, who in warned.items())),
        rows=tuple(rows),
        outputs={"rows": str(store.path), "table": str(table)},
        seconds=watch.seconds,
    )
    write_text(table, markdown_table(comparison.summaries))
    return comparison


def _in_use(opened: Streamed, calibration: Calibration) -> int:
    """Codes that pruning leaves: the most of any book that is operated on, as many as the config takes."""
    used = max(int((calibration.tokens[stage].counts > 0).sum()) for stage in opened.model.chosen)
    return power_of_two(used) if opened.model.power_of_two else used


def _tasks(entries: Mapping[str, Entry], k: int, used: int, seed: int, seeds: int) -> Iterator[_Task]:
    """All rows of a seed before the next: what is there after an interruption is a table of fewer seeds."""
    for run in range(seed, seed + seeds):
        for name, entry in entries.items():
            if name == "refit" and "prune" in entries and used != k:
                yield _Task(name, entry, used, run)
            yield _Task(name, entry, k if _takes_k(entry) else None, run)


def _takes_k(entry: Entry) -> bool:
    return entry.strategy is not None and "k" in signature(find_strategy(entry.strategy)).parameters


def _run(
    task: _Task,
    opened: Streamed,
    calibration: Calibration,
    before: Measurement,
    latents: Latents,
    recipe: FineTune,
    made: str,
    watch: Watch,
) -> Row:
    trial = replace(opened, model=opened.model.copy(copy.deepcopy(opened.model.network)), warnings=[])
    stages: dict[str, Measurement | None] = dict.fromkeys(STAGES)
    size, kept, error = task.k or opened.size, None, None
    try:
        strategy = task.strategy()
        surgeries = perform(trial, strategy, calibration, watch) if strategy is not None else {}
        size = trial.size
        if surgeries and task.entry.fresh:
            if not isinstance(opened, Opened):
                raise CodebookError("a fresh network has other latents than those of files: give --data")
            trial.model = trial.model.with_fresh_network(task.seed)
            calibration, latents = calibrate(trial, watch), encoder_latents(trial)
        row_recipe = replace(recipe, **task.entry.recipe)
        if row_recipe.steps or surgeries:
            same = None if task.entry.fresh else before  # ids of another encoder have nothing in common
            done = run_stages(
                trial, surgeries, calibration, latents, row_recipe, before=same, seed=task.seed, watch=watch
            )
            stages |= {"surgery": done.surgery, "finetuned": done.finetuned}
            kept = done.kept
        stages["before"] = before
    except CodebookError as problem:
        error = str(problem)
    seconds = watch.seconds["strategy"] + watch.seconds["finetune"]
    nbytes, warnings = opened.bytes_at(size), tuple(trial.warnings)
    return Row(task.name, size, task.seed, stages, kept or "before", seconds, nbytes, error, made, warnings)


def _made_with(opened: Streamed, task: _Task, recipe: FineTune) -> str:
    """SHA-256 of all that the figures of a row depend on."""
    return made_with(
        opened,
        {
            "seeds": [opened.request.seed, task.seed],
            "entry": [task.name, task.k, task.entry.fresh],
            "strategy": task.settings(),
            "recipe": settings_of(replace(recipe, **task.entry.recipe)),
        },
    )
