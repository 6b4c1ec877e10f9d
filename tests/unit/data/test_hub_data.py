"""Columns of data sets on the hub, streamed by the library datasets from a server on loopback."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import datasets as datasets  # imported before the server is, which redirects it
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import Run
from drawing import saved
from hub_client import hub as hub
from hub_client import parquet_of, tree
from hub_server import Hub
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file

from codebook_tools.data.arrays import Arrays
from codebook_tools.data.audio import Waveforms
from codebook_tools.data.hub import is_of_numbers, stated
from codebook_tools.data.images import Images
from codebook_tools.data.items import find_items
from codebook_tools.data.rows import Rows
from codebook_tools.data.splits import split
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.progress import Watch

pytestmark = pytest.mark.slow  # the library takes a second to import


def png(value: int) -> bytes:
    return saved(Image.fromarray(np.full((8, 8, 3), value, np.uint8)), "PNG")


def wav(value: float, samples: int) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.full(samples, value * 32767, np.int16).tobytes())
    return content.getvalue()


def table(**columns: Any) -> bytes:
    """A parquet file without the library's own metadata."""
    content = io.BytesIO()
    parquet.write_table(pa.table(columns), content, row_group_size=4)
    return content.getvalue()


def pictures(first: int, count: int) -> bytes:
    return parquet_of("image", "Image", [{"bytes": png(first + i), "path": f"{i}.png"} for i in range(count)])


@pytest.fixture
def sets(hub: Hub) -> Hub:
    """org/pictures: 20 of train in two files, 5 of test. org/folder: 6 files. org/sound, org/moves, org/both."""
    of = "data/{}-0000{}-of-0000{}.parquet".format
    train = {of("train", 0, 2): pictures(0, 10), of("train", 1, 2): pictures(10, 10)}
    hub.dataset("org/pictures", train | {of("test", 0, 1): pictures(20, 5)})
    hub.dataset("org/folder", {f"train/{i}.png": png(10 * i) for i in range(6)})
    cells = [{"bytes": wav(0.25, 12_000), "path": "a.wav"}, {"bytes": wav(0.5, 4_000), "path": "b.wav"}]
    hub.dataset("org/sound", {of("train", 0, 1): parquet_of("audio", "Audio", cells)})
    rng = np.random.default_rng(0).standard_normal((12, 3, 2)).astype(np.float32)
    hub.dataset("org/moves", {of("train", 0, 1): table(move=rng.tolist(), steps=[[1] * (i + 1) for i in range(12)])})
    both = table(image=[png(1)], other=[png(2)], words=["text"], row=[[1, 2]])
    hub.dataset("org/both", {of("test", 0, 1): both, of("validation", 0, 1): both})
    return hub


def values(items: Any) -> list[float]:
    return [float(np.asarray(item.decode()).ravel()[0]) for item in items]


def test_pictures_are_streamed_in_order_and_named_by_their_row(sets: Hub, tmp_path: Path) -> None:
    reports = list[tuple[str, int]]()
    watch = Watch(lambda what, done, total, figures: reports.append((what, done)))
    before = tree(tmp_path)
    items = find_items(["hf://datasets/org/pictures"], Images(), watch)
    assert [item.name for item in items] == [f"org/pictures:train#{i}" for i in range(20)]
    assert values(items) == list(range(20)) and reports[-1] == ("stream org/pictures", 20)
    commit = sets.datasets["org/pictures"].refs["main"]
    assert stated("hf://datasets/org/pictures") == f"hf://datasets/org/pictures@{commit}:train"
    new = [name for name in tree(tmp_path) if name not in before and "parquet" in name]
    assert new == [], "rows are streamed, not kept in the cache"
    sets.requests.clear()
    assert values(find_items(["hf:/datasets/org/pictures"], Images())) == values(items) and not sets.requests
    parts = split(items)
    assert {len(parts.train), len(parts.validation), len(parts.test)} != {0} and len(parts.test) >= 1


def test_a_split_a_column_and_the_first_rows_are_chosen(sets: Hub) -> None:
    assert values(find_items(["hf://datasets/org/pictures:test"], Images())) == [20, 21, 22, 23, 24]
    assert values(find_items(["hf://datasets/org/pictures:train:image"], Images(), first=3)) == [0, 1, 2]
    assert values(find_items(["hf://datasets/org/both:test:other"], Images())) == [2]
    both = find_items(["hf://datasets/org/pictures:test", "hf://datasets/org/pictures:train"], Images())
    assert len({item.name for item in both}) == 25


