"""Networks around quantisers of vector-quantize-pytorch: our walk gives the library's own indices and output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from vector_quantize_pytorch import FSQ, GroupedResidualVQ, ResidualVQ, SimVQ, VectorQuantize

from codebook_tools.checkpoints.detect import FoundCodebook, find_codebooks
from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import EUCLIDEAN
from codebook_tools.errors import CodebookError
from codebook_tools.models.ema_state import companion_values, companions_of
from codebook_tools.models.networks.vector_quantize_pytorch import give_walk
from codebook_tools.models.user_network import make_network

DIM, SIZE = 6, 16
Make = Callable[..., nn.Module]


class Own(nn.Module):
    """A user's network of stride 2, its quantiser two modules deep."""

    def __init__(self, quantiser: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, DIM, 2, 2)
        self.middle = nn.ModuleDict({"vq": quantiser})
        self.decoder = nn.ConvTranspose2d(DIM, 3, 2, 2)

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.encoder(images)
        return latents

    def decode(self, quantised: Tensor) -> Tensor:
        images: Tensor = self.decoder(quantised)
        return images


QUANTISERS: dict[str, Make] = {
    "plain": lambda **more: VectorQuantize(dim=DIM, codebook_size=SIZE, **more),
    "projected": lambda **more: VectorQuantize(dim=DIM, codebook_size=SIZE, codebook_dim=4, **more),
    "normed": lambda **more: VectorQuantize(
        dim=DIM, codebook_size=SIZE, codebook_dim=4, layernorm_after_project_in=True, **more
    ),
    "image": lambda **more: VectorQuantize(dim=DIM, codebook_size=SIZE, codebook_dim=4, accept_image_fmap=True, **more),
    "channel first": lambda **more: VectorQuantize(dim=DIM, codebook_size=SIZE, channel_last=False, **more),
    "cosine": lambda **more: VectorQuantize(dim=DIM, codebook_size=SIZE, use_cosine_sim=True, **more),
    "learnable": lambda **more: VectorQuantize(
        dim=DIM, codebook_size=SIZE, learnable_codebook=True, ema_update=False, **more
    ),
    "residual": lambda **more: ResidualVQ(dim=DIM, codebook_size=SIZE, num_quantizers=3, codebook_dim=4, **more),
    "residual cosine": lambda **more: ResidualVQ(
        dim=DIM, codebook_size=SIZE, num_quantizers=2, use_cosine_sim=True, **more
    ),
    "residual sizes": lambda **more: ResidualVQ(dim=DIM, codebook_size=(SIZE, 5, 9), **more),
    "grouped": lambda **more: GroupedResidualVQ(
        dim=DIM, codebook_size=SIZE, groups=2, num_quantizers=2, codebook_dim=2, **more
    ),
    "grouped, no projection": lambda **more: GroupedResidualVQ(
        dim=DIM, codebook_size=SIZE, groups=3, num_quantizers=2, **more
    ),
    "sim": lambda **_: SimVQ(dim=DIM, codebook_size=SIZE),
    "sim channel first": lambda **_: SimVQ(dim=DIM, codebook_size=SIZE, channel_first=True, frozen_codebook_dim=3),
}


def network(name: str, **more: Any) -> Any:
    """Its codebooks are as wide as its latents, so that many codes are in use."""
    torch.manual_seed(sum(map(ord, name)))
    made = Own(QUANTISERS[name](**more))
    give_walk(made)
    with torch.no_grad():
        for key, tensor in made.state_dict().items():
            if key.endswith("_codebook.embed"):
                drawn = torch.randn(tensor.shape)
                tensor.copy_(functional.normalize(drawn, dim=-1) if "cosine" in name else drawn * 0.7)
    return made.eval()


def codes_of(network: Any, stage: int) -> Tensor:
    """(size, dim): the rows that are looked up."""
    quantiser = network.middle["vq"]
    if isinstance(quantiser, SimVQ):
        return quantiser.codebook
    rows: Tensor = network.state_dict()[network.codebooks[stage]]
    return rows[0]


class Nearest:
    """A quantise callback by brute force. indices: of each stage so far, (n, *grid)."""

    def __init__(self, network: Any) -> None:
        self.network, self.indices = network, list[Tensor]()

    def __call__(self, stage: int, latents: Tensor) -> Tensor:
        assert stage == len(self.indices)
        rows, codes = latents.movedim(1, -1), codes_of(self.network, stage)
        if self.network.lookup is COSINE_UNIT:
            distances = -functional.normalize(rows, dim=-1) @ functional.normalize(codes, dim=-1).mT
        else:
            distances = (rows[..., None, :] - codes).square().sum(-1)
        self.indices.append(distances.argmin(-1))
        quantised = codes[self.indices[-1]].movedim(-1, 1)
        if self.network.lookup is COSINE_UNIT:
            quantised = functional.normalize(quantised, dim=1)
        return latents + (quantised - latents).detach()


