"""LPIPS as a loss: the distance of two images in the features of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.errors import CodebookError, one_line
from codebook_tools.evaluation.quoted.lpips import (
    FEATURES,
    SMALLEST,
    in_color,
    lpips_libraries,
    lpips_network,
    vgg_url,
)
from codebook_tools.evaluation.quoted.weights import tensors_of
from codebook_tools.runtime import distributed

AUTO = "auto"


class Perceptual:
    """LPIPS with VGG16 (Zhang et al. 2018), as torchmetrics computes it.

    Attributes:
        network: VGG16's convolutions and the linear layers of LPIPS.
    """

    def __init__(self, weights: str, side: int, device: torch.device) -> None:
        """Load the weights.

        Args:
            weights: File of torchvision's VGG16, safetensors or .pth; or AUTO for torch's cache, fetched if need be.
            side: The images' shorter side in pixels.
            device: Where the network runs.

        Raises:
            CodebookError: torchvision or the weights are missing, or the images are too small.
        """
        if side < SMALLEST:
            raise CodebookError(f"--perceptual: {side} pixels a side are too few; it takes {SMALLEST} or more")
        lpips_libraries("--perceptual")
        features = distributed.by_first(lambda: _features(weights))
        self.network = lpips_network(features, f"--perceptual {weights}").to(device)

    def __call__(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """The mean LPIPS, a scalar, of images (n, 1 or 3, height, width) in [0, 1] and their reconstructions."""
        distances = self.network(in_color(reconstruction), in_color(images), normalize=True)
        assert isinstance(distances, Tensor)
        return distances.mean()


def _features(weights: str) -> dict[str, Tensor]:
    """The convolutions of VGG16, by name; the classifier's half gigabyte is not sent to other processes."""
    state = _cached() if weights == AUTO else tensors_of(Path(weights), FEATURES)
    return {name: tensor for name, tensor in state.items() if name.startswith(FEATURES)}


def _cached() -> Mapping[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(
            vgg_url(), map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise CodebookError(
            f"--perceptual {AUTO}: VGG16's weights are not in {torch.hub.get_dir()}/checkpoints, and cannot be fetched "
            f"({one_line(error)}); fetch {vgg_url()} elsewhere, and give the file with --perceptual PATH"
        ) from error
