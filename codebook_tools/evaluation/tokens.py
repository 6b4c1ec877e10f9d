"""Tokens of a model, stage by stage: those that it chooses, and what it decodes from tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from codebook_tools.data.modality import Modality
from codebook_tools.errors import CodebookError, NotFiniteError
from codebook_tools.models.model import Model
from codebook_tools.models.network import walks

Grid = tuple[int, ...]
"""Positions of a quantizer stage, by axis."""


def tokens_of(model: Model, media: Tensor) -> list[Tensor]:
    """The codes that each quantizer stage chooses, in the order of `model.route`.

    Args:
        model: In evaluation mode.
        media: As for `Model.run`.

    Returns:
        (n, *grid) int64 of each stage. Grids of stages may differ.

    Raises:
        NotFiniteError: Latents are not finite.
        CodebookError: As `Model.run`.
    """
    codes = list[Tensor]()

    def choose(book: int, latents: Tensor) -> Tensor:
        if not bool(torch.isfinite(latents).all()):
            raise NotFiniteError("the encoder's latents are not finite")
        codes.append(model.assign(latents, book))
        return model.embed(codes[-1], book)

    with torch.no_grad(), model.autocast():
        model.walk(model.encode_media(media), choose)
    return codes


class _FirstStageError(BaseException):
    """The walk has reached the first stage: the rest of it need not run."""


def first_latents(model: Model, encoded: object) -> Tensor:
    """The latents of the first quantizer stage, (n, dim, *grid) float32. encoded: what `encode_media` returned."""
    reached = list[Tensor]()

    def stop(book: int, latents: Tensor) -> Tensor:
        reached.append(latents)
        raise _FirstStageError

    with torch.no_grad(), model.autocast(), suppress(_FirstStageError):
        model.walk(encoded, stop)
    return reached[0]


@dataclass(eq=False)
class TokenDecoder:
    """Decodes tokens. The encoder runs once for each size of a batch, on media without content.

    A walk takes what `encode` returned; the tokens take the place of every code that it would choose.

    Attributes:
        model: In evaluation mode.
        modality: How the network takes media.
        shape: Of an item, (channels, ...); None to infer it from the tokens.
    """

    model: Model
    modality: Modality
    shape: tuple[int, ...] | None = None
    _blanks: dict[tuple[int, Grid], object] = field(default_factory=dict, repr=False)

    def __call__(self, codes: Sequence[Tensor]) -> Tensor:
        """Decode a batch.

        Args:
            codes: (n, *grid) int64 of each quantizer stage, in range.

        Returns:
            (n, channels, ...) float32 on the CPU: images in [0, 1], waveforms with 1 at full scale.

        Raises:
            CodebookError: The tokens have other grids than the model makes, or do not tell the shape of an item.
            NotFiniteError: What is decoded is not finite.
        """
        model, rest = self.model, list(codes)
        grids = tuple(tuple(stage.shape[1:]) for stage in codes)

        def replay(book: int, latents: Tensor) -> Tensor:
            if tuple(latents.shape[2:]) != tuple(rest[0].shape[1:]):
                raise CodebookError(
                    f"the tokens of level {len(codes) - len(rest)} have the layout {_by(rest[0].shape[1:])}, and the "
                    f"model's {_by(latents.shape[2:])} beside a first level of {_by(grids[0])}; are they its own?"
                )
            return model.embed(rest.pop(0).to(latents.device), book)

        with torch.no_grad():
            try:
                decoded = model.decode_walked(self._blank(len(codes[0]), grids[0]), replay)
            except CodebookError as error:
                if self.shape is not None or self._shape_of(grids[0]) is not None or not walks(model.network):
                    raise
                raise CodebookError(
                    f"tokens of {_by(grids[0])} do not tell the shape of an item of this model: give data of that "
                    f"shape with --data ({error})"
                ) from error
        if not bool(torch.isfinite(decoded).all()):
            raise NotFiniteError("the decoder's output is not finite")
        return self.modality.clamped(decoded).cpu()

    def _blank(self, n: int, grid: Grid) -> object:
        """What `encode` returns for n items whose first stage has this grid."""
        if (n, grid) not in self._blanks:
            model, shape = self.model, self.shape or self._shape_of(grid)
            self._blanks.clear()  # one at a time: the last batch is smaller than the others
            if shape is not None:
                # Ones and not zeros: a codec that divides by loudness, and multiplies by it again, then has 1.
                with torch.no_grad(), model.autocast():
                    self._blanks[n, grid] = model.encode_media(torch.ones(n, *shape))
            else:  # a walk may begin with latents, too
                dim = model.books[model.route[0]].vectors.shape[1]
                blank = torch.zeros(n, dim, *grid, device=model.device)
                self._blanks[n, grid] = blank.movedim(1, 1 if model.latent_axis is None else model.latent_axis)
        return self._blanks[n, grid]

    def _shape_of(self, grid: Grid) -> tuple[int, ...] | None:
        return self.modality.shape_of(grid, lambda media: first_latents(self.model, self.model.encode_media(media)))


def _by(grid: Sequence[int]) -> str:
    return "x".join(map(str, grid)) or "one position"
