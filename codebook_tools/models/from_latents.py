"""A model that files of latents enter where its encoder ends: each row is what `encode` would return for a position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from codebook_tools.data.latent_files import FileLatents
from codebook_tools.data.latents import rows_of
from codebook_tools.data.modality import AS_IT_IS
from codebook_tools.errors import CodebookError
from codebook_tools.models.agreement import has_quantizer
from codebook_tools.models.model import Model
from codebook_tools.models.network import Quantize, walks
from codebook_tools.models.registry import CUSTOM
from codebook_tools.runtime.devices import sent

AT_ONCE = 8192
"""Rows that walk through the stages at once: all stages keep what they meet until the batch is done."""

_PROBED = 64  # rows by which it is seen how latents enter
_MIXED = 1e-3  # relative: what another order of sums leaves is far below


@dataclass(eq=False)
class LatentsModel(Model):
    """A model whose media are rows of files, (n, dim) float32: what its network's `encode` would return, were it asked.

    Rows walk through the stages, and through what the network has around and between them. Nothing is decoded.

    Attributes:
        grid: Lengths of the axes of one position, all 1, as the network's walk takes them.
    """

    grid: tuple[int, ...] = (1,)

    def run(self, media: Tensor, quantize: Quantize) -> Tensor:
        """As Model's, up to the decoder.

        Returns:
            What the decoder would get, where that is one tensor; else (0,).
        """
        with self.autocast():
            walked = self._walk(self._encoded(media), quantize)
        return walked if isinstance(walked, Tensor) else torch.empty(0)

    def _encoded(self, media: Tensor, keep: bool = True) -> object:
        return _entered(self.network, sent(media, self.device).reshape(*media.shape, *self.grid))


@dataclass(frozen=True, eq=False)
class WalkedLatents:
    """The latents that meet a codebook, of rows that enter before the first one.

    Attributes:
        rows: The files.
        model: Its codebooks before `stage` quantize.
        stage: Index of the codebook.
    """

    rows: FileLatents
    model: LatentsModel
    stage: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        for _, latents in self.by_item():
            yield latents.flatten(0, 1)

    @property
    def part(self) -> tuple[int, int]:
        """That of the rows."""
        return self.rows.part

    def by_item(self) -> Iterator[tuple[NDArray[Any], Tensor]]:
        """Hashes of rows, (n,), and their latents, (n, positions, dim) float32, by batch.

        Raises:
            CodebookError: Names the first row that is not finite.
        """
        for hashes, rows in self.rows.batches(AT_ONCE):
            with torch.no_grad():
                latents = self.model.encode(rows, self.stage, keep=False)
            yield hashes, latents.movedim(1, -1).flatten(1, -2)


def from_latents(model: Model, rows: Tensor, name: str) -> LatentsModel:
    """The model that rows of a file enter.

    Args:
        model: With or without a network.
        rows: (n, dim), some of the file, at least one.
        name: Of the file, for messages.

    Raises:
        CodebookError: The rows do not fit, or are not all that the network's stages look at.
    """
    network = model.network
    refuse_entry(model)
    rows, dim = rows[:_PROBED], rows.shape[1]
    if (width := getattr(network, "latent_dim", dim)) != dim:
        own = model.books[0]
        one = f"{own.key} alone, say," if own.codebook.dim == dim else "one codebook"
        raise CodebookError(
            f"{name} holds latents (n, {dim}), and the encoder makes (n, {width}): give those, or name {one} with "
            "--codebook-key, and give what that meets"
        )
    shared = {entry.name: getattr(model, entry.name) for entry in fields(Model) if entry.init}
    grids = ((1, 1), (1,), ()) if model.modality.pictures else ((1,), (1, 1), ())
    reason = ""
    for grid in grids:
        entering = LatentsModel(**shared | {"input_range": AS_IT_IS}, grid=grid)
        try:
            _probe(entering, rows)
        except CodebookError as error:
            reason = reason or str(error)
            continue
        _refuse_mixing(entering, rows, name)
        return entering
    raise CodebookError(
        f"{name} holds latents (n, {dim}), which do not enter the network: {reason}; give what its encode returns "
        "(where that is more than latents, the network needs from_latents), or name one codebook with --codebook-key "
        "and give what that meets"
    )


def refuse_entry(model: Model) -> None:
    """Raise CodebookError where a family's stages do not all follow from the latents of the first."""
    network, keys = model.network, ", ".join(book.key for book in model.books)
    if model.family != CUSTOM and walks(network) and not hasattr(network, "from_latents"):
        raise CodebookError(
            f"the stages of {model.checkpoint.path} do not follow from latents of the first alone: choose one codebook "
            f"with --codebook-key, of {keys}"
        )


def _entered(network: Any, latents: Tensor) -> object:
    """Latents (n, dim, *grid) as the network's `encode` would return them."""
    return network.from_latents(latents) if hasattr(network, "from_latents") else latents


def _probe(model: LatentsModel, rows: Tensor) -> None:
    """Raise CodebookError where rows do not walk through all stages, or the network's own quantizer refuses them."""
    with torch.no_grad():
        model.pass_through(rows)
        if has_quantizer(model.network):
            try:
                model.network.quantize(model.encode_media(rows))
            except Exception as error:  # the user's code, or a library's
                raise CodebookError(f"the network's quantize fails: {type(error).__name__}: {error}") from error


def _refuse_mixing(model: LatentsModel, rows: Tensor, name: str) -> None:
    """Raise CodebookError where a walk looks at several positions at once, which rows of a file do not have."""
    if not (model.grid and walks(model.network)):
        return
    one = rows.to(model.device).T.reshape(1, rows.shape[1], len(rows), *model.grid[1:])

    def met(encoded: object) -> list[Tensor]:
        """What all stages meet, where each leaves half, which depends on no near-tie."""
        latents = list[Tensor]()

        def half(stage: int, of_stage: Tensor) -> Tensor:
            latents.append(rows_of(of_stage))
            return of_stage / 2

        model.walk(encoded, half)
        return latents

    with torch.no_grad(), model.autocast():
        alone = met(model.encode_media(rows))
        try:
            together = met(_entered(model.network, one))
            alike = all(map(_alike, alone, together))
        except CodebookError:
            alike = False
    if not alike:
        raise CodebookError(
            f"the network's walk looks at several positions at once, which rows of {name} do not have: choose one "
            f"codebook with --codebook-key, of {', '.join(book.key for book in model.books)}, and give its own latents"
        )


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= _MIXED * float(one.abs().max())
