"""Beam search over residual stages: codes chosen jointly, so that what the last stage leaves is small.

After "Improving Test-Time Performance of RVQ-based Neural Codecs" (2025, arXiv 2509.19186): the nearest code at each
stage need not lead to the nearest sum. The greedy codes stay in the beam, so that no latent becomes worse. Candidates
of a stage are its nearest codes; partial sums are compared where residuals are taken, behind a stage's projections.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest_few
from codebook_tools.data.dataset import Media
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.evaluation.tokens import first_latents
from codebook_tools.models.model import Model
from codebook_tools.models.network import Quantize, searches
from codebook_tools.runtime.devices import wide
from codebook_tools.runtime.progress import Watch

WIDEST = 256
"""Partial sums of a latent that are kept at most: memory grows with the square of their number."""


@dataclass(eq=False)
class BeamTokens:
    """Tokens of one batch.

    Attributes:
        codes: (n, *grid) int64 of each quantizer stage.
        greedy: Sum of the squared distances, over dimensions and latents, that the nearest code at each stage leaves.
        error: The same of `codes`; never above `greedy`.
        latents: Number of latents.
    """

    codes: list[Tensor]
    greedy: float = 0.0
    error: float = 0.0
    latents: int = 0


def check_beam(model: Model, width: int, media: Sequence[Tensor]) -> None:
    """Check that a beam of this width has something to choose.

    Args:
        model: Its walk takes a `search`, or passes residuals on from stage to stage.
        width: Of the beam.
        media: Batches of data, on the first of which the residuals are looked at.

    Raises:
        CodebookError: The width is out of range, or the model has no residual stages.
    """
    if not 1 <= width <= WIDEST:
        raise CodebookError(f"--beam {width} is not within 1 and {WIDEST}")
    if width == 1:
        return
    path = model.checkpoint.path
    if len(model.route) == 1:
        raise CodebookError(
            f"--beam {width}: {path} has one codebook, whose nearest code is the best; leave out --beam"
        )
    if not searches(model.network) and not (media and _is_residual(model, media[0][:_FEW])):
        raise CodebookError(
            f"--beam {width}: the {len(model.route)} levels of {path} are not residual: a later one does not meet what "
            "those before it leave; leave out --beam"
        )


_FEW = 4  # items


def _is_residual(model: Model, media: Tensor) -> bool:
    """Whether each quantizer stage meets what those before it leave of the first latents."""
    met, left = list[Tensor](), list[Tensor]()

    def look(book: int, latents: Tensor) -> Tensor:
        met.append(latents)
        emitted = model.embed(model.assign(latents, book), book)
        left.append(latents - emitted)
        return emitted

    with torch.no_grad(), model.autocast():
        model.walk(model.encode_media(media), look)
    pairs = list(zip(met[1:], left, strict=False))
    return all(one.shape == two.shape for one, two in pairs) and all(
        float((one - two).abs().max()) <= _SAME * float(met[0].abs().max()) for one, two in pairs
    )


_SAME = 1e-4  # of the largest latent: rounding of bf16 apart


def beam_tokens(model: Model, media: Tensor, width: int, encoded: object = None) -> BeamTokens:
    """The codes of each quantizer stage, chosen jointly.

    Args:
        model: One that `check_beam` accepts.
        media: As for `Model.run`.
        width: Partial sums of each latent that are kept; 1 for the greedy search.
        encoded: What `encode_media` returned for them; None to encode them here.

    Raises:
        NotFiniteError: Latents are not finite.
    """
    beam = _Beam(model, width)
    with torch.no_grad(), model.autocast():
        encoded = model.encode_media(media) if encoded is None else encoded
        if searches(model.network):
            model.walk(encoded, beam.quantize, beam.search)
        else:
            first = first_latents(model, encoded)
            beam.search(first, range(len(model.route)), lambda stage, rest: beam.quantize(model.route[stage], rest))
    return beam.tokens


class _Beam:
    """The callbacks of one walk, and what they choose."""

    def __init__(self, model: Model, width: int) -> None:
        self.tokens = BeamTokens([])
        self._model, self._width = model, width
        self._within = False  # of a search; other stages are quantized by their nearest code
        self._candidates = torch.empty(0)  # of the last call of `quantize`, (m, count, *grid)

    def quantize(self, book: int, latents: Tensor) -> Tensor:
        """latents (m, dim, *grid) -> what their nearest codes emit, (m * count, dim, *grid)."""
        if not bool(torch.isfinite(latents).all()):
            raise NotFiniteError("the encoder's latents are not finite")
        codebook, rows = self._model.books[book].codebook, latents.movedim(1, -1)
        count = min(self._width, codebook.size) if self._within else 1
        few = nearest_few(rows.reshape(-1, rows.shape[-1]), codebook, count)
        self._candidates = few.reshape(*rows.shape[:-1], count).movedim(-1, 1)
        if not self._within:
            self.tokens.codes.append(self._candidates[:, 0])
        return self._model.embed(self._candidates.flatten(0, 1), book)

    def search(self, latents: Tensor, stages: Iterable[int], quantize: Quantize) -> Tensor:
        """As Search: `latents` less what the best path leaves."""
        self._within = True
        n = len(latents)
        left, paths = latents[:, None], list[Tensor]()  # (n, kept, dim, *grid), and codes (n, kept, *grid) by stage
        for stage in stages:
            emitted = quantize(stage, left.flatten(0, 1))
            count, one = self._candidates.shape[1], left.shape[2:]
            rest = (left[:, :, None] - emitted.reshape(n, left.shape[1], count, *one)).flatten(1, 2)
            kept = self._kept(rest.float().square().sum(2))  # of bf16 a sum would be too rough
            left = rest.gather(1, kept.unsqueeze(2).expand(-1, -1, *rest.shape[2:]))
            codes = self._candidates.reshape(n, -1, *one[1:])
            paths = [*(path.gather(1, kept // count) for path in paths), codes.gather(1, kept)]
        self._within = False
        errors = wide(left).square().sum(2)
        chosen = errors.argmin(1, keepdim=True)  # of equals the first, which is the greedy path
        best = chosen.to(left.device)
        self.tokens.codes += [path.gather(1, best)[:, 0] for path in paths]
        self.tokens.greedy += float(errors[:, 0].sum())
        self.tokens.error += float(errors.gather(1, chosen).sum())
        self.tokens.latents = best.numel()
        return latents - left.gather(1, best.unsqueeze(2).expand(-1, -1, *left.shape[2:]))[:, 0]

    def _kept(self, errors: Tensor) -> Tensor:
        """(n, kept, *grid) int64 of errors (n, paths, *grid): the greedy path, which is first, and the best others."""
        first = torch.zeros_like(errors[:, :1], dtype=torch.int64)
        others = min(self._width, errors.shape[1]) - 1
        if not others:
            return first
        return torch.cat([first, errors[:, 1:].topk(others, 1, largest=False).indices + 1], 1)


@dataclass(frozen=True)
class BeamGain:
    """What a beam gains over the greedy search.

    Attributes:
        width: Of the beam.
        latents: Number of latents.
        distortion: Mean squared distance from a latent to the sum of its codes, over dimensions: "greedy" and "beam".
        mse: Mean squared error of the reconstructions: "greedy" and "beam".
    """

    width: int
    latents: int
    distortion: dict[str, float]
    mse: dict[str, float]


def beam_gain(model: Model, images: Media, width: int, batch: int, watch: Watch) -> BeamGain:
    """Measure both searches on all of the data.

    Args:
        model: One that `check_beam` accepts.
        images: Images or clips.
        width: Of the beam.
        batch: Items per batch of the greedy search; a beam takes fewer, as it keeps many partial sums of each.
        watch: Is told the progress.
    """
    errors, squares, latents, values, done = [0.0, 0.0], [0.0, 0.0], 0, 0, 0
    for items, media in images.batches(max(1, batch // width)):
        with torch.no_grad(), model.autocast():
            encoded = model.encode_media(media)
        for i, each in enumerate((1, width)):
            tokens = beam_tokens(model, media, each, encoded)
            errors[i] += tokens.error
            with torch.no_grad():
                decoded = model.modality.clamped(
                    model.decode_walked(encoded, partial(_replayed, model, tokens.codes[:]))
                )
            squares[i] += float(wide(decoded - media.to(decoded.device)).square().sum())
        latents, values, done = latents + tokens.latents, values + media.numel(), done + len(items)
        watch.progress("beam", done, len(images))
    if not latents:
        raise CodebookError("nothing was measured: none of the data can be read")
    distortion, mse = ([total / count for total in totals] for totals, count in ((errors, latents), (squares, values)))
    return BeamGain(width, latents, _named(distortion), _named(mse))


def _named(pair: Sequence[float]) -> dict[str, float]:
    return dict(zip(("greedy", "beam"), pair, strict=True))


def _replayed(model: Model, codes: list[Tensor], book: int, latents: Tensor) -> Tensor:
    """What the next of the codes emits."""
    return model.embed(codes.pop(0), book)
