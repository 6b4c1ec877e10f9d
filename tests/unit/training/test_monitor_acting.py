"""A monitor moves dead codes to latents, with their EMA state and the optimizer's moments, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import same
from sklearn.cluster import KMeans
from torch import Tensor, nn
from training_loops import DIM, Averaged, K, Net, Straight, images, made, train, vq

import codebook_tools as ct

FAR = torch.arange(K) % 3 == 0
"""Codes that are put where no latent is; by direction, all at one place, of which only the first can be near."""

EMA = ["averaged", "columns", "vq", "vq, learned", "vq, cosine"]


def with_far_codes(name: str) -> Net:
    """A network whose codes are used, but for FAR."""
    net = made(name)
    latents = net.encoder(images(64)).detach().movedim(1, -1).flatten(0, -2)
    rows = latents[torch.arange(K) * 37 % len(latents)].clone()
    if name == "vq, cosine":
        rows = nn.functional.normalize(rows, dim=1)
        rows[FAR] = -nn.functional.normalize(latents.mean(0), dim=0)
    else:
        rows[FAR] += 20
    with torch.no_grad():
        for key, tensor in net.quantizer.state_dict().items():
            if "size" in key:
                tensor.fill_(64.0)
            elif "embed" in key or "_ema_w" in key:
                values = rows * 64 if "avg" in key or "_ema_w" in key else rows
                tensor.copy_((values.T if name == "columns" else values).reshape(tensor.shape))
            elif "init" in key:
                tensor.fill_(1)
    return net


def codebook(net: Net, name: str) -> Tensor:
    state = net.quantizer.state_dict()
    tensor = next(state[key] for key in state if key.endswith(("embedding.weight", "embed")))
    return (tensor.T if name == "columns" else tensor.reshape(K, DIM)).detach().clone()


@pytest.mark.parametrize("name", ["straight", "without codes", "diffusers", *EMA])
def test_dead_codes_move_to_latents_and_living_ones_stay(name: str) -> None:
    net = with_far_codes(name)
    optimizer = torch.optim.Adam(net.parameters(), 0.0)
    twin = with_far_codes(name)
    other = torch.optim.Adam(twin.parameters(), 0.0)
    monitor = ct.CodebookMonitor(net, optimizer=optimizer, revive_every=3)
    latents = torch.cat(train(net, 3, optimizer)).movedim(1, -1).flatten(0, -2)
    train(twin, 3, other)
    figures: Any = monitor.epoch()
    now, before = codebook(net, name), codebook(twin, name)
    moved = (now != before).any(1)
    assert int(moved.sum()) == figures["revived"] and bool(moved[FAR][1:].all())
    rows = nn.functional.normalize(latents, dim=1) if name == "vq, cosine" else latents
    assert all(float((row - rows).abs().amax(1).min()) < 1e-6 for row in now[moved]), "each is a latent"
    assert len(now[moved].unique(dim=0)) == int(moved.sum()), "of its own"
    mine, others = net.quantizer.state_dict(), twin.quantizer.state_dict()
    for key, tensor in mine.items():
        axis = next((axis for axis, length in enumerate(tensor.shape) if length == K), None)
        if axis is not None:  # EMA state of codes that stayed, to the last bit
            at = (~moved).nonzero()[:, 0]
            assert same(tensor.index_select(axis, at), others[key].index_select(axis, at)), key
    for parameter, parameter_before in zip(net.parameters(), twin.parameters(), strict=True):
        state, state_before = optimizer.state[parameter], other.state[parameter_before]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state and parameter.shape[-2:] == (K, DIM):
                per_code = state[moment].reshape(K, DIM)
                assert not per_code[moved].any() and same(
                    per_code[~moved], state_before[moment].reshape(K, DIM)[~moved]
                )
            elif moment in state:
                assert same(state[moment], state_before[moment])
    figures_after: Any = (train(net, 3, optimizer), monitor.epoch())[1]
    assert figures_after["used"] > figures["used"]


@pytest.mark.parametrize("name", ["vq", "columns", "averaged"])
def test_the_next_average_keeps_a_revived_code_near_its_latent(name: str) -> None:
    """With EMA state of another code it would be thrown far away by the next step."""
    net = with_far_codes(name)
    optimizer = torch.optim.Adam(net.parameters(), 0.0)
    ct.CodebookMonitor(net, optimizer=optimizer, revive_every=3)
    train(net, 3, optimizer)
    placed = codebook(net, name)
    train(net, 1, optimizer)
    spread = net.encoder(images(64)).detach().movedim(1, -1).flatten(0, -2).std(0).norm()
    assert float((codebook(net, name) - placed).norm(dim=1).max()) < float(spread)


@pytest.mark.parametrize("name", ["straight", *EMA])
def test_a_refit_is_a_k_means_of_recent_latents(name: str) -> None:
    net = with_far_codes(name)
    optimizer = torch.optim.Adam(net.parameters(), 0.0)
    monitor = ct.CodebookMonitor(net, optimizer=optimizer, refit_at=6)
    latents = torch.cat(train(net, 6, optimizer)).movedim(1, -1).flatten(0, -2)
    rows = nn.functional.normalize(latents, dim=1) if name == "vq, cosine" else latents
    codes = codebook(net, name)
    ours = float(torch.cdist(rows, codes).min(1).values.square().mean())
    theirs = KMeans(K, n_init=3, random_state=0).fit(rows.numpy()).inertia_ / len(rows)
    assert ours < 1.15 * theirs, "from a sample of them"
    if name == "vq, cosine":
        assert torch.allclose(codes.norm(dim=1), torch.ones(K))
    if name in ("vq", "columns"):
        state = net.quantizer.state_dict()
        counts, sums = (next(state[key] for key in state if key.endswith(end)) for end in ("size", "avg"))
        sums = sums.T if name == "columns" else sums.reshape(K, DIM)
        assert torch.allclose(sums / counts.reshape(K, 1), codes, rtol=1e-4)
        assert float(counts.sum()) == pytest.approx(64 * K, rel=0.7), "weighs about as much as before"
    if name in ("straight", "vq, learned"):
        parameter = next(one for one in net.parameters() if one.shape[-2:] == (K, DIM))
        assert not optimizer.state[parameter]["exp_avg"].any()
    assert "revived" not in monitor.epoch()


def test_too_few_counts_tell_nothing_and_a_resumed_training_is_not_refit_again() -> None:
    net = with_far_codes("straight")
    optimizer = torch.optim.Adam(net.parameters(), 0.0)
    monitor = ct.CodebookMonitor(net, optimizer=optimizer, revive_every=1, refit_at=2)
    monitor.steps = 5
    before = codebook(net, "straight")
    train(net, 1, optimizer)  # 32 images of 16 latents: 21 a code
    assert same(codebook(net, "straight"), before)
    train(net, 1, optimizer)
    moved = (codebook(net, "straight") != before).any(1)
    assert monitor.steps == 7 and bool(moved[FAR].all()) and not bool(moved.all())


def test_a_refit_waits_for_enough_latents() -> None:
    net = Net(LARGE["straight"]())
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    ct.CodebookMonitor(net, optimizer=optimizer, refit_at=1)
    codes: Any = net.quantizer.embedding
    before = codes.weight.detach().clone()
    train(net, 2, optimizer)  # 410 latents each, and 8 a code are needed
    assert same(codes.weight.detach(), before)
    train(net, 1, optimizer)
    assert not same(codes.weight.detach(), before)


def test_a_constant_encoder_is_told_from_a_lack_of_data() -> None:
    net = made("straight")
    nn.init.zeros_(net.encoder.weight)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    ct.CodebookMonitor(net, optimizer=optimizer, refit_at=3)
    with pytest.raises(ct.CodebookError, match="24 codes and got fewer distinct latents"):
        train(net, 4, optimizer)


def test_codes_that_cannot_be_moved_are_refused() -> None:
    from vector_quantize_pytorch import SimVQ

    quantizer = SimVQ(dim=DIM, codebook_size=K)
    optimizer = torch.optim.Adam(quantizer.parameters())
    with pytest.raises(ct.CodebookError, match=r"frozen_codebook.*code_transform.weight.*cannot move"):
        ct.CodebookMonitor(quantizer, optimizer=optimizer, revive_every=5)
    odd = made("straight")
    odd.quantizer.embedding.register_buffer("zeta", torch.rand(K))  # type: ignore[union-attr, operator]
    optimizer = torch.optim.Adam(odd.parameters())
    with pytest.raises(ct.CodebookError, match=r"zeta \[24\].*say what they are: leave out revive_every") as refusal:
        ct.CodebookMonitor(odd, optimizer=optimizer, refit_at=5)
    assert "--companion" not in str(refusal.value)
    net = Blind(DIM)
    optimizer = torch.optim.Adam(net.parameters())
    ct.CodebookMonitor(net, codebooks=["codes.weight"], optimizer=optimizer, revive_every=1)
    for _ in range(20):
        net.train()(torch.randn(64, 4)).sum().backward()
    with pytest.raises(ct.CodebookError, match=r"codes.weight: the latents.*codes=lambda"):
        optimizer.step()


class Blind(nn.Module):
    """Takes and returns nothing that its codes stand for."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.encoder, self.codes, self.decoder = nn.Linear(4, dim), nn.Embedding(K, dim), nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.encoder(x)
        codes = torch.cdist(latents, self.codes.weight).argmin(-1)
        result: Tensor = self.decoder(latents + (self.codes(codes) - latents).detach())
        return result


