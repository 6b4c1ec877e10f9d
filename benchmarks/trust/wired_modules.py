"""Small VQ-VAEs that are wired as a description says: what `wirings.py` operates on, as a user's network would be.

`build` makes the module of a `Wiring` with any codebook size. The module has its own quantizer, written without the
package: effective codes from the rows stored, the nearest code in float64, the residual walk, and the EMA update of a
training step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from wiring import Step, Wiring

PATCH = 4
"""Side in pixels of the patch that becomes one latent."""

EPSILON = 1e-5
"""Of the Laplace smoothing, and the least count that sums are divided by."""


class Wired(nn.Module):
    """Encoder, residual quantizer and decoder; it runs itself, and shares no code with the package."""

    def __init__(self, wiring: Wiring, codebook_size: int) -> None:
        super().__init__()
        self.wiring, self.codebook_size = wiring, codebook_size
        self.add_module(wiring.encoder, nn.Conv2d(1, wiring.dim, PATCH, PATCH))
        self.add_module(wiring.decoder, nn.ConvTranspose2d(wiring.dim, 1, PATCH, PATCH))
        nodes = dict[int, nn.Module]()
        for path, group in zip(wiring.paths, wiring.groups, strict=True):
            if group not in nodes:
                nodes[group] = self._book()
            _mount(self, path, nodes[group])
        for step in (step for step in wiring.steps if step.above):
            for stage, group in enumerate(wiring.groups):
                name, first = (wiring.step_path(step, of) for of in (stage, wiring.groups.index(group)))
                if name == first and not _holds(self, name):
                    _put_step(self, name, step, wiring.dim)
                elif name != first and not _holds(self, name):  # of a shared codebook: the same once more
                    _put_again(self, name, first)

    def _book(self) -> nn.Module:
        """A codebook's module, with all that is in it."""
        wiring, size, node = self.wiring, self.codebook_size, nn.Module()
        stored = size + wiring.padded
        if wiring.storage == "embedding":
            _mount(node, wiring.leaf.removesuffix(".weight"), nn.Embedding(stored, wiring.dim))
        else:
            laid = torch.zeros((wiring.dim, stored) if wiring.layout == "columns" else (stored, wiring.dim))
            laid = laid[None] if wiring.layout == "batched" else laid
            _put(node, wiring.leaf, laid, wiring.storage == "parameter")
        for step in wiring.steps:
            if not step.above:
                _put_step(node, step.name, step, wiring.dim)
        if (average := wiring.average) is not None:
            counts = {"k": (size,), "1k": (1, size), "k1": (size, 1)}[average.shape]
            across = (wiring.layout == "columns") != average.turned
            sums = torch.zeros((wiring.dim, size) if across else (size, wiring.dim))
            sums = sums[None] if wiring.layout == "batched" else sums
            _put(node, average.counts, torch.zeros(counts), average.trainable)
            _put(node, average.sums, sums, average.trainable)
        if wiring.companion:
            _put(node, wiring.companion, torch.zeros((size, wiring.dim) if wiring.unknown == "rows" else size), False)
        return node

    # Tensors of a codebook

    def tensor(self, group: int, name: str) -> Tensor:
        """A tensor in a codebook's module."""
        return tensor_at(self, f"{self.wiring.paths[self.wiring.groups.index(group)]}.{name}")

    def rows(self, group: int) -> Tensor:
        """(K, dim), the rows stored, without padding; a view."""
        stored = self.tensor(group, self.wiring.leaf)
        rows = stored.T if self.wiring.layout == "columns" else stored[0] if stored.ndim == 3 else stored
        return rows[: self.codebook_size]

    def sums(self, group: int) -> Tensor:
        """(K, dim), the running sums; a view."""
        assert self.wiring.average is not None
        stored = self.tensor(group, self.wiring.average.sums)
        stored = stored[0] if stored.ndim == 3 else stored
        across = (self.wiring.layout == "columns") != self.wiring.average.turned
        return stored.T if across else stored

    def counts(self, group: int) -> Tensor:
        """(K,), the running counts; a view."""
        assert self.wiring.average is not None
        return self.tensor(group, self.wiring.average.counts).view(-1)

    def codes_of(self, rows: Tensor, group: int) -> Tensor:
        """Effective codes (K, dim) of stored rows (K, dim)."""
        for step in self.wiring.steps:
            rows = self._step(step, group)(rows)
        return rows

    def rows_of(self, codes: Tensor, group: int) -> Tensor:
        """Stored rows (n, dim) of effective codes (n, dim): the inverse of `codes_of`."""
        for step in reversed(self.wiring.steps):
            codes = self._step(step, group, inverse=True)(codes)
        return codes

    def _step(self, step: Step, group: int, inverse: bool = False) -> Callable[[Tensor], Tensor]:
        if step.kind == "unit":
            return lambda rows: normalize(rows, dim=-1)
        name = self.wiring.step_path(step, self.wiring.groups.index(group))
        if step.kind == "project":
            weight = tensor_at(self, f"{name}.weight").T if step.layer else tensor_at(self, name)
            bias = tensor_at(self, f"{name}.bias") if step.bias else None
            if not inverse:
                return lambda rows: linear(rows, weight.T, bias)
            back = torch.linalg.inv(weight.double())
            return lambda codes: ((codes.double() - (0 if bias is None else bias.double())) @ back).float()
        held = tensor_at(self, name)
        if step.kind == "scale":
            return (lambda codes: codes / held) if inverse else (lambda rows: rows * held)
        return (lambda codes: codes - held) if inverse else (lambda rows: rows + held)

    # The quantizer

    def distances(self, rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Squared distances (n, K) float64 by which the codes of latents (n, dim) are chosen, and codes (K, dim)."""
        codes = self.codes_of(self.rows(group), group)
        x, c = rows.double(), codes.double()
        if self.wiring.cosine:
            x, c = normalize(x, dim=-1), normalize(c, dim=-1)
        apart = torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist")
        return apart.square(), codes

    def assign(self, rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """latents (n, dim) -> codes (n,) int64, the lowest index among equals, and the vectors emitted (n, dim)."""
        squared, codes = self.distances(rows, group)
        chosen = torch.from_numpy(squared.detach().numpy().argmin(1))
        return chosen, codes[chosen]

    def tokens(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents (n, dim, *grid) -> quantized, alike, and codes (n, *grid), of several stages (n, stages, *grid)."""
        rest, quantized, chosen = latents, torch.zeros_like(latents), list[Tensor]()
        met = dict[int, list[tuple[Tensor, Tensor]]]()
        for group in self.wiring.groups:
            rows = rest.movedim(1, -1)
            codes, vectors = self.assign(rows.flatten(0, -2), group)
            met.setdefault(group, []).append((rows.flatten(0, -2).detach(), codes))
            emitted = vectors.reshape(rows.shape).movedim(-1, 1)
            rest, quantized = rest - emitted, quantized + emitted
            chosen.append(codes.reshape(rows.shape[:-1]))
        if self.training and self.wiring.average is not None:
            for group, pairs in met.items():
                self._update(group, torch.cat([rows for rows, _ in pairs]), torch.cat([codes for _, codes in pairs]))
        if self.training or self.wiring.straight:
            quantized = latents + (quantized - latents).detach()
        return quantized, chosen[0] if len(chosen) == 1 else torch.stack(chosen, 1)

    @torch.no_grad()
    def _update(self, group: int, latents: Tensor, codes: Tensor) -> None:
        """The EMA update of a codebook by latents (n, dim) and their codes (n,)."""
        average, counts, sums = self.wiring.average, self.counts(group), self.sums(group)
        assert average is not None
        hits, totals = self.batch_of(group, latents, codes)
        counts.mul_(average.decay).add_(hits, alpha=1 - average.decay)
        sums.mul_(average.decay).add_(totals, alpha=1 - average.decay)
        means = sums / self.divisors(counts)[:, None]
        self.rows(group).copy_(normalize(means, dim=-1) if self._stored_unit else means)

    def batch_of(self, group: int, latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Hits (K,) of latents (n, dim) with codes (n,), and the sums (K, dim) of what their rows should be."""
        targets = self.rows_of(latents, group)
        hits = torch.bincount(codes, minlength=self.codebook_size).float()
        return hits, torch.zeros(self.codebook_size, self.wiring.dim).index_add_(0, codes, targets)

    def divisors(self, counts: Tensor) -> Tensor:
        """(K,): what the sums are divided by, of running counts (K,)."""
        assert self.wiring.average is not None
        if not self.wiring.average.smoothed:
            return counts.clamp(min=EPSILON)
        total = counts.sum()
        return (counts + EPSILON) / (total + len(counts) * EPSILON) * total

    @property
    def _stored_unit(self) -> bool:
        return any(step.kind == "unit" for step in self.wiring.steps)

    # The network

    def encode(self, images: Tensor) -> Tensor:
        """images (n, 1, height, width) -> latents (n, dim, height / 4, width / 4)."""
        latents: Tensor = self.get_submodule(self.wiring.encoder)(images)
        return latents.tanh() if self.wiring.bounded else latents

    def decode(self, quantized: Tensor) -> Tensor:
        """quantized (n, dim, *grid) -> images (n, 1, height, width)."""
        images: Tensor = self.get_submodule(self.wiring.decoder)(quantized)
        return images

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (n, 1, height, width) -> their reconstructions, and their codes as `tokens` returns them."""
        quantized, codes = self.tokens(self.encode(images))
        return self.decode(quantized), codes


class _Quantizing(Wired):
    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return self.tokens(latents)


class _Walking(Wired):
    @property
    def codebooks(self) -> tuple[str, ...]:
        return tuple(map(self.wiring.key, range(len(self.wiring.groups))))

    def walk(self, encoded: Tensor, quantise: Callable[[int, Tensor], Tensor]) -> Tensor:
        rest, quantized = encoded, torch.zeros_like(encoded)
        for stage in range(len(self.wiring.groups)):
            emitted = quantise(stage, rest)
            rest, quantized = rest - emitted, quantized + emitted
        return quantized


class _WalkingQuantizing(_Walking, _Quantizing):
    pass


def build(wiring: Wiring, codebook_size: int) -> Wired:
    """The module of a wiring, with the members that its `walks` and `quantizes` say."""
    kinds = {(0, 0): Wired, (0, 1): _Quantizing, (1, 0): _Walking, (1, 1): _WalkingQuantizing}
    return kinds[int(wiring.walks), int(wiring.quantizes)](wiring, codebook_size)


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """The tensor of a state dict name."""
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), leaf)
    return tensor


