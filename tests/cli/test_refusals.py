"""What a user can mend: exit code 1, one line, and nothing written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GREY, KEY, Grey, Run, State, WriteModel, assert_refused, contents, save_map
from safetensors.torch import save_file

from codebook_tools.checkpoints import write
from codebook_tools.models.demo import DEMO
from codebook_tools.models.families.zalando import CODEBOOK

RANGE = ("--input-range", "-1,1")


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such file": (lambda path: None, "no such file: "),
    "a directory": (lambda path: path.mkdir(), "is a directory"),
    "a web page": (lambda path: path.write_text("<html>\n<body>404\nNot found</body>"), "HTML"),
    "truncated": (lambda path: path.write_bytes(DEMO.read_bytes()[:-1000]), "truncated"),
}


@pytest.mark.parametrize(
    ("kind", "command"),
    [*((kind, "inspect") for kind in BAD_MODELS), *(("truncated", name) for name in ("measure", "prune", "verify"))],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    kind: str, command: str, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    make, message = BAD_MODELS[kind]
    path = tmp_path / "model.safetensors"
    make(path)
    before = contents(tmp_path)
    data = ("--data", images_folder) if command in ("measure", "prune") else ()
    assert_refused(codebook(command, path, *data), message)
    assert contents(tmp_path) == before


PIPED: dict[str, tuple[str, ...]] = {
    "a model": ("inspect", "pipe"),
    "a result": ("verify", "pipe"),
    "counts": ("prune", "MODEL", "--stats", "pipe"),
    "a part": ("measure", "MODEL", "--merge", "pipe"),
    "latents": ("measure", "MODEL", "--latents", "pipe.npy", "--stats", "x.safetensors"),
    "a picture": ("measure", "MODEL", "--data", "pipe.png"),
    "an array": ("measure", "MODEL", "--data", "pipe.npy"),
    "a tar": ("measure", "MODEL", "--data", "pipe.tar"),
    "tokens": ("remap", "pipe.npy", "--map", "map.safetensors"),
    "a tar of tokens": ("remap", "pipe.tar", "--map", "map.safetensors"),
    "a table": ("remap", "pipe.parquet", "--map", "map.safetensors"),
    "a map": ("remap", "tokens.npy", "--map", "pipe"),
    "a trace": ("diagnose", "MODEL", "--trace", "pipe"),
    "a recipe": ("run", "pipe", "MODEL"),
}


@pytest.mark.parametrize("what", PIPED)
def test_a_pipe_is_refused_and_not_waited_for(
    what: str, tiny: Path, codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    piped = next(word for word in PIPED[what] if word.startswith("pipe"))
    np.save("tokens.npy", np.zeros(3, np.int16))
    save_map(Path("map.safetensors"), {KEY: ([0], [0])})
    os.mkfifo(piped)
    before = os.listdir()
    found = codebook(*(str(tiny) if word == "MODEL" else word for word in PIPED[what]))
    assert_refused(found, f"{piped}: it is no regular file (a pipe or a device); save it to a file first")
    assert os.listdir() == before


def state_of(variants: dict[str, State], **changes: torch.Tensor | None) -> State:
    state = dict(variants["plain"]) | changes
    return {key: tensor for key, tensor in state.items() if tensor is not None}


BAD_STATES: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "no codebook": ({CODEBOOK: None}, "has no codebook: "),
    "two codebooks": (
        {"quantize_b.embedding.weight": torch.ones(16, 4)},
        "2 codebooks, and this takes one: choose with --codebook-key, of _vq_vae._embedding.weight, quantize_b.",
    ),
    "NaN": ({"_decoder._conv_1.bias": torch.full((8,), torch.nan)}, "_decoder._conv_1.bias in "),
    "a layer missing": ({"_decoder._conv_1.weight": None}, "no network is known for the layout"),
    "a shape that does not fit": ({"_decoder._conv_1.bias": torch.ones(9)}, "shapes differ: _decoder._conv_1.bias"),
}


@pytest.mark.parametrize("kind", BAD_STATES)
def test_a_checkpoint_that_cannot_be_worked_on_is_refused(
    kind: str, codebook: Run, write_model: WriteModel, variants: dict[str, State], images_folder: Path, tmp_path: Path
) -> None:
    changes, message = BAD_STATES[kind]
    model = write_model(state=state_of(variants, **changes))
    before = contents(tmp_path)
    assert_refused(codebook("prune", model, "--data", images_folder), message)
    assert contents(tmp_path) == before
    assert codebook("inspect", model).exit_code == 0  # it always lists


def test_a_low_confidence_codebook_is_operated_on_only_when_it_is_named(codebook: Run, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(GREY.replace("self.quantizer.codebook", "self.emb").replace(
        "self.quantizer = nn.Module()", "pass"))  # fmt: skip
    state = {
        "encoder.weight": torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1),
        "decoder.weight": torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1),
        "emb.weight": torch.stack([torch.linspace(0, 1, 16), torch.zeros(16)], 1),
    }
    save_file(state, tmp_path / "low.safetensors")
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8))
    assert codebook("inspect", tmp_path / "low.safetensors", "--json").json["codebooks"][0]["confidence"] == "low"
    asked = ("prune", tmp_path / "low.safetensors", "--network", f"{tmp_path}/own.py:make",
             "--data", tmp_path / "images.npy")  # fmt: skip
    assert_refused(codebook(*asked), "emb.weight is only perhaps a codebook; if it is, say so with --codebook-key")
    assert codebook(*asked, "--codebook-key", "emb.weight").exit_code == 0


BAD_OPTIONS: dict[str, tuple[list[object], str]] = {
    "k over the distinct latents": (["refit", "--k", 5000], "k=5000 asks for more codes than the 912 distinct latents"),
    "a threshold beyond counting": (["prune", "--threshold", 10**24], "is more than can be counted"),
    "no batch": (["measure", "--batch-size", 0], "batch-size=0 is below 1"),
    "no images": (["measure", "--limit", 0], "limit=0 is below 1"),
    "a side of no image": (["measure", "--size", 10**5], "--size 100000 is longer than 16384 pixels"),
    "workers beyond number": (["measure", "--workers", 10**12], "is not within 0 and 1024"),
    "smaller than the stride": (["measure", "--size", 3], "smaller than the model's stride of 4"),
    "a negative seed": (["refit", "--k", 4, "--seed", -1], "seed=-1 is not within 0 and"),
    "no range": (["measure", "--input-range", "wide"], "--input-range wide: expected two numbers, such as 0,1"),
    "a range upside down": (["measure", "--input-range", "1,-1"], "the first number must be the smaller one"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_a_value_that_cannot_be_is_refused_with_its_limit(
    kind: str, tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    (command, *options), message = BAD_OPTIONS[kind]
    before = contents(tmp_path)
    assert_refused(codebook(command, tiny, "--data", images_folder, *RANGE, *options, "--json"), message)
    assert contents(tmp_path) == before


def test_cuda_is_refused_where_there_is_none(
    tiny: Path, codebook: Run, images_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(codebook("measure", tiny, "--data", images_folder, "--device", "cuda"), "use --device cpu or auto")


def test_data_that_cannot_be_used_are_refused(tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.txt").touch()
    (tmp_path / "data.tar").write_bytes(b"\x1f\x8b\x08\x00" * 200)
    before = contents(tmp_path)
    for name, message in {
        "missing": "no such file or folder: ",
        "empty": "no images in ",
        "data.txt": "is no image source",
        "data.tar": "is not a readable, uncompressed tar",
    }.items():
        assert_refused(codebook("prune", tiny, "--data", tmp_path / name, *RANGE), message)
    shared = ("--data", images_folder, "--test-data", images_folder / "a")
    assert_refused(codebook("prune", tiny, *shared, *RANGE), "is also in --data")
    assert contents(tmp_path) == before


NETWORKS = {
    "names that do not fit": (GREY.replace("self.encoder", "self.enc"), "the network wants enc.weight, which "),
    "NaN latents": (GREY.replace("(images)", "(images) * float('nan')"), "latents are not finite"),
    "a message of many lines": ("raise ValueError('one\\ntwo\\n\\nthree')", "ValueError: one two three"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_that_does_not_do_is_refused_with_the_reason(
    kind: str, grey: Callable[..., Grey], codebook: Run, tmp_path: Path
) -> None:
    source, message = NETWORKS[kind]
    made = grey([0.0, 0.5, 1.0])
    (tmp_path / "own.py").write_text(source)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8))
    before = contents(tmp_path)
    network = f"{tmp_path / 'own.py'}:make"
    assert_refused(codebook("prune", made.path, "--network", network, "--data", tmp_path / "images.npy"), message)
    assert {name: data for name, data in contents(tmp_path).items() if "__pycache__" not in name} == before


@pytest.mark.parametrize("kind", ["no folder", "a folder", "not writable", "no safetensors"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    kind: str, tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, message = {
        "no folder": (tmp_path / "gone" / "out.safetensors", "no such folder: "),
        "a folder": (images_folder, "is a directory; name a file with --output"),
        "not writable": (tmp_path / "out.safetensors", f"cannot write in {tmp_path}"),
        "no safetensors": (tmp_path / "out.pt", "does not end in .safetensors"),
    }[kind]
    if kind == "not writable":

        def refuse(**_: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

        # permissions do not stop the superuser, whom CI may run as
        monkeypatch.setattr(write, "TemporaryFile", refuse)
    before = contents(tmp_path)
    # The data are missing too: the output is looked at first.
    assert_refused(codebook("prune", tiny, "--data", "nowhere", "-o", output), message)
    assert contents(tmp_path) == before


def test_the_model_itself_is_never_overwritten(tiny: Path, codebook: Run, images_folder: Path) -> None:
    before = tiny.read_bytes()
    for output in (tiny, tiny.parent / ".." / tiny.parent.name / tiny.name):
        refused = codebook("prune", tiny, "--data", images_folder, *RANGE, "-o", output, "--force")
        assert_refused(refused, "is the model itself")
    assert tiny.read_bytes() == before
