"""How a user's network turns stored rows into codes and searches them: decided by its own quantizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.effective import Effective
from codebook_tools.clustering.metric import COSINE_UNIT, METRICS
from codebook_tools.codebook import Metric
from codebook_tools.errors import CodebookError
from codebook_tools.models.agreement import Agreement, agreement, encoded_batches, has_quantizer
from codebook_tools.models.load import guesses, own_metric
from codebook_tools.models.model import Book, Model
from codebook_tools.models.network import walks
from codebook_tools.models.registry import CUSTOM, are_unit, unit_warning
from codebook_tools.models.stored_codes import codes_of_rows, owned_keys, stored_rows
from codebook_tools.models.transforms import alike, forms, refuse_unknown, transforms_beside

_FEW = 2  # items whose latents suffice to reject most interpretations


def settle(model: Model, media: Sequence[Tensor], metric: str | None) -> tuple[list[str], Agreement | None]:
    """Decide how effective codes follow from the rows of each codebook, and how codes are searched.

    A network with a quantizer of its own decides: the first interpretation counts with which it agrees, on calibration
    latents and on some near every code. Without one, a tensor beside a codebook that may change what comes out must be
    used by the network itself. The model's books are updated.

    Args:
        model: As loaded; `books` is replaced.
        media: Batches of calibration data.
        metric: A name of METRICS, the user's choice; None for none.

    Returns:
        Warnings, and the agreement with the network's quantizer; None without one, and for a family's network.

    Raises:
        CodebookError: A tensor may change the codes and nothing says how, or no interpretation agrees with the
            quantizer.
    """
    owned = {key for book in model.books for key in owned_keys(model.checkpoint, book.stored)}
    if model.family != CUSTOM:
        known = owned | set(model.keys.values())
        for book in model.books:
            refuse_unknown(book.stored, transforms_beside(model.checkpoint, book.stored, known), with_network=True)
        return [], None
    beside = [transforms_beside(model.checkpoint, book.stored, owned) for book in model.books]
    if not has_quantizer(model.network):
        for book, keys in zip(model.books, beside, strict=True):
            unused = [key for key in keys if not _is_used(model, key, media)]
            refuse_unknown(book.stored, unused, with_network=bool(model.network.state_dict()))
        if metric is None and own_metric(model.network) is None and _unit_rows(model):
            model.books = _searched_by(model.books, COSINE_UNIT)
            return [unit_warning(model.books[0].key)], None
        return list(guesses(model, metric)), None
    return [], _ask(model, media, beside, metric)


def _ask(model: Model, media: Sequence[Tensor], beside: Sequence[list[str]], metric: str | None) -> Agreement:
    """Try interpretations until the network's own quantizer agrees with one."""
    encoded, first = encoded_batches(model, media), Agreement(0, 0, 0, 0.0, "nothing was encoded")
    before, few = model.books, [batch[:_FEW] for batch in encoded[-1:] if isinstance(batch, Tensor)]
    for i, (books, name) in enumerate(_readings(model, beside, metric)):
        model.books = books
        if i and few and not agreement(model, few).ok:
            continue
        result = agreement(model, encoded)
        first = result if i == 0 else first
        if not result.ok:
            continue
        if metric is not None and name != metric:
            raise CodebookError(f"--metric {metric}: the network's quantize searches by {name}; leave --metric out")
        return result
    model.books = before
    if not walks(model.network):
        read = _read(model, encoded)
        for name in _metrics(model, metric):
            model.books = _searched_by([read], METRICS[name])
            if (result := agreement(model, encoded)).ok:
                return result
        model.books = before
    names = ", ".join(sorted({key for keys in beside for key in keys})[:3])
    also = f", also through {names}" if names else ""
    raise CodebookError(
        f"the network's quantize disagrees with what is read of {model.books[0].key}{also}: {first.reason}; its codes "
        "cannot be operated on"
    )


