"""The record of a network family: how its files are recognized, its network is made, and its config is written.

Importing the records does not import torch; the functions that make a network do.
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

    Attributes:
        prefix: checkpoint -> what precedes the family's key names ("" for nothing); None for another layout or config.
        make: (shapes without the prefix, checkpoint) -> a network with fresh weights; None where there is no network.
        file_key: (the network's name of a tensor, shapes) -> the file's key, without prefix. Shapes of the two may
            differ in axes of length 1.
        why_not: A sentence on why there is no network.
        metric: A name of METRICS.
        config_key: The config's entry that is K, dots between levels; None for a family without a config.
        default_size: K where the config lacks that entry; None where the library has no default.
        power_of_two: Whether the config takes no other K.
        follow: (config, new K) -> further entries of the config that depend on K, by dotted name.
        axis: Of the codes in their tensors; None where names and shapes tell it.
        caveats: checkpoint -> what to warn of.
        pretrained: directory -> the network as its library loads it, the keys that it missed, and the unexpected ones;
            None where there is no such library.
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
