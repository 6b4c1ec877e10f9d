"""Codebook surgery for pretrained VQ models: `import codebook_tools as ct`.

The names below are the public API; everything is imported when it is first asked for, so this costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from codebook_tools import strategies as strategies
    from codebook_tools.clustering.assignment import nearest as nearest
    from codebook_tools.clustering.kmeans import kmeans as kmeans
    from codebook_tools.clustering.metric import METRICS as METRICS
    from codebook_tools.codebook import REMOVED as REMOVED
    from codebook_tools.codebook import Codebook as Codebook
    from codebook_tools.codebook import Metric as Metric
    from codebook_tools.codebook import Strategy as Strategy
    from codebook_tools.codebook import Surgery as Surgery
    from codebook_tools.data.user_data import Data as Data
    from codebook_tools.errors import CodebookError as CodebookError
    from codebook_tools.models.wrapped import install as install
    from codebook_tools.training.monitor.callbacks import lightning_monitor as lightning_monitor
    from codebook_tools.training.monitor.callbacks import transformers_monitor as transformers_monitor
    from codebook_tools.training.monitor.monitor import CodebookMonitor as CodebookMonitor
    from codebook_tools.training.recipe import FineTune as FineTune
    from codebook_tools.workflows.python import CodebookWarning as CodebookWarning
    from codebook_tools.workflows.python import Operation as Operation
    from codebook_tools.workflows.python import compare as compare
    from codebook_tools.workflows.python import decode as decode
    from codebook_tools.workflows.python import diagnose as diagnose
    from codebook_tools.workflows.python import encode as encode
    from codebook_tools.workflows.python import inspect as inspect
    from codebook_tools.workflows.python import measure as measure
    from codebook_tools.workflows.python import operate as operate
    from codebook_tools.workflows.python import remap as remap
    from codebook_tools.workflows.python import sweep as sweep
    from codebook_tools.workflows.python import verify as verify
    from codebook_tools.workflows.python_model import Model as Model
    from codebook_tools.workflows.python_model import load as load
    from codebook_tools.workflows.python_model import wrap as wrap

_HOMES = {
    "clustering.assignment": ("nearest",),
    "clustering.kmeans": ("kmeans",),
    "clustering.metric": ("METRICS",),
    "codebook": ("REMOVED", "Codebook", "Metric", "Strategy", "Surgery"),
    "data.user_data": ("Data",),
    "errors": ("CodebookError",),
    "models.wrapped": ("install",),
    "training.monitor.callbacks": ("lightning_monitor", "transformers_monitor"),
    "training.monitor.monitor": ("CodebookMonitor",),
    "training.recipe": ("FineTune",),
    "workflows.python": (
        *("CodebookWarning", "Operation", "compare", "decode", "diagnose", "encode", "inspect"),
        *("measure", "operate", "remap", "sweep", "verify"),
    ),
    "workflows.python_model": ("Model", "load", "wrap"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME, "strategies"]


def __getattr__(name: str) -> object:
    if name == "strategies":
        return import_module("codebook_tools.strategies")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"codebook_tools.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
