"""Several processes: two real ones, by gloo, do together what one does alone."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEAD, Outcome
from places import ROOT, SUPPORT, TESTS
from runs import BrokenError, breaking_at
from safetensors.torch import load_file
from sources_of_images import Images, find_images

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.data.sampling import Sampler
from codebook_tools.data.splits import split
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.evaluation.measure import measure
from codebook_tools.evaluation.usage import survey, tokenize
from codebook_tools.models.load import load_model
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.finetune import FineTune, finetune
from codebook_tools.training.resume import Saving

PATH = os.pathsep.join([*map(str, (Path(__file__).parent, SUPPORT, TESTS, ROOT)), os.environ.get("PYTHONPATH", "")])
QUIET = {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
Found = dict[str, Any]


def together(function: str, *arguments: object) -> list[Found]:
    """What a function of this module returns in each of two processes that are joined."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = f"import sys, test_processes as t; t.told(t.{function}, *sys.argv[1:])"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env=os.environ
            | QUIET
            | {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def told(function: Callable[..., Found], *arguments: str) -> None:
    """In one of two processes: what the function returns, as JSON."""
    with distributed.joined("cpu"):
        found = function(*arguments)
    print(json.dumps(found))


# --- sums and gathers ----------------------------------------------------------------------------------------------


def words() -> Found:
    """What a process of two hears of the other."""
    me = distributed.rank()
    values, rows = torch.tensor([me + 1, me * 2**60]), torch.full((2 * me, 3), float(me))
    tensor, done = torch.tensor([1.0 + me]), list[int]()

    def work() -> str:
        done.append(me)
        return f"by {me}"

    found: Found = {
        "part": distributed.part(),
        "slices": [[s.start, s.stop] for s in map(distributed.own_slice, (5, 1))],
        "summed": distributed.summed(values).tolist(),
        "its own": values.tolist(),
        "gathered": distributed.gathered(rows).tolist(),
        "each": distributed.each(f"of {me}"),
        "of_first": distributed.of_first({"of": me}),
        "by_first": [distributed.by_first(work), done],
    }
    distributed.follow_first([tensor])
    found["followed"] = tensor.tolist()
    try:
        with distributed.alike(NotFiniteError):
            if me == 1:
                raise NotFiniteError("here alone")
    except NotFiniteError as error:
        found["alike"] = str(error)
    sampler = Sampler(seed=3, limit=4)
    sampler.add([], 0, torch.empty(0, 1))
    if me == 1:  # the first has nothing to add
        sampler.add([_Name(i) for i in range(9)], 1, torch.arange(9.0)[:, None])
    sampler.merge()
    found["sampled"] = sampler.columns()[0].tolist()
    said = list[str]()
    if me == 0:
        found["fail"] = [distributed.fail(3, lambda: said.append("why")), said]
        distributed.each(None)
    else:
        distributed.each(None)
        found["fail"] = [distributed.fail(70, lambda: said.append("because of the first")), said]
    return found


class _Name:
    def __init__(self, i: int) -> None:
        self.digest = bytes([i]) * 32


def test_what_two_processes_tell_each_other() -> None:
    first, second = together("words")
    alone = Sampler(seed=3, limit=4)
    alone.add([_Name(i) for i in range(9)], 1, torch.arange(9.0)[:, None])
    for me, found in enumerate((first, second)):
        assert found["part"] == [me, 2]
        assert found["summed"] == [3, 2**60] and found["its own"] == [me + 1, me * 2**60]
        assert found["gathered"] == [[1.0] * 3] * 2
        assert found["each"] == ["of 0", "of 1"]
        assert found["of_first"] == {"of": 0}
        assert found["by_first"] == ["by 0", [] if me else [0]]
        assert found["followed"] == [1.0]
        assert found["alike"] == "here alone"
        assert found["sampled"] == alone.columns()[0].tolist()
        assert found["fail"] == [3, [] if me else ["why"]]
    assert [first["slices"], second["slices"]] == [[[0, 2], [0, 0]], [[2, 5], [0, 1]]]


def test_a_process_alone_is_the_first_of_one() -> None:
    values, said = torch.tensor([1, 2]), list[str]()
    with distributed.joined("auto"):
        assert distributed.part() == (0, 1) and distributed.own_slice(5) == slice(0, 5)
        assert distributed.summed(values) is values and distributed.gathered(values) is values
        assert distributed.each(1) == [1] and distributed.by_first(lambda: 2) == 2
        assert distributed.fail(3, lambda: said.append("why")) == 3 and said == ["why"]
    with pytest.raises(NotFiniteError, match="mine"), distributed.alike(NotFiniteError):
        raise NotFiniteError("mine")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CodebookError, match="2 processes on 1 GPUs: start as many as there are"):
        distributed.joined("auto").__enter__()


