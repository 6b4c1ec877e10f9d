"""Beam search over residual stages: by hand, against brute force, and never worse than the nearest code at each."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import audio_codecs
import pytest
import torch
from conftest import Run, assert_refused
from image_models import OWN, QUANTIZERS, write
from torch import Tensor, nn
from tutorial_networks import two_levels

from codebook_tools.clustering.assignment import nearest, nearest_few
from codebook_tools.codebook import Codebook
from codebook_tools.evaluation.beam import beam_tokens
from codebook_tools.evaluation.tokens import TokenDecoder, tokens_of
from codebook_tools.models.model import Model
from codebook_tools.models.networks.residual import residual
from codebook_tools.models.user_network import make_network
from codebook_tools.workflows.python_model import wrap
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_network


class Residual(nn.Module):
    """Residual stages on the numbers of an image: a pixel (n, 1, height, width) is a latent of one dimension."""

    def __init__(self, books: list[Tensor]) -> None:
        super().__init__()
        self.books = nn.ParameterList(nn.Parameter(book) for book in books)
        self.codebooks = tuple(f"books.{i}" for i in range(len(books)))

    def encode(self, images: Tensor) -> Tensor:
        return images

    def walk(self, latents: Tensor, quantize: object, search: object = residual) -> Tensor:
        return search(latents, range(len(self.books)), quantize)  # type: ignore[operator,no-any-return]

    def decode(self, quantized: Tensor) -> Tensor:
        return quantized


def model_of(*books: list[list[float]]) -> Model:
    network = Residual([torch.tensor(book) for book in books])
    model = open_network(wrap(network, network.codebooks).request)
    model.input_range = (0, 1)
    return model


def test_by_hand() -> None:
    """2.13: the nearest of 0 and 3 is 3, from which -1 and 2.1 lead to 2 and 5.1; 0 leads to 2.1."""
    model = model_of([[0.0], [3.0]], [[-1.0], [2.1]])
    pixel = torch.tensor([[[[2.13]]]])
    assert [int(codes) for codes in tokens_of(model, pixel)] == [1, 0]
    chosen = beam_tokens(model, pixel, 2)
    assert [int(codes) for codes in chosen.codes] == [0, 1] and chosen.latents == 1
    assert chosen.greedy == pytest.approx(0.13**2, rel=1e-5) and chosen.error == pytest.approx(0.03**2, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_beam_of_all_paths_is_exhaustive(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    books = [torch.randn(5, 1, generator=random) / (i + 1) for i in range(3)]
    model = model_of(*(book.tolist() for book in books))
    images = torch.randn(2, 1, 4, 4, generator=random)
    chosen = beam_tokens(model, images, 125)
    sums = torch.tensor([sum(float(book[k]) for book, k in zip(books, path, strict=True)) for path in PATHS])
    least = (images.flatten()[:, None] - sums).square().amin(1)
    ours = sum(book[codes] for book, codes in zip(books, chosen.codes, strict=True)).squeeze(-1)  # type: ignore[union-attr]
    assert torch.allclose((images[:, 0] - ours).square().flatten(), least, atol=1e-5)
    assert chosen.error == pytest.approx(float(least.sum()), rel=1e-3)


PATHS = [*product(range(5), repeat=3)]


def own(name: str, folder: Path) -> Model:
    (folder / "own.py").write_text(OWN.replace("QUANTIZER", QUANTIZERS[name]))
    torch.manual_seed(1)
    make = f"{folder / 'own.py'}:make"
    state = make_network(make, 16).state_dict()
    for key, tensor in state.items():
        if key.endswith("_codebook.embed"):
            state[key] = torch.randn(tensor.shape) * 0.5
    return open_network(Request(write(state, folder / "own.safetensors"), network=make))


CODECS = ("encodec", "dac", "mimi")


@pytest.mark.parametrize(
    "name", ["ResidualVQ", "GroupedResidualVQ", "encodec", "dac", pytest.param("mimi", marks=pytest.mark.slow)]
)
def test_no_latent_becomes_worse_and_the_mean_better(name: str, tmp_path: Path) -> None:
    """Of codecs and of a library's quantizers, through their projections. A beam of 1 is the greedy search."""
    if name in CODECS:
        model = open_network(Request(audio_codecs.save(audio_codecs.CASES[name], tmp_path / "model")))
        media = audio_codecs.waveforms(model.network)
    else:
        model, media = own(name, tmp_path), torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    greedy = tokens_of(model, media)
    assert all(torch.equal(*pair) for pair in zip(beam_tokens(model, media, 1).codes, greedy, strict=True))
    before = float("inf")
    for width in (2, 4, 8):
        chosen = beam_tokens(model, media, width)
        assert chosen.greedy == pytest.approx(beam_tokens(model, media, 1).error, rel=1e-5)
        assert chosen.error < chosen.greedy
        assert [codes.shape for codes in chosen.codes] == [codes.shape for codes in greedy]
        before = min(before, chosen.error)
    for i in range(len(media)):  # each item by itself
        alone = beam_tokens(model, media[i : i + 1], 4)
        assert alone.error <= alone.greedy
    assert before < beam_tokens(model, media, 1).error
    TokenDecoder(model, model.modality.of(model.network, None), tuple(media.shape[1:]))(chosen.codes)


