"""What a file tells of its codebooks by itself, as every command that shows them says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors.torch import save_file
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.models.evidence import alive, uninitialized, untrained
from codebook_tools.models.initialization import as_initialized
from codebook_tools.models.registry import detected

KEY = "quantizer.codebook.weight"
DRAWN = (torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1) / 64


def file_of(folder: Path, codes: Tensor, **beside: Tensor) -> Path:
    """A model of these codes; beside it lie 200 latents, in z.safetensors."""
    path = folder / "model.safetensors"
    named = {f"quantizer.{name}": tensor for name, tensor in beside.items()}
    save_file({KEY: codes.contiguous(), "encoder.conv.weight": torch.rand(8, 3, 3, 3), **named}, path)
    save_file({"latents": fitted(200)}, folder / "z.safetensors")
    return path


def fitted(size: int, dim: int = 8) -> Tensor:
    """Codes that spread unevenly, around a mean, as trained ones do."""
    torch.manual_seed(0)
    return torch.randn(size, dim) * torch.linspace(2, 0.2, dim) + torch.linspace(1, -1, dim)


def messages(path: Path) -> list[str]:
    checkpoint = read_checkpoint(path)
    books = detected(checkpoint).codebooks
    return [*uninitialized(checkpoint, books), *untrained(checkpoint, books)]


@pytest.mark.parametrize(("dtype", "dead"), [(torch.float32, 0.0), (torch.bfloat16, 1e-4), (torch.float64, 0.0)])
def test_living_codes_are_counted_without_data(dtype: torch.dtype, dead: float, tmp_path: Path, codebook: Run) -> None:
    counts = torch.full((1024,), dead)
    counts[100:110] = torch.linspace(3, 900, 10)
    path = file_of(tmp_path, fitted(1024).to(dtype), cluster_size=counts.to(dtype), initted=torch.ones(1))
    assert messages(path) == []  # of a trained codebook
    assert "10 of 1,024 alive by its own counts" in codebook("inspect", path).stdout
    (book,) = codebook("inspect", path, "--json").json["codebooks"]
    assert book["alive"] == 10
    measured = codebook("measure", path, "--latents", tmp_path / "z.safetensors", "--metric", "euclidean", "--json")
    assert f"{KEY}: 10 of 1,024 alive by its own counts" in measured.json["warnings"]


@pytest.mark.parametrize("counts", [torch.zeros(32), torch.ones(32), torch.full((32,), torch.nan)])
def test_counts_of_no_training_say_nothing(counts: Tensor, tmp_path: Path, codebook: Run) -> None:
    path = file_of(tmp_path, fitted(32), cluster_size=counts)
    assert "alive" not in codebook("inspect", path).stdout
    checkpoint = read_checkpoint(path)
    assert alive(checkpoint, detected(checkpoint).codebooks[0]) is None


UNTRAINED: dict[str, tuple[Tensor, dict[str, Tensor]]] = {
    f"{KEY} is all zeros: no training has reached it": (torch.zeros(32, 8), {}),
    f"all 32 codes of {KEY} are the same": (torch.ones(32, 8), {}),
    "as an initialization draws": (DRAWN, {}),
    f"quantizer.initted is 0: {KEY} is not initialized": (fitted(64), {"initted": torch.zeros(1)}),
}


@pytest.mark.parametrize("text", UNTRAINED)
def test_what_no_training_has_reached_is_said_where_codes_are_shown(text: str, tmp_path: Path, codebook: Run) -> None:
    codes, beside = UNTRAINED[text]
    path = file_of(tmp_path, codes, **beside)
    assert [line for line in messages(path) if text in line]
    assert text in " ".join(codebook("inspect", path).stdout.split())
    words = (path, "--latents", tmp_path / "z.safetensors", "--metric", "euclidean", "--json")
    for command in ("measure",) if "draws" in text else ("measure", "prune"):
        output = ("-o", tmp_path / "out.safetensors") if command == "prune" else ()
        outcome = codebook(command, *words, *output)
        assert outcome.exit_code == 0, outcome.stderr
        assert any(text in warning for warning in outcome.json["warnings"]), (command, outcome.json["warnings"])


@pytest.mark.parametrize(("size", "dim"), [(16, 4), (64, 16), (512, 64), (16384, 8)])
def test_initializations_are_told_from_codes_that_are_as_independent(size: int, dim: int) -> None:
    for seed in range(20 if size < 1000 else 2):
        random = torch.Generator().manual_seed(seed)
        normal = torch.randn(size, dim, generator=random)
        assert as_initialized(normal.numpy()) and as_initialized(((torch.rand(size, dim) * 2 - 1) / size).numpy())
        if size > 16:
            assert not as_initialized((normal * 0.5).numpy()), "as codes of a late residual stage may be"


def test_a_table_of_one_row_is_no_codebook_that_one_can_be_sure_of(tmp_path: Path, codebook: Run) -> None:
    books = codebook("inspect", file_of(tmp_path, torch.rand(1, 8)), "--json").json["codebooks"]
    assert [book["confidence"] for book in books] == ["low"]


def test_dtypes_that_numpy_has_not_are_passed_over(tmp_path: Path, codebook: Run) -> None:
    small = fitted(64).to(torch.float8_e4m3fn)
    path = file_of(tmp_path, small, initted=torch.ones(1, dtype=torch.uint16), cluster_size=small[:, 0].clone())
    assert messages(path) == []
    assert codebook("inspect", path).exit_code == 0
