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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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

N = 4


@pytest.fixture
def data(images_folder: Path, held_out_folder: Path) -> tuple[object, ...]:
    """60 calibration images in 9 batches, 12 test images in 2: of 4 shards, 2 see no test data."""
    return "--data", images_folder, "--test-data", held_out_folder, "--batch-size", 7


def measured(folder: Path, state: State, data: Path, test_data: Path) -> None:
    """One pass and its shards, in files of their own: whole.safetensors, shard-1.safetensors, ..."""
    save_file(state, folder / "tiny.safetensors", {"format": "pt", "note": "by others"})
    asked = Request(folder / "tiny.safetensors", (str(data),), (str(test_data),), batch_size=7)
    whole = measure_model(asked, Watch(), folder / "whole.safetensors")
    (folder / "whole.json").write_text(json.dumps(whole.to_json()))
    for i in range(1, N + 1):
        part = measure_model(asked, Watch(), folder / f"shard-{i}.safetensors", (i, N))
        assert (part.before is None) == (i > 2) and part.settings["shard"] == f"{i}/{N}"


@pytest.fixture(scope="module")
def done(
    variants: dict[str, State], images_folder: Path, held_out_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("merging")
    measured(folder, variants["plain"], images_folder, held_out_folder)
    return folder


@pytest.fixture
def tiny(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(done / "tiny.safetensors", tmp_path))


@pytest.fixture
def shards(done: Path, tmp_path: Path) -> list[Path]:
    return [Path(shutil.copy(done / f"shard-{i}.safetensors", tmp_path)) for i in range(1, N + 1)]


@pytest.fixture
def whole(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(done / "whole.safetensors", tmp_path))


def tensor(path: Path, name: str) -> torch.Tensor:
    return load_file(path)[f"{CODEBOOK}/{name}"]


@pytest.fixture(scope="module")
def sampled(
    variants: dict[str, State], images_folder: Path, held_out_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """As `done`, of files that hold a sample of 100 latents."""
    folder = tmp_path_factory.mktemp("sampled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_shards, "SAMPLE", 100)
        measured(folder, variants["plain"], images_folder, held_out_folder)
    return folder


@pytest.mark.parametrize(("kind", "sample"), [("done", 960), ("sampled", 100)])
def test_shards_in_any_order_are_the_pass_to_the_last_byte(
    kind: str, sample: int, request: pytest.FixtureRequest, codebook: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(measure_shards, "SAMPLE", 131_072 if kind == "done" else sample)
    folder: Path = request.getfixturevalue(kind)
    one = json.loads((folder / "whole.json").read_text())
    shards = sorted(folder.glob("shard-*.safetensors"))
    assert sum(int(tensor(path, "counts").sum()) for path in shards) == 60 * 16
    model, out = folder / "tiny.safetensors", tmp_path / "merged.safetensors"
    for order in (shards, [shards[i] for i in (2, 0, 3, 1)]):
        merged = codebook("measure", model, "--merge", *order, "--stats", out, "--force", "--json")
        assert merged.exit_code == 0 and merged.stderr == "", merged.stderr
        assert all(merged.json[name] == one[name] for name in ("stages", "bytes", "family", "seed"))
        assert out.read_bytes() == (folder / "whole.safetensors").read_bytes()
    assert one["stages"]["before"]["codebooks"][0]["coverage"] is not None
    assert len(tensor(out, "sample")) == sample
    again = codebook("measure", model, "--merge", out, "--json")  # the only part of one
    assert again.json["stages"] == one["stages"]


def test_the_sample_is_what_a_survey_of_the_same_data_draws(
    whole: Path, tiny: Path, images_folder: Path, held_out_folder: Path
) -> None:
    asked = Request(model=tiny, data=(str(images_folder),), test_data=(str(held_out_folder),), batch_size=11)
    opened = open_request(asked, Watch())
    stream, codes = opened.model.latents(opened.calibration, 11), opened.model.books[0].codebook
    seen = survey(stream, codes, seed=0, limit=200, watch=Watch())
    sample, hashes = (tensor(whole, name) for name in ("sample", "sample_hashes"))
    assert torch.allclose(sample[:200], seen.sample.vectors, atol=1e-6)
    ordered = hashes.numpy()
    assert ordered.dtype == np.uint64 and bool((ordered[1:] > ordered[:-1]).all()) and len(ordered) == 960


def test_a_shard_is_of_its_own_batches(tiny: Path, codebook: Run, data: tuple[object, ...], tmp_path: Path) -> None:
    """Every fourth batch of 7: the first shard has the first, the fifth and the ninth, of 4, and 7 test images."""
    path = tmp_path / "shard.safetensors"
    found = codebook("measure", tiny, *data, "--shard", f"1/{N}", "--stats", path)
    assert found.exit_code == 0 and "shard 1/4 alone" in found.stdout and str(path) in found.stdout
    with safe_open(path, "pt") as file:
        assert (file.metadata()["codebook_tools.shard"], file.metadata()["codebook_tools.images"]) == ("1/4", "18")


def test_unreadable_items_of_all_shards_are_counted_once(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, picture in enumerate(sorted(images_folder.rglob("*.png"))):
        (folder / f"{i:02d}.png").write_bytes(picture.read_bytes() if i not in (3, 40) else b"not a picture")
    given = ("--data", folder, "--batch-size", 8, "--skip-bad")
    one = codebook("measure", tiny, *given, "--stats", tmp_path / "whole.safetensors", "--json")
    for i in (1, 2):
        part = tmp_path / f"{i}.safetensors"
        assert codebook("measure", tiny, *given, "--shard", f"{i}/2", "--stats", part).exit_code == 0
    out = tmp_path / "out.safetensors"
    two = codebook(
        "measure", tiny, "--merge", tmp_path / "2.safetensors", tmp_path / "1.safetensors", "--stats", out, "--json"
    )
    assert two.json["stages"] == one.json["stages"]
    assert "2 unreadable" in two.json["warnings"][-1] and "2 unreadable" in one.json["warnings"][-1]
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


# --- what is refused -----------------------------------------------------------------------------------------------


def test_missing_shards_are_named_with_the_command_that_makes_them(
    shards: list[Path], tiny: Path, codebook: Run, tmp_path: Path
) -> None:
    before = contents(tmp_path)
    found = codebook("measure", tiny, "--merge", *shards[:2], "--stats", tmp_path / "out.safetensors")
    assert_refused(found, "shards 3, 4 of 4 missing")
    assert f"codebook measure {tiny} --shard 3/4 --stats FILE --seed 0 --batch-size 7`" in found.stderr
    assert contents(tmp_path) == before


def relabel(shard: str) -> Callable[[State, dict[str, str]], object]:
    return lambda _, metadata: metadata.update({"codebook_tools.shard": shard})


def test_of_more_shards_than_there_could_be_the_first_missing_are_named(
    shards: list[Path], tiny: Path, codebook: Run
) -> None:
    for path, number in zip(shards[:2], (1, 7), strict=True):
        resealed(path, relabel(f"{number}/{10**24}"))
    found = codebook("measure", tiny, "--merge", *shards[:2])
    assert_refused(found, f"shards 2, 3, 4, 5, 6 and {10**24 - 7} more of {10**24} missing; run")
    resealed(shards[0], relabel("0/8"))
    found = codebook("measure", tiny, "--merge", *shards[:1])
    assert_refused(found, "shard-1.safetensors is damaged: it says that it is part 0 of 8; measure that part anew")


def test_what_does_not_go_together_is_refused(
    shards: list[Path], tiny: Path, codebook: Run, tmp_path: Path, variants: dict[str, State]
) -> None:
    assert_refused(codebook("measure", tiny, "--merge", *shards, shards[2]), "are both shard 3 of 4; give each once")
    assert_refused(codebook("measure", shards[0], "--merge", *shards[1:]), "is a part itself; MODEL comes first")
    other = tmp_path / "other.safetensors"
    save_file(variants["plain"] | {CODEBOOK: variants["plain"][CODEBOOK] + 1}, other)
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
        (("--data", "MOVED"), "of different data"),
    ],
    ids=str,
)
def test_shards_of_other_settings_or_data_are_refused_with_what_differs(
    options: tuple[str, object],
    message: str,
    shards: list[Path],
    tiny: Path,
    codebook: Run,
    data: tuple[object, ...],
    images_folder: Path,
    tmp_path: Path,
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(images_folder, moved)
    picture = next(iter(sorted(moved.rglob("*.png"))))  # in training data under either name
    picture.rename(picture.with_name("moved.png"))
    given = {"--shard": f"2/{N}", **dict(zip(data[::2], data[1::2], strict=True)), options[0]: options[1]}
    if options[1] == "MOVED":
        given["--data"] = moved
    listed = [part for pair in given.items() for part in pair]
    made = codebook("measure", tiny, *listed, "--stats", shards[1], "--force")
    assert made.exit_code == 0, made.stderr
    found = codebook("measure", tiny, "--merge", *shards)
    assert_refused(found, message)
    assert "shard-2.safetensors" in found.stderr and "shard-1.safetensors" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shard", "3/8"), "--shard without --stats"),
        (("--shard", "9/8", "--stats", "x"), "--array=1-8"),
        (("--shard", f"1/{'9' * 5000}", "--stats", "x"), "N below a million"),
        (("--shard", "1/2", "--stats", "x", "--merge", "x"), "give one of the two"),
        (("--shard", "1/2", "--stats", "x", "--latents", "l.npy"), "--latents are read in one pass"),
        (("--merge", "x", "--data", "images"), "--merge adds what was measured before"),
        (("--merge", "x"), "no such file: x"),
    ],
    ids=str,
)
def test_what_cannot_be_parted_or_merged_is_refused(
    arguments: tuple[str, ...], message: str, tiny: Path, codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    assert_refused(codebook("measure", tiny, *arguments), message)
    assert contents(tmp_path) == before


def test_processes_and_shards_do_not_part_the_data_twice(
    tiny: Path, codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codebook_tools.runtime.distributed.count", lambda: 2)
    found = codebook("measure", tiny, "--shard", "1/2", "--stats", tmp_path / "x.safetensors")
    assert_refused(found, "torchrun's 2 processes part the data already")


def test_what_is_no_part_of_a_pass_is_refused(shards: list[Path], tiny: Path, codebook: Run, tmp_path: Path) -> None:
    latents = tmp_path / "latents.npy"
    np.save(latents, np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32))
    stats = tmp_path / "stats.safetensors"
    assert codebook("measure", tiny, "--latents", latents, "--stats", stats).exit_code == 0
    for file in (tiny, stats):
        assert_refused(codebook("measure", tiny, "--merge", file), "is no part of a pass over images")
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
def test_a_flipped_bit_in_counts_or_latents_is_found(
    key: str, whole: Path, shards: list[Path], tiny: Path, codebook: Run
) -> None:
    """One in the counts removed a code that is used, and verify found the result sound."""
    for path in (whole, shards[2]):
        flipped(path, f"{CODEBOOK}/{key}")
    assert_refused(codebook("measure", tiny, "--merge", *shards), "shard-3.safetensors is damaged")
    assert_refused(codebook("refit", tiny, "--k", 4, "--stats", whole), f"{CODEBOOK}/{key} is not what was written")


def resealed(path: Path, change: Callable[[State, dict[str, str]], object]) -> None:
    """Other tensors and metadata in a file, under a seal that fits them."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    del metadata[SEAL]
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, sealed(tensors, metadata))


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, _: tensors.pop(f"{CODEBOOK}/counts"),
        lambda tensors, _: tensors.pop(f"{CODEBOOK}/sample"),
        lambda tensors, _: tensors.update({f"{CODEBOOK}/sample": tensors[f"{CODEBOOK}/sample"][:, :2].clone()}),
        lambda tensors, _: tensors.update({"measured/integers": tensors["measured/integers"][:-1].clone()}),
        lambda _, metadata: metadata.update({"codebook_tools.about": "{"}),
    ],
    ids=["no counts", "no sample", "another dim", "short sums", "no settings"],
)
def test_a_damaged_part_is_named(
    damage: Callable[[State, dict[str, str]], object], shards: list[Path], tiny: Path, codebook: Run
) -> None:
    resealed(shards[2], damage)
    assert_refused(codebook("measure", tiny, "--merge", *shards), "shard-3.safetensors is damaged")


# --- numbers of shards, and of latents -----------------------------------------------------------------------------


def test_shards_are_numbered_from_one() -> None:
    assert [parse_shard(text) for text in ("1/1", "3/8", "8/8")] == [(1, 1), (3, 8), (8, 8)]
    for text in ("0/8", "9/8", "-1/8", "1/0", "a/b", "1/8/2", "", "1.0/8"):
        with pytest.raises(CodebookError, match="expected I/N"):
            parse_shard(text)


def test_a_file_of_stats_stays_below_its_limit() -> None:
    assert sample_limit([64]) == sample_limit([8] * 9) == 131_072
    for dims in ([1024], [128] * 32):
        assert 0.99 * (256 << 20) < sample_limit(dims) * sum(4 * dim + 8 for dim in dims) <= 256 << 20


# --- surgeries on the sample ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "variant"), [(("refit", "--k", 6), "ema"), (("restart",), "plain"), (("grow", "--k", 12), "plain")]
)
def test_a_sample_that_is_all_latents_does_what_the_images_do(
    command: tuple[object, ...],
    variant: str,
    write_model: WriteModel,
    codebook: Run,
    images_folder: Path,
    tmp_path: Path,
) -> None:
    model, stats = write_model(variant), tmp_path / "stats.safetensors"
    assert codebook("measure", model, "--data", images_folder, "--stats", stats).exit_code == 0
    paths = [tmp_path / "seen.safetensors", tmp_path / "kept.safetensors"]
    for path, of in zip(paths, (("--data", images_folder), ("--stats", stats)), strict=True):
        done = codebook(*command, model, *of, "--steps", 0, "-o", path, "--json")
        assert done.exit_code == 0, done.stderr
    assert done.json["stages"]["surgery"] is None and done.json["stages"]["before"]["split"] == "calibration"
    first, second = map(load_file, paths)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    maps = [load_file(path.with_name(f"{path.stem}.index_map.safetensors")) for path in paths]
    assert all(torch.equal(maps[0][key], maps[1][key]) for key in maps[0])
    assert codebook("verify", paths[1], "--against", model).exit_code == 0


def test_counts_that_stand_for_more_than_the_sample_count_in_full(
    write_model: WriteModel,
    codebook: Run,
    images_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure_shards, "SAMPLE", 456)
    model, stats, out = write_model("ema"), tmp_path / "stats.safetensors", tmp_path / "out.safetensors"
    codebook("measure", model, "--data", images_folder, "--stats", stats)
    assert codebook("refit", model, "--k", 6, "--stats", stats, "-o", out).exit_code == 0
    sizes = load_file(out)["_vq_vae._ema_cluster_size"]
    assert float(sizes.sum()) == pytest.approx(57 * 16) and len(sizes) == 6


def test_counts_alone_do_not_read_the_sample(
    whole: Path, tiny: Path, codebook: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from codebook_tools.checkpoints.tensors import Stored

    read, chunks = list[str](), Stored.chunks
    monkeypatch.setattr(Stored, "chunks", lambda entry: read.append(entry.key) or chunks(entry))
    for command in (("prune",), ("quantize", "--k", 4)):
        assert codebook(*command, tiny, "--stats", whole, "--force").exit_code == 0
    assert f"{CODEBOOK}/counts" in read and not any("sample" in key for key in read)
    assert codebook("refit", tiny, "--k", 4, "--stats", whole, "--force").exit_code == 0
    assert any("sample" in key for key in read)


def test_stats_without_a_sample_are_no_latents(whole: Path, tiny: Path, codebook: Run) -> None:
    resealed(whole, lambda tensors, _: [tensors.pop(key) for key in list(tensors) if "sample" in key])
    for more in ((), ("--dry-run",)):
        refused = codebook("refit", tiny, "--k", 4, "--stats", whole, *more)
        assert_refused(refused, "--stats holds counts, and this command needs latents")
    assert codebook("prune", tiny, "--stats", whole).exit_code == 0
