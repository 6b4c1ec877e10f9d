"""Several processes: two real ones, by gloo, do together what one does alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import DEAD, Outcome, Run
from processes import alike, together, torchrun
from runs import BrokenError, breaking_at
from safetensors.torch import load_file
from sources_of_images import Images, find_images

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.data.splits import split
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.evaluation.measure import measure
from codebook_tools.evaluation.one_pass import MediaSource
from codebook_tools.evaluation.usage import survey, tokenize
from codebook_tools.models.load import load_model
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.training import history
from codebook_tools.training.finetune import FineTune, finetune
from codebook_tools.training.resume import SnapshotFile

Values = dict[str, Any]


def collectives() -> Values:
    """What each collective returns in one of two processes."""
    me = distributed.rank()
    values, tensor, messages, calls = torch.tensor([me + 1, me * 2**60]), torch.tensor([1.0 + me]), [], list[int]()

    def work() -> str:
        calls.append(me)
        return f"by {me}"

    results: Values = {
        "part": distributed.part(),
        "slices": [[s.start, s.stop] for s in map(distributed.own_slice, (5, 1))],
        "summed": [distributed.summed(values).tolist(), values.tolist()],
        "gathered": distributed.gathered(torch.full((2 * me, 3), float(me))).tolist(),
        "each": distributed.each(f"of {me}"),
        "of_first": distributed.of_first({"of": me}),
        "by_first": [distributed.by_first(work), calls],
    }
    distributed.follow_first([tensor])
    results["followed"] = tensor.tolist()
    try:
        with distributed.alike(NotFiniteError):
            if me == 1:
                raise NotFiniteError("here alone")
    except NotFiniteError as error:
        results["alike"] = str(error)
    if me == 1:
        distributed.each(None)  # rank 0 has failed
    results["fail"] = [distributed.fail(70 if me else 3, lambda: messages.append("why")), messages]
    if me == 0:
        distributed.each(None)
    return results


@pytest.mark.slow
def test_what_two_processes_send_each_other() -> None:
    for me, results in enumerate(together(collectives)):
        assert results == {
            "part": [me, 2],
            "slices": [[[0, 2], [0, 0]], [[2, 5], [0, 1]]][me],
            "summed": [[3, 2**60], [me + 1, me * 2**60]],
            "gathered": [[1.0] * 3] * 2,
            "each": ["of 0", "of 1"],
            "of_first": {"of": 0},
            "by_first": ["by 0", [] if me else [0]],
            "followed": [1.0],
            "alike": "here alone",
            "fail": [3, [] if me else ["why"]],
        }


def test_a_process_alone_is_the_first_of_one() -> None:
    values, messages = torch.tensor([1, 2]), list[str]()
    with distributed.joined("auto"):
        assert distributed.part() == (0, 1) and distributed.own_slice(5) == slice(0, 5)
        assert distributed.summed(values) is values and distributed.gathered(values) is values
        assert distributed.each(1) == [1] and distributed.by_first(lambda: 2) == 2
        assert distributed.fail(3, lambda: messages.append("why")) == 3 and messages == ["why"]
    with pytest.raises(NotFiniteError, match="mine"), distributed.alike(NotFiniteError):
        raise NotFiniteError("mine")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CodebookError, match="2 processes on 1 GPUs: start as many as there are"):
        distributed.joined("auto").__enter__()


TUNINGS: dict[str, Values] = {
    "even": {"batch_size": 8},
    "uneven": {"batch_size": 5, "codebook_update": "gradient", "loss": "l1"},
    "one image": {"batch_size": 1, "steps": 6},
    "codes alone": {"batch_size": 8, "train": "none"},
    "codes alone by the decoder": {"batch_size": 8, "train": "none", "codebook_update": "gradient"},
    "unreadable": {"batch_size": 6},
    "every option": {"batch_size": 4, "accumulate": 2, "clip": 0.5, "weight_ema": 0.9, "codebook_update": "gradient"},
    "broken off": {"batch_size": 8},
    "begun again": {"batch_size": 8},
    # Of 9 images the slices are 4 and 5: the discriminator and its weight go by all of them.
    "judged": {"batch_size": 9, "adversarial": True, "distill": 0.5, "lr": 1e-4, "codebook_update": "frozen"},
}


def passes(model: str, folder: str) -> Values:
    """The results of passes over the images of a folder with the tiny model, and of fine-tunings."""
    items = find_images([folder])
    running, images = load_model(read_checkpoint(Path(model))), Images(items, 3, 4, skip_bad=True)
    images.part = distributed.part()
    codes, few = running.books[0].codebook, images.subset(items[:3])  # of which the second process has none
    usage = survey(running.latents(images, 4), codes, seed=0, limit=300, watch=Watch())
    (tokens,) = tokenize(running, MediaSource(images, running.pass_through, 4, "tokens"), seed=0, watch=Watch())
    results: Values = {
        "bad": sorted({name for bad in distributed.each(list(images.bad)) for name in bad}),
        "survey": [usage.counts.tolist(), usage.total, usage.error, usage.codes.tolist()],
        "sample": usage.sample.vectors.tolist(),
        "tokens": [tokens.counts.tolist(), tokens.sample.tolist()],
        "measured": measure(running, images, batch=4, structure=False, watch=Watch()).to_json(),
        "few": measure(running, few, batch=4, structure=False, watch=Watch()).to_json(),
        "few sampled": survey(running.latents(few, 4), codes, seed=0, limit=9, watch=Watch()).sample.vectors.tolist(),
    }
    splits, mask = split(items), [torch.tensor([int(i not in DEAD) for i in range(16)])]
    for name, recipe in TUNINGS.items():
        train = [item for item in splits.train if name == "unreadable" or item.name not in results["bad"]]
        watches, saving = [Watch()], None
        if name == "broken off":
            watches.insert(0, breaking_at(7))
            saving = SnapshotFile(Path(model).with_name(f"of {distributed.count()}.safetensors"), {}, resume=True)
        data = images.subset(train), images.subset(splits.validation), FineTune(**{"steps": 12, **recipe}), mask
        for watch in watches:
            trained = load_model(read_checkpoint(Path(model)))
            risen = patch.object(history, "has_risen", lambda steps, trace: trace[-1].step == 4)
            with suppress(BrokenError), risen if name == "begun again" else nullcontext():
                tuned = finetune(trained, *data, seed=0, watch=watch, saving=saving)
        results[name] = [
            [asdict(point) for point in tuned.trace],
            tuned.best.step,
            tuned.best.revived[0].tolist(),
            trained.books[0].vectors.tolist(),
            sum(tensor.double().sum().item() for tensor in tuned.best.weights.values()),
        ]
    return results


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the two processes have it: sums that more threads share are rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_find_and_train_what_one_does(tiny: Path, images_folder: Path, tmp_path: Path) -> None:
    folder = numbered(images_folder, tmp_path / "images")
    for i in (5, 6, 17):
        (folder / f"{i:03d}.png").write_bytes(b"no picture")
    alone = passes(str(tiny), str(folder))
    first, second = together(passes, tiny, folder)
    assert first == second, "to the last bit"
    assert len(alone["bad"]) == 3 and alone["sample"] == first["sample"]
    for name, of_one in alone.items():
        assert alike(json.loads(json.dumps(of_one)), first[name], 1e-3 if name in TUNINGS else 1e-9), name
    assert first["broken off"] == first["even"] and alone["broken off"] == alone["even"]
    assert first["begun again"][0][4:] != first["even"][0][4:]
    assert alone["even"][0][-1]["revived"] > 0, "reviving is among what agrees"


def numbered(images_folder: Path, folder: Path) -> Path:
    """The images of a folder as 000.png, 001.png and so on."""
    folder.mkdir()
    for i, file in enumerate(sorted(images_folder.rglob("*.png"))):
        (folder / f"{i:03d}.png").write_bytes(file.read_bytes())
    return folder


def messages_of(done: Outcome) -> list[str]:
    """Our lines among those of torchrun, without their figures: trained ones differ by more than rounding."""
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "warning:"))]
    return [re.sub(r"[+-]?\d+\.\d+", "#", line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "steps"), [("refit", 0), ("condense", 20)])
def test_a_surgery_by_torchrun_is_that_of_one_process(codebook: Run, tmp_path: Path, command: str, steps: int) -> None:
    one, two = tmp_path / "one" / "model.safetensors", tmp_path / "two" / "model.safetensors"
    one.parent.mkdir()
    two.parent.mkdir()
    arguments = (command, "--k", 32, "--limit", 300, "--batch-size", 32, "--steps", steps, "--json")
    alone, shared = codebook(*arguments, "-o", one), torchrun(*arguments, "-o", two)
    assert (alone.exit_code, shared.exit_code, messages_of(shared)) == (0, 0, messages_of(alone)), shared
    for stage, of_one in alone.json["stages"].items():
        of_two = shared.json["stages"][stage]
        if stage == "finetuned" and of_one is not None:
            assert of_two["mse"] == pytest.approx(of_one["mse"], rel=0.02)
            assert of_two["codebooks"][0]["size"] == of_one["codebooks"][0]["size"] == 32
        else:
            assert alike(of_one, of_two, 1e-5), stage
    assert alone.json["settings"] == shared.json["settings"] and alone.json["kept"] == shared.json["kept"]
    assert len(shared.json["trace"]) == len(alone.json["trace"])
    if command == "refit":
        centroids = [load_file(path)["_vq_vae._embedding.weight"] for path in (one, two)]
        torch.testing.assert_close(*centroids, rtol=1e-5, atol=1e-5)
    assert {file.name for file in two.parent.iterdir()} == {file.name for file in one.parent.iterdir()}
    assert codebook("verify", two).exit_code == 0


@pytest.mark.slow
def test_an_error_of_all_is_reported_once(tmp_path: Path) -> None:
    done = torchrun("refit", "--k", 0, "-o", tmp_path / "out.safetensors")
    assert done.exit_code == 1 and messages_of(done) == ["error: k=0 is below 1; use --k 1 or more"]
    assert list(tmp_path.iterdir()) == []
    assert torchrun("refit", "--kk", "3").stderr.count("No such option: --kk") == 1


@pytest.mark.slow
def test_an_unreadable_image_of_the_second_process_ends_both(tiny: Path, images_folder: Path, tmp_path: Path) -> None:
    folder = numbered(images_folder, tmp_path / "images")
    calibration = split(find_images([folder])).calibration
    name = calibration[-1].name
    (folder / name).write_bytes(b"no picture")
    batch = next(size for size in range(20, 3, -1) if (len(calibration) - 1) // size % 2 == 1)
    options = ("--data", folder, "--input-range", "0,1", "--batch-size", batch, "-o", tmp_path / "out.safetensors")
    done = torchrun("refit", tiny, "--k", 4, "--steps", 0, *options)
    assert done.exit_code == 1 and done.stdout == ""
    (line,) = messages_of(done)
    assert line.startswith(f"error: cannot read image {name}: ")
    assert not (tmp_path / "out.safetensors").exists()
    assert set(re.findall(r"exitcode  : (-?\d+)", done.stderr)) <= {"1", "-15"}  # torchrun may end the first
