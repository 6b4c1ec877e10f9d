"""A discriminator that learns to tell reconstructions from images, patch by patch, while the decoder learns from it."""

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
    """PatchGAN (Isola et al. 2017): images (n, channels, height, width) in [0, 1] -> (n, 1, rows, columns), above 0
    where a patch is taken for an original's.

    Norms are of groups of channels, not of batches: an image is judged alike in any company, so that the parts of a
    batch are the batch. side: the shorter one of the images. seed: of the weights. Raises CodebookError where images
    are too small.
    """

    def __init__(self, channels: int, side: int, seed: int) -> None:
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
        judged: Tensor = self.layers(2 * images - 1)
        return judged


def _layers(channels: int, widths: list[int]) -> list[nn.Module]:
    """Halving layers of all widths but the last, which keeps its size, as the one number for each patch does."""
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
    for i, (before, after) in enumerate(pairwise(widths), 2):
        stride = 2 if i < len(widths) else 1
        layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.GroupNorm(32, after), nn.LeakyReLU(0.2)]
    return [*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1)]


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """What a discriminator minimises: 1 where it cannot tell, 0 where it is sure. Lim and Ye 2017."""
    return (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()) / 2


class Adversary:
    """A discriminator in training, and what a decoder gets to hear of it.

    layer: the weights of the decoder's last layer, by whose gradients the two losses are balanced. steps: that the
    discriminator has learnt for.
    """

    def __init__(self, discriminator: Discriminator, layer: nn.Parameter) -> None:
        self.discriminator, self.layer, self.steps = discriminator, layer, 0
        self.optimiser = torch.optim.Adam(discriminator.parameters(), RATE, BETAS)
        self._watched = list[tuple[Tensor, Tensor]]()

    def term(self, shown: Tensor, error: Tensor) -> Tensor:
        """What a decoder minimises beside `error`, that of what it has shown: at its last layer the gradient is SHARE
        times as long as that of the error, whatever the units of either."""
        self.discriminator.requires_grad_(False)
        judged: Tensor = -self.discriminator(shown).mean()
        return self.weight(error, judged, len(shown)) * judged

    def weight(self, error: Tensor, judged: Tensor, n: int) -> Tensor:
        """The adaptive weight of Esser et al. 2021, equation 7. n: images that these are means of; of several
        processes, each brings its own."""
        both = [torch.autograd.grad(of, self.layer, retain_graph=True)[0].flatten() for of in (error, judged)]
        by_error, by_judged = torch.split(_mean(torch.cat(both), n), self.layer.numel())
        ratio: Tensor = by_error.norm() / (by_judged.norm() + DELTA)
        return SHARE * ratio.clamp(max=MOST)

    def watch(self, images: Tensor, shown: Tensor) -> None:
        """Images and their reconstructions, to be learnt from in the next step."""
        self._watched.append((images, shown.detach()))

    def learn(self) -> Tensor:
        """One step of the discriminator, on all that was watched since the last. Returns the hinge loss before it."""
        images, shown = (torch.cat(both) for both in zip(*self._watched, strict=True))
        self._watched.clear()
        self.discriminator.requires_grad_(True)
        loss = hinge(self.discriminator(images), self.discriminator(shown))
        parameters = list(self.discriminator.parameters())
        gradients = _mean(torch.cat([of.flatten() for of in torch.autograd.grad(loss, parameters)]), len(images))
        for parameter, its in zip(parameters, torch.split(gradients, [p.numel() for p in parameters]), strict=True):
            parameter.grad = its.view_as(parameter)
        self.optimiser.step()
        self.steps += 1
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """All that `learn` changes, by name."""
        adam = self.optimiser.state_dict()["state"]
        return {
            "steps": torch.tensor(self.steps),
            **{f"discriminator.{name}": tensor for name, tensor in self.discriminator.state_dict().items()},
            **{f"adam.{i}.{name}": tensor for i, its in adam.items() for name, tensor in its.items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.steps = int(state["steps"])
        self.discriminator.load_state_dict(
            {name: state[f"discriminator.{name}"] for name in self.discriminator.state_dict()}
        )
        adam = dict[int, dict[str, Tensor]]()
        for key in state:
            if key.startswith("adam."):
                _, i, name = key.split(".")
                adam.setdefault(int(i), {})[name] = state[key]
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": adam})


def _mean(values: Tensor, n: int) -> Tensor:
    """Of all processes' values, each weighed by how many it is of."""
    summed = distributed.summed(torch.cat([values * n, values.new_full((1,), n)]))
    return summed[:-1] / summed[-1]


def last_layer(model: Model, pixels: Tensor) -> nn.Parameter:
    """The weights, a matrix or more, that lie nearest to what the model shows, of those that take gradients.

    pixels: (n, ...), any that it takes. Raises CodebookError where no gradient reaches any.
    """
    with torch.enable_grad():
        shown = model.run(pixels, lambda stage, latents: model.embed(model.assign(latents.detach(), stage), stage))
    waiting, met = deque([shown.grad_fn]), set[object]()
    while waiting:
        node = waiting.popleft()
        if node is None or node in met:
            continue
        met.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter) and variable.ndim > 1:
            return variable
        waiting.extend(following for following, _ in node.next_functions)
    raise CodebookError("--adversarial: no gradient reaches weights of the decoder; leave it out")
