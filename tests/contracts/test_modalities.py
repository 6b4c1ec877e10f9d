"""What every modality promises, and what one that is written here needs: nothing else of the package knows it."""

from __future__ import annotations

import re
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import names, picture, png, saved, tiff_of
from PIL import Image
from safetensors.torch import save_file
from sounds import RATE, put_bytes, stored, sweep
from torch import Tensor, nn

import codebook_tools as ct
from codebook_tools.data import registry
from codebook_tools.data.array_files import row_items, stored_arrays
from codebook_tools.data.audio import Waveforms
from codebook_tools.data.dataset import Media
from codebook_tools.data.images import Images
from codebook_tools.data.items import Item, Values, find_items
from codebook_tools.data.modality import Modality
from codebook_tools.data.sources import Source
from codebook_tools.data.splits import split
from codebook_tools.errors import CodebookError


@dataclass(frozen=True)
class Kind:
    """A modality, and the content of its file number i: one item, whose values have `nbytes` in the cache."""

    modality: Modality
    suffix: str
    content: Callable[[int], bytes]
    nbytes: int

    def fill(self, folder: Path, count: int) -> Path:
        for i in range(count):
            put_bytes(folder / "ab"[i % 2] / f"{i}{self.suffix}", self.content(i))
        return folder

    def find(self, *paths: Path) -> list[Item]:
        return find_items(paths, self.modality)

    def media(self, items: list[Item], skip_bad: bool = False, workers: int = 0) -> Media:
        return Media(items, self.modality, skip_bad, workers=workers)


KINDS = {
    "images": Kind(Images(), ".png", lambda i: png(picture(i)), 3 * 8 * 8),
    "clips": Kind(
        Waveforms(rate=RATE, size=400), ".wav", lambda i: stored(sweep(2 * RATE, 0.06) * (i / 40), 2 * RATE), 4 * 400
    ),
}
of_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
with_workers = pytest.mark.parametrize("workers", [0, 2], ids=["alone", "workers"])


@of_kind
def test_a_tar_holds_the_items_of_its_folder_without_what_is_hidden(kind: Kind, tmp_path: Path) -> None:
    folder = kind.fill(tmp_path / "d", 30)
    for name in ("._0", "a/._0", ".thumbnails/0", "__MACOSX/._0"):
        put_bytes(folder / f"{name}{kind.suffix}", kind.content(0))
    put_bytes(folder / "notes.txt", b"no item")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(folder, ".")
    loose, packed = kind.find(folder), kind.find(tmp_path / "s.tar")
    assert names(loose) == names(packed) == sorted(names(loose)) and len(loose) == 30
    assert all(a.source.nbytes == len(a.source.read()) == b.source.nbytes for a, b in zip(loose, packed, strict=True))
    assert torch.equal(kind.media(loose).load(loose)[1], kind.media(packed).load(packed)[1])
    assert names(split(loose).test) == names(split(packed).test)
    both = kind.find(folder, tmp_path / "s.tar")
    assert names(both) == sorted([f"d/{name}" for name in names(loose)] + [f"s.tar/{name}" for name in names(loose)])
    assert {item.kin for item in both} == {item.kin for item in loose}  # they keep their place in the splits


@of_kind
def test_what_is_no_source_says_what_is_looked_for(kind: Kind, tmp_path: Path) -> None:
    put_bytes(tmp_path / "d" / "x.mp3", b"")
    with pytest.raises(CodebookError, match=rf"no {kind.modality.many} in .*: expected files ending in \{kind.suffix}"):
        kind.find(tmp_path / "d")
    with pytest.raises(CodebookError, match=rf"x\.mp3 is no {kind.modality.one} source: .* \.tar, .*\{kind.suffix}"):
        kind.find(tmp_path / "d" / "x.mp3")


@pytest.mark.slow
@with_workers
@pytest.mark.parametrize("fitting", [0, 20, 40])
@of_kind
def test_batches_are_the_same_however_many_workers_decode_and_items_fit_the_cache(
    kind: Kind, fitting: int, workers: int, tmp_path: Path
) -> None:
    items = kind.find(kind.fill(tmp_path, 40))
    alone, other = kind.media(items), kind.media(items, workers=workers)
    other.keep(fitting * kind.nbytes)
    places = [[5, 3, 5], [1], [], *([i, 2] for i in range(25))]
    for _ in range(2):
        state = torch.get_rng_state()
        for expected, batches in ((alone.batches(7), other.batches(7)), (alone.stream(places), other.stream(places))):
            for (one, a), (two, b) in zip(expected, batches, strict=True):
                assert names(one) == names(two) and torch.equal(a, b)
        assert torch.equal(torch.get_rng_state(), state)  # what is drawn elsewhere does not depend on workers
    assert other._cache.nbytes == fitting * kind.nbytes


@with_workers
@of_kind
def test_a_file_that_vanished_costs_only_itself(kind: Kind, workers: int, tmp_path: Path) -> None:
    items = kind.find(kind.fill(tmp_path, 6))
    (tmp_path / "a" / f"2{kind.suffix}").unlink()
    with pytest.raises(CodebookError, match=rf"cannot read {kind.modality.one} a/2\S*: No such file .*; --skip-bad"):
        list(kind.media(items, workers=workers).batches(2))
    for size in (1, 2, 100):
        source = kind.media(items, skip_bad=True, workers=workers)
        for _ in range(2):
            loaded = [item for batch, _ in source.batches(size) for item in batch]
            assert loaded == [items[0], *items[2:]] and list(source.bad) == [items[1].name]


