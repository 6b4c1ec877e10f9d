"""Surgeries in a row: what they leave is that of one after another, held against the first model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from codebook_cli.commands.run import merged
from conftest import Run, WriteModel, assert_refused, contents, same
from safetensors.torch import load_file

from codebook_tools.checkpoints.layout import index_map_path
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.measure import reconstruct
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.recipe_file import read_recipe, steps_of, without_nothing
from codebook_tools.workflows.chain import run_chain
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_request

STEPS: list[Any] = ["prune", {"refit": {"k": 6, "steps": 2}}, {"finetune": {"steps": 1, "lr": 0.001}}]


@pytest.fixture
def recipe(tiny: Path, images_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(surgeries: list[Any] = STEPS, **options: object) -> Path:
        shared = {"model": str(tiny), "data": str(images_folder), "input-range": "-1,1", **options}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**shared, "surgeries": surgeries}))
        return path

    return write


@pytest.mark.slow
def test_a_chain_leaves_what_its_steps_leave_one_after_another_and_the_composed_index_map(
    recipe: WriteModel, tiny: Path, images_folder: Path, codebook: Run, tmp_path: Path
) -> None:
    surgeries = [{"prune": {"keep": 8}}, {"quantize": {"k": 5}}, {"finetune": {"steps": 1, "lr": 0.001}}]
    one, two, three, out = paths = [tmp_path / f"{name}.safetensors" for name in ("1", "2", "3", "out")]
    found = codebook("run", recipe(surgeries, output=str(out)), "--json")
    assert found.exit_code == 0, found.stderr
    data = ("--data", images_folder, "--input-range", "-1,1", "--json")
    words = (("prune", tiny, "--keep", 8, "-o", one), ("quantize", one, "--k", 5, "-o", two),
             ("finetune", two, "--steps", 1, "--lr", 0.001, "-o", three))  # fmt: skip
    assert [step["stages"] for step in found.json["steps"]] == [codebook(*of, *data).json["stages"] for of in words]
    ours, theirs = load_file(out), load_file(three)
    assert ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    first, second, third, all_maps = (load_file(index_map_path(path)) for path in paths)
    composed, nearest = (f"{CODEBOOK}/{kind}" for kind in ("index_map", "nearest"))
    identity = torch.where(first[composed] < 0, -1, second[composed][first[composed]])
    assert third[composed].tolist() == third[nearest].tolist() == list(range(5)) and int(identity.max()) == 4
    assert torch.equal(all_maps[composed], identity)
    assert torch.equal(all_maps[nearest], second[nearest][first[nearest]])
    assert not list(tmp_path.glob("*.partial"))
    assert codebook("verify", out, "--against", tiny).exit_code == 0


def test_what_a_killed_run_left_is_named_and_a_recipe_stays(recipe: WriteModel, codebook: Run, tmp_path: Path) -> None:
    """What was left lay in a hidden folder, another one after each kill."""
    (left := tmp_path / "out.safetensors.steps.codebook.partial").mkdir()
    (tmp_path / "out.recipe.yaml").write_text("mine")
    command = ("run", recipe(["prune"], output=str(tmp_path / "out.safetensors")))
    assert_refused(codebook(*command), f"{left.name} is left of an interrupted run")
    left.rmdir()
    found = codebook(*command)
    assert found.exit_code == 0 and "out.recipe.yaml is there and stays as it is" in found.stderr
    assert (tmp_path / "out.recipe.yaml").read_text() == "mine"


def test_what_is_typed_comes_before_the_recipe_and_the_one_that_is_written_repeats_the_run_to_the_byte(
    recipe: WriteModel, codebook: Run, tmp_path: Path
) -> None:
    path, page = recipe(seed=1, **{"batch-size": 16}, output=str(tmp_path / "not.safetensors")), tmp_path / "page.html"
    found = codebook("run", path, "--seed", 3, "-o", tmp_path / "out.safetensors", "--report", page, "--json")
    assert found.exit_code == 0, found.stderr
    assert found.json["seed"] == 3 and not (tmp_path / "not.safetensors").exists()
    assert found.json["steps"][1]["settings"]["batch_size"] == 16
    again, text = Path(found.json["outputs"]["recipe"]), page.read_text()
    entries = yaml.safe_load(again.read_text())
    assert (entries["seed"], entries["batch-size"], entries["surgeries"]) == (3, 16, STEPS)
    before = contents(tmp_path)
    assert codebook("run", again, "--force").exit_code == 0
    assert contents(tmp_path) == before
    headings = ("<h1>codebook run: ", "1, prune", "2, refit", "3, finetune", "2, refit, step by step")
    for part in (*headings, " latents, 6 codes and "):  # the last is the map of what was written
        assert part in text
    assert text.count("before, mse ") == text.count("3, finetune, mse ") == 3, "the worst, the median and the best"
    assert re.search(r"now \d of 6, and the error", text)


def test_a_recipe_holds_what_is_set_and_0_is() -> None:
    options = {"workers": 0, "seed": 0, "limit": None, "force": False, "data": [], "output": Path("a")}
    assert without_nothing(options) == {"workers": 0, "seed": 0, "output": "a"}


def test_a_dry_run_says_the_sizes_and_writes_nothing(recipe: WriteModel, codebook: Run, tmp_path: Path) -> None:
    path = recipe([{"prune": {"keep": 8}}, {"refit": {"k": 6, "steps": 2}}, "finetune"])
    before = contents(tmp_path)
    found = codebook("run", path, "--dry-run", "--json")
    assert [step["size"] for step in found.json["steps"]] == [
        {"before": 16, "after": 8}, {"before": 8, "after": 6}, {"before": 6, "after": 6}
    ]  # fmt: skip
    assert "1, prune" in codebook("run", path, "--dry-run").stdout
    assert contents(tmp_path) == before


def test_the_images_on_the_page_are_those_of_the_files(recipe: WriteModel, tiny: Path, images_folder: Path) -> None:
    """The last stage is the file that was written: its worst image is the worst that a measurement of it finds."""
    request = Request(tiny, (str(images_folder),), input_range=(-1.0, 1.0), output=tiny.parent / "o.safetensors")
    steps = steps_of(read_recipe(recipe()), batch_size=64, seed=0)
    done = run_chain(replace(request, gallery=True), steps, Watch())
    opened = open_request(replace(request, model=request.output, output=None), Watch())
    _, images = next(iter(opened.test.batches(1000)))
    errors = (reconstruct(opened.model, images).media - images).square().flatten(1).mean(1)
    for picture, expected in zip(done.gallery, (errors.max(), None, errors.min()), strict=True):
        assert list(picture.stages) == ["before", "1, prune", "2, refit", "3, finetune"]
        assert expected is None or picture.errors["3, finetune"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("surgeries", "options", "message"),
    [
        ([], {}, "no surgery to do"),
        (["sharpen"], {}, "no strategy 'sharpen'"),
        ([{"refit": {"k": 6, "stepz": 3}}], {}, "refit has no stepz; it has"),
        ([{"refit": {}}], {}, "refit cannot be made of"),
        ([{"refit": {"k": 0}}], {}, "k=0 is below 1"),
        ([{"refit": {"k": 8.0}}], {}, "refit: k is 8.0; expected a whole number"),
        ([{"prune": {"threshold": float("nan")}}], {}, "prune: threshold is nan; expected a whole number"),
        ([{"finetune": {"lr": "fast"}}], {}, "finetune: lr is 'fast'; expected a number"),
        ([{"refit": 6}], {}, "is no surgery; write `prune` or"),
        (["prune", {"refit": {"k": 100_000}}], {}, "k=100000 asks for more codes than"),
        (["prune"], {"datas": "x"}, "a recipe has no datas; it has surgeries, "),
        (["prune"], {"limit": "many"}, "limit is 'many'; expected a whole number"),
        (["prune"], {"device": "tpu"}, "--device tpu: this torch finds no such device"),
        (["prune"], {"data": [["images"]]}, "data is ['images']; expected text"),
        (["prune"], {"channels": "all"}, "channels is 'all'; expected one of mix, first"),
        (["prune"], {"skip-bad": 1}, "skip-bad is 1; expected true or false"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_and_leaves_nothing(
    surgeries: list[Any], options: dict[str, object], message: str, recipe: WriteModel, codebook: Run, tmp_path: Path
) -> None:
    path = recipe(surgeries, **options)
    before = contents(tmp_path)
    assert_refused(codebook("run", path), message)
    assert contents(tmp_path) == before


def bomb(levels: int) -> str:
    """A list of so many levels, ten times the one below each, that is gigabytes once it is written out."""
    above = [f", &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return f"[&a0 [{', '.join('x' * 10)}]{''.join(above)}]"


def merge_bomb(levels: int) -> str:
    above = [f"x{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, levels)]
    return f"x: &m0 {{a: 1}}\n{''.join(above)}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is no YAML"),
        ("", "has no list of surgeries"),
        ("- prune\n", "has no list of surgeries"),
        ("surgeries: prune\n", "has no list of surgeries"),
        ("!!python/object/apply:os.system ['true']\n", "is no YAML"),
        ("surgeries: [prune]\nseed: 1\nseed: 2\n", "seed is there twice"),
        ("limit: &many 5\nsize: *many\nsurgeries: [prune]\n", "an anchor with an alias"),
        (f"limit: {bomb(9)}\nsurgeries: [prune]\n", "an anchor with an alias"),
        (merge_bomb(9) + "surgeries: [prune]\n", "an anchor with an alias"),
        ("surgeries: &all [*all]\n", "an anchor with an alias"),
        (f"limit: [{', '.join(10_000 * 'x')}]\nsurgeries: [prune]\n", "limit is ['x', 'x', 'x', 'x', 'x', 'x', ...];"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str, codebook: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert_refused(codebook("run", tmp_path / "recipe.yaml"), message)
    assert_refused(codebook("run", tmp_path / "none.yaml"), "No such file")


@pytest.mark.slow
def test_a_chain_on_the_demo_sees_the_bundled_sample_throughout(tmp_path: Path, codebook: Run) -> None:
    (tmp_path / "recipe.yaml").write_text("limit: 120\nsurgeries: [{prune: {keep: 60}}, {quantize: {k: 32}}]\n")
    found = codebook("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out.safetensors", "--json")
    assert found.exit_code == 0 and all("the error on the test data rose" in text for text in found.json["warnings"])
    assert all(step["stages"]["surgery"]["mse"] > 0 for step in found.json["steps"])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("size", 64, "64"), ("size", [48, 64], "48,64"), ("size", "48,64", "48,64"), ("input_range", [-1, 1.5], "-1,1.5")],
)
def test_a_recipe_says_numbers_as_yaml_or_as_the_command_line_does(name: str, value: object, expected: str) -> None:
    assert merged({name: value}, {name: None}, ()) == {name: expected}


def test_a_recipe_refuses_what_is_no_number() -> None:
    for value in (True, ["a"], {"a": 1}):
        with pytest.raises(CodebookError, match=r"size is .*; expected text"):
            merged({"size": value}, {"size": None}, ())
