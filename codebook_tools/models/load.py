"""From a file to a model that runs: which family it is, its network, its weights, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.clustering.metric import METRICS
from codebook_tools.codebook import Metric
from codebook_tools.data.registry import modality_of
from codebook_tools.errors import CodebookError, few_of
from codebook_tools.models.choose import (
    along,
    choose_codebook,
    choose_codebooks,
    declared_book,
    grown_book,
    laid_out_alike,
    lone_row,
    operable,
)
from codebook_tools.models.family import Family
from codebook_tools.models.model import Book, Model
from codebook_tools.models.network import declared_codebooks, walks
from codebook_tools.models.registry import (
    CUSTOM,
    FAMILIES,
    check_stated,
    detected,
    family_of,
    guessed,
    metric_of,
    size_entry,
)
from codebook_tools.models.size_guard import bounded
from codebook_tools.models.stored_codes import effective_rows, owned_keys
from codebook_tools.models.user_network import NetworkMaker, make_network


def load_model(
    checkpoint: Checkpoint,
    *,
    network: NetworkMaker | None = None,
    family: str | None = None,
    codebook_keys: Sequence[str] = (),
    metric: str | None = None,
    device: torch.device | None = None,
    bf16: bool = False,
) -> Model:
    """The model of a file, in float32 and evaluation mode.

    Args:
        network: The user's own network; None for that of the file's family.
        family: A name of FAMILIES, to overrule recognition.
        codebook_keys: The codebooks to be operated on; none for all.
        metric: A name of METRICS, to overrule what network or family say.
        device: Where the network runs; None for the CPU.
        bf16: Whether encoder and decoder run under bfloat16 autocast.

    Raises:
        CodebookError: The family is not known, or file and network do not fit.
    """
    if family is not None and family not in (*FAMILIES, CUSTOM):
        raise CodebookError(f"no family {family!r}; there are {', '.join((*FAMILIES, CUSTOM))}")
    record: Family | None = None
    build: Callable[[Checkpoint, int], nn.Module]
    if network is not None:
        first = _first_of(network, checkpoint, codebook_keys)
        name, build = CUSTOM, partial(_make_custom, network)
        module, first = _made_to_fit(network, checkpoint, first)
        prefix = _common_prefix(module.state_dict(), checkpoint)
        own = [prefix + key for key in declared_codebooks(module)]
        if own and not codebook_keys and first.key not in own:  # names and shapes say another
            module, first = _made_to_fit(network, checkpoint, declared_book(checkpoint, own[0]))
        inner: Shapes = {}
    else:
        name, record = _known_family(checkpoint, family, codebook_keys)
        family_prefix = record.prefix(checkpoint)
        if family_prefix is None:
            raise CodebookError(f"{checkpoint.path} does not have the layout of family {name}")
        if record.make is None:
            raise CodebookError(f"{checkpoint.path} is of family {name}: {record.why_not}")
        check_stated(checkpoint, detected(checkpoint).codebooks)
        prefix, first = family_prefix, None
        inner = _without_prefix(checkpoint, prefix)
        build = partial(_make_family, record, prefix)
        module = build(checkpoint, 0)
    keys = {name: prefix + (record.file_key(name, inner) if record else name) for name in module.state_dict()}
    searched = METRICS[metric] if metric else own_metric(module) or metric_of(name, None)
    places = _books_of(module, prefix, checkpoint, codebook_keys, first)
    if not walks(module) and places[0].key not in keys.values():
        raise CodebookError(f"the network has no {places[0].key}: its codebook must have the file's name for it")
    books, route = _shared(places, module, keys)
    entry = size_entry(checkpoint)
    _check_alike(books, checkpoint)
    _load_weights(module, keys, checkpoint)
    target = device or torch.device("cpu")
    module.to(target).eval().requires_grad_(False)
    owned = {key for book in books for key in owned_keys(checkpoint, book)}
    return Model(
        name,
        checkpoint,
        module,
        keys,
        tuple(Book(book, effective_rows(checkpoint, book).to(target), searched) for book in books),
        tuple(
            i
            for i, book in enumerate(books)
            if not codebook_keys or any(place.key in codebook_keys for place in book.places)
        ),
        route,
        build,
        target,
        bf16,
        power_of_two=entry is not None and entry.power_of_two,
        modality=modality_of(module),
        input_range=modality_of(module).input_ranges[0],
        carried=tuple(key for key in checkpoint.shapes if key not in owned.union(keys.values())),
        caveats=record.caveats(checkpoint) if record else (),
    )


def reloaded(model: Model, written: Checkpoint) -> Model:
    """Load a file that was written for a model into a fresh network.

    Args:
        model: With the codebooks that were written, whose sizes the network gets.
        written: The file.

    Raises:
        CodebookError: The network does not load the file, or its keys are not those of the original.
    """
    size = len(model.books[0].vectors)
    module = model.build(written, size)
    names = {name: key for name, key in model.keys.items() if key in written.entries}
    unknown = [name for name in module.state_dict() if name not in names]
    lost = [key for name, key in model.keys.items() if name not in module.state_dict()]
    for what, few in (("wants", unknown), ("has no", lost)):
        if few:
            raise CodebookError(f"the network for {size} codes {what} {few_of(few)}")
    strange = sorted(written.entries.keys() - model.checkpoint.entries.keys())
    if strange:
        raise CodebookError(f"{written.path} has {few_of(strange)}, which the original has not")
    keys = {name: model.keys[name] for name in module.state_dict()}
    _load_weights(module, keys, written)
    module.to(model.device).eval().requires_grad_(False)
    books = tuple(replace(book, stored=book.stored.resized(len(book.vectors))) for book in model.books)
    return replace(model, checkpoint=written, network=module, keys=keys, books=books)


def check_size_follows(model: Model, size: int) -> None:
    """Check that the user's network for `size` codes fits what would be written.

    Raises:
        CodebookError: A tensor beside the codebooks depends on K, or the codebook itself does not.
    """
    if model.family != CUSTOM or size == model.books[0].stored.size:
        return
    shapes = {name: tuple(tensor.shape) for name, tensor in model.build(model.checkpoint, size).state_dict().items()}
    owned = {key for book in model.books for key in owned_keys(model.checkpoint, book.stored)}
    for name, shape in shapes.items():
        key = model.keys.get(name)
        if key is None:
            raise CodebookError(f"the network for {size} codes wants {name}, which that for the file does not have")
        stored = model.checkpoint.entries[key].shape
        if key not in owned and _without_ones(stored) != _without_ones(shape):
            raise CodebookError(
                f"{key} follows the number of codes, too: {stored} in the file, {shape} in the network for {size}; "
                "only codebooks and what lies beside them can be written: keep it out of --network, and remap it"
            )
        place = next((p for book in model.books for p in book.stored.places if p.key == key), None)
        if place is not None and shape[place.axis] - size != stored[place.axis] - place.size:
            raise CodebookError(
                f"the network for codebook_size={size} has {shape[place.axis]} rows in {key}, as it has for "
                f"{place.size}: --network must be a function that makes as many codes as it is asked for"
            )


def _first_of(spec: NetworkMaker, checkpoint: Checkpoint, keys: Sequence[str]) -> FoundCodebook:
    """The codebook whose size the user's network is made for: by names and shapes, else as the network declares it."""
    try:
        return choose_codebooks(checkpoint, keys)[0]
    except CodebookError:
        module: Any = make_network(spec, _ANY_SIZE)
        if keys:
            raise
        names = declared_codebooks(module)
        if not names:
            prefix = _common_prefix(module.state_dict(), checkpoint)
            larger = make_network(spec, _ANY_SIZE + 1).state_dict()
            one = lone_row(checkpoint) or grown_book(checkpoint, module.state_dict(), larger, prefix)
            if one is None or _shape_in(module, one.key) is None:
                raise
            return operable(checkpoint, one)
        return declared_book(checkpoint, _common_prefix(module.state_dict(), checkpoint) + names[0])


