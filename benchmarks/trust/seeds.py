"""Sound files of every kind that is read, and what strangers put in the place of their values: fuzzing begins here."""

from __future__ import annotations

import argparse
import contextlib
import enum
import io
import json
import os
import tarfile
import wave
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from codebook_tools.checkpoints.layout import PREFIX
from codebook_tools.remapping.index_map import IndexMap

State = dict[str, torch.Tensor]

DEEP = "[" * 3000

STRANGE: tuple[object, ...] = (
    *(None, True, -1, 0, 0.5, float("inf"), float("nan"), 10**12, 2**63, 10**40),
    *("", "\ud800", "../x", [], {}),
)

STRANGE_TEXTS = ("", "{", "null", "[]", "{}", "0", "-1", "x/y", "0/0", '{"q": 1e999}', '[["q"]]', DEEP, "9" * 5000)


def twisted(told: object) -> Iterator[object]:
    """The object with one value in it, or in what it holds, replaced or left out, in every way."""
    yield from STRANGE
    keys: Iterable[Any] = told if isinstance(told, dict) else range(len(told)) if isinstance(told, list) else ()
    for key in keys:
        container: Any = told
        without = copy(container)
        del without[key]
        yield without
        for other in twisted(container[key]):
            changed = copy(container)
            changed[key] = other
            yield changed


def with_twists(texts: Iterable[bytes]) -> list[bytes]:
    """JSON texts, and all that their values could be."""
    texts = list(texts)
    others = [json.dumps(other).encode() for text in texts for other in twisted(json.loads(text))]
    return [*texts, *dict.fromkeys(others), DEEP.encode()]


def saved_with_twists(tensors: State, about: Mapping[str, str]) -> list[bytes]:
    """A sealed file with metadata, each of which is missing once, and once each strange text."""
    from codebook_tools.checkpoints.sealed_file import sealed

    without = [{k: v for k, v in about.items() if k != name} for name in about]
    others = [{**about, name: text} for name in about for text in STRANGE_TEXTS]
    missing = [{k: v for k, v in tensors.items() if k != name} for name in tensors]
    odd = [{**tensors, name: other} for name in tensors for other in ODD_TENSORS]
    twisted = [(tensors, a) for a in (about, *without, *others)] + [(t, about) for t in missing + odd]
    return [save(t, sealed(t, a)) for t, a in twisted]


ODD_TENSORS = (
    torch.zeros(0),
    torch.zeros(1, dtype=torch.bool),
    torch.full((3,), torch.nan),
    torch.full((2, 2), -1),
    torch.full((3,), 2**62),
    torch.zeros(3, dtype=torch.float16),
    torch.zeros(1, 1, 1, 1),
)

YAML_BOMB = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)
)

YAML_BOMB += b"surgeries: [*a11]\n"

COUNTS = "_vq_vae._ema_cluster_size"


def state(size: int = 4) -> State:
    """A few tensors, one of them a codebook, of every kind of number."""
    return {
        "quantize.embedding.weight": torch.arange(size * 3).reshape(size, 3).float(),
        "encoder.weight": torch.ones(2, 3, 1, 1, dtype=torch.float16),
        "decoder.bias": torch.zeros(2, dtype=torch.bfloat16),
        COUNTS: torch.ones(size),
        "steps": torch.tensor(7),
    }


def safetensors_files() -> list[bytes]:
    return [save(state(), {"format": "pt"}), save({"a": torch.zeros(0, 2)}), save({})]


def headers() -> list[bytes]:
    return with_twists(data[8 : 8 + int.from_bytes(data[:8], "little")] for data in safetensors_files())


def with_length(header: bytes) -> bytes:
    """The header in front of as many bytes as it asks for, up to a kilobyte."""
    ends = [0]
    with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError, IndexError):
        ends += [its["data_offsets"][1] for name, its in json.loads(header).items() if name != "__metadata__"]
    asked = max((end for end in ends if type(end) is int), default=0)
    return len(header).to_bytes(8, "little") + header + bytes(min(max(asked, 0), 1024))


class Kind(enum.Enum):
    """As in someone's config."""

    FIRST = "first"


HARMLESS: dict[str, object] = {
    "args": argparse.Namespace(lr=1e-4, kind=Kind.FIRST),
    "losses": defaultdict(list, {Kind: [np.float64(1)]}),
    "output": PurePosixPath("a/b"),
}
"""Objects beside the weights that are read as stand-ins."""


def saved_by_torch(zipped: bool = True, beside: Mapping[str, object] = {}) -> bytes:
    into = io.BytesIO()
    torch.save({"state_dict": state(), "epoch": 3, **beside}, into, _use_new_zipfile_serialization=zipped)
    return into.getvalue()


def pickled(beside: Mapping[str, object] = {}) -> bytes:
    """The pickle in a zip of torch.save."""
    with zipfile.ZipFile(io.BytesIO(saved_by_torch(beside=beside))) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.read(name)


def zipped(pickle: bytes) -> bytes:
    """A file of torch.save around another pickle."""
    into = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved_by_torch())) as archive, zipfile.ZipFile(into, "w") as written:
        for name in archive.namelist():
            written.writestr(name, pickle if name.endswith("data.pkl") else archive.read(name))
    return into.getvalue()


