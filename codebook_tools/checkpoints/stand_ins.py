"""Stand-ins for the harmless objects in a file of torch.save: they keep arguments and state, and run no code.

torch's unpickler makes tensors, plain containers and what `torch.serialization` allows by name, and refuses all else.
Only names are allowed here, never the classes behind them: a name leads to a class or function of this module, which
keeps arguments and state as they are. So no module that a file names is imported and no method of its classes is
called, whatever the pickle does with them.

The name of an enum in somebody's own config cannot be listed. A class of an unknown module is allowed if its name is
spelled like a class and the file only names it or calls it with one plain value, as enums are pickled. Names of the
standard library and of libraries that load or run things are refused even so: their stand-ins would be as inert, but
nothing harmless is pickled in that form, and the user should know about such a file.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import serialization

_PATHS = ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_NODES = ("Any", "None", "String", "Path", "Integer", "Bytes", "Float", "Boolean", "Enum", "Literal")
OBJECTS = (
    *(f"pathlib.{flavor}" for flavor in _PATHS),
    *(f"pathlib._local.{flavor}" for flavor in _PATHS),  # of Python 3.13
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.tupleconfig.TupleConfig"),
    *("omegaconf.base.Metadata", "omegaconf.base.ContainerMetadata", "omegaconf.base.UnionNode"),
    *(f"omegaconf.nodes.{kind}Node" for kind in _NODES),
)
"""Classes whose objects are read, with any arguments and state."""

REFERENCES = (
    *(f"builtins.{kind}" for kind in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")),
    *(f"typing.{hint}" for hint in ("Any", "Dict", "List", "Literal", "Optional", "Tuple", "Union")),
)
"""Classes that may be named and not called: types of omegaconf's nodes, factories of defaultdicts."""

_LIBRARIES = frozenset(sys.stdlib_module_names) | {
    *("__builtin__", "copy_reg"),  # of Python 2, as pickles of protocol 2 spell them
    *("IPython", "cloudpickle", "codebook_tools", "dill", "distutils", "joblib", "numpy", "omegaconf", "pandas", "pip"),
    *("pkg_resources", "scipy", "setuptools", "sklearn", "tensorflow", "torch", "torchaudio", "torchvision"),
}
_OWN = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)\.(_*[A-Z]\w*)", re.ASCII)
_MOST_OWN = 64
"""Unknown classes that a file may name: torch searches all allowed ones at every object."""
_PLAIN = (str, int, float, complex, bool, bytes, type(None))
_ONE_AT_A_TIME = threading.Lock()


class RefusedError(Exception):
    """A pickle uses an allowed name otherwise than harmless objects do. The message has the form of torch's own."""

    def __init__(self, name: str) -> None:
        super().__init__(f"GLOBAL {name} was not an allowed global in this use")


class StandIn:
    """An object of the file; each subclass has the name of the class that it stands for.

    Attributes:
        arguments: With which the object was made, not interpreted.
        state: That the object was given afterwards, not interpreted; None where there was none.
    """

    __slots__ = ("arguments", "state")

    arguments: tuple[object, ...]
    state: object

    def __new__(cls, *arguments: object) -> Self:
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: object) -> None:
        """Keep the state; torch would otherwise write it to the object's `__dict__` and slots."""
        self.state = state

    def __repr__(self) -> str:
        return _name_of(type(self))


class Reference(StandIn):
    """A class that the file may name and not call."""

    __slots__ = ()

    def __new__(cls, *arguments: object) -> Self:
        raise RefusedError(_name_of(cls))


class Member(StandIn):
    """A member of an enum, whose only argument is its value or name."""

    __slots__ = ()

    def __new__(cls, *arguments: object) -> Self:
        if len(arguments) != 1 or not _is_plain(arguments[0]):
            raise RefusedError(_name_of(cls))
        return super().__new__(cls, *arguments)

    def __setstate__(self, state: object) -> None:
        raise RefusedError(_name_of(type(self)))

    def __repr__(self) -> str:
        return f"{_name_of(type(self))}({self.arguments[0]!r})"


class Namespace(dict[str, object]):
    """An `argparse.Namespace` as the mapping of its attributes, since a state dict may be among them."""

    def __new__(cls, *arguments: object) -> Self:
        if arguments:
            raise RefusedError("argparse.Namespace")
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise RefusedError("argparse.Namespace")
        self.update(state)


def _defaultdict(factory: object = None) -> dict[object, object]:
    """A plain dict for a defaultdict; torch fills it, and missing keys are not made up."""
    return {}


def _getitem(origin: object, parameters: object) -> StandIn:
    """A type hint with parameters, as `List[int]`."""
    if not (isinstance(origin, type) and issubclass(origin, Reference)):
        raise RefusedError("operator.getitem")
    return StandIn(origin, parameters)


def _getattr(enum: object, name: object) -> Member:
    """A member of an own enum by its name, as some versions of Python pickle it; of nothing else."""
    if not (isinstance(enum, type) and issubclass(enum, Member) and type(name) is str and name.isidentifier()):
        raise RefusedError("builtins.getattr")
    return enum(name)


def _named(kind: type[StandIn], name: str) -> type[StandIn]:
    """A subclass of `kind` under a dotted name."""
    module, _, own = name.rpartition(".")
    return type(own, (kind,), {"__module__": module, "__slots__": ()})


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(type(item) in _PLAIN for item in value))


_ALLOWED: tuple[tuple[Callable[..., Any], str], ...] = (
    (Namespace, "argparse.Namespace"),
    (_defaultdict, "collections.defaultdict"),
    (_getitem, "_operator.getitem"),
    (_getattr, "builtins.getattr"),
    *((_named(StandIn, name), name) for name in OBJECTS),
    *((_named(Reference, name), name) for name in REFERENCES),
)


def own_classes(names: Iterable[str]) -> list[str]:
    """The dotted names among `names` that may be enums of somebody's own config, sorted; none if there are too many."""
    own = {name for name in names if _OWN.fullmatch(name) and name.partition(".")[0] not in _LIBRARIES}
    return sorted(own) if len(own) <= _MOST_OWN else []


@contextmanager
def allowed(own: Iterable[str] = ()) -> Iterator[None]:
    """Let `torch.load` read stand-ins, and none of the classes that the process has allowed, which would be real ones.

    What torch allows belongs to the process: one thread at a time is inside, and loads of other threads meanwhile
    follow these rules too. Afterwards all is as before.

    Args:
        own: Dotted names of classes that are read as enums, from `own_classes`.
    """
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        *_ALLOWED,
        *((_named(Member, name), name) for name in own),
    ]
    with _ONE_AT_A_TIME:
        before = serialization.get_safe_globals()
        serialization.clear_safe_globals()
        serialization.add_safe_globals(stand_ins)
        try:
            yield
        finally:
            meanwhile = set(serialization.get_safe_globals()) - set(stand_ins)  # of an import in another thread
            serialization.clear_safe_globals()
            serialization.add_safe_globals([*before, *meanwhile])
