"""Many surgeries of one model: the comparison, whose rows have the same data, batches and steps and are kept singly;
and the sweep, which says how many codes do, with Re-Fits that pay for bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, State, WriteModel, assert_refused
from safetensors.torch import save_file
from surgeries import do
from torch import Tensor

from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import REMOVED, Codebook, Strategy
from codebook_tools.data.latents import StoredLatents
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation import metrics
from codebook_tools.evaluation.figures import CodebookUse, Measurement
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import STRATEGIES, Refit
from codebook_tools.strategies.comparison_entries import ENTRIES, MORE_ENTRIES
from codebook_tools.strategies.entropy_refit import EntropyRefit
from codebook_tools.training.batches import Batches
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows import compare as compare_module
from codebook_tools.workflows.compare import compare
from codebook_tools.workflows.comparison_rows import Comparison, Row, RowStore, Spread, markdown_table, table_rows
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.sweep import suggest

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
    assert Path(whole.model).stat().st_size - rows["refit", 12].bytes == (16 - 12) * 4 * 4
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
def measurement(mse: float | None, used: int = 8, coverage: float | None = 0.5, distortion: float = 0.1) -> Measurement:
    use = CodebookUse("key", 8, 2, 100, used, used / 8, used, 4.0, 2.0, 0.5, distortion, coverage)
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
@pytest.fixture
def by_command(tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """by_command("compare", ...): of the tiny model, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    given = (tiny, "--data", images_folder, "--input-range", "-1,1")
    return lambda command, *options: codebook(command, *given, *options)


SWEEP = ("sweep", "-o", "sweep", "--json")


def test_the_command_gives_the_promised_json(by_command: Run) -> None:
    given = ("compare", "--k", 12, "--strategies", "refit, prune", "--seeds", 2, "--steps", 4, "--batch-size", 16)
    found = by_command(*given, "--json")
    assert found.exit_code == 0, found.stderr
    order = [(row["strategy"], row["k"], row["seed"]) for row in found.json["rows"]]
    assert order == [(name, k, seed) for name, k in (("refit", 10), ("refit", 12), ("prune", 10)) for seed in (0, 1)]
    for row in found.json["rows"]:
        assert {"kept", "seconds", "bytes"} <= row.keys()
        assert row["stages"].keys() == {"before", "surgery", "finetuned"}
    assert Path(found.json["outputs"]["rows"]) == Path("tiny.compare/rows.json")
    table = Path("tiny.compare/table.md").read_text().splitlines()
    assert table[0].startswith("| strategy | K |") and len(table) == 2 + 3
    printed = by_command(*given)
    assert printed.exit_code == 0 and "refit" in printed.stdout and "±" in printed.stdout


def test_what_cannot_be_compared_is_one_line_and_leaves_nothing(tiny: Path, by_command: Run) -> None:
    Path("a-file").touch()
    for options, message in {
        ("--k", 0): "k=0 is below 1",
        ("--k", 4, "--seeds", 0): "seeds=0 is below 1",
        ("--k", 4, "--strategies", "prune,nonsense"): "no strategy 'nonsense'; there are condense",
        ("--k", 4, "--output", "a-file"): "a-file is a file",
        ("--k", 4, "--limit", 2): "empty",
    }.items():
        assert_refused(by_command("compare", "--steps", 2, *options), message)
        assert {path.name for path in tiny.parent.iterdir()} == {"a-file", tiny.name}


# --- a sweep: what it suggests
@pytest.mark.parametrize(
    ("curve", "k", "reason"),
    [
        # 16 → 32 gains 20 %, 32 → 64 gains 2 %
        ({16: 1.0, 32: 0.8, 64: 0.784}, 32, "from 32 codes on, twice as many lower the untrained error by 2.0%"),
        # four times as many gain 4 %: 2.02 % a doubling
        ({16: 1.0, 64: 0.96}, 16, "from 16 codes on, twice as many lower the untrained error by 2.0%"),
        ({16: 1.0, 32: 1.1}, 16, "from 16 codes on, twice as many lower the untrained error by 0.0%"),
        ({16: 1.0, 32: 0.9}, 32, "up to 32 codes, the most there are, each doubling lowers the error by 2.5% or more"),
        ({16: 0.0, 32: 0.0}, 16, "from 16 codes on, twice as many lower the untrained error by 0.0%"),
        ({48: 1.0}, 48, "48 is the only size there is"),
    ],
)
def test_the_size_is_suggested_from_which_doubling_gains_little(curve: dict[int, float], k: int, reason: str) -> None:
    found, why = suggest({size: measurement(mse) for size, mse in curve.items()})
    assert found == k and why.removesuffix(", less than 2.5%") == reason


def test_without_reconstructions_the_distortion_decides_and_its_dimension_is_that_of_zadors_law() -> None:
    k, reason = suggest(
        {
            8: measurement(None, distortion=1.0),
            16: measurement(None, distortion=0.5),
            32: measurement(None, distortion=0.49),
        }
    )
    assert k == 16 and "lower the untrained distortion by 2.0%" in reason
    for dimension in (1, 3, 8):
        curve = {k: 5.0 * k ** (-2 / dimension) for k in (8, 16, 64, 256)}
        assert metrics.effective_dimension(curve) == pytest.approx(dimension)
    assert metrics.effective_dimension({8: 1.0, 16: 1.0}) == math.inf


# --- Re-Fits that pay for bits

OLD = Codebook(torch.zeros(4, 2))
COUNTS = torch.zeros(4, dtype=torch.int64)


