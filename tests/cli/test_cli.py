"""The command line: what scripts rely on. JSON, exit codes, files, and one line for whatever a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeGrey, Outcome, Patch, Run, State, WriteModel, assert_refused, contents
from processes import ran
from safetensors.torch import load_file

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.models.families.zalando import CODEBOOK

RANGE = ("--input-range", "-1.0, 1")
RESULT = {
    "command", "version", "model", "family", "settings", "seed", "warnings", "stages", "kept", "trace", "outputs",
    "bytes", "seconds", "proof",
}  # fmt: skip
MEASUREMENT = {"split", "images", "mse", "psnr", "ssim", "codebooks", "sharpness"}
USE = {
    "key", "size", "dim", "latents", "used", "usage", "used_10", "perplexity", "bits", "top_share", "distortion",
    "coverage", "effective_dimension", "effective_dimension_codes", "dimensions_99", "dimensions_99_codes",
}  # fmt: skip
POINT = {"step", "loss", "validation_mse", "used", "perplexity", "distortion", "revived", "validation_loss"}
SECONDS = {"load", "encode", "strategy", "finetune", "measure", "write", "total"}


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


def test_measure_fills_before_alone_and_writes_nothing(tiny: Path, codebook: Run, on_tiny: Run, tmp_path: Path) -> None:
    before = contents(tmp_path)
    found = on_tiny("measure", "--json")
    assert (found.exit_code, found.stderr) == (0, "")
    assert_promised(found.json, {"before"})
    assert found.json["kept"] is None and found.json["trace"] == []
    assert found.json["outputs"] == {"model": None, "index_map": None, "report": None}
    assert found.json["bytes"] == {"before": tiny.stat().st_size, "after": None}
    assert (found.json["command"], found.json["family"], found.json["seed"]) == ("measure", "zalando", 0)
    assert found.json["model"] == str(tiny)
    assert found.json["version"] == codebook("--version").stdout.strip()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "stages", "kept", "name"),
    [
        ("prune", {"before", "surgery"}, "surgery", "tiny.prune-k10"),
        ("refit --k 6 --steps 12", {"before", "surgery", "finetuned"}, "finetuned", "tiny.refit-k6"),
        ("refit --k=6 --steps=3 --lr=30", {"before", "surgery", "finetuned"}, "surgery", "tiny.refit-k6"),
        ("finetune --steps 3 --lr 30", {"before", "finetuned"}, "before", "tiny.finetune-k16"),
        ("finetune --steps 0", {"before"}, "before", "tiny.finetune-k16"),
    ],
)
def test_an_operation_gives_the_promised_json_and_writes_beside_the_model(
    arguments: str, stages: set[str], kept: str, name: str, tiny: Path, codebook: Run, on_tiny: Run, tmp_path: Path
) -> None:
    command, *options = arguments.split()
    found = on_tiny(command, *options, "--batch-size", 16, "--json")
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
    model.write_bytes(model.read_bytes()[:-1] + bytes([model.read_bytes()[-1] ^ 1]))
    verified, table = (
        codebook("verify", model, "--against", tiny, "--json"),
        codebook("verify", model, "--against", tiny),
    )
    assert (verified.exit_code, verified.json.keys(), verified.json["ok"]) == (3, {"ok", "differences"}, False)
    assert all(difference.keys() == {"key", "what"} for difference in verified.json["differences"])
    assert table.exit_code == 3 and "__metadata__" in table.stdout and "damaged" in table.stdout


def test_settings_say_what_was_asked_and_found_out(on_tiny: Run, images_folder: Path, held_out_folder: Path) -> None:
    found = on_tiny(
        "refit", "--k", 5, "--init", "used", "--iterations", 7, "--steps", 2, "--train", "decoder",
        "--codebook-update", "gradient", "--loss", "l1", "--lr", "0.002", "--batch-size", 9, "--seed", 3,
        "--test-data", held_out_folder, "--json",
    ).json  # fmt: skip
    assert found["seed"] == 3
    assert found["settings"] == {
        "k": 5, "init": "used", "iterations": 7, "exact": False, "engine": "native", "seed": 3, "steps": 2,
        "engine_reason": "5 codes of 4 entries: it starts on samples, and moves codes out of local optima",
        "train": "decoder", "balance": False,
        "codebook_update": "gradient", "loss": "l1", "lr": 0.002, "batch_size": 9, "data": [str(images_folder)],
        "accumulate": 1, "clip": None, "weight_ema": None, "patience": None, "min_usage": 0.0,
        "perceptual": None, "adversarial": False, "distill": 0.0, "entropy": 0.0, "optimizer": "muon",
        "augment": "mirror", "test_data": [str(held_out_folder)], "images": {"train": 54, "validation": 6, "test": 12},
        "input_range": [-1.0, 1.0], "device": "cpu",
        "precision": "fp32", "metric": "euclidean", "limit": None, "size": None, "channels": None,
        "modality": "images", "crop": "center", "group": None, "latent_axis": None,
        "skip_bad": False, "network": None,
    }  # fmt: skip


def test_warnings_are_told_unless_quiet(write_model: WriteModel, codebook: Run, images_folder: Path) -> None:
    asked = ("measure", write_model("extra"), "--data", images_folder, *RANGE, "--json")
    found = codebook(*asked)
    (warning,) = found.json["warnings"]
    assert "2 tensors unknown to the network" in warning and found.stderr.strip() == f"warning: {warning}"
    quiet = codebook(*asked, "--quiet")
    assert quiet.stderr == "" and quiet.json["warnings"] == [warning]


def test_inspect_gives_its_json_and_makes_no_tensor(write_model: WriteModel, codebook: Run, monkeypatch: Patch) -> None:
    model = write_model("ema")
    for name in ("tensor", "tensors"):
        monkeypatch.setattr(Checkpoint, name, None)
    found = codebook("inspect", model, "--json")
    assert found.exit_code == 0
    assert found.json == {
        "family": "zalando",
        "reason": None,
        "codebooks": [
            {
                "key": CODEBOOK, "size": 16, "dim": 4, "axis": 0, "heads": 1, "dtype": "F32", "search": "euclidean",
                "companions": ["_vq_vae._ema_cluster_size", "_vq_vae._ema_w"], "confidence": "high", "alive": 15,
            }
        ],
        "elsewhere": [],
    }  # fmt: skip
    shown = codebook("inspect", model).stdout
    assert "family: zalando" in shown and "euclidean" in shown
    assert "follows _vq_vae._embedding.weight: _vq_vae._ema_cluster_size, _vq_vae._ema_w" in shown


def test_inspect_lists_what_depends_on_k_elsewhere_and_says_why_there_is_no_codebook(
    write_model: WriteModel, codebook: Run, variants: dict[str, State]
) -> None:
    prior = variants["plain"] | {"prior.head.weight": torch.ones(17, 5)}
    found = codebook("inspect", write_model(state=prior), "--json").json
    assert found["elsewhere"] == [{"key": "prior.head.weight", "shape": [17, 5]}]
    kl = {"encoder.conv.weight": torch.ones(4, 3, 3, 3), "decoder.conv.weight": torch.ones(3, 4, 3, 3)}
    found = codebook("inspect", write_model(state=kl), "--json")
    assert found.exit_code == 0 and found.json["family"] is None and found.json["codebooks"] == []
    assert "no quantizer between them" in found.json["reason"]
    assert "no codebook was recognized: " in codebook("inspect", write_model(state=kl)).stdout


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(tiny: Path, on_tiny: Run, tmp_path: Path) -> None:
    before, asked = contents(tmp_path), ("refit", "--k", 6, "--dry-run")
    found = on_tiny(*asked, "--json")
    assert found.exit_code == 0 and found.json["dry_run"] is True
    assert found.json["outputs"]["model"] == str(tmp_path / "tiny.refit-k6.safetensors")
    assert found.json["size"] == {"before": 16, "after": 6} and found.json["seconds"]["estimate"] > 0
    assert found.json["bytes"]["after"] < found.json["bytes"]["before"] == tiny.stat().st_size
    table = on_tiny(*asked).stdout
    assert "16 -> 6" in table and "tiny.refit-k6.safetensors" in table and "Nothing was written." in table
    assert contents(tmp_path) == before


def test_a_result_is_shown_as_a_table_with_its_figures(on_tiny: Run) -> None:
    asked = ("refit", "--k", 6, "--steps", 3, "--batch-size", 16, "--force")
    figures, shown = on_tiny(*asked, "--json").json, on_tiny(*asked, "--verbose").stdout
    assert max(map(len, shown.splitlines())) < 400  # a pipe has no width: nothing is cut, nor padded
    for stage in figures["stages"].values():
        use = stage["codebooks"][0]
        assert f"{use['used']} of {use['size']} ({use['usage']:.1%})" in shown
        assert f"{stage['mse']:.6f}" in shown and f"{use['perplexity']:.2f}" in shown
    assert "after fine-tuning *" in shown and f"written to {figures['outputs']['model']}" in shown
    assert "validation mse" in shown and "codebook_update" in shown and "encode" in shown


@pytest.mark.slow
def test_the_demo_is_pruned_into_the_current_folder(codebook: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    found = codebook("prune", "--threshold", 0, "--limit", 100, "--json")
    assert found.exit_code == 0 and found.stderr == ""  # nothing to warn of: the sample is the demo's own
    size = found.json["stages"]["surgery"]["codebooks"][0]["size"]
    assert size < 512 and found.json["settings"]["input_range"] == [-1.0, 1.0]
    assert set(contents(tmp_path)) == {f"demo.prune-k{size}.safetensors", f"demo.prune-k{size}.index_map.safetensors"}
    assert codebook("verify", f"demo.prune-k{size}.safetensors").exit_code == 0


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
    options = ("--k", 6, "--steps", 0, "--test-data", held_out_folder, "--limit", 60)
    found = codebook("refit", tiny, *options, *RANGE, "--json").json  # calibrated on the sample
    split = found["settings"]["images"]
    assert (split["train"] + split["validation"], split["test"]) == (60, 12)
    assert any("no --data" in warning for warning in found["warnings"])


def test_running_options_are_taken_and_told(on_tiny: Run) -> None:
    asked = ("measure", "--batch-size", 16, "--json")
    try:
        found = on_tiny(*asked, "--precision", "bf16", "--device", "auto", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.exit_code == 0 and found.json["settings"]["precision"] == "bf16"
    exact = on_tiny(*asked).json["stages"]["before"]
    assert found.json["stages"]["before"]["mse"] == pytest.approx(exact["mse"], rel=0.05)
    assert found.json["stages"]["before"]["mse"] != exact["mse"]


MeasureGrey = Callable[..., Outcome]


@pytest.fixture
def measure_grey(grey: MakeGrey, codebook: Run, tmp_path: Path) -> MeasureGrey:
    """measure_grey(codes, data, *options, test=None): of a network of the user's own, on arrays of images."""

    def measure(codes: list[float], data: Any, *options: str, test: Any = None, command: str = "measure") -> Outcome:
        made, words = grey(codes), list[object]()
        for name, images in (("data", data), ("test-data", test)):
            if images is not None:
                np.save(tmp_path / f"{name}.npy", images)
                words += [f"--{name}", tmp_path / f"{name}.npy"]
        return codebook(command, made.path, "--network", made.network, *words, *options, "--json")

    return measure


