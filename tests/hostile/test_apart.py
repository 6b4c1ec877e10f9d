"""What is read is never written, whatever --force says, and nothing is written through a link."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from codebook_cli.app import app
from conftest import Patch, Run, assert_refused, contents
from typer.testing import CliRunner

from codebook_tools.checkpoints.layout import partial_path
from codebook_tools.models.demo import DEMO

pytestmark = pytest.mark.hostile

READ = "is read here, so it is never overwritten"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its counts, a pruned one with its map, and tokens."""
    with Patch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("made"))
        shutil.copy(DEMO, "m.safetensors")
        for command in ("measure m.safetensors --limit 100 --stats", "prune m.safetensors -o p.safetensors --stats"):
            assert CliRunner().invoke(app, [*command.split(), "s.safetensors"]).exit_code == 0
        np.save("a.npy", np.zeros(3, np.int64))
        np.save("a.remapped.npy", np.ones(3, np.int64))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


TUNE, MAPPED = "--steps 1 --limit 50 -o o.safetensors", "--map p.index_map.safetensors --on-removed nearest"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("measure m.safetensors --limit 100 --stats m.safetensors", READ),
        ("measure ./m.safetensors --limit 100 --stats m.safetensors", READ),
        ("prune m.safetensors --stats s.safetensors -o s.safetensors", READ),
        (f"remap a.npy a.remapped.npy {MAPPED}", READ),
        (f"remap a.npy FOLDER/a.npy {MAPPED}", "would both be written to"),
        ("remap p.safetensors --map p.index_map.safetensors -o p.index_map.safetensors", READ),
        # a model that is called as what comes beside the output
        *((f"finetune o.{kind}.safetensors {TUNE}", READ) for kind in ("index_map", "training")),
        *((f"finetune o.{kind}.safetensors {TUNE} --resume", READ) for kind in ("index_map", "training")),
    ],
)
def test_nothing_that_a_command_reads_is_its_output(typed: str, message: str, folder: Path, codebook: Run) -> None:
    if not Path(typed.split()[1]).exists():
        shutil.copy("m.safetensors", typed.split()[1])
    before = contents(folder)
    assert_refused(codebook(*typed.replace("FOLDER", str(folder)).split(), "--force"), message)
    assert contents(folder) == before


def test_the_recipe_that_is_read_stays_as_its_author_wrote_it(folder: Path, codebook: Run) -> None:
    recipe = folder / "o.recipe.yaml"
    recipe.write_text("# mine\nsurgeries: [prune]\n")
    for _ in range(2):
        done = codebook("run", recipe, "--limit", 50, "-o", "o.safetensors", "--force")
        assert done.exit_code == 0 and "is the recipe that was read" in done.stderr, done.stderr
        assert recipe.read_text().startswith("# mine")


def test_what_a_download_left_under_a_partial_name_is_not_ours(folder: Path, codebook: Run) -> None:
    shutil.copy("m.safetensors", "o.safetensors.partial")
    before = contents(folder)
    assert codebook("quantize", "o.safetensors.partial", "--k", 8, "-o", "o.safetensors").exit_code == 0
    assert before.items() <= contents(folder).items()


@pytest.mark.parametrize(
    ("typed", "output"),
    [
        ("quantize m.safetensors --k 8 -o o.safetensors", "o.safetensors"),
        (f"remap a.npy {MAPPED} -o o.npy", "o.npy"),
        ("measure m.safetensors --limit 50 --report o.html", "o.html"),
        ("measure m.safetensors --limit 50 --stats o.safetensors", "o.safetensors"),
    ],
)
def test_nothing_is_written_through_a_link(typed: str, output: str, folder: Path, codebook: Run) -> None:
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
