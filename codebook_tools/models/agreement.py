"""A model's own quantizer compared with ours on the same latents: codes chosen and vectors emitted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from codebook_tools.clustering.metric import unit
from codebook_tools.codebook import Codebook
from codebook_tools.errors import CodebookError
from codebook_tools.models.evidence import FLAG
from codebook_tools.models.model import Model
from codebook_tools.models.stored_codes import owned_keys
from codebook_tools.runtime.devices import wide

LEAST = 4096
"""Latents, at least, on which the two are compared."""

_RELATIVE = 1e-5  # by which two distances may differ for either code to be the nearest
_CLAMPED = 1e-8  # squared distance, up to which vector-quantize-pytorch takes all codes for equally near
_ROUNDING = 8 * torch.finfo(torch.float32).eps  # of |z|^2 and |c|^2, of which many quantizers subtract one from another


@dataclass(frozen=True)
class Agreement:
    """How far a network's own quantizer and ours agree.

    Attributes:
        agree: Codes that are equal.
        of: Codes compared.
        near_ties: Codes that differ where both are equally near, up to rounding.
        apart: The largest difference between quantized vectors, relative to the largest entry.
        reason: Why they disagree; None where they agree.
    """

    agree: int
    of: int
    near_ties: int
    apart: float
    reason: str | None = None

    @property
    def ok(self) -> bool:
        """Whether they agree."""
        return self.reason is None


def has_quantizer(network: object) -> bool:
    """Whether a network has a method `quantize`; a layer of that name does not count."""
    own = getattr(network, "quantize", None)
    return callable(own) and not isinstance(own, nn.Module)


def agreement(model: Model, encoded: Iterable[Any]) -> Agreement:
    """Compare the quantizer of a model's network with our search and our codes.

    Args:
        model: With the codebooks that its network has loaded.
        encoded: What the network's `encode` returned, batch by batch.

    Raises:
        CodebookError: The network's `quantize` fails, or returns something else than quantized vectors and codes.
    """
    agree = of = near_ties = 0
    apart = 0.0
    reason: str | None = None
    with torch.no_grad(), _at_rest(model):
        for batch in encoded:
            quantized, codes = _own(model.network, batch)
            comparison = _Comparison(model, codes)
            ours = model.walk(batch, comparison)
            comparison.check_all_used()
            agree, of, near_ties = agree + comparison.agree, of + comparison.of, near_ties + comparison.near_ties
            apart = max(apart, _apart(ours, quantized))
            reason = reason or comparison.reason
    if reason is None and not apart <= _RELATIVE:
        reason = f"its quantized vectors differ from the codes by {apart:.2g} of the longest entry"
    return Agreement(agree, of, near_ties, apart, reason)


class _Comparison:
    """A pass through a model's stages with the codes of its own quantizer, each compared with ours."""

    def __init__(self, model: Model, codes: Tensor) -> None:
        self.model, self.codes, self.stage = model, codes, 0
        self.agree = self.of = self.near_ties = 0
        self.reason: str | None = None
        self.noise = 0.0  # length of the rounding error of a later stage's latent, left by the subtractions before it

    def __call__(self, book: int, latents: Tensor) -> Tensor:
        """latents (n, dim, *grid) -> our vectors for the codes of the model's own quantizer, of the same shape."""
        own = self._codes_of_stage(latents)
        codebook = self.model.books[book].codebook
        ours = self.model.assign(latents, book)
        self.of += ours.numel()
        differing = ours != own
        self.agree += ours.numel() - int(differing.sum())
        if bool(differing.any()):
            rows = latents.movedim(1, -1)[differing]
            ties = near_ties(rows, codebook, ours[differing], own[differing], self.noise)
            self.near_ties += int(ties.sum())
            if not bool(ties.all()) and self.reason is None:
                key, other = self.model.books[book].key, int((~ties).sum())
                self.reason = f"it chooses other codes of {key} for {other:,} of {ours.numel():,} latents"
        if self.stage == 1 and latents.numel():
            longest = latents.movedim(1, -1).norm(dim=-1).max() + codebook.vectors.norm(dim=1).max()
            self.noise = _ROUNDING * float(longest)
        return self.model.embed(own, book)

    def _codes_of_stage(self, latents: Tensor) -> Tensor:
        """The own quantizer's codes of the current stage, (n, *grid) int64."""
        shape, stages = (len(latents), *latents.shape[2:]), len(self.model.route)
        codes = self.codes if stages == 1 and self.codes.shape == shape else None
        if codes is None:
            if self.codes.ndim < 2 or self.codes.shape[1] != stages:
                raise CodebookError(
                    f"the network's quantize returns codes {tuple(self.codes.shape)}; expected "
                    f"{shape if stages == 1 else (shape[0], stages, *shape[1:])}"
                )
            codes = self.codes[:, self.stage]
        if codes.shape != shape:
            raise CodebookError(f"the network's quantize returns codes {tuple(codes.shape)} a stage; expected {shape}")
        size = len(self.model.books[self.model.route[self.stage]].vectors)
        if bool(((codes < 0) | (codes >= size)).any()):
            self.reason = self.reason or f"it chooses codes from {int(codes.min())} to {int(codes.max())} of {size}"
            codes = codes.clamp(0, size - 1)
        self.stage += 1
        return codes

    def check_all_used(self) -> None:
        assert self.stage == len(self.model.route), (self.stage, self.model.route)


