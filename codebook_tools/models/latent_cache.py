"""Latents of calibration data cached on disk: encoded in one run, read in the next."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from codebook_tools.checkpoints.atomic import partial_file, put_in_place
from codebook_tools.checkpoints.safetensors_file import header_of, read_safetensors
from codebook_tools.checkpoints.tensors import Entry, InMemory, Stored
from codebook_tools.data.items import Item
from codebook_tools.data.latents import EncodedLatents
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.models.model import Model
from codebook_tools.runtime.safe_io import parse_json
from codebook_tools.runtime.version import VERSION

_HEADER = 4096
"""Bytes for the header, which is written last: only then is it known how many items could be read."""

_ABOUT = ("places", "ends", "sums", "bad")


@dataclass(frozen=True, eq=False)
class CachedLatents:
    """The batches of `encoded`, bit by bit: from a file where that exists, else encoded and written to it at the end.

    The file is of safetensors: latents (n, positions, dim); places (n,), of the items that could be read; ends and sums
    (batches,), where each batch ends in them and its CRC-32; bad, names and reasons of the others, as JSON.

    Attributes:
        encoded: The latents without the cache.
        path: The file.
        device: Of the batches.
    """

    encoded: EncodedLatents
    path: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def part(self) -> tuple[int, int]:
        """As of EncodedLatents."""
        return self.encoded.part

    def __len__(self) -> int:
        return len(self.encoded)

    def __iter__(self) -> Iterator[Tensor]:
        for _, latents in self.by_item():
            yield latents.flatten(0, 1)

    def by_item(self) -> Iterator[tuple[Sequence[Item], Tensor]]:
        """As EncodedLatents.by_item. Raises CodebookError where the file is damaged or cannot be written."""
        if self.path.exists():
            yield from self._read()
            return
        with ExitStack() as stack:
            try:
                partial = stack.enter_context(partial_file(self.path, force=True))
            except CodebookError:  # another process writes it
                yield from self.encoded.by_item()
                return
            except OSError as error:
                raise self._unwritable(error) from error
            yield from self._written(partial)

    def _written(self, partial: Path) -> Iterator[tuple[Sequence[Item], Tensor]]:
        place_of = {item: place for place, item in enumerate(self.encoded.images.items)}
        places, ends, sums, shape = list[int](), list[int](), list[int](), tuple[int, ...]()
        try:
            with partial.open("wb") as file:
                file.seek(_HEADER)
                for items, latents in self.encoded.by_item():
                    rows = latents.cpu().contiguous().numpy()
                    file.write(rows.data)
                    places += [place_of[item] for item in items]
                    ends.append(len(places))
                    sums.append(zlib.crc32(rows.data))
                    shape = rows.shape[1:]
                    yield items, latents
                stored = Stored("latents", "F32", (len(places), *shape), partial, _HEADER, file.tell())
                bad = list(json.dumps(self.encoded.images.bad).encode())
                about = [
                    InMemory(name, torch.tensor(of)) for name, of in zip(_ABOUT, (places, ends, sums, bad), strict=True)
                ]
                for entry in about:
                    file.writelines(entry.chunks())
                header = header_of([stored, *about], {"check": _check(about)})
                file.seek(0)
                file.write((_HEADER - 8).to_bytes(8, "little") + header.ljust(_HEADER - 8))
                file.flush()
                os.fsync(file.fileno())
            if places:
                put_in_place(self.path)
        except OSError as error:
            raise self._unwritable(error) from error

    def _read(self) -> Iterator[tuple[Sequence[Item], Tensor]]:
        images = self.encoded.images
        stored, (places, ends, sums, bad) = self._opened()
        images.bad |= bad
        for start, end, checksum in zip([0, *ends], ends, sums, strict=False):
            # Mapped anew: pages that were read count as memory of the process while their mapping lives.
            rows = np.array(np.memmap(self.path, np.float32, "r", stored.start, stored.shape)[start:end])
            if zlib.crc32(rows.data) != checksum:
                raise self._damaged()
            yield [images.items[place] for place in places[start:end]], torch.from_numpy(rows).to(self.device)

    def _opened(self) -> tuple[Stored, tuple[list[int], list[int], list[int], dict[str, str]]]:
        """The entry of the latents, and the tensors beside it, all checked: any program may have written the file."""
        try:
            weights = read_safetensors(self.path)
            latents, *about = (weights.entries[name] for name in ("latents", *_ABOUT))
            if weights.metadata["check"] != _check(about) or not isinstance(latents, Stored):
                raise self._damaged()
            places, ends, sums, said = (entry.tensor().tolist() for entry in about)
            bad = parse_json(bytes(said))
            fits = latents.dtype == "F32" and len(latents.shape) == 3 and latents.shape[0] == len(places)
            in_order = all(a < b for a, b in pairwise([-1, *places, len(self.encoded.images.items)]))
            ends_meet = all(a < b for a, b in pairwise([0, *ends])) and ends[-1:] == [len(places)]
            reasons = isinstance(bad, dict) and all(isinstance(why, str) for why in bad.values())
            if not (fits and in_order and ends_meet and reasons and len(sums) == len(ends)):
                raise self._damaged()
        except (CodebookError, KeyError, TypeError, ValueError) as error:
            raise self._damaged() from error
        return latents, (places, ends, sums, bad)

    def _unwritable(self, error: OSError) -> CodebookError:
        return CodebookError(f"cannot write latents into {self.path.parent}: {one_line(error)}")

    def _damaged(self) -> CodebookError:
        return CodebookError(f"the latents in {self.path} are damaged: delete that file, and they are encoded anew")


def _check(entries: Sequence[Entry]) -> str:
    return str(zlib.crc32(b"".join(chunk for entry in entries for chunk in entry.chunks())))


def cached(folder: Path | None, latents: EncodedLatents, model: Model, stage: int) -> EncodedLatents | CachedLatents:
    """Cache latents in a folder, in a file named by a hash of all that they depend on.

    Args:
        folder: Made where it does not exist; None for no cache.
        latents: As from `model.latents(..., stage)`.
        model: That encodes them.
        stage: The book that they meet.

    Raises:
        CodebookError: The folder cannot be made.
    """
    if folder is None:
        return latents
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CodebookError(f"cannot keep latents in {folder}: {one_line(error)}") from error
    return CachedLatents(latents, folder / f"{_key(latents, model, stage)}.safetensors", model.device)


def _key(latents: EncodedLatents, model: Model, stage: int) -> str:
    """A hash of the network, its code, the codebooks before `stage`, the items, and how all of them are read."""
    images, network = latents.images, model.network
    first = images.decode(images.items[0])  # its shape follows --size and the stride
    said = {
        "versions": [VERSION, *(version(name) for name in ("torch", "numpy", "pillow"))],
        "code": [str(network), *(hashlib.sha256(file.read_bytes()).hexdigest() for file in _source_files(network))],
        "config": model.checkpoint.config,
        "weights": {name: _digest(tensor) for name, tensor in network.state_dict().items()},
        "books": [[*book.metric.words, _digest(book.vectors)] for book in model.books[:stage]],
        "computed": [model.device.type, model.bf16, model.compiled, model.input_range, latents.batch],
        "media": [repr(images.modality), images.mixing, images.part],
        "shape": one_line(first) if isinstance(first, Exception) else [*first.shape, str(first.dtype)],
        "items": _items_digest(images.items),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _source_files(network: nn.Module) -> list[Path]:
    """The files with the code of the network's modules."""
    modules = {sys.modules.get(type(module).__module__) for module in network.modules()}
    return sorted({Path(file) for module in modules if (file := getattr(module, "__file__", None))})


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _items_digest(items: Sequence[Item]) -> str:
    """A hash of names and contents: size and time of each file, or the bytes of what lies in memory."""
    times = dict[str, list[int]]()
    digest = hashlib.sha256()
    for item in items:
        file = item.source.file
        if file is None:
            stored: object = hashlib.sha256(item.source.read()).hexdigest()
        elif (stored := times.get(file)) is None:
            status = os.stat(file)
            stored = times[file] = [status.st_size, status.st_mtime_ns]
        digest.update(json.dumps([item.name, item.source.nbytes, stored]).encode())
    return digest.hexdigest()