PICTURE = Image.fromarray(picture(9, (64, 64, 3)))
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 3000).astype(np.float32)
FLAC = stored(NOISE, RATE, "FLAC", "PCM_16")
NO_LENGTH = FLAC[:21] + bytes([FLAC[21] & 0xF0, 0, 0, 0, 0]) + FLAC[26:]
DAMAGED = {
    "images": {
        "nothing": (b"", "the file is empty"),
        "text": (b"<html>404</html>", "no PNG, JPEG, WebP, BMP or TIFF picture"),
        "a program for Ghostscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no PNG, JPEG, WebP, BMP"),
        "too many samples": (tiff_of(bytes(9), 1, 8, 1, 9), "a rare kind"),
        **{f"half a {kind}": (saved(PICTURE, kind)[:1500], "damaged") for kind in ("PNG", "JPEG", "WEBP", "TIFF")},
        **{f"a bit of a {kind}": (saved(PICTURE, kind)[:30], "damaged") for kind in ("PNG", "JPEG", "BMP", "TIFF")},
        "zeros within a PNG": (saved(PICTURE, "PNG")[:500] + bytes(99) + saved(PICTURE, "PNG")[599:], "damaged"),
    },
    "clips": {
        "nothing": (b"", "the file is empty"),
        "text": (b"<html>404</html>", "no WAV or FLAC sound"),
        "a header alone": (stored(NOISE)[:30], "damaged file"),
        "no samples": (stored(NOISE[:0], subtype="PCM_16"), "it holds no samples"),
        "a bit of a FLAC": (FLAC[:300], "damaged file"),
        "zeros within a FLAC": (FLAC[:300] + bytes(600) + FLAC[900:], "damaged file"),
        "no number": (stored(np.append(NOISE[:10], np.float32("nan"))), "not finite"),
        "another scale": (stored(NOISE * 32768), r"its waveform reaches 1\.6\d+e\+04, beyond 4; scale it so"),
        "another format": (stored(NOISE, RATE, "AIFF", "PCM_16"), "its content is AIFF; expected WAV or FLAC"),
        "an odd rate": (stored(NOISE, 1, subtype="PCM_16"), "its sampling rate is 1 Hz"),
        "no length": (NO_LENGTH, "does not say how long it is"),
    },
}


@pytest.mark.parametrize(("kind", "damage"), [(kind, damage) for kind in DAMAGED for damage in DAMAGED[kind]])
def test_a_damaged_file_is_named_with_its_reason_on_one_line(
    kind: str, damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (data, reason), case = DAMAGED[kind][damage], KINDS[kind]
    put_bytes(tmp_path / f"a{case.suffix}", case.content(1))
    put_bytes(tmp_path / f"b{case.suffix}", data)
    items = case.find(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CodebookError, match=rf"^cannot read \w+ b\S*: .*{reason}.*--skip-bad") as caught:
            case.media(items).load(items)
        assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)
        source = case.media(items, skip_bad=True)
        assert items[0] in source.load(items)[0]
    assert re.search(reason, source.bad[items[1].name]) and items[0].name not in source.bad
    assert capfd.readouterr() == ("", "")


def stored_vectors(path: Path) -> list[Item]:
    return [item for array in stored_arrays(path, Vectors.many) for item in row_items(path.name, array, np.asarray)]


@dataclass(frozen=True, kw_only=True)
class Vectors(Modality):
    """Rows of .npy files, (length,)."""

    name = "vectors"
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
    network = nn.Identity()
    assert registry.modality_of(network) is Images
    network.sampling_rate = RATE
    assert registry.modality_of(network) is Waveforms


@pytest.mark.filterwarnings("ignore::codebook_tools.CodebookWarning")
def test_vectors_are_measured_operated_on_and_fine_tuned(vectors: Tensor, net: Net, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", vectors.numpy())
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    model = ct.load(tmp_path / "m.safetensors", network=Net, codebooks=["codes.weight"])
    tenth = ct.measure(model, tmp_path / "x.npy")
    assert (tenth.images, tenth.psnr, tenth.ssim, tenth.sharpness) == (30, None, None, None)
    with torch.no_grad():
        rows = net.encode(vectors).movedim(1, -1)
        codes = ct.nearest(rows.flatten(0, 1), ct.Codebook(net.codes.weight.detach()))
        quantized = net.codes(codes).reshape(rows.shape).movedim(-1, 1)
        error = (net.decode(quantized) - vectors).square().mean()
    everything = ct.measure(model, ct.Data(tmp_path / "x.npy", test=vectors + 1e-6))
    assert everything.mse == pytest.approx(float(error), rel=1e-4)
    run = ct.operate(ct.wrap(net, codebooks=["codes.weight"]), vectors, ct.strategies.Refit(k=8), ct.FineTune(steps=5))
    assert run.finetuned is not None and run.finetuned.codebooks[0].size == 8 == len(net.codes.weight)


def test_what_only_pictures_have_is_refused_for_vectors(vectors: Tensor, net: Net) -> None:
    model = ct.wrap(net, codebooks=["codes.weight"])
    with pytest.raises(CodebookError, match="no --data: there is no bundled sample of vectors; give some"):
        ct.measure(model)
    with pytest.raises(CodebookError, match="--perceptual and --adversarial judge images; this model takes vectors"):
        ct.operate(model, vectors, ct.strategies.Prune(), ct.FineTune(steps=1, adversarial=True))
    assert Vectors.written((12,)) == "12" and Images.written((3, 20, 16)) == "16x20"
