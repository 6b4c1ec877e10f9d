"""Rows of a comparison: their content, their file, and their summaries over seeds."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from codebook_tools.checkpoints.atomic import write_text
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.figures import (
    STAGES,
    CodebookUse,
    IdUse,
    Measurement,
    figures_of,
    quoted_in,
)
from codebook_tools.evaluation.tables import COLUMNS, COLUMNS_OF_LATENTS, in_markdown
from codebook_tools.models.user_network import name_of
from codebook_tools.runtime.safe_io import parse_json, read_text
from codebook_tools.runtime.version import VERSION
from codebook_tools.workflows.result import SUBJECT, ResultHeader, plain
from codebook_tools.workflows.target import Streamed


@dataclass(frozen=True)
class Row:
    """One strategy or control with one seed.

    Attributes:
        strategy: Name of the row.
        k: Codes after the surgery.
        seed: Of the strategy and its fine-tuning.
        stages: Figures on the test data by phase; None where there is no such phase.
        kept: The phase with the lowest validation error.
        seconds: Of surgery and fine-tuning alone.
        bytes: Of the file that it would write, without metadata.
        error: Why there are no figures, where it could not be run.
        made_with: SHA-256 of everything that the figures depend on.
        warnings: Of this row alone.
    """

    strategy: str
    k: int
    seed: int
    stages: Mapping[str, Measurement | None]
    kept: str | None
    seconds: float
    bytes: int
    error: str | None
    made_with: str
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields, of types that json can write."""
        return {entry.name: plain(getattr(self, entry.name)) for entry in fields(self)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Row:
        """The inverse of `to_json`.

        Raises:
            KeyError: An entry is missing.
            TypeError: The content is no row.
        """
        stages = {name: _measurement(content["stages"][name]) for name in STAGES}
        warnings = tuple(map(str, content.get("warnings", ())))  # of an older version of this file: none
        rest = {entry.name: content[entry.name] for entry in fields(Row) if entry.name != "warnings"}
        return Row(**{**rest, "stages": stages, "warnings": warnings})


def _measurement(content: Mapping[str, Any] | None) -> Measurement | None:
    if content is None:
        return None
    ids = {"ids": IdUse(**content["ids"])} if "ids" in content else {}
    return Measurement(**{**content, "codebooks": tuple(CodebookUse(**use) for use in content["codebooks"]), **ids})


@dataclass(frozen=True)
class Spread:
    """Mean and spread over seeds.

    Attributes:
        mean: Over seeds.
        spread: The sample standard deviation; None of one seed.
    """

    mean: float
    spread: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Mean and spread of one figure, a value for each seed."""
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Summary:
    """What the seeds of one strategy and size say together.

    Attributes:
        strategy: Name of the row.
        k: Codes after the surgery.
        seeds: How many there are.
        stages: Figures by phase and name, without those that a row lacks.
        kept: How many rows kept which phase.
        seconds: Of surgery and fine-tuning.
        bytes: Of the file that it would write.
        error: Of the first row that has one.
    """

    strategy: str
    k: int
    seeds: int
    stages: Mapping[str, Mapping[str, Spread]]
    kept: Mapping[str, int]
    seconds: Spread
    bytes: int
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Comparison(ResultHeader):
    """The result of `compare`.

    Attributes:
        rows: In the order of the strategies asked for, then by seed.
    """

    rows: tuple[Row, ...]

    json_keys = (*SUBJECT, "outputs", "seconds", "command", "version", "rows")

    @property
    def summaries(self) -> list[Summary]:
        """A summary for each strategy and size, in the order of the rows."""
        groups: dict[tuple[str, int], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.strategy, row.k), []).append(row)
        return [_summary(*key, rows) for key, rows in groups.items()]

    def to_json(self) -> dict[str, Any]:
        """The promised keys."""
        return super().to_json() | {"summary": [asdict(summary) for summary in self.summaries]}


def _summary(strategy: str, k: int, rows: list[Row]) -> Summary:
    done = [row for row in rows if row.error is None]
    stages: dict[str, dict[str, Spread]] = {}
    for stage in STAGES:
        measured = [measurement for row in done if (measurement := row.stages[stage]) is not None]
        figures = {
            name: [getattr(record, name) for record in records]
            for kind, records in ((Measurement, measured), (CodebookUse, [each.codebooks[0] for each in measured]))
            for name, figure in figures_of(kind).items()
            if figure.mean
        }
        stages[stage] = {name: Spread.of(values) for name, values in figures.items() if values and None not in values}
    kept: dict[str, int] = {}
    for row in done:
        if row.kept:
            kept[row.kept] = kept.get(row.kept, 0) + 1
    errors = [row.error for row in rows if row.error is not None]
    seconds = Spread.of([row.seconds for row in rows])
    return Summary(strategy, k, len(rows), stages, kept, seconds, rows[0].bytes, errors[0] if errors else None)


def check_folder(folder: Path) -> None:
    """Check that rows can be kept in a folder, before the first one is run.

    Raises:
        CodebookError: It is a file, has no parent, or is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise CodebookError(f"{folder} is a file; name a folder for the rows with --output")
    place = folder if folder.exists() else folder.parent
    if not place.is_dir():
        raise CodebookError(f"no such folder: {place}; make it first, or choose another with --output")
    if not os.access(place, os.W_OK):
        raise CodebookError(f"cannot write in {place}; choose another folder with --output")


def made_with(opened: Streamed, more: Mapping[str, object]) -> str:
    """SHA-256 of all that the figures of a row depend on. more: beside model and data."""
    request = opened.request
    file = Path(request.network.rpartition(":")[0]) if isinstance(request.network, str) else None
    said = {
        "version": VERSION,
        "model": opened.model.checkpoint.sha256,
        "network": hashlib.sha256(file.read_bytes()).hexdigest() if file else name_of(request.network or "") or None,
        "data": opened.data_sha256(),
        "opened": {name: value for name, value in opened.settings.items() if name not in _BY_CONTENT},
        "codebook": [
            word
            for book in (opened.model.books[stage] for stage in opened.model.chosen)
            for word in (book.key, *book.metric.words)
        ],
        **more,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


_BY_CONTENT = ("data", "test_data", "latents")  # settings that are paths, in place of which hashes count


class RowStore:
    """The rows of a folder's rows.json, of any settings, identified by what they were made with; none is ever dropped.

    Attributes:
        path: Of rows.json.
        rows: What it holds.
    """

    def __init__(self, folder: Path) -> None:
        """Read the rows that are there.

        Raises:
            CodebookError: The file is not one of rows.
        """
        self.path = folder / "rows.json"
        self.rows: list[Row] = []
        if self.path.exists():
            try:
                self.rows = [Row.from_json(row) for row in parse_json(read_text(self.path))["rows"]]
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise CodebookError(
                    f"{self.path} is not a comparison's rows ({type(error).__name__}: {error}); "
                    "move it away, or write elsewhere with --output"
                ) from error

    def find(self, strategy: str, k: int | None, seed: int, made_with: str) -> Row | None:
        """The row with these, or None.

        Args:
            strategy: Name of the row.
            k: Its size; None for any.
            seed: Of the strategy and its fine-tuning.
            made_with: SHA-256 of everything that the figures depend on.
        """
        return next(
            (
                row
                for row in self.rows
                if (row.strategy, row.seed, row.made_with) == (strategy, seed, made_with) and k in (None, row.k)
            ),
            None,
        )

    def add(self, row: Row) -> None:
        """Keep a row, on disk too: the file is replaced whole."""
        self.rows.append(row)
        write_text(self.path, json.dumps({"rows": [row.to_json() for row in self.rows]}, indent=1) + "\n")


def reconstructed(summaries: Iterable[Summary]) -> bool:
    """Whether there are errors of reconstructions, or nothing that says that there are none."""
    stages = [figures for summary in summaries for figures in summary.stages.values() if figures]
    return not stages or any("mse" in figures for figures in stages)


def table_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """The headings and the cells of a table, one line a strategy and size: figures with their spread over seeds."""
    columns = [*(COLUMNS if reconstructed(summaries) else COLUMNS_OF_LATENTS), *_quoted_columns(summaries)]
    lines = [["strategy", "K", *(heading for heading, *_ in columns), "kept", "seconds", "bytes"]]
    for summary in summaries:
        cells = [summary.strategy, str(summary.k)]
        if summary.error is not None:
            lines.append([*cells, "not possible", *[""] * (len(lines[0]) - 3)])
            continue
        for _, figure, stage, form in columns:
            # What was not operated on stands at step 0 as it was before.
            at = "before" if stage == "surgery" and not summary.stages["surgery"] else stage
            cells.append(_shown(summary.stages[at].get(figure), form))
        kept = ", ".join(f"{name} {count}/{summary.seeds}" for name, count in summary.kept.items())
        lines.append([*cells, kept, _shown(summary.seconds, ".0f"), f"{summary.bytes:,}"])
    return lines


def _quoted_columns(summaries: Sequence[Summary]) -> list[tuple[str, str, str, str]]:
    """As COLUMNS: of the figures of --metrics, in the last phase that there is."""
    measured = {name for summary in summaries for figures in summary.stages.values() for name in figures}
    last = "finetuned" if any(summary.stages.get("finetuned") for summary in summaries) else "surgery"
    when = {"finetuned": "fine-tuned", "surgery": "at step 0"}[last]
    return [(f"{figure.label} {when}", name, last, figure.form) for name, figure in quoted_in(measured).items()]


def notes(summaries: Iterable[Summary]) -> list[str]:
    """Why rows could not be done."""
    return [f"{summary.strategy}: {summary.error}" for summary in summaries if summary.error is not None]


def _shown(figure: Spread | None, form: str) -> str:
    if figure is None:
        return "–"
    mean = format(figure.mean, form)
    return mean if figure.spread is None else f"{mean} ± {figure.spread:{form}}"


def markdown_table(summaries: Sequence[Summary]) -> str:
    """The table in Markdown, and under it why rows could not be done."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in table_rows(summaries)]
    return in_markdown(lines) + "".join(f"\n{note}\n" for note in notes(summaries))