# --- passes and fine-tuning ----------------------------------------------------------------------------------------

TUNINGS: dict[str, Found] = {
    "even": {"batch_size": 8},
    "uneven": {"batch_size": 5, "codebook_update": "gradient", "loss": "l1"},
    "one image": {"batch_size": 1, "steps": 6},
    "codes alone": {"batch_size": 8, "train": "none"},
    "unreadable": {"batch_size": 6},
    "every option": {"batch_size": 4, "accumulate": 2, "clip": 0.5, "weight_ema": 0.9, "codebook_update": "gradient"},
    "broken off": {"batch_size": 8},
}


def work(model: str, folder: str) -> Found:
    """What passes over the images of a folder find with the tiny model, and what fine-tunings make of it."""
    items = find_images([folder])
    running, images = load_model(read_checkpoint(Path(model))), Images(items, 3, 4, skip_bad=True)
    images.part = distributed.part()
    seen = survey(running.latents(images, 4), running.books[0].codebook, seed=0, limit=300, watch=Watch())
    (tokens,) = tokenize(running, images, seed=0, batch=4, watch=Watch())
    found: Found = {
        "bad": sorted({name for bad in distributed.each(list(images.bad)) for name in bad}),
        "survey": [seen.counts.tolist(), seen.total, seen.error, seen.sample.vectors.tolist(), seen.codes.tolist()],
        "tokens": [tokens.counts.tolist(), tokens.sample.tolist()],
        "measured": measure(running, images, batch=4, structure=False, watch=Watch()).to_json(),
        # The second process sees none of these.
        "few": measure(running, images.subset(items[:3]), batch=4, structure=False, watch=Watch()).to_json(),
    }
    for name, recipe in TUNINGS.items():
        splits = split(items)
        train = [item for item in splits.train if name == "unreadable" or item.name not in found["bad"]]
        watches, saving = [Watch()], None
        if name == "broken off":
            watches.insert(0, breaking_at(7))
            saving = Saving(Path(model).with_name(f"of {distributed.count()}.safetensors"), {}, resume=True)
        for watch in watches:
            model_of_it = load_model(read_checkpoint(Path(model)))
            with suppress(BrokenError):
                tuned = finetune(
                    model_of_it,
                    images.subset(train),
                    images.subset(splits.validation),
                    FineTune(**{"steps": 12, **recipe}),
                    [torch.tensor([int(i not in DEAD) for i in range(16)])],
                    seed=0,
                    watch=watch,
                    saving=saving,
                )
        found[name] = [
            [asdict(point) for point in tuned.trace],
            tuned.best.step,
            tuned.best.revived[0].tolist(),
            model_of_it.books[0].vectors.tolist(),
            sum(tensor.double().sum().item() for tensor in tuned.best.weights.values()),
        ]
    return found


def alike(a: Any, b: Any, relative: float) -> bool:
    """The same shape, integers and names, and numbers that differ by rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key], relative) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(alike(*pair, relative) for pair in zip(a, b, strict=True))
    return bool(a == pytest.approx(b, rel=relative, abs=1e-6)) if isinstance(a, float) else bool(a == b)


def test_two_processes_find_and_train_what_one_does(tiny: Path, images_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, file in enumerate(sorted(images_folder.rglob("*.png"))):
        (folder / f"{i:03d}.png").write_bytes(b"no picture" if i in (5, 6, 17) else file.read_bytes())
    alone = work(str(tiny), str(folder))
    first, second = together("work", tiny, folder)
    assert first == second  # to the last bit
    assert len(alone["bad"]) == 3
    for name, of_one in alone.items():
        exact = name in ("bad", "survey", "tokens", "measured", "few")
        assert alike(json.loads(json.dumps(of_one)), first[name], 1e-9 if exact else 1e-3), name
    assert alone["survey"][3] == first["survey"][3]  # the sample, to the last bit
    assert first["broken off"] == first["even"] and alone["broken off"] == alone["even"]
    assert alone["even"][0][-1]["revived"] > 0  # so that reviving is among what agrees


# --- the command line ----------------------------------------------------------------------------------------------


def torchrun(*arguments: object) -> Outcome:
    """The command in two processes, as users start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "codebook_tools", *map(str, arguments)],
        env=os.environ | QUIET,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def said(found: Outcome) -> list[str]:
    """Our lines among those of torchrun."""
    return [line for line in found.stderr.splitlines() if line.startswith(("error:", "warning:"))]


