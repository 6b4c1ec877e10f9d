"""What each code stands for: the patches nearest to it and farthest from it, what it decodes to, its neighbors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from codebook_tools.codebook import Codebook
from codebook_tools.data.array_pictures import following, lay_out
from codebook_tools.data.modality import Modality
from codebook_tools.data.splits import limited
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.extreme_latents import ExtremeLatents
from codebook_tools.evaluation.measure import reconstruct
from codebook_tools.evaluation.one_pass import LatentSource, run_pass
from codebook_tools.evaluation.receptive_field import Place, latent_grid, patches, receptive_side
from codebook_tools.models.model import Model
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import SUBJECT, ResultHeader, header
from codebook_tools.workflows.session import Opened, open_shown

SORTS = ("share", "map", "error")
NEIGHBORS = 4
_DISTANCES = 1 << 23  # at a time
_POSITIONS = 4  # on a side of the image that a code is decoded to
_EXAMPLES = 6  # images with their tokens drawn over them


@dataclass(frozen=True, eq=False)
class Card:
    """What a page says of one code.

    Attributes:
        code: Its index.
        count: Its tokens in the calibration data.
        share: Of all tokens.
        error: Mean squared distance of the latents that chose it; None of a dead code.
        neighbours: The codes nearest to it, the nearest first.
        typical: (n, 3, height, width) in [0, 1], patches of the latents nearest to it.
        unusual: (n, 3, height, width) in [0, 1], patches of those of its latents that are farthest from it.
        items: Names of the items of the nearest latents, where an item has one latent.
        decoded: (3, height, width), what the decoder makes of it alone; None where a position has several codes.
    """

    code: int
    count: int
    share: float
    error: float | None
    neighbours: tuple[int, ...]
    typical: Tensor
    unusual: Tensor
    decoded: Tensor | None
    items: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The promised keys."""
        return {name: getattr(self, name) for name in ("code", "count", "share", "error", "neighbours")} | (
            {"items": [*self.items]} if self.items else {}
        )


@dataclass(frozen=True, eq=False)
class Example:
    """A test item and its tokens.

    Attributes:
        name: Of the file.
        original: (channels, height, width) in [0, 1], the image, or the picture of the item.
        tokens: (rows, columns) int64.
        decoded: (channels, height, width) in [0, 1], the reconstruction.
        positions: Number of tokens; those of a frame that is drawn twice are in `tokens` twice.
    """

    name: str
    original: Tensor
    tokens: Tensor
    decoded: Tensor
    positions: int


@dataclass(frozen=True, kw_only=True)
class Codes(ResultHeader):
    """The result of `codes`.

    Attributes:
        size: Codes of the codebook.
        used: Codes with at least one token.
        side: Pixels of a patch; None for whole images.
        cards: In the order that was asked for, dead codes last.
        examples: A few test images.
        colors: (size, 3) in [0, 1], RGB, alike for codes that are alike.
    """

    size: int
    used: int
    side: int | None
    cards: tuple[Card, ...] = field(repr=False)
    examples: tuple[Example, ...] = field(repr=False)
    colors: Tensor = field(repr=False, compare=False)

    json_keys = (*SUBJECT, "size", "used", "side", "seconds", "outputs", "command", "version")

    def to_json(self) -> dict[str, Any]:
        """The promised keys."""
        return super().to_json() | {"codes": [card.to_json() for card in self.cards]}


def look_at_codes(request: Request, top: int, most: int, sort: str, watch: Watch) -> Codes:
    """One pass over the calibration data, and the patches of the codes that it chose.

    Args:
        request: The model and its data.
        top: Patches of each kind for a code.
        most: Codes with a card.
        sort: "share" (falling), "map" (by the first principal component) or "error" (falling); dead codes come last.
        watch: Progress and seconds by phase.

    Raises:
        CodebookError: A number is below 1, `sort` is unknown, or model or data cannot be opened.
    """
    distributed.require_one("codes")
    if request.latents:
        raise CodebookError(
            "codes shows patches of images, which latents have not: give --data; map and measure take --latents"
        )
    for name, value in (("top", top), ("most", most)):
        if value < 1:
            raise CodebookError(f"{name}={value} is below 1")
    if sort not in SORTS:
        raise CodebookError(f"sort={sort}: expected {', '.join(SORTS)}")
    opened = open_shown(request, watch)
    model, stage = opened.model, opened.model.chosen[0]
    codebook = model.books[stage].codebook
    extremes = _extremes(opened, codebook, stage, top, watch)
    places = _components(codebook.vectors.cpu(), extremes.used)
    side = receptive_side(model, opened.calibration, stage)
    opened.settings |= {"top": top, "most": most, "sort": sort}
    return Codes(
        **header("codes", opened),
        size=codebook.size,
        used=int(extremes.used.sum()),
        side=side,
        cards=_cards(opened, stage, extremes, _order(extremes, places, sort)[:most], side),
        examples=_examples(opened, stage),
        colors=_colors(places, extremes.used),
        seconds=watch.seconds,
    )


def _extremes(opened: Opened, codebook: Codebook, stage: int, top: int, watch: Watch) -> ExtremeLatents:
    """One pass over the calibration data. top: places of each kind for a code."""
    model, images = opened.model, opened.calibration
    with watch.phase("encode"):
        extremes = ExtremeLatents(codebook, top, latent_grid(model, images, stage))
        latents = model.latents(images, opened.request.batch_size, stage)
        run_pass(LatentSource(latents, codebook, "see the codes"), [extremes], watch)
    return extremes


def _order(extremes: ExtremeLatents, places: Tensor, sort: str) -> list[int]:
    """All codes in the order of their cards. places: (size, 3) on principal components."""
    keys = {"share": -extremes.counts.double(), "map": places[:, 0], "error": -extremes.error}
    falling = keys[sort].argsort(stable=True)
    alive = extremes.used[falling]
    return torch.cat([falling[alive], falling[~alive]]).tolist()


