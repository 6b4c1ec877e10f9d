"""A module in memory: its state dict is the checkpoint, and a surgery is installed in place, without a file."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import InMemory, Shape, can_hold
from codebook_tools.codebook import REMOVED, Surgery
from codebook_tools.errors import CodebookError
from codebook_tools.models.agreement import has_quantizer
from codebook_tools.models.choose import choose_codebook
from codebook_tools.models.networks.vector_quantize_pytorch import give_walk
from codebook_tools.models.stored_codes import changed_codebook, followers

SIZES = re.compile(r"(num|n)_?(embed\w*|emb|codes?|e|tokens?|centroids?)|codebook_size|vocab_size|k", re.IGNORECASE)
"""Attributes of a quantizer that hold its number of codes."""

Function = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A module of a training script. Called, it returns a copy, with the given functions as methods.

    Attributes:
        module: The user's; only `put` changes it.
        encode: (module, media) -> latents (n, dim, *grid); None for the module's own method.
        decode: (module, quantized) -> media; None for the module's own method.
        quantize: (module, latents) -> (quantized, codes int64); None for the module's own method, if it has one.
    """

    module: nn.Module
    encode: Function | None = None
    decode: Function | None = None
    quantize: Function | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise CodebookError(f"wrap takes a torch module, not a {type(self.module).__name__}")
        for name in ("encode", "decode"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise CodebookError(f"{name}= is a {type(function).__name__}; expected a function (module, tensor)")
            if function is None and not callable(getattr(self.module, name, None)):
                raise CodebookError(
                    f"{type(self.module).__name__} has no {name}; give one: wrap(module, {name}=lambda module, x: ...)"
                )

    @property
    def name(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    def checkpoint(self) -> Checkpoint:
        """A copy of the module's current state."""
        return in_memory(self.name, self.module.state_dict())

    def __call__(self, codebook_size: int = 0) -> nn.Module:
        """A copy of the module, whatever `codebook_size`. Raises CodebookError where it cannot be copied."""
        try:
            network = copy.deepcopy(self.module)
        except Exception as error:  # whatever a module of somebody's holds
            raise CodebookError(f"{self.name} cannot be copied: {type(error).__name__}: {error}") from error
        for name in ("encode", "decode", "quantize"):
            if (function := getattr(self, name)) is not None:
                # Past torch's own: a layer may have the name.
                object.__setattr__(network, name, partial(function, network))
        if self.encode is not None and self.quantize is None and has_quantizer(network):
            object.__setattr__(network, "quantize", None)  # the module's own takes what its own encode returns
        give_walk(network)
        return network

    def built(
        self, books: Sequence[FoundCodebook], original: Checkpoint, checkpoint: Checkpoint, size: int
    ) -> nn.Module:
        """A copy whose tensors have the shapes of a checkpoint, or of one with another number of codes.

        Args:
            books: The module's codebooks, as in `original`.
            original: The module's state when it was opened.
            checkpoint: A state of the module, or of one with other codebooks.
            size: Of the first codebook; where the checkpoint has another, all codebooks get this one. 0: as there.
        """
        network, shapes = self(), dict(checkpoint.shapes)
        now = _sizes(books, original.shapes, shapes)[books[0].key][1]
        if size and size != now:
            for place in (place for book in books for place in book.places):
                shapes[place.key] = _with(shapes[place.key], place.axis, shapes[place.key][place.axis] + size - now)
                for key in place.companions:
                    shapes[key] = tuple(size if length == now else length for length in shapes[key])
        resize(network, shapes, _sizes(books, original.shapes, shapes))
        return network

    def put(self, changed: Mapping[str, Tensor], books: Sequence[FoundCodebook]) -> None:
        """Install tensors in the module itself.

        Args:
            changed: New tensors by key.
            books: The module's codebooks before that.
        """
        old = {key: tuple(tensor.shape) for key, tensor in self.module.state_dict().items()}
        new = old | {key: tuple(tensor.shape) for key, tensor in changed.items()}
        resize(self.module, new, _sizes(books, old, new))
        _fill(self.module, changed)


def in_memory(name: str, state: Mapping[str, object]) -> Checkpoint:
    """A checkpoint of tensors in memory, copied to the CPU.

    Args:
        name: What messages call it.
        state: Tensors by key; entries of other types, and of dtypes without a name in safetensors, are left out.
    """
    tensors = {
        key: InMemory(key, tensor.detach().cpu().clone())
        for key, tensor in state.items()
        if isinstance(tensor, Tensor) and can_hold(tensor.dtype)
    }
    return Checkpoint(Path(name), dict(tensors), {}, ())


def resize(module: nn.Module, shapes: Mapping[str, Shape], sizes: Mapping[str, tuple[int, int]]) -> dict[int, Tensor]:
    """Replace tensors of a module by zeros of other shapes: new Parameters or buffers.

    A tensor with several names stays one.

    Args:
        module: Changed in place.
        shapes: By key; a tensor that has its shape stays.
        sizes: Old and new number of codes by key of a codebook. Attributes that say the old one are set to the new.

    Returns:
        The new tensors, by id of those that they replace.
    """
    made = dict[int, Tensor]()
    places = list[tuple[nn.Module, str, Tensor]]()
    for key, shape in shapes.items():
        owner, name = _owner(module, key)
        old = getattr(owner, name, None)
        if not isinstance(old, Tensor) or old.shape == shape:
            continue
        if id(old) not in made:
            new = torch.zeros(shape, dtype=old.dtype, device=old.device)
            made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        places.append((owner, name, old))
    attributes = [attribute for key, (old, new) in sizes.items() for attribute in _sizes_of(module, key, old, new)]
    for owner, name, old in places:
        tensors: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
        tensors[name] = made[id(old)]
    for owner, name, size in dict.fromkeys(attributes):
        setattr(owner, name, size)
    return made


def install(
    surgery: Surgery,
    target: nn.Module,
    *,
    codebook: str | None = None,
    counts: Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Install a surgery in an embedding or a quantizer in memory.

    The codebook becomes a new Parameter or buffer where its size differs. EMA state and attributes such as
    `num_embeddings` follow, and the optimizer's state moves with each code. Where this raises, nothing changed.

    Args:
        surgery: Its index map has as many entries as the codebook has codes now.
        target: An `nn.Embedding`, or a module that holds one codebook.
        codebook: Name of the codebook's tensor in `target`, where names and shapes do not tell.
        counts: (new size,), how often each new code is used, for EMA state; None to carry over its own counts.
        optimizer: One whose parameter groups hold the codebook.

    Raises:
        CodebookError: There is no such codebook, it has another size, or the role of a companion is unknown.
    """
    checkpoint = in_memory(type(target).__name__, target.state_dict())
    name = codebook or ("weight" if isinstance(target, nn.Embedding) else None)
    book = choose_codebook(checkpoint, () if name is None else (name,))
    old_size, new_size = len(surgery.index_map), surgery.codebook.size
    if book.size != old_size:
        raise CodebookError(f"the surgery is of {old_size} codes, and {book.key} has {book.size}")
    if surgery.codebook.dim != book.dim:
        raise CodebookError(f"the surgery's codes have {surgery.codebook.dim} dimensions, {book.key} has {book.dim}")
    index_map, codes = surgery.index_map.cpu(), surgery.codebook.vectors.cpu()
    if counts is None:
        counts = _carried(checkpoint, book, index_map, new_size)
    elif counts.shape != (new_size,):
        raise CodebookError(f"counts have shape {tuple(counts.shape)}; expected ({new_size},)")
    changed = changed_codebook(checkpoint, book, codes, counts.cpu(), index_map)
    changed = {name: changed[key] for key in changed for name in _names(target, key)}
    sizes = dict.fromkeys(_names(target, book.key), (old_size, new_size))
    owner, last = _owner(target, book.key)
    before = getattr(owner, last)
    moments = _moments(optimizer, before, index_map, new_size, book.axis) if optimizer else {}
    made = resize(target, {key: tuple(tensor.shape) for key, tensor in changed.items()}, sizes)
    _fill(target, changed)
    if optimizer is not None and (new := made.get(id(before))) is not None:
        _swap(optimizer, before, new)
        before = new
    if optimizer is not None and moments:
        optimizer.state[before] = moments


def _names(module: nn.Module, key: str) -> list[str]:
    """All names of one tensor of a module: layers that share it have one each."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    tensor = getattr(*_owner(module, key))
    return [name for name, other in named if other is tensor]


def carried_counts(target: nn.Module, codebook: str, index_map: Tensor) -> Tensor:
    """The counts that `install` carries over to as many new codes. codebook: the tensor's name in `target`."""
    checkpoint = in_memory(type(target).__name__, target.state_dict())
    return _carried(checkpoint, choose_codebook(checkpoint, (codebook,)), index_map, len(index_map))


def _carried(checkpoint: Checkpoint, book: FoundCodebook, index_map: Tensor, size: int) -> Tensor:
    """(size,) counts: the EMA counts of the old codes, their mean for new codes; ones without EMA counts."""
    key = next((one.key for one in followers(checkpoint, book) if one.role.value == "counts"), None)
    if key is None:
        return torch.ones(size)
    old = checkpoint.tensor(key).double().reshape(-1)
    kept = index_map >= 0
    counts = torch.zeros(size, dtype=torch.float64).index_add_(0, index_map[kept], old[kept])
    new = torch.ones(size, dtype=torch.bool)
    new[index_map[kept]] = False
    counts[new] = old.mean()
    return counts


def _moments(
    optimizer: torch.optim.Optimizer, before: Tensor, index_map: Tensor, size: int, axis: int
) -> dict[str, Any]:
    """An optimizer's state of a codebook, its rows moved as the codes; zeros for new codes."""
    moved = dict[str, Any]()
    for name, value in optimizer.state.get(before, {}).items():
        if not isinstance(value, Tensor) or value.shape != before.shape:
            moved[name] = value
            continue
        rows = value.movedim(axis, 0)
        new = rows.new_zeros(size, *rows.shape[1:])
        for old, code in reversed(list(enumerate(index_map.tolist()))):  # of merged codes the first counts
            if code != REMOVED:
                new[code] = rows[old]
        moved[name] = new.movedim(0, axis).contiguous()
    return moved


def _swap(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor) -> None:
    optimizer.state.pop(old, None)
    for group in optimizer.param_groups:
        group["params"] = [new if one is old else one for one in group["params"]]


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, tensor in tensors.items():
            owner, name = _owner(module, key)
            getattr(owner, name).copy_(tensor)


def _owner(module: nn.Module, key: str) -> tuple[nn.Module, str]:
    path, _, name = key.rpartition(".")
    return module.get_submodule(path), name


def _sizes_of(module: nn.Module, key: str, old: int, new: int) -> Iterator[tuple[nn.Module, str, int]]:
    """Attributes with the number of codes: of the codebook's module, and of the one above it."""
    path = key.rpartition(".")[0]
    for place in dict.fromkeys((path, path.rpartition(".")[0])):
        owner = module.get_submodule(place)
        for name, value in vars(owner).items():
            if type(value) is int and value == old and old != new and SIZES.fullmatch(name):
                yield owner, name, new


def _sizes(
    books: Sequence[FoundCodebook], old: Mapping[str, Shape], new: Mapping[str, Shape]
) -> dict[str, tuple[int, int]]:
    """Numbers of codes by the old shapes and by the new ones, by key of each codebook."""
    return {
        place.key: (place.size, place.size + new[place.key][place.axis] - old[place.key][place.axis])
        for book in books
        for place in book.places
    }


def _with(shape: Shape, axis: int, length: int) -> Shape:
    return (*shape[:axis], length, *shape[axis + 1 :])
