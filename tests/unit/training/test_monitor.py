"""A monitor counts what an independent count counts, in loops of all kinds, and changes no training by a bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import same
from scipy.stats import entropy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training_loops import DIM, QUANTIZERS, K, Net, images, made, train, vq

import codebook_tools as ct


def counted(codes: Tensor, latents: list[Tensor]) -> dict[str, Any]:
    """The figures by numpy and scipy, of codes and of latents (n, dim, *grid)."""
    hits = np.bincount(codes.flatten().numpy(), minlength=K)
    rows = torch.cat([one.movedim(1, -1).flatten(0, -2) for one in latents]).double().numpy()
    spectrum = np.linalg.eigvalsh(np.cov(rows.T))
    return {
        "used": int((hits > 0).sum()), "dead": int((hits == 0).sum()), "usage": pytest.approx((hits > 0).mean()),
        "perplexity": pytest.approx(np.exp(entropy(hits)), rel=1e-12),
        "effective_dimension": pytest.approx(spectrum.sum() ** 2 / (spectrum**2).sum(), rel=1e-5),
    }  # fmt: skip


def chosen_by(net: Net, steps: int) -> tuple[Tensor, list[Tensor]]:
    """Train; the codes that each step's latents had in the codebook of that step, by brute force, and the latents."""
    key = next(name for name in net.state_dict() if name.endswith(("embedding.weight", "embed")))
    codes, before = list[Tensor](), list[Tensor]()

    def search(module: nn.Module, args: Any, output: Any) -> None:
        latents = args[0].detach().movedim(1, -1)
        rows, book = latents.flatten(0, -2).double(), before.pop().double()
        codes.append(torch.cdist(rows, book, compute_mode="donot_use_mm_for_euclid_dist").argmin(1))

    def keep(module: nn.Module, args: Any) -> None:
        book = net.state_dict()[key].clone().reshape(-1, net.state_dict()[key].shape[-1])
        before.append(book.T if key.endswith("quantizer.embed") else book)

    handles = [net.quantizer.register_forward_pre_hook(keep), net.quantizer.register_forward_hook(search)]
    latents = train(net, steps)
    for handle in handles:
        handle.remove()
    return torch.cat(codes), latents


@pytest.mark.parametrize("name", sorted({*QUANTIZERS} - {"vq, cosine", "vq, k-means"}))
def test_figures_are_those_of_an_independent_count(name: str) -> None:
    net = made(name)
    monitor = ct.CodebookMonitor(net)
    codes, latents = chosen_by(net, 6)
    assert monitor.epoch() == counted(codes, latents)
    codes, latents = chosen_by(net, 4)
    assert monitor.epoch() == counted(codes, latents), "an epoch starts anew"


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_a_training_with_a_monitor_is_that_without_to_the_last_bit(name: str) -> None:
    ends = []
    for watched in (False, True):
        net = made(name)
        monitor = ct.CodebookMonitor(net) if watched else None
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        train(net, 12, optimizer)
        ends.append((net.state_dict(), optimizer.state_dict()["state"], torch.get_rng_state()))
        if monitor is not None:
            assert monitor.epoch()["used"] > 1  # type: ignore[call-overload]
    (weights, moments, random), (others, other_moments, other_random) = ends
    assert weights.keys() == others.keys() and all(same(weights[key], others[key]) for key in weights)
    assert all(same(moments[i][key], other_moments[i][key]) for i in moments for key in moments[i])
    assert torch.equal(random, other_random)


def test_a_codebook_by_direction_is_counted() -> None:
    net = made("vq, cosine")
    monitor = ct.CodebookMonitor(net)
    codes = list[Tensor]()
    net.quantizer.register_forward_hook(lambda module, args, output: codes.append(output[1]))
    latents = train(net, 6)
    units = [nn.functional.normalize(one, dim=1) for one in latents]
    assert monitor.epoch() == counted(torch.cat(codes), units)


def test_stages_have_a_list_of_figures_and_shared_ones_a_single_codebook() -> None:
    from vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ

    settings: dict[str, Any] = {"dim": DIM, "codebook_size": K, "num_quantizers": 3}
    for shared in (False, True):
        quantizer = ResidualVQ(shared_codebook=shared, **settings).train()
        monitor = ct.CodebookMonitor(quantizer)
        codes = quantizer(torch.randn(2, 50, DIM))[1].flatten(0, 1).T
        figures = monitor.epoch()
        if shared:
            assert isinstance(figures, dict) and figures["used"] == len(codes.unique())
        else:
            assert monitor.names == tuple(f"layers.{i}._codebook.embed" for i in range(3))
            assert isinstance(figures, list) and [one["used"] for one in figures] == [len(c.unique()) for c in codes]
            assert set(monitor.scalars()) > {"codebook/layers.0._codebook.embed/used"}
    grouped = GroupedResidualVQ(groups=2, **settings | {"num_quantizers": 2}).train()
    monitor = ct.CodebookMonitor(grouped)
    codes = grouped(torch.randn(2, 50, DIM))[1]
    used = [len(codes[group, ..., stage].unique()) for group in range(2) for stage in range(2)]
    assert [one["used"] for one in monitor.epoch()] == used  # type: ignore[index]