def bits_and_distortion(codes: Tensor, points: Tensor) -> tuple[float, float]:
    squared = torch.cdist(points, codes).square()
    return metrics.bits(torch.bincount(squared.argmin(1), minlength=len(codes))), float(squared.amin(1).mean())


def test_codes_that_few_latents_need_are_given_up_once_bits_cost_more_than_they_save() -> None:
    """99 latents at 0 and one at 1, of variance 0.0099: its own code costs that one 6.644 bits, the other 0.0145 bits
    and a distance of 1, which is less from 15.24 variances a bit on."""
    points = torch.zeros(100, 2)
    points[0, 0] = 1.0
    for price, left in ((0.0, 2), (15.0, 2), (15.5, 1)):
        found = EntropyRefit(2, price)(OLD, StoredLatents(points), COUNTS)
        assert found.codebook.size == left, price
        assert (found.index_map == REMOVED).all()
    one = EntropyRefit(2, 15.5)(OLD, StoredLatents(points), COUNTS).codebook.vectors
    torch.testing.assert_close(one, torch.tensor([[0.01, 0.0]]))
    for codebook, price, message in (
        (Codebook(torch.zeros(4, 2), COSINE_UNIT), 0.1, "needs a Euclidean codebook; leave out --lambda"),
        (OLD, -1.0, "a bit cannot cost -1.0 variances; try --lambda 0.01"),
        (OLD, math.nan, "a bit cannot cost nan variances"),
    ):
        with pytest.raises(CodebookError, match=message):
            EntropyRefit(2, price)(codebook, StoredLatents(points), COUNTS)


def test_the_higher_the_price_the_fewer_bits_and_below_the_curve_of_refit() -> None:
    points = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) ** 3  # a dense middle and long tails
    latents = StoredLatents(points)
    strategies = [Refit(k) for k in (4, 8, 16, 32, 64)], [EntropyRefit(64, price) for price in (0.0, 0.003, 0.01, 0.03)]
    curve, paid = (
        [bits_and_distortion(strategy(OLD, latents, COUNTS).codebook.vectors, points) for strategy in of]
        for of in strategies
    )
    assert paid[0] == pytest.approx(curve[-1], rel=0.05)
    assert [bits for bits, _ in paid] == sorted((bits for bits, _ in paid), reverse=True)
    for bits, distortion in paid[1:]:
        (low, worse), (high, better) = next(pair for pair in pairwise(curve) if pair[0][0] <= bits <= pair[1][0])
        between = worse * (better / worse) ** ((bits - low) / (high - low))
        assert distortion < between


# --- a sweep: the command
def test_a_sweep_has_every_surgery_that_can_be_done(by_command: Run) -> None:
    found = by_command(*SWEEP, "--k", "8,2", "--lambda", "0.05", "--report", "page.html")
    assert found.exit_code == 0, found.stderr
    points: list[dict[str, Any]] = found.json["points"]
    assert [(p["strategy"], p["k"]) for p in points[:2]] == [("refit", 2), ("refit", 8)]
    assert {p["strategy"] for p in points} == {"refit", "refit, 0.05 a bit", "prune", "quantize"}
    assert all(p["stages"]["before"] == points[0]["stages"]["before"] for p in points)
    distortion = [p["stages"]["surgery"]["codebooks"][0]["distortion"] for p in points[:2]]
    assert distortion == sorted(distortion, reverse=True)
    assert found.json["suggested_k"] in (2, 8) and found.json["reason"]
    assert found.json["effective_dimension"] > 0
    (lossless,) = [p for p in points if p["strategy"] == "prune" and p["k"] > 2][-1:]
    assert lossless["stages"]["surgery"]["mse"] == lossless["stages"]["before"]["mse"]
    page = Path("page.html").read_text()
    suffices = found.json["suggested_k"] < 8
    assert (f"{found.json['suggested_k']} codes suffice" in page) == suffices
    assert ("No K that was tried is known to suffice" in page) != suffices
    assert "| refit | 8 |" in Path("sweep/table.md").read_text()


def test_points_that_are_there_are_not_measured_again(by_command: Run) -> None:
    first = by_command(*SWEEP, "--k", "2,4")
    rows = Path("sweep/rows.json")
    kept = json.loads(rows.read_text())
    kept["rows"][0]["stages"]["surgery"]["ssim"] = 0.123
    rows.write_text(json.dumps(kept))
    again = by_command(*SWEEP, "--k", "2,4")
    assert again.json["points"][0]["stages"]["surgery"]["ssim"] == 0.123
    assert again.json["points"][1:] == first.json["points"][1:]
    other = by_command(*SWEEP, "--k", "2,4", "--seed", 1)
    assert other.json["points"][0]["stages"]["surgery"]["ssim"] != 0.123


def test_a_size_that_cannot_be_done_is_a_warning_and_nonsense_is_refused(by_command: Run) -> None:
    found = by_command(*SWEEP, "--k", "4,100000")
    assert found.exit_code == 0 and found.json["suggested_k"] == 4
    assert "100000" in " ".join(found.json["warnings"])
    assert_refused(by_command(*SWEEP, "--k", "0,4"), "k=0 is below 1")
    assert_refused(by_command(*SWEEP, "--k", "100000"), "Re-Fit can be done to none of")
    assert_refused(by_command(*SWEEP, "--k", "4", "--lambda", "-1"), "a bit cannot cost -1.0 variances")
    usage = by_command(*SWEEP, "--k", "4,many")
    assert usage.exit_code == 2 and "expected numbers with commas between them" in usage.stderr.replace("\n", " ")
