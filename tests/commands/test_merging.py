"""A pass in parts, each done by itself: merged in any order it is the pass, and what is no pass is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, State, WriteModel, assert_refused, contents
from safetensors.torch import load_file, save_file
from weight_files import metadata_of

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.sealed_file import SEAL, sealed
from codebook_tools.checkpoints.tensors import Stored
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.usage import survey
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows import measure_shards
from codebook_tools.workflows.measure_shards import parse_shard, sample_limit
from codebook_tools.workflows.operate import measure_model
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_request

N, SAMPLE = 4, 300
Change = Callable[[State, dict[str, str]], object]
"""Of a file's tensors and metadata."""


@pytest.fixture
def data(images_folder: Path, held_out_folder: Path) -> tuple[object, ...]:
    """60 calibration images in 9 batches, 12 test images in 2: of 4 shards, 2 see no test data."""
    return "--data", images_folder, "--test-data", held_out_folder, "--batch-size", 7


@pytest.fixture(scope="module")
def done(
    variants: dict[str, State], images_folder: Path, held_out_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One pass and its shards, each with a sample of 300 latents, in files of their own: whole.safetensors,
    shard-1.safetensors, ..."""
    folder = tmp_path_factory.mktemp("merging")
    save_file(variants["ema"], folder / "tiny.safetensors", {"format": "pt", "note": "by others"})
    asked = Request(folder / "tiny.safetensors", (str(images_folder),), (str(held_out_folder),), batch_size=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_shards, "SAMPLE", SAMPLE)
        whole = measure_model(asked, Watch(), folder / "whole.safetensors")
        (folder / "whole.json").write_text(json.dumps(whole.to_json()))
        for i in range(1, N + 1):
            part = measure_model(asked, Watch(), folder / f"shard-{i}.safetensors", (i, N))
            assert (part.before is None) == (i > 2) and part.settings["shard"] == f"{i}/{N}"
    return folder


@pytest.fixture
def tiny(done: Path, tmp_path: Path) -> Path:
    """The model, beside copies of all else."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def shards(tiny: Path) -> list[Path]:
    return [tiny.with_name(f"shard-{i}.safetensors") for i in range(1, N + 1)]


@pytest.fixture
def merge(codebook: Run, tiny: Path) -> Run:
    return lambda *files: codebook("measure", tiny, "--merge", *files)


def tensor(path: Path, name: str) -> torch.Tensor:
    return load_file(path)[f"{CODEBOOK}/{name}"]


def test_shards_in_any_order_are_the_pass_to_the_last_byte(
    done: Path, codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_shards, "SAMPLE", SAMPLE)
    one = json.loads((done / "whole.json").read_text())
    shards = sorted(done.glob("shard-*.safetensors"))
    assert sum(int(tensor(path, "counts").sum()) for path in shards) == 60 * 16
    model, out = done / "tiny.safetensors", tmp_path / "merged.safetensors"
    for order in (shards, [shards[i] for i in (2, 0, 3, 1)]):
        merged = codebook("measure", model, "--merge", *order, "--stats", out, "--force", "--json")
        assert merged.exit_code == 0 and merged.stderr == "", merged.stderr
        assert all(merged.json[name] == one[name] for name in ("stages", "bytes", "family", "seed"))
        assert out.read_bytes() == (done / "whole.safetensors").read_bytes()
    assert one["stages"]["before"]["codebooks"][0]["coverage"] is not None
    assert len(tensor(out, "sample")) == SAMPLE
    again = codebook("measure", model, "--merge", out, "--json")  # the only part of one
    assert again.json["stages"] == one["stages"]


def test_the_sample_is_what_a_survey_draws(tiny: Path, images_folder: Path, held_out_folder: Path) -> None:
    opened = open_request(Request(tiny, (str(images_folder),), (str(held_out_folder),), batch_size=11), Watch())
    whole = tiny.with_name("whole.safetensors")
    stream, codes = opened.model.latents(opened.calibration, 11), opened.model.books[0].codebook
    vectors = survey(stream, codes, seed=0, limit=200, watch=Watch()).sample.vectors
    assert torch.allclose(tensor(whole, "sample")[:200], vectors, atol=1e-6)
    hashes = tensor(whole, "sample_hashes").numpy()
    assert hashes.dtype == np.uint64 and bool((hashes[1:] > hashes[:-1]).all()) and len(hashes) == SAMPLE


def test_a_shard_is_of_its_own_batches(
    tiny: Path, codebook: Run, data: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fourth batch of 7: the first shard has the first, the fifth and the ninth, of 4, and 7 test images."""
    command = ("measure", tiny, *data, "--shard", f"1/{N}", "--stats", tmp_path / "shard.safetensors")
    found = codebook(*command)
    assert found.exit_code == 0 and "shard 1/4 alone" in found.stdout and str(command[-1]) in found.stdout
    metadata = metadata_of(tmp_path / "shard.safetensors")
    assert (metadata["codebook_tools.shard"], metadata["codebook_tools.images"]) == ("1/4", "18")
    monkeypatch.setattr("codebook_tools.runtime.distributed.count", lambda: 2)
    assert_refused(codebook(*command), "torchrun's 2 processes part the data already")


def test_shards_that_hold_all_latents_are_the_pass_too_and_unreadable_items_are_counted_once(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    (folder := tmp_path / "images").mkdir()
    for i, picture in enumerate(sorted(images_folder.rglob("*.png"))):
        (folder / f"{i:02d}.png").write_bytes(picture.read_bytes() if i not in (3, 40) else b"not a picture")
    given = ("--data", folder, "--batch-size", 8, "--skip-bad")
    whole, part_1, part_2, out = (tmp_path / f"{name}.safetensors" for name in ("one-pass", "1", "2", "out"))
    one = codebook("measure", tiny, *given, "--stats", whole, "--json")
    for shard, part in (("1/2", part_1), ("2/2", part_2)):
        assert codebook("measure", tiny, *given, "--shard", shard, "--stats", part).exit_code == 0
    two = codebook("measure", tiny, "--merge", part_2, part_1, "--stats", out, "--json")
    assert two.json["stages"] == one.json["stages"]
    assert "2 unreadable" in two.json["warnings"][-1] and "2 unreadable" in one.json["warnings"][-1]
    assert out.read_bytes() == whole.read_bytes() and len(tensor(out, "sample")) == int(tensor(out, "counts").sum())


# --- what is refused
def test_missing_shards_are_named_with_a_command(shards: list[Path], tiny: Path, merge: Run, tmp_path: Path) -> None:
    before = contents(tmp_path)
    found = merge(*shards[:2], "--stats", tmp_path / "out.safetensors")
    assert_refused(found, "shards 3, 4 of 4 missing")
    assert f"codebook measure {tiny} --shard 3/4 --stats FILE --seed 0 --batch-size 7`" in found.stderr
    assert contents(tmp_path) == before
    for path, number in zip(shards[:2], (1, 7), strict=True):
        resealed(path, lambda _, m, n=number: m.update({"codebook_tools.shard": f"{n}/{10**24}"}))
    message = f"shards 2, 3, 4, 5, 6 and {10**24 - 7} more of {10**24} missing; run"
    assert_refused(merge(*shards[:2]), message)
    resealed(shards[0], lambda _, metadata: metadata.update({"codebook_tools.shard": "0/8"}))
    message = "shard-1.safetensors is damaged: it says that it is part 0 of 8; measure that part anew"
    assert_refused(merge(shards[0]), message)


def test_what_does_not_go_together_is_refused(
    shards: list[Path], merge: Run, codebook: Run, write_model: WriteModel, variants: dict[str, State]
) -> None:
    assert_refused(merge(*shards, shards[2]), "are both shard 3 of 4; give each once")
    assert_refused(codebook("measure", shards[0], "--merge", *shards[1:]), "is a part itself; MODEL comes first")
    other = write_model(name="other", state=variants["ema"] | {CODEBOOK: variants["ema"][CODEBOOK] + 1})
    assert_refused(codebook("measure", other, "--merge", *shards), "another checkpoint than")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", 6), "is of batch size 6,"),
        (("--seed", 3), "is of seed 3,"),
        (("--precision", "bf16"), "is of precision bf16,"),
        (("--metric", "cosine"), "is of metric cosine,"),
        (("--input-range", "0,1"), "is of input range [0.0, 1.0],"),
        (("--limit", 5), "is of images"),
        (("--shard", "2/9"), "is of shards 9,"),
        ((), "of different data"),
    ],
    ids=str,
)
def test_shards_of_other_settings_or_data_are_refused_with_what_differs(
    options: tuple[object, ...], message: str, shards: list[Path], codebook: Run, merge: Run, data: tuple[object, ...],
    images_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    moved = shutil.copytree(images_folder, tmp_path / "moved")
    picture = min(moved.rglob("*.png"))  # in training data under either name
    picture.rename(picture.with_name("moved.png"))
    given = (*data, "--shard", f"2/{N}", *options) if options else ("--data", moved, *data[2:], "--shard", f"2/{N}")
    made = codebook("measure", tmp_path / "tiny.safetensors", *given, "--stats", shards[1], "--force")
    assert made.exit_code == 0, made.stderr
    refused = merge(*shards)
    assert_refused(refused, message)
    assert "shard-2.safetensors" in refused.stderr and "shard-1.safetensors" in refused.stderr


def test_what_cannot_be_parted_or_merged_is_refused(tiny: Path, codebook: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    before = contents(tiny.parent)
    for arguments, message in {
        ("--shard", "3/8"): "--shard without --stats",
        ("--shard", "9/8", "--stats", "x"): "--array=1-8",
        ("--shard", f"1/{'9' * 5000}", "--stats", "x"): "N below a million",
        ("--shard", "1/2", "--stats", "x", "--merge", "x"): "give one of the two",
        ("--shard", "1/2", "--stats", "x", "--latents", "l.npy"): "--latents are read in one pass",
        ("--merge", "x", "--data", "images"): "--merge adds what was measured before",
        ("--merge", "x"): "no such file: x",
    }.items():
        assert_refused(codebook("measure", tiny, *arguments), message)
        assert contents(tiny.parent) == before
    assert [parse_shard(text) for text in ("1/1", "3/8", "8/8")] == [(1, 1), (3, 8), (8, 8)]
    for text in ("0/8", "9/8", "-1/8", "1/0", "a/b", "1/8/2", "", "1.0/8"):
        with pytest.raises(CodebookError, match="expected I/N"):
            parse_shard(text)


def test_what_is_no_part_of_a_pass_is_refused(shards: list[Path], tiny: Path, codebook: Run, merge: Run) -> None:
    latents = tiny.parent / "latents.npy"
    np.save(latents, np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32))
    stats = tiny.parent / "stats.safetensors"
    assert codebook("measure", tiny, "--latents", latents, "--stats", stats).exit_code == 0
    for file in (tiny, stats):
        assert_refused(merge(file), "is no part of a pass over images")
    for command in (("prune",), ("refit", "--k", 4)):
        assert_refused(codebook(*command, tiny, "--stats", shards[0]), "is part 1/4 of a pass")


def flipped(path: Path, key: str) -> None:
    """One bit in the first number of a tensor."""
    entry = read_checkpoint(path).entries[key]
    assert isinstance(entry, Stored)
    data = bytearray(path.read_bytes())
    data[entry.start] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("key", ["counts", "sample"])
def test_a_flipped_bit_is_found(key: str, shards: list[Path], tiny: Path, codebook: Run, merge: Run) -> None:
    """One in the counts removed a code that is used, and verify found the result sound."""
    for path in (whole := tiny.with_name("whole.safetensors"), shards[2]):
        flipped(path, f"{CODEBOOK}/{key}")
    assert_refused(merge(*shards), "shard-3.safetensors is damaged")
    assert_refused(codebook("refit", tiny, "--k", 4, "--stats", whole), f"{CODEBOOK}/{key} is not what was written")


def resealed(path: Path, change: Change) -> None:
    """Other tensors and metadata in a file, under a seal that fits them."""
    tensors, metadata = load_file(path), metadata_of(path)
    del metadata[SEAL]
    change(tensors, metadata)
    save_file(tensors, path, sealed(tensors, metadata))


DAMAGES: dict[str, Change] = {
    "no counts": lambda tensors, _: tensors.pop(f"{CODEBOOK}/counts"),
    "no sample": lambda tensors, _: tensors.pop(f"{CODEBOOK}/sample"),
    "another dim": lambda tensors, _: tensors.update(
        {f"{CODEBOOK}/sample": tensors[f"{CODEBOOK}/sample"][:, :2].clone()}
    ),
    "short sums": lambda tensors, _: tensors.update({"measured/integers": tensors["measured/integers"][:-1].clone()}),
    "no settings": lambda _, metadata: metadata.update({"codebook_tools.about": "{"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named(damage: str, shards: list[Path], merge: Run) -> None:
    resealed(shards[2], DAMAGES[damage])
    assert_refused(merge(*shards), "shard-3.safetensors is damaged")


# --- surgeries on the sample
def test_a_file_of_stats_stays_below_its_limit() -> None:
    assert sample_limit([64]) == sample_limit([8] * 9) == 131_072
    for dims in ([1024], [128] * 32):
        assert 0.99 * (256 << 20) < sample_limit(dims) * sum(4 * dim + 8 for dim in dims) <= 256 << 20


def test_counts_alone_read_no_sample(tiny: Path, codebook: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And they count in full where they stand for more than the sample."""
    read, chunks, whole = list[str](), Stored.chunks, tiny.with_name("whole.safetensors")
    monkeypatch.setattr(Stored, "chunks", lambda entry: read.append(entry.key) or chunks(entry))
    for command in (("prune",), ("quantize", "--k", 4)):
        assert codebook(*command, tiny, "--stats", whole, "--force").exit_code == 0
    assert f"{CODEBOOK}/counts" in read and not any("sample" in key for key in read)
    refit = codebook("refit", tiny, "--k", 4, "--stats", whole, "--json")
    assert refit.exit_code == 0 and any("sample" in key for key in read), refit.stderr
    sizes = load_file(refit.json["outputs"]["model"])["_vq_vae._ema_cluster_size"]
    assert float(sizes.sum()) == pytest.approx(60 * 16) and len(sizes) == 4
    resealed(whole, lambda tensors, _: [tensors.pop(key) for key in list(tensors) if "sample" in key])
    for more in ((), ("--dry-run",)):
        refused = codebook("refit", tiny, "--k", 5, "--stats", whole, *more)
        assert_refused(refused, "--stats holds counts, and this command needs latents")
    assert codebook("prune", tiny, "--stats", whole, "--force").exit_code == 0
