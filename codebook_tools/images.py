"""Images as items with a name: folders, tar shards, arrays and the bundled sample; and how they are split."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.errors import CodebookError, one_line
from codebook_tools.pictures import decode_picture, decode_row, square
from codebook_tools.watch import Watch

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SAMPLE = "sample"
"""Stands for the bundled sample in messages: patches of the two photographs that scikit-learn ships."""

_DECODED_CACHE_BYTES = 2 << 30


@dataclass(frozen=True, eq=False)
class Item:
    """One image, not read yet.

    name: its path relative to what was given, or FILE#row. nbytes: length of `read()`, known without reading.
    read: its bytes as stored. decode: its pixels from those bytes and a number of channels (1 or 3), uint8
    (channels, height, width). group: items of one group go into one split; by default each is its own.
    """

    name: str
    nbytes: int
    read: Callable[[], bytes] = field(repr=False)
    decode: Callable[[bytes, int], NDArray[np.uint8]] = field(repr=False)
    group: str | None = None

    def __str__(self) -> str:
        """The name on one line, whatever is in it."""
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in self.name)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the name: it seeds the choice of the item's latents."""
        return _sha256(self.name)

    def in_tenth(self, part: int) -> bool:
        """Whether the SHA-256 of name or group puts the item into this tenth; the parts 0 and 1 are independent."""
        digest = _sha256(self.group or self.name)
        return int.from_bytes(digest[8 * part : 8 * part + 8], "big") % 10 == 0