_ANY_SIZE = 4  # of a network that is only asked which tensors are its codebooks


def _make_custom(spec: NetworkMaker, checkpoint: Checkpoint, size: int) -> nn.Module:
    return make_network(spec, size)


def _make_family(record: Family, prefix: str, checkpoint: Checkpoint, size: int) -> nn.Module:
    """The family's network for the file's shapes; `size` is ignored, for the file has it."""
    assert record.make is not None
    numbers = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    described = f"{checkpoint.config_path or checkpoint.path}"
    inner = _without_prefix(checkpoint, prefix)
    return bounded(partial(record.make, inner, checkpoint), len(checkpoint.shapes), numbers, described)


def _without_prefix(checkpoint: Checkpoint, prefix: str) -> Shapes:
    shapes = checkpoint.shapes.items()
    return {key.removeprefix(prefix): shape for key, shape in shapes if key.startswith(prefix)}


def _made_to_fit(spec: NetworkMaker, checkpoint: Checkpoint, book: FoundCodebook) -> tuple[nn.Module, FoundCodebook]:
    """The user's network for as many codes as the file has, and the codebook as that network lays it out.

    Names and shapes leave open which axis holds the codes, and whether a row after them is padding. A second network
    for one code more tells: the axis that grows holds the codes.
    """
    module = make_network(spec, book.size)
    shape = checkpoint.shapes[book.key]
    made = _shape_in(module, book.key)
    if made is None or len(shape) != 2 or (made == shape and shape[0] != shape[1]):
        return module, book
    other = _shape_in(make_network(spec, book.size + 1), book.key)
    axes = [i for i, (one, more) in enumerate(zip(made, other or made, strict=False)) if one != more]
    if len(axes) != 1 or len(made) != 2 or (other is not None and other[axes[0]] != made[axes[0]] + 1):
        return module, book
    axis, padding = axes[0], made[axes[0]] - book.size
    if shape[axis] <= padding or made[1 - axis] != shape[1 - axis]:
        return module, book
    if (axis, shape[axis] - padding) == (book.axis, book.size):
        return module, book
    book = along(checkpoint, book, axis, padding)
    return make_network(spec, book.size), book


