"""The command line: what scripts rely on. JSON, exit codes, files, and one line for whatever a user can mend."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEAD, GREY, Grey, Outcome, State
from PIL import Image
from safetensors.torch import load_file, save_file

from codebook_tools import operate, stages, strategies
from codebook_tools.checkpoints.reading import Checkpoint
from codebook_tools.models.zalando import CODEBOOK
from codebook_tools.opening import DEMO

Run = Callable[..., Outcome]
WriteModel = Callable[..., Path]
RANGE = ("--input-range", "-1,1")
RESULT = {
    "command", "version", "model", "family", "settings", "seed", "warnings", "stages", "kept", "trace", "outputs",
    "bytes", "seconds",
}  # fmt: skip
MEASUREMENT = {"split", "images", "mse", "psnr", "ssim", "codebooks"}
USE = {
    "key", "size", "dim", "latents", "used", "usage", "used_10", "perplexity", "bits", "top_share", "distortion",
    "coverage",
}  # fmt: skip
POINT = {"step", "loss", "validation_mse", "used", "perplexity", "distortion", "revived"}
COMMANDS = [
    "inspect", "measure", "refit", "prune", "quantize", "restart", "grow", "finetune", "compare", "verify",
]  # fmt: skip
SECONDS = {"load", "encode", "strategy", "finetune", "measure", "write", "total"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, so that two looks tell whether anything was written."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def assert_promised(result: dict[str, Any], stages: set[str]) -> None:
    """The JSON of a command has every promised key and no other; `stages` are those that are not null."""
    assert result.keys() == RESULT
    assert result["stages"].keys() == {"before", "surgery", "finetuned"}
    assert {name for name, stage in result["stages"].items() if stage is not None} == stages
    for name in stages:
        stage = result["stages"][name]
        assert stage.keys() == MEASUREMENT and stage["split"] == "test"
        assert all(use.keys() == USE and 0 <= use["coverage"] <= 1 for use in stage["codebooks"])
    assert all(point.keys() == POINT for point in result["trace"])
    assert result["outputs"].keys() == {"model", "index_map", "report"}
    assert result["bytes"].keys() == {"before", "after"}
    assert result["seconds"].keys() == SECONDS
    assert isinstance(result["warnings"], list) and isinstance(result["settings"], dict)


# --- one JSON object on stdout, nothing else there -----------------------------------------------------------------


def test_measure_fills_before_alone_and_writes_nothing(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    before = contents(tmp_path)
    found = codebook("measure", tiny, "--data", images_folder, *RANGE, "--json")
    assert (found.exit_code, found.stderr) == (0, "")
    assert_promised(found.json, {"before"})
    assert found.json["kept"] is None and found.json["trace"] == []
    assert found.json["outputs"] == {"model": None, "index_map": None, "report": None}
    assert found.json["bytes"] == {"before": tiny.stat().st_size, "after": None}
    assert (found.json["command"], found.json["family"], found.json["seed"]) == ("measure", "zalando", 0)
    assert found.json["model"] == str(tiny)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "stages", "kept", "name"),
    [
        (["prune"], {"before", "surgery"}, "surgery", "tiny.prune-k10"),
        (["prune", "--threshold", "0"], {"before", "surgery"}, "surgery", "tiny.prune-k10"),
        (["prune", "--keep", "3"], {"before", "surgery"}, "surgery", "tiny.prune-k3"),
        (["refit", "--k", "6", "--steps", "0"], {"before", "surgery"}, "surgery", "tiny.refit-k6"),
        (["refit", "--k", "6", "--steps", "12"], {"before", "surgery", "finetuned"}, "finetuned", "tiny.refit-k6"),
        (["refit", "--k=6", "--steps=3", "--lr=30"], {"before", "surgery", "finetuned"}, "surgery", "tiny.refit-k6"),
        (["finetune", "--steps", "12"], {"before", "finetuned"}, "finetuned", "tiny.finetune-k16"),
        (["finetune", "--steps", "3", "--lr", "30"], {"before", "finetuned"}, "before", "tiny.finetune-k16"),
        (["finetune", "--steps", "0"], {"before"}, "before", "tiny.finetune-k16"),
    ],
)  # fmt: skip
def test_an_operation_gives_the_promised_json_and_writes_beside_the_model(
    arguments: list[str],
    stages: set[str],
    kept: str,
    name: str,
    tiny: Path,
    codebook: Run,
    images_folder: Path,
    tmp_path: Path,
) -> None:
    command, *options = arguments
    found = codebook(command, tiny, *options, "--data", images_folder, *RANGE, "--batch-size", 16, "--json")
    assert found.exit_code == 0
    assert_promised(found.json, stages)
    assert (found.json["command"], found.json["kept"]) == (command, kept)
    model, index_map = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.index_map.safetensors"
    assert found.json["outputs"] == {"model": str(model), "index_map": str(index_map), "report": None}
    assert set(contents(tmp_path)) == {tiny.name, model.name, index_map.name}
    assert found.json["bytes"] == {"before": tiny.stat().st_size, "after": model.stat().st_size}
    size = found.json["stages"]["surgery" if "surgery" in stages else "before"]["codebooks"][0]["size"]
    assert load_file(model)[CODEBOOK].shape == (size, 4)
    steps = [point["step"] for point in found.json["trace"]]
    assert steps == ([] if "finetuned" not in stages else [0, *range(1, max(steps) + 1)])
    assert all((point["loss"] is None) == (point["step"] == 0) for point in found.json["trace"])
    worse = kept != "finetuned" and "finetuned" in stages
    assert any("fine-tuning did not lower the validation error" in text for text in found.json["warnings"]) == worse
    verified = codebook("verify", model, "--against", tiny, "--json")
    assert (verified.exit_code, verified.json) == (0, {"ok": True, "differences": []})


def test_settings_say_what_was_asked_and_found_out(
    tiny: Path, codebook: Run, images_folder: Path, held_out_folder: Path
) -> None:
    found = codebook(
        "refit", tiny, "--k", 5, "--init", "used", "--iterations", 7, "--steps", 2, "--train", "decoder",
        "--codebook-update", "gradient", "--loss", "l1", "--lr", "0.002", "--batch-size", 9, "--seed", 3,
        "--data", images_folder, "--test-data", held_out_folder, *RANGE, "--json",
    ).json  # fmt: skip
    assert found["seed"] == 3
    assert found["settings"] == {
        "k": 5, "init": "used", "iterations": 7, "seed": 3, "steps": 2, "train": "decoder",
        "codebook_update": "gradient", "loss": "l1", "lr": 0.002, "batch_size": 9, "data": [str(images_folder)],
        "test_data": [str(held_out_folder)], "images": {"train": 54, "validation": 6, "test": 12},
        "input_range": [-1.0, 1.0], "device": "cpu",
        "precision": "fp32", "limit": None, "size": None, "skip_bad": False, "network": None,
    }  # fmt: skip


def test_warnings_are_in_the_json_and_on_stderr_unless_quiet(
    write_model: WriteModel, codebook: Run, images_folder: Path
) -> None:
    asked = ("measure", write_model("extra"), "--data", images_folder, *RANGE, "--json")
    found = codebook(*asked)
    (warning,) = found.json["warnings"]
    assert "2 tensors unknown to the network" in warning and found.stderr.strip() == f"warning: {warning}"
    quiet = codebook(*asked, "--quiet")
    assert quiet.stderr == "" and quiet.json["warnings"] == [warning]


def test_inspect_gives_the_promised_json_without_opening_a_tensor(
    write_model: WriteModel, codebook: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model("ema")
    for name in ("tensor", "tensors", "chunks"):
        monkeypatch.setattr(Checkpoint, name, None)
    found = codebook("inspect", model, "--json")
    assert found.exit_code == 0
    assert found.json == {
        "family": "zalando",
        "reason": None,
        "codebooks": [
            {
                "key": CODEBOOK, "size": 16, "dim": 4, "axis": 0, "heads": 1, "dtype": "F32", "search": "euclidean",
                "companions": ["_vq_vae._ema_cluster_size", "_vq_vae._ema_w"], "confidence": "high",
            }
        ],
        "elsewhere": [],
    }  # fmt: skip


def test_inspect_lists_what_depends_on_k_elsewhere_and_says_why_there_is_no_codebook(
    write_model: WriteModel, codebook: Run, variants: dict[str, State]
) -> None:
    prior = variants["plain"] | {"prior.head.weight": torch.ones(17, 5)}
    found = codebook("inspect", write_model(state=prior), "--json").json
    assert found["elsewhere"] == [{"key": "prior.head.weight", "shape": [17, 5]}]
    kl = {"encoder.conv.weight": torch.ones(4, 3, 3, 3), "decoder.conv.weight": torch.ones(3, 4, 3, 3)}
    found = codebook("inspect", write_model(state=kl), "--json")
    assert found.exit_code == 0 and found.json["family"] is None and found.json["codebooks"] == []
    assert "no quantiser between them" in found.json["reason"]
    assert "no codebook: " in codebook("inspect", write_model(state=kl)).stdout


def test_verify_gives_the_promised_json_and_exit_code_3(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.safetensors"
    codebook("prune", tiny, "--data", images_folder, "-o", output)
    content = bytearray(output.read_bytes())
    content[-1] ^= 1
    output.write_bytes(content)
    found = codebook("verify", output, "--against", tiny, "--json")
    assert found.exit_code == 3
    assert found.json.keys() == {"ok", "differences"} and found.json["ok"] is False
    assert all(difference.keys() == {"key", "what"} for difference in found.json["differences"])
    table = codebook("verify", output, "--against", tiny)
    assert table.exit_code == 3 and "__metadata__" in table.stdout and "damaged" in table.stdout


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    before = contents(tmp_path)
    asked = ("refit", tiny, "--k", 6, "--data", images_folder, *RANGE, "--dry-run")
    found = codebook(*asked, "--json")
    assert found.exit_code == 0 and found.json["dry_run"] is True
    assert found.json["outputs"]["model"] == str(tmp_path / "tiny.refit-k6.safetensors")
    assert found.json["size"] == {"before": 16, "after": 6}
    assert found.json["bytes"]["after"] < found.json["bytes"]["before"] == tiny.stat().st_size
    assert found.json["seconds"]["estimate"] > 0
    table = codebook(*asked).stdout
    assert "16 -> 6" in table and "tiny.refit-k6.safetensors" in table and "Nothing was written." in table
    for command in (["prune"], ["finetune"]):
        assert codebook(*command, tiny, "--data", images_folder, *RANGE, "--dry-run").exit_code == 0
    assert contents(tmp_path) == before


# --- tables for people ---------------------------------------------------------------------------------------------


def test_a_result_is_shown_as_a_table_with_its_figures(tiny: Path, codebook: Run, images_folder: Path) -> None:
    asked = ("refit", tiny, "--k", 6, "--steps", 3, "--batch-size", 16, "--data", images_folder, *RANGE, "--force")
    figures = codebook(*asked, "--json").json
    shown = codebook(*asked).stdout
    assert max(map(len, shown.splitlines())) < 400  # a pipe has no width: nothing is cut, nor padded
    for stage in figures["stages"].values():
        use = stage["codebooks"][0]
        assert f"{use['used']} of {use['size']} ({use['usage']:.1%})" in shown
        assert f"{stage['mse']:.6f}" in shown and f"{use['perplexity']:.2f}" in shown
    assert "after fine-tuning *" in shown and f"written to {figures['outputs']['model']}" in shown
    assert "validation mse" not in shown
    verbose = codebook(*asked, "--verbose").stdout
    assert "validation mse" in verbose and "codebook_update" in verbose and "encode" in verbose


def test_inspect_shows_codebooks_and_companions_as_a_table(write_model: WriteModel, codebook: Run) -> None:
    shown = codebook("inspect", write_model("ema")).stdout
    assert "family: zalando" in shown and "euclidean" in shown
    assert "follows _vq_vae._embedding.weight: _vq_vae._ema_cluster_size, _vq_vae._ema_w" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example(command: str, codebook: Run) -> None:
    found = codebook(command, "--help")
    assert found.exit_code == 0 and f"codebook {command} model" in found.stdout and found.stderr == ""


def test_the_version_is_the_installed_one(codebook: Run, tiny: Path, images_folder: Path) -> None:
    version = codebook("--version").stdout.strip()
    assert version == codebook("measure", tiny, "--data", images_folder, *RANGE, "--json").json["version"]
    assert [part.isdigit() for part in version.split(".")[:2]] == [True, True]


# --- the bundled demo ----------------------------------------------------------------------------------------------


def test_the_demo_is_pruned_without_a_model_into_the_current_folder(
    codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = codebook("prune", "--threshold", 0, "--limit", 100, "--json")
    assert found.exit_code == 0 and found.stderr == ""  # nothing to warn of: the sample is the demo's own
    size = found.json["stages"]["surgery"]["codebooks"][0]["size"]
    assert size < 512 and found.json["settings"]["input_range"] == [-1.0, 1.0]
    assert set(contents(tmp_path)) == {f"demo.prune-k{size}.safetensors", f"demo.prune-k{size}.index_map.safetensors"}
    assert codebook("verify", f"demo.prune-k{size}.safetensors").exit_code == 0
    assert codebook("inspect", "--json").json["codebooks"][0]["size"] == 512
    assert DEMO.stat().st_size <= 2_000_000


def test_the_sample_stands_in_for_missing_images_with_a_warning(tiny: Path, codebook: Run) -> None:
    found = codebook("measure", tiny, "--limit", 60, *RANGE, "--json")
    assert found.exit_code == 0 and found.json["settings"]["data"] == ["sample"]
    assert any("no --data" in warning for warning in found.json["warnings"])


# --- data ----------------------------------------------------------------------------------------------------------


def test_folder_tar_and_braces_give_the_same_figures(
    tiny: Path, codebook: Run, images_folder: Path, images_tar: Path
) -> None:
    shards = f"{images_tar.parent}/images{{0..1}}.tar"
    for i in range(2):
        os.link(images_tar, images_tar.with_name(f"images{i}.tar"))
    stages = [
        codebook("measure", tiny, "--data", data, *RANGE, "--json").json["stages"]
        for data in (images_folder, images_tar)
    ]
    assert stages[0] == stages[1]
    twice = codebook("measure", tiny, "--data", shards, *RANGE, "--json").json["settings"]["images"]
    assert sum(twice.values()) == 120


def test_test_data_are_measured_whole_and_a_limit_holds_for_each_side(
    tiny: Path, codebook: Run, images_folder: Path, held_out_folder: Path
) -> None:
    data = ("--data", images_folder, "--test-data", held_out_folder)
    found = codebook("measure", tiny, *data, *RANGE, "--json").json
    assert found["stages"]["before"]["images"] == 12 and sum(found["settings"]["images"].values()) == 72
    found = codebook("measure", tiny, *data, *RANGE, "--limit", 9, "--json").json
    assert found["stages"]["before"]["images"] == 9 and sum(found["settings"]["images"].values()) == 18
    found = codebook("measure", tiny, "--test-data", held_out_folder, *RANGE, "--json").json
    assert found["settings"]["images"] == {"train": 0, "validation": 0, "test": 12}
    assert found["settings"]["data"] == []


def test_images_of_unlike_sizes_need_a_size(tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unlike"
    folder.mkdir()
    for i, file in enumerate(sorted(images_folder.rglob("*.png"))):
        Image.open(file).resize((16 + 4 * (i % 2), 16)).save(folder / file.name)
    found = codebook("measure", tiny, "--data", folder, *RANGE)
    assert found.exit_code == 1 and found.stdout == "" and found.stderr.count("\n") == 1
    assert "20x16" in found.stderr and "16x16" in found.stderr and "--size" in found.stderr
    found = codebook("measure", tiny, "--data", folder, *RANGE, "--size", 14, "--json")
    assert found.exit_code == 0
    stage = found.json["stages"]["before"]
    assert stage["codebooks"][0]["latents"] == 3 * 3 * stage["images"]  # 14 is cut to 12, a multiple of the stride


def test_unreadable_images_are_named_or_skipped_and_counted(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in images_folder.rglob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "000.png").write_bytes(b"no picture")
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:60])
    asked = ("refit", tiny, "--k", 4, "--steps", 2, "--batch-size", 8, "--data", folder, *RANGE)
    found = codebook(*asked)
    assert found.exit_code == 1 and found.stderr.count("\n") == 1
    assert "cannot read image 000.png" in found.stderr and "--skip-bad" in found.stderr
    found = codebook(*asked, "--skip-bad", "--json")
    assert found.exit_code == 0
    (warning,) = found.json["warnings"]
    assert re.fullmatch(r"2 unreadable images were skipped: 000\.png \(no PNG.*\); 001\.png \(damaged.*\)", warning)


@pytest.mark.parametrize("init", ["kmeans++", "afkmc2", "used", "random"])
def test_every_seeding_gives_a_codebook(init: str, tiny: Path, codebook: Run, images_folder: Path) -> None:
    asked = ("refit", tiny, "--k", 6, "--steps", 0, "--init", init, "--data", images_folder, *RANGE, "--json")
    use = codebook(*asked).json["stages"]["surgery"]["codebooks"][0]
    assert use["size"] == 6 and use["used"] >= 5


def test_running_options_are_taken_and_told(tiny: Path, codebook: Run, images_folder: Path) -> None:
    asked = ("refit", tiny, "--k", 6, "--steps", 2, "--batch-size", 16, "--data", images_folder, *RANGE, "--json")
    try:
        found = codebook(*asked, "--precision", "bf16", "--device", "auto", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.exit_code == 0 and found.json["settings"]["precision"] == "bf16"
    exact = codebook(*asked, "--force").json["stages"]["before"]
    assert found.json["stages"]["before"]["mse"] == pytest.approx(exact["mse"], rel=0.05)
    assert found.json["stages"]["before"]["mse"] != exact["mse"]


def test_a_network_of_the_users_own_is_measured_and_operated_on(
    grey: Callable[..., Grey], codebook: Run, tmp_path: Path
) -> None:
    made = grey([i / 15 for i in range(16)] + [9.0])
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (80, 4, 4), dtype=np.uint8))
    asked = (made.path, "--network", made.network, "--data", tmp_path / "images.npy", "--json")
    found = codebook("measure", *asked).json
    assert found["family"] == "custom" and found["settings"]["input_range"] == [0.0, 1.0]
    assert found["stages"]["before"]["mse"] == pytest.approx((1 / 15) ** 2 / 12, rel=0.1)
    found = codebook("prune", *asked).json
    assert found["stages"]["surgery"]["codebooks"][0]["size"] == 16
    assert codebook("verify", found["outputs"]["model"], "--against", made.path).exit_code == 0


@pytest.mark.parametrize("given", ["-1,1", "-1.0, 1.0", "-0.5,0.5", "0,255"])
def test_an_input_range_is_two_numbers_of_any_sign(given: str, tiny: Path, codebook: Run, images_folder: Path) -> None:
    found = codebook("measure", tiny, "--data", images_folder, "--input-range", given, "--json")
    assert found.exit_code == 0
    assert found.json["settings"]["input_range"] == [float(number) for number in given.split(",")]


def test_an_input_range_that_is_hardly_better_than_another_is_told(
    grey: Callable[..., Grey], codebook: Run, tmp_path: Path
) -> None:
    made = grey([-1.0, -0.5, 0.0, 0.5, 1.0])
    black_and_white = np.random.default_rng(0).integers(0, 2, (40, 4, 4), dtype=np.uint8) * 255
    np.save(tmp_path / "images.npy", black_and_white)
    found = codebook("measure", made.path, "--network", made.network, "--data", tmp_path / "images.npy", "--json").json
    (warning,) = found["warnings"]
    assert "input range [-1, 1] was chosen" in warning and "[0, 1] is close" in warning and "--input-range" in warning


def test_the_input_range_is_the_calibration_images_choice(
    grey: Callable[..., Grey], codebook: Run, tmp_path: Path
) -> None:
    made = grey([0.0, 0.2, 1.0])
    for name, levels in (("data", (0, 255)), ("test", (153, 255))):  # 0.6 is 0.2 in the range [-1, 1]
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).choice(np.array(levels, np.uint8), (40, 4, 4)))
    ranges = {}
    for chosen in (["data", "test"], ["test", "data"]):
        data, test = (tmp_path / f"{name}.npy" for name in chosen)
        asked = ("measure", made.path, "--network", made.network, "--data", data, "--test-data", test, "--json")
        ranges[chosen[0]] = codebook(*asked).json["settings"]["input_range"]
    assert ranges == {"data": [0.0, 1.0], "test": [-1.0, 1.0]}


def test_an_operation_on_test_data_alone_is_calibrated_on_the_sample(
    tiny: Path, codebook: Run, held_out_folder: Path
) -> None:
    given = ("--k", 6, "--steps", 0, "--test-data", held_out_folder, "--limit", 60)
    found = codebook("refit", tiny, *given, *RANGE, "--json")
    assert found.exit_code == 0
    assert found.json["settings"]["images"]["test"] == 12
    assert found.json["settings"]["images"]["train"] + found.json["settings"]["images"]["validation"] == 60
    assert any("no --data" in warning for warning in found.json["warnings"])


# --- files ---------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_without_force(tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path) -> None:
    asked = ("prune", tiny, "--data", images_folder, *RANGE)
    assert codebook(*asked).exit_code == 0
    before = contents(tmp_path)
    again = codebook(*asked)
    assert again.exit_code == 1 and "exists; --force replaces it" in again.stderr and contents(tmp_path) == before
    (tmp_path / "tiny.prune-k10.safetensors").write_bytes(b"something else")
    assert codebook(*asked, "--force").exit_code == 0
    assert contents(tmp_path) == before


def test_the_output_goes_where_it_is_told(tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    output = tmp_path / "models" / "small.safetensors"
    found = codebook("prune", tiny, "--data", images_folder, *RANGE, "-o", output, "--json")
    assert found.json["outputs"]["model"] == str(output)
    assert {file.name for file in output.parent.iterdir()} == {"small.safetensors", "small.index_map.safetensors"}
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["tiny.safetensors"]


def test_the_same_command_gives_the_same_bytes(tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path) -> None:
    written = []
    for _ in range(2):
        asked = ("refit", tiny, "--k", 6, "--steps", 5, "--batch-size", 8, "--data", images_folder, *RANGE, "--force")
        assert codebook(*asked).exit_code == 0
        written.append(contents(tmp_path))
    assert written[0] == written[1] and len(written[0]) == 3


# --- exit code 1: what a user can mend, in one line, with nothing written ------------------------------------------


def assert_refused(found: Outcome, message: str) -> None:
    assert found.exit_code == 1, found
    assert found.stdout == ""
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1 and found.stderr.endswith("\n")
    assert message in found.stderr


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such file": (lambda path: None, "no such file: "),
    "a directory": (lambda path: path.mkdir(), "is a directory"),
    "empty": (lambda path: path.touch(), "it is empty"),
    "a pickle": (lambda path: torch.save({"w": torch.ones(3)}, path), "it is a PyTorch pickle"),
    "a web page": (lambda path: path.write_text("<html>\n<body>404\nNot found</body>"), "HTML"),
    "truncated": (lambda path: path.write_bytes(DEMO.read_bytes()[:-1000]), "truncated"),
    "cut in its header": (lambda path: path.write_bytes(DEMO.read_bytes()[:1000]), "truncated"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
@pytest.mark.parametrize("command", ["inspect", "measure", "prune", "verify"])
def test_a_file_that_is_no_checkpoint_is_refused(
    kind: str, command: str, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    make, message = BAD_MODELS[kind]
    path = tmp_path / "model.safetensors"
    make(path)
    before = contents(tmp_path)
    data = ("--data", images_folder) if command in ("measure", "prune") else ()
    assert_refused(codebook(command, path, *data), message)
    assert contents(tmp_path) == before


def state_of(variants: dict[str, State], **changes: torch.Tensor | None) -> State:
    state = dict(variants["plain"]) | changes
    return {key: tensor for key, tensor in state.items() if tensor is not None}


BAD_STATES: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "no codebook": ({CODEBOOK: None}, "has no codebook: "),
    "two codebooks": (
        {"quantize_b.embedding.weight": torch.ones(16, 4)},
        "2 codebooks: _vq_vae._embedding.weight, quantize_b.embedding.weight; choose with --codebook-key",
    ),
    "NaN": ({"_decoder._conv_1.bias": torch.full((8,), torch.nan)}, "_decoder._conv_1.bias in "),
    "a layer missing": ({"_decoder._conv_1.weight": None}, "no network is known for the layout"),
    "a shape that does not fit": ({"_decoder._conv_1.bias": torch.ones(9)}, "shapes differ: _decoder._conv_1.bias"),
}


@pytest.mark.parametrize("kind", BAD_STATES)
def test_a_checkpoint_that_cannot_be_worked_on_is_refused(
    kind: str, codebook: Run, write_model: WriteModel, variants: dict[str, State], images_folder: Path, tmp_path: Path
) -> None:
    changes, message = BAD_STATES[kind]
    model = write_model(state=state_of(variants, **changes))
    before = contents(tmp_path)
    assert_refused(codebook("prune", model, "--data", images_folder), message)
    assert contents(tmp_path) == before
    assert codebook("inspect", model).exit_code == 0  # it always lists


def test_a_low_confidence_codebook_is_operated_on_only_when_it_is_named(codebook: Run, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(GREY.replace("self.quantizer.codebook", "self.emb").replace(
        "self.quantizer = nn.Module()", "pass"))  # fmt: skip
    state = {
        "encoder.weight": torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1),
        "decoder.weight": torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1),
        "emb.weight": torch.stack([torch.linspace(0, 1, 16), torch.zeros(16)], 1),
    }
    save_file(state, tmp_path / "low.safetensors")
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8))
    assert codebook("inspect", tmp_path / "low.safetensors", "--json").json["codebooks"][0]["confidence"] == "low"
    asked = ("prune", tmp_path / "low.safetensors", "--network", f"{tmp_path}/own.py:make",
             "--data", tmp_path / "images.npy")  # fmt: skip
    assert_refused(codebook(*asked), "emb.weight is only perhaps a codebook; if it is, say so with --codebook-key")
    assert codebook(*asked, "--codebook-key", "emb.weight").exit_code == 0


BAD_OPTIONS: dict[str, tuple[list[object], str]] = {
    "k over the distinct latents": (["refit", "--k", 5000], "k=5000 asks for more codes than the 912 distinct latents"),
    "k of none": (["refit", "--k", 0], "k=0 is below 1; use --k 1 or more"),
    "negative k": (["refit", "--k", -3], "k=-3 is below 1"),
    "no iterations": (["refit", "--k", 4, "--iterations", 0], "iterations=0 is below 1"),
    "a threshold that removes all": (["prune", "--threshold", 10_000], "threshold=10000 removes every code"),
    "a negative threshold": (["prune", "--threshold", -1], "threshold=-1 is below 0"),
    "more kept than there are": (["prune", "--keep", 17], "keep=17 of 16 codes; use --keep 16 or less"),
    "none kept": (["prune", "--keep", 0], "keep=0 is below 1"),
    "negative steps": (["finetune", "--steps", -1], "steps=-1 is below 0"),
    "no learning rate": (["finetune", "--lr", 0], "lr=0.0 is no learning rate"),
    "nothing to train": (["finetune", "--train", "none", "--codebook-update", "frozen"], "nothing to train"),
    "a run that diverges": (["finetune", "--lr", 1e30, "--steps", 5, "--batch-size", 8], "try a lower --lr"),
    "no batch": (["measure", "--batch-size", 0], "batch-size=0 is below 1"),
    "no images": (["measure", "--limit", 0], "limit=0 is below 1"),
    "no size": (["measure", "--size", -4], "size=-4 is below 1"),
    "smaller than the stride": (["measure", "--size", 3], "smaller than the model's stride of 4"),
    "a negative seed": (["refit", "--k", 4, "--seed", -1], "seed=-1 is not within 0 and"),
    "a huge seed": (["measure", "--seed", 2**70], "is not within 0 and"),
    "no range": (["measure", "--input-range", "wide"], "--input-range wide: expected two numbers, such as 0,1"),
    "half a range": (["measure", "--input-range", "1"], "expected two numbers"),
    "a range upside down": (["measure", "--input-range", "1,-1"], "the first number must be the smaller one"),
    "a range of nan": (["measure", "--input-range", "nan,1"], "the first number must be the smaller one"),
    "too few images": (["measure", "--limit", 1], "split of 1 images is empty"),
    "another family": (["measure", "--family", "vqgan"], "no family 'vqgan'; there are zalando"),
    "no such key": (["measure", "--codebook-key", "none.such"], "no such tensor in "),
    "a key of no codebook": (["measure", "--codebook-key", "_encoder._conv_1.bias"], "is no matrix of codes"),
    "no network file": (["measure", "--network", "gone.py:make"], "no such network file: gone.py"),
    "no function": (["measure", "--network", "gone.py"], "expected FILE.py:FUNCTION"),
    "neither k nor bits": (["quantize"], "either --k, to merge codes, or --bits"),
    "k and bits": (["quantize", "--k", 4, "--bits", 4], "either --k, to merge codes, or --bits"),
    "too few bits": (["quantize", "--bits", 1], "bits=1 is not within 2 and 8"),
    "too many bits": (["quantize", "--bits", 9], "bits=9 is not within 2 and 8"),
    "merging into none": (["quantize", "--k", 0], "k=0 is below 1"),
    "merging into more": (["quantize", "--k", 17, "--method", "pnn"], "k=17 of 16 codes; use --k 16 or less"),
    "restart of all": (["restart", "--threshold", 10_000], "threshold=10000 moves every code"),
    "a negative restart": (["restart", "--threshold", -1], "threshold=-1 is below 0"),
    "growing into less": (["grow", "--k", 4], "k=4 is less than the 10 codes in use; use --k 10 or more, or refit"),
    "growing beyond the latents": (["grow", "--k", 5000], "k=5000 asks for more codes than"),
    "dot products": (["refit", "--k", 4, "--metric", "dot"], "no k-means for dot lookup"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_a_value_that_cannot_be_is_refused_with_its_limit(
    kind: str, tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    (command, *options), message = BAD_OPTIONS[kind]
    before = contents(tmp_path)
    assert_refused(codebook(command, tiny, "--data", images_folder, *RANGE, *options, "--json"), message)
    assert contents(tmp_path) == before


def test_cuda_is_refused_where_there_is_none(
    tiny: Path, codebook: Run, images_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(codebook("measure", tiny, "--data", images_folder, "--device", "cuda"), "use --device cpu or auto")


@pytest.mark.parametrize("kind", ["missing", "empty", "no images", "a text", "a compressed tar", "shared"])
def test_data_that_cannot_be_used_are_refused(
    kind: str, tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    data, more, message = tmp_path / "data", [], "no images in "
    if kind == "missing":
        message = f"no such file or folder: {data}"
    elif kind == "empty":
        data.mkdir()
    elif kind == "no images":
        data.mkdir()
        (data / "notes.txt").write_text("none here")
    elif kind == "a text":
        data = tmp_path / "data.txt"
        data.touch()
        message = "is no image source"
    elif kind == "a compressed tar":
        data = tmp_path / "data.tar"
        data.write_bytes(b"\x1f\x8b\x08\x00" * 200)
        message = "is not a readable, uncompressed tar"
    else:
        data, more, message = images_folder, ["--test-data", images_folder / "a"], "is also in --data"
    before = contents(tmp_path)
    assert_refused(codebook("prune", tiny, "--data", data, *more, *RANGE), message)
    assert contents(tmp_path) == before


LATENTS, SHOWN = "self.encoder(images)", "self.decoder(quantised)"
NETWORKS = {
    "names that do not fit": (GREY.replace("self.encoder", "self.enc"), "the network wants enc.weight, which "),
    "no function": ("def build(codebook_size): ...", "has no make"),
    "no halves": ("import torch\ndef make(codebook_size): return torch.nn.Linear(1, 1)", "without encode and decode"),
    "wrong latents": (GREY.replace(LATENTS, "images"), "encode returns (1, 3, 4, 4); expected (n, 2, ...)"),
    "NaN latents": (GREY.replace(LATENTS, f"{LATENTS} * float('nan')"), "latents are not finite"),
    "wrong images": (GREY.replace(SHOWN, f"{SHOWN}[..., 1:]"), "decode returns (1, 4, 3)"),
    "an encoder that raises": (GREY.replace(LATENTS, "1 / 0"), "ZeroDivisionError: division by zero"),
    "a decoder that raises": (GREY.replace(SHOWN, "1 / 0"), "the network's decode fails on "),
    "a message of many lines": ("raise ValueError('one\\ntwo\\n\\nthree')", "ValueError: one two three"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_that_does_not_do_is_refused_with_the_reason(
    kind: str, grey: Callable[..., Grey], codebook: Run, tmp_path: Path
) -> None:
    source, message = NETWORKS[kind]
    made = grey([0.0, 0.5, 1.0])
    (tmp_path / "own.py").write_text(source)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8))
    before = contents(tmp_path)
    network = f"{tmp_path / 'own.py'}:make"
    assert_refused(codebook("prune", made.path, "--network", network, "--data", tmp_path / "images.npy"), message)
    assert {name: data for name, data in contents(tmp_path).items() if "__pycache__" not in name} == before


@pytest.mark.parametrize("kind", ["no folder", "a folder", "not writable", "too long"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    kind: str, tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, message = {
        "no folder": (tmp_path / "gone" / "out.safetensors", "no such folder: "),
        "a folder": (images_folder, "is a directory; name a file with --output"),
        "not writable": (tmp_path / "out.safetensors", f"cannot write in {tmp_path}"),
        "too long": (tmp_path / f"{'x' * 300}.safetensors", f"cannot write in {tmp_path}"),
    }[kind]
    if kind == "not writable":

        def touch(path: Path, *_: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(Path, "touch", touch)  # permissions do not stop the superuser, whom CI may run as
    before = contents(tmp_path)
    # The data are missing too: the output is looked at first.
    assert_refused(codebook("prune", tiny, "--data", "nowhere", "-o", output), message)
    assert contents(tmp_path) == before


# --- the other exit codes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["refit"],
        ["refit", "--k", "many"],
        ["refit", "--k", "4", "--init", "lucky"],
        ["prune", "--no-such-option"],
        ["measure", "one.safetensors", "two.safetensors"],
        ["finetune", "--train", "encoder"],
        ["verify"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = codebook(*arguments)
    assert found.exit_code == 2 and found.stdout == "" and "Usage:" in found.stderr
    assert contents(tmp_path) == {}


def test_a_file_that_is_not_what_was_meant_is_exit_code_3_and_leaves_nothing(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        os.lseek(handle, -1, os.SEEK_END)
        os.write(handle, b"\x7f")

    monkeypatch.setattr(os, "fsync", fsync)  # a disk that damages the last byte
    found = codebook("prune", tiny, "--data", images_folder, *RANGE)
    assert found.exit_code == 3 and "is not what was written" in found.stderr
    assert set(contents(tmp_path)) == {"tiny.safetensors"}


def test_our_own_fault_is_exit_code_70_with_the_traceback_to_report(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(operate, "write_checkpoint", faulty)
    found = codebook("prune", tiny, "--data", images_folder, *RANGE, "--json")
    assert found.exit_code == 70 and found.stdout == ""
    assert "Traceback" in found.stderr and "a fault of ours" in found.stderr and "please report it" in found.stderr
    assert set(contents(tmp_path)) == {"tiny.safetensors"}


@pytest.mark.parametrize(
    ("room", "where"),
    [(stages, "finetune"), (operate, "write_checkpoint"), (stages, "measure"), (operate, "_read_back")],
)
def test_an_interruption_is_exit_code_130_wherever_it_comes(
    room: ModuleType,
    where: str,
    tiny: Path,
    codebook: Run,
    images_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room, where, interrupted)
    found = codebook("finetune", tiny, "--steps", 1, "--data", images_folder, *RANGE)
    assert found.exit_code == 130 and found.stdout == "" and found.stderr.count("\n") == 1
    whole = {"tiny.finetune-k16.safetensors", "tiny.finetune-k16.index_map.safetensors"}
    assert set(contents(tmp_path)) - {"tiny.safetensors"} == (whole if where == "_read_back" else set())


def start(*arguments: object, **more: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "codebook_tools", *map(str, arguments)], **more)


def test_a_signal_during_fine_tuning_ends_with_130_and_leaves_nothing(
    tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    pty = pytest.importorskip("pty")  # a terminal on stderr, so that progress says when fine-tuning has begun
    reader, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    asked = ("finetune", tiny, "--steps", 10_000_000, "--batch-size", 8, "--data", images_folder, *RANGE, "--json")
    with start(*asked, stdout=subprocess.PIPE, stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown, deadline, sent = b"", time.monotonic() + 120, False
        while time.monotonic() < deadline:
            if not select.select([reader], [], [], 1)[0]:
                continue
            try:
                chunk = os.read(reader, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not chunk:
                break
            shown += chunk
            if b"fine-tune" in shown and not sent:
                process.send_signal(signal.SIGINT)
                sent = True
        os.close(reader)
        assert process.stdout is not None and process.stdout.read() == b""
        assert sent and process.wait(30) == 130, shown
    assert b"interrupted" in shown and b"Traceback" not in shown
    assert set(contents(tmp_path)) == {"tiny.safetensors"}


def test_a_reader_that_leaves_early_is_no_error(tiny: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with start("inspect", tiny, "--json", stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, b"")


# --- strategies of others ------------------------------------------------------------------------------------------

EVERY_OTHER = '''
from dataclasses import dataclass

import torch

from codebook_tools.codebook import REMOVED, Codebook, Surgery


@dataclass(frozen=True)
class EveryOther:
    """Keep every n-th code."""

    n: int = 2

    def __call__(self, codebook, latents, counts):
        kept = torch.arange(0, codebook.size, self.n)
        index_map = torch.full((codebook.size,), REMOVED)
        index_map[kept] = torch.arange(len(kept))
        return Surgery(Codebook(codebook.vectors[kept]), index_map)
'''


def test_a_strategy_that_another_distribution_adds_is_a_command(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from codebook_cli import app

    (tmp_path / "every_other_strategy.py").write_text(EVERY_OTHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("every-other", "every_other_strategy:EveryOther", strategies.ENTRY_POINTS)
    for module in (app, strategies):
        monkeypatch.setattr(module, "entry_points", lambda group: [point] if group == strategies.ENTRY_POINTS else [])
    assert "every-other" in codebook("--help").stdout
    found = codebook("every-other", tiny, "--set", "n=4", "--data", images_folder, *RANGE, "--json")
    assert found.exit_code == 0, found
    assert found.json["outputs"]["model"] == str(tmp_path / "tiny.every-other-k4.safetensors")
    maps = load_file(found.json["outputs"]["index_map"])
    assert maps[f"{CODEBOOK}/index_map"].tolist() == [i // 4 if i % 4 == 0 else -1 for i in range(16)]
    assert codebook("verify", found.json["outputs"]["model"], "--against", tiny).exit_code == 0
    assert_refused(codebook("every-other", tiny, "--set", "m=4", "--data", images_folder), "cannot be made from")


# --- the index map, as another program reads it --------------------------------------------------------------------


def test_tokens_are_rewritten_by_the_index_map_without_the_package(
    tiny: Path, codebook: Run, images_folder: Path
) -> None:
    found = codebook("prune", tiny, "--data", images_folder, *RANGE, "--json").json
    maps = load_file(found["outputs"]["index_map"])
    old, new = load_file(tiny)[CODEBOOK], load_file(found["outputs"]["model"])[CODEBOOK]
    tokens = torch.tensor([code for code in range(16) if code not in DEAD])
    assert torch.equal(new[maps[f"{CODEBOOK}/index_map"][tokens]], old[tokens])
    header = json.loads(Path(found["outputs"]["index_map"]).read_bytes()[8:].split(b"}}")[0].decode() + "}}")
    digest = hashlib.sha256(Path(found["outputs"]["model"]).read_bytes()).hexdigest()
    assert header["__metadata__"]["codebook_tools.checkpoint_sha256"] == digest


@pytest.mark.parametrize("name", ["tiny.safetensors", "../folder/tiny.safetensors"])
def test_the_model_itself_is_never_overwritten(tiny: Path, codebook: Run, images_folder: Path, name: str) -> None:
    output = tiny.parent / name.replace("folder", tiny.parent.name).replace("tiny.safetensors", tiny.name)
    before = tiny.read_bytes()
    found = codebook("prune", tiny, "--data", images_folder, *RANGE, "-o", output, "--force")
    assert found.exit_code == 1
    assert "is the model itself" in found.stderr
    assert tiny.read_bytes() == before


def test_only_safetensors_are_written(tiny: Path, codebook: Run, images_folder: Path) -> None:
    output = tiny.with_name("out.pt")
    found = codebook("prune", tiny, "--data", images_folder, *RANGE, "-o", output)
    assert found.exit_code == 1
    assert "does not end in .safetensors" in found.stderr
    assert not output.exists()