def drawn(levels: Any, count: int = 40) -> Any:
    """(count, 4, 4) uint8."""
    return np.random.default_rng(0).choice(np.array(levels, np.uint8), (count, 4, 4))


def test_a_network_of_the_users_own_is_measured_and_operated_on(measure_grey: MeasureGrey) -> None:
    codes, images = [i / 15 for i in range(16)] + [9.0], drawn(range(256), 80)
    found = measure_grey(codes, images).json
    assert found["family"] == "custom" and found["settings"]["input_range"] == [0.0, 1.0]
    assert found["stages"]["before"]["mse"] == pytest.approx((1 / 15) ** 2 / 12, rel=0.1)
    assert measure_grey(codes, images, command="prune").json["stages"]["surgery"]["codebooks"][0]["size"] == 16


def test_colours_for_a_grey_network_are_refused_until_one_says_how(measure_grey: MeasureGrey) -> None:
    """Pixels of red 1.0 and of green and blue 0.2: a luma of 0.299 + 0.701 x 0.2 = 0.4392, and a first channel of 1."""
    colours = np.full((40, 4, 4, 3), 0.2, dtype=np.float32)
    colours[..., 0] = 1.0
    asked = ([0.0, 0.4392, 1.0], colours, "--input-range", "0,1")
    message = "has 3 channels, and the network takes 1: give --channels mix|first (the luma of colors, or the first"
    assert_refused(measure_grey(*asked), message)
    for mixing in ("mix", "first"):
        found = measure_grey(*asked, "--channels", mixing).json
        assert found["settings"]["channels"] == mixing
        assert found["stages"]["before"]["mse"] == pytest.approx(0, abs=1e-12)
        assert found["stages"]["before"]["codebooks"][0]["used"] == 1