def index_files() -> list[bytes]:
    names = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    others = [{"a": "../x.safetensors"}, {"a": "link.safetensors"}, {"a": "folder.safetensors"}, {"a": "/etc/passwd"}]
    told = [{"metadata": {"total_size": 8}, "weight_map": names}, *({"weight_map": other} for other in others)]
    return with_twists(json.dumps(one).encode() for one in told)


def shards(folder: Path) -> None:
    """Two shards, a link out of the folder, a loop of links and a folder with a shard's name."""
    for i, key in enumerate("ab", 1):
        (folder / f"m-0000{i}-of-00002.safetensors").write_bytes(save({key: torch.zeros(1)}))
    (folder / "folder.safetensors").mkdir()
    for link, target in (("link", "/etc/hostname"), ("loop", "loop.safetensors")):
        os.symlink(target, folder / f"{link}.safetensors")


VQMODEL: dict[str, object] = {
    "_class_name": "VQModel",
    "act_fn": "silu",
    "block_out_channels": [4],
    "down_block_types": ["DownEncoderBlock2D"],
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "norm_type": "group",
    "num_vq_embeddings": 8,
    "out_channels": 3,
    "sample_size": 8,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"],
    "vq_embed_dim": None,
    "mid_block_add_attention": True,
    "lookup_from_codebook": False,
    "force_upcast": False,
}


def vqmodel(folder: Path) -> None:
    """The weights that go with that config."""
    import diffusers

    torch.manual_seed(0)
    asked = {name: value for name, value in VQMODEL.items() if not name.startswith("_")}
    diffusers.VQModel(**asked).save_pretrained(folder)


def pictures() -> list[bytes]:
    def encoded(mode: str, size: tuple[int, int], kind: str, **options: Any) -> bytes:
        into = io.BytesIO()
        Image.effect_noise(size, 60).convert(mode).save(into, kind, **options)
        return into.getvalue()

    frames = [Image.new("P", (4, 4), i) for i in range(3)]
    moving = io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    return [
        encoded("RGB", (9, 7), "PNG"),
        encoded("RGBA", (5, 5), "PNG"),
        encoded("P", (5, 5), "PNG"),
        encoded("I;16", (5, 5), "PNG"),
        encoded("RGB", (16, 16), "JPEG"),
        encoded("CMYK", (16, 16), "JPEG"),
        encoded("L", (1, 1), "BMP"),
        encoded("RGB", (8, 8), "TIFF"),
        encoded("RGB", (8, 8), "TIFF", compression="tiff_lzw"),
        encoded("RGB", (8, 8), "WEBP"),
        moving.getvalue(),
    ]


def tars() -> list[bytes]:
    def packed(*members: tuple[str, bytes, bytes, str]) -> bytes:
        into = io.BytesIO()
        with tarfile.open(fileobj=into, mode="w") as archive:
            for name, kind, content, link in members:
                member = tarfile.TarInfo(name)
                member.type, member.size, member.linkname = kind, len(content), link
                archive.addfile(member, io.BytesIO(content))
        return into.getvalue()

    png = pictures()[0]
    return [
        packed(("a.png", tarfile.REGTYPE, png, ""), ("b/c.png", tarfile.REGTYPE, png, "")),
        packed(("../../out.png", tarfile.REGTYPE, png, ""), ("/root.png", tarfile.REGTYPE, png, "")),
        packed(("l.png", tarfile.SYMTYPE, b"", "/etc/passwd"), ("h.png", tarfile.LNKTYPE, b"", "../x")),
        packed(("d.png", tarfile.CHRTYPE, b"", ""), ("f.png", tarfile.FIFOTYPE, b"", "")),
    ]


def numpy_file(array: Any, kind: str = "npy", pickle: bool = False) -> bytes:
    into = io.BytesIO()
    if kind == "npy":
        np.save(into, array, allow_pickle=pickle)
    else:
        np.savez_compressed(into, array)
    return into.getvalue()


def image_arrays(kind: str) -> list[bytes]:
    square = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    return [
        numpy_file(square, kind),
        numpy_file(square[..., 0].astype(np.float32) / 255, kind),
        numpy_file(np.array([{"a": 1}], dtype=object), kind, pickle=True),
        without_arrays(),
    ]


def without_arrays() -> bytes:
    """A zip of text, as a .npz may be."""
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w") as archive:
        archive.writestr("a.txt", "hello")
    return into.getvalue()


