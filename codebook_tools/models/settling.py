"""How a user's network turns stored rows into codes and searches them: settled by asking its own quantizer."""

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
from codebook_tools.models.model import Book, Model, walks
from codebook_tools.models.registry import CUSTOM, are_unit, unit_warning
from codebook_tools.models.stored_codes import codes_of_rows, owned_keys, stored_rows
from codebook_tools.models.transforms import alike, forms, refuse_unknown, transforms_beside

_FEW = 2  # items whose latents tell most readings that are wrong


def settle(model: Model, media: Sequence[Tensor], metric: str | None) -> tuple[list[str], Agreement | None]:
    """Find out what becomes of the rows of each codebook, and how codes are searched; the model has it afterwards.

    A network with a quantizer of its own decides: the first reading counts with which it agrees, on calibration latents
    and on some that meet every code. Without one, a tensor beside a codebook that may change what comes out must be
    used by the network itself.

    Args:
        media: Batches of calibration data.
        metric: What the user says of the search, None where nothing.

    Returns:
        Warnings, and how far quantizer and reading agree; None where there is no quantizer to be asked, or it is a
        library's in a family of ours.

    Raises:
        CodebookError: A tensor may change the codes and nothing says how, or no reading agrees with the quantizer.
    """
    owned = {key for book in model.books for key in owned_keys(model.checkpoint, book.found)}
    if model.family != CUSTOM:
        known = owned | set(model.keys.values())
        for book in model.books:
            refuse_unknown(book.found, transforms_beside(model.checkpoint, book.found, known), with_network=True)
        return [], None
    beside = [transforms_beside(model.checkpoint, book.found, owned) for book in model.books]
    if not has_quantizer(model.network):
        for book, keys in zip(model.books, beside, strict=True):
            unused = [key for key in keys if not _is_used(model, key, media)]
            refuse_unknown(book.found, unused, with_network=bool(model.network.state_dict()))
        if metric is None and own_metric(model.network) is None and _unit_rows(model):
            model.books = _searched_by(model.books, COSINE_UNIT)
            return [unit_warning(model.books[0].key)], None
        return list(guesses(model, metric)), None
    return [], _ask(model, media, beside, metric)


def _ask(model: Model, media: Sequence[Tensor], beside: Sequence[list[str]], metric: str | None) -> Agreement:
    """Try readings until the network's own quantizer agrees with one."""
    encoded, first = encoded_batches(model, media), Agreement(0, 0, 0, 0.0, "nothing was encoded")
    before, few = model.books, [batch[:_FEW] for batch in encoded[-1:] if isinstance(batch, Tensor)]
    for i, (books, name) in enumerate(_readings(model, beside, metric)):
        model.books = books
        if i and few and not agreement(model, few).ok:
            continue
        found = agreement(model, encoded)
        first = found if i == 0 else first
        if not found.ok:
            continue
        if metric is not None and name != metric:
            raise CodebookError(f"--metric {metric}: the network's quantize searches by {name}; leave --metric out")
        return found
    model.books = before
    if not walks(model.network):
        read = _read(model, encoded)
        for name in _metrics(model, metric):
            model.books = _searched_by([read], METRICS[name])
            if (found := agreement(model, encoded)).ok:
                return found
        model.books = before
    names = ", ".join(sorted({key for keys in beside for key in keys})[:3])
    also = f", also through {names}" if names else ""
    raise CodebookError(
        f"the network's quantize disagrees with what is read of {model.books[0].key}{also}: {first.reason}; its codes "
        "cannot be operated on"
    )


def _readings(model: Model, beside: Sequence[list[str]], metric: str | None) -> Iterator[tuple[tuple[Book, ...], str]]:
    """Codebooks read in each way that is possible, likelier ones first, with the name of the metric."""
    before, names = model.books, _metrics(model, metric)  # the model changes while these are tried
    first = before[0].found
    unit_rows = are_unit(stored_rows(model.checkpoint.tensor(first.key), first))
    for form in forms(model.checkpoint, first, beside[0], unit_rows):
        try:
            books = tuple(_read_by(model, book, form, first) for book in before)
        except (KeyError, CodebookError):
            continue
        for name in names:
            yield _searched_by(books, METRICS[name]), name


def _read_by(model: Model, book: Book, form: Effective, first: FoundCodebook) -> Book:
    of_stage = form if book.key == first.key else alike(form, first, book.found, model.checkpoint.shapes)
    found = replace(book.found, form=of_stage if form.kind in ("rows", "steps") else None)
    rows = stored_rows(model.checkpoint.tensor(found.key), found)
    codes = codes_of_rows(model.checkpoint, found, rows)
    if codes.shape[1] != book.vectors.shape[1] or not bool(codes.isfinite().all()):
        raise CodebookError(f"{found.key} does not have such codes")
    return replace(book, found=found, vectors=codes.to(model.device))


def _metrics(model: Model, metric: str | None) -> list[str]:
    """Names of METRICS: what is said first, then what is assumed, then the others."""
    assumed = model.books[0].metric.name
    likely = [metric, "cosine-unit" if assumed == "euclidean" and _unit_rows(model) else None, assumed, *METRICS]
    return list(dict.fromkeys(name for name in likely if name is not None))


def _unit_rows(model: Model) -> bool:
    """Whether all codes have unit length, as those of a cosine search mostly do."""
    return all(are_unit(book.vectors) for book in model.books)


def _searched_by(books: Iterable[Book], metric: Metric) -> tuple[Book, ...]:
    return tuple(replace(book, metric=metric) for book in books)


def _is_used(model: Model, key: str, media: Sequence[Tensor]) -> bool:
    """Whether encode, walk or decode look at a tensor: with NaN in its place, so is what they return."""
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
    """The one codebook of a network, its codes read through the quantizer row by row: where all rows are the same, that
    one comes out, whichever is chosen."""
    (book,) = model.books
    name = next(name for name, key in model.keys.items() if key == book.key)
    network = deepcopy(model.network)
    tensor = network.state_dict()[name]
    rows = tensor.movedim(book.found.axis, 0).clone()
    latents, codes = encoded[0][:1], list[Tensor]()
    with torch.no_grad():
        for row in rows[: book.found.size]:
            tensor.copy_(row.expand_as(rows).movedim(0, book.found.axis))
            try:
                quantized = network.quantize(latents)[0]
            except Exception as error:  # the user's code
                raise CodebookError(f"the network's quantize fails: {type(error).__name__}: {error}") from error
            codes.append(quantized.flatten(2)[0, :, 0].float())
    vectors = torch.stack(codes).contiguous()
    if vectors.shape != book.vectors.shape or not bool(vectors.isfinite().all()):
        return book
    form = Effective("opaque", (), book.found.dim, model.checkpoint.shapes[book.key][book.found.axis] - book.found.size)
    return replace(book, found=replace(book.found, form=form), vectors=vectors, read=vectors.cpu())
