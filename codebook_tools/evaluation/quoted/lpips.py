"""LPIPS (Zhang et al. 2018) with VGG16, as torchmetrics computes it: its network, and the mean over images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from codebook_tools.checkpoints.hashing import file_sha256
from codebook_tools.data.rows import all_finite
from codebook_tools.errors import CodebookError, NotFiniteError, one_line
from codebook_tools.evaluation.quoted.figure import ItemMean
from codebook_tools.evaluation.quoted.weights import tensors_of
from codebook_tools.runtime.optional import require

SMALLEST = 16
"""Pixels of a side: VGG halves them four times."""

FEATURES = "features."
"""Before the names of the convolutions in torchvision's VGG16."""


def vgg_url() -> str:
    """Where torchvision publishes its VGG16."""
    from torchvision.models import VGG16_Weights

    return str(VGG16_Weights.DEFAULT.url)


def lpips_libraries(option: str) -> Any:
    """torchmetrics' module of LPIPS. option: what needs it. Raises CodebookError where a library is missing."""
    require(option, "perceptual", "torchvision")
    return require(option, "perceptual", "torchmetrics.functional.image.lpips")


def lpips_network(state: Mapping[str, Tensor], option: str) -> nn.Module:
    """LPIPS with VGG16.

    Args:
        state: torchvision's VGG16 by name of the tensor; other names than those of its convolutions are ignored.
        option: What asked for it, for messages.

    Raises:
        CodebookError: A library is missing, or the tensors are not VGG16's.
    """
    # The public class fetches weights whenever it is made, and takes none; those of LPIPS itself lie in it.
    with torch.random.fork_rng():  # its initial weights must not advance the global generator
        made: nn.Module = lpips_libraries(option)._NoTrainLpips(net="vgg", pnet_rand=True)
    vgg: Any = made.net
    try:  # both count the layers alike; torchmetrics puts them into slices
        vgg.load_state_dict({name: state[FEATURES + name.partition(".")[2]] for name in vgg.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise CodebookError(
            f"{option}: no weights of torchvision's VGG16 ({one_line(error)}); the file is {vgg_url()}"
        ) from error
    return made


def in_color(images: Tensor) -> Tensor:
    """(n, 1 or 3, height, width) with three channels."""
    return images.expand(-1, 3, -1, -1)


class LPIPS(ItemMean):
    """The mean over images as they are measured: at the network's size, without another resize."""

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        weights, option = of[2], f"--metrics {self.name}"
        lpips_libraries(option)
        path = weights.find("torchvision's VGG16", vgg_url())
        self.sha256 = file_sha256(path)
        self._network = lpips_network(tensors_of(path, FEATURES), f"{option}={path}").to(self.device)

    def scores(self, media: Tensor, reconstructed: Tensor) -> Tensor:
        if min(media.shape[-2:]) < SMALLEST:
            raise CodebookError(
                f"--metrics {self.name}: {min(media.shape[-2:])} pixels a side are too few; it takes {SMALLEST} or more"
            )
        distances: Tensor = self._network(in_color(reconstructed), in_color(media), normalize=True)
        if not all_finite(distances):
            raise NotFiniteError(f"--metrics {self.name}: distances are not finite; are the weights damaged?")
        return distances.flatten()