def _shape_in(module: nn.Module, key: str) -> tuple[int, ...] | None:
    """The shape of the network's tensor whose name the key ends in (a file may prefix all names); None without one."""
    state = module.state_dict()
    name = next((name for name in state if name == key or key.endswith(f".{name}")), None)
    return None if name is None else tuple(state[name].shape)


def _shared(
    places: Sequence[FoundCodebook], module: nn.Module, keys: Mapping[str, str]
) -> tuple[list[FoundCodebook], tuple[int, ...]]:
    """The distinct codebooks, and the index of the one that each stage uses: tensors that share storage are one."""
    state, names = module.state_dict(), {key: name for name, key in keys.items()}
    books, route = dict[object, list[FoundCodebook]](), list[int]()
    for place in places:
        tensor = state.get(names.get(place.key, ""))
        storage: object = place.key
        if tensor is not None and tensor.numel():
            storage = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if place.key not in (known.key for known in books.setdefault(storage, [])):
            books[storage].append(place)
        route.append(list(books).index(storage))
    return [replace(first, also=tuple(others)) for first, *others in books.values()], tuple(route)


def _check_alike(books: Sequence[FoundCodebook], checkpoint: Checkpoint) -> None:
    """Raise CodebookError where one tensor of the network has several names, and the file other numbers for each."""
    for book in books:
        for other in book.also:
            if not torch.equal(checkpoint.tensor(other.key), checkpoint.tensor(book.key)):
                raise CodebookError(
                    f"{book.key} and {other.key} are one tensor in the network, and {checkpoint.path} holds different "
                    "numbers for them: load it into the network and save it again, so that they agree"
                )


def _common_prefix(names: Iterable[str], checkpoint: Checkpoint) -> str:
    """The prefix of every name of the user's network in the file, as Lightning writes it; "" where there is none."""
    wanted, keys = list(names), checkpoint.entries.keys()
    if not wanted or wanted[0] in keys:
        return ""
    prefixes = (key.removesuffix(wanted[0]) for key in keys if key.endswith(f".{wanted[0]}"))
    return min((prefix for prefix in prefixes if all(prefix + name in keys for name in wanted)), key=len, default="")


def _known_family(checkpoint: Checkpoint, asked: str | None, codebook_keys: Sequence[str]) -> tuple[str, Family]:
    name = (asked if asked != CUSTOM else None) or family_of(checkpoint)
    if name is None:
        book = choose_codebooks(checkpoint, codebook_keys)[0]
        described = f" and {checkpoint.config_path.name}" if checkpoint.config_path else ""
        raise CodebookError(
            f"no network is known for the layout of {checkpoint.path}{described} (codebook {book.key}, "
            f"{book.size}x{book.dim}); give yours with --network FILE.py:FUNCTION; surgeries also "
            "take latents, with --latents"
        )
    return name, FAMILIES[name]


