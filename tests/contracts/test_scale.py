"""Defaults are free of scale: a model that is written down otherwise is repaired and trained alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from codebook_tools.models.demo import DEMO
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Refit
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.operate import operate
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import Result

CODES, ENCODER, DECODER = "_vq_vae._embedding.weight", "_pre_vq_conv", "_decoder._conv_1.weight"


def scaled(by: float, folder: Path) -> Path:
    """The demo with latents and codes so many times as long, and a decoder that makes up for it."""
    state = load_file(DEMO)
    for key in (CODES, f"{ENCODER}.weight", f"{ENCODER}.bias"):
        state[key] *= by
    state[DECODER] /= by
    save_file(state, folder / f"{by:g}.safetensors")
    return folder / f"{by:g}.safetensors"


@pytest.mark.slow
def test_a_model_whose_latents_are_ten_times_as_long_or_short_ends_alike(tmp_path: Path) -> None:
    found = list[Result]()
    for by in (1.0, 0.1, 10.0):
        model = scaled(by, tmp_path)
        request = Request(model=model, output=tmp_path / f"{by:g}.out.safetensors", limit=1500)
        found.append(operate("refit", request, Refit(k=64), FineTune(steps=150), Watch()))
    plain, *others = found
    assert plain.surgery and plain.finetuned and plain.finetuned.error < 0.97 * plain.surgery.error
    for other in others:
        assert other.surgery and other.finetuned
        assert other.surgery.error == pytest.approx(plain.surgery.error, rel=1e-3)
        assert other.finetuned.error == pytest.approx(plain.finetuned.error, rel=0.05)
