"""The comparison: the same data, batches and steps for all rows, kept row by row, and what the rows say together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, State, WriteModel, assert_refused
from safetensors.torch import save_file
from surgeries import do
from torch import Tensor

from codebook_tools.codebook import Strategy
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.figures import CodebookUse, Measurement
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import STRATEGIES, Refit
from codebook_tools.training.batches import Batches
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows import compare as compare_module
from codebook_tools.workflows.compare import ENTRIES, MORE_ENTRIES, compare
from codebook_tools.workflows.comparison_rows import Comparison, Row, RowStore, Spread, markdown_table, table_rows
from codebook_tools.workflows.request import Request

RECIPE = FineTune(steps=4, batch_size=16)
Ask = Callable[..., Comparison]


@pytest.fixture
def ask(tiny: Path, images_folder: Path, tmp_path: Path) -> Ask:
    """ask("prune", "refit", k=6, seeds=2): a comparison of the tiny model, in tmp_path/rows."""

    def run(*names: str, k: int = 12, seeds: int = 1, recipe: FineTune = RECIPE, **more: Any) -> Comparison:
        request = Request(**{"model": tiny, "data": (str(images_folder),), "input_range": (-1.0, 1.0)} | more)
        return compare(request, k, names, recipe, seeds=seeds, folder=tmp_path / "rows", watch=Watch())

    return run


def by_name(found: Comparison) -> dict[tuple[str, int], Row]:
    return {(row.strategy, row.k): row for row in found.rows}


# --- the rows
@pytest.fixture(scope="module")
def whole(variants: dict[str, State], images_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """All rows of the tiny model."""
    folder = tmp_path_factory.mktemp("whole")
    save_file(variants["plain"], folder / "tiny.safetensors", {"format": "pt"})
    request = Request(model=folder / "tiny.safetensors", data=(str(images_folder),), input_range=(-1.0, 1.0))
    return compare(request, 12, (), RECIPE, seeds=1, folder=folder / "rows", watch=Watch())


def test_every_strategy_and_every_control_has_its_row(whole: Comparison, tiny: Path, images_folder: Path) -> None:
    rows = by_name(whole)
    sizes = {"untouched": 16, "untouched+same-recipe": 16, "untouched+textbook": 16, "prune": 10, "restart": 16}
    assert rows.keys() == {(name, sizes.get(name, 12)) for name in ENTRIES} | {("refit", 10)}
    assert {entry.strategy for entry in ENTRIES.values()} == {None, *STRATEGIES}
    assert {(row.error, row.seed) for row in whole.rows} == {(None, 0)}
    assert len({repr(row.stages["before"]) for row in whole.rows}) == 1, "all begin with the same model"
    for (name, k), row in rows.items():
        surgery = set() if name.startswith("untouched") else {"surgery"}
        tuned = set() if name == "untouched" else {"finetuned"}
        sizes_by_stage = {stage: found.codebooks[0].size for stage, found in row.stages.items() if found is not None}
        assert sizes_by_stage == {"before": 16} | dict.fromkeys(surgery | tuned, k), name
        assert row.kept in sizes_by_stage
    figures = [figure for summary in whole.summaries for stage in summary.stages.values() for figure in stage.values()]
    assert all(math.isfinite(figure.mean) for figure in figures)
    refit = do(Request(tiny, (str(images_folder),), input_range=(-1.0, 1.0)), Refit(12), RECIPE)
    assert (rows["refit", 12].stages, rows["refit", 12].kept) == (refit.stages, refit.kept)
    assert tiny.stat().st_size - rows["refit", 12].bytes == (16 - 12) * 4 * 4
    store = RowStore(Path(whole.outputs["rows"]).parent)
    for row in whole.rows:
        assert store.find(row.strategy, row.k, row.seed, row.made_with) == row
        assert store.find(row.strategy, row.k + 1, row.seed, row.made_with) is None
        assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_all_rows_train_on_the_same_batches(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []
    batches = Batches.__iter__

    def recorded(stream: Batches) -> Iterator[tuple[Tensor, float]]:
        drawn.append([])
        for images, share in batches(stream):
            drawn[-1].append(hash(images.numpy().tobytes()))
            yield images, share

    monkeypatch.setattr(Batches, "__iter__", recorded)
    recipe = replace(RECIPE, steps=12)  # with revival, which draws as well
    ask("untouched+same-recipe", "untouched+textbook", "restart", "refit+fresh-network", recipe=recipe)
    assert len(drawn) == 4 and len(drawn[0]) == 12
    assert all(other == drawn[0] for other in drawn)


def test_strategies_that_plug_in_are_rows_and_failures_are_said(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(seed: int, temper: str) -> Strategy:
        raise AssertionError

    monkeypatch.setitem(STRATEGIES, "of-others", STRATEGIES["top-k"])
    monkeypatch.setitem(STRATEGIES, "picky", picky)
    more = "refit+textbook", "refit+frozen-encoder", "refit+used", "restart+split"
    assert {*more} <= {*MORE_ENTRIES}
    found = ask("grow", "picky", "of-others", "top-k", "prune", *more, k=4)
    rows = by_name(found)
    assert "temper" in str(rows["picky", 16].error) and "10 codes in use" in str(rows["grow", 4].error)
    assert rows["grow", 4].stages == {"before": None, "surgery": None, "finetuned": None}
    sizes = {"of-others": 4, "top-k": 4, "prune": 10, **dict.fromkeys(more, 4), "restart+split": 16}
    assert [rows[row].error for row in sizes.items()] == [None] * len(sizes)
    assert ask("of-others", k=3).rows[0].made_with != rows["of-others", 4].made_with
    table = markdown_table(found.summaries)
    assert "| grow | 4 | not possible |" in table and "10 codes in use" in table


# --- resuming
def test_rows_that_are_there_are_not_run_again_and_warn_again(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = replace(RECIPE, lr=30.0)
    first, warned = ask("prune", "refit", seeds=2), ask("refit", recipe=hot).warnings
    assert any("refit of 12, seed 0" in warning for warning in warned)
    monkeypatch.setattr(compare_module, "_run", None)  # so that no row is run again
    assert ask("prune", "refit", seeds=2).rows == first.rows
    assert ask("refit", recipe=hot).warnings == warned
    assert ask("refit").rows == tuple(row for row in first.rows if row.seed == 0 and row.k == 12)


def test_rows_of_other_settings_or_of_another_model_or_version_are_not_used_and_not_lost(
    ask: Ask, write_model: WriteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[dict[str, Any]] = [{"k": 7}, {"recipe": replace(RECIPE, lr=1e-4)}, {"limit": 50}, {"seed": 1}]
    changes += [{"model": write_model("extra", "other")}]
    first = ask("top-k").rows
    hashes = [row.made_with for row in (*first, *(ask("top-k", **changed).rows[0] for changed in changes))]
    assert ask("top-k").rows == first
    monkeypatch.setattr("codebook_tools.workflows.comparison_rows.VERSION", "999")
    hashes.append(ask("top-k").rows[0].made_with)
    assert len(set(hashes)) == 1 + len(changes) + 1
    kept = json.loads((tmp_path / "rows" / "rows.json").read_text())["rows"]
    assert [row["made_with"] for row in kept] == hashes


def test_an_interrupted_comparison_goes_on(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, names = compare_module._run, ("untouched", "prune", "refit", "top-k")
    asked: list[str] = []

    def interrupted(task: Any, *rest: Any) -> Any:
        asked.append(task.name)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return run(task, *rest)

    monkeypatch.setattr(compare_module, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(*names)
    assert len(json.loads((tmp_path / "rows" / "rows.json").read_text())["rows"]) == 3
    asked.clear()
    found = ask(*names)
    assert len(asked) == 2  # one refit, and top-k
    monkeypatch.setattr(compare_module, "_run", run)
    straight = ask(*names, skip_bad=True)  # another setting, so all anew
    first, second = ([replace(row, seconds=0, made_with="") for row in of.rows] for of in (found, straight))
    assert first == second


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": [{}]}', '{"rows": 5}', '{"rows": [{"stages": 3}]}'])
def test_a_file_that_holds_no_rows_is_refused_and_left(ask: Ask, tmp_path: Path, text: str) -> None:
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / "rows.json"
    path.write_text(text)
    with pytest.raises(CodebookError, match=r"rows.json is not a comparison's rows"):
        ask("prune")
    assert path.read_text() == text


# --- what they say together
def measurement(mse: float, used: int, coverage: float | None = 0.5) -> Measurement:
    use = CodebookUse("key", 8, 2, 100, used, used / 8, used, 4.0, 2.0, 0.5, 0.1, coverage)
    return Measurement("test", 10, mse, 20.0, None, (use,))


def row(seed: int, mse: float, used: int, kept: str = "finetuned", coverage: float | None = 0.5) -> Row:
    measured = measurement(0.9, 1), measurement(0.5, 8), measurement(mse, used, coverage)
    stages = dict(zip(("before", "surgery", "finetuned"), measured, strict=True))
    return Row("refit", 8, seed, stages, kept, 10.0 + seed, 1234, None, "")


def comparison(*rows: Row) -> Comparison:
    return Comparison(command="compare", model="m", family="f", settings={}, seed=0, rows=rows)


def test_mean_and_spread_by_hand() -> None:
    """0.1, 0.2 and 0.6 have the mean 0.3; squares 0.04, 0.01 and 0.09 over 2 are 0.07. One seed has no spread, and a
    figure that a row lacks is left out."""
    (found,) = comparison(row(0, 0.1, 5), row(1, 0.2, 6), row(2, 0.6, 7, "surgery")).summaries
    assert (found.strategy, found.k, found.seeds, found.bytes) == ("refit", 8, 3, 1234)
    assert found.stages["finetuned"]["mse"].mean == pytest.approx(0.3)
    assert found.stages["finetuned"]["mse"].spread == pytest.approx(0.07**0.5)
    assert found.stages["finetuned"]["used"] == Spread(6, 1)
    assert found.stages["surgery"]["mse"] == Spread(0.5, 0)
    assert found.kept == {"finetuned": 2, "surgery": 1}
    assert found.seconds == Spread(11, 1)
    assert "ssim" not in found.stages["surgery"]
    (one,) = comparison(row(0, 0.1, 5)).summaries
    assert one.stages["finetuned"]["mse"] == Spread(0.1, None)
    (lacking,) = comparison(row(0, 0.1, 5), row(1, 0.1, 5, coverage=None)).summaries
    assert "coverage" not in lacking.stages["finetuned"] and "coverage" in lacking.stages["surgery"]


def test_the_table_shows_step_0_and_the_end_with_their_spread() -> None:
    headings, line = table_rows(comparison(row(0, 0.1, 5), row(1, 0.3, 7)).summaries)
    cells = dict(zip(headings, line, strict=True))
    assert cells["mse at step 0"] == "0.500000 ± 0.000000"
    assert cells["mse fine-tuned"] == "0.200000 ± 0.141421"
    assert cells["used"] == "6.0 ± 1.4" and cells["kept"] == "finetuned 2/2" and cells["bytes"] == "1,234"
    stages = {"before": measurement(0.9, 1), "surgery": None, "finetuned": None}
    untouched = replace(row(0, 0.1, 5), strategy="untouched", stages=stages)
    cells = dict(zip(*table_rows(comparison(untouched).summaries), strict=True))
    assert cells["mse at step 0"] == "0.900000" and cells["mse fine-tuned"] == "–"


# --- the command
def test_the_command_gives_the_promised_json(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("compare", tiny, "--data", images_folder, "--input-range", "-1,1", "--k", 12, "--strategies",
             "refit, prune", "--seeds", 2, "--steps", 4, "--batch-size", 16)  # fmt: skip
    found = codebook(*given, "--json")
    assert found.exit_code == 0, found.stderr
    order = [(row["strategy"], row["k"], row["seed"]) for row in found.json["rows"]]
    assert order == [(name, k, seed) for name, k in (("refit", 10), ("refit", 12), ("prune", 10)) for seed in (0, 1)]
    for row in found.json["rows"]:
        assert {"kept", "seconds", "bytes"} <= row.keys()
        assert row["stages"].keys() == {"before", "surgery", "finetuned"}
    assert Path(found.json["outputs"]["rows"]) == Path("tiny.compare/rows.json")
    table = (tmp_path / "tiny.compare" / "table.md").read_text().splitlines()
    assert table[0].startswith("| strategy | K |") and len(table) == 2 + 3
    printed = codebook(*given)
    assert printed.exit_code == 0 and "refit" in printed.stdout and "±" in printed.stdout


def test_what_cannot_be_compared_is_one_line_and_leaves_nothing(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    for options, message in {
        ("--k", 0): "k=0 is below 1",
        ("--k", 4, "--seeds", 0): "seeds=0 is below 1",
        ("--k", 4, "--strategies", "prune,nonsense"): "no strategy 'nonsense'; there are condense",
        ("--k", 4, "--output", "a-file"): "a-file is a file",
        ("--k", 4, "--limit", 2): "empty",
    }.items():
        found = codebook("compare", tiny, "--data", images_folder, "--input-range", "-1,1", "--steps", 2, *options)
        assert_refused(found, message)
        assert {path.name for path in tmp_path.iterdir()} == {"a-file", tiny.name}
