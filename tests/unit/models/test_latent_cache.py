"""Latents on disk: to the last bit what the encoder made of the same data, and of nothing else."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, assert_refused, contents
from safetensors.torch import load_file, save_file
from sources_of_images import Images, find_images
from torch import Tensor

from codebook_tools.checkpoints.layout import partial_path
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.data.images import array_items
from codebook_tools.errors import CodebookError
from codebook_tools.models.latent_cache import CachedLatents, cached
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model

Read = list[tuple[list[str], Tensor]]
DAMAGED = r"the latents in .*\.safetensors are damaged: delete that file"


@pytest.fixture
def model(tiny: Path) -> Model:
    return load_model(read_checkpoint(tiny))


@pytest.fixture
def asked(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the encoder was asked for, batch by batch."""
    counts, encode = list[int](), model.network.encode

    def watched(media: Tensor) -> Any:
        counts.append(len(media))
        return encode(media)

    monkeypatch.setattr(model.network, "encode", watched)
    return counts


@pytest.fixture
def folder(images_folder: Path, tmp_path: Path) -> Path:
    """A copy of some images, which a test may change."""
    for file in sorted((images_folder / "a").iterdir()):
        put = tmp_path / "images" / file.name
        put.parent.mkdir(exist_ok=True)
        put.write_bytes(file.read_bytes())
    return tmp_path / "images"


def latents_of(model: Model, folder: Path, cache: Path | None, batch: int = 8, **how: Any) -> Any:
    images = Images(find_images([folder]), 3, **how)
    return cached(cache, model.latents(images, batch), model, 0)


def read(latents: Any) -> Read:
    return [([item.name for item in items], rows) for items, rows in latents.by_item()]


def equal(a: Read, b: Read) -> bool:
    return [names for names, _ in a] == [names for names, _ in b] and all(
        torch.equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True)
    )


def test_a_second_reading_asks_no_encoder_and_gives_the_same_bits(
    model: Model, asked: list[int], folder: Path, tmp_path: Path
) -> None:
    plain = read(latents_of(model, folder, None))
    asked.clear()
    first = read(latents_of(model, folder, tmp_path / "cache"))
    assert sum(asked) == 30 and equal(first, plain)
    again = latents_of(model, folder, tmp_path / "cache")
    assert equal(read(again), plain) and equal(read(again), plain) and sum(asked) == 30
    assert torch.equal(torch.cat(list(again)), torch.cat([rows.flatten(0, 1) for _, rows in plain]))
    (file,) = (tmp_path / "cache").iterdir()
    assert tuple(read_checkpoint(file).tensor("latents").shape) == (30, 16, 4)  # and anyone can open it


def test_a_reading_that_stops_early_leaves_nothing(model: Model, folder: Path, tmp_path: Path) -> None:
    latents = latents_of(model, folder, tmp_path / "cache").by_item()
    next(latents)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".partial"]
    latents.close()
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_reading_left_is_in_nobodys_way(model: Model, folder: Path, tmp_path: Path) -> None:
    """It lay there for good, gigabytes of it, under the number of a process that was no more."""
    latents, plain = latents_of(model, folder, tmp_path / "cache"), read(latents_of(model, folder, None))
    partial_path(latents.path).write_bytes(bytes(1_000_000))
    assert equal(read(latents), plain) and equal(read(latents), plain)
    assert list((tmp_path / "cache").iterdir()) == [latents.path]


def test_of_two_readings_at_once_one_keeps_its_latents(model: Model, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = latents_of(model, folder, cache).by_item()
    begun = next(first)
    plain = read(latents_of(model, folder, None))
    assert equal(read(latents_of(model, folder, cache)), plain)
    assert [file.suffix for file in cache.iterdir()] == [".partial"]
    list(first)
    assert len(begun[0]) == 8 and equal(read(latents_of(model, folder, cache)), plain)
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]


