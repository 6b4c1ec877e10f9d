"""Libraries that not every installation has."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from codebook_tools.errors import CodebookError


def require(purpose: str, extra: str, module: str, *names: str) -> Any:
    """Import an optional library.

    Args:
        purpose: What needs it, as the user knows it: an option, a format or a model.
        extra: The extra of this package that installs it.
        module: What is imported.
        names: Of its attributes.

    Returns:
        The module; with names the attributes, in a tuple.

    Raises:
        CodebookError: The library is missing, too old, or cannot be imported.
    """
    try:
        imported = import_module(module)
        return tuple(getattr(imported, name) for name in names) if names else imported
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # OSError: a shared library is missing
        reason = str(error).partition("\n")[0]
        raise _missing(purpose, extra, module.partition(".")[0], f" ({reason})") from error


def require_installed(purpose: str, extra: str, *modules: str) -> None:
    """Check that optional libraries are installed, without the time to import them.

    Raises:
        CodebookError: One is missing.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise _missing(purpose, extra, " and ".join(missing), "")


def _missing(purpose: str, extra: str, library: str, reason: str) -> CodebookError:
    return CodebookError(f"{purpose} needs {library}{reason}: pip install 'codebook-tools[{extra}]'")
