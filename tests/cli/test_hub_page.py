"""The page on the hub, as it is typed: in processes of their own, with the hub's own variables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from drawing import saved
from hub_client import environment, parquet_of, tree
from hub_server import Hub, serving
from PIL import Image
from test_examples import blocks

INDEX_MAP = "vqgan.refit-k128.index_map.safetensors"
SHELL = f'#!/bin/sh\nexec "{sys.executable}" -m codebook_tools "$@"\n'


def filled(hub: Hub, folder: Path) -> None:
    """org/vqgan with 256 codes, of which few lie near latents, and org/pictures with train and test."""
    torch.manual_seed(0)
    VQModel(
        block_out_channels=(8,), num_vq_embeddings=256, latent_channels=4, norm_num_groups=4, sample_size=16
    ).save_pretrained(folder / "vqgan")
    files = {path.name: path.read_bytes() for path in (folder / "vqgan").iterdir()}
    hub.model("org/vqgan", files | {"README.md": b"---\nlicense: mit\n---\n# VQGAN\n", "pytorch_model.bin": b"old"})
    rng = np.random.default_rng(0)
    drawn = {name: rng.integers(0, 256, (n, 16, 16, 3), np.uint8) for name, n in (("train", 60), ("test", 10))}
    cells = {name: [{"bytes": saved(Image.fromarray(one), "PNG")} for one in images] for name, images in drawn.items()}
    hub.dataset("org/pictures", {f"{name}.parquet": parquet_of("image", "Image", of) for name, of in cells.items()})


@pytest.mark.slow
def test_the_page_works_as_it_is_typed_and_the_cache_keeps_what_was_fetched(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "codebook").write_text(SHELL)
    (tmp_path / "bin" / "codebook").chmod(0o755)
    (block,) = blocks("docs/hub.md")
    with serving() as hub:
        filled(hub, tmp_path)
        variables = environment(hub, home)
        variables |= {
            "PATH": f"{tmp_path / 'bin'}:{variables['PATH']}",
            "PYTHONPATH": ":".join(path for path in sys.path if path),
        }
        before: dict[str, str] = {}
        for line in block.splitlines():
            hub.requests.clear()
            typed = line.replace("--k 128", "--k 128 --steps 2")
            done = subprocess.run(["bash", "-c", typed], cwd=here, env=variables, capture_output=True, text=True)
            assert done.returncode in ((0, 3) if "diagnose" in line else (0,)), (line, done.stderr)
            after = tree(home / "hub")
            assert before.items() <= after.items(), line
            if "refit" in line or "OFFLINE" in line:  # what these read was fetched by the commands before
                assert after == before, line
            assert not ("OFFLINE" in line and hub.requests)
            before = after
        links = {name.rpartition("/")[2] for name, of in before.items() if of.startswith("-> ")}
        assert links == {"config.json", "diffusion_pytorch_model.safetensors", "README.md", INDEX_MAP}
        repository = hub.models["me/vqgan-k128"]
        assert repository.private and json.loads(repository.files["config.json"])["num_vq_embeddings"] == 128
        card = repository.files["README.md"].decode()
        assert all(text in card for text in ("license: mit", "base_model: org/vqgan", "datasets:\n- org/pictures\n"))
