"""How codes follow from stored rows, told from names and shapes."""

from __future__ import annotations

import pytest
from state_dicts import Shapes, read_layouts

from codebook_tools.checkpoints.detect import find_codebooks
from codebook_tools.checkpoints.effective import Effective, effective

MIMI = "quantizer.semantic_residual_vector_quantizer.layers.0.codebook."
ROWS = Effective("rows", (), 8, 0)
CASES: dict[str, tuple[Shapes, Effective]] = {
    "rows as stored": ({"quantize.embedding.weight": (37, 8)}, ROWS),
    "sums beside the codes": ({"vq.embed": (37, 8), "vq.embed_sum": (37, 8), "vq.cluster_size": (37,)}, ROWS),
    "Mimi": (
        {f"{MIMI}cluster_usage": (37,), f"{MIMI}embed_sum": (37, 8), f"{MIMI}initialized": (1,)},
        Effective("ratio", (f"{MIMI}cluster_usage",), 8, 0)),
    "SimVQ": (
        {"quantize.embedding.weight": (37, 8), "quantize.embedding_proj.weight": (8, 8)}
        | {"quantize.embedding_proj.bias": (8,), "quant_conv.weight": (8, 16, 1, 1)},
        Effective("projected", ("quantize.embedding_proj.weight", "quantize.embedding_proj.bias"), 8, 0)),
    "lucidrains SimVQ": (
        {"vq.frozen_codebook": (37, 4), "vq.code_transform.weight": (8, 4)},
        Effective("projected", ("vq.code_transform.weight",), 8, 0)),
    "VQGAN-LC, rows far longer than the code": (
        {"encoder.weight": (16, 3, 3, 3), "tok_embeddings.weight": (37, 768), "codebook_projection.weight": (8, 768)}
        | {"codebook_projection.bias": (8,), "cluster_size": (37,), "decoder.weight": (3, 16, 3, 3)},
        Effective("projected", ("codebook_projection.weight", "codebook_projection.bias"), 8, 0)),
    "a transform of two layers": (
        {"vq.frozen_codebook": (37, 8), "vq.code_transform.0.weight": (16, 8), "vq.code_transform.2.weight": (8, 16)},
        Effective("network", ("vq.code_transform.0.weight", "vq.code_transform.2.weight"), 8, 0)),
    "projections of latents are none of rows": (
        {"quantizer.quantizers.0.in_proj.weight": (8, 64, 1), "quantizer.quantizers.0.out_proj.weight": (64, 8, 1)}
        | {"quantizer.quantizers.0.codebook.weight": (37, 8)},
        ROWS),
    "RQ-VAE": (
        {"quantizer.codebooks.0.weight": (38, 8), "quantizer.codebooks.0.cluster_size_ema": (37,)},
        Effective("rows", (), 8, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_a_model_makes_of_its_rows(name: str) -> None:
    shapes, expected = CASES[name]
    (book,) = find_codebooks(shapes).codebooks
    assert effective(book, shapes) == expected


def test_stages_do_not_share_their_projections() -> None:
    keys = [f"rvq.layers.{i}.code_transform.weight" for i in range(11)]
    shapes: Shapes = {f"rvq.layers.{i}.frozen_codebook": (37, 8) for i in range(11)} | dict.fromkeys(keys, (8, 8))
    books = find_codebooks(shapes).codebooks
    assert [effective(book, shapes).beside for book in books] == [(key,) for key in keys]


def test_few_of_the_written_layouts_have_other_codes_than_their_rows() -> None:
    books = [(case, book) for case in read_layouts("codebooks") for book in find_codebooks(case.shapes).codebooks]
    plain = [effective(book, case.shapes) == Effective("rows", (), book.dim, 0) for case, book in books]
    other = {case.name.partition(":")[0] for (case, _), rows in zip(books, plain, strict=True) if not rows}
    simvq, sums = {"MagiCodec and SimVQ in audio"}, {"CSM", "Kyutai Moshi codec", "Qwen3-TTS tokenizer"}
    assert other == simvq | sums | {"Transformer-VQ", "VILA-U"}