def _sha256(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()  # names of files need not be UTF-8


def find_images(paths: Sequence[str | Path]) -> list[Item]:
    """Every image under the paths, in order of name: folders of any depth, .tar shards, .npy and .npz files.

    A {0000..0009} in a path stands for that range. Names that several paths share get the path's own name in front,
    or all of the path where that is shared too; they keep their place in the splits. Links are followed. What is
    hidden (.thumbnails/, or ._x.jpg, in which macOS keeps a file's attributes) does not count. Whether an image can be
    read shows when it is. Raises CodebookError where a path is missing, of no known kind, cannot be listed, holds no
    image, or is given twice.
    """
    groups = [(path, _items(path)) for given in paths for path in _braces(str(given))]
    for path, items in groups:
        if not items:
            raise CodebookError(f"no images in {path}: expected files ending in {', '.join(SUFFIXES)}")
    shared = Counter(item.name for _, items in groups for item in items)
    fronts = Counter(path.name for path, _ in groups)
    named = {}
    for path, items in groups:
        front = path.name if fronts[path.name] == 1 else path.as_posix()
        for item in items:
            if shared[item.name] > 1:
                item = replace(item, name=f"{front}/{item.name}", group=item.name)
            if item.name in named:
                raise CodebookError(f"{item.name} stands twice in the data; give each path once")
            named[item.name] = item
    return [named[name] for name in sorted(named)]


def _braces(given: str) -> list[Path]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", given)
    if match is None:
        return [Path(given)]
    ends = match.groups()
    low, high = sorted(map(int, ends))
    padded = any(end != "0" and end.startswith("0") for end in ends)  # as a shell pads: {8..11}, but {08..11}
    width = max(map(len, ends)) if padded else 1
    numbers = [f"{n:0{width}d}" for n in range(low, high + 1)]
    return [path for n in numbers for path in _braces(given[: match.start()] + n + given[match.end() :])]


def _items(path: Path) -> list[Item]:
    try:
        path.stat()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = "no such file or folder" if missing else f"cannot be opened ({one_line(error)})"
        raise CodebookError(f"{reason}: {path}") from error
    if path.is_dir():
        return _folder_items(path)
    if path.suffix.lower() == ".tar":
        return _tar_items(path)
    if path.suffix.lower() in (".npy", ".npz"):
        return _array_items(path)
    if path.suffix.lower() in SUFFIXES:
        return [Item(path.name, path.stat().st_size, path.read_bytes, decode_picture)]
    raise CodebookError(f"{path} is no image source: give a folder of images, a .tar, a .npy or a .npz")


def _is_image(name: str) -> bool:
    """By a name relative to its source: it ends as images do, and neither it nor a folder of it is hidden."""
    hidden = any(part.startswith(".") and part != ".." for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not hidden


def _folder_items(folder: Path) -> list[Item]:
    return [
        Item(name, nbytes, file.read_bytes, decode_picture)
        for file in _files(folder)
        if _is_image(name := file.relative_to(folder).as_posix()) and (nbytes := _length(file)) is not None
    ]


def _files(folder: Path) -> Iterator[Path]:
    """Files of any depth. Links to folders are followed, and a folder that is reached twice counts once."""

    def refuse(error: OSError) -> None:
        raise CodebookError(f"cannot list the folder {error.filename}: {one_line(error)}") from error

    seen = set()
    for top, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        place = os.path.realpath(top)
        folders[:] = sorted(name for name in folders if place not in seen and not name.startswith("."))
        yield from (Path(top, name) for name in files if place not in seen)
        seen.add(place)


def _length(file: Path) -> int | None:
    """In bytes; None for what is no file. A link to nothing has 0, so that reading it names it."""
    try:
        status = file.stat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _tar_items(path: Path) -> list[Item]:
    try:
        with tarfile.open(path, "r:") as archive:  # uncompressed only, so that any member can be read by its offset
            # A tar may hold a name again: the last one counts.
            members = {posixpath.normpath(m.name): m for m in archive if m.isfile() or m.islnk() or m.issym()}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise CodebookError(f"{path} is not a readable, uncompressed tar: {error}") from error
    return [_tar_item(path, name, members) for name in members if _is_image(name)]


def _tar_item(path: Path, name: str, members: dict[str, tarfile.TarInfo]) -> Item:
    """A member, or the one it links to: GNU tar stores a file that has two names once."""
    member = members[name]
    if not member.isfile():
        target = member.linkname if member.islnk() else posixpath.join(posixpath.dirname(name), member.linkname)
        member = members.get(posixpath.normpath(target), member)
    if not member.isfile():
        return Item(name, 0, partial(_refuse_link, member.linkname), decode_picture)
    return Item(name, member.size, partial(_read_range, path, member.offset_data, member.size), decode_picture)


def _refuse_link(target: str) -> bytes:
    raise ValueError(f"it is a link to {target}, which is no file of the tar")


def _read_range(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def _array_items(path: Path) -> list[Item]:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = [(path.name, loaded)] if isinstance(loaded, np.ndarray) else [(path.name, loaded[k]) for k in loaded]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CodebookError(f"{path} is not a readable array file: {error}") from error
    if len(arrays) > 1:
        raise CodebookError(f"{path} holds {len(arrays)} arrays; give a .npz with one array of images, or a .npy")
    return [item for name, array in arrays for item in array_items(name, array)]


def array_items(name: str, array: NDArray[np.generic]) -> list[Item]:
    """One item a row, named NAME#row, from (n, height, width) or (n, height, width, 1|3) or (n, 1|3, height, width).

    uint8, or floating point in [0, 1].
    """
    if array.ndim not in (3, 4) or (array.ndim == 4 and 1 not in _channels(array) and 3 not in _channels(array)):
        raise CodebookError(
            f"{name} has shape {array.shape}: expected (n, h, w), (n, h, w, 1 or 3) or (n, 1 or 3, h, w)"
        )
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise CodebookError(f"{name} has dtype {array.dtype}: expected uint8, or floating point in [0, 1]")
    nbytes = array.nbytes // max(1, len(array))
    return [Item(f"{name}#{i}", nbytes, array[i].tobytes, partial(decode_row, array[i])) for i in range(len(array))]


def _channels(array: NDArray[np.generic]) -> tuple[int, int]:
    return array.shape[1], array.shape[3]


def sample_photographs() -> dict[str, NDArray[np.uint8]]:
    """The two photographs that scikit-learn ships, (427, 640, 3) uint8 each, by name."""
    from sklearn.datasets import load_sample_images

    loaded = load_sample_images()
    return {Path(name).stem: image for name, image in zip(loaded.filenames, loaded.images, strict=True)}


def sample_images() -> list[Item]:
    """The bundled sample: 3,072 patches of 32x32 from both photographs.

    Each photograph is cut into blocks that do not overlap, and a block stays whole in any split, so that no test patch
    shares a pixel with a training patch. Patches of a block do overlap, at offsets that no model's stride divides.
    """
    side, block, offset = 32, 53, 7
    return [
        replace(array_items("patch", patch[None])[0], name=f"{SAMPLE}/{region}/{y:03d}-{x:03d}", group=region)
        for name, photograph in sample_photographs().items()
        for top in range(0, photograph.shape[0] - block + 1, block)
        for left in range(0, photograph.shape[1] - block + 1, block)
        for region in [f"{name}/{top}-{left}"]
        for y in range(top, top + block - side + 1, offset)
        for x in range(left, left + block - side + 1, offset)
        for patch in [photograph[y : y + side, x : x + side]]
    ]


@dataclass(frozen=True)
class Splits:
    """Items by what they may influence. calibration: counts and k-means. train and validation: its two parts, for
    gradients and for the choice of the kept state. test: reported on, chooses nothing."""

    train: list[Item]
    validation: list[Item]
    test: list[Item]

    @property
    def calibration(self) -> list[Item]:
        return sorted([*self.train, *self.validation], key=lambda item: item.name)


def split(data: list[Item], test: list[Item] | None = None) -> Splits:
    """Test and validation data, each a tenth chosen by SHA-256 of item names, so an item never changes sides.

    test: explicit test items; then all of `data` is calibration data. Raises CodebookError where there is no test or no
    calibration data (whoever needs validation data says so), and where an explicit test item equals a calibration item
    byte for byte.
    """
    if test is None:
        test = [item for item in data if item.in_tenth(0)]
        data = [item for item in data if not item.in_tenth(0)]
    else:
        _refuse_shared(data, test)
    validation = [item for item in data if item.in_tenth(1)]
    train = [item for item in data if not item.in_tenth(1)]
    for name, items in (("test", test), ("calibration", data)):
        if not items:
            count = len(data) + len(test)
            raise CodebookError(
                f"the {name} split of {count} images is empty: a tenth is drawn by name; "
                "give more images with --data, or the test images with --test-data"
            )
    return Splits(train, validation, test)


def _refuse_shared(data: list[Item], test: list[Item]) -> None:
    sizes = {item.nbytes for item in data} & {item.nbytes for item in test} - {0}
    known = {_content(item): item.name for item in data if item.nbytes in sizes}
    for item in test:
        if item.nbytes in sizes and (content := _content(item)) is not None and content in known:
            raise CodebookError(
                f"test item {item.name} is also in --data, as {known[content]}: take it out of --data, "
                "or leave out --test-data to have a tenth split off"
            )


def _content(item: Item) -> bytes | None:
    """SHA-256 of what is stored; None where it cannot be read, which whoever decodes it says."""
    try:
        return hashlib.sha256(item.read()).digest()
    except OSError:
        return None


def shuffled(items: list[Item], seed: int) -> list[Item]:
    """The items in an order that depends on seed and names alone."""
    salt = (seed % 2**64).to_bytes(8, "big")
    return sorted(items, key=lambda item: hashlib.sha256(salt + item.digest).digest())


def limited(items: list[Item], limit: int | None, seed: int) -> list[Item]:
    """At most `limit` items, the first of them as `shuffled`, in order of name."""
    if limit is None or len(items) <= limit:
        return items
    return sorted(shuffled(items, seed)[:limit], key=lambda item: item.name)


@dataclass
class Images:
    """Items as tensors, decoded once while they fit 2 GiB and again each time beyond that.

    channels: 1 or 3. stride: height and width are cut to a multiple of it, from the centre. size: side of a square
    that the centre of every image is cut and resized to; None: all must have one size. skip_bad: leave out what cannot
    be read, where CodebookError is raised otherwise. bad: names of items left out, and the reasons.
    """

    items: list[Item]
    channels: int
    stride: int = 1
    size: int | None = None
    skip_bad: bool = False
    watch: Watch = field(default_factory=Watch, repr=False)
    bad: dict[str, str] = field(default_factory=dict)
    _cache: dict[Item, Tensor] = field(default_factory=dict, repr=False)
    _cached_bytes: int = 0
    _first: tuple[Item, tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, items: list[Item]) -> Images:
        """The same source restricted to `items`; decoded pixels and the list of bad items are shared."""
        return replace(self, items=items)

    def batches(self, size: int) -> Iterator[tuple[list[Item], Tensor]]:
        """Items and their pixels, (n, channels, height, width) float32 in [0, 1], in order, `size` at a time."""
        for start in range(0, len(self.items), size):
            items, pixels = self.load(self.items[start : start + size])
            if items:
                yield items, pixels

    def load(self, items: Sequence[Item]) -> tuple[list[Item], Tensor]:
        """The readable ones of `items` and their pixels, (n, channels, height, width) float32 in [0, 1]."""
        with self.watch.phase("load"):
            loaded = [(item, pixels) for item in items if (pixels := self._pixels(item)) is not None]
            if not loaded:
                return [], torch.empty(0)
            return [item for item, _ in loaded], torch.stack([pixels for _, pixels in loaded]).float().div_(255)

    def _pixels(self, item: Item) -> Tensor | None:
        pixels = self._cache.get(item)
        if pixels is not None:
            return pixels
        if item.name in self.bad:
            return None
        try:
            pixels = torch.tensor(self._fitted(item.decode(item.read(), self.channels)))
        except Exception as error:  # decoders raise whatever they like on a damaged file
            self._leave_out(item, error)
            return None
        first, shape = self._first = self._first or (item, tuple(pixels.shape))
        if tuple(pixels.shape) != shape:
            this, other = ("x".join(map(str, reversed(sides))) for sides in (pixels.shape[1:], shape[1:]))
            raise CodebookError(f"images of unlike sizes: {item} is {this}, {first} is {other}; give --size")
        if self._cached_bytes + pixels.numel() <= _DECODED_CACHE_BYTES:
            self._cache[item] = pixels
            self._cached_bytes += pixels.numel()
        return pixels

    def _leave_out(self, item: Item, error: Exception) -> None:
        reason = one_line(error)
        if not self.skip_bad:
            raise CodebookError(f"cannot read image {item}: {reason}; --skip-bad goes on without it") from error
        self.bad[item.name] = reason
        if len(self.bad) >= len(self.items) and all(item.name in self.bad for item in self.items):
            raise CodebookError(f"none of the {len(self)} images can be read, the last one {item}: {reason}") from error

    def _fitted(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.size is not None and pixels.shape[1:] != (self.size, self.size):
            pixels = square(pixels, self.size)
        height, width = (side - side % self.stride for side in pixels.shape[1:])
        if not height or not width:
            raise ValueError(f"{pixels.shape[2]}x{pixels.shape[1]} is smaller than the model's stride of {self.stride}")
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        return np.ascontiguousarray(pixels[:, top : top + height, left : left + width])
