"""Each check of a diagnosis by hand and on made-up latents, free of scale; and the command around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from points import normal
from torch import Tensor
from torch.nn.functional import normalize

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT, DOT
from codebook_tools.clustering.seeding import seeds
from codebook_tools.codebook import Codebook
from codebook_tools.diagnosis.alternatives import best_scale, scaled
from codebook_tools.diagnosis.checks import duplicate_codes
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
from codebook_tools.workflows.diagnose import CHECKS
from codebook_tools.workflows.gather_evidence import curve_of

NOTHING = Companions()


def spread_out(n: int = 6000, dim: int = 8, seed: int = 0) -> Tensor:
    """(n, dim) latents with a mean, and a covariance that is not alike in all directions."""
    return normal(n, dim, seed=seed) * torch.linspace(2, 0.2, dim) + torch.linspace(1, -1, dim)


def centroids(points: Tensor, k: int = 32) -> Tensor:
    return kmeans(points, k, watch=Watch()).centroids


def book_of(latents: Tensor, codes: Tensor | None = None) -> BookEvidence:
    """The evidence of codes, or of centroids, on latents, without alternatives except another length."""
    codebook = Codebook(centroids(latents) if codes is None else codes)
    chosen, fit, curve = nearest(latents, codebook), fit_of(codebook, latents, 0), curve_of(codebook, latents, 0)
    counts, lengths = torch.bincount(chosen, minlength=codebook.size), tuple(scaled(codebook, latents, 0))
    of_latents = (counts, counts, latents, chosen, fit, lengths, curve, codebook.size, left_of(codebook, latents), 1.0)
    return BookEvidence("vq", codebook, *of_latents, companions=NOTHING, filling=False, pair=None)


def trace_of(*used: int, errors: tuple[float, ...] = (1.0,) * 5, latents: int = 10_000, operated: bool = True) -> Trace:
    history = tuple(map(Evaluation, (0, 1, 10, 100, 1000), errors, used))
    return Trace(history, 128, latents, operated, None)


@cache
def book(name: str) -> BookEvidence:
    points, far = spread_out(), spread_out(dim=16) + 9
    uniform = (torch.rand(40, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1) / 40
    if name in ("kmeans++", "afkmc2", "random"):
        return book_of(points, seeds(points, 32, name, 0))  # type: ignore[arg-type]
    makers: dict[str, Callable[[], BookEvidence]] = {
        "sound": lambda: book_of(points),
        "shrunk": lambda: book_of(points, centroids(points) * 0.05),
        "dead since birth": lambda: book_of(far, torch.cat([centroids(far, 8), uniform, spread_out(8, 16) + 500])),
        "noise": lambda: book_of(points, normal(32, 8) * 9),
        "of other latents": lambda: book_of(points, centroids(spread_out(seed=3).flip(1) * 2 + 4)),
        "grown": lambda: book_of(points, torch.cat([centroids(points, 16), seeds(points, 16, "random", 1)])),
        "modes": lambda: book_of(normal(3, 8, seed=5)[torch.arange(6000) % 3] * 10 + normal(6000, 8, seed=2) * 0.3),
        "line": lambda: book_of(torch.linspace(0, 1, 6000)[torch.randperm(6000)][:, None] * torch.ones(8)),
    }
    return makers[name]()


def check(name: str, *books: BookEvidence, **more: Any) -> Finding:
    known: dict[str, Any] = {"curve": {1: 1.0, 2: 0.8, 4: 0.6}, "mse": 1.0, "original_mse": None, "flat_mse": 2.0}
    known |= {"ranges": {}, "input_range": (0.0, 1.0), "command": "", "trace": None}
    return CHECKS[name][0](Evidence(books, **known | more))


def test_causes_in_the_tensors_come_first_and_symptoms_last() -> None:
    assert [*CHECKS][:3] == ["not-installed", "uninitialised-flag", "stale-ema"]
    assert [*CHECKS][-2:] == ["dead-codes", "duplicate-codes"]
    assert {*CHECKS} > {"wrong-encoder", "wrong-layout", "wrong-input-range", "dimensional-collapse", "encoder-drift"}


OF_MODEL = {field.name for field in fields(Evidence)} - {"curve"}


@pytest.mark.parametrize(("name", "more", "cause"), [
    ("sound", {}, None), ("shrunk", {}, "scale-mismatch"), ("dead since birth", {}, "scale-mismatch"),
    ("dead since birth", {"command": "refit"}, "not-installed"),  # a surgery leaves none of them
    ("dead since birth", {"command": "refit", "filling": True}, "dead-codes"),  # but where it fills up
    ("noise", {"mse": 4.0}, "not-installed"),  # the decoder does not know these codes
    ("noise", {}, "scale-mismatch"),  # it does: they were trained so, and collapsed
    ("of other latents", {"mse": 4.0}, "wrong-encoder"),
    *((init, {}, "no-lloyd") for init in ("kmeans++", "afkmc2", "random")),
    ("random", {"command": "restart"}, None),  # that surgery says so itself
    ("grown", {}, None), ("modes", {}, "few-modes"),
    ("line", {}, None),  # one dimension is no mode
    ("sound", {"distinct": 16}, "few-modes"),
    ("sound", {"companions": Companions(unlike=("vq.embed_avg",))}, "stale-ema"),
    ("sound", {"companions": Companions(flags={"vq.initted": False})}, "uninitialised-flag"),
    ("sound", {"companions": Companions(flags={"vq.initted": True})}, None),
    ("sound", {"held_out": torch.tensor([100] * 8 + [0] * 24)}, "counting"),
    ("sound", {"held_out": torch.tensor([2] * 8 + [0] * 24)}, None),  # too few to say
    ("sound", {"trace": trace_of(128, 128, 127, 120, 118)}, None),
    ("sound", {"trace": trace_of(13, 13, 12, 13, 13)}, "not-installed"),
    ("sound", {"trace": trace_of(13, 13, 14, 15, 20, operated=False)}, None),  # nothing was to be installed
    ("sound", {"trace": trace_of(30, 30, 31, 30, 32)}, "not-installed"),
    ("sound", {"trace": trace_of(30, 30, 31, 30, 32, latents=500)}, None),  # so few cannot use more codes
    ("sound", {"trace": trace_of(128, 20, 20, 22, 22)}, "stale-ema"),
    ("sound", {"trace": trace_of(128, 128, 128, 125, 80)}, "encoder-drift"),
    ("sound", {"trace": trace_of(128, 127, 110, 36, 40)}, "learning-rate"),
    ("sound", {"trace": trace_of(128, 127, 126, 120, 40, errors=(1.0, 1.0, 0.9, 0.9, 3.0))}, "learning-rate"),
])  # fmt: skip
def test_the_first_check_that_fails_is_the_cause(name: str, more: dict[str, Any], cause: str | None) -> None:
    evidence = replace(book(name), **{key: value for key, value in more.items() if key not in OF_MODEL})
    of_model = {key: value for key, value in more.items() if key in OF_MODEL}
    findings = {check_name: check(check_name, evidence, **of_model) for check_name in CHECKS}
    failed = [check_name for check_name, finding in findings.items() if finding.verdict == "found"]
    assert failed[:1] == ([cause] if cause else []) and (name != "sound" or len(failed) < 2)
    wrong = [key for key in (*evidence.companions.unlike, *evidence.companions.flags) if cause]
    assert all(key in findings[failed[0]].evidence for key in wrong), "the tensor is named"


def test_what_cannot_be_checked_says_so_and_what_may_be_meant_is_suspicious() -> None:
    for name in ("not-installed", "wrong-encoder", "wrong-layout", "scale-mismatch", "no-lloyd"):
        assert check(name, replace(book("sound"), fit=None)).verdict == "not-checked", "the dot product has no k-means"
    for name in ("stale-ema", "uninitialised-flag", "encoder-drift", "learning-rate"):
        assert check(name, book("sound")).verdict == "not-checked"
    assert check("wrong-encoder", book("of other latents")).verdict == "suspicious", "an encoder may leave its codes"
    assert check("no-lloyd", book("random"), command="restart").verdict == "suspicious"
    assert check("few-modes", book("sound"), curve={1: 1.0, 2: 0.4, 4: 0.01}).value == pytest.approx(40)
    assert check("scale-mismatch", book("sound"), replace(book("shrunk"), key="vq.1")).evidence.startswith("vq.1: ")


def test_a_fit_by_hand() -> None:
    fit = Fit(distortion=3.0, inertia=1.0, variance=11.0)
    assert (fit.ratio, fit.excess, fit.misfit, fit.good) == (3.0, pytest.approx(0.2), 1.5, False)
    assert Fit(3.0, 1.0, 100.0).good, "three times next to nothing is next to nothing"
    assert Fit(9.0, 8.0, 10.0).good, "half of the way where k-means gets nowhere"


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_centroids_fit_others_do_not_and_scale_plays_no_part(scale: float) -> None:
    points, codes, others = spread_out(), book("sound").codebook.vectors, spread_out(32, seed=1) * 3
    good, poor, scaled_ = (fit_of(Codebook(rows * scale), points * scale, 0) for rows in (codes, others * 33, others))
    unscaled = fit_of(Codebook(others), points, 0)
    assert good and 0.8 < good.ratio < 1.2 and good.misfit < 0.6
    assert poor and poor.excess > 1 and poor.misfit > 1
    assert scaled_ and unscaled and scaled_.misfit == pytest.approx(unscaled.misfit, rel=1e-3)
    assert best_scale(Codebook(codes * 0.05), points) == pytest.approx(20, rel=0.05)


def test_there_is_no_fit_by_the_dot_product_and_by_the_cosine_length_plays_no_part() -> None:
    points = spread_out()
    assert fit_of(Codebook(book("sound").codebook.vectors, DOT), points, 0) is None
    for metric in (COSINE, COSINE_UNIT):
        directions = Codebook(centroids(normalize(points)), metric)
        longer = replace(directions, vectors=directions.vectors * 50)
        one, other = fit_of(directions, points, 0), fit_of(longer, points, 0)
        assert one and other and one.misfit == pytest.approx(other.misfit) and one.good
        assert list(scaled(longer, points, 0)) == []


@pytest.mark.parametrize(("n", "dim"), [(16, 4), (128, 64), (512, 64), (64, 256), (2048, 8)])
def test_what_an_initialization_draws_is_noise_at_any_size_and_what_was_fitted_is_none(n: int, dim: int) -> None:
    uniform = (torch.rand(n, dim, generator=torch.Generator().manual_seed(0)) * 2 - 1) / n
    assert all(map(drawn, (uniform, normal(n, dim), normalize(normal(n, dim), dim=1), torch.zeros(n, dim))))
    codes = spread_out(n, dim)
    assert structure(codes) > 5 and structure(codes) == pytest.approx(structure(codes * 1e3), rel=1e-3)


def test_codes_dead_since_birth_are_told_from_those_that_died() -> None:
    codes = book("dead since birth").codebook.vectors
    born = born_dead(codes, book("dead since birth").dead)
    assert 30 < int(born.sum()) <= 40 and not born[:8].any() and not born[48:].any()
    assert not born_dead(codes, torch.arange(56) >= 48).any(), "eight that are no noise"


@pytest.mark.parametrize("apart", [1e-6, 5e-4, 2e-3])
def test_duplicates_are_those_of_a_table_of_all_distances(apart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies, neighbors at about the distance that tells codes apart, and a code far off."""
    monkeypatch.setattr(duplicate_codes, "_ROWS", 7)
    monkeypatch.setattr(duplicate_codes, "_COLUMNS", 11)
    codes = normal(300, 5, seed=1)
    codes[100:200] = codes[50:150] + apart * normal(100, 5, seed=2)
    codes[290:], codes[17] = codes[3], 30
    table = (codes[:, None] - codes).double().square().sum(2)
    limit = 1e-6 * float((codes - codes.mean(0)).double().square().sum(1).mean())
    assert torch.equal(duplicate_codes.copies(codes), (table <= limit).tril(-1).any(1))