def test_masked_positions_do_not_count() -> None:
    quantizer = vq(accept_image_fmap=False).train()
    monitor = ct.CodebookMonitor(quantizer)
    rows, mask = torch.randn(3, 20, DIM), torch.arange(20)[None] < torch.tensor([3, 0, 7])[:, None]
    codes = quantizer(rows, mask=mask)[1]
    assert monitor.epoch() == counted(codes[mask], [rows[mask]])


def codec(name: str) -> Any:
    """A tiny codec of transformers with random codes."""
    import transformers
    from audio_codecs import CASES

    case = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.name}Config")(codebook_size=16, **case.more)
    model = getattr(transformers, f"{case.name}Model")(config)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "codebook" in key:
                tensor.fill_(1) if "cluster" in key else tensor.normal_()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encodec", "dac", "mimi", "xcodec"])
def test_the_codecs_of_transformers_are_counted(name: str) -> None:
    model = codec(name).eval()
    model.quantizer.train()
    monitor = ct.CodebookMonitor(model)
    codes = model(torch.randn(2, 1, 1600)).audio_codes
    codes = (codes[0] if name == "encodec" else codes).movedim(1, 0)
    figures: Any = monitor.epoch()
    order = [monitor.names.index(key) for key in sorted(monitor.names, key=lambda key: "semantic" not in key)]
    used = [figures[i]["used"] for i in order]
    assert used[: len(codes)] == [len(stage.unique()) for stage in codes]
    assert all(figures[i]["effective_dimension"] > 1 for i in order[: len(codes)])


def test_only_training_forwards_count_and_not_those_that_backward_repeats() -> None:
    net = made("straight")
    monitor = ct.CodebookMonitor(net)
    net.eval()(images(8))
    with pytest.warns(UserWarning, match="quantizer.embedding.weight was counted"):
        assert monitor.epoch() == {
            "used": 0, "dead": K, "usage": 0.0, "perplexity": 0.0, "effective_dimension": None
        }  # fmt: skip
    net.train()
    for repeated in (False, True):
        reconstruction, _ = checkpoint(net, images(8), use_reentrant=False) if repeated else net(images(8))
        reconstruction.mean().backward()
        assert int(monitor._watched[0]._tally.counts.sum()) == 8 * 16 * (1 + repeated)


@pytest.mark.slow
def test_a_compiled_module_is_counted() -> None:
    net = made("straight")
    compiled: Any = torch.compile(net, backend="eager")
    monitor = ct.CodebookMonitor(compiled)
    codes = torch.cat([compiled(images(8, seed))[1][2] for seed in range(3)])
    assert monitor.names == ("quantizer.embedding.weight",)
    assert monitor.epoch()["perplexity"] == pytest.approx(np.exp(entropy(np.bincount(codes))))  # type: ignore[call-overload]