def test_files_of_a_folder_are_read_from_the_hub_and_no_others(sets: Hub, tmp_path: Path) -> None:
    assert sorted(values(find_items(["hf://datasets/org/folder"], Images()))) == [0, 10, 20, 30, 40, 50]
    (tmp_path / "secret.png").write_bytes(png(99))
    cells = [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": None, "path": sets.url}, None]
    stored = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    sets.dataset("org/spy", {"train.parquet": parquet_of("image", "Image", stored)})
    for item in find_items(["hf://datasets/org/spy"], Images()):
        with pytest.raises(ValueError, match=r"its row holds no bytes, only the path|its row is empty"):
            item.decode()


def test_sound_is_cut_into_clips(sets: Hub) -> None:
    items = find_items(["hf://datasets/org/sound"], Waveforms(rate=8000, size=4000))
    assert [item.name for item in items] == [
        "org/sound:train#0#0",
        "org/sound:train#0#1",
        "org/sound:train#0#2",
        "org/sound:train#1#0",
    ]
    assert values(items) == pytest.approx([0.25, 0.25, 0.25, 0.5], abs=1e-3)
    assert {item.group for item in items} == {"org/sound:train#0", "org/sound:train#1"}


def test_lists_of_one_shape_are_rows_and_others_items(sets: Hub) -> None:
    assert is_of_numbers(_id("org/moves")) and not is_of_numbers(_id("org/pictures"))
    rows = find_items(["hf://datasets/org/moves::move"], Arrays())
    meant = np.random.default_rng(0).standard_normal((12, 3, 2)).astype(np.float32)
    assert isinstance(rows, Rows) and np.array_equal([row.decode() for row in rows], meant)
    ragged = find_items(["hf://datasets/org/moves::steps"], Arrays())
    assert [len(item.decode()) for item in ragged] == list(range(1, 13)) and ragged[3].decode().dtype == np.int64


def _id(name: str) -> Any:
    from codebook_tools.runtime.hub_ids import data_set_id

    return data_set_id(f"hf://datasets/{name}")


VECTORS = """
from torch import nn


class Vectors(nn.Module):
    def __init__(self, codebook_size):
        super().__init__()
        self.quantizer = nn.Module()
        self.quantizer.codebook = nn.Embedding(codebook_size, 2)

    def encode(self, vectors):
        return vectors

    def decode(self, quantized):
        return quantized
"""


def test_a_network_for_arrays_is_measured_on_a_column_of_lists(sets: Hub, codebook: Run, tmp_path: Path) -> None:
    rows = [[float(i % 2), 5.0] for i in range(40)]
    sets.dataset("org/vectors", {"train.parquet": table(vector=rows, words=["text"] * 40)})
    (tmp_path / "net.py").write_text(VECTORS)
    save_file({"quantizer.codebook.weight": torch.tensor([[0.0, 5.0], [1.0, 4.0]])}, "net.safetensors")
    words = ("--network", f"{tmp_path / 'net.py'}:Vectors", "--data", "hf://datasets/org/vectors", "--json")
    done = codebook("measure", "net.safetensors", *words)
    assert done.exit_code == 0, done.stderr
    before, commit = done.json["stages"]["before"], sets.datasets["org/vectors"].refs["main"]
    ones = np.mean([item.decode()[0] for item in split(find_items(["hf://datasets/org/vectors"], Arrays())).test])
    assert before["mse"] == pytest.approx(ones / 2) and 0 < before["images"] < 40  # a code is off by 1 in one of two
    assert done.json["settings"]["data"] == [f"hf://datasets/org/vectors@{commit}:train"]


def test_offline_the_cached_files_are_streamed(sets: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config
    from huggingface_hub import constants, snapshot_download

    snapshot_download("org/pictures", repo_type="dataset")
    snapshot_download("org/folder", repo_type="dataset")
    sets.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    assert values(find_items(["hf://datasets/org/pictures:test"], Images())) == [20, 21, 22, 23, 24]
    assert len(values(find_items(["hf://datasets/org/folder"], Images()))) == 6 and not sets.requests
    refused("hf://datasets/org/sound", Waveforms(rate=8000), "HF_HUB_OFFLINE is set, and the copy in")


def refused(path: str, modality: Any, *said: str) -> None:
    with pytest.raises(CodebookError) as error:
        find_items([path], modality)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in said), message


def test_what_is_not_there(sets: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Images()
    refused("hf://datasets/org/none", images, "hf://datasets/org/none is not on http://127.0.0.1", "or is private")
    refused("hf://org/pictures", images, "expected hf://datasets/org/name[@revision][:split][:column]")
    refused("hf://datasets/org/pictures@v3", images, "org/pictures has no revision v3")
    refused("hf://datasets/org/pictures:dev", images, "has no split dev; it has train, test")
    refused("hf://datasets/org/both", images, "has 2 columns of images; say which: hf://datasets/org/both::image")
    refused("hf://datasets/org/both::words", images, "column words holds no images; its columns: image (binary)")
    refused("hf://datasets/org/both::x", images, "no such column; its columns: image (binary), other (binary), words")
    refused("hf://datasets/org/moves", images, "has no column of images; its columns: move (list), steps (list)")
    sets.dataset("org/empty", {"README.md": b"# Nothing"})
    refused("hf://datasets/org/empty", images, "the library datasets cannot read it")
    sets.dataset("org/damaged", {"train.parquet": b"PAR1 no"})
    refused("hf://datasets/org/damaged", images, "hf://datasets/org/damaged")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("hf://datasets/org/sound", Waveforms(rate=8000), "does not accept the token")


def test_a_stream_that_breaks_off_goes_on_or_ends_in_one_line(sets: Hub) -> None:
    sets.break_after, sets.breaks = 100, 2
    assert values(find_items(["hf://datasets/org/pictures"], Images())) == list(range(20))
    sets.breaks = 10_000
    refused("hf://datasets/org/pictures:test", Images(), "the connection to http://127.0.0.1", "failed")