def test_the_error_is_that_of_the_codes() -> None:
    """Recomputed from the codes alone."""
    random = torch.Generator().manual_seed(5)
    books = [torch.randn(7, 1, generator=random) / (i + 1) for i in range(3)]
    model, images = model_of(*(book.tolist() for book in books)), torch.randn(3, 1, 5, 2, generator=random)
    chosen = beam_tokens(model, images, 3)
    total = sum(book[codes][..., 0] for book, codes in zip(books, chosen.codes, strict=True))
    assert chosen.error == pytest.approx(float((images[:, 0] - total).double().square().sum()), rel=1e-4)
    assert chosen.latents == 30


def test_the_few_nearest_are_the_first_of_all() -> None:
    random = torch.Generator().manual_seed(0)
    latents, codes = torch.randn(50, 3, generator=random), torch.randn(20, 3, generator=random)
    few = nearest_few(latents, Codebook(codes), 4)
    assert torch.equal(few, torch.cdist(latents, codes).argsort(1)[:, :4])
    assert torch.equal(few[:, 0], nearest(latents, Codebook(codes)))
    assert nearest_few(latents, Codebook(codes), 1).shape == (50, 1)


def test_measure_says_what_it_gains_and_encode_writes_it(codebook: Run, images_folder: Path, tmp_path: Path) -> None:
    own("ResidualVQ", tmp_path)
    model, network = tmp_path / "own.safetensors", f"{tmp_path}/own.py:make"
    asked = (model, "--data", images_folder, "--network", network, "--input-range", "-1,1", "--limit", "20")
    done = codebook("measure", *asked, "--beam", "4", "--json").json
    gain, before = done["beam"], done["stages"]["before"]
    assert gain["width"] == 4 and gain["latents"] == before["codebooks"][0]["latents"]
    assert gain["distortion"]["beam"] < gain["distortion"]["greedy"]
    assert gain["mse"]["greedy"] == pytest.approx(before["mse"], rel=1e-6) and gain["mse"]["beam"] > 0
    assert gain["distortion"]["greedy"] < before["codebooks"][-1]["distortion"] * 16
    assert "a beam of 4: distortion of all levels" in codebook("measure", *asked, "--beam", "4").stdout
    assert "beam" not in codebook("measure", *asked, "--json").json
    written = [
        codebook("encode", *asked, *more, "--json", "-o", tmp_path / f"{len(more)}.npy").json
        for more in ((), ("--beam", 4))
    ]
    assert [one["settings"]["beam"] for one in written] == [1, 4]
    assert (tmp_path / "0.npy").read_bytes() != (tmp_path / "2.npy").read_bytes()


def test_a_beam_that_has_nothing_to_choose_is_refused(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    levels = write(two_levels(sizes=(16, 16)), tmp_path / "levels.safetensors")
    for command, more in (("measure", ()), ("encode", ("-o", tmp_path / "t.npy"))):
        for model, width, message in (
            (tiny, 4, "has one codebook, whose nearest code is the best; leave out --beam"),
            (levels, 4, "the 2 levels of"),
            (tiny, 0, "--beam 0 is not within 1 and 256"),
        ):
            asked = (command, model, "--data", images_folder, "--input-range", "-1,1", "--beam", width, *more)
            assert_refused(codebook(*asked), message)
    assert not (tmp_path / "t.npy").exists()
    shard = ("--shard", "1/2", "--stats", tmp_path / "s.safetensors", "--beam", "4")
    assert_refused(codebook("measure", tiny, "--data", images_folder, *shard), "is measured on all data")
