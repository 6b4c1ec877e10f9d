"""The page of the codes: the patches that each stands for, and images with their tokens drawn over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from codebook_tools.report.html.operate import about, usage_plot
from codebook_tools.report.html.page import Gallery, Page, Part, Picture
from codebook_tools.workflows.code_cards import Card, Codes, Example

_LIGHT = 0.5  # share of a token's colour over its image
_SHOWN = 160  # pixels, about, of an image with its tokens
_HEIGHT = 3.0


def codes_page(found: Codes, command: str) -> Page:
    """command: what the user typed."""
    return Page(
        title=f"codebook codes: {found.model}",
        headline=f"{found.used} of {found.size} codes are used, {found.used / found.size:.1%} of the codebook.",
        parts=[*codes_parts(found), *about(found.settings, found.seconds, found.version, found.seed)],
        command=command,
        warnings=found.warnings,
    )


def codes_parts(found: Codes) -> Iterator[Part]:
    """Images with their tokens, how often codes are used where all are shown, and the codes."""
    if found.examples:
        yield Gallery(
            "Images and their tokens",
            {example.name: _tokens(example, found.colours) for example in found.examples},
            "A token has the colour of its code; codes that are alike have colours that are.",
            ("", "the image", "its tokens", "decoded"),
        )
    if len(found.cards) == found.size:
        counts = torch.zeros(found.size, dtype=torch.int64)
        for card in found.cards:
            counts[card.code] = card.count
        yield usage_plot("How often codes are used", {"calibration data": counts})
    rows = {_name(card): list(_pictures(card)) for card in found.cards}
    seen = "the whole image" if found.side is None else f"{found.side} × {found.side} pixels"
    yield Gallery(
        f"{len(found.cards):,} of {found.size:,} codes",
        rows,
        "Of each code: what it decodes to, the patches of the latents nearest to it, and of those farthest. A patch is "
        f"{seen}, what a latent mostly depends on.",
        ("", *(("decoded",) if found.cards[0].decoded is not None else ()), "most typical", "least typical"),
        _HEIGHT,
    )


def _name(card: Card) -> str:
    near = ", ".join(map(str, card.neighbours))
    if not card.count:
        return f"{card.code}: dead; near {near}"
    return f"{card.code}: {card.share:.2%}, {card.count:,} tokens, error {card.error:.3g}; near {near}"


def _pictures(card: Card) -> Iterator[Picture]:
    if card.decoded is not None:
        yield Picture(card.decoded, f"what code {card.code} decodes to", small=True)
    for kind, patches in (("typical", card.typical), ("unusual", card.unusual)):
        if len(patches):
            yield Picture(_strip(patches), f"{len(patches)} {kind} patches of code {card.code}", small=True)


def _strip(patches: Tensor) -> Tensor:
    """(n, 3, side, side) -> (3, side, wide), side by side, with a gap of white."""
    spaced = functional.pad(patches, (0, 2), value=1.0)
    return torch.cat([*spaced], dim=2)[:, :, :-2]


def _tokens(example: Example, colours: Tensor) -> list[Picture]:
    times = max(1, _SHOWN // example.original.shape[-1])
    large = [_larger(image, times) for image in (example.original, example.decoded)]
    painted = colours[example.tokens].movedim(-1, 0)
    over = functional.interpolate(painted[None], large[0].shape[1:], mode="nearest")[0]
    blended = large[0] * (1 - _LIGHT) + over * _LIGHT
    many = len(set(example.tokens.flatten().tolist()))
    return [
        Picture(large[0], f"{example.name}, the image"),
        Picture(blended, f"{example.name}, its tokens in colours", f"{many} codes at {example.tokens.numel()} places"),
        Picture(large[1], f"{example.name}, decoded from its tokens"),
    ]


def _larger(image: Tensor, times: int) -> Tensor:
    return image.expand(3, -1, -1).repeat_interleave(times, 1).repeat_interleave(times, 2)