def test_parts_are_kept_apart(model: Model, asked: list[int], folder: Path, tmp_path: Path) -> None:
    whole = read(latents_of(model, folder, None))
    for _ in range(2):
        parts = list[Read]()
        for mine in range(2):
            latents = latents_of(model, folder, None)
            latents.images.part = (mine, 2)
            parts.append(read(cached(tmp_path / "cache", latents, model, 0)))
        assert equal([parts[i % 2][i // 2] for i in range(len(whole))], whole)
    assert sum(asked) == 60 and len(list((tmp_path / "cache").iterdir())) == 2


def test_what_could_not_be_read_is_told_again(model: Model, asked: list[int], folder: Path, tmp_path: Path) -> None:
    (folder / "004.png").write_bytes(b"no image")
    for _ in range(2):
        latents = latents_of(model, folder, tmp_path / "cache", skip_bad=True)
        assert [len(names) for names, _ in read(latents)] == [7, 8, 8, 6]
        assert list(latents.encoded.images.bad) == ["004.png"]
    assert sum(asked) == 29


# --- what makes another file -----------------------------------------------------------------------------------------


Change = Callable[[Model, Path], object]
CHANGES: dict[str, Change] = {
    "other pixels": lambda _, folder: (folder / "000.png").write_bytes((folder / "002.png").read_bytes()),
    "a later time": lambda _, folder: os.utime(folder / "000.png", ns=(0, 1)),
    "another name": lambda _, folder: (folder / "000.png").rename(folder / "001.png"),
    "an image less": lambda _, folder: (folder / "000.png").unlink(),
    "a weight": lambda model, _: model.network._encoder._conv_1.weight[0, 0, 0, 0].add_(1e-6),
    "input range": lambda model, _: setattr(model, "input_range", (0.0, 1.0)),
    "bf16": lambda model, _: setattr(model, "bf16", True),
    "compiled": lambda model, _: setattr(model, "compiled", True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_model_or_data_is_another_file(name: str, model: Model, folder: Path, tmp_path: Path) -> None:
    before = latents_of(model, folder, tmp_path / "cache").path
    assert latents_of(model, folder, tmp_path / "cache").path == before
    CHANGES[name](model, folder)
    assert latents_of(model, folder, tmp_path / "cache").path != before


@pytest.mark.parametrize("how", [{"batch": 16}, {"size": 8}, {"mixing": "mix"}])
def test_other_options_are_another_file(how: dict[str, Any], model: Model, folder: Path, tmp_path: Path) -> None:
    paths = {latents_of(model, folder, tmp_path / "cache", **options).path for options in (how, {})}
    assert len(paths) == 2


def test_arrays_in_memory_count_by_their_bytes_and_dtype(model: Model, tmp_path: Path) -> None:
    """Zeros of 16 x 16 floats are as many bytes as those of 32 x 32 pixels, of which the middle is taken."""
    pixels = torch.zeros(4, 32, 32, 3, dtype=torch.uint8).numpy()
    floats = torch.zeros(4, 16, 16, 3).numpy()
    other = pixels.copy()
    other[0, 0, 0, 0] = 1
    paths = []
    for rows in (pixels, pixels.copy(), other, floats):
        images = Images(array_items("x.npy", rows), 3, size=16)
        latents = cached(tmp_path, model.latents(images, 2), model, 0)
        assert isinstance(latents, CachedLatents)
        paths.append(latents.path)
    assert paths[0] == paths[1] and len(set(paths)) == 3


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(at: int) -> Callable[[bytearray], bytes]:
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at:][1:]


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-1], lambda c: c[:100], lambda _: b"", *map(flip, (0, 20, 4096, 7000, -1, -40))],
    ids=["end", "header", "empty", "length", "json", "first latent", "later latent", "bad", "sums"],
)
def test_a_damaged_file_is_named_with_the_way_out(
    damage: Callable[[bytearray], bytes], model: Model, folder: Path, tmp_path: Path
) -> None:
    latents = latents_of(model, folder, tmp_path / "cache")
    read(latents)
    latents.path.write_bytes(damage(bytearray(latents.path.read_bytes())))
    with pytest.raises(CodebookError, match=DAMAGED):
        read(latents)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("places", lambda places: places + 10**6),
        ("places", lambda places: places[:-1]),
        ("ends", lambda ends: ends.flip(0)),
        ("sums", lambda sums: sums[:-1]),
        ("bad", lambda _: torch.tensor(list(b"[1]"))),
        ("bad", lambda _: torch.tensor([-1, 300])),
        ("latents", lambda latents: latents.double()),
        ("latents", lambda latents: latents.flatten(1)),
    ],
)
def test_a_file_that_another_program_sealed_is_named_too(
    name: str, wrong: Callable[[torch.Tensor], torch.Tensor], model: Model, folder: Path, tmp_path: Path
) -> None:
    """Its checksum is right: whoever wrote the file made it."""
    latents = latents_of(model, folder, tmp_path / "cache")
    read(latents)
    held = load_file(latents.path)
    held[name] = wrong(held[name]).contiguous()
    checksum = zlib.crc32(b"".join(held[one].numpy().tobytes() for one in ("places", "ends", "sums", "bad")))
    save_file(held, latents.path, {"check": str(checksum)})
    with pytest.raises(CodebookError, match=DAMAGED):
        read(latents)


def test_a_folder_that_is_a_file_is_refused(model: Model, folder: Path) -> None:
    with pytest.raises(CodebookError, match=r"cannot keep latents in .*000\.png: File exists"):
        latents_of(model, folder, folder / "000.png")


# --- as a whole ------------------------------------------------------------------------------------------------------


def test_a_refit_writes_the_same_bytes_with_a_cache_and_from_it(
    codebook: Callable[..., Outcome], tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    outputs, cache = [], ("--latents-cache", tmp_path / "c")
    for name, more in {"plain": (), "first": cache, "second": cache}.items():
        out = tmp_path / name / "out.safetensors"
        out.parent.mkdir()
        done = codebook("refit", tiny, "--k", 8, "--data", images_folder, "--steps", 0, "-o", out, "--json", *more)
        assert done.exit_code == 0, done
        outputs.append((contents(out.parent), done.json["stages"]))
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(list((tmp_path / "c").iterdir())) == 1
    refused = codebook("refit", tiny, "--k", 8, "--latents", "x.npy", "--latents-cache", tmp_path / "c")
    assert_refused(refused, "--latents lie on disk already; leave out --latents-cache")