def by_library(network: Any, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Its quantiser's own output (n, dim, h, w) and indices (n, h, w) by stage, whichever way it takes its latents."""
    quantiser = network.middle["vq"]
    height, width = latents.shape[2:]
    as_image = getattr(quantiser, "accept_image_fmap", False) or getattr(quantiser, "channel_first", False)
    last = getattr(quantiser, "channel_last", True)
    given = latents if as_image else latents.flatten(2) if not last else latents.flatten(2).mT
    with torch.no_grad():
        out, indices, *_ = quantiser(given)
    out = out if as_image else (out if not last else out.mT).unflatten(2, (height, width))
    if isinstance(quantiser, GroupedResidualVQ):  # (groups, n, positions, stages)
        indices = indices.movedim(0, -2).flatten(-2)
    elif not isinstance(quantiser, ResidualVQ):
        indices = indices[..., None]
    return out, list(indices.reshape(len(latents), height, width, -1).unbind(-1))


@pytest.mark.parametrize("name", QUANTISERS)
def test_a_walk_gives_the_librarys_indices_and_output(name: str) -> None:
    made, images = network(name), torch.randn(4, 3, 12, 10)
    latents = made.encode(images)
    nearest = Nearest(made)
    ours = made.walk(latents, nearest)
    theirs, indices = by_library(made, latents)
    assert len(nearest.indices) == len(indices) == len(made.codebooks)
    assert all(len(stage.unique()) > 3 for stage in indices)
    assert all(torch.equal(mine, its) for mine, its in zip(nearest.indices, indices, strict=True))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert made.decode(ours).shape == images.shape


@pytest.mark.parametrize("name", QUANTISERS)
def test_gradients_reach_whatever_lies_around_the_codes(name: str) -> None:
    made = network(name).train()
    before = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    made.decode(made.walk(made.encode(torch.randn(2, 3, 8, 8)), Nearest(made))).square().mean().backward()
    inside = ("_codebook.", "code_transform.")
    without = [n for n, p in made.named_parameters() if not any(part in n for part in inside) and not p.grad.any()]
    assert without == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in made.state_dict().items())


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
    stages = [f"middle.vq.layers.{i}._codebook.embed" for i in range(3)]
    groups = [f"middle.vq.rvqs.{g}.layers.{i}._codebook.embed" for g in range(2) for i in range(2)]
    expected = {
        "plain": ["middle.vq._codebook.embed"],
        "residual": stages,
        "grouped": groups,
        "sim": ["middle.vq.frozen_codebook"],
    }
    for name, keys in expected.items():
        made = network(name)
        detected = find_codebooks({key: tuple(tensor.shape) for key, tensor in made.state_dict().items()})
        assert list(made.codebooks) == keys == [found.key for found in detected.codebooks]


@pytest.mark.parametrize("name", QUANTISERS)
def test_the_network_keeps_its_own_names_and_class(name: str) -> None:
    made = network(name)
    bare = Own(QUANTISERS[name]())
    assert type(made) is Own
    assert list(made.state_dict()) == list(bare.state_dict())
    assert [n for n, _ in made.named_modules()] == [n for n, _ in bare.named_modules()]


def test_cosine_is_told_from_the_codebooks_class() -> None:
    metrics = {name: network(name).lookup for name in QUANTISERS}
    cosine = {name for name, metric in metrics.items() if metric == COSINE_UNIT}
    assert cosine == {"cosine", "residual cosine"}
    assert {metric for name, metric in metrics.items() if name not in cosine} == {EUCLIDEAN}


def test_a_deep_copy_walks_its_own_quantiser() -> None:
    made = network("projected")
    other = copy.deepcopy(made)
    assert other.walk.quantizer is other.middle["vq"] is not made.middle["vq"]
    nn.init.zeros_(other.middle["vq"].project_out.weight)
    latents = torch.randn(1, DIM, 2, 2)
    assert not torch.equal(other.walk(latents, Nearest(other)), made.walk(latents, Nearest(made)))


# --- what it leaves alone, and what it refuses ---------------------------------------------------------------------


def test_a_network_without_such_a_quantiser_stays_as_it_is() -> None:
    made = Own(nn.Embedding(SIZE, DIM))
    give_walk(made)
    assert not hasattr(made, "walk") and not hasattr(made, "codebooks") and not hasattr(made, "lookup")


class Walking(Own):
    codebooks = ("middle.vq._codebook.embed",)

    def walk(self, encoded: Tensor, quantise: Callable[[int, Tensor], Tensor]) -> Tensor:
        return quantise(0, encoded * 2)


def test_a_network_that_has_a_walk_of_its_own_keeps_it() -> None:
    made = Walking(VectorQuantize(dim=DIM, codebook_size=SIZE, heads=2))
    give_walk(made)
    assert made.walk(torch.ones(1), lambda stage, latents: latents + stage) == 2
    assert not hasattr(made, "lookup")


