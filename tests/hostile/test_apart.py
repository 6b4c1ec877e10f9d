"""What is read is never written, whatever --force says, and nothing is written through a link."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Outcome, assert_refused, contents

from codebook_tools.checkpoints.layout import partial_path
from codebook_tools.models.demo import DEMO

Run = Callable[..., Outcome]
READ = "is read here, so it is never overwritten"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codebook: Run) -> Path:
    """The model, its counts, a pruned one with its map, and tokens."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(DEMO, "m.safetensors")
    assert codebook("measure", "m.safetensors", "--limit", 100, "--stats", "s.safetensors").exit_code == 0
    assert codebook("prune", "m.safetensors", "--stats", "s.safetensors", "-o", "p.safetensors").exit_code == 0
    np.save("a.npy", np.zeros(3, np.int64))
    np.save("a.remapped.npy", np.ones(3, np.int64))
    return tmp_path


@pytest.mark.parametrize(
    "typed",
    [
        "measure m.safetensors --limit 100 --stats m.safetensors",
        "measure ./m.safetensors --limit 100 --stats m.safetensors",
        "prune m.safetensors --stats s.safetensors -o s.safetensors",
        "remap a.npy a.remapped.npy --map p.index_map.safetensors --on-removed nearest",
        "remap p.safetensors --map p.index_map.safetensors -o p.index_map.safetensors",
    ],
)
def test_nothing_that_a_command_names_to_be_read_is_its_output(typed: str, folder: Path, codebook: Run) -> None:
    before = contents(folder)
    assert_refused(codebook(*typed.split(), "--force"), READ)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["o.index_map.safetensors", "o.training.safetensors"])
def test_a_model_that_is_called_as_what_comes_beside_the_output_is_left_alone(
    name: str, folder: Path, codebook: Run
) -> None:
    shutil.copy("m.safetensors", name)
    before = contents(folder)
    for more in (["--force"], ["--force", "--resume"]):
        assert_refused(codebook("finetune", name, "--steps", 1, "--limit", 50, "-o", "o.safetensors", *more), READ)
    assert contents(folder) == before


def test_two_spellings_of_one_source_are_not_two(folder: Path, codebook: Run) -> None:
    maps = ("--map", "p.index_map.safetensors", "--on-removed", "nearest", "--force")
    assert_refused(codebook("remap", "a.npy", folder / "a.npy", *maps), "would both be written to")


def test_the_recipe_that_is_read_stays_as_its_author_wrote_it(folder: Path, codebook: Run) -> None:
    recipe = folder / "o.recipe.yaml"
    recipe.write_text("# mine\nsurgeries: [prune]\n")
    for _ in range(2):
        found = codebook("run", recipe, "--limit", 50, "-o", "o.safetensors", "--force")
        assert found.exit_code == 0 and "is the recipe that was read" in found.stderr, found.stderr
        assert recipe.read_text().startswith("# mine")


def test_what_a_download_left_under_a_partial_name_is_not_ours(folder: Path, codebook: Run) -> None:
    """It was overwritten, and removed at the end; as the model itself it was lost."""
    shutil.copy("m.safetensors", "o.safetensors.partial")
    before = contents(folder)
    assert codebook("quantize", "o.safetensors.partial", "--k", 8, "-o", "o.safetensors").exit_code == 0
    assert before.items() <= contents(folder).items()


@pytest.mark.parametrize(
    ("typed", "output"),
    [
        ("quantize m.safetensors --k 8 -o o.safetensors", "o.safetensors"),
        ("remap a.npy --map p.index_map.safetensors --on-removed nearest -o o.npy", "o.npy"),
        ("measure m.safetensors --limit 50 --report o.html", "o.html"),
        ("measure m.safetensors --limit 50 --stats o.safetensors", "o.safetensors"),
    ],
)
def test_nothing_is_written_through_a_link_where_the_output_is_built(
    typed: str, output: str, folder: Path, codebook: Run
) -> None:
    partial_path(folder / output).symlink_to("m.safetensors")
    before = contents(folder)
    assert_refused(codebook(*typed.split()), f"{partial_path(Path(output))} is no file")
    assert contents(folder) == before


def test_a_link_to_nowhere_is_not_replaced_without_force(folder: Path, codebook: Run) -> None:
    (folder / "o.safetensors").symlink_to("nowhere")
    assert_refused(codebook("quantize", "m.safetensors", "--k", 8, "-o", "o.safetensors"), "--force replaces it")


def test_pictures_beside_a_page_are_replaced_only_where_they_are_of_one(folder: Path, codebook: Run) -> None:
    command = ("map", "m.safetensors", "--limit", 50, "--method", "pca", "--report", "cat.html")
    (folder / "cat.png").write_bytes(b"of a cat")
    assert_refused(codebook(*command), "cat.png is there, and is of no page")
    assert (folder / "cat.png").read_bytes() == b"of a cat"
    (folder / "cat.png").unlink()
    for _ in range(2):
        assert codebook(*command).exit_code == 0
