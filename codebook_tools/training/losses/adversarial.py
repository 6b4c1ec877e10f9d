"""The adversarial loss: a discriminator of patches that trains beside the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.errors import CodebookError
from codebook_tools.models.model import Model
from codebook_tools.runtime import distributed

WIDTH, STRIDED = 64, 3  # channels of the first layer, and layers of stride 2: patches of 70 pixels, Isola et al. 2017
RATE, BETAS = 2e-4, (0.5, 0.999)  # of its Adam, Isola et al. 2017
SHARE = 0.8  # of the reconstruction's gradient, as the code of Esser et al. 2021 has it
DELTA, MOST = 1e-6, 1e4  # of the weight: Esser et al. 2021, equation 7, and the limit in their code
SMALLEST = 8  # pixels of a side that leave a patch to judge


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017) with group norms: the logits of an image do not depend on the rest of the batch."""

    def __init__(self, channels: int, side: int, seed: int) -> None:
        """Draw the weights.

        Args:
            channels: Of the images.
            side: Their shorter side in pixels.
            seed: Of the weights.

        Raises:
            CodebookError: The images are too small.
        """
        super().__init__()
        if side < SMALLEST:
            raise CodebookError(f"--adversarial: {side} pixels a side are too few; it takes {SMALLEST} or more")
        strided = min(STRIDED, side.bit_length() - 3)  # small images need small patches
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = _layers(channels, [WIDTH * 2**i for i in range(strided + 1)])
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, 0.0, 0.02)
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, channels, height, width) in [0, 1] -> logits (n, 1, rows, columns), above 0 for real patches."""
        logits: Tensor = self.layers(2 * images - 1)
        return logits


def _layers(channels: int, widths: list[int]) -> list[nn.Module]:
    """Layers of stride 2 of all widths but the last, which has stride 1, and the logits' layer."""
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
    for i, (before, after) in enumerate(pairwise(widths), 2):
        stride = 2 if i < len(widths) else 1
        layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.GroupNorm(32, after), nn.LeakyReLU(0.2)]
    return [*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1)]


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The hinge loss of a discriminator (Lim and Ye 2017) by its logits: 1 where they are 0, 0 where it is sure."""
    return (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()) / 2


class Adversary:
    """A discriminator in training, and its loss for the decoder.

    Attributes:
        discriminator: The network.
        layer: Weights of the decoder's last layer, at which the gradients of the two losses are balanced.
        steps: Steps that the discriminator has trained for.
        optimizer: The discriminator's Adam.
    """

    def __init__(self, discriminator: Discriminator, layer: nn.Parameter) -> None:
        self.discriminator, self.layer, self.steps = discriminator, layer, 0
        self.optimizer = torch.optim.Adam(discriminator.parameters(), RATE, BETAS)
        self._batches = list[tuple[Tensor, Tensor]]()

    def term(self, reconstruction: Tensor, error: Tensor) -> Tensor:
        """The adversarial loss, a scalar, whose gradient at the last layer is SHARE times as long as the error's.

        Args:
            reconstruction: (n, channels, height, width) with gradients.
            error: Scalar, the reconstruction's error.
        """
        self.discriminator.requires_grad_(False)
        loss: Tensor = -self.discriminator(reconstruction).mean()
        return self.weight(error, loss, len(reconstruction)) * loss

    def weight(self, error: Tensor, loss: Tensor, n: int) -> Tensor:
        """The adaptive weight of Esser et al. 2021, equation 7, a scalar.

        Args:
            error: Scalar, the reconstruction's error.
            loss: Scalar, the adversarial loss.
            n: Images of this process that both are means of.
        """
        both = [torch.autograd.grad(of, self.layer, retain_graph=True)[0].flatten() for of in (error, loss)]
        by_error, by_loss = torch.split(_mean(torch.cat(both), n), self.layer.numel())
        ratio: Tensor = by_error.norm() / (by_loss.norm() + DELTA)
        return SHARE * ratio.clamp(max=MOST)

    def watch(self, images: Tensor, reconstruction: Tensor) -> None:
        """Keep a batch and its reconstructions, both (n, channels, height, width), for the next step."""
        self._batches.append((images, reconstruction.detach()))

    def learn(self) -> Tensor:
        """Train one step on all batches since the last. Returns the hinge loss before it, a scalar."""
        images, fake = (torch.cat(both) for both in zip(*self._batches, strict=True))
        self._batches.clear()
        self.discriminator.requires_grad_(True)
        loss = hinge(self.discriminator(images), self.discriminator(fake))
        parameters = list(self.discriminator.parameters())
        gradients = _mean(torch.cat([of.flatten() for of in torch.autograd.grad(loss, parameters)]), len(images))
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, gradient in zip(parameters, torch.split(gradients, sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()
        self.steps += 1
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """All that `learn` changes, by name."""
        adam = self.optimizer.state_dict()["state"]
        return {
            "steps": torch.tensor(self.steps),
            **{f"discriminator.{name}": tensor for name, tensor in self.discriminator.state_dict().items()},
            **{f"adam.{i}.{name}": tensor for i, moments in adam.items() for name, tensor in moments.items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.steps = int(state["steps"])
        self.discriminator.load_state_dict(
            {name: state[f"discriminator.{name}"] for name in self.discriminator.state_dict()}
        )
        adam = dict[int, dict[str, Tensor]]()
        for key in state:
            if key.startswith("adam."):
                _, i, name = key.split(".")
                adam.setdefault(int(i), {})[name] = state[key]
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": adam})


def _mean(values: Tensor, n: int) -> Tensor:
    """Mean of the values of all processes, each weighted by its n."""
    summed = distributed.summed(torch.cat([values * n, values.new_full((1,), n)]))
    return summed[:-1] / summed[-1]


def last_layer(model: Model, pixels: Tensor) -> nn.Parameter:
    """The last layer's weights: those with two or more dimensions that the autograd graph reaches first.

    Args:
        model: The model.
        pixels: (n, ...), any input of it.

    Raises:
        CodebookError: No gradient reaches any.
    """
    with torch.enable_grad():
        output = model.run(pixels, lambda stage, latents: model.embed(model.assign(latents.detach(), stage), stage))
    queue, visited = deque([output.grad_fn]), set[object]()
    while queue:
        node = queue.popleft()
        if node is None or node in visited:
            continue
        visited.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter) and variable.ndim > 1:
            return variable
        queue.extend(following for following, _ in node.next_functions)
    raise CodebookError("--adversarial: no gradient reaches weights of the decoder; leave it out")