def test_the_bundled_sample_comes_in_the_networks_channels(measure_grey: MeasureGrey) -> None:
    found = measure_grey([0.0, 0.5, 1.0], None, "--limit", "40", "--input-range", "0,1")
    assert found.exit_code == 0 and any("no --data" in warning for warning in found.json["warnings"])


def test_an_input_range_that_another_beats_or_comes_close_to_is_told(measure_grey: MeasureGrey) -> None:
    """In [0, 1] black, grey and white have codes of their own. In [-1, 1] black is -1, becomes 0 and comes back as 0.5;
    the other two come back: an error of 0.25 / 3, and 16 of 48 pixels are black."""
    rows = np.tile(np.array([0, 0.5, 1], dtype=np.float32), 16).reshape(1, 6, 8).repeat(40, axis=0)
    (warning,) = measure_grey([0.0, 0.5, 1.0], rows, "--input-range=-1,1").json["warnings"]
    assert warning == (
        "--input-range -1,1: images come back with mse 0.08333 in it, and with 0 in [0, 1]; is it --input-range=0,1?"
    )
    assert measure_grey([0.0, 0.5, 1.0], rows, "--input-range=0,1").json["warnings"] == []
    (warning,) = measure_grey([-1.0, -0.5, 0.0, 0.5, 1.0], drawn((0, 255))).json["warnings"]
    assert "input range [-1, 1] was chosen" in warning and "[0, 1] is close" in warning and "--input-range" in warning


