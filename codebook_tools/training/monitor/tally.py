"""Counts of codes and moments of latents, added up on their device, and the figures of an epoch."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

from codebook_tools.evaluation import metrics
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import wide, wide_device
from codebook_tools.training.monitor.reading import SAMPLE, Call


class Figures(TypedDict, total=False):
    """Figures of one codebook since the last epoch, over all processes.

    Attributes:
        used: Codes with at least one assignment.
        dead: Codes with none.
        usage: Share of codes with at least one assignment, 0 to 1.
        perplexity: exp of the entropy, in nats, of counts / total.
        effective_dimension: Participation ratio of the latents' covariance; None where the latents are unknown, NaN
            where some were not finite.
        revived: Codes that were moved to latents; only of a monitor that revives.
    """

    used: int
    dead: int
    usage: float
    perplexity: float
    effective_dimension: float | None
    revived: int


class Tally:
    """Sums over the calls of one quantizer.

    Attributes:
        counts: (size,) int64, assignments per code since the beginning.
    """

    def __init__(self, size: int) -> None:
        self.counts = torch.zeros(size, dtype=torch.int64)
        self._begun_at = self.counts.clone()
        self._moments: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def add(self, call: Call) -> None:
        """Add a call, without making the host wait for a GPU."""
        codes = call.codes
        if codes.device != self.counts.device:  # the module may be moved after the monitor was made
            self.counts, self._begun_at = self.counts.to(codes.device), self._begun_at.to(codes.device)
        size = len(self.counts)  # a code beyond it stands for padding, as a negative one does
        self.counts.index_add_(0, codes.clamp(0, size - 1), ((codes >= 0) & (codes < size)).long())
        if call.latents is None or call.codes_of_latents is None or not len(call.latents):
            return
        rows = call.latents[:SAMPLE]
        valid = (call.codes_of_latents[:SAMPLE] >= 0).to(rows.device)
        if self._moments is None:
            # Differences from a latent of about their mean lose no digits where that is far from 0.
            shift = rows.mean(0)
            of_rows = shift.new_zeros(len(shift), dtype=torch.float64, device=wide_device(shift.device))
            self._moments = shift, of_rows[:1].clone(), of_rows.clone(), of_rows.new_zeros(len(shift), len(shift))
        shift, n, sums, products = self._moments
        with torch.autocast(rows.device.type, enabled=False):
            centered = torch.where(valid[:, None], rows - shift, 0)
            n += wide(valid.sum()).to(n.device)
            sums += wide(centered.sum(0))
            products += wide(centered.T @ centered)

    def figures(self) -> Figures:
        """Figures since the last epoch, over all processes, which all call this; begins a new epoch."""
        counts = distributed.summed(self.counts - self._begun_at).cpu()
        dimension = self._effective_dimension()
        self._begun_at.copy_(self.counts)
        self._moments = None
        used = metrics.used(counts)
        return Figures(
            used=used,
            dead=len(counts) - used,
            usage=metrics.usage(counts),
            perplexity=metrics.perplexity(counts),
            effective_dimension=dimension,
        )

    def _effective_dimension(self) -> float | None:
        known = max(distributed.each(0 if self._moments is None else len(self._moments[0])))
        if not known:
            return None
        n, sums, products = torch.zeros(1), torch.zeros(known), torch.zeros(known, known)
        n, sums, products = (zeros.double() for zeros in (n, sums, products))
        if self._moments is not None:  # from differences back to moments about 0, in float64
            shift, n, sums, products = (wide(part).cpu() for part in self._moments)
            products = products + torch.outer(sums, shift) + torch.outer(shift, sums) + n * torch.outer(shift, shift)
            sums = sums + n * shift
        n, sums, products = (distributed.summed(part) for part in (n, sums, products))
        if not float(n):
            return None
        if not bool(products.isfinite().all()):
            return math.nan
        return metrics.participation_ratio(metrics.covariance_of_moments(sums, products, int(n)))
