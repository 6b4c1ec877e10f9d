"""--compile: the compiled network gives what the plain one gives, and where nothing can be compiled, that is said."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, assert_refused
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.models.load import load_model


@pytest.mark.slow
def test_a_compiled_model_gives_what_the_plain_one_gives(tiny: Path, image_tensor: Tensor, monkeypatch: Any) -> None:
    compiled, methods = partial(torch.compile, backend="eager"), list[str]()
    monkeypatch.setattr(torch, "compile", lambda method: methods.append(method.__name__) or compiled(method))
    model = load_model(read_checkpoint(tiny))
    plain = model.pass_through(image_tensor)
    model.compiled = True
    for images in (image_tensor, image_tensor[:7]):  # of any number
        passed = model.pass_through(images)
        torch.testing.assert_close(passed.media, plain.media[: len(images)])
        assert torch.equal(passed.codes[0], plain.codes[0][: len(images)])
    assert methods == ["encode", "decode"]
    other = model.with_fresh_network(seed=1)
    assert not torch.allclose(other.pass_through(image_tensor).latents[0], plain.latents[0])
    assert methods == ["encode", "decode", "encode", "decode"]  # of its own network


def test_without_a_compiler_one_line_says_so(codebook: Run, tiny: Path, images_folder: Path, monkeypatch: Any) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setattr(config, "force_disable_caches", True)
    done = codebook("prune", tiny, "--data", images_folder, "--compile", "--device", "cpu")
    assert_refused(done, "leave out --compile")
    assert "encode cannot be compiled for (57, 3, 16, 16)" in done.stderr
