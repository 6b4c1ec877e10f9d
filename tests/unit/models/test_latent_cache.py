"""Latents kept in memory and on disk: to the last bit what the encoder made of the same data, and of nothing else."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, assert_refused, contents
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


# --- in memory -------------------------------------------------------------------------------------------------------
def test_the_same_batch_is_encoded_once_and_another_anew(model: Model, asked: list[int], image_tensor: Tensor) -> None:
    with torch.no_grad():
        first = model.encode(image_tensor)
        assert torch.equal(model.encode(image_tensor.clone()), first) and len(asked) == 1
        assert torch.equal(model.pass_through(image_tensor).latents[0], first) and len(asked) == 1
        assert not torch.equal(model.encode(image_tensor.flip(0)), first) and len(asked) == 2
        model.input_range = (0.0, 1.0)
        assert not torch.equal(model.encode(image_tensor), first) and len(asked) == 3


def test_other_weights_encode_anew(model: Model, asked: list[int], image_tensor: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    with torch.no_grad():
        first = model.encode(image_tensor)
        model.network._encoder._conv_1.weight.mul_(1.5)
        assert not torch.equal(model.encode(image_tensor), first)
        model.network.load_state_dict(before)
        assert torch.equal(model.encode(image_tensor), first) and len(asked) == 3
        assert not torch.equal(model.with_fresh_network(seed=1).encode(image_tensor), first)


def test_what_was_kept_is_neither_written_into_nor_used_in_training_nor_more_than_the_limit(
    model: Model, asked: list[int], image_tensor: Tensor
) -> None:
    with torch.no_grad():
        first = model.encode(image_tensor).clone()
        for _ in range(3):
            again = model.encode(image_tensor)
            assert torch.equal(again, first)
            again.zero_()  # as a residual walk does that subtracts in place
    assert len(asked) == 1
    model.network.requires_grad_(True)
    assert model.encode(image_tensor).requires_grad and model.encode(image_tensor).requires_grad and len(asked) == 3
    model.network.requires_grad_(False)
    model.kept.limit = 1
    other = image_tensor.flip(0)
    with torch.no_grad():
        assert torch.equal(model.encode(other), model.encode(other)) and len(asked) == 5


# --- on disk ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(images_folder: Path, tmp_path: Path) -> Path:
    """A copy of some images, which a test may change."""
    return Path(shutil.copytree(images_folder / "a", tmp_path / "images"))


def latents_of(model: Model, folder: Path, cache: Path | None, batch: int = 8, **how: Any) -> Any:
    return cached(cache, model.latents(Images(find_images([folder]), 3, **how), batch), model, 0)


def read(latents: Any) -> list[tuple[list[str], Any]]:
    """By batch, names and latents."""
    return [([item.name for item in items], rows.tolist()) for items, rows in latents.by_item()]


def test_latents_are_read_again_and_not_encoded(model: Model, asked: list[int], folder: Path, tmp_path: Path) -> None:
    plain = read(latents_of(model, folder, None))
    asked.clear()
    first = read(latents_of(model, folder, tmp_path / "cache"))
    assert sum(asked) == 30 and first == plain
    again = latents_of(model, folder, tmp_path / "cache")
    assert read(again) == plain == read(again) and sum(asked) == 30
    assert torch.equal(torch.cat(list(again)), torch.cat([torch.tensor(rows).flatten(0, 1) for _, rows in plain]))
    (file,) = (tmp_path / "cache").iterdir()
    assert tuple(read_checkpoint(file).tensor("latents").shape) == (30, 16, 4)  # and anyone can open it


def test_a_reading_that_ended_early_is_in_nobodys_way(model: Model, folder: Path, tmp_path: Path) -> None:
    """What a killed one left lay there for good, gigabytes of it, under the number of a process that was no more."""
    latents, cache = latents_of(model, folder, tmp_path / "cache"), tmp_path / "cache"
    reading = latents.by_item()
    next(reading)
    assert [file.suffix for file in cache.iterdir()] == [".partial"]
    reading.close()
    assert list(cache.iterdir()) == []
    plain = read(latents_of(model, folder, None))
    partial_path(latents.path).write_bytes(bytes(1_000_000))
    assert read(latents) == plain == read(latents)
    assert list(cache.iterdir()) == [latents.path]


def test_of_two_readings_at_once_one_keeps_its_latents(model: Model, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = latents_of(model, folder, cache).by_item()
    assert len(next(first)[0]) == 8
    plain = read(latents_of(model, folder, None))
    assert read(latents_of(model, folder, cache)) == plain
    assert [file.suffix for file in cache.iterdir()] == [".partial"]
    list(first)
    assert read(latents_of(model, folder, cache)) == plain
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]


def test_parts_are_kept_apart(model: Model, asked: list[int], folder: Path, tmp_path: Path) -> None:
    whole = read(latents_of(model, folder, None))
    for _ in range(2):
        parts = []
        for mine in range(2):
            latents = latents_of(model, folder, None)
            latents.images.part = (mine, 2)
            parts.append(read(cached(tmp_path / "cache", latents, model, 0)))
        assert [parts[i % 2][i // 2] for i in range(len(whole))] == whole
    assert sum(asked) == 60 and len(list((tmp_path / "cache").iterdir())) == 2


def test_what_could_not_be_read_is_told_again(model: Model, asked: list[int], folder: Path, tmp_path: Path) -> None:
    (folder / "004.png").write_bytes(b"no image")
    for _ in range(2):
        latents = latents_of(model, folder, tmp_path / "cache", skip_bad=True)
        assert [len(names) for names, _ in read(latents)] == [7, 8, 8, 6]
        assert list(latents.encoded.images.bad) == ["004.png"]
    assert sum(asked) == 29


CHANGES: dict[str, Callable[[Model, Path], object]] = {
    "other pixels": lambda _, folder: (folder / "000.png").write_bytes((folder / "002.png").read_bytes()),
    "a later time": lambda _, folder: os.utime(folder / "000.png", ns=(0, 1)),
    "another name": lambda _, folder: (folder / "000.png").rename(folder / "001.png"),
    "an image less": lambda _, folder: (folder / "000.png").unlink(),
    "a weight": lambda model, _: model.network._encoder._conv_1.weight[0, 0, 0, 0].add_(1e-6),
    "input range": lambda model, _: setattr(model, "input_range", (0.0, 1.0)),
    "bf16": lambda model, _: setattr(model, "bf16", True),
    "compiled": lambda model, _: setattr(model, "compiled", True),
}
OPTIONS: dict[str, dict[str, Any]] = {"batch": {"batch": 16}, "size": {"size": 8}, "channels": {"mixing": "mix"}}


@pytest.mark.parametrize("name", [*CHANGES, *OPTIONS])
def test_other_model_data_or_options_are_another_file(name: str, model: Model, folder: Path, tmp_path: Path) -> None:
    before = latents_of(model, folder, tmp_path / "cache").path
    assert latents_of(model, folder, tmp_path / "cache").path == before
    CHANGES.get(name, lambda *_: None)(model, folder)
    assert latents_of(model, folder, tmp_path / "cache", **OPTIONS.get(name, {})).path != before


def test_arrays_in_memory_count_by_their_bytes_and_dtype(model: Model, tmp_path: Path) -> None:
    """Zeros of 16 x 16 floats are as many bytes as those of 32 x 32 pixels, of which the middle is taken."""
    pixels, floats = torch.zeros(4, 32, 32, 3, dtype=torch.uint8).numpy(), torch.zeros(4, 16, 16, 3).numpy()
    other = pixels.copy()
    other[0, 0, 0, 0] = 1
    paths = []
    for rows in (pixels, pixels.copy(), other, floats):
        images = Images(array_items("x.npy", rows), 3, size=16)
        latents = cached(tmp_path, model.latents(images, 2), model, 0)
        assert isinstance(latents, CachedLatents)
        paths.append(latents.path)
    assert paths[0] == paths[1] and len(set(paths)) == 3


def flipped(at: int, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def resealed(name: str, wrong: Callable[[Tensor], Tensor], path: Path) -> None:
    """Another program wrote a wrong tensor, and the right checksum of it."""
    state = load_file(path)
    state[name] = wrong(state[name]).contiguous()
    checksum = zlib.crc32(b"".join(state[key].numpy().tobytes() for key in ("places", "ends", "sums", "bad")))
    save_file(state, path, {"check": str(checksum)})


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a header alone": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    **{f"a bit at {at}": partial(flipped, at) for at in (0, 20, 4096, 7000, -1, -40)},
    "places beyond": partial(resealed, "places", lambda places: places + 10**6),
    "a place less": partial(resealed, "places", lambda places: places[:-1]),
    "ends turned": partial(resealed, "ends", lambda ends: ends.flip(0)),
    "a sum less": partial(resealed, "sums", lambda sums: sums[:-1]),
    "another JSON": partial(resealed, "bad", lambda _: torch.tensor(list(b"[1]"))),
    "no bytes": partial(resealed, "bad", lambda _: torch.tensor([-1, 300])),
    "doubles": partial(resealed, "latents", lambda latents: latents.double()),
    "a flat matrix": partial(resealed, "latents", lambda latents: latents.flatten(1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_the_way_out(damage: str, model: Model, folder: Path, tmp_path: Path) -> None:
    latents = latents_of(model, folder, tmp_path / "cache")
    read(latents)
    DAMAGES[damage](latents.path)
    with pytest.raises(CodebookError, match=r"the latents in .*\.safetensors are damaged: delete that file"):
        read(latents)


def test_a_refit_writes_the_same_bytes_with_a_cache_and_from_it(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    outputs, cache = [], ("--latents-cache", tmp_path / "c")
    words = ("refit", tiny, "--k", 8, "--data", images_folder, "--steps", 0, "--json")
    for name, more in {"plain": (), "first": cache, "second": cache}.items():
        (tmp_path / name).mkdir()
        done = codebook(*words, "-o", tmp_path / name / "out.safetensors", *more)
        assert done.exit_code == 0, done
        outputs.append((contents(tmp_path / name), done.json["stages"]))
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(list((tmp_path / "c").iterdir())) == 1
    refused = codebook("refit", tiny, "--k", 8, "--latents", "x.npy", *cache)
    assert_refused(refused, "--latents lie on disk already; leave out --latents-cache")
    refused = codebook(*words, "--latents-cache", tiny)
    assert_refused(refused, f"cannot keep latents in {tiny}: File exists")
