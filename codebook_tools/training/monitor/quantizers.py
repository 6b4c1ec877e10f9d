"""The quantizers of a module in training: their codebooks, by names and shapes, and the modules that are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from codebook_tools.checkpoints.detect import FoundCodebook, find_codebooks
from codebook_tools.checkpoints.effective import Effective, effective
from codebook_tools.checkpoints.tensors import Shape
from codebook_tools.errors import CodebookError
from codebook_tools.models.stored_codes import codes_of_rows, stored_rows
from codebook_tools.models.wrapped import in_memory

_GRIDS = ("FSQ", "LFQ", "BSQ")
"""Parts of the names of quantizers that round to a grid, in vector-quantize-pytorch and elsewhere."""


@dataclass(frozen=True, eq=False)
class Quantizer:
    """A codebook in a module in training.

    Attributes:
        model: The module.
        caller: The module in it whose call quantizes.
        method: Of the caller, that quantizes: "forward", or "encode" where a library calls that.
        book: The codebook, by its key in the state dict.
        form: How rows of the codebook become codes.
    """

    model: nn.Module
    caller: nn.Module
    method: str
    book: FoundCodebook
    form: Effective

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer that holds the codes."""
        tensor: Tensor = getattr(self.model.get_submodule(_path(self.book.key)), self.book.key.rpartition(".")[2])
        return tensor

    @property
    def embedding(self) -> nn.Embedding | None:
        """The `nn.Embedding` that holds the codes; None where there is none."""
        holder = self.model.get_submodule(_path(self.book.key))
        return holder if isinstance(holder, nn.Embedding) else None

    def part(self) -> nn.Module:
        """A module of the codebook and what lies beside it alone: the model's own tensors, by their keys there."""
        paths = {_path(key) for key in (self.book.key, *self.book.companions, *self.form.beside)}
        part, stored = nn.Module(), self.model.state_dict().keys()
        for path in paths:
            module, owner = self.model.get_submodule(path), part
            for name in filter(None, path.split(".")):
                if name not in owner._modules:
                    owner.add_module(name, nn.Module())
                owner = owner.get_submodule(name)
            owner._parameters.update(module._parameters)
            owner._buffers.update({name: one for name, one in module._buffers.items() if _joined(path, name) in stored})
        return part

    def codes(self) -> Tensor:
        """A copy of the codes, (size, dim) float32 on the device of the codebook."""
        tensor = self.tensor.detach()
        if self.form.kind == "rows":
            return stored_rows(tensor, self.book).clone()
        state = in_memory(type(self.model).__name__, self.part().state_dict())
        return codes_of_rows(state, self.book, stored_rows(tensor.cpu(), self.book)).to(tensor.device)


def find_quantizers(model: nn.Module, codebooks: Sequence[str] | None) -> list[Quantizer]:
    """The quantizers of a module, in the order of their names.

    Args:
        model: The module in training.
        codebooks: Keys of the codebooks in its state dict; None to detect them.

    Raises:
        CodebookError: There is none, a key names no codebook, or one cannot be monitored.
    """
    tensors = _tensors_of(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    detection = find_codebooks(shapes)
    books = {book.key: book for book in detection.codebooks}
    if codebooks is None:
        certain = [book for book in books.values() if book.confidence == "high"]
        following = {key for book in certain for key in book.companions}
        chosen = [book for book in certain if book.key not in following]
        if not chosen:
            raise CodebookError(_none_in(model, [*books], detection.reason))
    else:
        keys = [codebooks] if isinstance(codebooks, str) else codebooks
        chosen = [books.get(key) or _declared(model, key, shapes, [*books]) for key in keys]
    firsts = {id(tensors[book.key]): book.key for book in reversed(chosen)}  # stages may share a codebook
    return [_quantizer(model, book, shapes) for book in chosen if firsts[id(tensors[book.key])] == book.key]


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The floats of the state dict by their keys, as the objects that the module has: layers may share one."""
    stored = model.state_dict().keys()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if name in stored and tensor.is_floating_point()}


def _declared(model: nn.Module, key: str, shapes: Mapping[str, Shape], detected: Sequence[str]) -> FoundCodebook:
    """A codebook that only the user knows: its rows are the codes."""
    shape = shapes.get(key, ())
    matrix = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(matrix) != 2:
        candidates = ", ".join(detected) or ", ".join(key for key, shape in shapes.items() if len(shape) == 2) or "none"
        raise CodebookError(
            f"codebooks: {type(model).__name__} has no matrix {key!r} in its state dict; candidates: {candidates}"
        )
    return FoundCodebook(key, *matrix, len(shape) - 2, 1, "F32", "unknown", (), "high")


def _quantizer(model: nn.Module, book: FoundCodebook, shapes: Mapping[str, Shape]) -> Quantizer:
    form = effective(book, shapes)
    if book.heads > 1 or form.kind == "network":
        reason = f"of {book.heads} heads" if book.heads > 1 else f"whose codes are made by layers, {form.beside[0]} …"
        raise CodebookError(f"{book.key} is a codebook {reason}: not monitored; name the others with codebooks=[...]")
    return Quantizer(model, *_caller(model, _path(book.key)), replace(book, form=form), form)


def _path(key: str) -> str:
    """The path of the module that holds a tensor."""
    return key.rpartition(".")[0]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _caller(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The nearest module around a codebook, from inside out, that has a forward or an `encode` of its own."""
    while True:
        module = model.get_submodule(path)
        if not isinstance(module, nn.Embedding):
            if not path or type(module).forward is not nn.Module.forward:
                return module, "forward"
            if callable(getattr(module, "encode", None)):
                return module, "encode"
        path = _path(path)


def _none_in(model: nn.Module, unsure: Sequence[str], reason: str | None) -> str:
    """The message where no codebook is certain."""
    name = type(model).__name__
    if unsure:
        return f"{name} has tensors that are only perhaps codebooks; name those that are: codebooks={[*unsure]}"
    classes = sorted(type(module).__name__ for module in model.modules())
    grid = next((one for one in classes if any(word in one.upper() for word in _GRIDS)), None)
    if grid is not None:
        return f"{grid} rounds to a grid and has no learned codebook: there are no codes to monitor"
    return f"{name} has no codebook: {(reason or '').partition(';')[0]}; name it with codebooks=['quantizer.weight']"