@pytest.mark.slow
def test_refit_by_torchrun_is_the_refit_of_one_process(codebook: Callable[..., Outcome], tmp_path: Path) -> None:
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    for path in (one, two):
        path.parent.mkdir()
    for steps in (0, 20):
        arguments = ("refit", "--k", 32, "--limit", 300, "--batch-size", 32, "--steps", steps, "--json", "--force")
        alone, shared = codebook(*arguments, "-o", one), torchrun(*arguments, "-o", two)
        assert (alone.exit_code, shared.exit_code, said(shared)) == (0, 0, said(alone)), shared
        for stage, of_one in alone.json["stages"].items():
            of_two = shared.json["stages"][stage]
            assert (of_one is None) == (of_two is None) == (stage == "finetuned" and not steps)
            if stage != "finetuned":
                assert alike(of_one, of_two, 1e-5), stage
            elif of_one is not None:
                assert of_two["mse"] == pytest.approx(of_one["mse"], rel=0.02)
        assert alone.json["settings"] == shared.json["settings"] and alone.json["kept"] == shared.json["kept"]
        assert len(shared.json["trace"]) == len(alone.json["trace"])
        centroids = [load_file(path)["_vq_vae._embedding.weight"] for path in (one, two)]
        torch.testing.assert_close(*centroids, rtol=1e-5 if not steps else 1e-2, atol=1e-5 if not steps else 1e-2)
        assert {file.name for file in two.parent.iterdir()} == {file.name for file in one.parent.iterdir()}
        assert codebook("verify", two).exit_code == 0


@pytest.mark.slow
def test_codes_are_merged_alike_on_all_processes(codebook: Callable[..., Outcome], tmp_path: Path) -> None:
    arguments = ("condense", "--k", 32, "--limit", 300, "--batch-size", 32, "--steps", 20, "--json")
    alone = codebook(*arguments, "-o", tmp_path / "one.safetensors")
    shared = torchrun(*arguments, "-o", tmp_path / "two.safetensors")
    assert (alone.exit_code, shared.exit_code) == (0, 0), shared
    of_one, of_two = (found.json["stages"]["finetuned"] for found in (alone, shared))
    assert of_two["mse"] == pytest.approx(of_one["mse"], rel=0.02)
    assert of_two["codebooks"][0]["size"] == of_one["codebooks"][0]["size"] == 32


@pytest.mark.slow
def test_measure_by_torchrun_writes_the_stats_of_one_process(codebook: Callable[..., Outcome], tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    arguments = ("measure", "--limit", 200, "--batch-size", 16, "--json", "--stats")
    alone, shared = codebook(*arguments, one), torchrun(*arguments, two)
    assert shared.exit_code == 0 and alike(alone.json["stages"], shared.json["stages"], 1e-9), shared
    counts = [load_file(path)["_vq_vae._embedding.weight/counts"] for path in (one, two)]
    assert torch.equal(*counts)


@pytest.mark.slow
def test_an_error_of_all_is_told_once(tmp_path: Path) -> None:
    found = torchrun("refit", "--k", 0, "-o", tmp_path / "out.safetensors")
    assert found.exit_code == 1 and said(found) == ["error: k=0 is below 1; use --k 1 or more"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_unreadable_image_in_the_second_process_part_ends_both(
    tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, file in enumerate(sorted(images_folder.rglob("*.png"))):
        (folder / f"{i:03d}.png").write_bytes(file.read_bytes())
    calibration = split(find_images([folder])).calibration
    name = calibration[-1].name
    (folder / name).write_bytes(b"no picture")
    batch = next(size for size in range(20, 3, -1) if (len(calibration) - 1) // size % 2 == 1)
    given = ("--data", folder, "--input-range", "0,1", "--batch-size", batch)
    found = torchrun("refit", tiny, "--k", 4, "--steps", 0, *given, "-o", tmp_path / "out.safetensors")
    assert found.exit_code == 1 and found.stdout == ""
    (line,) = said(found)
    assert line.startswith(f"error: cannot read image {name}: ")
    assert not (tmp_path / "out.safetensors").exists()
    assert set(re.findall(r"exitcode  : (-?\d+)", found.stderr)) <= {"1", "-15"}  # the first may be ended by torchrun


@pytest.mark.slow
def test_wrong_usage_is_told_once() -> None:
    found = torchrun("refit", "--kk", "3")
    assert found.stderr.count("No such option: --kk") == 1