def test_half_precision_is_counted() -> None:
    net = made("straight")
    monitor = ct.CodebookMonitor(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = list[Tensor]()
        net.encoder.register_forward_hook(lambda module, args, output: latents.append(output.detach()))
        _, (_, _, codes) = net(images(32))
    assert monitor.epoch() == counted(codes, latents)


def test_of_many_latents_a_sample_gives_the_effective_dimension_and_all_are_counted() -> None:
    net = made("straight")
    monitor = ct.CodebookMonitor(net)
    latents, codes = list[Tensor](), list[Tensor]()
    net.encoder.register_forward_hook(lambda module, args, output: latents.append(output.detach()))
    for seed in range(20):
        codes.append(net(images(200, seed))[1][2])
    figures: Any = monitor.epoch()
    expected = counted(torch.cat(codes), latents)
    exact = expected.pop("effective_dimension").expected
    assert figures.pop("effective_dimension") == pytest.approx(exact, rel=0.02) and figures == expected


def test_copies_of_a_module_are_not_counted_and_a_closed_monitor_counts_nothing() -> None:
    net, file = made("straight"), io.BytesIO()
    before = copy.deepcopy(net)
    monitor = ct.CodebookMonitor(net)
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        other.train()(images(4))
    net.train()(images(4))
    assert int(monitor._watched[0]._tally.counts.sum()) == 4 * 16
    monitor.close()
    net(images(4))
    assert int(monitor._watched[0]._tally.counts.sum()) == 4 * 16
    assert all(not vars(one)["_forward_hooks"] for one in net.modules())
    assert net.state_dict().keys() == before.state_dict().keys()


def test_a_library_whose_encode_is_called_gets_its_own_method_back() -> None:
    model = codec("encodec")
    monitor = ct.CodebookMonitor(model)
    copied = copy.deepcopy(model)
    copied.train()(torch.randn(1, 1, 400))
    assert int(monitor._watched[0]._tally.counts.sum()) == 0
    monitor.close()
    assert "encode" not in vars(model.quantizer.layers[0].codebook)


class Bare(nn.Module):
    """A codebook in the network itself, as a parameter; codes are kept for whoever asks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.table = nn.Linear(4, DIM), nn.Parameter(torch.randn(K, DIM))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        latents = self.encoder(x)
        codes = torch.cdist(latents, self.table).argmin(-1)
        return {"out": self.table[codes].sum(-1), "codes": codes, "latents": latents}


def test_a_codebook_by_name_and_codes_by_a_function() -> None:
    net, x = Bare().train(), torch.randn(5, 7, 4)
    for codes, dimension in (
        (lambda output: output["codes"], False),
        (lambda output: (output["codes"], output["latents"]), True),
        (lambda output: [(output["codes"], output["latents"])], True),
    ):
        monitor = ct.CodebookMonitor(net, codebooks=["table"], codes=codes)
        output = net(x)
        expected = counted(output["codes"], [output["latents"].detach().movedim(-1, 1)])
        assert monitor.epoch() == expected | ({} if dimension else {"effective_dimension": None})
        monitor.close()
    padding = torch.arange(7) < 3
    monitor = ct.CodebookMonitor(
        net, codebooks=["table"], codes=lambda output: output["codes"].masked_fill(padding, -1)
    )
    assert net(x)["codes"][:, 3:].unique().numel() == monitor.epoch()["used"]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (lambda: nn.Linear(3, 3), {}, r"Linear has no codebook.*codebooks=\["),
        (lambda: made("straight"), {"codebooks": ["quantizer.w"]}, "'quantizer.w'.*quantizer.embedding.weight"),
        (lambda: made("straight"), {"revive_every": 10}, "give optimizer="),
        (lambda: made("straight"), {"refit_at": 0}, "refit_at=0"),
        (lambda: fsq(), {}, "FSQ rounds to a grid and has no learned codebook"),
        (lambda: vq(heads=2, separate_codebook_per_head=True), {}, "of 2 heads"),
    ],
)  # fmt: skip
def test_what_cannot_be_monitored_is_refused_in_a_line(
    module: Callable[[], nn.Module], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ct.CodebookError, match=message) as refusal:
        ct.CodebookMonitor(module(), **settings)
    assert "\n" not in str(refusal.value)


def fsq() -> nn.Module:
    from vector_quantize_pytorch import FSQ

    return nn.Sequential(nn.Linear(3, 3), FSQ([8, 5, 5]))


def test_a_list_of_codes_that_does_not_fit_is_refused() -> None:
    net = Bare().train()
    ct.CodebookMonitor(net, codebooks=["table"], codes=lambda output: [output["codes"]] * 2)
    with pytest.raises(ct.CodebookError, match="2 entries, of 1 codebook"):
        net(torch.randn(5, 7, 4))


def test_figures_go_to_a_writer(tmp_path: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    net = made("straight")
    monitor = ct.CodebookMonitor(net)
    with SummaryWriter(tmp_path) as writer:
        for seed in (1, 2):
            net.train()(images(8, seed))
            figures: Any = monitor.epoch()
            monitor.log(writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {*events.Tags()["scalars"]} == {f"codebook/{name}" for name in figures}
    assert [event.step for event in events.Scalars("codebook/used")] == [1, 2]
    assert events.Scalars("codebook/perplexity")[-1].value == pytest.approx(figures["perplexity"])


def test_straight_through_quantizers_in_a_bare_module_are_read_by_their_embedding() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.codes, self.decoder = nn.Linear(4, DIM), nn.Embedding(K, DIM), nn.Linear(DIM, 4)

        def forward(self, x: Tensor) -> Tensor:
            latents = self.encoder(x)
            self.chosen = torch.cdist(latents, self.codes.weight).argmin(-1)
            result: Tensor = self.decoder(latents + (self.codes(self.chosen) - latents).detach())
            return result

    net = Whole().train()
    monitor = ct.CodebookMonitor(net, codebooks=["codes.weight"])
    for parts in (True, False):  # called one by one, or as a whole
        x = torch.randn(20, 4)
        if parts:
            net.chosen = torch.cdist(net.encoder(x), net.codes.weight).argmin(-1)
            net.codes(net.chosen)
        else:
            net(x)
        assert monitor.epoch()["used"] == len(net.chosen.unique())  # type: ignore[call-overload]
    net.codes(torch.arange(K))
    assert ct.CodebookMonitor(net, codebooks="codes.weight").names == monitor.names
    assert monitor.epoch()["used"] == 0, "a lookup beside the forward is none of the training"  # type: ignore[call-overload]
