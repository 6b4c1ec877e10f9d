"""Where a directory may be written, and what a failure on the way leaves of the one that was there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Patch, Run, assert_refused, contents
from diffusers import VQModel
from image_models import save_vqmodel

from codebook_tools.checkpoints import atomic
from codebook_tools.checkpoints.layout import partial_path

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """A directory that diffusers wrote, alone in tmp_path."""
    return save_vqmodel(tmp_path)


OURS_ONLY = "is not a directory that codebook-tools wrote"
BAD_OUTPUTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "it exists": (lambda folder: (folder / "out").mkdir(), "out", "out exists; --force replaces it"),
    "its map exists": (lambda folder: (folder / "out.index_map.safetensors").touch(), "out", "exists; --force"),
    "the model": (lambda folder: None, "vae", "is the model itself"),
    "the model's weights": (lambda folder: None, f"vae/{WEIGHTS}", "is the model itself"),
    "around the model": (lambda folder: None, ".", "holds the model"),
    "a path without a name": (lambda folder: None, "..", "has no name of its own"),
    "left over, not whole": (lambda folder: partial_path(folder / "out").mkdir(), "out", "codebook.partial is left of"),
    "left over, the old": (lambda folder: (folder / "out.old").mkdir(), "out", "rename it to out, or delete it"),
    "left over, both": (
        lambda folder: ((folder / "out.old").mkdir(), (folder / "out").mkdir()), "out", "already written out; delete it"
    ),
    "forced, a home": (lambda folder: (folder / "out/letters").mkdir(parents=True), "out --force", OURS_ONLY),
    "forced, a model": (lambda folder: shutil.copytree(folder / "vae", folder / "out"), "out --force", OURS_ONLY),
    "forced, a link": (lambda folder: (folder / "out").symlink_to("vae"), "out --force", "is the model itself"),
    "forced, a file": (lambda folder: (folder / "out").write_text("precious"), "out --force", OURS_ONLY),
    "forced, empty": (lambda folder: (folder / "out").mkdir(), "out --force", OURS_ONLY),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD_OUTPUTS)
def test_a_bad_place_is_refused_before_the_work(kind: str, vae: Path, codebook: Run, tmp_path: Path) -> None:
    change, words, message = BAD_OUTPUTS[kind]
    change(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    output, *force = words.split()
    assert_refused(codebook("prune", vae, "--data", "nowhere", "-o", tmp_path / output, *force), message)
    assert sorted(tmp_path.rglob("*")) == before


def failing(work: Callable[..., Any], message: str, where: str = "") -> Callable[..., Any]:
    """Does the work but for paths that end in `where`."""

    def fail(*arguments: Any) -> Any:
        if not str(arguments[0]).endswith(where):
            return work(*arguments)
        raise OSError(28, message)

    return fail


@pytest.mark.slow
def test_a_failure_on_the_way_leaves_the_old_directory_as_it_was_or_names_it(
    vae: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    data = ("--data", images_folder, "--input-range=-1,1")
    run = partial(codebook, "prune", vae, *data, "-o", tmp_path / "out", "--force")
    assert run().exit_code == 0
    size = VQModel.from_pretrained(tmp_path / "out").config.num_vq_embeddings
    before = contents(tmp_path)
    for work, where in ((os.fsync, ""), (os.rename, ".partial")):
        with monkeypatch.context() as patch:
            patch.setattr(os, work.__name__, failing(work, "No space left on device", where))
            assert_refused(run(), "No space left on device")
        assert contents(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", failing(shutil.rmtree, "Permission denied"))
        assert_refused(run(), "out.old, which it replaced, cannot be deleted")
        assert VQModel.from_pretrained(tmp_path / "out").config.num_vq_embeddings == size
        assert_refused(run(), "had already written out; delete it")
