"""LPIPS as a loss: the distance of two images in the features of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime import distributed
from codebook_tools.runtime.optional import require

AUTO = "auto"
SMALLEST = 16  # pixels of a side: VGG halves them four times


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
        require("--perceptual", "perceptual", "torchvision")
        # The public class fetches weights whenever it is made, and takes none; those of LPIPS itself lie in it.
        lpips = require("--perceptual", "perceptual", "torchmetrics.functional.image.lpips")
        with torch.random.fork_rng():  # its initial weights must not advance the global generator
            self.network = lpips._NoTrainLpips(net="vgg", pnet_rand=True)
        _load(self.network.net, distributed.by_first(lambda: _features(weights)), weights)
        self.network.to(device)

    def __call__(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """The mean LPIPS, a scalar, of images (n, 1 or 3, height, width) in [0, 1] and their reconstructions."""
        distances = self.network(_in_color(reconstruction), _in_color(images), normalize=True)
        assert isinstance(distances, Tensor)
        return distances.mean()


def _in_color(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)


def _load(vgg: nn.Module, features: Mapping[str, Tensor], source: str) -> None:
    """Both count the layers of VGG16's `features` alike; torchmetrics puts them into slices."""
    try:
        vgg.load_state_dict({name: features[name.partition(".")[2]] for name in vgg.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise CodebookError(
            f"--perceptual {source}: no weights of torchvision's VGG16 ({one_line(error)}); the file is {_url()}"
        ) from error


def _features(weights: str) -> dict[str, Tensor]:
    """The convolutions of VGG16, by name."""
    if weights == AUTO:
        state = _cached()
    else:
        stored = read_checkpoint(Path(weights))
        state = {name: stored.tensor(name) for name in stored.entries if name.startswith(_FEATURES)}
    return {name.removeprefix(_FEATURES): tensor for name, tensor in state.items() if name.startswith(_FEATURES)}


_FEATURES = "features."


def _cached() -> Mapping[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(
            _url(), map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise CodebookError(
            f"--perceptual {AUTO}: VGG16's weights are not in {torch.hub.get_dir()}/checkpoints, and cannot be fetched "
            f"({one_line(error)}); fetch {_url()} elsewhere, and give the file with --perceptual PATH"
        ) from error


def _url() -> str:
    from torchvision.models import VGG16_Weights

    return str(VGG16_Weights.DEFAULT.url)