def _mount(root: nn.Module, path: str, node: nn.Module) -> None:
    """Make `node` the module at a dotted path below `root`."""
    *above, last = path.split(".")
    _inside(root, above).add_module(last, node)


def _put(root: nn.Module, name: str, tensor: Tensor, parameter: bool) -> None:
    """Register a tensor under a dotted name below `root`."""
    *above, last = name.split(".")
    if parameter:
        _inside(root, above).register_parameter(last, nn.Parameter(tensor))
    else:
        _inside(root, above).register_buffer(last, tensor)


def _put_step(root: nn.Module, name: str, step: Step, dim: int) -> None:
    if step.kind == "project" and step.layer:
        _mount(root, name, nn.Linear(dim, dim, bias=step.bias))
    elif step.kind == "project":
        _put(root, name, torch.eye(dim), True)
    elif step.kind != "unit":
        value = torch.ones if step.kind == "scale" else torch.zeros
        _put(root, name, value(()) if step.scalar else value(dim), True)


def _holds(root: nn.Module, name: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for key in root.state_dict())


def _put_again(root: nn.Module, name: str, first: str) -> None:
    """Register the parameter or the layer that is at `first` under a second dotted name."""
    *above, last = name.split(".")
    path, _, leaf = first.rpartition(".")
    setattr(_inside(root, above), last, getattr(root.get_submodule(path), leaf))


def _inside(root: nn.Module, path: list[str]) -> nn.Module:
    """The module at a path below `root`, made where there is none."""
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root
