"""Models that are not run, and codes that are no plain rows: latents from a file stand in for images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import State
from library_models import OF_LIBRARIES
from round_trips import (
    NO_STEPS,
    OPERATIONS,
    Operation,
    assert_averages_follow,
    assert_loads_whole,
    assert_only_these_differ,
    assert_same_indices,
    operated,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Quantize
from codebook_tools.workflows.inspect_checkpoint import inspect_checkpoint
from codebook_tools.workflows.operate import operate
from codebook_tools.workflows.request import Request

SURGERIES = [operation for operation in OPERATIONS if str(operation) in ("prune", "refit")]
"""A K that the data decide, and new codes; the other commands write as these do."""
CODES = torch.cat([torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.full((6, 4), 40.0)])
"""Ten near the latents, six that none is assigned to."""

BOOK = "quantize.embedding.weight"


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True)
class Layout:
    """state: of a file whose effective codes are `codes`. effective: what its own code would make of a state dict.
    owned: as in `assert_only_these_differ`. check: what must hold of the state before and after, beside that."""

    family: str
    state: State
    effective: Callable[[State], Tensor]
    owned: tuple[str, ...]
    check: Callable[[State, State], object] = lambda before, after: None
    codes: Tensor = CODES


PROJECTION = drawn(4, 4) + 4 * torch.eye(4)
LONG, BIAS = drawn(4, 12), drawn(4)


def projected(state: State, weight: str, bias: str, rows: str) -> Tensor:
    return state[rows] @ state[weight].mT + state[bias]


def rows_for(codes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rows that the projection gives out as the codes."""
    return (codes - bias) @ torch.linalg.pinv(weight).mT


def check_identity(weight: str, bias: str) -> Callable[[State, State], object]:
    def check(_: State, after: State) -> None:
        assert torch.equal(after[weight], torch.eye(*after[weight].shape)) and not after[bias].any()

    return check


def check_padding(before: State, after: State) -> None:
    stage = "quantizer.codebooks.0"
    assert torch.equal(after[f"{stage}.weight"][-1], before[f"{stage}.weight"][-1])
    assert_averages_follow(
        after[f"{stage}.weight"][:-1], after[f"{stage}.embed_ema"], after[f"{stage}.cluster_size_ema"]
    )


def check_hits(before: State, after: State) -> None:
    assert after["quantize.ema_vocab_hit_SV"].shape == (10, len(after[BOOK]))


VAR = {BOOK: CODES, "quantize.ema_vocab_hit_SV": torch.ones(10, 16), "quant_conv.weight": drawn(4, 4, 3, 3)}
TITOK = {BOOK: normalize(CODES), "latent_tokens": drawn(7, 8), "encoder.ln_pre.weight": drawn(8)}
PADDED = {
    "quantizer.codebooks.0.weight": torch.cat([CODES, torch.full((1, 4), 7.0)]),
    "quantizer.codebooks.0.cluster_size_ema": torch.ones(16),
    "quantizer.codebooks.0.embed_ema": CODES,
}
PROJ = ("quantize.embedding_proj.weight", "quantize.embedding_proj.bias")
SIMVQ = dict(zip(PROJ, (PROJECTION, BIAS), strict=True)) | {
    BOOK: rows_for(CODES, PROJECTION, BIAS), "quant_conv.weight": drawn(4, 9, 1, 1)
}  # fmt: skip
LC, TOKENS = ("codebook_projection.weight", "codebook_projection.bias"), "tok_embeddings.weight"
VQGAN_LC = dict(zip(LC, (LONG, BIAS), strict=True)) | {
    TOKENS: rows_for(CODES, LONG, BIAS), "cluster_size": torch.ones(16), "encoder.weight": drawn(9, 3, 3, 3),
    "decoder.weight": drawn(3, 9, 3, 3),
}  # fmt: skip
LAYOUTS = {
    "VAR": Layout("var", VAR, lambda state: state[BOOK], (BOOK, "ema_vocab_hit"), check_hits),
    "TiTok": Layout("titok", TITOK, lambda state: state[BOOK], (BOOK,), codes=normalize(CODES)),
    "RQ-VAE": Layout(
        "custom", PADDED, lambda state: state["quantizer.codebooks.0.weight"][:-1], ("quantizer.codebooks.0.",),
        check_padding,
    ),
    "SimVQ": Layout(
        "custom", SIMVQ, lambda state: projected(state, *PROJ, BOOK), ("quantize.",), check_identity(*PROJ)
    ),
    "VQGAN-LC": Layout(
        "custom", VQGAN_LC, lambda state: projected(state, *LC, TOKENS),
        ("tok_embeddings", "codebook_projection", "cluster_size"), check_identity(*LC),
    ),
}  # fmt: skip


def latents_beside(folder: Path, rows: Tensor) -> tuple[str]:
    np.save(folder / "latents.npy", rows.numpy())
    return (str(folder / "latents.npy"),)


BLIND = [(operation, True) for operation in OPERATIONS if operation.command == "quantize"]


