"""Each measure of a diagnosis by hand and on made-up latents, free of scale; and the command around it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, WriteModel, assert_refused
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT, DOT
from codebook_tools.clustering.seeding import seeds
from codebook_tools.codebook import Codebook
from codebook_tools.diagnosis.alternatives import best_scale, cut_wrongly, scaled
from codebook_tools.diagnosis.checks.dead_codes import dead_codes
from codebook_tools.diagnosis.checks.duplicate_codes import duplicate_codes
from codebook_tools.diagnosis.checks.encoder_drift import encoder_drift
from codebook_tools.diagnosis.checks.few_modes import few_modes
from codebook_tools.diagnosis.checks.learning_rate import learning_rate
from codebook_tools.diagnosis.checks.no_lloyd import no_lloyd
from codebook_tools.diagnosis.checks.not_installed import not_installed
from codebook_tools.diagnosis.checks.scale_mismatch import scale_mismatch
from codebook_tools.diagnosis.checks.split_mismatch import counting
from codebook_tools.diagnosis.checks.stale_ema import stale_ema
from codebook_tools.diagnosis.checks.uninitialised_flag import uninitialised_flag
from codebook_tools.diagnosis.checks.wrong_encoder import wrong_encoder
from codebook_tools.diagnosis.encoder_shift import correlation, shift
from codebook_tools.diagnosis.evidence import BookEvidence, Evidence, Pair
from codebook_tools.diagnosis.finding import Finding
from codebook_tools.diagnosis.fit import Fit, fit_of, left_of
from codebook_tools.diagnosis.initialization import born_dead
from codebook_tools.diagnosis.stored_ema import Companions, of_state
from codebook_tools.diagnosis.training_trace import Evaluation, Trace, read_trace
from codebook_tools.errors import CodebookError
from codebook_tools.models.initialization import drawn, structure
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.diagnose import CHECKS, diagnose
from codebook_tools.workflows.gather_evidence import curve_of
from codebook_tools.workflows.request import Request

NAMES = (
    *("not-installed", "wrong-encoder", "wrong-layout", "wrong-input-range", "stale-ema", "uninitialised-flag"),
    *("encoder-drift", "learning-rate", "no-lloyd", "few-modes", "scale-mismatch", "counting", "dimensional-collapse"),
)
SYMPTOMS = ("dead-codes", "duplicate-codes")
NOTHING = Companions()


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread_out(n: int = 6000, dim: int = 8, seed: int = 0) -> Tensor:
    """(n, dim) latents with a mean, and a covariance that is not alike in all directions."""
    return torch.randn(n, dim, generator=random(seed)) * torch.linspace(2, 0.2, dim) + torch.linspace(1, -1, dim)


def centroids(points: Tensor, k: int = 32) -> Tensor:
    return kmeans(points, k, watch=Watch()).centroids


def book_of(latents: Tensor, codes: Tensor, **more: Any) -> BookEvidence:
    """The evidence of codes on latents, without alternatives but for another length."""
    codebook = Codebook(codes)
    chosen = nearest(latents, codebook)
    counts = torch.bincount(chosen, minlength=len(codes))
    fit = fit_of(codebook, latents, 0)
    known: dict[str, Any] = {
        "alternatives": tuple(scaled(codebook, latents, 0)),
        "curve": curve_of(codebook, latents, 0),
        "distinct": len(codes),
        "left": left_of(codebook, latents),
        "left_when_cut": 1.0,
        "companions": NOTHING,
        "filling": False,
        "pair": None,
    }
    return BookEvidence("vq", codebook, counts, counts, latents, chosen, fit, **known | more)


def evidence_of(*books: BookEvidence, **more: Any) -> Evidence:
    known: dict[str, Any] = {
        "curve": {1: 1.0, 2: 0.8, 4: 0.6},
        "mse": 1.0,
        "original_mse": None,
        "flat_mse": 2.0,
        "ranges": {},
        "input_range": (0.0, 1.0),
        "command": "",
        "trace": None,
    }
    return Evidence(books, **known | more)


def found(evidence: Evidence) -> list[str]:
    return [name for name, (look, _) in CHECKS.items() if look(evidence).verdict == "found"]


# --- the names, and the order --------------------------------------------------------------------------------------


def test_every_promised_name_is_there_and_symptoms_come_last() -> None:
    assert {*CHECKS} == {*NAMES, *SYMPTOMS}
    assert tuple(CHECKS)[-2:] == SYMPTOMS
    in_the_tensors = ("not-installed", "uninitialised-flag", "stale-ema")
    assert tuple(CHECKS)[:3] == in_the_tensors


# --- how well codes fit --------------------------------------------------------------------------------------------


def test_a_fit_by_hand() -> None:
    fit = Fit(distortion=3.0, inertia=1.0, variance=11.0)
    assert fit.ratio == 3.0 and fit.excess == pytest.approx(0.2)
    assert fit.misfit == 1.5 and not fit.good
    assert Fit(3.0, 1.0, 100.0).good, "three times next to nothing is next to nothing"
    assert Fit(9.0, 8.0, 10.0).good, "half of the way where k-means gets nowhere"


def test_centroids_fit_and_one_code_does_as_badly_as_the_variance() -> None:
    points = spread_out()
    good, poor = (fit_of(Codebook(codes), points, 0) for codes in (centroids(points), torch.full((32, 8), 99.0)))
    assert good is not None and 0.8 < good.ratio < 1.2 and good.misfit < 0.6
    assert poor is not None and poor.excess > 1 and poor.misfit > 1


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_fit_is_free_of_scale(scale: float) -> None:
    points, codes = spread_out(), spread_out(32, seed=1) * 3
    plain, other = (fit_of(Codebook(codes * times), points * times, 0) for times in (1.0, scale))
    assert plain and other and other.misfit == pytest.approx(plain.misfit, rel=1e-3) and plain.misfit > 1


def test_there_is_no_fit_by_the_dot_product_and_by_the_cosine_length_plays_no_part() -> None:
    points = spread_out()
    assert fit_of(Codebook(centroids(points), DOT), points, 0) is None
    for metric in (COSINE, COSINE_UNIT):
        directions = Codebook(centroids(torch.nn.functional.normalize(points)), metric)
        longer = replace(directions, vectors=directions.vectors * 50)
        one, other = fit_of(directions, points, 0), fit_of(longer, points, 0)
        assert one and other and one.misfit == pytest.approx(other.misfit) and one.good
        assert torch.allclose(directions.metric.prepare(points).norm(dim=1), torch.ones(len(points)))
        assert list(scaled(longer, points, 0)) == []


def test_shrunken_codes_are_told_from_others_by_the_length_that_fits() -> None:
    points = spread_out()
    codes = centroids(points)
    assert best_scale(Codebook(codes * 0.05), points) == pytest.approx(20, rel=0.05)
    book = book_of(points, codes * 0.05)
    assert book.explanation is not None and book.explanation.name == "scale"
    assert found(evidence_of(book))[0] == "scale-mismatch"


def test_latents_cut_the_wrong_way_are_rows_of_memory() -> None:
    """Two images of two channels and two positions: a row holds a channel's positions, not a position's channels."""
    grids = torch.arange(8.0).reshape(2, 2, 2)
    points = torch.cat([grids] * 20)
    (alternative,) = cut_wrongly(Codebook(torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]])), points, 0)
    assert alternative.fit.distortion == 0


# --- noise, or not -------------------------------------------------------------------------------------------------

DRAWN = {
    "uniform": lambda n, d: (torch.rand(n, d, generator=random()) * 2 - 1) / n,
    "normal": lambda n, d: torch.randn(n, d, generator=random()),
    "directions": lambda n, d: torch.nn.functional.normalize(torch.randn(n, d, generator=random()), dim=1),
    "zeros": lambda n, d: torch.zeros(n, d),
}


@pytest.mark.parametrize(("n", "dim"), [(16, 4), (128, 64), (512, 64), (64, 256), (2048, 8)])
@pytest.mark.parametrize("name", DRAWN)
def test_what_an_initialisation_draws_is_seen_at_any_size(name: str, n: int, dim: int) -> None:
    assert drawn(DRAWN[name](n, dim))


@pytest.mark.parametrize(("n", "dim"), [(16, 4), (128, 64), (512, 64)])
def test_what_was_fitted_to_latents_is_no_noise(n: int, dim: int) -> None:
    codes = spread_out(n, dim)
    assert structure(codes) > 5 and structure(codes) == pytest.approx(structure(codes * 1e3), rel=1e-3)


def test_those_dead_since_birth_are_told_from_those_that_died() -> None:
    points = spread_out(dim=16) + 9
    codes = torch.cat([centroids(points, 8), DRAWN["uniform"](40, 16), spread_out(8, 16) + 500])
    dead = nearest(points, Codebook(codes)).bincount(minlength=56) == 0
    born = born_dead(codes, dead)
    assert 30 < int(born.sum()) <= 40 and not born[:8].any() and not born[48:].any()
    assert not born_dead(codes, torch.arange(56) >= 48).any(), "eight that are no noise"
    book = book_of(points, codes)
    assert found(evidence_of(book))[0] == "scale-mismatch"
    assert found(evidence_of(book, command="refit"))[0] == "not-installed", "a surgery leaves none of them"
    assert found(evidence_of(replace(book, filling=True), command="refit"))[0] == "dead-codes", "but where it fills up"


def test_a_codebook_of_noise_was_never_installed_and_one_of_other_latents_is_of_another_encoder() -> None:
    points = spread_out()
    noise = book_of(points, DRAWN["normal"](32, 8) * 9)
    assert found(evidence_of(noise, mse=4.0))[0] == "not-installed", "the decoder does not know these codes"
    assert found(evidence_of(noise))[0] == "scale-mismatch", "it does: they were trained so, and collapsed"
    others = book_of(points, centroids(spread_out(seed=3).flip(1) * 2 + 4))
    assert not_installed(evidence_of(others)).verdict == "ok"
    assert wrong_encoder(evidence_of(others, mse=4.0), others).verdict == "found"
    assert wrong_encoder(evidence_of(others), others).verdict == "suspicious", "an encoder may leave its codes"


def test_codes_by_the_dot_product_are_not_checked_for_their_place() -> None:
    book = replace(book_of(spread_out(), centroids(spread_out())), fit=None)
    for name in ("not-installed", "wrong-encoder", "wrong-layout", "scale-mismatch", "no-lloyd"):
        assert CHECKS[name][0](evidence_of(book)).verdict == "not-checked"


# --- running sums and flags ----------------------------------------------------------------------------------------


def test_sums_of_other_codes_are_stale_unless_it_is_they_that_fit() -> None:
    points = spread_out()
    book = book_of(points, centroids(points))
    rows, counts = book.codebook.vectors, torch.rand(32) * 9 + 1
    others = rows.flip(0)
    for stale, verdict in ((0, "ok"), (1, "suspicious"), (4, "found"), (32, "found")):
        means = torch.cat([others[:stale], rows[stale:]])
        counts[:stale] = 1e-3  # revived codes have hardly any hits: they count all the same
        state = of_state(rows.double(), (means * counts[:, None]).double(), counts.double(), NOTHING)
        told = stale_ema(evidence_of(replace(book, companions=state)))
        assert (told.verdict, told.value) == (verdict, pytest.approx(stale / 32)), told
    assert stale_ema(evidence_of(book)).verdict == "not-checked"
    unlike = replace(NOTHING, unlike=("vq.embed_avg",))
    told = stale_ema(evidence_of(replace(book, companions=unlike)))
    assert told.verdict == "found" and "vq.embed_avg" in told.evidence


def test_a_flag_that_is_not_set_is_named() -> None:
    book = book_of(spread_out(), centroids(spread_out()))
    told = uninitialised_flag(replace(book, companions=replace(NOTHING, flags={"vq.initted": False})))
    assert told.verdict == "found" and "vq.initted" in told.evidence
    assert uninitialised_flag(replace(book, companions=replace(NOTHING, flags={"vq.initted": True}))).verdict == "ok"
    assert uninitialised_flag(book).verdict == "not-checked"


# --- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kmeans++", "afkmc2", "random"])
def test_seeds_are_told_from_centroids(init: Any) -> None:
    points = spread_out()
    grown = torch.cat([centroids(points, 16), seeds(points, 16, init, 1)])
    told = {name: no_lloyd(evidence_of(book_of(points, codes))).verdict for name, codes in {
        "seeds": seeds(points, 32, init, 0), "centroids": centroids(points), "grown": grown,
    }.items()}  # fmt: skip
    assert told == {"seeds": "found", "centroids": "ok", "grown": "ok"}
    restarted = evidence_of(book_of(points, seeds(points, 32, init, 0)), command="restart")
    assert no_lloyd(restarted).verdict == "suspicious", "that surgery says so itself"


def test_modes_are_told_from_a_cloud() -> None:
    modes = torch.randn(3, 8, generator=random(5)) * 10
    three = modes[torch.randint(3, (6000,), generator=random(1))]
    noisy = three + torch.randn(6000, 8, generator=random(2)) * 0.3
    book = book_of(noisy, centroids(noisy))
    assert few_modes(evidence_of(book)).verdict == "found"
    assert few_modes(evidence_of(book_of(spread_out(), centroids(spread_out())))).verdict == "ok"
    line = torch.rand(6000, 1, generator=random(4)) * torch.ones(8)
    assert few_modes(evidence_of(book_of(line, centroids(line)))).verdict == "ok", "one dimension is no mode"
    assert few_modes(evidence_of(replace(book_of(spread_out(), centroids(spread_out())), distinct=16))).value == 16
    kinds = evidence_of(book_of(spread_out(), centroids(spread_out())), curve={1: 1.0, 2: 0.4, 4: 0.01})
    assert few_modes(kinds).verdict == "found" and few_modes(kinds).value == pytest.approx(40)


def test_counts_of_both_splits_are_held_against_each_other() -> None:
    book = book_of(spread_out(), centroids(spread_out()))
    assert counting(book).verdict == "ok"
    lopsided = torch.zeros_like(book.counts)
    lopsided[:8] = 100
    assert counting(replace(book, held_out=lopsided)).verdict == "found"
    assert counting(replace(book, held_out=lopsided // 50)).verdict == "not-checked"


def test_dead_and_duplicate_codes_are_counted() -> None:
    points = spread_out()
    codes = centroids(points)
    book = book_of(points, torch.cat([codes, codes[:8], codes[:1].expand(60, -1)]))
    assert dead_codes(book).value == pytest.approx(0.68) and dead_codes(book).verdict == "found"
    assert duplicate_codes(book).value == pytest.approx(0.68)
    assert duplicate_codes(replace(book, filling=True)).value == pytest.approx(0.07), "copies of code 0 fill sizes up"
    assert duplicate_codes(book_of(points, codes)).value == 0
    one_code = replace(book, counts=torch.tensor([64, *[0] * 99]))
    by_chance = 100 * (1 - 0.99**64)  # 47.4: a collapse whatever the amount of data
    assert dead_codes(one_code).value == pytest.approx(1 - 1 / by_chance)
    assert dead_codes(one_code).verdict == "found" and "by chance would use 47" in dead_codes(one_code).evidence
    half = replace(book, counts=torch.tensor([2] * 32 + [0] * 68))
    assert dead_codes(half).verdict == "ok", "few latents use fewer codes than chance, for codes are not alike"


# --- a pair, and a trace -------------------------------------------------------------------------------------------


def test_movement_by_hand() -> None:
    rows = spread_out(100)
    pair = Pair(Codebook(rows[:4]), 4, rows, rows)
    assert correlation(pair) == pytest.approx(1) and shift(pair) == (0, 0)
    moved = replace(pair, moved=rows * 2 + 1)
    assert correlation(moved) == pytest.approx(1) and shift(moved)[1] == pytest.approx(3)
    strangers = replace(pair, moved=spread_out(100, seed=9))
    assert abs(correlation(strangers)) < 0.3 and correlation(replace(pair, moved=None)) == 0


def trace_of(*used: int, errors: tuple[float, ...] = (), steps: tuple[int, ...] = (0, 1, 10, 100, 1000)) -> Trace:
    errors = errors or (1.0,) * len(used)
    history = tuple(Evaluation(*point) for point in zip(steps, errors, used, strict=False))
    return Trace(history, 128, 10_000, True, None)


TRACES = {
    "sound": (trace_of(128, 128, 127, 120, 118), []),
    "not installed": (trace_of(13, 13, 12, 13, 13), ["not-installed"]),
    "stale sums": (trace_of(128, 20, 20, 22, 22), ["stale-ema"]),
    "drift": (trace_of(128, 128, 128, 125, 80), ["encoder-drift"]),
    "long steps": (trace_of(128, 127, 110, 36, 40), ["learning-rate"]),
    "long steps, late": (trace_of(128, 127, 126, 120, 40, errors=(1.0, 1.0, 0.9, 0.9, 3.0)), ["learning-rate"]),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_tells_when_the_codes_were_lost(name: str) -> None:
    trace, expected = TRACES[name]
    evidence = evidence_of(book_of(spread_out(), centroids(spread_out())), trace=trace)
    assert found(evidence) == expected
    assert all(look(evidence).verdict != "not-checked" for look in (encoder_drift, learning_rate))


def test_a_small_validation_split_is_no_bad_installation() -> None:
    evidence = evidence_of(book_of(spread_out(), centroids(spread_out())), trace=trace_of(30, 30, 31, 30, 32))
    assert found(evidence) == ["not-installed"] and evidence.trace
    assert found(replace(evidence, trace=replace(evidence.trace, latents=500))) == []


def test_a_finetuning_of_a_collapsed_model_installed_nothing() -> None:
    trace = replace(trace_of(13, 13, 14, 15, 20), operated=False)
    assert not_installed(evidence_of(book_of(spread_out(), centroids(spread_out())), trace=trace)).verdict == "ok"


def point(**more: object) -> str:
    return json.dumps([{"step": 0, "validation_mse": 1, "used": 4}, {"step": 1, "validation_mse": 1, "used": 4} | more])


@pytest.mark.parametrize("what", ["step", "used"])
@pytest.mark.parametrize("count", [10**400, -1, 2**64])
def test_a_trace_of_what_no_one_can_count_is_refused(what: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(point(**{what: count}))
    with pytest.raises(CodebookError, match=r"has no trace of a training \(.* is no count\)"):
        read_trace(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"trace": []}', '{"trace": [{"step": 3}]}', "7", '{"trace": null}'])
def test_a_file_without_a_trace_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CodebookError, match="--trace"):
        read_trace(tmp_path / "a.json")
    with pytest.raises(CodebookError, match=r"--trace .*nowhere"):
        read_trace(tmp_path / "nowhere.json")


# --- the command ---------------------------------------------------------------------------------------------------

Run = Callable[..., Outcome]


def test_the_command_says_in_json_what_it_promises(tiny: Path, codebook: Run, images_folder: Path) -> None:
    asked = ("diagnose", tiny, "--data", images_folder, "--input-range=-1,1")
    done = codebook(*asked, "--json")
    assert done.stderr == "" and done.json.keys() == {"healthy", "checks"}
    keys = {"name", "verdict", "value", "limit", "evidence", "fix"}
    assert all(check.keys() == keys and "\n" not in check["evidence"] + check["fix"] for check in done.json["checks"])
    assert [check["name"] for check in done.json["checks"]] == [*CHECKS]
    wrong = [check["name"] for check in done.json["checks"] if check["verdict"] == "found"]
    assert (done.exit_code, done.json["healthy"]) == ((3, False) if wrong else (0, True))
    shown = codebook(*asked)
    assert shown.exit_code == done.exit_code and all(name in shown.stdout for name in CHECKS)
    assert all(len(line) <= 80 for line in shown.stdout.splitlines() if "->" not in line)


def test_a_refit_of_it_is_healthy_and_the_fix_names_the_files(
    tiny: Path, codebook: Run, images_folder: Path, write_model: WriteModel, variants: Any
) -> None:
    data = ("--data", images_folder, "--input-range=-1,1")
    result = tiny.with_name("result.safetensors")
    assert codebook("refit", tiny, "--k", 8, "--steps", 0, "-o", result, *data, "--json").exit_code == 0
    assert codebook("diagnose", result, "--against", tiny, *data).exit_code == 0
    from safetensors.torch import load_file

    state = load_file(result)
    shrunk = write_model(
        name="shrunk", state={**state, "_vq_vae._embedding.weight": state["_vq_vae._embedding.weight"] / 9}
    )
    done = codebook("diagnose", shrunk, "--against", tiny, *data, "--json")
    first = next(check for check in done.json["checks"] if check["verdict"] == "found")
    assert (done.exit_code, first["name"]) == (3, "scale-mismatch")
    assert first["fix"].startswith("codebook finetune ") and str(images_folder) in first["fix"]


def test_what_cannot_be_opened_is_refused(tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path) -> None:
    data = ("--data", images_folder)
    assert_refused(codebook("diagnose", tiny, "--against", tmp_path / "none.safetensors", *data), "none.safetensors")
    (tmp_path / "t.json").write_text(json.dumps({"trace": []}))
    assert_refused(codebook("diagnose", tiny, "--trace", tmp_path / "t.json", *data), "no trace of a training")


def test_the_worst_of_several_codebooks_is_named() -> None:
    points = spread_out()
    sound, shrunk = book_of(points, centroids(points)), replace(book_of(points, centroids(points) / 20), key="vq.1")
    told: Finding = CHECKS["scale-mismatch"][0](evidence_of(sound, shrunk))
    assert told.verdict == "found" and told.evidence.startswith("vq.1: ")
    assert scale_mismatch(sound).verdict == "ok"


def test_what_mends_it_can_be_typed_with_the_same_data(tiny: Path, images_folder: Path) -> None:
    request = Request(tiny, (str(images_folder),), size=16, input_range=(-1.0, 1.0))
    fixes = {check.name: check.fix for check in diagnose(request, Watch()).checks}
    assert f"codebook refit {tiny} --k " in fixes["no-lloyd"]
    assert f"codebook finetune {tiny} --data {images_folder} --size 16 " in fixes["scale-mismatch"]
