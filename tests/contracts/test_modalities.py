"""A modality that is written here is chosen for its network, measured and operated on: nothing else need know it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import codebook_tools as ct
from codebook_tools.data import registry
from codebook_tools.data.array_files import row_items, stored_arrays
from codebook_tools.data.audio import Waveforms
from codebook_tools.data.images import Images
from codebook_tools.data.items import Item, Values
from codebook_tools.data.modality import Modality
from codebook_tools.data.sources import Source
from codebook_tools.errors import CodebookError


def stored_vectors(path: Path) -> list[Item]:
    return [item for array in stored_arrays(path, Vectors.many) for item in row_items(path.name, array, np.asarray)]


@dataclass(frozen=True, kw_only=True)
class Vectors(Modality):
    """Rows of .npy files, (length,)."""

    one = "vector"
    many = "vectors"
    suffixes = ()
    archives = dict.fromkeys([".npy"], stored_vectors)

    @classmethod
    def accepts(cls, network: object) -> bool:
        return hasattr(network, "length")

    def items(self, source: Source) -> list[Item]:
        raise AssertionError(f"{source.name}: only arrays are read")

    def rows(self, name: str, array: Values) -> list[Item]:
        return row_items(name, array, np.asarray)


class Net(nn.Module):
    """Two latents of four dimensions from a vector of twelve."""

    length = 12

    def __init__(self, codebook_size: int = 32) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(12, 8), nn.Linear(8, 12)
        self.codes = nn.Embedding(codebook_size, 4)

    def encode(self, vectors: Tensor) -> Tensor:
        return self.down(vectors).reshape(len(vectors), 4, 2)

    def decode(self, quantized: Tensor) -> Tensor:
        return self.up(quantized.flatten(1))


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """(300, 12), beyond [0, 1]; the modality of such is known."""
    monkeypatch.setattr(registry, "MODALITIES", (Vectors, *registry.MODALITIES))
    return 3 * torch.randn(300, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_images_are_taken_by_a_network_that_says_nothing_of_its_data() -> None:
    assert registry.modality_of(nn.Identity()) is Images
    heard = nn.Identity()
    heard.sampling_rate = 8000
    assert registry.modality_of(heard) is Waveforms


@pytest.mark.filterwarnings("ignore::codebook_tools.CodebookWarning")
def test_a_file_of_vectors_is_measured_as_it_is(vectors: Tensor, net: Net, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", vectors.numpy())
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    model = ct.load(tmp_path / "m.safetensors", network=Net, codebooks=["codes.weight"])
    found = ct.measure(model, tmp_path / "x.npy")
    with torch.no_grad():
        latents = net.encode(vectors)
        rows = latents.movedim(1, -1)
        codes = ct.nearest(rows.flatten(0, 1), ct.Codebook(net.codes.weight.detach()))
        quantized = net.codes(codes).reshape(rows.shape).movedim(-1, 1)
        errors = (net.decode(quantized) - vectors).square().mean(1)
    everything = ct.measure(model, ct.Data(tmp_path / "x.npy", test=vectors + 1e-6))
    assert everything.mse == pytest.approx(float(errors.mean()), rel=1e-4)
    assert (found.images, found.psnr, found.ssim, found.sharpness) == (30, None, None, None)


@pytest.mark.filterwarnings("ignore::codebook_tools.CodebookWarning")
def test_a_surgery_and_a_fine_tuning_go_on_with_vectors(vectors: Tensor, net: Net) -> None:
    run = ct.operate(ct.wrap(net, codebooks=["codes.weight"]), vectors, ct.strategies.Refit(k=8), ct.FineTune(steps=5))
    assert run.finetuned is not None and run.finetuned.codebooks[0].size == 8
    assert net.codes.weight.shape == (8, 4)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda model, data: ct.measure(model), "no --data: there is no bundled sample of vectors; give some"),
        (
            lambda model, data: ct.operate(model, data, ct.strategies.Prune(), ct.FineTune(steps=1, adversarial=True)),
            "--perceptual and --adversarial judge images; this model takes vectors",
        ),
    ],
)
def test_what_is_there_for_pictures_alone_is_refused(
    work: Callable[[ct.Model, Tensor], object], message: str, vectors: Tensor, net: Net
) -> None:
    with pytest.raises(CodebookError, match=message):
        work(ct.wrap(net, codebooks=["codes.weight"]), vectors)


def test_vectors_of_unlike_lengths_are_told_apart() -> None:
    assert Vectors.written((12,)) == "12" and Images.written((3, 20, 16)) == "16x20"
