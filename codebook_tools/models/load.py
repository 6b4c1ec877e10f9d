"""From a file to a model that runs: which family it is, its network, its weights, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from codebook_tools.checkpoints.detect import Detection, FoundCodebook
from codebook_tools.checkpoints.reading import Checkpoint
from codebook_tools.codebook import Emit, Lookup
from codebook_tools.errors import CodebookError
from codebook_tools.models.families import (
    CUSTOM,
    FAMILIES,
    METRICS,
    check_stated,
    detected,
    family_of,
    guessed,
    size_entry,
)
from codebook_tools.models.family import Family
from codebook_tools.models.model import AS_IT_IS, INPUT_RANGES, Book, Model, walks
from codebook_tools.models.stored import effective_rows, owned_keys
from codebook_tools.networks.bounded import bounded
from codebook_tools.networks.custom import make_network


def choose_codebooks(checkpoint: Checkpoint, keys: Sequence[str]) -> list[FoundCodebook]:
    """Those named, else all that are surely there. Raises CodebookError, with candidates, where that is not plain."""
    detection = detected(checkpoint)
    if keys:
        return [_operable(_named(checkpoint, detection, key)) for key in keys]
    if not detection.codebooks:
        raise CodebookError(f"{checkpoint.path} has no codebook: {detection.reason}")
    for found in detection.codebooks:
        if found.confidence == "low":
            raise CodebookError(
                f"{found.key} is only perhaps a codebook; if it is, say so with --codebook-key {found.key}"
            )
    return [_operable(found) for found in detection.codebooks]


def choose_codebook(checkpoint: Checkpoint, keys: Sequence[str]) -> FoundCodebook:
    """The one codebook to work on. Raises CodebookError, with the candidates, where there are several."""
    found = choose_codebooks(checkpoint, keys)
    if len(found) > 1:
        names = [book.key for book in found]
        raise CodebookError(
            f"{checkpoint.path} has {len(names)} codebooks, and this takes one: choose with --codebook-key, "
            f"of {_few(names)}"
        )
    return found[0]


def _operable(found: FoundCodebook) -> FoundCodebook:
    if found.heads > 1 or found.search == "logits":
        kind = "chosen by logits" if found.search == "logits" else f"of {found.heads} heads"
        raise CodebookError(f"{found.key} is a codebook {kind}: it can be inspected, not operated on")
    return found


def _named(checkpoint: Checkpoint, detection: Detection, key: str) -> FoundCodebook:
    for found in detection.codebooks:
        if found.key == key:
            return found
    entry = checkpoint.entries.get(key)
    candidates = ", ".join(found.key for found in detection.codebooks) or "none"
    if entry is None:
        raise CodebookError(f"--codebook-key {key}: no such tensor in {checkpoint.path}; the candidates: {candidates}")
    if len(entry.shape) != 2 or not min(entry.shape) or entry.dtype not in ("F64", "F32", "F16", "BF16"):
        raise CodebookError(
            f"--codebook-key {key}: {entry.dtype} {entry.shape} is no matrix of codes; the candidates: {candidates}"
        )
    return FoundCodebook(key, entry.shape[0], entry.shape[1], 0, 1, entry.dtype, "unknown", (), "high")


def find_book(checkpoint: Checkpoint, key: str) -> FoundCodebook:
    """The codebook of that key, which is known to be one."""
    return _named(checkpoint, detected(checkpoint), key)


def load_model(
    checkpoint: Checkpoint,
    *,
    network: str | None = None,
    family: str | None = None,
    codebook_keys: Sequence[str] = (),
    metric: str | None = None,
    device: torch.device | None = None,
    bf16: bool = False,
) -> Model:
    """The model of a file, in float32 and evaluation mode. Raises CodebookError where file and network do not fit.

    network: "FILE.py:FUNCTION", the user's own. family: a name of FAMILIES, where recognition is to be overruled.
    codebook_keys: those to be operated on, all where there are none.
    """
    if family is not None and family not in (*FAMILIES, CUSTOM):
        raise CodebookError(f"no family {family!r}; there are {', '.join((*FAMILIES, CUSTOM))}")
    shapes, prefix, record = checkpoint.shapes, "", None
    if network is not None:
        first = choose_codebooks(checkpoint, codebook_keys)[0]
        name, remake = CUSTOM, partial(make_network, network, first.size)
        module = remake()
        prefix = _common_prefix(module.state_dict(), checkpoint)
        keys = {name: prefix + name for name in module.state_dict()}
    else:
        name, record = _known_family(checkpoint, family, codebook_keys)
        given = record.prefix(checkpoint)
        if given is None:
            raise CodebookError(f"{checkpoint.path} does not have the layout of family {name}")
        if record.make is None:
            raise CodebookError(f"{checkpoint.path} is of family {name}: {record.why_not}")
        check_stated(checkpoint, detected(checkpoint).codebooks)
        prefix = given
        inner = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        numbers = sum(math.prod(shape) for shape in shapes.values())
        described = f"{checkpoint.config_path or checkpoint.path}"
        remake = partial(bounded, partial(record.make, inner, checkpoint), len(shapes), numbers, described)
        module = remake()
        keys = {name: prefix + record.file_key(name, inner) for name in module.state_dict()}
    lookup, emit = METRICS[metric] if metric else _lookup(module, record)
    found = _books_of(module, prefix, checkpoint, codebook_keys)
    entry = size_entry(checkpoint)
    if not walks(module) and found[0].key not in keys.values():
        raise CodebookError(f"the network has no {found[0].key}: its codebook must have the file's name for it")
    _load_weights(module, keys, checkpoint)
    target = device or torch.device("cpu")
    module.to(target).eval().requires_grad_(False)
    owned = {key for book in found for key in owned_keys(checkpoint, book)}
    return Model(
        name,
        checkpoint,
        module,
        keys,
        tuple(Book(book, effective_rows(checkpoint, book).to(target), lookup, emit) for book in found),
        tuple(i for i, book in enumerate(found) if not codebook_keys or book.key in codebook_keys),
        remake,
        target,
        bf16,
        power_of_two=entry is not None and entry.power_of_two,
        input_range=AS_IT_IS if hasattr(module, "sampling_rate") else INPUT_RANGES[0],
        carried=tuple(key for key in shapes if key not in owned.union(keys.values())),
        caveats=record.caveats(checkpoint) if record else tuple(_guesses(module, found, metric)),
    )


def _common_prefix(names: Iterable[str], checkpoint: Checkpoint) -> str:
    """What the file puts before every name of the user's network, as Lightning does; nothing where it does not."""
    wanted, keys = list(names), checkpoint.entries.keys()
    if not wanted or wanted[0] in keys:
        return ""
    prefixes = (key.removesuffix(wanted[0]) for key in keys if key.endswith(f".{wanted[0]}"))
    return min((prefix for prefix in prefixes if all(prefix + name in keys for name in wanted)), key=len, default="")


