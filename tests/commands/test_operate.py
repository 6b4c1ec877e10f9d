"""The whole operation: what is written is what was measured, and the maps say what became of every code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEAD, State, WriteModel
from sources_of_images import find_images
from surgeries import NO_STEPS, do, maps_of, output_of, written
from torch import Tensor
from tutorial_networks import Tutorial

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.write import tensor_bytes
from codebook_tools.codebook import Codebook, Strategy
from codebook_tools.data.splits import split
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.figures import Measurement
from codebook_tools.evaluation.usage import survey
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.remapping.nearest_map import nearest_map
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Prune, Refit
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.dry_run import plan
from codebook_tools.workflows.operate import measure_model, operate
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import Result
from codebook_tools.workflows.verify import verify_checkpoint

Ask = Callable[..., Request]
FEW_STEPS = FineTune(steps=12, batch_size=16, lr=1e-3, optimizer="adam")
RUINOUS = FineTune(steps=3, batch_size=16, lr=30.0)
VARIANTS = (
    "plain", "ema", "weight_norm_older", "weight_norm_newer", "module_prefix", "tied", "extra",
    "float16", "bfloat16", "float64",
)  # fmt: skip


@pytest.fixture
def ask(images_folder: Path) -> Ask:
    """ask(model): the tiny images, input range [-1, 1]."""
    given = {"data": (str(images_folder),), "input_range": (-1.0, 1.0)}
    return lambda model, **more: Request(model, **given | more)


@pytest.fixture
def encoded(images_folder: Path, image_tensor: Tensor) -> Callable[[State], Tensor]:
    """encoded(state): the latents, (n, dim) float64, of the calibration images, computed without the package."""
    items = find_images([images_folder])
    names = {item.name for item in split(items).calibration}
    pixels = image_tensor[[item.name in names for item in items]] * 2 - 1
    return lambda state: Tutorial(state).encode(pixels).movedim(1, -1).flatten(0, -2)


def assigned(latents: Tensor, codes: Tensor) -> Tensor:
    return (latents[:, None] - codes.double()).square().sum(2).argmin(1)


# --- what became of every code
def test_pruning_dead_codes_changes_no_reconstruction(tiny: Path, ask: Ask, variants: dict[str, State]) -> None:
    result = do(ask(tiny), Prune())
    index_map, nearest = maps_of(result)[CODEBOOK]
    alive = [i for i in range(16) if i not in DEAD]
    assert index_map.dtype == nearest.dtype == torch.int64
    assert index_map.tolist() == [alive.index(i) if i in alive else -1 for i in range(16)]
    old, new = variants["plain"][CODEBOOK], written(result)[CODEBOOK]
    assert tensor_bytes(new) == tensor_bytes(old[alive])
    assert nearest[alive].tolist() == list(range(len(alive)))
    for code in DEAD:
        assert nearest[code] == (old[code] - new).square().sum(1).argmin()
    assert result.surgery is not None and result.kept == "surgery"
    assert result.surgery.mse == result.before.mse and result.surgery.ssim == result.before.ssim
    used, before = (replace(m.codebooks[0], size=16, usage=0, coverage=None) for m in (result.surgery, result.before))
    assert used == before  # coverage is held against a k-means of the new size


def test_keeping_the_most_used_codes_sends_each_other_to_where_most_of_its_latents_go(
    tiny: Path, ask: Ask, variants: dict[str, State], encoded: Callable[[State], Tensor]
) -> None:
    result = do(ask(tiny), Prune(keep=4))
    index_map, nearest = maps_of(result)[CODEBOOK]
    old, new = variants["plain"][CODEBOOK], written(result)[CODEBOOK]
    before, after = (assigned(encoded(variants["plain"]), codes) for codes in (old, new))
    counts, kept = torch.bincount(before, minlength=16), (index_map >= 0).nonzero()[:, 0]
    assert len(kept) == 4 and index_map[kept].tolist() == nearest[kept].tolist() == [0, 1, 2, 3]
    assert counts[kept].min() >= counts[index_map < 0].max() and torch.equal(new, old[kept])
    for code in set(range(16)) - set(kept.tolist()):
        hits = torch.bincount(after[before == code], minlength=4)
        distances = (old[code].double() - new.double()).square().sum(1)
        assert hits[nearest[code]] == hits.max() if hits.any() else nearest[code] == distances.argmin()


def revived(result: Result) -> int:
    """How many codes are revived in the state that fine-tuning keeps."""
    best = min((point for point in result.trace if point.step), key=lambda point: point.validation_mse)
    return best.revived


def test_revived_codes_lose_their_identity_and_the_others_keep_it(tiny: Path, ask: Ask) -> None:
    result = do(ask(tiny), None, FEW_STEPS)
    assert result.kept == "finetuned" and result.surgery is None
    index_map, nearest = maps_of(result)[CODEBOOK]
    gone = [code for code in range(16) if index_map[code] == -1]
    assert len(gone) == revived(result) > 0 and set(gone) <= set(DEAD)
    assert all(index_map[code] == nearest[code] == code for code in range(16) if code not in gone)
    pruned = do(ask(tiny), Prune(), FEW_STEPS)
    assert pruned.kept == "finetuned"
    kept = [int(code) for code in maps_of(pruned)[CODEBOOK][0] if code >= 0]
    assert kept == sorted(set(kept)) and len(kept) == 10 - revived(pruned)


def test_a_code_without_identity_goes_with_most_of_its_latents_and_without_latents_to_the_nearest() -> None:
    old = Codebook(torch.tensor([[0.0], [1.0], [5.0], [9.0]]))
    new = Codebook(torch.tensor([[0.1], [2.0], [6.0]]))
    index_map = torch.tensor([-1, -1, 0, -1])
    old_codes = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    new_codes = torch.tensor([1, 2, 2, 2, 0, 1, 1])
    # 0 goes to 2 with two of its three, 1 to the lower of two equals, 2 kept its identity, 3 had no latents.
    assert nearest_map(index_map, old, new, (old_codes, new_codes)).tolist() == [2, 0, 0, 2]


def test_after_fine_tuning_maps_and_counts_are_those_of_the_trained_encoder(
    write_model: WriteModel, ask: Ask, variants: dict[str, State], encoded: Callable[[State], Tensor]
) -> None:
    result = do(ask(write_model("ema")), Refit(6), replace(FEW_STEPS, lr=0.02))
    assert result.kept == "finetuned"
    new = written(result)
    untrained, now = encoded(variants["ema"]), assigned(encoded(new), new[CODEBOOK])
    counts = torch.bincount(now, minlength=6)
    without_training = torch.bincount(assigned(untrained, new[CODEBOOK]), minlength=6)
    assert (counts - without_training).abs().sum() > 20  # so that the difference can be seen
    hits_or_one = counts.clamp(min=1)  # as a code without hits is written
    assert (new["_vq_vae._ema_cluster_size"] - hits_or_one).abs().sum() <= 2  # rounding may move a latent between two
    _, nearest = maps_of(result)[CODEBOOK]
    before = assigned(untrained, variants["ema"][CODEBOOK])
    for code in set(range(16)) - set(DEAD):
        hits = torch.bincount(now[before == code], minlength=6)
        assert hits[nearest[code]] >= hits.max() - 1


# --- the file is what was measured
def kept_stage(result: Result) -> Measurement:
    stage = result.stages[str(result.kept)]
    assert stage is not None
    return stage


@pytest.mark.parametrize(
    ("variant", "strategy", "recipe", "kept"),
    [
        *((variant, Refit(4), replace(FEW_STEPS, steps=4), "finetuned") for variant in VARIANTS),  # K is the dimension
        ("extra", Prune(), NO_STEPS, "surgery"),
        ("float16", Refit(6), RUINOUS, "surgery"),
        ("tied", None, FEW_STEPS, "finetuned"),
        ("ema", None, RUINOUS, "before"),
    ],
    ids=str,
)
def test_the_file_holds_the_kept_stage_and_passes_every_check(
    variant: str, strategy: Strategy | None, recipe: FineTune, kept: str, write_model: WriteModel, ask: Ask,
    variants: dict[str, State],
) -> None:  # fmt: skip
    result = do(ask(write_model(variant)), strategy, recipe)
    assert result.kept == kept
    assert measure_model(ask(output_of(result)), Watch()).before == kept_stage(result)
    old, new = variants[variant], written(result)
    key = result.before.codebooks[0].key
    companions = {name for name in old if "_ema" in name}
    assert {name: tensor.dtype for name, tensor in new.items()} == {name: t.dtype for name, t in old.items()}
    trained = set(json.loads(read_checkpoint(output_of(result)).metadata["codebook_tools.trained_tensors"]))
    assert bool(trained) == (kept == "finetuned") and not {"teacher.head.weight", "step"} & trained
    for name in old.keys() - companions - trained - (set() if kept == "before" else {key}):
        assert tensor_bytes(new[name]) == tensor_bytes(old[name])
    if variant == "tied":
        assert all(torch.equal(new[name], new[name.replace("_layers.1", "_layers.0")]) for name in new)
    if companions:
        counts, sums = (new[next(n for n in companions if end in n)].float() for end in ("cluster_size", "_ema_w"))
        assert counts.shape == new[key].shape[:1] and bool((counts >= 1).all())
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[new[key].dtype]
        torch.testing.assert_close(sums / counts[:, None], new[key].float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("strategy", "recipe", "beside_the_decoder"),
    [
        (None, {"train": "decoder", "codebook_update": "ema"}, {CODEBOOK}),
        (None, {"train": "decoder", "codebook_update": "frozen"}, set()),
        (Refit(3, init="random", iterations=1, seed=2), {"train": "none"}, {CODEBOOK}),
    ],
    ids=["decoder", "frozen codes", "codes alone"],
)
def test_nothing_trains_but_what_is_asked_for(
    strategy: Strategy | None, recipe: dict[str, Any], beside_the_decoder: set[str], tiny: Path, ask: Ask,
    variants: dict[str, State],
) -> None:  # fmt: skip
    result = do(ask(tiny), strategy, replace(FEW_STEPS, lr=0.01, **recipe))
    new, old = written(result), variants["plain"]
    changed = {name for name in old if tensor_bytes(new[name]) != tensor_bytes(old[name])}
    decoder = {name for name in changed if name.startswith("_decoder")}
    assert result.kept == "finetuned" and changed - decoder == beside_the_decoder
    assert bool(decoder) == (recipe["train"] == "decoder")


# --- provenance and repetition
def files_of(path: Path) -> list[bytes]:
    return [path.with_name(path.name + end).read_bytes() for end in (".safetensors", ".index_map.safetensors")]


def test_the_file_says_how_it_was_made_without_times_and_paths_and_the_same_work_gives_the_same_bytes(
    tiny: Path, ask: Ask, tmp_path: Path, images_folder: Path, images_tar: Path
) -> None:
    for name, data in (("one", images_folder), ("two", images_tar)):
        asked = ask(tiny, seed=5, output=tmp_path / f"{name}.safetensors", data=(str(data),))
        result = do(asked, Refit(6, seed=5), FEW_STEPS)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    paths = (tmp_path, images_folder, images_tar)
    assert not any(str(path).encode() in file for path in paths for file in files_of(tmp_path / "two"))
    metadata = read_checkpoint(output_of(result)).metadata
    ours = {name.removeprefix("codebook_tools."): value for name, value in metadata.items() if "codebook" in name}
    assert metadata.keys() - {f"codebook_tools.{name}" for name in ours} == {"format", "note"}
    settings, trained, codebooks = (json.loads(ours.pop(name)) for name in ("settings", "trained_tensors", "codebooks"))
    expected = {"k": 6, "seed": 5, "steps": 12, "init": "kmeans++", "input_range": [-1.0, 1.0]}
    assert settings | expected == settings and [*codebooks] == [CODEBOOK]
    assert trained == sorted(trained) and CODEBOOK not in trained
    assert ours.pop("source_sha256") == hashlib.sha256(tiny.read_bytes()).hexdigest()
    assert re.fullmatch(r"\d+\.\d+.*", ours.pop("version"))
    assert ours == {"command": "refit", "kept": "finetuned", "trained": "encoder,decoder"}


def test_test_images_choose_nothing(tiny: Path, ask: Ask, held_out_folder: Path, tmp_path: Path) -> None:
    files, measured = sorted(held_out_folder.iterdir()), []
    for name, chosen in (("one", files[:6]), ("two", files[6:])):
        (folder := tmp_path / name).mkdir()
        for file in chosen:
            (folder / file.name).write_bytes(file.read_bytes())
        asked = ask(tiny, test_data=(str(folder),), input_range=None, output=tmp_path / f"{name}.safetensors")
        measured.append(kept_stage(do(asked, Refit(6), FEW_STEPS)))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") and measured[0] != measured[1]


def test_a_sample_of_latents_is_owned_up_to(write_model: WriteModel, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(survey.__kwdefaults__ or {}, "limit", 300)
    result = do(ask(write_model("ema")), Refit(6))
    assert any("a sample of 300 of 912 latents" in warning for warning in result.warnings)
    sizes = written(result)["_vq_vae._ema_cluster_size"]
    assert sizes.sum().item() == pytest.approx(912)


# --- before any long work
@pytest.mark.parametrize("name", ["tiny.refit-k6.safetensors", "tiny.refit-k6.index_map.safetensors"])
def test_an_existing_output_is_found_before_anything_is_encoded(name: str, tiny: Path, ask: Ask) -> None:
    (existing := tiny.with_name(name)).write_bytes(b"precious")
    stages = list[str]()
    with pytest.raises(CodebookError, match=f"{name} exists"):
        operate("refit", ask(tiny), Refit(6), NO_STEPS, Watch(lambda stage, *_: stages.append(stage)))
    assert "encode" not in stages and existing.read_bytes() == b"precious"


def test_fine_tuning_wants_validation_images(tiny: Path, ask: Ask, held_out_folder: Path, images_folder: Path) -> None:
    one = next(item for item in find_images([images_folder]) if not item.in_tenth(1))
    asked = ask(tiny, data=(str(images_folder / one.name),), test_data=(str(held_out_folder),))
    with pytest.raises(CodebookError, match="1 calibration images leave the training or validation split empty"):
        do(asked, None, FEW_STEPS)
    assert do(asked, Prune()).kept == "surgery"  # without steps none are wanted


@pytest.mark.parametrize(
    ("variant", "strategy"), [("ema", Refit(6)), ("float16", Prune(keep=4)), ("plain", None)], ids=str
)
def test_a_plan_says_what_would_be_written_and_writes_nothing(
    variant: str, strategy: Strategy | None, write_model: WriteModel, ask: Ask, tmp_path: Path
) -> None:
    asked = ask(tiny := write_model(variant))
    found = plan(type(strategy).__name__.lower() if strategy else "finetune", asked, strategy, FEW_STEPS, Watch())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]
    result = do(asked, strategy, FEW_STEPS)
    assert found.size == {"before": 16, "after": (result.surgery or result.before).codebooks[0].size}
    assert found.outputs == {name: result.outputs[name] for name in ("model", "index_map")}
    assert found.bytes["before"] == result.bytes["before"] and found.seconds["estimate"] > 0
    old_header, new_header = (8 + int.from_bytes(path.read_bytes()[:8], "little") for path in (tiny, output_of(result)))
    assert found.bytes["after"] - old_header == output_of(result).stat().st_size - new_header
    unknown = plan("prune", replace(asked, force=True), Prune(), NO_STEPS, Watch())  # by a threshold
    assert (unknown.size, unknown.outputs) == ({"before": 16, "after": None}, {"model": None, "index_map": None})
    assert unknown.bytes["after"] == unknown.bytes["before"] == tiny.stat().st_size


def test_a_model_that_is_operated_on_again_names_its_last_surgery(tiny: Path, ask: Ask) -> None:
    first = output_of(do(ask(tiny), Prune()))
    second = do(ask(first), Refit(4))
    metadata = read_checkpoint(output_of(second)).metadata
    assert output_of(second).name == "tiny.prune-k10.refit-k4.safetensors"
    assert metadata["codebook_tools.command"] == "refit" and metadata["note"] == "by others"
    assert metadata["codebook_tools.source_sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert not verify_checkpoint(output_of(second), tiny).ok
