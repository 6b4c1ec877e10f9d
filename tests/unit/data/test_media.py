"""Batches: in order, the same when read again, and without what cannot be read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from multiprocessing import active_children
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from drawing import as_tensor, fakes, names, picture, put, read
from places import SUPPORT
from sources_of_images import Images, find_images
from torch import Tensor

from codebook_tools.data import dataset as media_module
from codebook_tools.data.images import sample_images
from codebook_tools.data.items import Item
from codebook_tools.data.splits import split
from codebook_tools.errors import CodebookError


@pytest.mark.parametrize("cache", [0, 3 * 16 * 16 * 5, 2 << 30])
@pytest.mark.parametrize("source", ["folder", "tar", "array", "sample"])
def test_reading_twice_gives_the_same_whatever_fits_the_cache(
    source: str,
    cache: int,
    images_folder: Path,
    images_tar: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(media_module, "CACHE_BYTES", cache)
    np.save(tmp_path / "x.npy", picture(0, (20, 16, 16, 3)))
    sources: dict[str, Callable[[], list[Item]]] = {
        "folder": lambda: find_images([images_folder]),
        "tar": lambda: find_images([images_tar]),
        "array": lambda: find_images([tmp_path / "x.npy"]),
        "sample": lambda: sample_images()[::100],
    }
    images = Images(sources[source](), 3)
    first, second = (list(images.batches(7)) for _ in range(2))
    again = list(Images(sources[source](), 3).batches(7))
    for other in (second, again):
        assert [names(items) for items, _ in other] == [names(items) for items, _ in first]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, other, strict=True))


def test_batches_are_in_order_whole_and_in_range(images_folder: Path) -> None:
    items = find_images([images_folder])
    images = Images(items, 3)
    batches = list(images.batches(16))
    assert [len(found) for found, _ in batches] == [16, 16, 16, 12]
    assert names([item for found, _ in batches for item in found]) == names(items)
    pixels = torch.cat([pixels for _, pixels in batches])
    assert pixels.dtype == torch.float32 and float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    assert torch.equal(pixels, images.load(items)[1]) and len(images) == 60


def test_changing_a_batch_changes_nothing_that_is_read_later(images_folder: Path) -> None:
    images = Images(find_images([images_folder]), 3)
    _, first = images.load(images.items[:4])
    before = first.clone()
    first.zero_()
    assert torch.equal(images.load(images.items[:4])[1], before)


def test_what_is_kept_of_decoded_values_can_be_limited(images_folder: Path) -> None:
    images = Images(find_images([images_folder]), 3)
    images.keep(3 * 16 * 16 * 5)
    first, second = (list(images.batches(7)) for _ in range(2))
    assert list(images._cache.values) == images.items[:5] == list(images.subset(images.items[9:])._cache.values)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))


def test_what_was_kept_before_the_limit_is_let_go(images_folder: Path) -> None:
    images = Images(find_images([images_folder]), 3)
    images.load(images.items[:5])
    images.keep(3 * 16 * 16 * 5)
    assert len(images._cache.values) == 5
    images.keep(3 * 16 * 16 * 4)
    assert (len(images._cache.values), images._cache.nbytes) == (0, 0)


# --- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("cache", [0, 3 * 16 * 16 * 20, 2 << 30])
@pytest.mark.parametrize("source", ["folder", "tar", "array"])
def test_workers_give_the_same_values_in_the_same_order(
    workers: int, cache: int, source: str, images_folder: Path, images_tar: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", picture(0, (40, 16, 16, 3)))
    items = find_images([{"folder": images_folder, "tar": images_tar, "array": tmp_path / "x.npy"}[source]])
    alone, helped = Images(items, 3), Images(items, 3)
    helped.workers = workers
    helped.keep(cache)
    places = [[5, 3, 5], [1], [], *([i, 2] for i in range(25))]
    for _ in range(2):
        state = torch.get_rng_state()
        assert same_batches(helped.batches(7), alone.batches(7)) and same_batches(
            helped.stream(places), alone.stream(places)
        )
        assert torch.equal(torch.get_rng_state(), state)  # what is drawn elsewhere does not depend on them


def same_batches(a: Iterator[tuple[list[Item], Tensor]], b: Iterator[tuple[list[Item], Tensor]]) -> bool:
    return all(names(x) == names(y) and torch.equal(p, q) for (x, p), (y, q) in zip(a, b, strict=True))


def test_an_endless_stream_ends_with_its_workers(images_folder: Path) -> None:
    images = Images(find_images([images_folder]), 3)
    images.workers = 2
    images.keep(0)
    stream = images.stream([i % 60] for i in count())
    first = [names(items) for items, _ in islice(stream, 100)]
    assert first == [[images.items[i % 60].name] for i in range(100)] and len(active_children()) == 2
    stream.close()
    assert active_children() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_end_from_outside_leaves_no_workers_behind(number: signal.Signals, images_folder: Path) -> None:
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells children that their parent is gone")
    program = """
