"""Tiny models and data: a VQ-VAE of the zalando layout with dead codes, its variants, and small images."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, by torch and scikit-learn: threads only slow tiny work down
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_XET": "1"}  # no test asks the hub itself

import numpy as np
import pytest
import torch
from drawing import put_bytes, saved
from hypothesis import settings
from PIL import Image
from points import DEAD as DEAD
from points import with_dead_codes
from safetensors.torch import save_file
from sources_of_images import Images
from torch import Tensor
from typer.testing import CliRunner

from codebook_tools.checkpoints.layout import PREFIX, index_map_path
from codebook_tools.checkpoints.read import file_sha256, read_checkpoint
from codebook_tools.checkpoints.sealed_file import sealed
from codebook_tools.checkpoints.write import tensor_bytes
from codebook_tools.data.images import array_items
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.models.networks.zalando import make

settings.register_profile("tests", deadline=None, derandomize=True)  # no timing, and the same examples each time
settings.load_profile("tests")

State = dict[str, Tensor]
WriteModel = Callable[..., Path]


def _pictures(seed: int, count: int, side: int = 16) -> list[bytes]:
    """PNGs of smooth colour gradients: 4x4 random colours, enlarged."""
    rng = np.random.default_rng(seed)
    coarse = map(Image.fromarray, rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8))
    return [saved(picture.resize((side, side), Image.Resampling.BICUBIC), "PNG") for picture in coarse]


@pytest.fixture(scope="session")
def images_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 16x16 in two subfolders; by name 4 are test and 6 validation."""
    folder = tmp_path_factory.mktemp("images")
    for i, picture in enumerate(_pictures(0, 60)):
        put_bytes(folder / "ab"[i % 2] / f"{i:03d}.png", picture)
    return folder


@pytest.fixture(scope="session")
def held_out_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 other images of 16x16."""
    folder = tmp_path_factory.mktemp("held_out")
    for i, picture in enumerate(_pictures(1, 12)):
        put_bytes(folder / f"{i:03d}.png", picture)
    return folder


@pytest.fixture(scope="session")
def images_tar(images_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `images_folder` under the same names, as an uncompressed tar."""
    path = tmp_path_factory.mktemp("shards") / "images.tar"
    with tarfile.open(path, "w") as archive:
        for file in sorted(images_folder.rglob("*.png")):
            archive.add(file, file.relative_to(images_folder).as_posix())
    return path


@pytest.fixture(scope="session")
def image_tensor(images_folder: Path) -> Tensor:
    """(60, 3, 16, 16) float32 in [0, 1]: the images of `images_folder` in order of name, read without the package."""
    files = sorted(images_folder.rglob("*.png"), key=lambda file: file.relative_to(images_folder).as_posix())
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)
    return torch.from_numpy(pixels.astype(np.float32)) / 255


@pytest.fixture(scope="session")
def variants(image_tensor: Tensor) -> dict[str, State]:
    """One tiny model, input [-1, 1], as different people save it, by name of the variant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make(codebook_size=16, hidden=8, residual=4, dim=4).eval()
    with torch.no_grad():
        latents = network.encode(image_tensor * 2 - 1).movedim(1, -1).flatten(0, -2)
    codes = with_dead_codes(latents)
    plain = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()} | {CODEBOOK: codes}

    weights = [name for name, tensor in plain.items() if tensor.ndim == 4]
    lengths = {name: plain[name].flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for name in weights}
    directions = {name: plain[name] * torch.linspace(0.5, 2, len(plain[name])).reshape(-1, 1, 1, 1) for name in weights}
    others = {name: tensor for name, tensor in plain.items() if name not in weights}
    older = {f"{name}_g": lengths[name] for name in weights} | {f"{name}_v": directions[name] for name in weights}
    stem = {name: name.removesuffix("weight") + "parametrizations.weight.original" for name in weights}
    newer = {f"{stem[n]}0": lengths[n] for n in weights} | {f"{stem[n]}1": directions[n] for n in weights}
    counts = torch.arange(16, dtype=torch.float32)
    ema = {"_vq_vae._ema_cluster_size": counts, "_vq_vae._ema_w": codes * counts[:, None]}
    return {
        "plain": plain,
        "ema": plain | ema,
        "weight_norm_older": others | older,
        "weight_norm_newer": others | newer,
        "module_prefix": {f"module.{name}": tensor for name, tensor in (plain | ema).items()},
        "tied": {name: plain[name.replace("_layers.1", "_layers.0")].clone() for name in plain},
        "extra": plain | {"teacher.head.weight": torch.linspace(0, 1, 35).reshape(5, 7), "step": torch.tensor(1234)},
        "float16": {name: tensor.half() for name, tensor in (plain | ema).items()},
        "bfloat16": {name: tensor.bfloat16() for name, tensor in (plain | ema).items()},
        "float64": {name: tensor.double() + 1e-12 for name, tensor in plain.items()},
    }


@pytest.fixture
def write_model(tmp_path: Path, variants: dict[str, State]) -> WriteModel:
    """write_model(variant="plain", name="tiny", state=None): a checkpoint under tmp_path, as safetensors saves it."""

    def write(variant: str = "plain", name: str = "tiny", state: State | None = None) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file(variants[variant] if state is None else state, path, {"format": "pt", "note": "by others"})
        return path

    return write


@pytest.fixture
def tiny(write_model: WriteModel) -> Path:
    """The plain tiny model, alone in tmp_path."""
    return write_model()


@dataclass(frozen=True)
class Outcome:
    """What a run of the command line left: its exit code and both outputs."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Run, Patch = Callable[..., Outcome], pytest.MonkeyPatch