@pytest.mark.parametrize(("operation", "blind"), [*((operation, False) for operation in SURGERIES), *BLIND], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_of_the_file_are_a_plain_ones(name: str, operation: Operation, blind: bool, tmp_path: Path) -> None:
    """blind: on the codes alone, without latents."""
    layout = LAYOUTS[name]
    before = {key: tensor.clone() for key, tensor in layout.state.items()}
    source, plain = tmp_path / "odd.safetensors", tmp_path / "plain.safetensors"
    save_file(before, source)
    save_file({BOOK: layout.effective(before)}, plain)
    metric = "cosine-unit" if name == "TiTok" else None
    request = Request(source, metric=metric, latents=() if blind else latents_beside(tmp_path, drawn(400, 4)))
    done, result = operated(operation, request)
    assert done.family == layout.family
    after, meant = load_file(result), load_file(operated(operation, replace(request, model=plain))[1])[BOOK]
    torch.testing.assert_close(layout.effective(before), layout.codes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layout.effective(after), meant, atol=1e-5, rtol=1e-5)
    assert_only_these_differ(result, source, layout.owned)
    layout.check(before, after)


# --- libraries' models that reconstruct nothing ----------------------------------------------------------------------


def tokens(model: Any, media: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The latents (n, dim) that meet its quantizer, and the indices (n,) that it gives them."""
    kept: list[Tensor] = []

    def keep(_: object, inputs: tuple[Tensor], output: Any) -> None:
        kept.extend((inputs[0], output if isinstance(output, Tensor) else output[-1]))

    hook = model.quantize.register_forward_hook(keep)
    with torch.no_grad():
        model.eval().encode(*media)
    hook.remove()
    latents, indices = kept
    return latents.movedim(-3, -1).flatten(0, -2), indices.flatten()


LIBRARIES: dict[str, tuple[str, tuple[Tensor, ...]]] = {
    "chameleon-vqvae": ("num_embeddings", (drawn(4, 3, 16, 16),)),
    "emu3-vqvae": ("codebook_size", (drawn(4, 3, 16, 16), torch.full((4, 2), 16))),
}
"""The entry of K of each, and what it encodes."""


@pytest.mark.parametrize("operation", SURGERIES, ids=str)
@pytest.mark.parametrize("name", LIBRARIES)
def test_latents_of_the_library_give_a_codebook_that_it_loads(name: str, operation: Operation, tmp_path: Path) -> None:
    key, media = LIBRARIES[name]
    torch.manual_seed(0)
    model = OF_LIBRARIES[name]()
    latents, _ = tokens(model, media)
    scattered = latents[torch.linspace(0, len(latents) - 1, 16).long()]
    model.quantize.embedding.weight.data = scattered + 90.0 * (torch.arange(16) > 9)[:, None]
    model.save_pretrained(tmp_path / "model")
    request = Request(tmp_path / "model", latents=latents_beside(tmp_path, latents))
    done, result = operated(operation, request)
    loaded, info = type(model).from_pretrained(result, output_loading_info=True)
    assert_loads_whole(info)
    rows = loaded.quantize.embedding.weight.detach()
    size = operation.size or 10
    assert len(rows) == json.loads((result / "config.json").read_text())[key] == size and done.family == name
    again, indices = tokens(loaded, media)
    assert torch.equal(again, latents)
    assert_same_indices([nearest(latents, Codebook(rows))], [indices], size)
    assert_only_these_differ(result, request.source, (BOOK,))


@pytest.mark.parametrize("name", [*LIBRARIES, *LAYOUTS])
def test_without_latents_one_line_says_why_and_what_to_do(name: str, images_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    if name in LIBRARIES:
        OF_LIBRARIES[name]().save_pretrained(model)
    else:
        model = tmp_path / "model.safetensors"
        save_file({key: tensor.clone() for key, tensor in LAYOUTS[name].state.items()}, model)
    there = sorted(tmp_path.iterdir())
    for operation in SURGERIES:
        request = Request(model, (str(images_folder),), input_range=(-1.0, 1.0))
        with pytest.raises(CodebookError, match="--latents") as caught:
            operate(operation.command, request, operation.strategy, NO_STEPS, Watch())
        assert "\n" not in str(caught.value) and str(model) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == there


def test_a_config_is_about_one_of_two_codebooks_that_differ(tmp_path: Path) -> None:
    """TiTok's K is that of quantize; pixel_quantize has its own size, and the config must not follow that."""
    (tmp_path / "titok").mkdir()
    save_file(TITOK | {"pixel_quantize.embedding.weight": drawn(24, 4)}, tmp_path / "titok" / "model.safetensors")
    (tmp_path / "titok" / "config.json").write_text(json.dumps({"model": {"vq_model": {"codebook_size": 16}}}))
    assert inspect_checkpoint(tmp_path / "titok").warnings == ()
    asked = Request(model=tmp_path / "titok", codebook_key=(BOOK,))
    output = Path(str(operate("quantize", asked, Quantize(8), NO_STEPS, Watch()).outputs["model"]))
    assert json.loads((output / "config.json").read_text())["model"]["vq_model"]["codebook_size"] == 8
    written = load_file(output / "model.safetensors")
    assert (len(written[BOOK]), len(written["pixel_quantize.embedding.weight"])) == (8, 24)
    other = replace(asked, codebook_key=("pixel_quantize.embedding.weight",), output=tmp_path / "other")
    with pytest.raises(CodebookError, match=r"codebook_size=16, but pixel_quantize\.embedding\.weight has 24"):
        operate("quantize", other, Quantize(8), NO_STEPS, Watch())
