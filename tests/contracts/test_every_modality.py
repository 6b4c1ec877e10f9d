"""Every strategy on every kind of data: sizes, index maps, figures and the file that is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

import codebook_tools as ct
from codebook_tools.codebook import Strategy
from codebook_tools.errors import CodebookError

K, DIM = 16, 4


class Coder(nn.Module):
    """One codebook between two layers, or two residual ones."""

    def __init__(self, down: nn.Module, up: nn.Module, stages: int = 1, sampling_rate: int | None = None) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.books = nn.ModuleList(nn.Embedding(K, DIM) for _ in range(stages))
        self.codebooks = tuple(f"books.{i}.weight" for i in range(stages))
        if sampling_rate:
            self.sampling_rate, self.hop, self.channels = sampling_rate, 2, 1

    def encode(self, media: Tensor) -> Tensor:
        return torch.as_tensor(self.down(media))

    def walk(self, latents: Tensor, quantize: Callable[[int, Tensor], Tensor]) -> Tensor:
        rest, total = latents, torch.zeros_like(latents)
        for stage in range(len(self.books)):
            emitted = quantize(stage, rest)
            rest, total = rest - emitted, total + emitted
        return total

    def decode(self, quantized: Tensor) -> Tensor:
        return torch.as_tensor(self.up(quantized))


@dataclass(frozen=True)
class Kind:
    """Data (n, ...), the layers of a network for them, and which axis of latents has the dimensions of a code."""

    data: NDArray[np.float32]
    layers: Callable[[], tuple[nn.Module, nn.Module]]
    axis: int = 1
    of: dict[str, Any] | None = None

    def network(self) -> Coder:
        torch.manual_seed(0)
        net = Coder(*self.layers(), **(self.of or {}))
        with torch.no_grad():  # half of the codes among the latents, half far away, so that those are dead
            latents = net.encode(torch.from_numpy(self.data)).movedim(self.axis, -1).reshape(-1, DIM)
            for book in net.books:
                book.weight[: K // 2] = latents[torch.randperm(len(latents))[: K // 2]]
                book.weight[K // 2 :] += 50
        return net


def drawn(*shape: int, low: float = 0.0, high: float = 1.0) -> NDArray[np.float32]:
    random = np.random.default_rng(sum(shape))
    return random.uniform(low, high, shape).astype(np.float32)


KINDS = {
    "images": Kind(drawn(80, 1, 6, 6), lambda: (nn.Conv2d(1, DIM, 2, 2), nn.ConvTranspose2d(DIM, 1, 2, 2))),
    "audio": Kind(
        drawn(80, 1, 12, low=-1),
        lambda: (nn.Conv1d(1, DIM, 2, 2), nn.ConvTranspose1d(DIM, 1, 2, 2)),
        of={"sampling_rate": 12},
    ),
    "vectors": Kind(drawn(300, 10, low=-5, high=9), lambda: (nn.Linear(10, DIM), nn.Linear(DIM, 10))),
    "residual vectors": Kind(
        drawn(300, 10, low=-5, high=9), lambda: (nn.Linear(10, DIM), nn.Linear(DIM, 10)), of={"stages": 2}
    ),
    "signals": Kind(
        drawn(80, 2, 12, low=100, high=120), lambda: (nn.Conv1d(2, DIM, 2, 2), nn.ConvTranspose1d(DIM, 2, 2, 2))
    ),
    "motion": Kind(drawn(80, 7, 5, low=-3, high=3), lambda: (nn.Linear(5, DIM), nn.Linear(DIM, 5)), axis=2),
    "clips": Kind(drawn(60, 3, 4, 6, 6, low=-1), lambda: (nn.Conv3d(3, DIM, 2, 2), nn.ConvTranspose3d(DIM, 3, 2, 2))),
}
STRATEGIES: dict[str, tuple[Strategy | None, int | None]] = {
    "refit": (ct.strategies.Refit(k=6), 6),
    "prune": (ct.strategies.Prune(), None),
    "quantize": (ct.strategies.Quantize(k=6), 6),
    "restart": (ct.strategies.Restart(), K),
    "grow": (ct.strategies.Grow(k=12), 12),
    "condense": (ct.strategies.Condense(k=6), 6),
    "finetune": (None, K),
}
CASES = [
    pytest.param(kind, name, marks=[] if name == "refit" or kind == "residual vectors" else [pytest.mark.slow])
    for kind in KINDS
    for name in STRATEGIES
]


@pytest.mark.filterwarnings("ignore::codebook_tools.CodebookWarning")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_strategy_keeps_its_promises_on_a_kind_of_data(kind: str, name: str, tmp_path: Path) -> None:
    of, (strategy, size) = KINDS[kind], STRATEGIES[name]
    net = of.network()
    model, steps = ct.wrap(net), 3 if name in ("refit", "condense", "finetune") else 0
    test = torch.from_numpy(of.data[:20] + np.float32(1e-3) * (kind != "audio"))
    test = test.clamp(0, 1) if kind == "images" else test
    expected = error_of(net, test)
    run = ct.operate(model, ct.Data(of.data[20:], test=test), strategy, ct.FineTune(steps=steps, batch_size=16))
    assert run.before.mse == pytest.approx(expected, rel=1e-3)
    last = run.finetuned or run.surgery
    assert last is not None
    sizes = {book.size for book in last.codebooks}
    assert len(sizes) == 1 and (sizes == {size} or (size is None and max(sizes) <= K // 2))
    for key, index_map in run.index_maps.items():
        assert key in net.codebooks and len(index_map) == K and int(index_map.max()) < max(sizes)
    if name in ("prune", "quantize", "grow", "restart"):  # codes in use stay, so no reconstruction gets worse by much
        assert last.error <= 1.5 * run.before.error + 1e-9
    kept = {"before": run.before, "surgery": run.surgery, "finetuned": run.finetuned}[run.kept]
    assert kept is not None and error_of(net, test) == pytest.approx(kept.error, rel=1e-3)
    written = run.save(tmp_path / "m.safetensors")
    assert written.proof is not None and written.proof.by == "module"
    bounds = (0.0, 1.0) if kind == "images" else None
    again = ct.load(
        tmp_path / "m.safetensors", network=lambda codebook_size: of_size(of, codebook_size), input_range=bounds
    )
    assert ct.measure(again, ct.Data(of.data[20:], test=test)).error == pytest.approx(error_of(net, test), rel=1e-3)


def of_size(kind: Kind, codebook_size: int) -> Coder:
    net = kind.network()
    for i in range(len(net.books)):
        net.books[i] = nn.Embedding(codebook_size, DIM)
    return net


def error_of(net: Coder, media: Tensor) -> float:
    """The mean squared error, computed here without the package."""
    made = quantized(net, media)[1]
    return float((made.clamp(0, 1) if media.shape[1:] == (1, 6, 6) else made).sub(media).square().mean())


@pytest.mark.filterwarnings("ignore::codebook_tools.CodebookWarning")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "audio"])
def test_tokens_are_those_of_the_nearest_codes_and_decode_to_the_same(kind: str, tmp_path: Path) -> None:
    of = KINDS[kind]
    net, media = of.network(), torch.from_numpy(of.data)
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    np.save(tmp_path / "d.npy", of.data)
    bounds = (0.0, 1.0) if kind == "images" else None
    model = ct.load(tmp_path / "m.safetensors", network=lambda codebook_size: of.network(), input_range=bounds)
    encoding = ct.encode(model, tmp_path / "d.npy", tmp_path / "t.npy")
    stages, made = quantized(net, media)
    expected = stages[0] if len(stages) == 1 else torch.stack(stages, 1)
    tokens = np.load(tmp_path / "t.npy")
    assert tokens.dtype == np.int32 and np.array_equal(tokens, expected.numpy()) and encoding.shape == tokens.shape
    names = (tmp_path / "t.npy.items.txt").read_text().split()
    assert names == [f"d.npy#{i}" for i in range(len(media))]
    if kind != "images":
        ct.decode(tmp_path / "t.npy", model, tmp_path / "decoded", data=tmp_path / "d.npy")
        assert np.allclose(np.load(tmp_path / "decoded" / "decoded.npy"), made.numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore::codebook_tools.CodebookWarning")
def test_a_beam_searches_the_stages_of_a_walk_that_are_residual(tmp_path: Path) -> None:
    of = KINDS["residual vectors"]
    net, media = of.network(), torch.from_numpy(of.data)
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    model = ct.load(tmp_path / "m.safetensors", network=lambda codebook_size: of.network())
    np.save(tmp_path / "d.npy", of.data)
    errors = []
    for beam in (1, 4, K):
        ct.encode(model, tmp_path / "d.npy", tmp_path / f"{beam}.npy", beam=beam)
        codes = torch.from_numpy(np.load(tmp_path / f"{beam}.npy")).long()
        with torch.no_grad():
            total = sum(book.weight[codes[:, i]] for i, book in enumerate(net.books))
            errors.append((net.encode(media) - total).double().square().sum(1))
    assert bool((errors[1] <= errors[0] + 1e-6).all()) and float(errors[1].mean()) < float(errors[0].mean())
    with torch.no_grad():  # of two stages the widest beam tries all pairs
        pairs = (net.books[0].weight[:, None] + net.books[1].weight[None]).flatten(0, 1)
        best = torch.cdist(net.encode(media).double(), pairs.double()).amin(1).square()
    assert torch.allclose(errors[2], best, rtol=1e-3)


@pytest.mark.filterwarnings("ignore::codebook_tools.CodebookWarning")
def test_tokens_of_rows_of_unlike_length_are_lists_in_the_order_of_the_rows(tmp_path: Path) -> None:
    of = KINDS["signals"]
    net = of.network()
    rows = [torch.from_numpy(of.data[i, :, : 6 + 2 * (i % 4)].copy()) for i in range(40)]
    torch.save(rows, tmp_path / "r.pt")
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    model = ct.load(tmp_path / "m.safetensors", network=lambda codebook_size: of.network(), modality="arrays")
    ct.encode(model, ct.Data(tmp_path / "r.pt", batch_size=3), tmp_path / "t.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == [f"r.pt#{i}" for i in range(40)]
    for line, row in zip(lines, rows, strict=True):
        assert line["codes"] == quantized(net, row[None])[0][0][0].tolist()
    with pytest.raises(CodebookError, match=r"rows of unlike length are written as \.parquet or \.jsonl"):
        ct.encode(model, tmp_path / "r.pt", tmp_path / "t.npy")
    assert not (tmp_path / "t.npy").exists()


def quantized(net: Coder, media: Tensor) -> tuple[list[Tensor], Tensor]:
    """The codes of each stage, (n, *grid), and what they decode to, computed here without the package."""
    with torch.no_grad():
        latents = net.encode(media)
        axis = next(axis for axis in range(1, latents.ndim) if latents.shape[axis] == DIM)
        rest = latents.movedim(axis, -1)
        total, stages = torch.zeros_like(rest), []
        for book in net.books:
            distances = torch.cdist(rest.reshape(1, -1, DIM).double(), book.weight[None].double())
            stages.append(distances.argmin(2)[0].reshape(rest.shape[:-1]))
            rest, total = rest - book.weight[stages[-1]], total + book.weight[stages[-1]]
        return stages, net.decode(total.movedim(-1, axis))
