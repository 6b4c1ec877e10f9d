"""Figures of images that papers quote, with random weights compared with the libraries that define them."""

from __future__ import annotations

import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import together
from safetensors.torch import save_file
from torch import Tensor, nn

from codebook_tools.data.images import Images
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.one_pass import Batch
from codebook_tools.evaluation.quoted.figure import Tallies, open_figures
from codebook_tools.evaluation.quoted.registry import parse_metrics
from codebook_tools.evaluation.quoted.rfid import RFID
from codebook_tools.evaluation.quoted.tally import Tally, moments_of, remarks
from codebook_tools.runtime import distributed

CPU = torch.device("cpu")


def pictures(count: int, side: int = 16, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Images and others that are like them, in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, side, side, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return images, (0.8 * images + 0.1 + 0.05 * noise).clamp(0, 1)


def batch(*media: Tensor) -> Batch:
    return Batch(np.arange(len(media[0]), dtype=np.uint64), [], [], media[:2], [])  # type: ignore[arg-type]


class Random(nn.Module):
    """A small random feature extractor of 8-bit images."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layers = nn.Sequential(
                nn.Conv2d(3, dim, 5, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return torch.as_tensor(self.layers((images.float() - 128) / 128))


def rfid(features: Any) -> RFID:
    return RFID("rfid", Images(size=16, channels=3), None, CPU, 0, features=features)


def bytes_of(images: Tensor) -> Tensor:
    """As a PNG holds them."""
    return (images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize(("count", "dim", "channels"), [(200, 12, 3), (20, 48, 3), (60, 12, 1)])
def test_rfid_is_what_torchmetrics_makes_of_the_same_features(count: int, dim: int, channels: int) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    features, media = Random(dim), pictures(count, channels=channels)
    reference = fid.FrechetInceptionDistance(features, input_img_size=(3, 16, 16))
    for images, real in zip(media, (True, False), strict=True):
        reference.update(bytes_of(images), real=real)
    expected = float(reference.compute())
    figure = rfid(features)
    done = figure.tally(batch(*media), None)  # type: ignore[arg-type]
    assert done.value == pytest.approx(expected, rel=1e-3) and expected > 1e-3
    assert figure.tally(batch(media[0], media[0]), None).value == pytest.approx(0, abs=1e-9)  # type: ignore[arg-type]


def test_rfid_of_parts_in_any_order_is_that_of_the_whole_to_the_last_bit() -> None:
    figure, media = rfid(Random(12)), pictures(50)
    cuts = [(0, 13), (13, 14), (14, 50)]
    parts = [figure.tally(batch(*(images[a:b] for images in media)), None) for a, b in cuts]  # type: ignore[arg-type]
    whole = parts[0] + parts[1] + parts[2]
    other = parts[2] + (Tally() + parts[0]) + parts[1]
    assert whole.value == other.value and whole.moments is not None and other.moments is not None
    assert torch.equal(whole.moments, other.moments)
    assert Tally.unpacked(*whole.packed()).value == whole.value


def merged(*items: str) -> list[Any]:
    """In one of two processes: the figure of all, of which each process has its part. items: of rank 0, of rank 1."""
    figure, media, tallies = rfid(Random(12)), pictures(50), Tallies([], None)  # type: ignore[arg-type]
    cut, rank = int(items[0]), distributed.rank()
    part = [images[cut:] if rank else images[:cut] for images in media]
    tallies.done = {"rfid": figure.tally(batch(*part), None) if len(part[0]) else Tally()}  # type: ignore[arg-type]
    tallies.merge()
    done = tallies.done["rfid"]
    return [done.count, done.value]


@pytest.mark.slow
@pytest.mark.parametrize("cut", [20, 50])
def test_processes_add_their_parts_even_where_one_has_none(cut: int) -> None:
    whole = rfid(Random(12)).tally(batch(*pictures(50)), None)  # type: ignore[arg-type]
    assert together(merged, cut) == [[50, whole.value]] * 2


def test_moments_are_those_of_the_features_and_too_large_ones_are_refused() -> None:
    features = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) * 3
    moments = moments_of(features).double()
    assert torch.allclose(moments[0] * 2.0**-16, features.double().sum(0), atol=300 * 2.0**-17)
    assert torch.allclose(moments[1:] * 2.0**-32, features.double().T @ features.double(), atol=0.1)
    with pytest.raises(CodebookError, match="features reach 200; they are expected within ±128"):
        moments_of(torch.tensor([[200.0]]))


def test_an_rfid_of_few_images_is_remarked_on_and_of_one_there_is_none() -> None:
    figure = rfid(Random(12))
    one, few, many = (figure.tally(batch(*pictures(count)), None) for count in (1, 12, 13))  # type: ignore[arg-type]
    assert one.value is None and remarks({"rfid": many}, "images") == []
    (line,) = remarks({"rfid": few}, "images")
    assert line == "rfid of 12 images is far above that of many: the covariances of its 12 features are singular"


def test_tallies_survive_packing_and_add_as_numbers_do() -> None:
    rng = np.random.default_rng(0)
    totals = [Fraction(total) for total in rng.normal(size=20) * 10.0 ** rng.integers(-9, 9, 20)]
    tallies = [Tally(i, 20 - i, total) for i, total in enumerate(totals)]
    whole = sum(tallies, Tally())
    assert (whole.count, whole.skipped, whole.total) == (190, 210, sum(totals))
    assert Tally.unpacked(*whole.packed()).value == whole.value == sum(reversed(tallies), Tally()).value
    assert whole.value == float(sum(totals) / 190) and Tally().value is None
    with pytest.raises(ValueError, match="7 and 3 numbers are no sums of a figure"):
        Tally.unpacked(torch.zeros(7, dtype=torch.int64), torch.zeros(3, dtype=torch.float64))


@pytest.mark.slow
def test_rfid_by_inception_is_what_torchmetrics_makes_of_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    inceptionv3 = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    fid = pytest.importorskip("torchmetrics.image.fid")
    blank, path = tmp_path / "blank.pth", tmp_path / "inception.pth"

    class Blank(inceptionv3.FeatureExtractorInceptionV3):  # type: ignore[misc]
        """It loads weights whenever it is made; these are its own."""

        def load_state_dict(self, *_: Any, **__: Any) -> None:
            return None

    torch.save({}, blank)
    torch.manual_seed(0)
    network = Blank("inception-v3-compat", ["2048"], str(blank))
    for name, parameter in network.named_parameters():
        if name.endswith("conv.weight"):
            nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), path)
    media = pictures(24, side=32)
    reference = fid.FrechetInceptionDistance(2048, feature_extractor_weights_path=str(path)).set_dtype(torch.float64)
    (figure,) = open_figures(parse_metrics(f"rfid={path}"), Images(size=32, channels=3), CPU, 0)
    assert figure.sha256 is not None
    for images, real in zip(media, (True, False), strict=True):
        reference.update(bytes_of(images), real=real)
    value = figure.tally(batch(*media), None).value  # type: ignore[arg-type]
    assert value == pytest.approx(float(reference.compute()), rel=1e-3) and value is not None and value > 1e-4


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torchvision's VGG16."""
    models = pytest.importorskip("torchvision").models
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = models.vgg16(weights=None).features.state_dict()
    path = tmp_path_factory.mktemp("weights") / "vgg16.safetensors"
    save_file({f"features.{name}": tensor for name, tensor in state.items()}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_is_what_its_authors_package_computes_with_the_same_weights(vgg: Path, channels: int) -> None:
    from safetensors.torch import load_file

    lpips = pytest.importorskip("lpips")
    media = pictures(5, side=32, channels=channels)
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = load_file(vgg)
    reference.net.load_state_dict(
        {name: state[f"features.{name.partition('.')[2]}"] for name in reference.net.state_dict()}
    )
    with torch.no_grad():
        expected = reference(*(images.expand(-1, 3, -1, -1) for images in media), normalize=True).mean()
    (figure,) = open_figures(parse_metrics(f"lpips={vgg}"), Images(size=32, channels=channels), CPU, 0)
    value = figure.tally(batch(*media), None).value  # type: ignore[arg-type]
    assert value == pytest.approx(float(expected), rel=1e-5) and value is not None and value > 1e-3


@pytest.mark.slow
def test_lpips_takes_no_images_that_vgg_cannot_halve_and_no_other_weights(vgg: Path, tiny: Path) -> None:
    (figure,) = open_figures(parse_metrics(f"lpips={vgg}"), Images(size=8, channels=3), CPU, 0)
    with pytest.raises(CodebookError, match="8 pixels a side are too few; it takes 16 or more"):
        figure.tally(batch(*pictures(2, side=8)), None)  # type: ignore[arg-type]
    with pytest.raises(CodebookError, match=r"^--metrics lpips=.*no weights of torchvision's VGG16"):
        open_figures(parse_metrics(f"lpips={tiny}"), Images(size=8, channels=3), CPU, 0)


# --- weights


def test_weights_that_are_nowhere_are_named_with_the_place_where_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # nothing is fetched
    with pytest.raises(CodebookError) as caught:
        open_figures(parse_metrics("rfid"), Images(size=16, channels=3), CPU, 0)
    line = str(caught.value)
    assert "\n" not in line and "weights-inception-2015-12-05-6726825d.pth" in line
    assert str(tmp_path / "hub" / "checkpoints") in line and "rfid=FILE" in line
    with pytest.raises(CodebookError, match=r"--metrics rfid=nowhere\.pth: there is no such file"):
        open_figures(parse_metrics("rfid=nowhere.pth"), Images(size=16, channels=3), CPU, 0)


class Bomb:
    """What a file must not run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path("exploded").touch, ()


def test_no_code_in_a_file_of_weights_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb()))
    monkeypatch.setattr("codebook_tools.evaluation.quoted.rfid.require", lambda *_: None)
    with pytest.raises(CodebookError):
        open_figures(parse_metrics("rfid=bomb.pth"), Images(size=16, channels=3), CPU, 0)
    assert not Path("exploded").exists()


# --- what is typed


def test_figures_are_typed_with_commas_and_weights_where_there_are_some() -> None:
    assert parse_metrics("rfid=a.pth, pesq,si-sdr") == {"rfid": Path("a.pth"), "pesq": None, "si-sdr": None}
    assert parse_metrics("") == {}
    for text, message in (
        ("fid", "expected some of rfid, lpips, pesq"),
        ("pesq,pesq", "pesq is there twice"),
        ("pesq=a.pth", "pesq has no weights; leave out =a.pth"),
    ):
        with pytest.raises(CodebookError, match=message):
            parse_metrics(text)


@pytest.mark.parametrize("name", ["pesq", "stoi", "si-sdr", "mel", "stft"])
def test_a_figure_of_sound_is_refused_for_images_in_one_line(name: str) -> None:
    with pytest.raises(CodebookError, match=rf"^--metrics {name} is of sound; these data are images: leave it out$"):
        open_figures(parse_metrics(name), Images(size=16, channels=3), CPU, 0)
