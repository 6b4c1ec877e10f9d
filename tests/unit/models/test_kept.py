"""Encoded batches are kept while the encoder stays as it is, and not a step longer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model

Counted = tuple[Model, list[Tensor]]


@pytest.fixture
def counted(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """A model, and what its encoder was asked for."""
    model, asked = load_model(read_checkpoint(tiny)), list[Tensor]()
    encode: Callable[[Tensor], Any] = model.network.encode

    def watched(media: Tensor) -> Any:
        asked.append(media)
        return encode(media)

    monkeypatch.setattr(model.network, "encode", watched)
    return model, asked


def test_the_same_batch_is_encoded_once_and_another_anew(counted: Counted, image_tensor: Tensor) -> None:
    model, asked = counted
    with torch.no_grad():
        first = model.encode(image_tensor)
        assert torch.equal(model.encode(image_tensor.clone()), first) and len(asked) == 1
        assert torch.equal(model.pass_through(image_tensor).latents[0], first) and len(asked) == 1
        assert not torch.equal(model.encode(image_tensor.flip(0)), first) and len(asked) == 2
        model.input_range = (0.0, 1.0)
        assert not torch.equal(model.encode(image_tensor), first) and len(asked) == 3


def test_other_weights_encode_anew(counted: Counted, image_tensor: Tensor) -> None:
    model, asked = counted
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    with torch.no_grad():
        first = model.encode(image_tensor)
        model.network._encoder._conv_1.weight.mul_(1.5)
        assert not torch.equal(model.encode(image_tensor), first)
        model.network.load_state_dict(before)
        assert torch.equal(model.encode(image_tensor), first) and len(asked) == 3
        other = model.with_fresh_network(seed=1)
        assert not torch.equal(other.encode(image_tensor), first)


def test_training_is_never_served_from_what_was_kept(counted: Counted, image_tensor: Tensor) -> None:
    model, asked = counted
    with torch.no_grad():
        model.encode(image_tensor)
    model.network.requires_grad_(True)
    assert model.encode(image_tensor).requires_grad and model.encode(image_tensor).requires_grad and len(asked) == 3


def test_beyond_the_limit_nothing_more_is_kept(counted: Counted, image_tensor: Tensor) -> None:
    model, asked = counted
    model.kept.limit = 1
    with torch.no_grad():
        assert torch.equal(model.encode(image_tensor), model.encode(image_tensor)) and len(asked) == 2


def test_a_network_may_write_into_what_it_was_given(counted: Counted, image_tensor: Tensor) -> None:
    """As a residual walk does that subtracts in place."""
    model, asked = counted
    with torch.no_grad():
        first = model.encode(image_tensor).clone()
        for _ in range(3):
            again = model.encode(image_tensor)
            assert torch.equal(again, first)
            again.zero_()
    assert len(asked) == 1
