"""What a user can mend: exit code 1, one line, and nothing written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GREY, KEY, MakeGrey, Patch, Run, State, WriteModel, assert_refused, contents, save_map
from safetensors.torch import load_file, save_file

from codebook_tools.checkpoints import write
from codebook_tools.models.demo import DEMO
from codebook_tools.models.families.zalando import CODEBOOK


def test_a_file_that_is_no_checkpoint_is_refused(codebook: Run, images_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(DEMO.read_bytes()[:-1000])
    before = contents(tmp_path)
    for command in ("inspect", "measure", "prune", "verify"):
        data = ("--data", images_folder) if command in ("measure", "prune") else ()
        assert_refused(codebook(command, path, *data), "truncated")
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
def test_a_pipe_is_not_waited_for(what: str, tiny: Path, codebook: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    piped = next(word for word in PIPED[what] if word.startswith("pipe"))
    np.save("tokens.npy", np.zeros(3, np.int16))
    save_map(Path("map.safetensors"), {KEY: ([0], [0])})
    os.mkfifo(piped)
    before = os.listdir()
    found = codebook(*(str(tiny) if word == "MODEL" else word for word in PIPED[what]))
    assert_refused(found, f"{piped}: it is no regular file (a pipe or a device); save it to a file first")
    assert os.listdir() == before


BAD_STATES: dict[str, tuple[dict[str, torch.Tensor], str, str]] = {
    "no codebook": ({}, CODEBOOK, "has no codebook: "),
    "two codebooks": (
        {"quantize_b.embedding.weight": torch.ones(16, 4)}, "",
        "2 codebooks, and this takes one: choose with --codebook-key, of _vq_vae._embedding.weight, quantize_b.",
    ),
    "a layer missing": ({}, "_decoder._conv_1.weight", "no network is known for the layout"),
    "a shape that does not fit": ({"_decoder._conv_1.bias": torch.ones(9)}, "", "shapes differ: _decoder._conv_1.bias"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_STATES)
def test_a_checkpoint_that_cannot_be_worked_on_is_refused(
    kind: str, codebook: Run, write_model: WriteModel, variants: dict[str, State], images_folder: Path, tmp_path: Path
) -> None:
    changes, missing, message = BAD_STATES[kind]
    state = variants["plain"] | changes
    model = write_model(state={key: tensor for key, tensor in state.items() if key != missing})
    before = contents(tmp_path)
    assert_refused(codebook("prune", model, "--data", images_folder), message)
    assert contents(tmp_path) == before
    assert codebook("inspect", model).exit_code == 0  # it always lists


def test_what_may_be_a_codebook_is_worked_on_when_named(grey: MakeGrey, codebook: Run, tmp_path: Path) -> None:
    state = load_file(grey([i / 15 for i in range(16)]).path)
    state["emb.weight"] = state.pop(KEY)
    save_file(state, tmp_path / "low.safetensors")
    own = GREY.replace("self.quantizer.codebook", "self.emb").replace("self.quantizer = nn.Module()", "pass")
    (tmp_path / "own.py").write_text(own)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8))
    model, data = tmp_path / "low.safetensors", ("--data", tmp_path / "images.npy")
    assert codebook("inspect", model, "--json").json["codebooks"][0]["confidence"] == "low"
    asked = ("prune", model, "--network", f"{tmp_path}/own.py:make", *data)
    assert_refused(codebook(*asked), "emb.weight is only perhaps a codebook; if it is, say so with --codebook-key")
    assert codebook(*asked, "--codebook-key", "emb.weight").exit_code == 0


BAD_OPTIONS: dict[str, tuple[list[object], str]] = {
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
def test_a_value_that_cannot_be_is_refused_with_its_limit(kind: str, on_tiny: Run, tmp_path: Path) -> None:
    words, message = BAD_OPTIONS[kind]
    assert_refused(on_tiny(*words, "--json"), message)
    assert [*contents(tmp_path)] == ["tiny.safetensors"]


NETWORKS = {
    "names that do not fit": (GREY.replace("self.encoder", "self.enc"), "the network wants enc.weight, which "),
    "a message of many lines": ("raise ValueError('one\\ntwo\\n\\nthree')", "ValueError: one two three"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_that_does_not_do_is_refused(kind: str, grey: MakeGrey, codebook: Run, tmp_path: Path) -> None:
    source, message = NETWORKS[kind]
    made = grey([0.0, 0.5, 1.0])
    (tmp_path / "own.py").write_text(source)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8))
    before = contents(tmp_path)
    network = f"{tmp_path / 'own.py'}:make"
    assert_refused(codebook("prune", made.path, "--network", network, "--data", tmp_path / "images.npy"), message)
    assert {name: data for name, data in contents(tmp_path).items() if "__pycache__" not in name} == before


@pytest.mark.parametrize(
    ("output", "message"),
    [("gone/out.safetensors", "no such folder: "), ("out.pt", "does not end in .safetensors"), ("out.safetensors", "")],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_data_that_are_missing_too(
    output: str, message: str, tiny: Path, codebook: Run, tmp_path: Path, monkeypatch: Patch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr(write, "TemporaryFile", refuse)  # permissions do not stop the superuser, whom CI may run as
    before = contents(tmp_path)
    refused = codebook("prune", tiny, "--data", "nowhere", "-o", tmp_path / output)
    assert_refused(refused, message or f"cannot write in {tmp_path}")
    assert contents(tmp_path) == before


def test_the_model_itself_is_never_overwritten(tiny: Path, on_tiny: Run) -> None:
    before = tiny.read_bytes()
    for output in (tiny, tiny.parent / ".." / tiny.parent.name / tiny.name):
        assert_refused(on_tiny("prune", "-o", output, "--force"), "is the model itself")
    assert tiny.read_bytes() == before
