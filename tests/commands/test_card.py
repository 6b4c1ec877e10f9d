"""The model card of a written directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from diffusers import VQModel

    torch.manual_seed(0)
    model = VQModel(block_out_channels=(8,), num_vq_embeddings=16, latent_channels=4, norm_num_groups=4, sample_size=16)
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.slow
def test_a_directory_gets_a_card_that_the_hub_reads(
    folder: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    options = ("--k", 8, "--steps", 2, "--data", images_folder, "--input-range", "-1,1", "--json")
    found = [codebook("refit", folder, *options, "-o", tmp_path / name) for name in ("one", "two")]
    assert found[0].exit_code == 0, found[0].stderr
    card = (tmp_path / "one" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "diffusers", "tags": ["vector-quantization", "codebook-surgery"]}
    mse = found[0].json["stages"]["surgery"]["mse"]
    for told in ("`codebook refit`", "`quantize.embedding.weight`: 8", f"{mse:.6f}", "k 8", "steps 2", "| mse |"):
        assert told in body
    assert str(tmp_path) not in card and card == (tmp_path / "two" / "README.md").read_text()


@pytest.mark.slow
def test_a_card_that_is_there_stays_and_says_what_was_done_each_time(
    folder: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    data = ("--data", images_folder, "--input-range", "-1,1")
    assert codebook("refit", folder, "--k", 8, "--steps", 0, *data, "-o", tmp_path / "one").exit_code == 0
    assert codebook("prune", tmp_path / "one", "--keep", 4, *data, "-o", tmp_path / "two").exit_code == 0
    card = (tmp_path / "two" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# Mine\n\n## Codebook surgery\n")
    assert card.index("`codebook refit`") < card.index("`codebook prune`") and card.count("---\n") >= 2


def prune(codebook: Run, folder: Path, images_folder: Path, output: Path) -> tuple[bytes, str]:
    """The card of the result, and what was said."""
    found = codebook("prune", folder, "--keep", 4, "--data", images_folder, "--input-range", "-1,1", "-o", output)
    assert found.exit_code == 0, found.stderr
    return (output / "README.md").read_bytes(), found.stderr


def test_a_card_of_any_encoding_goes_on_byte_for_byte(
    folder: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    (folder / "README.md").write_bytes(b"# Mod\xe8le\r\n")
    card, _ = prune(codebook, folder, images_folder, tmp_path / "out")
    assert card.startswith(b"# Mod\xe8le\n\n## Codebook surgery\n") and b"`codebook prune`" in card


def linked(card: Path) -> None:
    (card.parent.parent / "mine.md").write_text("# Mine alone\n")
    card.symlink_to(card.parent.parent / "mine.md")


def huge(card: Path) -> None:
    card.write_text("# Mine alone\n")
    with card.open("r+b") as file:
        file.truncate(16 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("make", [linked, huge])
def test_a_card_that_does_not_go_along_is_not_read(
    make: Callable[[Path], None], folder: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    make(folder / "README.md")
    card, said = prune(codebook, folder, images_folder, tmp_path / "out")
    assert "README.md does not go into the new one" in said
    assert card.startswith(b"---\nlibrary_name: diffusers") and b"Mine alone" not in card


def test_links_that_lead_round_in_a_circle_stay(
    folder: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    (folder / "loop").symlink_to("loop")
    _, said = prune(codebook, folder, images_folder, tmp_path / "out")
    assert "loop does not go into the new one" in said and not (tmp_path / "out" / "loop").is_symlink()