def _known_family(checkpoint: Checkpoint, asked: str | None, codebook_keys: Sequence[str]) -> tuple[str, Family]:
    name = (asked if asked != CUSTOM else None) or family_of(checkpoint)
    if name is None:
        found = choose_codebooks(checkpoint, codebook_keys)[0]
        described = f" and {checkpoint.config_path.name}" if checkpoint.config_path else ""
        raise CodebookError(
            f"no network is known for the layout of {checkpoint.path}{described} (codebook {found.key}, "
            f"{found.size}x{found.dim}); give yours with --network FILE.py:FUNCTION, or latents with --latents"
        )
    return name, FAMILIES[name]


def _lookup(network: Any, record: Family | None) -> tuple[Lookup, Emit]:
    """As the network says of itself, else as its family does, else by Euclidean distance."""
    lookup, emit = (record.lookup, record.emit) if record else METRICS["euclidean"]
    told = getattr(network, "lookup", None), getattr(network, "emit", None)  # a user's own may be of another meaning
    return (told[0] if isinstance(told[0], Lookup) else lookup), (told[1] if isinstance(told[1], Emit) else emit)


def _guesses(network: Any, found: Sequence[FoundCodebook], metric: str | None) -> Iterator[str]:
    if not isinstance(getattr(network, "lookup", None), Lookup):
        yield from (told for book in found for told in guessed(book, None, metric))


def _books_of(network: Any, prefix: str, checkpoint: Checkpoint, asked: Sequence[str]) -> list[FoundCodebook]:
    """All codebooks that the network walks through, in its order; those asked for must be among them."""
    if not walks(network):
        return [choose_codebook(checkpoint, asked)]
    found = [_operable(find_book(checkpoint, prefix + key)) for key in network.codebooks]
    keys = [book.key for book in found]
    unknown = [key for key in asked if key not in keys]
    if unknown:
        raise CodebookError(f"--codebook-key {unknown[0]}: the network's codebooks are {', '.join(keys)}")
    return found


def _load_weights(network: nn.Module, keys: Mapping[str, str], checkpoint: Checkpoint) -> None:
    wanted = {keys[name]: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [key for key in wanted if key not in checkpoint.entries]
    if missing:
        unknown = [key for key in checkpoint.entries if key not in wanted]
        also = f"; the file has, unknown to it, {_few(unknown)}" if unknown else ""
        raise CodebookError(f"the network wants {_few(missing)}, which {checkpoint.path} lacks{also}")
    unlike = [
        f"{key} is {checkpoint.entries[key].shape} in the file, {shape} in the network"
        for key, shape in wanted.items()
        if _without_ones(checkpoint.entries[key].shape) != _without_ones(shape)
    ]
    if unlike:
        raise CodebookError(f"shapes differ: {_few(unlike)}")
    stored = {key: checkpoint.tensor(key).reshape(shape) for key, shape in wanted.items()}
    for key in wanted:
        if stored[key].is_floating_point() and not bool(torch.isfinite(stored[key].float()).all()):
            raise CodebookError(f"{key} in {checkpoint.path} is not finite: {_first_bad(stored[key])}")
    network.float()
    network.load_state_dict({name: stored[key] for name, key in keys.items()})
    _tie(network, {name: stored[key] for name, key in keys.items()})


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer is a convolution of one pixel: they differ in axes of length 1 alone."""
    return tuple(length for length in shape if length > 1)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_bad(tensor: Tensor) -> str:
    index = tuple(int(i) for i in (~torch.isfinite(tensor.float())).nonzero()[0])
    return f"{float(tensor[index])} at {list(index)}"


def _tie(network: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """One layer used many times stands under many keys: make modules whose tensors have the same bytes one again.

    Only where some tensor of the module is not constant: fresh biases and norms are alike without being one.
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
