"""`--metrics` on every command that measures: at each stage, over shards and processes, on pages and cards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import audio_codecs
import pytest
import soundfile
from conftest import Run, assert_refused
from processes import torchrun
from speech import voice

SOUND = "pesq,stoi,si-sdr,mel,stft,robustness"
FIELDS = ("pesq", "stoi", "si_sdr", "mel", "stft", "robustness")
RATE, SAMPLES = 16_000, 16_000


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Encodec at 16 kHz: 4 codebooks of 16 codes, a hop of 8 samples."""
    case = audio_codecs.CASES["encodec"]
    bandwidths = {"sampling_rate": RATE, "target_bandwidths": [16.0, 32.0]}
    return audio_codecs.save(replace(case, more=case.more | bandwidths), tmp_path_factory.mktemp("codec") / "model")


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 clips of a second, one of them silent."""
    folder = tmp_path_factory.mktemp("speech")
    for i in range(20):
        wave = voice(RATE, 1.0, i) if i else 0 * voice(RATE, 1.0)
        soundfile.write(folder / f"{i:02d}.wav", wave, RATE, subtype="FLOAT")
    return folder


def stages_of(done: Any) -> dict[str, Any]:
    assert done.exit_code == 0, done.stderr
    stages: dict[str, Any] = done.json["stages"]
    return stages


@pytest.fixture(scope="module")
def libraries() -> None:
    for library in ("pesq", "pystoi", "torchmetrics", "transformers"):
        pytest.importorskip(library)


# --- images


@pytest.mark.slow
def test_a_surgery_has_the_figures_of_each_phase_in_json_table_page_and_card(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    page, output = tmp_path / "page.html", tmp_path / "o.safetensors"
    asked = ("refit", tiny, "--k", 8, "--data", images_folder, "--steps", 3, "--batch-size", 8, "-o", output)
    done = codebook(*asked, "--metrics", "robustness", "--report", page, "--json")
    plain = codebook(*asked, "--force", "--json")
    for stage, figures in stages_of(done).items():
        assert figures.pop("robustness") > 0 and figures == stages_of(plain)[stage]
    assert done.json["settings"].pop("metrics") == {"robustness": None}
    assert (
        "mse, swapped tokens" in page.read_text()
        and "each replaced by one of the ten nearest codes" in page.read_text()
    )
    table = codebook(*asked, "--force", "--metrics", "robustness")
    assert "mse, swapped tokens" in table.stdout


def test_what_else_is_measured_does_not_change_the_file(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    files = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    for file, more in zip(files, ((), ("--metrics", "robustness")), strict=True):
        done = codebook("prune", tiny, "--data", images_folder, "-o", file, *more)
        assert done.exit_code == 0, done.stderr
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_compare_and_sweep_have_a_column_and_a_mean(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    common = ("--data", images_folder, "--metrics", "robustness", "--json")
    rows = ("--k", 8, "--strategies", "prune,refit", "--steps", 2, "--seeds", 2, "--batch-size", 16)
    compared = codebook("compare", tiny, *rows, *common, "-o", tmp_path / "compared")
    assert compared.exit_code == 0, compared.stderr
    for summary in compared.json["summary"]:
        assert summary["stages"]["finetuned"]["robustness"]["mean"] > 0
    assert "| mse, swapped tokens fine-tuned |" in (tmp_path / "compared" / "table.md").read_text()
    again = codebook("compare", tiny, *rows, *common, "-o", tmp_path / "compared")  # rows are read back
    assert again.json["rows"] == compared.json["rows"]
    swept = codebook("sweep", tiny, "--k", "4,8", *common, "-o", tmp_path / "swept")
    assert swept.exit_code == 0, swept.stderr
    assert all(point["stages"]["surgery"]["robustness"] > 0 for point in swept.json["points"])
    assert "| mse, swapped tokens |" in (tmp_path / "swept" / "table.md").read_text()


def test_shards_give_the_figures_of_the_pass_and_are_refused_where_others_were_measured(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    asked = ("measure", tiny, "--test-data", images_folder, "--batch-size", 8)
    whole = codebook(*asked, "--metrics", "robustness", "--json")
    files = [tmp_path / f"{i}.safetensors" for i in (1, 2)]
    for i, file in enumerate(files, 1):
        part = codebook(*asked, "--metrics", "robustness", "--shard", f"{i}/2", "--stats", file, "--json")
        assert stages_of(part)["before"]["robustness"] != stages_of(whole)["before"]["robustness"]
    merged = codebook("measure", tiny, "--merge", *files, "--json")
    assert stages_of(merged) == stages_of(whole)
    codebook(*asked, "--shard", "2/2", "--stats", files[1], "--force")
    assert_refused(codebook("measure", tiny, "--merge", *files), "shards of one pass share all settings and data")
    refused = codebook("measure", tiny, "--merge", *files, "--metrics", "robustness")
    assert_refused(refused, "--merge gives the --metrics of the shards; leave it out")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tiny: Path, images_folder: Path, codebook: Run) -> None:
    asked = ("measure", tiny, "--test-data", images_folder, "--batch-size", 8, "--metrics", "robustness", "--json")
    both = torchrun(*asked)
    assert both.exit_code == 0, both.stderr
    one, two = stages_of(codebook(*asked))["before"], json.loads(both.stdout)["stages"]["before"]
    assert two["robustness"] == pytest.approx(one["robustness"], rel=1e-9)


def test_where_nothing_is_reconstructed_a_figure_is_refused(codebook: Run, tiny: Path, images_folder: Path) -> None:
    asked = ("prune", tiny, "--metrics", "robustness")
    for name in ("latents", "stats"):
        line = "--metrics is of reconstructions; --latents and --stats have none: give --data"
        assert_refused(codebook(*asked, f"--{name}", "x.safetensors"), line)
    refused = codebook("quantize", tiny, "--bits", 8, "--metrics", "robustness")
    assert_refused(refused, "--metrics is of reconstructions: give --data, or leave it out")
    line = "--metrics pesq is of sound; these data are images: leave it out"
    assert_refused(codebook("measure", tiny, "--data", images_folder, "--metrics", "pesq"), line)


# --- sound


@pytest.mark.slow
@pytest.mark.usefixtures("libraries")
def test_a_codec_has_all_figures_of_sound_at_each_stage_and_their_shards_merge(
    codebook: Run, codec: Path, speech: Path, tmp_path: Path
) -> None:
    common = ("--size", SAMPLES, "--batch-size", 4, "--metrics", SOUND)
    done = codebook("refit", codec, "--k", 8, "--data", speech, *common, "--steps", 2, "-o", tmp_path / "o", "--json")
    for figures in stages_of(done).values():
        assert all(isinstance(figures[name], float) for name in FIELDS), figures
        assert 1 <= figures["pesq"] <= 4.65 and figures["stoi"] <= 1 and figures["mel"] > 0 and figures["stft"] > 0
    card = (tmp_path / "o" / "README.md").read_text()
    assert all(f"| {label} |" in card for label in ("PESQ", "STOI", "SI-SDR, dB", "mel distance", "STFT distance"))
    asked = ("measure", codec, "--test-data", speech, *common)
    whole = codebook(*asked, "--json")
    before = stages_of(whole)["before"]
    assert before["uncounted"] == {"pesq": 1, "stoi": 1, "si-sdr": 1}
    (line,) = [line for line in whole.json["warnings"] if line.startswith("stoi")]
    assert line == "stoi is not defined for 1 of 20 clips, which are not counted: they are too short or silent"
    assert "(without 1)" in codebook(*asked).stdout
    files = [tmp_path / f"{i}.safetensors" for i in (1, 2)]
    for i, file in enumerate(files, 1):
        assert codebook(*asked, "--shard", f"{i}/2", "--stats", file).exit_code == 0
    assert stages_of(codebook("measure", codec, "--merge", *files, "--json"))["before"] == before


@pytest.mark.slow
def test_the_rate_of_sound_follows_from_hop_and_codebooks_exactly(codebook: Run, codec: Path, speech: Path) -> None:
    done = codebook("measure", codec, "--test-data", speech, "--size", SAMPLES, "--json")
    before = stages_of(done)["before"]
    assert (before["tokens_per_second"], before["bitrate"]) == (RATE / 8 * 4, RATE / 8 * 4 * 4)
    entropy = sum(RATE / 8 * book["bits"] for book in before["codebooks"])
    assert before["entropy_bitrate"] == pytest.approx(entropy, rel=1e-12) and entropy < before["bitrate"]


def test_images_have_no_rate(codebook: Run, tiny: Path, images_folder: Path) -> None:
    assert "tokens_per_second" not in stages_of(codebook("measure", tiny, "--data", images_folder, "--json"))["before"]


def test_python_asks_for_figures_by_the_data(tiny: Path, images_folder: Path) -> None:
    import codebook_tools as ct

    model, data = ct.load(tiny, input_range=(-1, 1)), ct.Data(images_folder, metrics="robustness")
    measured = ct.measure(model, data)
    assert measured.robustness is not None and measured.robustness > 0
    with pytest.raises(ct.CodebookError, match="expected some of rfid"):
        ct.measure(model, ct.Data(images_folder, metrics="fid"))
