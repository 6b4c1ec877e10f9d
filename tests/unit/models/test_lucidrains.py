"""Networks around quantizers of vector-quantize-pytorch: our walk gives the library's own indices and output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from proven_networks import Coders
from torch import Tensor, nn
from torch.nn import functional
from vector_quantize_pytorch import FSQ, GroupedResidualVQ, ResidualVQ, SimVQ, VectorQuantize

from codebook_tools.checkpoints.detect import find_codebooks
from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import EUCLIDEAN
from codebook_tools.errors import CodebookError
from codebook_tools.models.networks.vector_quantize_pytorch import give_walk

DIM, SIZE = 6, 16
Make = Callable[..., nn.Module]


class Own(Coders):
    """A user's network of stride 2, its quantizer two modules deep."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, DIM, 2, 2)
        self.middle = nn.ModuleDict({"vq": quantizer})
        self.decoder = nn.ConvTranspose2d(DIM, 3, 2, 2)


def quantizer(kind: Make, **more: Any) -> Make:
    return lambda **others: kind(**{"dim": DIM, "codebook_size": SIZE} | more | others)


QUANTIZERS: dict[str, Make] = {
    "plain": quantizer(VectorQuantize),
    "projected": quantizer(VectorQuantize, codebook_dim=4),
    "normed": quantizer(VectorQuantize, codebook_dim=4, layernorm_after_project_in=True),
    "image": quantizer(VectorQuantize, codebook_dim=4, accept_image_fmap=True),
    "channel first": quantizer(VectorQuantize, channel_last=False),
    "cosine": quantizer(VectorQuantize, use_cosine_sim=True),
    "learnable": quantizer(VectorQuantize, learnable_codebook=True, ema_update=False),
    "residual": quantizer(ResidualVQ, num_quantizers=3, codebook_dim=4),
    "residual cosine": quantizer(ResidualVQ, num_quantizers=2, use_cosine_sim=True),
    "residual sizes": quantizer(ResidualVQ, codebook_size=(SIZE, 5, 9)),
    "grouped": quantizer(GroupedResidualVQ, groups=2, num_quantizers=2, codebook_dim=2),
    "grouped, no projection": quantizer(GroupedResidualVQ, groups=3, num_quantizers=2),
    "sim": quantizer(SimVQ),
    "sim channel first": quantizer(SimVQ, channel_first=True, frozen_codebook_dim=3),
}


def network(name: str, **more: Any) -> Any:
    """Its codebooks are as wide as its latents, so that many codes are in use."""
    torch.manual_seed(sum(map(ord, name)))
    made = Own(QUANTIZERS[name](**more))
    give_walk(made)
    with torch.no_grad():
        for key, tensor in made.state_dict().items():
            if key.endswith("_codebook.embed"):
                drawn = torch.randn(tensor.shape)
                tensor.copy_(functional.normalize(drawn, dim=-1) if "cosine" in name else drawn * 0.7)
    return made.eval()


class Nearest:
    """A quantize callback by brute force. indices: of each stage so far, (n, *grid)."""

    def __init__(self, network: Any) -> None:
        self.unit, self.indices = network.lookup is COSINE_UNIT, list[Tensor]()
        state, quantizer = network.state_dict(), network.middle["vq"]
        sim = isinstance(quantizer, SimVQ)
        self.codes = [quantizer.codebook if sim else state[key][0] for key in network.codebooks]

    def __call__(self, stage: int, latents: Tensor) -> Tensor:
        assert stage == len(self.indices)
        rows, codes = latents.movedim(1, -1), self.codes[stage]
        if self.unit:
            codes = functional.normalize(codes, dim=-1)
            distances = -functional.normalize(rows, dim=-1) @ codes.mT
        else:
            distances = (rows[..., None, :] - codes).square().sum(-1)
        self.indices.append(distances.argmin(-1))
        return latents + (codes[self.indices[-1]].movedim(-1, 1) - latents).detach()


def by_library(network: Any, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Its quantizer's own output (n, dim, h, w) and indices (n, h, w) by stage, whichever way it takes its latents."""
    quantizer = network.middle["vq"]
    as_image = getattr(quantizer, "accept_image_fmap", False) or getattr(quantizer, "channel_first", False)
    across = not getattr(quantizer, "channel_last", True)
    with torch.no_grad():
        rows = latents.flatten(2) if across else latents.flatten(2).mT
        out, indices, *_ = quantizer(latents if as_image else rows)
    out = out if as_image else (out if across else out.mT).unflatten(2, latents.shape[2:])
    if isinstance(quantizer, GroupedResidualVQ):  # (groups, n, positions, stages)
        indices = indices.movedim(0, -2).flatten(-2)
    elif not isinstance(quantizer, ResidualVQ):
        indices = indices[..., None]
    return out, list(indices.reshape(len(latents), *latents.shape[2:], -1).unbind(-1))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_walk_gives_the_librarys_indices_and_output_and_lets_gradients_through(name: str) -> None:
    made, images = network(name), torch.randn(4, 3, 12, 10)
    latents = made.encode(images)
    nearest = Nearest(made)
    ours = made.walk(latents, nearest)
    theirs, indices = by_library(made, latents)
    assert len(nearest.indices) == len(indices) == len(made.codebooks)
    assert all(len(stage.unique()) > 3 for stage in indices)
    assert all(torch.equal(mine, other) for mine, other in zip(nearest.indices, indices, strict=True))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert made.lookup == (COSINE_UNIT if "cosine" in name else EUCLIDEAN)

    made.train()
    before = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    made.decode(made.walk(made.encode(images), Nearest(made))).square().mean().backward()
    inside = ("_codebook.", "code_transform.")
    without = [n for n, p in made.named_parameters() if not any(part in n for part in inside) and not p.grad.any()]
    assert without == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in made.state_dict().items())
    bare = Own(QUANTIZERS[name]())
    assert type(made) is Own and list(made.state_dict()) == list(bare.state_dict())
    assert [n for n, _ in made.named_modules()] == [n for n, _ in bare.named_modules()]


