"""The model as its file has it: what that reconstructs is a target for a fine-tuning that is not to stray from it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from torch import Tensor

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.models.model import Book, Model
from codebook_tools.models.stored_codes import effective_rows


class Original:
    """Network and codes of a model's file, whatever became of the model since. It is as large as the model."""

    def __init__(self, model: Model) -> None:
        network, stored = deepcopy(model.network), model.checkpoint
        network.load_state_dict(
            {name: stored.tensor(model.keys[name]).reshape(now.shape) for name, now in network.state_dict().items()}
        )
        books = (replace(book, vectors=_as_stored(stored, book).to(model.device)) for book in model.books)
        self.model = replace(model, network=network.eval().requires_grad_(False), books=tuple(books))

    def __call__(self, media: Tensor) -> Tensor:
        """What the original makes of media, not clamped and without gradients."""
        return self.model.pass_through(media, wait=False).media.detach()


def _as_stored(stored: Checkpoint, book: Book) -> Tensor:
    return effective_rows(stored, book.stored) if book.read is None else book.read
