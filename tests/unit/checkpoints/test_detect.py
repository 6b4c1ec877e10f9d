"""Finding codebooks from names and shapes: the surveyed state dicts, and those of tests/support/layouts/."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest
from state_dicts import SURVEY, Answer, Shapes, StateDict, read_layouts, surveyed

from codebook_tools.checkpoints import detect
from codebook_tools.checkpoints.detect import Detection, find_codebooks

NEGATIVE = "not a codebook: "

CODEBOOKS, NONE = read_layouts("codebooks"), read_layouts("none")
each_with_codebooks = pytest.mark.parametrize("case", CODEBOOKS, ids=lambda case: case.name)
each_without = pytest.mark.parametrize("case", NONE, ids=lambda case: case.name)


def answer(found: Detection) -> Answer:
    return {c.key: (c.size, c.dim, c.axis, c.heads) for c in found.codebooks}


# --- the surveyed layouts ------------------------------------------------------------------------------------------

REASONS = {
    "T5": "language model",
    "Llama": "language model",
    "Whisper": "language model",
    "Dia": "language model",
    "UVit2D": "language model",
    "LlamaGen GPT (keys)": "language model",
    "VAR transformer (keys)": "language model",
    "Beit": "patch",
    "FSQ": "FSQ",
    "LFQ": "LFQ",
}


@surveyed
@pytest.mark.parametrize("name", SURVEY)
def test_surveyed_layout(name: str) -> None:
    shapes = {key: tuple(shape) for key, shape in SURVEY[name]["tensors"].items()}
    found = find_codebooks(shapes)
    expected = {key: (c["size"], c["dim"], c["axis"]) for key, c in SURVEY[name]["codebooks"].items()}
    assert {c.key: (c.size, c.dim, c.axis) for c in found.codebooks} == expected
    assert (found.reason is None) == bool(expected)
    assert name.startswith(NEGATIVE) == (not expected)
    for c in found.codebooks:
        assert all(key in shapes for key in c.companions) and c.key not in c.companions


@surveyed
@pytest.mark.parametrize("name", [name for name in SURVEY if name.startswith(NEGATIVE)])
def test_surveyed_negative_says_why(name: str) -> None:
    shapes = {key: tuple(shape) for key, shape in SURVEY[name]["tensors"].items()}
    assert REASONS[name.removeprefix(NEGATIVE)] in str(find_codebooks(shapes).reason)


@surveyed
@pytest.mark.parametrize(
    ("name", "search"),
    [
        ("taming VQ2", "euclidean"),
        ("HF Encodec", "euclidean"),
        ("zalando", "euclidean"),
        ("HF Dac", "cosine"),
        ("SNAC/DAC original/DualCodec", "cosine"),
        ("LlamaGen VQ-16", "cosine"),
        ("HF Wav2Vec2 pretraining", "logits"),
        ("taming Gumbel", "logits"),
        ("DALLE-pytorch dVAE", "logits"),
        ("lucid VQ", "unknown"),
        ("VAR VQVAE", "unknown"),
        ("lucid SimVQ", "unknown"),
        ("VQGAN-LC", "unknown"),
    ],
)
def test_surveyed_search(name: str, search: str) -> None:
    shapes = {key: tuple(shape) for key, shape in SURVEY[name]["tensors"].items()}
    assert {c.search for c in find_codebooks(shapes).codebooks} == {search}


# --- layouts written down -------------------------------------------------------------------------------------------


@each_with_codebooks
def test_written_layout(case: StateDict) -> None:
    found = find_codebooks(case.shapes)
    search, confidence = case.said if len(case.said) == 2 else (*case.said, "high")
    assert answer(found) == case.codebooks
    assert {c.search for c in found.codebooks} == {search}
    assert {c.confidence for c in found.codebooks} == {confidence}
    assert found.reason is None
    for c in found.codebooks:
        assert all(c.size in case.shapes[key] for key in c.companions)
        assert not case.codebooks.keys() & set(c.companions)
    listed = {*case.codebooks, *(key for c in found.codebooks for key in c.companions)}
    assert not listed & {key for key, _ in found.elsewhere}


@pytest.mark.parametrize(
    ("shape", "dtype", "told"),
    [
        ((512, 64), "I8", "I8 [512, 64]"),
        ((512, 64), "BOOL", "BOOL [512, 64]"),
        ((512, 64), "C64", "C64 [512, 64]"),
        ((0, 64), "F32", "F32 [0, 64]"),
        ((512, 0), "F32", "F32 [512, 0]"),
    ],
)
def test_a_codebook_that_is_no_rows_of_floats_is_told_as_what_it_is(
    shape: tuple[int, int], dtype: str, told: str
) -> None:
    key, conv = "_vq_vae._embedding.weight", "_encoder._conv_1.weight"
    found = find_codebooks({key: shape, conv: (64, 3, 3, 3)}, {key: dtype, conv: "F32"})
    assert found.codebooks == () and found.reason == f"{key} is {told}, where a codebook is rows of floats"


@each_without
def test_written_negative(case: StateDict) -> None:
    found = find_codebooks(case.shapes)
    assert answer(found) == {} and found.elsewhere == ()
    (word,) = case.said
    assert found.reason is not None and word in found.reason


@each_with_codebooks
@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "first_stage_model.", "_orig_mod.", "generator.", "net.vqvae."]
)
def test_a_prefix_on_every_key_changes_nothing(case: StateDict, prefix: str) -> None:
    plain = find_codebooks(case.shapes)
    behind = find_codebooks({prefix + key: shape for key, shape in case.shapes.items()})
    assert {key.removeprefix(prefix): value for key, value in answer(behind).items()} == answer(plain)
    assert [c.companions for c in behind.codebooks] == [
        tuple(prefix + key for key in c.companions) for c in plain.codebooks
    ]


ALONE = ("nothing", "word vectors", "knowledge graph")


# `vqvae.embeddings.weight` and no layer beside it would be a codebook, by every convention.
@pytest.mark.parametrize("case", [c for c in NONE if c.name not in ALONE], ids=lambda c: c.name)
@pytest.mark.parametrize("prefix", ["module.", "model.", "vqvae.", "vq_model."])
def test_a_prefix_makes_no_codebook(case: StateDict, prefix: str) -> None:
    assert answer(find_codebooks({prefix + key: shape for key, shape in case.shapes.items()})) == {}


@each_with_codebooks
def test_the_order_of_the_keys_changes_nothing(case: StateDict) -> None:
    assert find_codebooks(dict(reversed(case.shapes.items()))) == find_codebooks(case.shapes)


def test_reads_no_tensor_and_imports_no_torch() -> None:
    tree = ast.parse(Path(detect.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= {
        "__future__",
        "re",
        "bisect",
        "math",
        "collections",
        "collections.abc",
        "dataclasses",
        "itertools",
        "functools",
        "codebook_tools.checkpoints.forms",
        "codebook_tools.checkpoints.tensors",  # which a subprocess has shown to load none, either
    }


@pytest.mark.parametrize("stages", [0, 32])
def test_a_large_language_model_is_listed_in_seconds(stages: int) -> None:
    # A search over pairs of its 40,000 keys, or a pattern that backtracks over all of them, would take minutes.
    shapes: Shapes = {f"model.layers.{i // 200}.experts.{i % 200}.up_proj.weight": (64, 32) for i in range(40_000)}
    shapes |= {f"codec.quantizer.layers.{i}.codebook.embed": (2048, 128) for i in range(stages)}
    start = time.perf_counter()
    found = find_codebooks(shapes)
    assert time.perf_counter() - start < 20
    assert len(found.codebooks) == stages and (found.reason is None) == bool(stages)
