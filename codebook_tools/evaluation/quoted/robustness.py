"""Robustness: the error of reconstructions after some tokens were swapped for codes near them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.clustering.assignment import nearest_few
from codebook_tools.codebook import Codebook
from codebook_tools.data.sampling import sample_keys
from codebook_tools.evaluation.exact import exact
from codebook_tools.evaluation.one_pass import Batch
from codebook_tools.evaluation.quoted.figure import QuotedFigure
from codebook_tools.evaluation.quoted.tally import Tally
from codebook_tools.models.model import Model
from codebook_tools.runtime.devices import wide

SHARE = 0.1
"""Of the tokens that are swapped."""

NEAR = 10
"""Codes that a token may be swapped for: those nearest to its own, by what the decoder gets of them."""


class Robustness(QuotedFigure):
    """The mse where each token of each quantizer stage is swapped with a chance of SHARE."""

    def begin(self, model: Model) -> None:
        """Find the codes near each code."""
        self._near = [neighbors(model.books[book].codebook) for book in model.route]

    def tally(self, batch: Batch, model: Model) -> Tally:
        assert batch.media is not None
        media = batch.media[0]
        tokens = iter([self._swapped(batch, stage) for stage in range(len(batch.stages))])
        decoded = model.run(media, lambda book, latents: model.embed(next(tokens).to(latents.device), book))
        error = wide(model.modality.clamped(decoded) - media.to(decoded.device)).square().sum()
        return Tally(count=media.numel(), total=exact(float(error)))

    def _swapped(self, batch: Batch, stage: int) -> Tensor:
        """(n, *grid) int64: the tokens of a quantizer stage, some of them swapped."""
        codes = batch.stages[stage].cpu()
        return swapped(codes, self._near[stage], sample_keys(batch.items, codes[0].numel(), self.seed + stage))


def swapped(codes: Tensor, near: Tensor, keys: NDArray[np.uint64]) -> Tensor:
    """Swap tokens by the hashes of their places, which do not depend on batches.

    Args:
        codes: (n, *grid) int64.
        near: (size, m) int64: of each code those that it may be swapped for; none for no swap.
        keys: (n * positions,) uint64.

    Returns:
        (n, *grid) int64.
    """
    if not near.shape[1]:
        return codes
    chance = torch.from_numpy((keys >> np.uint64(32)).astype(np.int64)) < int(SHARE * 2**32)
    choice = torch.from_numpy((keys & np.uint64(2**32 - 1)).astype(np.int64)) % near.shape[1]
    flat = codes.flatten()
    return torch.where(chance, near[flat, choice], flat).reshape(codes.shape)


def neighbors(codebook: Codebook) -> Tensor:
    """(size, NEAR or size - 1) int64: of each code the others nearest to it, as the decoder gets them."""
    emitted = codebook.emitted.cpu()
    few = nearest_few(emitted, Codebook(emitted), min(NEAR + 1, len(emitted)))
    own = few == torch.arange(len(few))[:, None]
    own[~own.any(1), -1] = True  # of more equal codes than fit, it is none of them
    return few[~own].reshape(len(few), -1)
