"""Edges: every surgery on codebooks and data at the limits ends in a sound file, or in one line and no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome, State, assert_refused
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from codebook_tools.models.families.zalando import CODEBOOK

Run = Callable[..., Outcome]
WriteModel = Callable[..., Path]
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
SURGERIES: dict[str, tuple[object, ...]] = {
    "refit to 1": ("refit", "--k", 1),
    "refit to 4": ("refit", "--k", 4),
    "refit by afkmc2": ("refit", "--k", 4, "--init", "afkmc2"),
    "refit from the codes in use": ("refit", "--k", 4, "--init", "used"),
    "refit to more than there are": ("refit", "--k", 100_000),
    "prune": ("prune",),
    "prune to 1": ("prune", "--keep", 1),
    "quantize to 1": ("quantize", "--k", 1),
    "quantize by merging": ("quantize", "--k", 3, "--method", "pnn"),
    "quantize to 2 bits": ("quantize", "--bits", 2),
    "restart": ("restart",),
    "grow by 1": ("grow", "--k", 17),
    "grow to many": ("grow", "--k", 64),
    "condense": ("condense", "--k", 2),
}
POINTS = {
    "beside the codes": lambda codes: codes.float().repeat(20, 1) * torch.linspace(0.9, 1.1, 20 * len(codes))[:, None],
    "all the same": lambda codes: codes.float()[:1].repeat(50, 1),
    "one": lambda codes: codes.float()[:1].clone(),
    "far from the codes": lambda codes: torch.randn(300, codes.shape[1], generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("surgery", SURGERIES)
@pytest.mark.parametrize("book", BOOKS)
def test_a_surgery_at_the_edge_is_sound_or_refused(
    book: str, surgery: str, points: str, codebook: Run, tmp_path: Path
) -> None:
    model, latents, output = (tmp_path / f"{name}.safetensors" for name in ("model", "latents", "out"))
    save_file({KEY: BOOKS[book]}, model)
    save_file({"latents": POINTS[points](BOOKS[book])}, latents)
    found = codebook(*SURGERIES[surgery], "--steps", 0, model, "--latents", latents, "--output", output, "--quiet")
    if found.exit_code:
        assert_refused(found, "")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["latents.safetensors", "model.safetensors"]
        return
    written = load_file(output)[KEY]
    assert written.dtype == BOOKS[book].dtype and bool(written.isfinite().all())
    verified = codebook("verify", output, "--against", model)
    assert verified.exit_code == 0, verified


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("command", ["refit --k 4", "prune", "quantize --bits 4", "measure"])
def test_numbers_that_are_none_are_refused_by_the_tensors_name(
    bad: float, command: str, codebook: Run, tmp_path: Path
) -> None:
    model, latents = tmp_path / "model.safetensors", tmp_path / "latents.safetensors"
    codes = CODES.clone()
    codes[3, 2] = bad
    save_file({KEY: codes}, model)
    save_file({"latents": CODES}, latents)
    assert_refused(codebook(*command.split(), model, "--latents", latents), KEY)


def test_a_codebook_without_a_code_is_refused(codebook: Run, tmp_path: Path) -> None:
    model, latents = tmp_path / "model.safetensors", tmp_path / "latents.safetensors"
    save_file({"latents": CODES}, latents)
    for shape in ((0, 4), (16, 0)):
        save_file({KEY: torch.zeros(shape)}, model)
        for command in (("prune",), ("refit", "--k", 4), ("measure",)):
            assert_refused(codebook(*command, model, "--latents", latents), "has no codebook")
            assert_refused(codebook(*command, model, "--latents", latents, "--codebook-key", KEY), KEY)


@pytest.mark.slow
def test_a_million_codes_are_counted_pruned_and_verified(codebook: Run, tmp_path: Path) -> None:
    model, latents, output = (tmp_path / f"{name}.safetensors" for name in ("model", "latents", "out"))
    codes = torch.randn(1_000_000, 4, generator=torch.Generator().manual_seed(0))
    save_file({KEY: codes}, model)
    save_file({"latents": codes[::1000] + 1e-6}, latents)
    done = codebook("prune", model, "--latents", latents, "--test-data", latents, "--steps", 0, "--output", output)
    assert done.exit_code == 0 and load_file(output)[KEY].equal(codes[::1000])
    assert codebook("verify", output, "--against", model).exit_code == 0


@pytest.mark.parametrize("surgery", ["refit --k 4", "prune", "restart", "grow --k 20", "finetune"])
@pytest.mark.parametrize("kind", ["one image", "all images the same", "all black"])
def test_data_that_says_little_is_worked_with_or_refused(
    kind: str, surgery: str, codebook: Run, tiny: Path, image_tensor: Tensor, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pixels = (image_tensor[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8) * (kind != "all black")
    for i in range(1 if kind == "one image" else 24):
        Image.fromarray(pixels).save(data / f"{i}.png")
    output = tmp_path / "out.safetensors"
    steps = ("--steps", 3, "--batch-size", 4)
    found = codebook(
        *surgery.split(), tiny, "--data", data, "--input-range=-1,1", *steps, "--output", output, "--quiet"
    )
    if found.exit_code:
        assert_refused(found, "")
        assert not output.exists()
        return
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(output).values())
    assert codebook("verify", output, "--against", tiny).exit_code == 0


@pytest.mark.parametrize("scale", [1e30, 1e-40])
def test_a_network_whose_codes_lie_far_off_is_refitted(
    scale: float,
    codebook: Run,
    write_model: WriteModel,
    variants: dict[str, State],
    images_folder: Path,
    tmp_path: Path,
) -> None:
    """The lesson of scale: the new codes lie at the latents, wherever the old ones were."""
    state = variants["plain"]
    model = write_model(state=state | {CODEBOOK: state[CODEBOOK].sign() * scale})
    done = codebook("refit", model, "--k", 8, "--data", images_folder, "--input-range=-1,1", "--steps", 0, "--json")
    assert done.exit_code == 0
    assert done.json["stages"]["surgery"]["codebooks"][0]["used"] == 8