def _readings(model: Model, beside: Sequence[list[str]], metric: str | None) -> Iterator[tuple[tuple[Book, ...], str]]:
    """Each possible interpretation of the codebooks, likelier ones first, with the name of the metric."""
    before, names = model.books, _metrics(model, metric)  # the model changes while these are tried
    first = before[0].stored
    unit_rows = are_unit(stored_rows(model.checkpoint.tensor(first.key), first))
    for form in forms(model.checkpoint, first, beside[0], unit_rows):
        try:
            books = tuple(_read_by(model, book, form, first) for book in before)
        except (KeyError, CodebookError):
            continue
        for name in names:
            yield _searched_by(books, METRICS[name]), name


def _read_by(model: Model, book: Book, form: Effective, first: FoundCodebook) -> Book:
    of_stage = form if book.key == first.key else alike(form, first, book.stored, model.checkpoint.shapes)
    stored = replace(book.stored, form=of_stage if form.kind in ("rows", "steps") else None)
    rows = stored_rows(model.checkpoint.tensor(stored.key), stored)
    codes = codes_of_rows(model.checkpoint, stored, rows)
    if codes.shape[1] != book.vectors.shape[1] or not bool(codes.isfinite().all()):
        raise CodebookError(f"{stored.key} does not have such codes")
    return replace(book, stored=stored, vectors=codes.to(model.device))


def _metrics(model: Model, metric: str | None) -> list[str]:
    """Names of METRICS to try: the user's, then the likely ones, then the others."""
    assumed = model.books[0].metric.name
    likely = [metric, "cosine-unit" if assumed == "euclidean" and _unit_rows(model) else None, assumed, *METRICS]
    return list(dict.fromkeys(name for name in likely if name is not None))


def _unit_rows(model: Model) -> bool:
    """Whether the codes of all books have unit length."""
    return all(are_unit(book.vectors) for book in model.books)


def _searched_by(books: Iterable[Book], metric: Metric) -> tuple[Book, ...]:
    return tuple(replace(book, metric=metric) for book in books)


def _is_used(model: Model, key: str, media: Sequence[Tensor]) -> bool:
    """Whether encode, walk or decode read a tensor: filled with NaN, it makes their output NaN."""
    name = next((name for name, of in model.keys.items() if of == key), None)
    if name is None:
        return False
    tensor = model.network.state_dict()[name]
    before = tensor.clone()
    try:
        with torch.no_grad():
            tensor.fill_(torch.nan)
            return bool(model.run(media[0][:1], lambda book, latents: latents).isnan().any())
    finally:
        with torch.no_grad():
            tensor.copy_(before)


def _read(model: Model, encoded: Sequence[Any]) -> Book:
    """The one codebook of a network, its codes read through the quantizer row by row.

    With all rows set to the same one, the quantizer emits that row's code, whichever it chooses.
    """
    (book,) = model.books
    name = next(name for name, key in model.keys.items() if key == book.key)
    network = deepcopy(model.network)
    tensor = network.state_dict()[name]
    stored = book.stored
    rows = tensor.movedim(stored.axis, 0).clone()
    latents, codes = encoded[0][:1], list[Tensor]()
    with torch.no_grad():
        for row in rows[: stored.size]:
            tensor.copy_(row.expand_as(rows).movedim(0, stored.axis))
            try:
                quantized = network.quantize(latents)[0]
            except Exception as error:  # the user's code
                raise CodebookError(f"the network's quantize fails: {type(error).__name__}: {error}") from error
            first = quantized.movedim(model.axis_of(quantized), 1)[:1]
            codes.append(first.reshape(*first.shape[:2], -1)[0, :, 0].float())
    vectors = torch.stack(codes).contiguous()
    if vectors.shape != book.vectors.shape or not bool(vectors.isfinite().all()):
        return book
    padding = model.checkpoint.shapes[book.key][stored.axis] - stored.size
    form = Effective("opaque", (), stored.dim, padding)
    return replace(book, stored=replace(stored, form=form), vectors=vectors, read=vectors.cpu())
