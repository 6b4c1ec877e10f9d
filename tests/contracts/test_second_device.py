"""Every command on a second device, where tensors left on the CPU are an error; and what a fine-tuning waits for there.

The device stays in a process for good, so on_second_device.py runs in one of its own, for many jobs at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from audio_codecs import CASES as AUDIO_CASES
from audio_codecs import save as save_codec
from conftest import Run, State
from image_models import CASES as IMAGE_CASES
from places import SUPPORT
from processes import alike, ran
from proven_networks import NETWORKS, write_images, write_network
from safetensors.torch import save_file
from second_device import AVAILABLE, NAME, OPERATORS, READS, UPLOADS
from tutorial_networks import two_levels as of_two_levels

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="torch before 2.9 has no devices in Python")

Jobs = Mapping[str, Sequence[str]]
"""By name: which of the jobs of on_second_device.py, and its words."""


def done(jobs: Jobs, *options: str) -> dict[str, Any]:
    """What came of each job, in a process of their own."""
    outcome = ran(sys.executable, SUPPORT / "on_second_device.py", *options, input=json.dumps([*jobs.values()]))
    lines = outcome.stdout.splitlines()
    assert outcome.exit_code == 0 and len(lines) == len(jobs), outcome.stderr
    return dict(zip(jobs, map(json.loads, lines), strict=True))


@pytest.fixture(scope="module")
def files(
    variants: dict[str, State], images_folder: Path, held_out_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """By name, what command lines below hold in braces."""
    folder = tmp_path_factory.mktemp("there")
    save_file(variants["plain"], folder / "tiny.safetensors")
    save_file(variants["ema"], folder / "ema.safetensors")
    save_file(of_two_levels(sizes=(16, 16)), folder / "two.safetensors")
    np.save(folder / "latents.npy", np.random.default_rng(0).normal(size=(3000, 4)).astype(np.float32))
    (folder / "recipe.yaml").write_text("surgeries: [prune, {refit: {k: 8, steps: 3}}, {quantize: {k: 6}}]\n")
    return {
        **{name: str(folder / f"{name}.safetensors") for name in ("tiny", "ema", "two")},
        "latents": str(folder / "latents.npy"),
        "recipe": str(folder / "recipe.yaml"),
        "out": str(folder),
        "data": f"--data {images_folder} --test-data {held_out_folder} --batch-size 16 --device {NAME} --json --quiet",
    }


def jobs_of(commands: Mapping[str, str], files: Mapping[str, str], job: str = "command") -> dict[str, list[str]]:
    return {name: [job, *words.format_map(files).split()] for name, words in commands.items()}


def assert_all_ran(found: Mapping[str, Any], exit_codes: Sequence[int] = (0,)) -> None:
    """On the device, and to the end."""
    failed = {name: of["stderr"][-2000:] for name, of in found.items() if of["exit_code"] not in exit_codes}
    assert not failed, "\n\n".join(f"{name}: {stderr}" for name, stderr in failed.items())
    assert all(of[OPERATORS] for of in found.values())


FEW = {
    "measure": "measure {tiny} {data} --limit 24 --metrics robustness",
    "refit": "refit {tiny} --k 8 --steps 3 {data} --limit 24 --metrics robustness -o {out}/few-refit.safetensors",
}
TUNED = {"tuned": "finetune {tiny} --steps 20 {data} --limit 24 -o {out}/tuned.safetensors"}


@pytest.fixture(scope="module")
def found(files: dict[str, str]) -> dict[str, Any]:
    """What came of the jobs of the quick tests, in one process."""
    return done(
        {name: [name] for name in ("mixtures", "waits", "same_codes", "largest")}
        | jobs_of(FEW, files)
        | jobs_of({"mixing": FEW["measure"]}, files, "command_that_mixes")
        | jobs_of(TUNED, files, "waits_of_steps")
    )


@pytest.mark.slow
def test_it_takes_no_tensors_of_other_devices_and_counts_what_it_waits_for(found: dict[str, Any]) -> None:
    allowed = [name for name, raised in found["mixtures"].items() if raised is None]
    assert allowed == ["a number of the CPU", "indices of the CPU", "copies"]
    waits = {name: tuple(both) for name, both in found["waits"].items()}
    none = {"upload": (0, 1), "upload without waiting": (0, 0), "arithmetic": (0, 0)}
    assert waits == dict.fromkeys(waits, (1, 0)) | none
    for lookup, (missed, _, missed_unawaited, reads_unawaited) in found["same_codes"].items():
        assert (missed, missed_unawaited, reads_unawaited) == (0, 0, 0), lookup
    assert all(0 < nbytes < 256 << 20 for nbytes in found["largest"].values())


@pytest.mark.slow
def test_near_ties_are_decided_on_the_cpu_where_the_device_has_no_float64() -> None:
    ((name, found),) = done({"same_codes": ["same_codes"]}, "--no-float64").items()
    for lookup, (missed, _, missed_unawaited, _) in found.items():
        assert (missed, missed_unawaited) == (0, 0), (name, lookup)


def test_figures_are_the_cpus(found: dict[str, Any], files: dict[str, str], codebook: Run, tmp_path: Path) -> None:
    assert_all_ran({name: found[name] for name in FEW})
    on_cpu = {**files, "out": str(tmp_path), "data": files["data"].replace(NAME, "cpu")}
    for name, (_, *words) in jobs_of(FEW, on_cpu).items():
        expected, theirs = codebook(*words).json, json.loads(found[name]["stdout"])
        assert theirs["settings"]["device"] == NAME
        assert theirs["stages"] and alike(theirs["stages"], expected["stages"], 1e-3), name
        assert alike(theirs["trace"], expected["trace"], 1e-3), name


def test_an_operator_that_mixes_devices_fails_a_command(found: dict[str, Any]) -> None:
    mixing = found["mixing"]
    assert mixing["exit_code"] != 0 and "two devices, twin:0 and cpu" in mixing["stderr"]


STEPS = 40  # of which one in ten may be waited for
TUNINGS = {
    "ema": "",
    "gradient": "--codebook-update gradient",
    "frozen": "--codebook-update frozen",
    "all": "--adversarial --distill 1 --entropy 0.1 --clip 1 --weight-ema 0.9 --accumulate 2 --loss l1",
}


def test_a_fine_tuning_with_revivals_waits_for_the_device_once_in_ten_steps(found: dict[str, Any]) -> None:
    assert_all_ran({"tuned": found["tuned"]})
    assert (found["tuned"][READS], found["tuned"][UPLOADS]) == (2, 0)
    assert json.loads(found["tuned"]["stdout"])["trace"][-1]["revived"] > 0


@pytest.mark.slow
def test_every_fine_tuning_waits_for_the_device_once_in_ten_steps(files: dict[str, str]) -> None:
    commands = {
        f"{model}, {name}": f"finetune {{{model}}} --steps {STEPS} {options} {{data}} -o {{out}}/{model}{i}.safetensors"
        for model in ("tiny", "two")  # codebooks
        for i, (name, options) in enumerate(TUNINGS.items())
    }
    found = done(jobs_of(commands, files, "waits_of_steps"))
    assert_all_ran(found)
    assert {(of[READS], of[UPLOADS]) for of in found.values()} == {(STEPS // 10, 0)}, found


def _each(words: str, values: Sequence[str]) -> dict[str, str]:
    """A command line for each value of an option, by a name of both."""
    return {f"{words.split()[0]}, {value}": words.replace("VALUE", value) for value in values}


GROUPS = {
    "looks": {
        "measure, bf16": "measure {tiny} {data} --precision bf16 --deterministic --report {out}/measure.html",
        "measure, stats": "measure {tiny} {data} --stats {out}/stats.safetensors",
        "measure, a shard": "measure {tiny} {data} --shard 1/2 --stats {out}/shard-1.safetensors",
        "measure, dot": "measure {tiny} {data} --metric dot",
        "diagnose": "diagnose {ema} {data} --report {out}/diagnose.html",
        "codes": "codes {tiny} {data} --report {out}/codes.html",
        "map": "map {tiny} {data} --method pca --report {out}/map.html",
        "verify": "verify {tiny} --family zalando {data}",
    },
    "surgeries": {
        **_each(
            "refit {tiny} --k 8 --init VALUE --steps 0 {data} -o {out}/VALUE.safetensors", ("afkmc2", "used", "random")
        ),
        "refit, cosine": "refit {tiny} --k 8 --metric cosine --steps 0 {data} -o {out}/cosine.safetensors",
        "refit, cached": "refit {tiny} --k 8 --exact --latents-cache {out}/all --steps 0 {data} -o {out}/1.safetensors",
        "refit, of latents": "refit {tiny} --k 8 --exact --latents {latents} --device twin -o {out}/2.safetensors",
        **_each(
            "restart {tiny} --method VALUE {data} -o {out}/restart-VALUE.safetensors",
            ("error", "random", "split", "nearest"),
        ),
        **_each("quantize {tiny} --k 6 --method VALUE {data} -o {out}/merged-VALUE.safetensors", ("kmeans", "pnn")),
        "quantize, bits": "quantize {tiny} --bits 4 {data} -o {out}/bits.safetensors",
        "grow": "grow {tiny} --k 14 {data} -o {out}/grow.safetensors",
        "condense": "condense {tiny} --k 4 --steps 12 {data} -o {out}/condense.safetensors",
        "run": "run {recipe} {tiny} {data} -o {out}/run.safetensors --report {out}/run.html",
        "sweep": "sweep {tiny} --k 4,8 --lambda 0.01 {data} -o {out}/sweep --report {out}/sweep.html",
        "compare": "compare {tiny} --k 8 --steps 3 {data} -o {out}/compare --report {out}/compare.html",
    },
    "recipes": {
        name: f"refit {{tiny}} --k 8 --steps 12 {options} {{data}} -o {{out}}/{i}.safetensors"
        for i, (name, options) in enumerate(
            {
                **TUNINGS,
                "bf16, decoder": "--precision bf16 --train decoder",
                "codes alone": "--train none",
                "stopped": "--patience 1 --min-usage 0.5",
                "report": "--report {out}/refit.html --log-dir {out}/log",
            }.items()
        )
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "options"), [*((group, ()) for group in GROUPS), ("surgeries", ("--no-float64",))], ids=str
)
def test_every_command_runs_there(group: str, options: tuple[str, ...], files: dict[str, str], tmp_path: Path) -> None:
    found = done(jobs_of(GROUPS[group], {**files, "out": str(tmp_path)}), *options)
    assert_all_ran(found, exit_codes=(0, 3))  # diagnose finds something


@pytest.mark.slow
def test_the_perceptual_loss_runs_there(files: dict[str, str], tmp_path: Path) -> None:
    vgg = pytest.importorskip("torchvision").models.vgg16(weights=None).features
    save_file({f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}, tmp_path / "vgg.safetensors")
    words = f"finetune {{tiny}} --steps 10 --limit 24 --perceptual {tmp_path}/vgg.safetensors {{data}} "
    found = done(jobs_of({"perceptual": words + f"-o {tmp_path}/o.safetensors"}, files, "waits_of_steps"))
    assert_all_ran(found)
    assert (found["perceptual"][READS], found["perceptual"][UPLOADS]) == (1, 0)


Models = Iterator[tuple[str, Path, str]]
"""Name, source and options of each."""


def of_images(folder: Path, files: Mapping[str, str]) -> Models:
    for name, case in IMAGE_CASES.items():
        (own := folder / name.replace(" ", "-")).mkdir()
        source = case.save(own)
        yield name, source, (f"--network {own / case.network} " if case.network else "") + files["data"]


def of_sounds(folder: Path, files: Mapping[str, str]) -> Models:
    (clips := folder / "clips").mkdir()
    for i in range(12):
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, 224)
        soundfile.write(clips / f"{i:02d}.wav", noise, 1600, subtype="FLOAT")
    for i, (name, case) in enumerate(AUDIO_CASES.items()):
        figures = "--metrics si-sdr,mel,stft,robustness"
        options = f"--data {clips} --size 224 --batch-size 4 --device {NAME} --json --quiet {figures}"
        yield name, save_codec(case, folder / str(i) / "model"), options


def of_the_users_own(folder: Path, files: Mapping[str, str]) -> Models:
    for name in sorted({*NETWORKS} - {"swapped", "headed", "fixed", "warped"}):  # refused
        (own := folder / name.replace(" ", "-")).mkdir()
        (data, held_out), (model, network) = write_images(own), write_network(own, name, 16)
        options = f"--data {data} --test-data {held_out} --device {NAME} --json --quiet"
        yield name, model, f"--network {network} --batch-size 16 {options}"


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--no-float64",)], ids=["float64", "none"])
def test_many_clusters_end_as_low_there(options: Sequence[str]) -> None:
    (ends,) = done({"": ["many_clusters"]}, *options).values()
    for name in ("kmeans++", "start"):
        assert ends[f"{NAME} {name}"] == pytest.approx(ends[f"cpu {name}"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("models", [of_images, of_sounds, of_the_users_own])
def test_every_family_is_measured_and_refitted_there(
    models: Callable[[Path, Mapping[str, str]], Models], files: dict[str, str], tmp_path: Path
) -> None:
    commands = dict[str, str]()
    for name, source, options in models(tmp_path, files):
        output = source.parent / ("result" if source.is_dir() else "result.safetensors")
        commands[f"{name}, measure"] = f"measure {source} {options}"
        commands[f"{name}, refit"] = f"refit {source} --k 8 --steps 3 {options} -o {output}"
    assert_all_ran(done(jobs_of(commands, {})))


@pytest.mark.slow
def test_counting_in_a_training_makes_the_host_wait_for_nothing() -> None:
    names = ("straight", "diffusers")
    for figures in done({name: ["monitored", name] for name in names}).values():
        assert (figures[READS], figures[UPLOADS]) == (0, 0)
        assert figures[f"{NAME} False"] == figures["cpu False"]
        assert figures[f"{NAME} True"]["used"] == 24 and figures[f"{NAME} True"]["revived"] >= 6
