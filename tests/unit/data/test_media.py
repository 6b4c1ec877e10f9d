"""Batches: in order, cached within a limit, decoded by workers that end with them, and without what is unreadable."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from itertools import count, islice
from multiprocessing import active_children
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from drawing import fakes, names, picture, put, read
from places import SUPPORT
from sources_of_images import Images, find_images

from codebook_tools.data.splits import split
from codebook_tools.errors import CodebookError


@pytest.fixture
def images(images_folder: Path) -> Images:
    """60 images of 3 * 16 * 16 bytes each."""
    return Images(find_images([images_folder]), 3)


def test_batches_are_in_order_whole_in_range_and_copies(images: Images) -> None:
    batches = list(images.batches(16))
    assert [len(items) for items, _ in batches] == [16, 16, 16, 12] and len(images) == 60
    assert [item for items, _ in batches for item in items] == images.items
    pixels = torch.cat([pixels for _, pixels in batches])
    assert pixels.dtype == torch.float32 and float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    _, loaded = images.load(images.items)
    assert torch.equal(pixels, loaded)
    loaded.zero_()  # which changes nothing that is read later
    assert torch.equal(images.load(images.items)[1], pixels)


def test_the_limit_of_the_cache_holds_for_subsets_and_for_what_was_cached_before(images: Images) -> None:
    images.keep(3 * 16 * 16 * 5)
    list(images.batches(7))
    assert list(images._cache.values) == images.items[:5] == list(images.subset(images.items[9:])._cache.values)
    images.keep(3 * 16 * 16 * 4)
    assert (len(images._cache.values), images._cache.nbytes) == (0, 0)


# --- workers ---------------------------------------------------------------------------------------------------------
def test_an_endless_stream_ends_with_its_workers(images: Images) -> None:
    images.workers = 2
    images.keep(0)
    stream = images.stream([i % 60] for i in count())
    assert [names(items) for items, _ in islice(stream, 100)] == [[images.items[i % 60].name] for i in range(100)]
    assert len(active_children()) == 2
    stream.close()
    assert active_children() == []


PROGRAM = """
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent is gone")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_end_from_outside_leaves_no_workers_behind(number: signal.Signals, images_folder: Path) -> None:
    def running_workers() -> list[Path]:
        states = {path: path.read_text().rpartition(")")[2].split()[0] for path in stats if path.exists()}
        return [path for path, state in states.items() if state != "Z"]

    def interruptible() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job ignores it

    command, pipe = [sys.executable, "-c", PROGRAM, images_folder, SUPPORT], subprocess.PIPE
    parent = subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL, text=True, preexec_fn=interruptible)
    assert parent.stdout is not None
    stats = [Path(f"/proc/{pid}/stat") for pid in parent.stdout.readline().split()]
    parent.send_signal(number)
    assert parent.wait(60) != 0 and len(stats) == 2
    deadline = time.monotonic() + 30
    while running_workers() and time.monotonic() < deadline:
        time.sleep(0.1)  # a killed parent could not wait for them
    assert not running_workers()


# --- unreadable items ------------------------------------------------------------------------------------------------
def test_a_file_that_the_system_refuses_is_named_with_its_reason(tmp_path: Path) -> None:
    items = find_images([put(tmp_path / "b.png", picture(1))])

    def refuse() -> BinaryIO:
        raise PermissionError(13, "Permission denied", "/a/b.png")

    object.__setattr__(items[0].source, "open", refuse)
    with pytest.raises(CodebookError, match=r"cannot read image b\.png: Permission denied; --skip-bad"):
        read(items)
    assert split(fakes(50), items).test == items  # whether it is also in the data, nobody can tell


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_bad_is_an_error_only_where_all_of_a_source_is_unreadable(workers: int, tmp_path: Path) -> None:
    for i, name in enumerate("abcdef"):
        put(tmp_path / f"{name}.png", picture(i))
        if name in "abd":
            (tmp_path / f"{name}.png").write_bytes(b"no image")
    items = find_images([tmp_path])
    source = Images(items, 3, skip_bad=True)
    source.workers = workers
    assert [names(batch) for batch, _ in source.subset(items[:3]).batches(10)] == [["c.png"]]
    assert [names(batch) for batch, _ in source.subset(items[3:5]).batches(10)] == [["e.png"]]
    assert list(source.bad) == ["a.png", "b.png", "d.png"]
    with pytest.raises(CodebookError, match="none of the 2 images can be read"):
        list(Images(items[:2], 3, skip_bad=True).batches(10))
