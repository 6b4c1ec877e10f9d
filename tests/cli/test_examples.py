"""What --help and the documents show works as it is typed."""

from __future__ import annotations

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from codebook_cli.app import app
from conftest import Outcome, Run
from PIL import Image
from places import ROOT
from sources_of_images import Images

from codebook_tools.data.images import sample_images
from codebook_tools.models.demo import DEMO
from codebook_tools.workflows import latent_map

sys.path.append(str(ROOT / "benchmarks"))
transcripts = import_module("transcripts")

BEFORE = {
    "verify": "codebook refit model.safetensors --k 128 --data images/ --steps 2",
    "diagnose": "codebook refit model.safetensors --k 128 --data images/ --steps 2",
    "decode": "codebook encode model.safetensors --data images/ -o codes.npy",
    "remap": "codebook prune model.safetensors --keep 86 --data images/",
}
"""What must have been done for an example to have its files."""

MY_MODEL = """
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.models.demo import DEMO
from codebook_tools.models.families.zalando import CODEBOOK
from codebook_tools.models.networks.zalando import ZalandoVQVAE


def make(codebook_size):
    shapes = read_checkpoint(DEMO).shapes
    return ZalandoVQVAE(shapes, (codebook_size, shapes[CODEBOOK][1]))
"""
TRAIN = ("refit", "grow", "condense", "restart", "finetune", "compare")
NOT_AT_HAND = (
    "vqgan/",
    "$",
    "--merge",
    "all.safetensors",
    "--map a.",
    "shards/",
    "prior/ --map",
    "rqvae.pt",
    "motion.",
    "eeg.",
)


def examples() -> dict[str, str]:
    """By command."""
    group = typer.main.get_group(app)
    epilogs = {name: command.epilog or "" for name, command in group.commands.items()}
    return {name: epilog.removeprefix("Example: ") for name, epilog in epilogs.items()}


def blocks(document: str, language: str = "") -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    fenced: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [content for name, content in fenced if name == language]


def lines_of(document: str) -> list[str]:
    """Commands whose files are at hand."""
    lines = [line.partition("   #")[0].strip() for block in blocks(document) for line in block.splitlines()]
    return [line for line in lines if line.startswith("codebook ") and not any(file in line for file in NOT_AT_HAND)]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model, images, held-out images, tokens and a prior that the examples name."""
    from transformers import GPT2Config, GPT2LMHeadModel

    (tmp_path / "model.safetensors").write_bytes(DEMO.read_bytes())
    items = sample_images()[::38]
    _, pixels = Images(items, channels=3).load(items)
    for folder, some in (("images", pixels[:70]), ("held-out", pixels[70:80])):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(some):
            shown = (image * 255).round().byte().movedim(0, -1).numpy()
            Image.fromarray(shown).save(tmp_path / folder / f"{i:03d}.png")
    np.save(tmp_path / "tokens.npy", np.zeros((2, 64), dtype=np.int64))  # of a code that pruning keeps
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=8, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "prior")
    monkeypatch.setattr(latent_map, "find_spec", lambda name: None)  # UMAP takes minutes, and has a test of its own
    recipe = "model: model.safetensors\ndata: images/\nsurgeries: [prune, {refit: {k: 64, steps: 2}}]\n"
    (tmp_path / "my_model.py").write_text(MY_MODEL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(line: str, codebook: Run) -> Outcome:
    """A line as it stands, but with two steps of fine-tuning and one seed."""
    command, *options = shlex.split(line)[1:]
    less = (("--steps", 2) if command in TRAIN else ()) + (("--seeds", 1) if command == "compare" else ())
    return codebook(command, *options, *less)


def test_every_command_has_an_example_of_itself() -> None:
    for name, example in examples().items():
        assert example.startswith(f"codebook {name} "), name


def words_of(line: str) -> list[str]:
    """In one order, for a line says the same in any."""
    return sorted(shlex.split(line))


IN_README = [words_of(line) for line in lines_of("README.md")]


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name, line in examples().items() if words_of(line) not in IN_README])
def test_the_example_of_a_command_works(command: str, desk: Path, codebook: Run) -> None:
    if command in BEFORE:
        assert typed(BEFORE[command], codebook).exit_code == 0
    found = typed(examples()[command], codebook)
    assert found.exit_code in ((0, 3) if command == "diagnose" else (0,)), found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "docs/guide.md", "docs/choosing-k.md"])
def test_the_commands_of_a_document_work_in_their_order(document: str, desk: Path, codebook: Run) -> None:
    lines = lines_of(document)
    assert lines
    for line in lines:
        if line.startswith("codebook remap"):
            continue  # of ids that only a tokenizer gives; the example of remap is run above
        found = typed(line, codebook)
        assert found.exit_code in ((0, 3) if "diagnose" in line else (0,)), (line, found.stderr)


@pytest.mark.slow
def test_the_tutorial_works_as_it_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codebook: Run) -> None:
    """On some of its images, to be quick about it."""
    monkeypatch.chdir(tmp_path)
    lines = transcripts.commands((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    assert len(lines) >= 9
    for line in lines:
        command = line.partition(" | ")[0]
        few = "" if command.split()[1] in ("inspect", "verify") else " --limit 80"
        found = typed(command + few, codebook)
        assert found.exit_code in ((0, 3) if "diagnose" in line else (0,)), (line, found.stderr)


def test_a_transcript_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    page = "Text.\n\n```console\n$ echo one\nold\nolder\n$ echo two > file; cat file\n```\n\n```\n$ not run\n```\n"
    assert transcripts.filled(page, tmp_path) == page.replace("old\nolder", "one").replace(
        "file\n```", "file\ntwo\n```"
    )


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "docs/python.md"])
def test_the_python_of_a_document_works(document: str, desk: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks(document, "python"):
        exec(compile(block.replace("steps=1000", "steps=2"), document, "exec"), names)
    assert (desk / "repaired.safetensors").exists()
