"""Edges: every surgery on codebooks and data at the limits ends in a sound file, or in one line and no file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, State, WriteModel, assert_refused
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from codebook_tools.models.families.zalando import CODEBOOK

pytestmark = pytest.mark.hostile

KEY = "quantize.embedding.weight"
CODES = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

BOOKS: dict[str, Tensor] = {
    "one code": CODES[:1],
    "as many codes as dimensions": CODES[:4],
    "one dimension": CODES[:, :1].clone(),
    "all codes the same": CODES[:1].repeat(16, 1),
    "two of each": CODES[:8].repeat(2, 1),
    "all at 0": torch.zeros(16, 4),
    "at 1e30": CODES.sign() * 1e30,
    "at 1e38, whose squares overflow": CODES.sign() * 1e38,
    "denormal": CODES.sign() * 1e-40,
    "some at 1e30, some denormal": torch.cat([CODES[:8].sign() * 1e30, CODES[8:].sign() * 1e-40]),
    "float16 at its largest": (CODES.sign() * 65504).half(),
    "float16 at its smallest": (CODES.sign() * 6e-8).half(),
    "bfloat16": CODES.bfloat16(),
}
SURGERIES = (
    *("refit --k 1", "refit --k 4", "refit --k 4 --init afkmc2", "refit --k 4 --init used", "refit --k 100000"),
    *("prune", "prune --keep 1", "quantize --k 1", "quantize --k 3 --method pnn", "quantize --bits 2"),
    *("restart", "grow --k 17", "grow --k 64", "condense --k 2"),
)
POINTS = {
    "beside the codes": lambda codes: codes.float().repeat(20, 1) * torch.linspace(0.9, 1.1, 20 * len(codes))[:, None],
    "all the same": lambda codes: codes.float()[:1].repeat(50, 1),
    "one": lambda codes: codes.float()[:1].clone(),
    "far from the codes": lambda codes: torch.randn(300, codes.shape[1], generator=torch.Generator().manual_seed(1)),
}


def cases() -> Iterator[object]:
    """All triples; those that are not slow hold each pair of book, surgery and points."""
    for (i, book), (j, surgery), (k, points) in product(*map(enumerate, (BOOKS, SURGERIES, POINTS))):
        yield pytest.param(book, surgery, points, marks=[pytest.mark.slow] if (i + j + k) % len(POINTS) else [])


def files(folder: Path, codes: Tensor, latents: Tensor) -> tuple[Path, Path, Path]:
    """Of a model and of latents, and where an output goes."""
    model, points, output = (folder / f"{name}.safetensors" for name in ("model", "latents", "out"))
    save_file({KEY: codes}, model)
    save_file({"latents": latents}, points)
    return model, points, output


@pytest.mark.parametrize(("book", "surgery", "points"), [*cases()])
def test_a_surgery_ends_sound_or_refused(book: str, surgery: str, points: str, codebook: Run, tmp_path: Path) -> None:
    model, latents, output = files(tmp_path, BOOKS[book], POINTS[points](BOOKS[book]))
    done = codebook(*surgery.split(), "--steps", 0, model, "--latents", latents, "--output", output, "--quiet")
    if done.exit_code:
        assert_refused(done, "")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["latents.safetensors", "model.safetensors"]
        return
    written = load_file(output)[KEY]
    assert written.dtype == BOOKS[book].dtype and bool(written.isfinite().all())
    verified = codebook("verify", output, "--against", model)
    assert verified.exit_code == 0, verified


@pytest.mark.parametrize("command", ["refit --k 4", "prune", "quantize --bits 4", "measure"])
def test_codes_that_are_not_finite_and_a_codebook_without_any_are_refused_by_the_tensors_name(
    command: str, codebook: Run, tmp_path: Path
) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        codes = CODES.clone()
        codes[3, 2] = bad
        model, latents, _ = files(tmp_path, codes, CODES)
        assert_refused(codebook(*command.split(), model, "--latents", latents), KEY)
    for shape in ((0, 4), (16, 0)):
        model, latents, _ = files(tmp_path, torch.zeros(shape), CODES)
        assert_refused(codebook(*command.split(), model, "--latents", latents), "has no codebook")
        assert_refused(codebook(*command.split(), model, "--latents", latents, "--codebook-key", KEY), KEY)


@pytest.mark.slow
def test_a_million_codes_are_counted_pruned_and_verified(codebook: Run, tmp_path: Path) -> None:
    codes = torch.randn(1_000_000, 4, generator=torch.Generator().manual_seed(0))
    model, latents, output = files(tmp_path, codes, codes[::1000] + 1e-6)
    done = codebook("prune", model, "--latents", latents, "--test-data", latents, "--steps", 0, "--output", output)
    assert done.exit_code == 0 and load_file(output)[KEY].equal(codes[::1000])
    assert codebook("verify", output, "--against", model).exit_code == 0


@pytest.mark.parametrize("surgery", ["refit --k 4", "prune", "restart", "grow --k 20", "finetune"])
@pytest.mark.parametrize("kind", ["one image", "all images the same", "all black"])
def test_data_that_says_little_is_worked_with_or_refused(
    kind: str, surgery: str, codebook: Run, tiny: Path, image_tensor: Tensor, tmp_path: Path
) -> None:
    data, output = tmp_path / "data", tmp_path / "out.safetensors"
    data.mkdir()
    pixels = (image_tensor[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8) * (kind != "all black")
    for i in range(1 if kind == "one image" else 24):
        Image.fromarray(pixels).save(data / f"{i}.png")
    options = ("--data", data, "--input-range=-1,1", "--steps", 3, "--batch-size", 4, "--output", output, "--quiet")
    done = codebook(*surgery.split(), tiny, *options)
    if done.exit_code:
        assert_refused(done, "")
        assert not output.exists()
        return
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(output).values())
    assert codebook("verify", output, "--against", tiny).exit_code == 0


@pytest.mark.parametrize("scale", [1e30, 1e-40])
def test_a_network_whose_codes_lie_far_off_is_refitted_to_its_latents(
    scale: float, codebook: Run, write_model: WriteModel, variants: dict[str, State], images_folder: Path
) -> None:
    state = variants["plain"]
    model = write_model(state=state | {CODEBOOK: state[CODEBOOK].sign() * scale})
    done = codebook("refit", model, "--k", 8, "--data", images_folder, "--input-range=-1,1", "--steps", 0, "--json")
    assert done.exit_code == 0
    assert done.json["stages"]["surgery"]["codebooks"][0]["used"] == 8
