"""Pictures and items for tests: drawn, stored by hand in every kind, and read back."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sources_of_images import Images
from torch import Tensor

from codebook_tools.data.items import Item
from codebook_tools.data.sources import Source

Pixels = NDArray[np.uint8]


def picture(seed: int, shape: tuple[int, ...] = (8, 8, 3)) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: Pixels) -> bytes:
    return saved(Image.fromarray(pixels), "PNG")


def saved(picture: Image.Image, kind: str, **how: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def png_of(colour: int, bits: int, rows: list[list[int]], **chunks: bytes) -> bytes:
    """A PNG written by hand. colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA. bits: 8 or 16."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width = len(rows[0]) // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    header = struct.pack(">2I5B", width, len(rows), bits, colour, 0, 0, 0)
    data = b"".join(b"\0" + struct.pack(f">{len(row)}{'BH'[bits == 16]}", *row) for row in rows)
    more = b"".join(chunk(kind.encode(), content) for kind, content in chunks.items())
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_of(
    data: bytes, width: int, bits: int, photometric: int, samples: int = 1, order: str = "<", **more: int
) -> bytes:
    """A TIFF of one row written by hand. photometric: 0 white at zero, 1 black at zero, 2 RGB, 5 CMYK, 6 YCbCr, 8 LAB.

    order: < or >, for its bytes. more: compression, orientation, extra (what the last sample is), format.
    """
    tags: dict[int, list[int]] = {
        256: [width], 257: [1], 258: [bits] * samples, 259: [more.get("compression", 1)], 262: [photometric],
        273: [0], 274: [more.get("orientation", 1)], 277: [samples], 278: [1], 279: [len(data)],
        339: [more.get("format", 1)] * samples,
    } | ({338: [more["extra"]]} if "extra" in more else {})  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    lists = sum(2 * len(values) for values in tags.values() if len(values) > 2)
    tags[273] = [start + lists]
    entries, tail = b"", b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            packed, tail = struct.pack(f"{order}I", start + len(tail)), tail + packed
        entries += struct.pack(f"{order}2HI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + tail + data


def sparse_tar(path: Path, member: Path, how: str, *others: Path) -> Path:
    """A tar of `member`, whose last zeros become a hole, and of others beside it. how: the options that say which of
    GNU tar's four forms of a sparse member it has. Skips the test where there is no GNU tar."""
    data = member.read_bytes()
    member.unlink()
    with member.open("wb") as file:
        file.write(data.rstrip(b"\0"))
        file.truncate(len(data))
    tar = shutil.which("tar")
    if tar is None or b"GNU tar" not in subprocess.run([tar, "--version"], capture_output=True).stdout:
        pytest.skip("only GNU tar makes sparse members")
    names = [file.name for file in (member, *others)]
    subprocess.run(["tar", "-C", member.parent, "-S", *how.split(), "-cf", path, *names], check=True)
    with tarfile.open(path) as archive:
        assert archive.getmember(member.name).issparse()
    return path


SPARSE = ["--format=gnu", *(f"--format=posix --sparse-version={version}" for version in ("0.0", "0.1", "1.0"))]


def put_bytes(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def put(path: Path, pixels: Pixels) -> Path:
    return put_bytes(path, png(pixels))


def tar_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.write_bytes(tar_bytes(members))
    return path


def read(items: list[Item], channels: int = 3, **settings: object) -> Tensor:
    """All of the items' pixels, (n, channels, height, width)."""
    return Images(items, channels, **settings).load(items)[1]  # type: ignore[arg-type]


def as_tensor(*pictures: Pixels) -> Tensor:
    return torch.stack([torch.tensor(pixels).movedim(-1, 0).float() / 255 for pixels in pictures])


def names(items: list[Item]) -> list[str]:
    return [item.name for item in items]


def fake(name: str, content: bytes = b"", group: str | None = None) -> Item:
    return Item(name, Source(name, 1, lambda: io.BytesIO(content)), lambda: picture(0), group)


def fakes(count: int, prefix: str = "") -> list[Item]:
    return [fake(f"{prefix}{i:05d}.png") for i in range(count)]