def _cards(
    opened: Opened, stage: int, extremes: ExtremeLatents, order: Sequence[int], side: int | None
) -> tuple[Card, ...]:
    model, grid = opened.model, extremes.grid
    typical, unusual = (
        _patches_of(places, order, opened, grid, side) for places in (extremes.nearest, extremes.farthest)
    )
    decoded = _decoded(opened, order) if len(model.route) == 1 else [None] * len(order)
    total = int(extremes.counts.sum())
    return tuple(
        Card(
            code,
            count := int(extremes.counts[code]),
            count / total,
            float(extremes.error[code]) if count else None,
            *(near, nearest, farthest, image),
            () if grid else tuple(str(place.item) for place in extremes.nearest.get(code, ())),
        )
        for code, near, nearest, farthest, image in zip(
            order, _neighbors(model.books[stage].codebook, order), typical, unusual, decoded, strict=True
        )
    )


def _patches_of(
    places: Mapping[int, Sequence[Place]], order: Sequence[int], opened: Opened, grid: tuple[int, ...], side: int | None
) -> list[Tensor]:
    """(n, 3, side, side) of each code, none of a dead one. places: of latents, by code. grid: of an image's latents."""
    groups = [places.get(code, ()) for code in order]
    images = patches(opened.calibration, [*chain(*groups)], grid, side, opened.request.batch_size)
    return [*torch.split(images, [len(group) for group in groups])]


def _decoded(opened: Opened, order: Sequence[int]) -> list[Tensor | None]:
    """What each code decodes to, as pictures."""
    model, modality = opened.model, opened.calibration.modality
    if modality.pictures:
        return decode_each(model, modality, order)
    batch = next((media for _, media in opened.calibration.batches(1)), None)
    return [None] * len(order) if batch is None else [*map(modality.picture, _decode_alone(model, batch, order))]


def _decode_alone(model: Model, blank: Tensor, codes: Sequence[int]) -> Iterator[Tensor]:
    """What the decoder makes of an item of the shape of `blank`, (1, ...), whose positions all have one code."""
    for code in codes:

        def alone(stage: int, latents: Tensor, code: int = code) -> Tensor:
            return model.embed(torch.full_like(latents[:, 0], code, dtype=torch.int64), stage)

        with torch.no_grad():
            yield model.run(blank, alone)[0].cpu()


def decode_each(model: Model, modality: Modality, codes: Sequence[int]) -> list[Tensor | None]:
    """What the decoder makes of a few positions that all have one code.

    Returns:
        (3, side, side) in [0, 1] of each code.
    """
    cells = modality.stride * _POSITIONS
    images = list[Tensor | None]()
    for some in torch.split(torch.tensor(codes), 64):
        blank = torch.zeros(len(some), modality.channels, cells, cells)

        def alone(stage: int, latents: Tensor, some: Tensor = some) -> Tensor:
            return model.embed(some.to(latents.device)[:, None, None].expand(-1, *latents.shape[2:]), stage)

        with torch.no_grad():
            decoded = model.run(blank, alone).clamp(0, 1).cpu()
        images += [image.expand(3, -1, -1) if modality.channels == 1 else image for image in decoded]
    return images


def _neighbors(codebook: Codebook, order: Sequence[int]) -> list[tuple[int, ...]]:
    """The codes nearest to each, the nearest first."""
    vectors = codebook.vectors.cpu().double()
    chosen = torch.tensor(order)
    most = min(NEIGHBORS + 1, codebook.size)
    tiles = torch.split(vectors[chosen], max(1, _DISTANCES // codebook.size))
    indices = torch.cat([torch.cdist(some, vectors).topk(most, largest=False).indices for some in tiles])
    return [
        tuple(other for other in others if other != code)[:NEIGHBORS]
        for code, others in zip(order, indices.tolist(), strict=True)
    ]


def _components(vectors: Tensor, used: Tensor) -> Tensor:
    """(size, 3) float64: places on the first principal components of the codes in use; 0 where there are fewer."""
    rows = vectors.double()
    own = rows[used] if bool(used.any()) else rows
    _, _, directions = torch.linalg.svd(own - own.mean(0), full_matrices=False)
    places = torch.zeros(len(rows), 3, dtype=torch.float64)
    places[:, : min(3, len(directions))] = (rows - own.mean(0)) @ directions[:3].T
    return places


def _colors(places: Tensor, used: Tensor) -> Tensor:
    """(size, 3) in [0, 1]: by rank among the codes in use, so that colors are used alike; dead codes are gray."""
    colors = torch.full(places.shape, 0.5)
    own = places[used]
    colors[used] = 0.1 + 0.85 * own.argsort(0).argsort(0).float() / max(1, len(own) - 1)
    return colors


def _examples(opened: Opened, stage: int) -> tuple[Example, ...]:
    modality, examples = opened.test.modality, list[Example]()
    few = opened.test.subset(limited(opened.test.items, _EXAMPLES, opened.request.seed))
    for items, media in few.batches(_EXAMPLES):
        decoded = reconstruct(opened.model, media)
        for item, own, codes, made in zip(items, media, decoded.codes[stage].cpu(), decoded.media.cpu(), strict=True):
            if own.ndim == 2 and following(own.shape, codes.shape) == 0 and codes.ndim == 1:
                own, made = own.T, made.T  # so that time runs along the picture, as along its tokens
            pictures = modality.picture(own), modality.picture(made, own)
            tokens = lay_out(codes, own.shape)
            examples.append(Example(str(item), pictures[0], tokens, pictures[1], codes.numel()))
    return tuple(examples)
