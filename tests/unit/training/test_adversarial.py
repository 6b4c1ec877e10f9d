"""The discriminator and its loss for the decoder: by hand, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Grey, same
from torch import Tensor, nn
from torch.nn import functional

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.models.load import load_model
from codebook_tools.training.losses.adversarial import SHARE, SMALLEST, Adversary, Discriminator, hinge, last_layer
from codebook_tools.training.parameters import set_trainable

IMAGES = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BLURRED = functional.avg_pool2d(IMAGES, 3, 1, 1)


def adversary(seed: int = 0) -> Adversary:
    return Adversary(Discriminator(3, 16, seed), nn.Parameter(torch.ones(2, 2)))


@pytest.mark.parametrize(("side", "patches"), [(8, 2), (16, 2), (64, 6), (256, 30)])
def test_patches_are_those_of_the_paper_and_smaller_ones_in_small_images(side: int, patches: int) -> None:
    """256 pixels give 30 x 30 patches of 70 pixels, as Isola et al. have it; small images need smaller patches."""
    discriminator = Discriminator(1, side, seed=0)
    assert discriminator(torch.rand(1, 1, side, side)).shape == (1, 1, patches, patches)
    if side == 256:
        field = 1
        for layer in reversed([layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]):
            field = (field - 1) * layer.stride[0] + layer.kernel_size[0]
        assert field == 70


def test_images_without_a_patch_are_refused() -> None:
    with pytest.raises(CodebookError, match="7 pixels a side are too few; it takes 8 or more"):
        Discriminator(3, SMALLEST - 1, seed=0)


def test_logits_of_an_image_are_alike_in_any_batch_and_weights_come_of_the_seed() -> None:
    ours, again, other = (Discriminator(3, 16, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(ours(IMAGES)[3:5], ours(IMAGES[3:5]))
    assert torch.equal(ours(IMAGES), again(IMAGES)) and not torch.allclose(ours(IMAGES), other(IMAGES))


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
    assert ours.discriminator(IMAGES).mean().item() > 0 > ours.discriminator(BLURRED).mean().item()


def test_batches_of_a_step_are_learnt_from_together() -> None:
    whole, parts = adversary(), adversary()
    whole.watch(IMAGES, BLURRED)
    for part in (slice(0, 5), slice(5, 12)):
        parts.watch(IMAGES[part], BLURRED[part])
    assert whole.learn().item() == pytest.approx(parts.learn().item(), rel=1e-5)
    for one, other in zip(whole.discriminator.parameters(), parts.discriminator.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-5)


def test_the_weight_by_hand() -> None:
    """Gradients at the layer (1, 1; 1, 1): of length 6 for the error, of 2 for the adversarial loss."""
    ours = adversary()
    error, loss = 3 * ours.layer.sum(), ours.layer.sum()
    weights = [ours.weight(error, factor * loss, 5).item() for factor in (1, 1000, 0)]
    assert weights == pytest.approx([SHARE * 6 / 2, SHARE * 6 / 2000, SHARE * 1e4])  # and never without limit


def test_the_term_has_a_gradient_of_a_share_of_the_errors() -> None:
    ours = adversary()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = nn.Conv2d(3, 3, 3, padding=1)
    ours.layer = decoder.weight
    for unit in (1e-3, 1e3):
        reconstruction = decoder(IMAGES)
        error = unit * functional.mse_loss(reconstruction, IMAGES)
        term = ours.term(reconstruction, error)
        lengths = [torch.autograd.grad(of, ours.layer, retain_graph=True)[0].norm().item() for of in (error, term)]
        assert lengths[1] == pytest.approx(SHARE * lengths[0], rel=1e-3)
    assert all(parameter.grad is None for parameter in ours.discriminator.parameters())


def test_it_goes_on_from_its_state_to_the_last_bit() -> None:
    unbroken, second = adversary(), adversary(seed=5)
    for step in range(6):
        if step == 3:
            second.load({name: tensor.clone() for name, tensor in unbroken.state().items()})
        for one in (unbroken, second)[: 1 + (step >= 3)]:
            one.watch(IMAGES, BLURRED)
            one.learn()
    assert second.steps == 6 and all(same(tensor, second.state()[name]) for name, tensor in unbroken.state().items())


def test_the_last_layer_is_found_by_the_graph(write_model: Callable[..., Path], image_tensor: Tensor) -> None:
    model = load_model(read_checkpoint(write_model("plain")))
    set_trainable(model, {name for name, _ in model.network.named_parameters()})
    parameters = dict(model.network.named_parameters())
    assert last_layer(model, image_tensor[:1]) is parameters["_decoder._conv_trans_2.weight"]


def test_without_weights_to_train_there_is_none(grey: Callable[..., Grey]) -> None:
    made = grey([0.0, 1.0])
    model = load_model(read_checkpoint(made.path), network=made.network)
    with pytest.raises(CodebookError, match="leave it out"):
        last_layer(model, torch.rand(1, 1, 8, 8))
