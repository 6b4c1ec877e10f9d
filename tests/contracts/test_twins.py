"""Every metric, the codes in training, and the rotation trick, against independent implementations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from places import BENCHMARKS, TRUST
from vector_quantize_pytorch import VectorQuantize

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook
from codebook_tools.models.model import Model
from codebook_tools.training.codebook_ema import DECAY, CodebookEMA

sys.path += [str(BENCHMARKS), str(TRUST)]
twins, variants = import_module("twins"), import_module("variants")


@pytest.mark.parametrize("name", twins.TWINS)
def test_a_metric_is_its_twin(name: str) -> None:
    widest = twins.Widest()
    for ours, theirs in twins.draws(name, 25, seed=1):
        widest.see(ours, theirs)
    assert widest.difference <= twins.LIMIT, widest.values


def test_the_codes_move_as_vector_quantize_pytorchs_step_by_step(line: Callable[..., Model]) -> None:
    """Its average of hits begins where the calibration's counts are, as ours does; its smoothing is as good as off."""
    drawn = torch.Generator().manual_seed(0)
    codes, hits = torch.randn(16, 4, generator=drawn), torch.randint(1, 100, (16,), generator=drawn)
    model = line([0.0, 1.0])
    model.books[0].vectors = codes.clone()
    ours = CodebookEMA(model, 0, hits, moves=True, random=torch.Generator())
    library = VectorQuantize(4, codebook_size=16, decay=DECAY, eps=1e-20, threshold_ema_dead_code=0).train()
    theirs, shares = library._codebook, hits.float() / hits.sum()
    theirs.embed.data = codes[None].clone()
    theirs.cluster_size.data = 256 * shares[None]
    theirs.embed_avg.data = 256 * (codes * shares[:, None])[None]
    for step in range(40):
        batch = torch.randn(256, 4, generator=drawn) * 1.01**step
        chosen = nearest(batch, Codebook(model.books[0].vectors))
        _, their_chosen, _ = library(batch[None])
        assert torch.equal(chosen, their_chosen.flatten())
        ours.update(batch, chosen, revive=False)
        torch.testing.assert_close(model.books[0].vectors, theirs.embed[0], rtol=1e-5, atol=1e-6)


def test_the_rotation_trick_is_its_published_formula() -> None:
    """Fifty et al. 2024, equation 4: R = I - 2 r r' + 2 q e', with e and q of unit length and r that of their sum; the
    gradient of (|q| / |e|) R e in e, R and the lengths held fast."""
    drawn = torch.Generator().manual_seed(0)
    latents = torch.randn(50, 6, generator=drawn, dtype=torch.float64).requires_grad_()
    quantised, gradient = torch.randn(2, 50, 6, generator=drawn, dtype=torch.float64)
    variants.rotation(latents, quantised).backward(gradient)
    for e, q, g, found in zip(latents.detach(), quantised, gradient, latents.grad, strict=True):
        first, second = e / e.norm(), q / q.norm()
        r = (first + second) / (first + second).norm()
        turn = torch.eye(6, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(second, first)
        torch.testing.assert_close(turn @ e * q.norm() / e.norm(), q)
        torch.testing.assert_close(found, q.norm() / e.norm() * turn.T @ g)