@pytest.fixture
def codebook() -> Run:
    """codebook("measure", path, "--json"): the command, run in this process."""
    from codebook_cli.app import app

    def run(*arguments: object) -> Outcome:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return Outcome(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def on_tiny(codebook: Run, tiny: Path, images_folder: Path) -> Run:
    """on_tiny("prune", "--json"): a command on the tiny model and its images."""
    return lambda name, *words: codebook(name, tiny, "--data", images_folder, "--input-range", "-1.0, 1", *words)


def same(a: Tensor, b: Tensor) -> bool:
    """To the last bit, dtype and shape included."""
    return a.dtype == b.dtype and a.shape == b.shape and tensor_bytes(a) == tensor_bytes(b)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, so that two looks tell whether anything was written."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def assert_refused(found: Outcome, message: str) -> None:
    """The user can mend it: exit code 1, and one line that says how."""
    assert found.exit_code == 1, found
    assert found.stdout == ""
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1 and found.stderr.endswith("\n"), found
    assert message in found.stderr


GREY = '''
from torch import Tensor, nn


class Grey(nn.Module):
    """A pixel x of a grey image has the latent (x, 0), and a code is shown as its first number."""

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, 2, 1, bias=False)
        self.quantizer = nn.Module()
        self.quantizer.codebook = nn.Embedding(codebook_size, 2)
        self.decoder = nn.Conv2d(2, 1, 1, bias=False)

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, quantised: Tensor) -> Tensor:
        return self.decoder(quantised)


def make(codebook_size: int) -> Grey:
    return Grey(codebook_size)
'''


@dataclass(frozen=True)
class Grey:
    """A checkpoint of the network GREY, whose numbers can be worked by hand, and the --network that goes with it."""

    path: Path
    network: str


MakeGrey = Callable[..., Grey]


@pytest.fixture
def grey(tmp_path: Path) -> MakeGrey:
    """grey([0.0, 0.5, 1.0]): codes (0, 0), (0.5, 0), (1, 0). dtype: of all tensors. more: other tensors."""

    def write(firsts: list[float], dtype: torch.dtype = torch.float32, more: State | None = None) -> Grey:
        (tmp_path / "grey.py").write_text(GREY)
        state = {
            "encoder.weight": torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1),
            "decoder.weight": torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1),
            "quantizer.codebook.weight": torch.tensor([[first, 0.0] for first in firsts]),
        }
        state = {name: tensor.to(dtype) for name, tensor in state.items()} | (more or {})
        save_file(state, tmp_path / "grey.safetensors", {"format": "pt"})
        return Grey(tmp_path / "grey.safetensors", f"{tmp_path / 'grey.py'}:make")

    return write


@pytest.fixture
def line(grey: MakeGrey) -> Callable[..., Model]:
    """line([0.0, 1.0]): the model whose latents are the pixels, at input range [0, 1]."""

    def make(firsts: list[float], more: State | None = None) -> Model:
        made = grey(firsts, more=more)
        model = load_model(read_checkpoint(made.path), network=made.network)
        model.input_range = (0.0, 1.0)
        return model

    return make


@pytest.fixture
def grey_images() -> Callable[..., Images]:
    """grey_images([[0.2, 0.4], [0.6, 0.8]], ...): one image for each list of rows, as .npy files give them."""

    def make_images(*rows: list[list[float]]) -> Images:
        return Images(array_items("grey.npy", np.array(rows, dtype=np.float32)), channels=1)

    return make_images


@pytest.fixture
def tuned(line: Callable[..., Model], grey_images: Callable[..., Images]) -> Callable[..., tuple[Model, Any]]:
    """tuned(codes, counts, image, ..., steps=1): the model of `line` after a fine-tuning, and what that gave."""
    from runs import tune

    def run(codes: list[float], counts: list[int], *rows: list[list[float]], **settings: Any) -> tuple[Model, Any]:
        model = line(codes)
        return model, tune(model, grey_images(*rows), counts, **settings)

    return run


KEY = "quantizer.codebook.weight"
WriteMap = Callable[..., Path]


def save_map(
    path: Path,
    maps: dict[str, tuple[list[int], list[int]]],
    checkpoint: str = "nobody's",
    source: str = "",
    sizes: dict[str, int] | None = None,
) -> Path:
    """An index map as it lies beside a model. maps: index map and nearest by key, in the order of the stages. sizes: of
    the new codebooks, where some codes follow the last that an old one became."""
    tensors: dict[str, Tensor] = {}
    for key, pair in maps.items():
        tensors |= {f"{key}/{name}": torch.tensor(t) for name, t in zip(("index_map", "nearest"), pair, strict=True)}
    about = {
        "checkpoint_sha256": checkpoint,
        "source_sha256": source,
        "codebooks": json.dumps({key: max(nearest) + 1 for key, (_, nearest) in maps.items()} | (sizes or {})),
    }
    save_file(tensors, path, sealed(tensors, {PREFIX + name: value for name, value in about.items()}))
    return path


@pytest.fixture
def with_model(tmp_path: Path) -> WriteMap:
    """with_model("a", 8, ([0, ...], [0, ...]), source="..."): a model of 8 codes with its map; the map's path."""

    def write(name: str, size: int, pair: tuple[list[int], list[int]], source: str = "") -> Path:
        model = tmp_path / f"{name}.safetensors"
        save_file({KEY: torch.randn(size, 4)}, model)
        return save_map(index_map_path(model), {KEY: pair}, file_sha256(model), source, {KEY: size})

    return write