import itertools, sys
sys.path.insert(0, sys.argv[2])
from multiprocessing import active_children
from sources_of_images import Images, find_images
images = Images(find_images([sys.argv[1]]), 3)
images.workers = 2
images.keep(0)
for n, _ in enumerate(images.stream([i % 60] for i in itertools.count())):
    if n == 10:
        print(*(child.pid for child in active_children()), flush=True)
"""
    running = subprocess.Popen(
        [sys.executable, "-c", program, str(images_folder), str(SUPPORT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job is born deaf to it
    )
    assert running.stdout is not None
    workers = [int(pid) for pid in running.stdout.readline().split()]
    running.send_signal(number)
    assert running.wait(60) != 0 and len(workers) == 2
    deadline = time.monotonic() + 30
    while (left := [pid for pid in workers if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)  # who was killed could not wait for them
    assert not left


def is_running(pid: int) -> bool:
    """Not also where it is dead, and nobody has asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return not Path("/proc/self").exists()


# --- unreadable items ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/a/b.png"), OSError(5, "Input/output error")]
)
def test_a_file_that_the_system_refuses_is_named_with_its_reason(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a.png", picture(0))
    items = find_images([put(tmp_path / "b.png", picture(1))])

    def refuse() -> BinaryIO:
        raise error

    object.__setattr__(items[0].source, "open", refuse)
    with pytest.raises(CodebookError, match=rf"cannot read image b\.png: {error.strerror}; --skip-bad"):
        read(items)
    assert split(fakes(50), items).test == items  # whether it is also in the data, nobody can tell


@pytest.fixture(params=[0, 2], ids=["alone", "workers"])
def workers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def one_bad(tmp_path: Path) -> Path:
    """Six images, of which c.png is cut off."""
    for i, name in enumerate("abcdef"):
        put(tmp_path / f"{name}.png", picture(i, (32, 32, 3)))
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:700])
    return tmp_path


def test_an_unreadable_image_is_named_with_the_way_out(one_bad: Path, workers: int) -> None:
    source = Images(find_images([one_bad]), 3)
    source.workers = workers
    with pytest.raises(CodebookError, match=r"cannot read image c\.png: .*--skip-bad"):
        list(source.batches(2))


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_with_skip_bad_the_others_are_read_and_the_bad_one_is_noted_once(
    one_bad: Path, batch: int, workers: int
) -> None:
    source = Images(find_images([one_bad]), 3, skip_bad=True)
    source.workers = workers
    for _ in range(2):
        read_names = [item.name for items, _ in source.batches(batch) for item in items]
        assert read_names == ["a.png", "b.png", "d.png", "e.png", "f.png"]
        assert list(source.bad) == ["c.png"]
    pixels = torch.cat([pixels for _, pixels in source.batches(batch)])
    assert torch.equal(pixels, as_tensor(*(picture(i, (32, 32, 3)) for i in (0, 1, 3, 4, 5))))


def test_when_every_image_is_unreadable_skip_bad_is_an_error(tmp_path: Path, workers: int) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    source = Images(find_images([tmp_path]), 3, skip_bad=True)
    source.workers = workers
    with pytest.raises(CodebookError, match="none of the 2 images can be read"):
        list(source.batches(10))


def test_bad_images_of_one_subset_do_not_condemn_another(tmp_path: Path) -> None:
    for i, name in enumerate("abcdef"):
        put(tmp_path / f"{name}.png", picture(i))
    for name in "abd":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    items = find_images([tmp_path])
    source = Images(items, 3, skip_bad=True)
    assert [len(found) for found, _ in source.subset(items[:3]).batches(10)] == [1]
    assert names(source.subset(items[3:5]).load(items[3:5])[0]) == ["e.png"]
    assert list(source.bad) == ["a.png", "b.png", "d.png"]


def test_a_file_that_vanished_after_listing_is_unreadable(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0))
    put(tmp_path / "b.png", picture(1))
    items = find_images([tmp_path])
    (tmp_path / "a.png").unlink()
    with pytest.raises(CodebookError, match=r"cannot read image a\.png"):
        read(items)
    assert len(read(items, skip_bad=True)) == 1
