"""The model card of a written directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Outcome, Run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from diffusers import VQModel

    torch.manual_seed(0)
    model = VQModel(block_out_channels=(8,), num_vq_embeddings=16, latent_channels=4, norm_num_groups=4, sample_size=16)
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def operate(codebook: Run, images_folder: Path) -> Run:
    """operate("prune", folder, ..., "-o", output): on the images, without an error."""

    def run(*words: object) -> Outcome:
        outcome = codebook(*words, "--data", images_folder, "--input-range", "-1,1")
        assert outcome.exit_code == 0, outcome.stderr
        return outcome

    return run


@pytest.mark.slow
def test_a_directory_gets_a_card_that_the_hub_reads(folder: Path, operate: Run, tmp_path: Path) -> None:
    options = ("--k", 8, "--steps", 2, "--json")
    outcomes = [operate("refit", folder, *options, "-o", tmp_path / name) for name in ("one", "two")]
    card = (tmp_path / "one" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    outcome = outcomes[0].json
    mse, kept = outcome["stages"]["surgery"]["mse"], outcome["stages"][outcome["kept"]]
    entries = yaml.safe_load(head)
    (result,) = entries.pop("model-index")[0]["results"]
    assert entries == {"library_name": "diffusers", "tags": ["vector-quantization", "codebook-surgery"]}
    assert result["dataset"] == {"name": "own data", "type": "own", "split": "test"}
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values["mse"] == pytest.approx(kept["mse"], rel=1e-5)
    assert values["perplexity"] == pytest.approx(kept["codebooks"][0]["perplexity"], rel=1e-5)
    for text in ("`codebook refit`", "`quantize.embedding.weight`: 8", f"{mse:.6f}", "k 8", "steps 2", "| mse |"):
        assert text in body
    assert str(tmp_path) not in card and card == (tmp_path / "two" / "README.md").read_text()


@pytest.mark.slow
def test_a_card_of_any_encoding_stays_and_says_what_was_done_each_time(
    folder: Path, operate: Run, tmp_path: Path
) -> None:
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\n# Mod\xe8le\r\n")
    operate("refit", folder, "--k", 8, "--steps", 0, "-o", tmp_path / "one")
    operate("prune", tmp_path / "one", "--keep", 4, "-o", tmp_path / "two")
    card = (tmp_path / "two" / "README.md").read_bytes()
    assert (
        card.startswith(b"---\nlicense: mit\nlibrary_name: diffusers\ntags:\n- vector")
        and b"---\n\n# Mod\xe8le\n\n## Codebook surgery\n" in card
    )
    assert card.index(b"`codebook refit`") < card.index(b"`codebook prune`") and card.count(b"---\n") >= 2


def linked(card: Path) -> None:
    (card.parent.parent / "mine.md").write_text("# Mine alone\n")
    card.symlink_to(card.parent.parent / "mine.md")


def huge(card: Path) -> None:
    card.write_text("# Mine alone\n")
    with card.open("r+b") as file:
        file.truncate(16 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("make", [linked, huge])
def test_a_card_that_does_not_go_along_is_not_read_and_links_in_a_circle_stay(
    make: Callable[[Path], None], folder: Path, operate: Run, tmp_path: Path
) -> None:
    make(folder / "README.md")
    (folder / "loop").symlink_to("loop")
    said = operate("prune", folder, "--keep", 4, "-o", tmp_path / "out").stderr
    assert "README.md, loop does not go into the new one" in said
    card = (tmp_path / "out" / "README.md").read_bytes()
    assert card.startswith(b"---\nlibrary_name: diffusers") and b"Mine alone" not in card
    assert not (tmp_path / "out" / "loop").is_symlink()