LARGE: dict[str, Callable[[], nn.Module]] = {
    "straight": lambda: Straight(128), "averaged": lambda: Averaged(128), "vq": lambda: vq(codebook_size=128)
}  # fmt: skip


def collapse(name: str, **settings: Any) -> tuple[dict[str, Any], float]:
    """Train with 128 codes, drawn far out. Returns the last figures and the error on other images."""
    torch.manual_seed(0)
    net = Net(LARGE[name]())
    codes = torch.randn(128, DIM) * 2
    with torch.no_grad():
        for key, tensor in net.quantizer.state_dict().items():
            if key.endswith(("embedding.weight", "embed", "_ema_w", "embed_avg")):
                tensor.copy_(codes.reshape(tensor.shape))
            elif "size" in key:
                tensor.fill_(1)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    monitor = ct.CodebookMonitor(net, optimizer=optimizer, **settings)
    train(net, 150, optimizer)
    monitor.epoch()
    train(net, 50, optimizer, seed=1)
    figures: Any = monitor.epoch()
    with torch.no_grad():
        test = images(128, seed=9)
        error = float((net.eval()(test)[0] - test).square().mean())
    return figures, error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["straight", "averaged", "vq"])
@pytest.mark.parametrize("settings", [{"revive_every": 20}, {"refit_at": 100}])
def test_a_training_collapses_without_and_not_with(name: str, settings: dict[str, int]) -> None:
    (without, error), (with_it, lower) = collapse(name), collapse(name, **settings)
    assert without["usage"] < 0.6
    assert with_it["usage"] > 0.8 and with_it["perplexity"] > 2 * without["perplexity"] and lower < 0.8 * error


