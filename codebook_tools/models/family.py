"""What a network family is to us: a record that says how its files are recognised, made, and written back.

Records are read without torch, so that a file is recognised at once; what makes a network imports it when called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.config import Config
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints, and the network that goes with it.

    prefix: what stands before the family's own key names ("" for nothing), None where tensors or config are another
    layout's. make: a network with fresh weights, from the shapes without that prefix and the checkpoint (its config);
    None where there is none to be had, and then `why_not` says in a sentence why. file_key: the file's key, without
    prefix, of what the network calls a name; shapes may differ in axes of length 1. metric: of METRICS, by name.
    config_key: the config's entry that is K, dots between levels; None for a family that knows no config. default_size:
    K where that entry is missing, None where the library has no default.
    power_of_two: whether the config takes no other K. follow: further entries of the config that K decides, by dotted
    name: (config, new K) -> values. axis: of the codes in their tensors, None where that can be told from the names.
    caveats: what to warn of. pretrained: the network as its library loads a directory, with the keys that it missed
    and those that it did not expect; None where there is no such library.
    """

    prefix: Callable[[Checkpoint], str | None]
    make: Callable[[Shapes, Checkpoint], Module] | None
    file_key: Callable[[str, Shapes], str] = lambda name, shapes: name
    why_not: str = ""
    metric: str = "euclidean"
    config_key: str | None = None
    default_size: int | None = None
    power_of_two: bool = False
    follow: Callable[[Config, int], Mapping[str, object]] = lambda config, size: {}
    axis: int | None = None
    caveats: Callable[[Checkpoint], tuple[str, ...]] = lambda checkpoint: ()
    pretrained: Callable[[Path], tuple[Module, list[str], list[str]]] | None = None