def residual(**more: Any) -> ResidualVQ:
    return ResidualVQ(dim=DIM, codebook_size=SIZE, num_quantizers=2, **more)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "heads": (
        lambda: VectorQuantize(dim=DIM, codebook_size=SIZE, heads=2, separate_codebook_per_head=True),
        "VectorQuantize with a codebook for each of its heads",
    ),
    "affine": (lambda: VectorQuantize(dim=DIM, codebook_size=SIZE, affine_param=True), "with affine_param"),
    "affine stages": (lambda: residual(affine_param=True), "ResidualVQ with affine_param"),
    "bridge": (
        lambda: VectorQuantize(dim=DIM, codebook_size=SIZE, vq_bridge=nn.Linear(DIM, DIM)),
        "with a vq_bridge",
    ),
    "implicit": (lambda: residual(implicit_neural_codebook=True), "with an implicit_neural_codebook"),
    "diveq": (lambda: residual(diveq=True), "with diveq"),
    "beams": (lambda: residual(beam_size=4), "with eval_beam_size > 1"),
    "sim": (
        lambda: SimVQ(dim=DIM, codebook_size=SIZE, codebook_transform=nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU())),
        "SimVQ with a codebook_transform that is not one linear layer",
    ),
    "no codes": (lambda: FSQ(levels=[4, 4], dim=DIM), "is FSQ, and of its library only VectorQuantize, "),
    "two": (
        lambda: nn.ModuleList([residual(), residual()]),
        r"holds 2 quantisers, middle\.vq\.0, middle\.vq\.1; give Own a `walk` and `codebooks` of its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_walked_is_refused_in_one_line(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(CodebookError, match=message) as refusal:
        give_walk(Own(make()))
    assert "\n" not in str(refusal.value) and "middle.vq" in str(refusal.value)


def test_beams_in_training_only_are_no_hindrance() -> None:
    give_walk(Own(residual(beam_size=4, eval_beam_size=1)))


def test_a_member_in_the_way_is_named() -> None:
    made: Any = Own(residual())
    made.lookup = nn.Embedding(2, 2)
    with pytest.raises(CodebookError, match=r"`lookup` is in the way of its ResidualVQ, middle\.vq: rename it"):
        give_walk(made)


def test_it_is_the_users_function_that_gets_a_walk(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "from vector_quantize_pytorch import ResidualVQ\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, size):\n"
        "        super().__init__()\n"
        "        self.vq = ResidualVQ(dim=4, codebook_size=size, num_quantizers=2)\n"
        "    def encode(self, x):\n"
        "        return x\n"
        "    decode = encode\n"
        "def make(codebook_size):\n"
        "    return Net(codebook_size)\n"
    )
    made: Any = make_network(f"{tmp_path / 'own.py'}:make", 7)
    assert made.codebooks == ("vq.layers.0._codebook.embed", "vq.layers.1._codebook.embed")
    assert made.state_dict()[made.codebooks[0]].shape == (1, 7, 4)


# --- what follows the codes in the file ----------------------------------------------------------------------------


def pruned(made: Any, keep: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """The state of the network with the codes `keep` of every stage, and their companions after our rules."""
    state = made.state_dict()
    found: dict[str, FoundCodebook] = {
        book.key: book for book in find_codebooks({key: tuple(t.shape) for key, t in state.items()}).codebooks
    }
    changed = {}
    for key in made.codebooks:
        rows = state[key][:, keep]
        changed |= {key: rows} | companion_values(
            found[key], companions_of(found[key], state[key][0], state, {}), state, rows[0], counts[keep]
        )
    return state | changed


@pytest.mark.parametrize("name", ["plain", "cosine", "residual", "grouped"])
def test_the_library_loads_a_pruned_codebook_and_trains_on_from_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(name, kmeans_init=True)  # not initialised yet, for all that its file says
    keep, counts = torch.tensor([1, 2, 5, 7, 8, 13, 15]), torch.arange(1.0, SIZE + 1)
    state = pruned(made, keep, counts)
    flags = [key for key in state if key.endswith("initted")]
    assert len(flags) == len(made.codebooks) and all(bool(state[key]) for key in flags)
    first = made.codebooks[0].removesuffix("embed")
    assert torch.equal(state[first + "cluster_size"], counts[keep][None])
    assert torch.equal(state[first + "embed_avg"], state[first + "embed"] * counts[keep][None, :, None])

    monkeypatch.setattr("test_lucidrains.SIZE", len(keep))
    fresh = network(name, kmeans_init=True)
    fresh.load_state_dict(state)
    latents = torch.randn(4, DIM, 6, 6)
    by_library(fresh.train(), latents)
    for key in fresh.codebooks:  # a step of EMA moves codes, and no more
        after, before = fresh.state_dict()[key], state[key]
        assert 0.5 < float(after.norm() / before.norm()) < 1.5
        assert functional.cosine_similarity(after, before, dim=-1).median() > 0.9
