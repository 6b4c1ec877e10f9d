"""codebook.toml: read in the current folder alone, where a MODEL is typed, and never one that came with a model."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from codebook_cli.config import as_toml, keys
from conftest import Outcome, assert_refused
from proven_networks import write_images, write_network

Run = Callable[..., Outcome]
HOSTILE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with model.safetensors, network.py, calibration.npy and held_out.npy."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_images(Path())
    write_network(Path(), "tied", 24)
    return Path()


def write(folder: Path, **more: object) -> None:
    options = {"data": ["calibration.npy"], "test-data": ["held_out.npy"], "network": "network.py:make"}
    folder.joinpath("codebook.toml").write_text(as_toml({**options, "input-range": [0.0, 1.0], **more}))


def test_the_commands_of_a_folder_take_its_options_and_say_so(folder: Path, codebook: Run) -> None:
    write(folder, **{"batch-size": 16, "steps": 2, "device": "cpu"})
    done = codebook("refit", "model.safetensors", "--k", 8, "--json")
    assert done.exit_code == 0, done.stderr
    settings = done.json["settings"]
    assert (settings["steps"], settings["batch_size"], settings["input_range"]) == (2, 16, [0.0, 1.0])
    assert settings["data"] == ["calibration.npy"] and settings["network"] == "network.py:make"
    assert settings["config"].keys() == {"data", "test-data", "network", "input-range", "batch-size", "steps", "device"}
    assert "from codebook.toml: data calibration.npy" in done.stderr
    np.save("other.npy", np.random.default_rng(1).integers(0, 256, (40, 16, 16), dtype=np.uint8))
    typed = codebook("measure", "model.safetensors", "--data", "other.npy", "--json")  # a key is replaced whole
    assert typed.json["settings"]["data"] == ["other.npy"] and "data" not in typed.json["settings"]["config"]
    assert codebook("measure", "model.safetensors", "--quiet", "--json").stderr == ""


def test_without_a_model_or_with_no_config_nothing_is_read(folder: Path, codebook: Run) -> None:
    folder.joinpath("codebook.toml").write_text("this is no TOML")
    assert codebook("measure", "--limit", 20, "--json").exit_code == 0
    asked = ("--data", "calibration.npy", "--network", "network.py:make", "--input-range", "0,1")
    unread = codebook("measure", "model.safetensors", *asked, "--no-config", "--json")
    assert "config" not in unread.json["settings"]
    assert_refused(codebook("measure", "model.safetensors", *asked), "codebook.toml is no TOML")


def test_a_file_beside_a_downloaded_model_runs_nothing(
    folder: Path, codebook: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (folder / "network.py").write_text(HOSTILE)
    write(folder)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    there = tmp_path / "here"
    for model in (there / "model.safetensors", "../here/model.safetensors"):
        done = codebook("measure", model, "--latents", write_latents(), "--codebook-key", "stages.0.weight", "--json")
        assert not (there / "ran").exists()
        assert "codebook.toml is not read: only codebook.toml in the current folder is" in str(done.json["warnings"])
        assert "config" not in done.json["settings"]


def write_latents() -> str:
    np.save("latents.npy", np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32))
    return "latents.npy"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('dta = ["x"]', "no key dta; is it data?"),
        ('zzz = 1', "no key zzz; it may have accumulate, "),
        ('output = "x"', "no key output"),
        ("force = true", "no key force"),
        ("skip-bad = 1", "skip-bad = 1 is not what --skip-bad takes"),
        ("limit = true", "limit = True is not what --limit takes"),
        ("[data]\npath = 'x'", "data = {'path': 'x'} is not what --data takes"),
    ],
)  # fmt: skip
def test_what_is_no_option_is_named(content: str, says: str, folder: Path, codebook: Run) -> None:
    (folder / "codebook.toml").write_text(content)
    assert_refused(codebook("measure", "model.safetensors"), says)


def test_latents_stand_in_place_of_the_files_data(folder: Path, codebook: Run) -> None:
    write(folder)
    words = ("--latents", write_latents(), "--codebook-key", "stages.0.weight", "--json")
    done = codebook("measure", "model.safetensors", *words)
    assert done.exit_code == 0 and "data" not in done.json["settings"]["config"], done.stderr


def test_init_tries_a_batch_and_writes_what_the_next_command_needs(folder: Path, codebook: Run) -> None:
    words = ("--data", "calibration.npy", "--network", "network.py:make", "--batch-size", 20)
    made = codebook("init", "model.safetensors", *words, "--json")
    assert made.exit_code == 0 and made.json["outputs"]["config"] == "codebook.toml", made.stderr
    written = tomllib.loads(Path("codebook.toml").read_text())
    assert written.pop("input-range") == made.json["settings"]["input_range"]
    assert written == {
        "data": ["calibration.npy"],
        "network": "network.py:make",
        "batch-size": 20,
        "metric": "euclidean",
    }
    again = codebook("measure", "model.safetensors", "--json")
    assert not any("nothing says how" in text for text in again.json["warnings"])
    measured = again.json["settings"]
    assert measured["network"] == "network.py:make" and measured["config"]["batch-size"] == "20"
    assert_refused(codebook("init", "model.safetensors", *words), "codebook.toml exists; use --force")
    again = codebook("init", "model.safetensors", "--data", "held_out.npy", "--force", "--json")
    assert again.exit_code == 0, again.stderr
    assert tomllib.loads(Path("codebook.toml").read_text())["network"] == "network.py:make"
    assert_refused(codebook("init"), "init wants a MODEL")


def test_names_with_any_character_come_back() -> None:
    options = {"data": ['a "b"\\c\n\x7f', "naïve/画像"], "steps": 3, "lr": 1e-5, "skip-bad": True}
    assert tomllib.loads(as_toml(options)) == options
    assert {"data", "network", "test-data", "compile", "lr", "codebook-update"} <= keys().keys()


def test_a_sweep_runs_the_engine_that_is_asked_for_and_names_it(folder: Path, codebook: Run) -> None:
    write(folder)
    done = codebook("sweep", "model.safetensors", "--k", "4,8", "--engine", "sklearn", "-o", "swept", "--json")
    assert done.exit_code == 0 and done.json["settings"]["engine"] == "sklearn", done.stderr
    default = codebook("sweep", "model.safetensors", "--k", "4,8", "-o", "native", "--json")
    assert default.json["settings"]["engine"] == "native"
    figures = [[point["stages"]["surgery"]["mse"] for point in run.json["points"]] for run in (done, default)]
    assert figures[0] != figures[1]
