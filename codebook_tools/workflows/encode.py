"""Tokens of all data by a model, written as a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.atomic import check_apart
from codebook_tools.data.dataset import Media
from codebook_tools.data.items import Item
from codebook_tools.data.rows import RowBatch, Rows
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.beam import beam_tokens, check_beam
from codebook_tools.evaluation.tokens import tokens_of
from codebook_tools.remapping.token_writers import (
    FORMATS,
    TokenWriter,
    check_token_output,
    items_path,
    writing_tokens,
)
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import SUBJECT, ResultHeader, header
from codebook_tools.workflows.session import open_request
from codebook_tools.workflows.target import Opened


@dataclass(frozen=True)
class LevelUse:
    """How many codes of a codebook the tokens of one level name.

    Attributes:
        key: Of the codebook.
        size: Its codes.
        used: Those that a token names.
    """

    key: str
    size: int
    used: int


@dataclass(frozen=True, kw_only=True)
class Encoding(ResultHeader):
    """The result of `encode`.

    Attributes:
        items: Written.
        tokens: Of all items and levels.
        shape: (items, *grid) of one level, (items, levels, *grid) of several; None where their grids differ.
        grids: Positions of each level, by axis; of items of unlike length those of the first.
        levels: Quantizer stages of the model, in its order.
        usage: Of each level.
    """

    items: int
    tokens: int
    shape: tuple[int, ...] | None
    grids: tuple[tuple[int, ...], ...]
    levels: int
    usage: tuple[LevelUse, ...]

    json_keys = (
        *("command", *SUBJECT, "items", "tokens", "shape", "grids", "levels", "usage"),
        *("outputs", "seconds", "version"),
    )


def encode(
    request: Request, output: Path, watch: Watch, shard: tuple[int, int] | None = None, beam: int = 1
) -> Encoding:
    """Write the tokens of all data, in order of name.

    Args:
        request: The model and its data.
        output: Ends in .npy, .safetensors, .parquet or .jsonl.
        watch: Progress and seconds by phase.
        shard: I, from 1, and N: write the I-th of N runs of items, which together are the whole in order; None for all.
        beam: Partial sums of residual levels that are kept of each latent; 1 for the nearest code at each level.

    Raises:
        CodebookError: Model or data cannot be opened, or the output cannot hold the tokens. Nothing is written then.
    """
    distributed.require_one("encode")
    if request.latents:
        raise CodebookError("tokens are made of data; leave out --latents")
    check_token_output(output, request.force)
    check_apart([output, items_path(output)], request.read)
    opened = open_request(request, watch, whole=True)
    check_beam(opened.model, beam, opened.few if beam > 1 else [])
    batch = max(1, opened.batch // beam)  # each item takes so many places in a batch of latents
    opened.calibration.keep(0)
    opened.model.kept.limit = 0
    media = in_run(opened.calibration, batch, shard)
    opened.settings |= {"shard": f"{shard[0]}/{shard[1]}" if shard else None, "beam": beam}
    used = [torch.zeros(opened.model.books[book].codebook.size, dtype=torch.bool) for book in opened.model.route]
    with writing_tokens(output, len(media), _about(opened), force=request.force) as writer:
        for items, codes in _tokens(opened, media, beam, batch, watch):
            for flags, level in zip(used, codes, strict=True):
                flags[level.flatten()] = True
            with watch.phase("write"):
                names = items.names if isinstance(items, RowBatch) else [str(item) for item in items]
                writer.add(names, [level.numpy() for level in codes])
    return _result(opened, output, writer, used, watch)


def in_run(media: Media, batch: int, shard: tuple[int, int] | None) -> Media:
    """The items of a shard: a run of whole batches, so that each batch is one of the whole, or of items where there are
    fewer batches than shards.

    Raises:
        CodebookError: There are fewer items than shards.
    """
    if shard is None:
        return media
    (i, n), total = shard, len(media)
    if total < n:
        raise CodebookError(f"--shard {i}/{n}: {total} {media.modality.many} make {total} shards at most")
    units = -(-total // batch)
    unit = batch if units >= n else 1
    units = units if units >= n else total
    start, stop = (i - 1) * units // n * unit, min(total, i * units // n * unit)
    items = media.items
    return media.subset(items.run(start, stop) if isinstance(items, Rows) else items[start:stop])


def _tokens(
    opened: Opened, media: Media, beam: int, batch: int, watch: Watch
) -> Iterator[tuple[Sequence[Item], list[Tensor]]]:
    """Batches of items, in their order, and their codes, (n, *grid) int64 on the CPU of each level."""
    batches = _encoded(opened, media, beam, batch, watch)
    if not media.ragged:
        yield from batches
        return
    waiting, place = dict[str, tuple[Item, list[Tensor]]](), 0
    for items, codes in batches:  # of one length each, near their places in the order
        waiting |= {item.name: (item, [level[i : i + 1] for level in codes]) for i, item in enumerate(items)}
        while place < len(media) and (name := media.items[place].name) in waiting.keys() | media.bad.keys():
            if name in waiting:
                item, levels = waiting.pop(name)
                yield [item], levels
            place += 1


def _encoded(
    opened: Opened, media: Media, beam: int, batch: int, watch: Watch
) -> Iterator[tuple[Sequence[Item], list[Tensor]]]:
    model, done = opened.model, 0
    for items, values in media.batches(batch):
        with watch.phase("encode"):
            codes = tokens_of(model, values) if beam == 1 else beam_tokens(model, values, beam).codes
            codes = [level.cpu() for level in codes]
        yield items, codes
        done += len(items)
        watch.progress("tokens", done, len(media))


def _about(opened: Opened) -> dict[str, str]:
    """What decoding asks for: kept by formats that have metadata."""
    return {
        "model_sha256": opened.model.checkpoint.sha256,
        "input_range": json.dumps(list(opened.model.input_range)),
        "modality": opened.model.modality.name,
    }


def _result(opened: Opened, output: Path, writer: TokenWriter, used: list[Tensor], watch: Watch) -> Encoding:
    model, grids = opened.model, writer.grids
    assert grids is not None
    levels = (len(grids),) if len(grids) > 1 else ()
    usage = [
        LevelUse(model.books[book].key, len(flags), int(flags.sum()))
        for book, flags in zip(model.route, used, strict=True)
    ]
    outputs = {"tokens": str(output)}
    if FORMATS[output.suffix].beside:
        outputs["items"] = str(items_path(output))
    return Encoding(
        **header("encode", opened),
        items=writer.items,
        tokens=writer.tokens,
        shape=(writer.items, *levels, *grids[0]) if len(set(grids)) == 1 and not writer.ragged else None,
        grids=grids,
        levels=len(grids),
        usage=tuple(usage),
        outputs=outputs,
        seconds=watch.seconds,
    )
