"""The discriminator and what a decoder hears of it: by hand, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Grey
from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.load import load_model
from codebook_tools.training.losses.adversarial import SHARE, SMALLEST, Adversary, Discriminator, hinge, last_layer
from codebook_tools.training.parameters import set_trainable

RANDOM = torch.Generator().manual_seed(0)
IMAGES = torch.rand(12, 3, 16, 16, generator=RANDOM)
BLURRED = functional.avg_pool2d(IMAGES, 3, 1, 1)


def adversary(seed: int = 0) -> Adversary:
    return Adversary(Discriminator(3, 16, seed), nn.Parameter(torch.ones(2, 2)))


@pytest.mark.parametrize(("side", "judged"), [(8, 2), (12, 4), (16, 2), (32, 2), (64, 6), (256, 30)])
def test_patches_that_are_judged_are_those_of_the_paper_and_smaller_ones_in_small_images(
    side: int, judged: int
) -> None:
    """256 pixels give 30 x 30 patches of 70 pixels, as Isola et al. have it; small images need smaller patches."""
    assert Discriminator(1, side, seed=0)(torch.rand(1, 1, side, side)).shape == (1, 1, judged, judged)


def test_a_patch_of_the_largest_discriminator_is_70_pixels() -> None:
    layers = [layer for layer in Discriminator(1, 256, seed=0).layers if isinstance(layer, nn.Conv2d)]
    field = 1
    for layer in reversed(layers):
        field = (field - 1) * layer.stride[0] + layer.kernel_size[0]
    assert field == 70


def test_images_without_a_patch_are_refused() -> None:
    with pytest.raises(CodebookError, match="7 pixels a side are too few; it takes 8 or more"):
        Discriminator(3, SMALLEST - 1, seed=0)


def test_an_image_is_judged_alike_in_any_company_and_weights_come_of_the_seed() -> None:
    ours, same, other = (Discriminator(3, 16, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(ours(IMAGES)[3:5], ours(IMAGES[3:5]))
    assert torch.equal(ours(IMAGES), same(IMAGES)) and not torch.allclose(ours(IMAGES), other(IMAGES))


def test_the_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge(real, fake).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)
    assert hinge(torch.zeros(2), torch.zeros(2)).item() == 1


def test_it_learns_to_tell_images_from_blurred_ones() -> None:
    ours = adversary()
    losses = list[float]()
    for _ in range(25):
        ours.watch(IMAGES, BLURRED)
        losses.append(ours.learn().item())
    assert losses[0] == pytest.approx(1, abs=0.15) and losses[-1] < 0.2 and ours.steps == 25
    real, fake = (ours.discriminator(of).mean().item() for of in (IMAGES, BLURRED))
    assert real > 0 > fake


def test_batches_of_a_step_are_learnt_from_together() -> None:
    whole, parts = adversary(), adversary()
    whole.watch(IMAGES, BLURRED)
    for part in (slice(0, 5), slice(5, 12)):
        parts.watch(IMAGES[part], BLURRED[part])
    assert whole.learn().item() == pytest.approx(parts.learn().item(), rel=1e-5)
    for one, other in zip(whole.discriminator.parameters(), parts.discriminator.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-5)


def test_the_weight_by_hand() -> None:
    """Gradients at the layer (1, 1; 1, 1): of length 6 for the error, of 2 for the judgement."""
    ours = adversary()
    error, judged = 3 * ours.layer.sum(), ours.layer.sum()
    assert ours.weight(error, judged, 5).item() == pytest.approx(SHARE * 6 / (2 + 1e-6))
    assert ours.weight(error, 1000 * judged, 5).item() == pytest.approx(SHARE * 6 / 2000)  # whatever its unit
    assert ours.weight(error, 0 * judged, 5).item() == pytest.approx(SHARE * 1e4)  # and never without limit


def test_what_the_decoder_hears_has_a_gradient_of_a_share_of_the_errors() -> None:
    ours = adversary()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = nn.Conv2d(3, 3, 3, padding=1)
    ours.layer = decoder.weight
    for unit in (1.0, 1e-3, 1e3):
        shown = decoder(IMAGES)
        error = unit * functional.mse_loss(shown, IMAGES)
        term = ours.term(shown, error)
        by_error, by_term = (torch.autograd.grad(of, decoder.weight, retain_graph=True)[0] for of in (error, term))
        assert by_term.norm().item() == pytest.approx(SHARE * by_error.norm().item(), rel=1e-3)
    assert all(parameter.grad is None for parameter in ours.discriminator.parameters())


def test_it_goes_on_from_its_state_to_the_last_bit() -> None:
    unbroken, second = adversary(), adversary(seed=5)
    for step in range(6):
        if step == 3:
            second.load({name: tensor.clone() for name, tensor in unbroken.state().items()})
        for one in (unbroken, second)[: 1 + (step >= 3)]:
            one.watch(IMAGES, BLURRED)
            one.learn()
    assert second.steps == unbroken.steps == 6
    theirs = second.state()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in unbroken.state().items())


# --- the last layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "name"), [("plain", "_decoder._conv_trans_2.weight")])
def test_the_last_layer_is_found_by_the_graph(
    variant: str, name: str, write_model: Callable[..., Path], image_tensor: Tensor
) -> None:
    model = load_model(read_checkpoint(write_model(variant)))
    set_trainable(model, {name for name, _ in model.network.named_parameters()})
    found = last_layer(model, image_tensor[:1])
    assert found is dict(model.network.named_parameters())[name]


def test_without_weights_to_train_there_is_none(grey: Callable[..., Grey]) -> None:
    made = grey([0.0, 1.0])
    model = load_model(read_checkpoint(made.path), network=made.network)
    with pytest.raises(CodebookError, match="leave it out"):
        last_layer(model, torch.rand(1, 1, 8, 8))