def test_a_residual_stage_hands_its_gradient_on() -> None:
    """Each stage takes half of what is left: 1 - 1/8 of the latents after three, and as much of the gradient."""
    made = Own(ResidualVQ(dim=DIM, codebook_size=SIZE, num_quantizers=3))
    give_walk(made)
    walk: Any = made.walk
    latents = torch.randn(2, DIM, 3, 3, requires_grad=True)
    out = walk(latents, lambda stage, rest: rest / 2)
    out.sum().backward()
    torch.testing.assert_close(out, latents * 0.875)
    torch.testing.assert_close(latents.grad, torch.full_like(latents, 0.875))


def test_codebooks_are_named_as_the_file_names_them() -> None:
    expected = {
        "plain": ["middle.vq._codebook.embed"],
        "residual": [f"middle.vq.layers.{i}._codebook.embed" for i in range(3)],
        "grouped": [f"middle.vq.rvqs.{g}.layers.{i}._codebook.embed" for g in range(2) for i in range(2)],
        "sim": ["middle.vq.frozen_codebook"],
    }
    for name, keys in expected.items():
        made = network(name)
        detected = find_codebooks({key: tuple(tensor.shape) for key, tensor in made.state_dict().items()})
        assert list(made.codebooks) == keys == [book.key for book in detected.codebooks]


def test_a_deep_copy_walks_its_own_quantizer() -> None:
    made = network("projected")
    other = copy.deepcopy(made)
    assert other.walk.quantizer is other.middle["vq"] is not made.middle["vq"]
    nn.init.zeros_(other.middle["vq"].project_out.weight)
    latents = torch.randn(1, DIM, 2, 2)
    assert not torch.equal(other.walk(latents, Nearest(other)), made.walk(latents, Nearest(made)))


# --- what it leaves alone, and what it refuses ---------------------------------------------------------------------
class Walking(Own):
    codebooks = ("middle.vq._codebook.embed",)

    def walk(self, encoded: Tensor, quantize: Callable[[int, Tensor], Tensor]) -> Tensor:
        return quantize(0, encoded * 2)


def test_what_is_no_such_quantizer_or_has_a_walk_of_its_own_or_beams_in_training_only_is_left_alone() -> None:
    made: Any = Own(nn.Embedding(SIZE, DIM))
    give_walk(made)
    assert not hasattr(made, "walk") and not hasattr(made, "codebooks") and not hasattr(made, "lookup")
    made = Walking(VectorQuantize(dim=DIM, codebook_size=SIZE, heads=2))
    give_walk(made)
    assert made.walk(torch.ones(1), lambda stage, latents: latents + stage) == 2
    assert not hasattr(made, "lookup")
    give_walk(Own(residual(beam_size=4, eval_beam_size=1)))


plain, residual = quantizer(VectorQuantize), quantizer(ResidualVQ, num_quantizers=2)
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "heads": (lambda: plain(heads=2, separate_codebook_per_head=True),
              "VectorQuantize with a codebook for each of its heads"),
    "affine": (lambda: plain(affine_param=True), "with affine_param"),
    "affine stages": (lambda: residual(affine_param=True), "ResidualVQ with affine_param"),
    "bridge": (lambda: plain(vq_bridge=nn.Linear(DIM, DIM)), "with a vq_bridge"),
    "implicit": (lambda: residual(implicit_neural_codebook=True), "with an implicit_neural_codebook"),
    "diveq": (lambda: residual(diveq=True), "with diveq"),
    "beams": (lambda: residual(beam_size=4), "with eval_beam_size > 1"),
    "sim": (
        lambda: quantizer(SimVQ)(codebook_transform=nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU())),
        "SimVQ with a codebook_transform that is not one linear layer"),
    "no codes": (lambda: FSQ(levels=[4, 4], dim=DIM), "is FSQ, and of its library only VectorQuantize, "),
    "two": (
        lambda: nn.ModuleList([residual(), residual()]),
        r"holds 2 quantizers, middle\.vq\.0, middle\.vq\.1; give Own a `walk` and `codebooks` of its own"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_walked_is_refused_in_one_line(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(CodebookError, match=message) as refusal:
        give_walk(Own(make()))
    assert "\n" not in str(refusal.value) and "middle.vq" in str(refusal.value)


def test_a_member_in_the_way_is_named() -> None:
    made: Any = Own(residual())
    made.lookup = nn.Embedding(2, 2)
    with pytest.raises(CodebookError, match=r"`lookup` is in the way of its ResidualVQ, middle\.vq: rename it"):
        give_walk(made)