def test_what_is_drawn_leaves_the_random_numbers_of_torch_alone() -> None:
    states = []
    for settings in ({}, {"revive_every": 2, "refit_at": 5}):
        net = with_far_codes("vq")
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        ct.CodebookMonitor(net, optimizer=optimizer, **settings)
        train(net, 8, optimizer)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


class Table(nn.Module):
    """A codebook that is a parameter of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.table = nn.Linear(4, DIM), nn.Parameter(torch.randn(K, DIM))
        with torch.no_grad():
            self.table[FAR] += 20

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        latents = self.encoder(x)
        codes = torch.cdist(latents, self.table).argmin(-1)
        return {"codes": codes, "latents": latents, "loss": (self.table[codes] - latents).square().mean()}


def test_codes_and_latents_by_a_function_are_enough_to_move_codes() -> None:
    torch.manual_seed(0)
    net = Table().train()
    optimizer = torch.optim.Adam(net.parameters(), 0.0)
    monitor = ct.CodebookMonitor(
        net, codebooks=["table"], codes=lambda out: (out["codes"], out["latents"]), optimizer=optimizer, revive_every=1
    )
    table, latents = net.table, list[Tensor]()
    for step in range(2):
        out = net(torch.randn(30, 50, 4, generator=torch.Generator().manual_seed(step)))
        latents.append(out["latents"].detach().flatten(0, 1))
        out["loss"].backward()
        optimizer.step()
    assert net.table is table and monitor.epoch()["revived"] >= int(FAR.sum())  # type: ignore[call-overload]
    assert all(float((row - torch.cat(latents)).abs().amax(1).min()) < 1e-6 for row in net.table[FAR].detach())


def test_latents_that_are_not_finite_are_no_place_for_a_code() -> None:
    net = with_far_codes("straight")
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    monitor = ct.CodebookMonitor(net, optimizer=optimizer, revive_every=1)
    train(net, 1, optimizer)
    nn.init.constant_(net.encoder.weight, torch.nan)
    before = codebook(net, "straight")
    net.train()(images(200))
    optimizer.zero_grad()
    optimizer.step()
    figures: Any = monitor.epoch()
    assert same(codebook(net, "straight"), before)
    assert math.isnan(figures["effective_dimension"])