def waveforms() -> list[bytes]:
    import soundfile

    found = []
    for kind, subtype in (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("WAV", "PCM_24")):
        into = io.BytesIO()
        soundfile.write(into, np.sin(np.arange(400) / 7) * 0.5, 1600, format=kind, subtype=subtype)
        found.append(into.getvalue())
    plain = io.BytesIO()
    with wave.open(plain, "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(400))
    flac = found[2]
    endless = flac[:21] + bytes([flac[21] | 15]) + b"\xff" * 4 + flac[26:]  # 2 ** 36 - 1 samples, says its header
    return [*found, plain.getvalue(), endless]


def latent_files(kind: str) -> list[bytes]:
    rows = np.arange(120, dtype=np.float32).reshape(30, 4)
    if kind == "npy":
        halves = [numpy_file(rows.astype(np.float16)), numpy_file(np.array([{}], dtype=object), pickle=True)]
        return [numpy_file(rows), *halves]
    return [save({"latents": torch.from_numpy(rows)})]


MAP = IndexMap("q", torch.tensor([0, -1, 1, 2]), torch.tensor([0, 0, 1, 2]), 3)


def map_files() -> list[bytes]:
    tensors = {"q/index_map": MAP.index_map, "q/nearest": MAP.nearest}
    about = {"checkpoint_sha256": "0" * 64, "source_sha256": "1" * 64, "codebooks": '{"q": 3}'}
    return saved_with_twists(tensors, {PREFIX + name: value for name, value in about.items()})


def token_files(kind: str) -> list[bytes]:
    ids = np.array([[0, 2, 3], [3, 0, 0]])
    if kind == "npy":
        return [numpy_file(ids), numpy_file(np.asfortranarray(ids).astype(np.int16)), numpy_file(ids.astype(">i4"))]
    if kind == "safetensors":
        return [save({"tokens": torch.from_numpy(ids)})]
    if kind == "jsonl":
        lines = [{"item": "a", "codes": ids.tolist()}, {"item": "b", "codes": [3, 0]}]
        return ["".join(json.dumps(line) + "\n" for line in lines).encode()]
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        into = io.BytesIO()
        parquet.write_table(pa.table({"id": ["x", "y"], "tokens": ids.tolist()}), into)
        return [into.getvalue()]
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w") as archive:
        for name in ("a.npy", "b.npy"):
            content = numpy_file(ids)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return [into.getvalue()]


def stats_files() -> list[bytes]:
    tensors = {
        "q/counts": torch.tensor([3, 0, 1]),
        "q/squared_error": torch.zeros(3, dtype=torch.float64),
        "q/sample": torch.zeros(4, 2),
        "q/sample_hashes": torch.arange(4).view(torch.int64),
        "measured/integers": torch.arange(8),
        "measured/floats": torch.zeros(9, dtype=torch.float64),
    }
    about = {
        "checkpoint_sha256": "0" * 64,
        "split": "calibration",
        "images": "4",
        "shard": "1/1",
        "codebooks": '[["q", 3, 2]]',
        "about": "{}",
        "bad": "{}",
    }
    return saved_with_twists(tensors, {PREFIX + name: value for name, value in about.items()})


TRACE = [{"step": step, "loss": 1.0, "validation_mse": 0.5, "used": 3, "perplexity": 2.0, "distortion": 1.0,
          "revived": 0, "validation_loss": None} for step in (0, 1, 10)]  # fmt: skip


def results() -> list[bytes]:
    books = [{"size": 4, "latents": 64, "used": 3}]
    told = {
        "command": "refit",
        "trace": TRACE,
        "stages": {"before": None, "surgery": {"codebooks": books}},
        "settings": {"lr": 0.001, "images": {"train": 8, "validation": 1, "test": 2}},
    }
    return with_twists([json.dumps(told).encode(), json.dumps(TRACE).encode()])


def unfinished() -> list[bytes]:
    about = {"made_with": '{"k": 4}', "trace": json.dumps(TRACE), "begun_with": "0" * 64, "best": "10"}
    best = {"best/weights/a": torch.zeros(1), "best/vectors/0": torch.ones(2, 2)}
    return saved_with_twists({"training/codes": torch.zeros(2, 2), **best}, about)


def recipes() -> list[bytes]:
    return [
        b"model: a.safetensors\ndata: images/\nseed: 1\nsurgeries:\n- prune\n- refit: {k: 128, steps: 10}\n",
        b"surgeries: [{quantize: {bits: 8}}, finetune, {grow: {k: 9}}]\n",
        b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\nsurgeries: [*a]\n",
        YAML_BOMB,
        b"surgeries: [!!python/object/apply:os.system [touch x]]\n",
        *with_twists([b'{"data": "x", "surgeries": ["prune", {"refit": {"k": 128, "steps": 10, "lr": 0.1}}]}']),
    ]


def rows() -> list[bytes]:
    use = {"key": "q", "size": 4, "dim": 2, "latents": 9, "used": 3, "usage": 0.75, "used_10": 0, "perplexity": 2.0,
           "bits": 1.0, "top_share": 0.5, "distortion": 1.0, "coverage": None}  # fmt: skip
    stage: dict[str, object] = {"split": "test", "images": 3, "mse": 0.1, "psnr": 10.0, "ssim": None, "sharpness": None}
    stage["codebooks"] = [use]
    row = {"strategy": "refit", "k": 4, "seed": 0, "stages": {"before": stage, "surgery": None, "finetuned": None},
           "kept": None, "seconds": 1.0, "bytes": 9, "error": None, "made_with": "x"}  # fmt: skip
    return with_twists([json.dumps({"rows": [row]}).encode()])