def test_the_input_range_is_the_calibration_images_choice(measure_grey: MeasureGrey) -> None:
    codes, black, grey = [0.0, 0.2, 1.0], drawn((0, 255)), drawn((153, 255))  # 0.6 is 0.2 in the range [-1, 1]
    assert measure_grey(codes, black, test=grey).json["settings"]["input_range"] == [0.0, 1.0]
    assert measure_grey(codes, grey, test=black).json["settings"]["input_range"] == [-1.0, 1.0]


def test_a_log_shows_life_and_quiet_does_not(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    from codebook_cli import output

    monkeypatch.setattr(output, "SECONDS_A_LINE", -1)
    for quiet in (False, True):
        output.ProgressShow(quiet)("fine-tune", 1200, 5000, {"loss": 0.25})
    assert capsys.readouterr().err == "fine-tune: 1,200 of 5,000 loss 0.25\n"


IMPORTING = """
import gc, sys
from codebook_cli.run import _importing

interval = sys.getswitchinterval()
try:
    with _importing():
        assert not gc.isenabled()
        import torch
        raise ImportError
except ImportError:
    pass
assert gc.isenabled() and sys.getswitchinterval() == interval
frozen = gc.get_freeze_count()
assert frozen > 100_000, frozen
with _importing():
    assert gc.isenabled(), "torch is imported already"
assert gc.get_freeze_count() == frozen
"""


def test_garbage_is_collected_again_after_torch_is_imported_and_none_is_kept() -> None:
    done = ran(sys.executable, "-c", IMPORTING)
    assert done.exit_code == 0, done.stderr
