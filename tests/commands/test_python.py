"""`import codebook_tools as ct`: on files as the command line does it, and on modules that live in memory, in place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, same
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import codebook_tools as ct
from codebook_tools.models.networks.zalando import make

K = 16


class Quantizer(nn.Module):
    """A quantizer with the EMA state and the attributes that training scripts have."""

    embedding: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.dim, self.n_e = size, dim, size
        self.register_buffer("embedding", torch.randn(size, dim) * 3)
        self.register_buffer("cluster_size", torch.full((size,), 20.0))
        self.register_buffer("embed_avg", self.embedding * 20)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        rows = latents.movedim(1, -1)
        codes = torch.cdist(rows.flatten(0, -2), self.embedding).argmin(1)
        hits = nn.functional.one_hot(codes, self.num_embeddings)  # fails where K does not follow
        return self.embedding[hits.argmax(1)].reshape(rows.shape).movedim(-1, 1), codes.reshape(rows.shape[:-1])


class Net(nn.Module):
    """A VQ-VAE as in a training script; no method has the name that this package asks for."""

    def __init__(self, size: int = K) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 4, 4, 4), nn.ConvTranspose2d(4, 3, 4, 4)
        self.vq = Quantizer(size, 4)

    def forward(self, images: Tensor) -> Any:
        return self.decoder(self.vq(self.encoder(images))[0])


WITH: dict[str, Any] = {
    "codebooks": ["vq.embedding"],
    "encode": lambda module, images: module.encoder(images),
    "decode": lambda module, quantized: module.decoder(quantized),
    "quantize": lambda module, latents: module.vq(latents),
}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def is_as(module: nn.Module, state: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return now.keys() == state.keys() and all(same(now[name], state[name]) for name in state)


# --- the face
def test_importing_costs_no_torch_and_every_name_is_there() -> None:
    program = "import sys, codebook_tools as ct; print('torch' in sys.modules, 'numpy' in sys.modules, dir(ct))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False False")
    assert all(getattr(ct, name) is not None and repr(name) in done.stdout for name in ct.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ct.nothing  # noqa: B018
    lines = Path(ct.__file__).read_text().splitlines()
    for_type_checkers = {line.rpartition(" as ")[2] for line in lines if line.startswith("    from codebook_tools")}
    assert for_type_checkers == set(ct.__all__)


def test_a_file_is_operated_on_as_by_a_command(codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path) -> None:
    words = ("--k", 6, "--steps", 4, "--data", images_folder, "-o", tmp_path / "command.safetensors")
    assert codebook("refit", tiny, *words).exit_code == 0
    run = ct.operate(ct.load(str(tiny)), str(images_folder), ct.strategies.Refit(k=6), ct.FineTune(steps=4))
    assert not list(tmp_path.glob("python*"))
    result = run.save(tmp_path / "python.safetensors")
    assert (tmp_path / "python.safetensors").read_bytes() == (tmp_path / "command.safetensors").read_bytes()
    assert result.outputs["model"] == str(tmp_path / "python.safetensors") and result.proof
    again = ct.measure(ct.load(tmp_path / "python.safetensors"), images_folder)
    assert result.kept_stage and again.mse == result.kept_stage.mse
    assert ct.verify(tmp_path / "python.safetensors", tiny).ok
    assert ct.inspect(tiny).to_json()["codebooks"]


def test_an_index_map_made_here_moves_tokens(tiny: Path, images_folder: Path, tmp_path: Path) -> None:
    run = ct.operate(ct.load(tiny), images_folder, ct.strategies.Prune())
    (index_map,) = run.index_maps.values()
    run.save(tmp_path / "pruned.safetensors")
    tokens = (index_map >= 0).nonzero()[:, 0].numpy()
    np.save(tmp_path / "tokens.npy", tokens)
    ct.remap(tmp_path / "tokens.npy", tmp_path / "pruned.index_map.safetensors")
    assert np.load(tmp_path / "tokens.remapped.npy").tolist() == list(range(len(tokens)))


def test_a_network_may_be_a_function(tiny: Path, images_folder: Path) -> None:
    sizes = list[int]()

    def network(codebook_size: int) -> nn.Module:
        sizes.append(codebook_size)
        return make(codebook_size=codebook_size, hidden=8, residual=4, dim=4)

    run = ct.operate(ct.load(tiny, network=network, metric="euclidean"), images_folder, ct.strategies.Refit(k=5))
    assert run.surgery and run.surgery.codebooks[0].size == 5
    assert {16, 5} <= {*sizes} and run.run.command == "refit"


def test_warnings_are_pythons_and_no_model_is_trained_on_the_bundled_sample(net: Net, tiny: Path) -> None:
    with pytest.warns(ct.CodebookWarning, match="two photographs"):
        ct.measure(ct.load(tiny), ct.Data(limit=40))
    for model in (ct.wrap(net, **WITH), ct.load(tiny)):
        with pytest.raises(ct.CodebookError, match="data of the model's own"):
            ct.operate(model, None, ct.strategies.Prune(), ct.FineTune(steps=2))


# --- a module in memory
def test_a_wrapped_module_is_changed_in_place_and_saved_as_it_is(net: Net, images: Tensor, tmp_path: Path) -> None:
    net.vq.embedding += 0.1  # what training did since: the state is that of the call, not of the wrapping
    model = ct.wrap(net, **WITH)
    net.vq.embedding -= 0.1
    net.vq.embed_avg.copy_(net.vq.embedding * 20)
    run = ct.operate(model, images, ct.strategies.Refit(k=5))
    assert run.surgery and run.before.codebooks[0].size == K and run.surgery.codebooks[0].used == 5
    assert net.vq.embedding.shape == (5, 4) and (net.vq.num_embeddings, net.vq.n_e, net.vq.dim) == (5, 5, 4)
    assert "embedding" in dict(net.vq.named_buffers())
    torch.testing.assert_close(net.vq.embed_avg / net.vq.cluster_size[:, None], net.vq.embedding)
    assert run.proof and run.proof.by == "quantizer" and run.proof.agree + run.proof.near_ties == run.proof.of
    assert net.training

    numbers = [sha256(f"train#{i}".encode()).digest()[:8] for i in range(len(images))]
    test = [i for i, number in enumerate(numbers) if int.from_bytes(number, "big") % 10 == 0]  # a tenth by name
    with torch.no_grad():
        mse = (net(images[test]).clamp(0, 1) - images[test]).square().mean()
    assert run.surgery.mse == pytest.approx(float(mse), rel=1e-5)  # by the module's own forward
    assert ct.measure(model, images).mse == run.surgery.mse
    run.save(str(tmp_path / "net.safetensors"))
    stored = load_file(tmp_path / "net.safetensors")
    assert is_as(net, stored)
    Net(size=5).load_state_dict(stored)
    with pytest.raises(ct.CodebookError, match="force"):
        run.save(tmp_path / "net.safetensors")


def test_fine_tuning_trains_the_module_itself(net: Net, images: Tensor) -> None:
    before = state_of(net)
    run = ct.operate(ct.wrap(net, **WITH), images, ct.strategies.Refit(k=8), ct.FineTune(steps=20, batch_size=16))
    assert run.kept == "finetuned" and run.finetuned and run.surgery
    assert run.finetuned.mse < run.surgery.mse  # type: ignore[operator]
    assert not torch.equal(net.decoder.weight, before["decoder.weight"])
    assert all(parameter.requires_grad for parameter in net.parameters())
    net(images[:2]).sum().backward()  # and the script goes on


class Own(Net):
    """With the methods that this package asks for."""

    def encode(self, media: Tensor) -> Any:
        return self.encoder(media)

    def decode(self, quantized: Tensor) -> Any:
        return self.decoder(quantized)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda net: net.encoder.weight.data.fill_(torch.nan), "encoder.weight"),
        (lambda net: net.encoder.register_forward_hook(lambda *_: 1 / 0), "encode fails on .*ZeroDivisionError"),
        (lambda net: net.encoder.register_forward_hook(lambda *of: of[-1] * torch.inf), "not finite|NaN|finite"),
        (lambda net: net.vq.register_forward_hook(lambda *of: (of[-1][0] * 2, of[-1][1])), "quantize|quantizer"),
    ],
    ids=["weights", "failing", "latents", "other quantizer"],
)
def test_on_an_error_the_module_stays(net: Net, images: Tensor, spoil: Callable[[Net], object], message: str) -> None:
    spoil(net)
    before = state_of(net)
    with pytest.raises(ct.CodebookError, match=message):
        ct.operate(ct.wrap(net, **WITH), images, ct.strategies.Refit(k=5))
    assert is_as(net, before) and net.vq.num_embeddings == K


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ct.wrap(Net()), "Net has no encode; give one"),
        (lambda: ct.wrap(torch.zeros(3)), "takes a torch module, not a Tensor"),  # type: ignore[arg-type]
        (lambda: ct.wrap(Net(), ["vq.codes"], encode=abs, decode=abs), "no tensor vq.codes; its matrices are vq.emb"),
        (lambda: ct.wrap(Net(), encode=1, decode=abs), "encode= is a int"),
        (lambda: ct.load("/nowhere/model.safetensors"), "no such file"),
        (lambda: ct.measure("model.safetensors"), "expected a model of ct.load or ct.wrap, not a str"),  # type: ignore[arg-type]
        (lambda: ct.Data(7), "train= is a int"),  # type: ignore[arg-type]
        (lambda: ct.Data(torch.zeros(2, 3, 8, 8), values=(1, -1)), "smaller"),
        (lambda: ct.Data([]), "gave no batch"),
        (lambda: ct.Data([{"x": torch.zeros(2, 3, 8, 8)}], key="images"), "no entry 'images' .keys 'x'"),
        (lambda: ct.Data([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 9)]), "unlike shapes"),
    ],
)
def test_what_does_not_fit_is_told_at_once(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ct.CodebookError, match=message):
        make()


# --- data in memory
def test_data_of_every_kind_are_the_same_data(net: Net, images: Tensor) -> None:
    images, labels = (images * 255).round() / 255, torch.arange(len(images))
    batches = [{"label": labels[:30], "x": images[:30]}, {"label": 0, "x": images[30:]}]
    model = ct.wrap(net, **WITH)
    mse = ct.measure(model, images).mse
    kinds: dict[str, Any] = {
        "array": images.numpy(),
        "uint8": (images * 255).round().to(torch.uint8),
        "loader": DataLoader(images, batch_size=7),  # type: ignore[arg-type]
        "tuples": ct.Data(DataLoader(TensorDataset(labels, images), batch_size=7), key=1),
        "dicts": ct.Data(batches, key="x"),
        "normalized": ct.Data(images * 2 - 1, values=(-1, 1)),
    }
    for kind, data in kinds.items():
        assert ct.measure(model, data).mse == pytest.approx(mse, rel=1e-5), kind


def test_a_module_of_waveforms_takes_waveforms(images: Tensor) -> None:
    class Codec(Own):
        sampling_rate, hop, channels = 100, 4, 1

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Conv1d(1, 4, 4, 4), nn.ConvTranspose1d(4, 1, 4, 4)  # type: ignore[assignment]

    torch.manual_seed(0)
    codec, waves = Codec(), torch.rand(30, 250) - 0.5
    run = ct.operate(ct.wrap(codec, ["vq.embedding"]), ct.Data(waves, test=waves[:5] * 0.5), ct.strategies.Refit(k=4))
    assert codec.vq.embedding.shape == (4, 4) and run.before.images == 10  # two whole clips of a second in each


# --- a surgery put into a module by itself
def surgery_of(old: int, kept: list[int], dim: int = 4, new: int = 0) -> ct.Surgery:
    index_map = torch.full((old,), ct.REMOVED)
    index_map[kept] = torch.arange(len(kept))
    return ct.Surgery(ct.Codebook(torch.arange((len(kept) + new) * dim).reshape(-1, dim).float()), index_map)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_an_embedding_takes_a_surgery_and_the_optimizer_follows(make: Callable[..., torch.optim.Optimizer]) -> None:
    embedding, other = nn.Embedding(6, 4), nn.Linear(4, 4)
    optimizer = make([{"params": [*other.parameters(), embedding.weight]}], lr=0.1)
    (other(embedding.weight).square() * torch.arange(1, 7)[:, None]).sum().backward()
    optimizer.step()
    old = embedding.weight
    state = {name: value.clone() for name, value in optimizer.state[old].items() if isinstance(value, Tensor)}
    surgery = surgery_of(6, [1, 4, 5], new=1)
    ct.install(surgery, embedding, optimizer=optimizer)
    assert embedding.num_embeddings == 4 and torch.equal(embedding.weight, surgery.codebook.vectors)
    assert isinstance(embedding.weight, nn.Parameter) and embedding.weight.requires_grad
    assert optimizer.param_groups[0]["params"][-1] is embedding.weight and old not in optimizer.state
    for name, value in state.items():
        moved = torch.cat([value[[1, 4, 5]], torch.zeros(1, 4)]) if value.shape == (6, 4) else value
        assert torch.equal(optimizer.state[embedding.weight][name], moved)
    embedding(torch.tensor([3])).sum().backward()
    optimizer.step()


def test_a_quantizer_takes_a_surgery_with_its_ema_state_and_a_tensor_goes_by_the_name_that_is_given() -> None:
    quantizer = Quantizer(6, 4)
    quantizer.cluster_size.copy_(torch.tensor([2.0, 4, 6, 8, 10, 12]))
    quantizer.embed_avg.copy_(quantizer.embedding * quantizer.cluster_size[:, None])
    ct.install(surgery_of(6, [0, 3], new=1), quantizer, codebook="embedding")
    assert quantizer.cluster_size.tolist() == [2, 8, 7]  # the new code has the mean of the old ones
    torch.testing.assert_close(quantizer.embed_avg, quantizer.embedding * torch.tensor([2.0, 8, 7])[:, None])
    assert quantizer.num_embeddings == quantizer.n_e == 3
    tied = nn.ModuleDict({"one": nn.Embedding(6, 4), "two": nn.Embedding(6, 4)})
    tied["two"].weight = tied["one"].weight
    ct.install(surgery_of(6, [1, 2]), tied, codebook="one.weight")
    assert tied["one"].weight.shape == (2, 4)


def test_a_surgery_that_does_not_fit_changes_nothing() -> None:
    embedding = nn.Embedding(6, 4)
    before = state_of(embedding)
    for surgery, counts, message in (
        (surgery_of(5, [1]), None, "of 5 codes, and weight has 6"),
        (surgery_of(6, [1], dim=3), None, "3 dimensions, weight has 4"),
        (surgery_of(6, [1, 2]), torch.ones(6), r"expected \(2,\)"),
    ):
        with pytest.raises(ct.CodebookError, match=message):
            ct.install(surgery, embedding, counts=counts)
        assert is_as(embedding, before) and embedding.num_embeddings == 6


# --- modules of libraries
@pytest.mark.parametrize(
    ("options", "stages"), [({}, 1), ({"use_cosine_sim": True}, 1), ({"num_quantizers": 2}, 2)], ids=str
)
def test_a_library_module_without_functions_goes_on_training(
    options: dict[str, Any], stages: int, images: Tensor
) -> None:
    library: Any = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    kind = library.ResidualVQ if "num_quantizers" in options else library.VectorQuantize
    net: Any = Own()
    net.vq = kind(dim=4, codebook_size=K, accept_image_fmap=True, kmeans_init=False, **options)
    net.eval()
    run = ct.operate(ct.wrap(net), images, ct.strategies.Refit(k=5))
    assert run.surgery and run.proof and run.proof.by == "quantizer" and len(run.index_maps) == stages
    assert [tuple(module.embed.shape) for module in net.modules() if hasattr(module, "embed")] == [(1, 5, 4)] * stages
    sizes = [vars(module).get("codebook_size") for module in net.modules()]
    assert {size for size in sizes if isinstance(size, int)} == {5} and not net.training
    codes = net.vq(net.encode(images))[1].reshape(-1, stages)
    assert [column.unique().tolist() for column in codes.T] == [[0, 1, 2, 3, 4]] * stages
    net.train()
    net.decode(net.vq(net.encode(images))[0]).square().mean().backward()  # EMA counts and sums have the new size