def own_metric(network: nn.Module) -> Metric | None:
    """The metric in a network's attribute `lookup`; None without one (a user's attribute may mean something else)."""
    lookup = getattr(network, "lookup", None)
    return lookup if isinstance(lookup, Metric) else None


def guesses(model: Model, metric: str | None) -> Iterator[str]:
    """Warnings where neither the user's network nor `metric`, the user's choice, says how codes are searched."""
    if model.family == CUSTOM and own_metric(model.network) is None:
        yield from (warning for book in model.books for warning in guessed(book.stored, None, metric))


def _books_of(
    network: Any, prefix: str, checkpoint: Checkpoint, asked: Sequence[str], first: FoundCodebook | None
) -> list[FoundCodebook]:
    """The codebook of every stage of the network, in order. Raises CodebookError where one asked for is not there."""
    own = [prefix + key for key in declared_codebooks(network)]
    if not walks(network):
        if len(own) > 1 and not asked:
            raise CodebookError(
                f"the network declares {len(own)} codebooks, {', '.join(own)}, and has no walk(encoded, quantize) that "
                "passes through them: add it, or choose the one that encode leads to with --codebook-key"
            )
        if first is not None and not asked and (own or lone_row(checkpoint) or not detected(checkpoint).codebooks):
            return [first]
        chosen = choose_codebook(checkpoint, asked)
        return [first if first is not None and first.key == chosen.key else chosen]
    books = [operable(checkpoint, declared_book(checkpoint, prefix + key)) for key in network.codebooks]
    if first is not None:
        books = [laid_out_alike(book, first, checkpoint) for book in books]
    keys = [book.key for book in books]
    unknown = [key for key in asked if key not in keys]
    if unknown:
        raise CodebookError(f"--codebook-key {unknown[0]}: the network's codebooks are {', '.join(keys)}")
    return books


def _load_weights(network: nn.Module, keys: Mapping[str, str], checkpoint: Checkpoint) -> None:
    wanted = {keys[name]: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [key for key in wanted if key not in checkpoint.entries]
    if missing:
        unknown = [key for key in checkpoint.entries if key not in wanted]
        also = f"; the file has, unknown to it, {few_of(unknown)}" if unknown else ""
        raise CodebookError(f"the network wants {few_of(missing)}, which {checkpoint.path} lacks{also}")
    unlike = [
        f"{key} is {checkpoint.entries[key].shape} in the file, {shape} in the network"
        for key, shape in wanted.items()
        if _without_ones(checkpoint.entries[key].shape) != _without_ones(shape)
    ]
    if unlike:
        raise CodebookError(f"shapes differ: {few_of(unlike)}")
    stored = {key: checkpoint.tensor(key).reshape(shape) for key, shape in wanted.items()}
    for key in wanted:
        if stored[key].is_floating_point() and not bool(torch.isfinite(stored[key].float()).all()):
            raise CodebookError(f"{key} in {checkpoint.path} is not finite: {_first_bad(stored[key])}")
    network.float()
    network.load_state_dict({name: stored[key] for name, key in keys.items()})
    _tie(network, {name: stored[key] for name, key in keys.items()})


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without axes of length 1, in which a linear layer and a convolution of one pixel differ."""
    return tuple(length for length in shape if length > 1)


def _first_bad(tensor: Tensor) -> str:
    index = tuple(int(i) for i in (~torch.isfinite(tensor.float())).nonzero()[0])
    return f"{float(tensor[index])} at {list(index)}"


def _tie(network: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Make modules whose tensors have the same bytes share parameters: one layer used many times has many keys.

    Only where some tensor of the module is not constant: fresh biases and norms are equal by chance.
    """
    first: dict[object, nn.Module] = {}
    for prefix, module in network.named_modules():
        own = {leaf: stored[f"{prefix}.{leaf}".lstrip(".")] for leaf, _ in module.named_parameters(recurse=False)}
        if not any(tensor.numel() > 1 and bool((tensor != tensor.flatten()[0]).any()) for tensor in own.values()):
            continue
        signature = (
            type(module),
            tuple((leaf, tuple(t.shape), t.float().numpy().tobytes()) for leaf, t in own.items()),
        )
        twin = first.setdefault(signature, module)
        for leaf in own:
            setattr(module, leaf, getattr(twin, leaf))
