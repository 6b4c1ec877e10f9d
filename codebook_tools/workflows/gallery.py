"""A few test items for a page, with their reconstruction in each phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codebook_tools.data.items import Item
from codebook_tools.evaluation.measure import reconstruct
from codebook_tools.models.model import Book, Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training.state import FineTuned
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import Opened, open_request


@dataclass(frozen=True, eq=False)
class GalleryImage:
    """A test image, and its reconstruction in each phase.

    Attributes:
        name: Of the file.
        rank: Of its error among all test images, by the model that was kept: "worst", "median" or "best".
        original: The item, an image (channels, height, width) in [0, 1].
        stages: The reconstruction by phase, of that shape.
        picture: Draws an item, and a reconstruction like an item; None for images.
    """

    name: str
    rank: str
    original: Tensor
    stages: Mapping[str, Tensor]
    picture: Callable[..., Tensor] | None = None

    @property
    def pictures(self) -> dict[str, Tensor]:
        """(channels, height, width) in [0, 1]: the item, under "original", and its reconstructions by phase."""
        if self.picture is None:
            return {"original": self.original, **self.stages}
        made = {phase: self.picture(values, self.original) for phase, values in self.stages.items()}
        return {"original": self.picture(self.original), **made}

    @property
    def errors(self) -> dict[str, float]:
        """Mean squared error, stage by stage."""
        return {stage: float((image - self.original).square().mean()) for stage, image in self.stages.items()}


def gallery_of_run(
    opened: Opened, books: tuple[Book, ...], operated: bool, tuned: FineTuned | None, watch: Watch
) -> tuple[GalleryImage, ...]:
    """The worst, the median and the best test item. The model is left as it is.

    Args:
        opened: The model in its kept state, and its data.
        books: The codebooks before anything changed.
        operated: Whether a surgery changed them.
        tuned: The fine-tuning; None without one.
        watch: Progress.
    """
    with _as_it_was(opened.model):
        return _gallery(opened, _stages(opened.model, books, operated, tuned), watch)


def gallery_of_files(stages: Mapping[str, Request], watch: Watch) -> tuple[GalleryImage, ...]:
    """As `gallery_of_run`, with a file for each phase; the errors of the last rank the images.

    Args:
        stages: By name of the phase; all of the same data.
        watch: Progress.
    """
    last = open_request([*stages.values()][-1], watch)
    return _gallery(last, ((name, open_request(request, watch).model) for name, request in stages.items()), watch)


def _gallery(opened: Opened, models: Iterator[tuple[str, Model]], watch: Watch) -> tuple[GalleryImage, ...]:
    """opened: whose errors rank the images. models: by phase."""
    chosen, originals = _chosen(opened, watch)
    stages = {stage: [reconstruct(model, one[None]).media[0].cpu() for one in originals] for stage, model in models}
    picture = opened.test.modality.picture
    return tuple(
        GalleryImage(str(item), rank, originals[i].cpu(), {stage: made[i] for stage, made in stages.items()}, picture)
        for i, (rank, item) in enumerate(zip(RANKS, chosen, strict=False))
    )


RANKS = ("worst", "median", "best")


def _chosen(opened: Opened, watch: Watch) -> tuple[Sequence[Item], list[Tensor]]:
    """An image of each rank, by the model as it is."""
    readable, errors = list[Item](), list[Tensor]()
    media = opened.test.whole()
    for items, pixels in media.batches(opened.request.batch_size):
        reconstructions = reconstruct(opened.model, pixels).media.cpu()
        errors.append((reconstructions - pixels.cpu()).square().flatten(1).mean(1))
        readable += items
        watch.progress("choose what to show", len(readable), len(opened.test))
    order = torch.cat(errors).argsort(stable=True)
    chosen = [readable[place] for place in dict.fromkeys((int(order[-1]), int(order[len(order) // 2]), int(order[0])))]
    return chosen, [media.load([item])[1][0] for item in chosen]


def _stages(
    model: Model, books: tuple[Book, ...], operated: bool, tuned: FineTuned | None
) -> Iterator[tuple[str, Model]]:
    """The model in the state of each phase there is, one after another."""
    after = model.books
    if tuned:
        model.network.load_state_dict(tuned.start.weights)
    model.books = books
    yield "before", model
    if operated:
        model.books = tuple(map(replace, after))
        if tuned:
            tuned.start.restore(model)
        yield "surgery", model
    if tuned:
        model.books = tuple(map(replace, after))
        tuned.best.restore(model)
        model.round_to_stored()
        yield "finetuned", model


@contextmanager
def _as_it_was(model: Model) -> Iterator[None]:
    """Restore weights and codebooks at the end."""
    weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    books = model.books
    try:
        yield
    finally:
        model.network.load_state_dict(weights)
        model.books = books
