"""The page of the codes: typical patches of each, and items with their tokens drawn over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from codebook_tools.report.html.operate import usage_plot
from codebook_tools.report.html.page import Gallery, Page, Part, Picture
from codebook_tools.report.html.result_page import result_page
from codebook_tools.workflows.code_cards import Card, Codes, Example

_OPACITY = 0.5  # of a token's color over its image
_WIDTH = 160  # pixels, roughly, of an image with its tokens
_HEIGHT = 3.0  # rem, of a patch


def codes_page(codes: Codes, command: str) -> Page:
    """The page of `codebook codes`."""
    headline = f"{codes.used} of {codes.size} codes are used, {codes.used / codes.size:.1%} of the codebook."
    return result_page(codes, headline, codes_parts(codes), command)


def codes_parts(codes: Codes) -> Iterator[Part]:
    """Items with their tokens, the usage of codes where all of them are shown, and the codes."""
    if codes.examples:
        yield Gallery(
            "Items and their tokens",
            {example.name: _tokens(example, codes.colors) for example in codes.examples},
            "A token has the color of its code; codes that are close to each other have similar colors.",
            _HEIGHT
            if any(example.original.shape[2] > 2 * example.original.shape[1] for example in codes.examples)
            else None,
        )
    if len(codes.cards) == codes.size:
        counts = torch.zeros(codes.size, dtype=torch.int64)
        for card in codes.cards:
            counts[card.code] = card.count
        yield usage_plot("How often codes are used", {"calibration data": counts})
    used, dead = ([card for card in codes.cards if bool(card.count) is alive] for alive in (True, False))
    patch = (
        "the whole item, or of arrays the part around the latent"
        if codes.side is None
        else f"{codes.side} × {codes.side} pixels"
    )
    yield Gallery(
        f"{len(used):,} of the {codes.used:,} codes in use are drawn here",
        {_name(card): list(_pictures(card)) for card in used},
        "Of each code: what it decodes to, the patches of the latents nearest to it, and of those farthest. A patch is "
        f"{patch}, what a latent mostly depends on.",
        _HEIGHT,
    )
    decoded = [
        Picture(card.decoded, f"what dead code {card.code} decodes to", str(card.code), small=True)
        for card in dead
        if card.decoded is not None
    ]
    if decoded:
        yield Gallery("Dead codes", {"what each decodes to": decoded}, height=_HEIGHT)


def _name(card: Card) -> str:
    near = ", ".join(map(str, card.neighbours))
    usage = f"{card.share:.2%} of tokens ({card.count:,})"
    return f"code {card.code}: {usage}, distortion {card.error:.3g}, closest codes {near}"


def _pictures(card: Card) -> Iterator[Picture]:
    if card.decoded is not None:
        yield Picture(card.decoded, f"what code {card.code} decodes to", "decoded", small=True)
    for kind, patches in (("nearest", card.typical), ("farthest", card.unusual)):
        if len(patches):
            description = f"{len(patches)} patches of the latents {kind} to code {card.code}"
            named = f": {', '.join(card.items)}" if kind == "nearest" and card.items else ""
            yield Picture(_strip(patches), description, f"{kind} latents{named}", small=True)


def _strip(patches: Tensor) -> Tensor:
    """Patches (n, 3, height, width) side by side with white gaps, (3, height, width)."""
    gap = 2 if patches.shape[2] == patches.shape[3] else 12  # lines need more air than squares
    spaced = functional.pad(patches, (0, gap), value=1.0)
    return torch.cat([*spaced], dim=2)[:, :, :-gap]


def _tokens(example: Example, colors: Tensor) -> list[Picture]:
    times = max(1, _WIDTH // example.original.shape[-1])
    original, decoded = (_larger(image, times) for image in (example.original, example.decoded))
    painted = colors[example.tokens].movedim(-1, 0)
    over = functional.interpolate(painted[None], original.shape[1:], mode="nearest")[0]
    blended = original * (1 - _OPACITY) + over * _OPACITY
    many = len(set(example.tokens.flatten().tolist()))
    return [
        Picture(original, f"{example.name}, the original", "the original"),
        Picture(
            blended,
            f"{example.name}, its tokens in colors",
            f"its tokens: {many} codes at {example.positions} positions"
            if example.positions > 1
            else f"its token: code {int(example.tokens)}",
        ),
        Picture(decoded, f"{example.name}, decoded from its tokens", "decoded from its tokens"),
    ]


def _larger(image: Tensor, times: int) -> Tensor:
    return image.expand(3, -1, -1).repeat_interleave(times, 1).repeat_interleave(times, 2)
