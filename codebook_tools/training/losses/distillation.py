"""Distillation: the reconstructions of the original model as a target."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from torch import Tensor

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.models.model import Book, Model
from codebook_tools.models.stored_codes import effective_rows


class Original:
    """A second model with the weights and codes of the model's file, whatever the model has now.

    Attributes:
        model: The original, frozen and in evaluation mode.
    """

    def __init__(self, model: Model) -> None:
        network, stored = deepcopy(model.network), model.checkpoint
        network.load_state_dict(
            {name: stored.tensor(model.keys[name]).reshape(now.shape) for name, now in network.state_dict().items()}
        )
        books = (replace(book, vectors=_as_stored(stored, book).to(model.device)) for book in model.books)
        self.model = replace(model, network=network.eval().requires_grad_(False), books=tuple(books))

    def __call__(self, media: Tensor) -> Tensor:
        """The original's reconstruction of media (n, ...), not clamped and without gradients."""
        return self.model.pass_through(media, wait=False).media.detach()


def _as_stored(stored: Checkpoint, book: Book) -> Tensor:
    return effective_rows(stored, book.stored) if book.read is None else book.read