def _own(network: Any, encoded: Any) -> tuple[Any, Tensor]:
    try:
        returned = network.quantize(encoded)
    except CodebookError:
        raise
    except Exception as error:  # the user's code, or a library's
        raise CodebookError(f"the network's quantize fails: {type(error).__name__}: {error}") from error
    if not isinstance(returned, tuple) or len(returned) < 2 or not isinstance(returned[1], Tensor):
        raise CodebookError("the network's quantize returns no pair of quantized latents and codes")
    quantized, codes = returned[:2]
    if codes.is_floating_point():
        raise CodebookError(f"the network's quantize returns codes of {codes.dtype}; expected int64")
    return quantized, codes.long()


def near_ties(
    latents: Tensor, codebook: Codebook, ours: Tensor, own: Tensor, noise: float = 0.0, relative: float = _RELATIVE
) -> Tensor:
    """Whether two codes are equally near to a latent, up to rounding.

    Args:
        latents: (n, dim).
        codebook: That both codes are of.
        ours: (n,) int64 codes.
        own: (n,) int64 codes of the model's own quantizer.
        noise: Length of the rounding error that a latent may have.
        relative: By which the two distances may differ.

    Returns:
        (n,) bool.
    """
    metric = codebook.metric
    rows, codes = wide(latents), metric.prepare(wide(codebook.vectors))
    ours, own = ours.to(rows.device), own.to(rows.device)
    blurred = torch.full_like(rows[:, 0], noise)
    if metric.by_direction or not metric.is_distance:
        blurred = blurred / rows.norm(dim=1).clamp(min=1e-30)
    rows = metric.prepare(rows) if metric.is_distance else unit(rows)
    one, other = codes[ours], codes[own]
    blurred = 2 * blurred * (one - other).norm(dim=1)
    lengths = rows.square().sum(1) + torch.maximum(one.square().sum(1), other.square().sum(1))
    if not metric.is_distance:
        near: Tensor = (rows * (one - other)).sum(1).abs() <= relative * lengths + blurred
        return near
    distances = [(rows - code).square().sum(1) for code in (one, other)]
    allowed = relative * torch.maximum(*distances) + _ROUNDING * lengths + blurred
    farther = torch.maximum(*distances)
    tied: Tensor = ((distances[0] - distances[1]).abs() <= allowed) | (farther <= _CLAMPED)
    return tied


def _apart(ours: object, quantized: object) -> float:
    """The largest difference between what `walk` and `quantize` returned, relative to the largest entry."""
    pairs = list(zip(_tensors(ours), _tensors(quantized), strict=False))
    if not pairs or any(one.shape != other.shape for one, other in pairs):
        got = [tuple(tensor.shape) for tensor in _tensors(quantized)]
        raise CodebookError(f"the network's quantize returns {got}; expected {[tuple(one.shape) for one, _ in pairs]}")
    longest = max(float(one.abs().max()) for one, _ in pairs)
    return max(float((one.float() - other.float()).abs().max()) for one, other in pairs) / max(longest, 1e-30)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for inside in value:
            yield from _tensors(inside)


@contextmanager
def _at_rest(model: Model) -> Iterator[None]:
    """Mark codebooks as initialized, and restore their state afterwards: some libraries update it in each call."""
    owned = {key for book in model.books for key in owned_keys(model.checkpoint, book.stored)}
    state = {name: tensor for name, tensor in model.network.state_dict().items() if model.keys.get(name) in owned}
    before = {name: tensor.clone() for name, tensor in state.items()}
    try:
        with torch.no_grad():
            for name, tensor in state.items():
                if FLAG.search(name):
                    tensor.fill_(1)
        yield
    finally:
        model.network.load_state_dict(before, strict=False)


def encoded_batches(model: Model, media: Sequence[Tensor]) -> list[Any]:
    """Encode calibration data until there are LEAST latents, and draw as many between those and the codes.

    A collapsed model's own latents lie near few of its codes; those drawn in between lie near all of them.

    Args:
        model: Whose network encodes.
        media: Batches of calibration data.

    Returns:
        What `encode` returns, batch by batch; the drawn latents only where that is latents of the first codebook.
    """
    batches, count = list[Any](), 0
    with torch.no_grad():
        for batch in media:
            encoded = model.encode_media(batch)
            batches.append(encoded)
            count += _positions(encoded, model.books[model.route[0]].vectors.shape[1])
            if count >= LEAST:
                break
    if not batches or not isinstance(batches[0], Tensor):
        return batches
    first, stage = model.books[model.route[0]].vectors, model.route[0]
    try:
        axis = model.axis_of(batches[0], stage)
    except CodebookError:  # the walk projects it first
        return batches
    drawn, between = 0, list[Any]()
    random = torch.Generator().manual_seed(0)
    while drawn < LEAST:
        for batch in batches:
            latents = batch.movedim(axis, 1)
            share = torch.rand(len(latents), 1, *latents.shape[2:], generator=random).to(latents.device)
            at = torch.randint(len(first), (len(latents), *latents.shape[2:]), generator=random).to(first.device)
            mixed = share * latents + (1 - share) * first[at].movedim(-1, 1).to(latents.dtype)
            between.append(mixed.movedim(1, axis))
            drawn += at.numel()
            if drawn >= LEAST:
                break
    return batches + between


def _positions(encoded: object, dim: int) -> int:
    tensor = next(_tensors(encoded), None)
    if tensor is None:
        return 0
    return tensor.numel() // max(1, dim if dim in tensor.shape[1:] or tensor.ndim < 2 else tensor.shape[1])


def in_training(network: nn.Module) -> bool:
    """Whether a network has a forward, or a quantizer, to run in training mode."""
    return has_quantizer(network) or type(network).forward is not nn.Module.forward
