"""Tensors beside a codebook that may turn its rows into other codes, and the ways in which they might."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import permutations, product

import torch

from codebook_tools.checkpoints.detect import CODER, FoundCodebook
from codebook_tools.checkpoints.effective import Effective, effective
from codebook_tools.checkpoints.forms import StepKind
from codebook_tools.checkpoints.read import AS_STORED, Checkpoint
from codebook_tools.errors import CodebookError

# Acts on latents before the search, or on nothing: it does not change the vector of a code.
_BEFORE = re.compile(
    r"(?<![a-z])(pre|before|in|input|enc(oder)?|query)(?![a-z])|num_batches_tracked",
    re.IGNORECASE,
)
# Single numbers that training or a report uses, but no code.
_SETTING = re.compile(
    r"beta|commit|cost|decay|momentum|eps(ilon)?$|temp|entropy|loss|step|iter|epoch|usage|perplexity|threshold|count|num"
    r"|total|size|rate|ratio|version|init|seed|prob|weight$",
    re.IGNORECASE,
)
_NETWORK = re.compile(r"enc|dec|conv|head|tok|pos|norm|attn|mlp|block|layer|resi|down|up|loss|disc", re.IGNORECASE)
_AFFINE = re.compile(r"affine\w*\.(scale|bias)$", re.IGNORECASE)
_MOST = 4  # tensors that are tried together, in any order


def transforms_beside(checkpoint: Checkpoint, book: FoundCodebook, known: Collection[str]) -> list[str]:
    """Keys of tensors beside a codebook that could change the codes that come out.

    They lie in the codebook's module or one level above it, and are a (dim, dim) matrix, a (dim) scale or shift, or a
    single number. A neutral one (an identity, ones, zeros) is left out.

    Args:
        checkpoint: The file.
        book: The codebook.
        known: Keys whose part is known: of codebooks, their companions, and a network that uses them itself.
    """
    shapes, inside, above = checkpoint.shapes, *_scopes(book.key)
    beside = set(effective(book, shapes).beside) if book.form is None else set[str]()
    keys = list[str]()
    for key, shape in shapes.items():
        if key in known or key in beside or not _is_near(key, inside, above):
            continue
        name = key[len(inside) + 1 if inside and key.startswith(f"{inside}.") else len(above) + 1 if above else 0 :]
        if _BEFORE.search(name) or not checkpoint.dtypes[key].startswith(("F", "BF")):
            continue
        if checkpoint.declared.get(key) != AS_STORED and _is_transform(key, name, shape, book.dim, shapes):
            keys.append(key)
    return [key for key in keys if not _is_neutral(checkpoint, key)]


def refuse_unknown(book: FoundCodebook, keys: Sequence[str], with_network: bool) -> None:
    """Refuse tensors that may change the codes in an unknown way.

    Args:
        book: The codebook.
        keys: The tensors; none for no refusal.
        with_network: Whether there is a network, which could get a method `quantize`.

    Raises:
        CodebookError: There are some.
    """
    if not keys:
        return
    network = (
        "a method quantize(latents) -> (quantized, codes) in the --network file"
        if with_network
        else "--network FILE.py:FUNCTION, whose module has quantize(latents) -> (quantized, codes)"
    )
    stated = " ".join(f"--as-stored {key}" for key in keys)
    raise CodebookError(
        f"{', '.join(keys)} may change the codes of {book.key} on their way out, and nothing says how: give {network}; "
        f"or, if codes come out as stored, {stated}"
    )


def forms(checkpoint: Checkpoint, book: FoundCodebook, keys: Sequence[str], unit_rows: bool) -> Iterator[Effective]:
    """The ways in which tensors may turn rows into codes, simplest first.

    Args:
        checkpoint: The file.
        book: The codebook.
        keys: The tensors, as from `transforms_beside`.
        unit_rows: Whether all rows have unit length.

    Yields:
        What the names suggest, the rows as stored, one tensor applied, several in any order.
    """
    padding = checkpoint.shapes[book.key][book.axis] - book.size
    by_names = effective(book, checkpoint.shapes)
    yield by_names
    if by_names.kind != "rows":
        yield Effective("rows", (), book.dim, padding)
    if by_names.kind == "projected":
        keys = [*by_names.beside, *keys]
    # Rows of unit length may be brought there by the model: written so, they do for one that does not, too.
    orders: list[tuple[StepKind, ...]] = [("unit",), ()] if unit_rows else [(), ("unit",)]
    for first in orders:
        yield from _steps(checkpoint, book, keys, padding, first)


def _steps(
    checkpoint: Checkpoint, book: FoundCodebook, keys: Sequence[str], padding: int, first: tuple[StepKind, ...]
) -> Iterator[Effective]:
    """One tensor or several, in any order, after the steps `first`, which need no tensor."""
    keys = keys[:_MOST]
    for count in range(1, len(keys) + 1):
        for order in permutations(keys, count):
            for steps in product(*(_kinds(key, checkpoint.shapes[key], book.dim) for key in order)):
                yield Effective("steps", order, book.dim, padding, (*first, *steps))


def alike(form: Effective, of: FoundCodebook, other: FoundCodebook, shapes: Mapping[str, tuple[int, ...]]) -> Effective:
    """Transfer the form of one stage to another.

    Args:
        form: Of the codebook `of`.
        of: The codebook of one stage.
        other: That of another.
        shapes: Of the file's tensors, by key.

    Raises:
        KeyError: The other stage has no tensor of such a name.
    """
    mine, theirs = _numbers(of.key), _numbers(other.key)
    beside = tuple(_renumbered(key, mine, theirs) for key in form.beside)
    if missing := [key for key in beside if key not in shapes]:
        raise KeyError(missing[0])
    return Effective(form.kind, beside, form.dim, form.padding, form.steps)


def _numbers(key: str) -> list[str]:
    return re.findall(r"(?<=\.)\d+(?=\.|$)|(?<=_)\d+(?=\.|$)", key)


def _renumbered(key: str, mine: list[str], theirs: list[str]) -> str:
    """The key with leading numbers `mine` replaced by `theirs`, up to the first that differs."""
    parts = re.split(r"((?<=\.)\d+(?=\.|$)|(?<=_)\d+(?=\.|$))", key)
    for i, (old, new) in enumerate(zip(mine, theirs, strict=False)):
        at = 2 * i + 1
        if at >= len(parts) or parts[at] != old:
            break
        parts[at] = new
    return "".join(parts)


def _scopes(key: str) -> tuple[str, str]:
    """The module that owns a codebook, and the one above it; a list of stages does not count as a level."""
    module = key.removesuffix(".weight")
    owner = re.sub(r"(\.\d+)+$", "", module).rpartition(".")[0]
    above = re.sub(r"(\.\d+)+$", "", owner).rpartition(".")[0]
    return owner, above


def _is_near(key: str, inside: str, above: str) -> bool:
    """Whether a tensor lies in the owning module, in the one above, or in a direct child of that."""
    if inside and key.startswith(f"{inside}."):
        return not any(map(CODER.fullmatch, key[len(inside) + 1 :].split(".")))
    stages = re.sub(r"(\.\d+)+$", "", inside)  # the list that holds the stages, which may hold what they share
    if stages != inside and key.startswith(f"{stages}."):
        rest = key[len(stages) + 1 :].split(".")
        return not rest[0].isdigit() and len(rest) <= 2 and not any(map(CODER.fullmatch, rest))
    if above and not key.startswith(f"{above}."):
        return False
    rest = key[len(above) + 1 if above else 0 :].split(".")
    if not above and len(rest) > 1:  # the whole network lies there: of it, linear layers that are no encoder's
        return len(rest) == 2 and rest[1] in ("weight", "bias") and not _NETWORK.search(rest[0])
    return len(rest) <= 3 and not any(map(CODER.fullmatch, rest))


def _is_transform(key: str, name: str, shape: tuple[int, ...], dim: int, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    long = tuple(length for length in shape if length > 1)
    if "." in name and key.partition(".")[0] == name.partition(".")[0] and name.endswith(".weight") and len(shape) != 2:
        return False  # of a layer straight in the network: a convolution or a norm, as networks have many
    if key.endswith(".bias"):
        weight = shapes.get(key.removesuffix("bias") + "weight")
        if weight is not None and tuple(weight[:2]) != (dim, dim) and tuple(weight) != (dim,):
            return False  # of a layer from or to another width
    if len(shape) >= 2 and tuple(shape[:2]) == (dim, dim) and all(length == 1 for length in shape[2:]):
        return True
    if long == (dim,) and dim > 1:
        return True
    return not long and not _SETTING.search(name.rpartition(".")[2])


def _is_neutral(checkpoint: Checkpoint, key: str) -> bool:
    """Whether a tensor changes no vector: an identity, ones where it is called a scale, zeros for a shift."""
    tensor = checkpoint.tensor(key).float()
    if tensor.ndim >= 2 and tensor.shape[0] == tensor.shape[1] and tensor.shape[0] > 1:
        return torch.equal(tensor.reshape(tensor.shape[:2]), torch.eye(tensor.shape[0]))
    name = key.rpartition(".")[2].lower()
    if re.search(r"bias|shift|offset|mean|add|loc", name) or _AFFINE.search(key):
        return bool((tensor == 0).all())
    if tensor.numel() == 1 or re.search(r"scale|weight|gain|gamma|std|mult", name):
        return bool((tensor == 1).all())
    return False


def _kinds(key: str, shape: tuple[int, ...], dim: int) -> list[StepKind]:
    if len(shape) >= 2 and tuple(shape[:2]) == (dim, dim) and dim > 1:
        return ["matrix", "matrix-transposed"]
    if re.search(r"bias|shift|offset|mean|add|loc", key.rpartition(".")[2], re.IGNORECASE):
        return ["shift", "scale", "one-plus-scale"]
    return ["scale", "shift", "one-plus-scale"]
