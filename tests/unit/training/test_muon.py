"""Muon: updates of equal length in all directions, by hand, by SVD, and beside torch's own for matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from codebook_tools.training.learning_rate import muon_rms
from codebook_tools.training.muon import MOMENTUM, Muon, nearly_orthogonal
from codebook_tools.training.optimizers import kernels_of, optimizers_of

RMS = 0.3
SHAPES = [(4, 4), (3, 50), (50, 3), (64, 256), (2, 2), (128, 27)]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def moved(gradients: list[Tensor], lr: float = 0.1) -> list[Tensor]:
    """The updates of a kernel that starts at 0 and gets these gradients."""
    kernel, updates = nn.Parameter(torch.zeros_like(gradients[0])), list[Tensor]()
    optimizer = Muon([{"params": [kernel], "lr": lr}], RMS)
    for gradient in gradients:
        before, kernel.grad = kernel.detach().clone(), gradient
        optimizer.step()
        updates.append(kernel.detach() - before)
    return updates


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape: tuple[int, int], scale: float) -> None:
    matrix = drawn(*shape)
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    inside = left.T @ nearly_orthogonal(matrix * scale).double() @ right.T
    values = inside.diagonal()
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25
    torch.testing.assert_close(inside, values.diag(), atol=2e-3, rtol=0)


def test_the_iteration_on_the_gram_matrix_is_that_on_the_matrix() -> None:
    matrix = drawn(20, 90)
    by_gram = nearly_orthogonal(matrix)
    exact = matrix.double()
    exact = exact / (exact @ exact.T).norm().sqrt()
    for _ in range(5):
        gram = exact @ exact.T
        exact = 3.4445 * exact + (-4.7750 * gram + 2.0315 * gram @ gram) @ exact
    torch.testing.assert_close(by_gram.double(), exact, atol=1e-5, rtol=1e-4)


def test_what_has_no_direction_stays_and_a_lost_rank_stays_lost() -> None:
    assert not nearly_orthogonal(torch.zeros(5, 9)).any()
    flat = nearly_orthogonal(drawn(30, 1) @ drawn(1, 40))
    values = torch.linalg.svdvals(flat)
    assert 0.6 < float(values[0]) < 1.25 and float(values[1]) < 1e-2


def test_the_first_update_of_a_diagonal_by_hand() -> None:
    """A diagonal keeps its signs and gets entries of one length: lr * RMS * sqrt(2), against the gradient."""
    (update,) = moved([torch.tensor([[3.0, 0.0], [0.0, -0.5]])], lr=0.01)
    assert not update[0, 1] and not update[1, 0]
    lengths = update.diagonal() / (0.01 * RMS * 2**0.5)
    assert -1.25 < float(lengths[0]) < -0.6 and 0.6 < float(lengths[1]) < 1.25


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (64, 2, 3, 3), (6, 40), (40, 6), (12, 5, 7)], ids=str)
def test_the_root_mean_square_of_an_update_is_declared(shape: tuple[int, ...]) -> None:
    (update,) = moved([drawn(*shape)])
    assert 0.7 < float(update.square().mean().sqrt()) / (0.1 * RMS) < 1.25


def test_neither_the_scale_of_gradients_nor_an_orthogonal_change_of_basis_matters() -> None:
    gradients = [drawn(8, 30), drawn(8, 31)[:, 1:], drawn(8, 32)[:, 2:]]
    plain = torch.stack(moved(gradients))
    torch.testing.assert_close(torch.stack(moved([1e6 * gradient for gradient in gradients])), plain)
    turn = torch.linalg.qr(drawn(8, 8))[0]
    turned = torch.stack(moved([turn @ gradient for gradient in gradients]))
    torch.testing.assert_close(turned, turn @ plain, atol=1e-5, rtol=1e-3)


def test_momentum_carries_on() -> None:
    """Nesterov's momentum after gradients A and 0: MOMENTUM ** 2 * (1 - MOMENTUM) of A, which points as A does."""
    first, second = moved([drawn(4, 6), torch.zeros(4, 6)])
    torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-3)
    assert 0 < MOMENTUM < 1


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_torch_goes_the_same_way() -> None:
    gradients = [drawn(24, 60 + i)[:, :60] for i in range(6)]
    kernel = nn.Parameter(torch.zeros(24, 60))
    theirs = torch.optim.Muon([kernel], lr=0.1, weight_decay=0.0, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        kernel.grad = gradient
        theirs.step()
    ours = torch.stack(moved(gradients)).sum(0)
    assert float(torch.cosine_similarity(ours.flatten(), kernel.detach().flatten(), 0)) > 0.98
    assert float(ours.norm() / kernel.detach().norm()) == pytest.approx(RMS / 0.2, rel=0.15)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.words = nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Embedding(5, 8)
        self.depth = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 6, 3))
        self.place, self.last = nn.Parameter(drawn(1, 7, 8)), nn.Linear(6, 1)


def test_muon_moves_kernels_and_adam_the_rest() -> None:
    layers, codes = Layers(), nn.Parameter(drawn(16, 4))
    named = {**dict(layers.named_parameters()), "codes": codes}
    made = optimizers_of([*named.values()], kernels_of(layers), 10)
    names = {id(parameter): name for name, parameter in named.items()}
    sets = {name: {names[id(p)] for group in of.param_groups for p in group["params"]} for name, of in made.items()}
    assert sets["muon"] == {"conv.weight", "depth.parametrizations.weight.original1"}  # not the gains, of one column
    assert sets["adam"] == set(named) - sets["muon"] and "codes" in sets["adam"]
    assert set(optimizers_of([layers.conv.weight], [], 10)) == {"adam"} and not optimizers_of([], [codes], 10)


def test_longer_runs_have_smaller_updates() -> None:
    """3 over steps to the power 0.4, at most 0.3."""
    assert [muon_rms(steps) for steps in (1, 100, 1024, 32768)] == pytest.approx([0.3, 0.3, 3 / 16, 3 / 64])
