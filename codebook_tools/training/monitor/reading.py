"""Codes and latents of a quantizer's call: where they are among its inputs and outputs is settled by the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.metric import COSINE, COSINE_UNIT, DOT
from codebook_tools.codebook import EUCLIDEAN, Codebook, Metric
from codebook_tools.runtime.devices import sent
from codebook_tools.training.monitor.quantizers import Quantizer

SAMPLE = 512
"""Latents of a call that are sampled, unless more are asked for: all of them take time, and an epoch has many calls."""

_ROWS = 4096  # on which a layout is settled, at most
_AGREE = 0.9  # of the codes must be the nearest ones; the rest may be near-ties, or of a codebook that moved meanwhile
_TRIES = 8  # calls on which a layout may be settled: a codebook is perhaps initialized by the first


@dataclass(frozen=True)
class Layout:
    """Where the latents of a call are.

    Attributes:
        among: "inputs" or "outputs".
        index: Of the tensor among all that there are.
        axis: Of that tensor, along which a latent lies.
        metric: By which the nearest codes are those that the quantizer chose.
    """

    among: str
    index: int
    axis: int
    metric: Metric


@dataclass(frozen=True, eq=False)
class Call:
    """What a quantizer was called with, and what it chose.

    Attributes:
        codes: (n,) int64, -1 where a mask is off; none where there are none to be had.
        latents: (m, dim) float32, all up to SAMPLE, or a sample in random order; None where they are unknown.
        codes_of_latents: (m,) int64, their codes.
    """

    codes: Tensor
    latents: Tensor | None = None
    codes_of_latents: Tensor | None = None


class Reader:
    """Reads the calls of one quantizer.

    Attributes:
        layout: Where the latents are; None until that is settled, and where it cannot be.
        called: Whether there was a call.
    """

    def __init__(self, quantizer: Quantizer, most: int, seed: int) -> None:
        """most: latents to sample of a call. seed: of that, apart from torch's own random numbers."""
        self.quantizer, self._most = quantizer, most
        self.layout: Layout | None = None
        self.called = self._within = False
        self._random = torch.Generator().manual_seed(seed)
        self._tries, self._searches = 0, False
        self._one_hot: list[int] | None = None
        self._before: Tensor | None = None
        self._lookups: list[Tensor] = []

    def begin(self) -> None:
        """Before a call: keep the codes, which the call may move, where they will be needed."""
        self.called = self._within = True
        self._lookups.clear()
        unsettled = self.layout is None and self._tries < _TRIES
        self._before = self.quantizer.codes() if unsettled or self._searches else None

    def look_up(self, indices: Tensor) -> None:
        """Indices that the embedding is called with; they count within a call."""
        if self._within:
            self._lookups.append(indices.detach())

    def end(self, args: Sequence[object], kwargs: Mapping[str, object], output: object) -> Call:
        """After a call.

        Args:
            args: Of the call.
            kwargs: Of the call.
            output: What it returned.
        """
        self._within = False
        tensors = {"inputs": list(_tensors([*args, *kwargs.values()])), "outputs": list(_tensors(output))}
        codes = self._codes(tensors["outputs"])
        if self.layout is None and self._tries < _TRIES and self._before is not None:
            self._tries += 1
            self.layout = self._settled(tensors, codes)
            self._searches = codes is None and self.layout is not None
        if self.layout is None:
            return Call(_masked(codes, kwargs.get("mask")) if codes is not None else torch.zeros(0, dtype=torch.int64))
        latents = self._rows(tensors, self.layout)
        if codes is None:
            assert self._before is not None
            codes = nearest(latents.float(), Codebook(self._before, self.layout.metric), wait=False)
        codes = _masked(codes, kwargs.get("mask"))
        if len(latents) != len(codes):
            return Call(codes)
        if len(codes) <= SAMPLE:
            return Call(codes, latents.float(), codes)
        at = sent(torch.randint(len(codes), (min(self._most, len(codes)),), generator=self._random), codes.device)
        return Call(codes, latents.index_select(0, at).float(), codes.index_select(0, at))

    def _codes(self, outputs: Sequence[Tensor]) -> Tensor | None:
        """(n,) int64: integers of the output, else lookups in the embedding, else what is one-hot in the output."""
        integers = [tensor for tensor in outputs if not tensor.is_floating_point() and tensor.dtype != torch.bool]
        if integers:
            return max(integers, key=Tensor.numel).detach().flatten().long()
        if self._lookups:
            return torch.cat([indices.flatten() for indices in self._lookups]).long()
        if self._one_hot is None:  # looking costs a wait for the device
            size = self.quantizer.book.size
            self._one_hot = [i for i, tensor in enumerate(outputs) if _is_one_hot(tensor, size)]
        return outputs[self._one_hot[0]].detach().flatten(0, -2).argmax(1) if self._one_hot else None

    def _settled(self, tensors: Mapping[str, Sequence[Tensor]], codes: Tensor | None) -> Layout | None:
        """The layout by which the nearest codes are those of the call, or make its output where it returns none."""
        assert self._before is not None
        for layout in self._candidates(tensors, self._before.shape[1], None if codes is None else len(codes)):
            head = self._rows(tensors, layout)[:_ROWS].float()
            for vectors in (self._before, self.quantizer.codes()):
                codebook = Codebook(vectors, layout.metric)
                own = nearest(head, codebook)
                if _is_copy(head, codebook.emitted[own]):  # the quantized vectors, not the latents
                    continue
                agree = self._makes(tensors, layout, codebook.emitted[own]) if codes is None else own == codes[:_ROWS]
                if float(agree.float().mean()) >= _AGREE:
                    return layout
        return None

    def _candidates(self, tensors: Mapping[str, Sequence[Tensor]], dim: int, positions: int | None) -> Iterator[Layout]:
        for among in ("inputs", "outputs") if positions is not None else ("inputs",):
            for index, tensor in enumerate(tensors[among]):
                if not tensor.is_floating_point() or tensor.ndim < 2 or not tensor.numel():
                    continue
                if positions is not None and tensor.numel() != positions * dim:
                    continue
                axes = dict.fromkeys([1, tensor.ndim - 1, *range(tensor.ndim)])
                for axis in (axis for axis in axes if tensor.shape[axis] == dim):
                    for metric in self._metrics():
                        yield Layout(among, index, axis, metric)

    def _metrics(self) -> list[Metric]:
        """In the order in which they are tried. Among codes of unit length, all choose alike, and they keep it."""
        assert self._before is not None
        if bool(((self._before.norm(dim=1) - 1).abs() < 1e-4).all()):
            return [COSINE_UNIT]
        return [COSINE, EUCLIDEAN, DOT] if self.quantizer.book.search == "cosine" else [EUCLIDEAN, COSINE, DOT]

    @staticmethod
    def _rows(tensors: Mapping[str, Sequence[Tensor]], layout: Layout) -> Tensor:
        tensor = tensors[layout.among][layout.index].detach()
        return tensor.movedim(layout.axis, -1).flatten(0, -2)

    def _makes(self, tensors: Mapping[str, Sequence[Tensor]], layout: Layout, emitted: Tensor) -> Tensor:
        """(n,) bool: whether an output of the shape of the latents is made of these codes."""
        shape = tensors["inputs"][layout.index].shape
        for index, tensor in enumerate(tensors["outputs"]):
            if tensor.shape == shape and tensor.is_floating_point():
                rows = self._rows(tensors, Layout("outputs", index, layout.axis, layout.metric))[:_ROWS].float()
                close: Tensor = (rows - emitted).norm(dim=1) <= 1e-3 * emitted.norm(dim=1) + 1e-6
                return close
        return torch.zeros(1, dtype=torch.bool)


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inside in value.values():
            yield from _tensors(inside)
    elif isinstance(value, tuple | list):
        for inside in value:
            yield from _tensors(inside)


def _is_copy(rows: Tensor, codes: Tensor) -> bool:
    return bool(((rows - codes).norm(dim=1) <= 1e-5 * codes.norm(dim=1)).all())


def _is_one_hot(tensor: Tensor, size: int) -> bool:
    if tensor.ndim < 2 or tensor.shape[-1] != size:
        return False
    rows = tensor.detach().flatten(0, -2)
    return bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(1) == 1).all())


def _masked(codes: Tensor, mask: object) -> Tensor:
    """Codes (n,), -1 where a `mask` (batch, positions) of the call is off; heads lie between batch and positions."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2 or len(codes) % mask.numel():
        return codes
    heads = len(codes) // mask.numel()
    on = mask[:, None, :].expand(-1, heads, -1).flatten()
    return torch.where(on, codes, -1)
