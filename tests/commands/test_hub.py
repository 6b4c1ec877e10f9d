"""MODEL on the hub: found, fetched, repaired in the current folder; the cache keeps nothing but what was fetched."""

from __future__ import annotations

from pathlib import Path

from conftest import Run
from hub_client import hub as hub
from hub_client import tree
from hub_server import Hub

RANGE = ("--input-range", "-1,1")


def test_a_model_on_the_hub_is_fetched_once_and_measured(
    codebook: Run, hub: Hub, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    commit = hub.model("org/vq.model", {"tiny.safetensors": tiny.read_bytes(), "other.bin": b"x", "a/b.onnx": b"y"})
    done = codebook("measure", "org/vq.model", "--data", images_folder, *RANGE, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.json["model"] == f"hf://org/vq.model@{commit}/tiny.safetensors"
    assert hub.downloads() == ["tiny.safetensors"]
    before = tree(tmp_path / "home")
    done = codebook("prune", "org/vq.model", "--data", images_folder, *RANGE, "--json")
    assert done.exit_code == 0, done.stderr
    assert hub.downloads() == ["tiny.safetensors"] and tree(tmp_path / "home") == before
    name = Path("vq.model-tiny.prune-k10")
    assert [*sorted(Path().iterdir())] == [Path(f"{name}.index_map.safetensors"), Path(f"{name}.safetensors")]
    assert codebook("verify", f"{name}.safetensors", "--against", "org/vq.model").exit_code == 0