@pytest.mark.parametrize(("stale", "verdict"), [(0, "ok"), (1, "suspicious"), (4, "found"), (32, "found")])
def test_sums_of_other_codes_are_stale(stale: int, verdict: str) -> None:
    codes = book("sound").codebook.vectors.double()
    counts = torch.full((32,), 5.0).double().index_fill(0, torch.arange(stale), 1e-3)  # revived codes: hardly any hits
    sums = torch.cat([codes.flip(0)[:stale], codes[stale:]]) * counts[:, None]
    finding = check("stale-ema", replace(book("sound"), companions=of_state(codes, sums, counts, NOTHING)))
    assert (finding.verdict, finding.value) == (verdict, pytest.approx(stale / 32))


def test_dead_and_duplicate_codes_are_counted() -> None:
    codes = book("sound").codebook.vectors
    copied = book_of(spread_out(), torch.cat([codes, codes[:8], codes[:1].expand(60, -1)]))
    for name in ("dead-codes", "duplicate-codes"):
        assert check(name, copied).value == pytest.approx(0.68) and check(name, copied).verdict == "found"
    assert check("duplicate-codes", replace(copied, filling=True)).value == pytest.approx(0.07), "but copies of code 0"
    one_code = check("dead-codes", replace(copied, counts=torch.tensor([64, *[0] * 99])))
    by_chance = 100 * (1 - 0.99**64)  # 47.4: a collapse whatever the amount of data
    assert one_code.verdict == "found" and one_code.value == pytest.approx(1 - 1 / by_chance)
    half = check("dead-codes", replace(copied, counts=torch.tensor([2] * 32 + [0] * 68)))
    assert half.verdict == "ok", "few latents use fewer codes than chance, for codes are not alike"


def test_movement_of_latents_by_hand() -> None:
    rows = spread_out(100)
    pair = Pair(Codebook(rows[:4]), 4, rows, rows)
    assert correlation(pair) == pytest.approx(1) and shift(pair) == (0, 0)
    moved = replace(pair, moved=rows * 2 + 1)
    assert correlation(moved) == pytest.approx(1) and shift(moved)[1] == pytest.approx(3)
    assert abs(correlation(replace(pair, moved=spread_out(100, seed=9)))) < 0.3
    assert correlation(replace(pair, moved=None)) == 0


START = {"step": 0, "validation_mse": 1, "used": 4}
COUNTS = [json.dumps([START, START | {name: n}]) for name in ("step", "used") for n in (10**400, -1, 2**64)]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"trace": [{"step": 3}]}', "7", '{"trace": null}', None, *COUNTS])
def test_a_file_without_a_trace_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CodebookError, match=r"--trace .*trace\.json"):
        read_trace(path)


def test_a_refit_is_healthy_and_the_command_keeps_its_promise(tiny: Path, codebook: Run, images_folder: Path) -> None:
    data, result = ("--data", images_folder, "--input-range=-1,1"), tiny.with_name("result.safetensors")
    assert codebook("refit", tiny, "--k", 8, "--steps", 0, "-o", result, *data).exit_code == 0
    done = codebook("diagnose", result, "--against", tiny, *data, "--json")
    assert (done.exit_code, done.stderr, done.json["healthy"], len(done.json)) == (0, "", True, 2)
    checks = done.json["checks"]
    assert [each["name"] for each in checks] == [*CHECKS]
    assert {*checks[0]} == {"name", "verdict", "value", "limit", "evidence", "fix"}
    assert not any("\n" in each["evidence"] + each["fix"] for each in checks)
    table = codebook("diagnose", tiny, *data)
    assert table.exit_code == 3 and all(name in table.stdout for name in CHECKS)
    assert all(len(line) <= 80 for line in table.stdout.splitlines() if "->" not in line)
    of_size = codebook("diagnose", tiny, *data, "--size", 16, "--json").json["checks"]
    fixes = {each["name"]: each["fix"] for each in of_size}
    assert f"codebook refit {tiny} --k " in fixes["no-lloyd"]
    assert f"codebook finetune {tiny} --data {images_folder} --size 16 " in fixes["scale-mismatch"]
