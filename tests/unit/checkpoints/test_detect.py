"""Finding codebooks from names and shapes: the surveyed state dicts, and those of tests/support/layouts/."""

from __future__ import annotations

import time

import pytest
from state_dicts import SURVEY, Answer, Shapes, StateDict, convs, read_layouts, surveyed

from codebook_tools.checkpoints.detect import Detection, find_codebooks

CODEBOOKS, NONE = read_layouts("codebooks"), read_layouts("none")
each_with_codebooks = pytest.mark.parametrize("case", CODEBOOKS, ids=lambda case: case.name)
each_without = pytest.mark.parametrize("case", NONE, ids=lambda case: case.name)


def answer(detection: Detection) -> Answer:
    return {c.key: (c.size, c.dim, c.axis, c.heads) for c in detection.codebooks}


# --- the surveyed layouts ------------------------------------------------------------------------------------------
NEGATIVE = "not a codebook: "
REASONS = {"Beit": "patch", "FSQ": "FSQ", "LFQ": "LFQ"} | dict.fromkeys(
    ("T5", "Llama", "Whisper", "Dia", "UVit2D", "LlamaGen GPT (keys)", "VAR transformer (keys)"), "language model"
)
SEARCHES = {
    "euclidean": ("taming VQ2", "HF Encodec", "zalando"),
    "cosine": ("HF Dac", "SNAC/DAC original/DualCodec", "LlamaGen VQ-16"),
    "logits": ("HF Wav2Vec2 pretraining", "taming Gumbel", "DALLE-pytorch dVAE"),
    "unknown": ("lucid VQ", "VAR VQVAE", "lucid SimVQ", "VQGAN-LC"),
}
SEARCH_OF = {name: search for search, names in SEARCHES.items() for name in names}


@surveyed
@pytest.mark.parametrize("name", SURVEY)
def test_surveyed_layout(name: str) -> None:
    shapes = {key: tuple(shape) for key, shape in SURVEY[name]["tensors"].items()}
    detection = find_codebooks(shapes)
    expected = {key: (c["size"], c["dim"], c["axis"]) for key, c in SURVEY[name]["codebooks"].items()}
    assert {c.key: (c.size, c.dim, c.axis) for c in detection.codebooks} == expected
    assert (detection.reason is None) == bool(expected) != name.startswith(NEGATIVE)
    if not expected:
        assert REASONS[name.removeprefix(NEGATIVE)] in str(detection.reason)
    for c in detection.codebooks:
        assert all(key in shapes for key in c.companions) and c.key not in c.companions
        assert c.search == SEARCH_OF.get(name, c.search)


# --- layouts written down -------------------------------------------------------------------------------------------
@each_with_codebooks
def test_written_layout(case: StateDict) -> None:
    detection = find_codebooks(case.shapes)
    search, confidence = case.said if len(case.said) == 2 else (*case.said, "high")
    assert answer(detection) == case.codebooks
    assert {(c.search, c.confidence) for c in detection.codebooks} == {(search, confidence)}
    assert detection.reason is None
    for c in detection.codebooks:
        assert all(c.size in case.shapes[key] for key in c.companions)
        assert not case.codebooks.keys() & set(c.companions)
    listed = {*case.codebooks, *(key for c in detection.codebooks for key in c.companions)}
    assert not listed & {key for key, _ in detection.elsewhere}
    assert find_codebooks(dict(reversed(case.shapes.items()))) == detection


@each_without
def test_written_negative(case: StateDict) -> None:
    detection = find_codebooks(case.shapes)
    assert answer(detection) == {} and detection.elsewhere == ()
    (word,) = case.said
    assert detection.reason is not None and word in detection.reason


@each_with_codebooks
def test_a_prefix_on_every_key_changes_nothing(case: StateDict) -> None:
    plain = find_codebooks(case.shapes)
    for prefix in ("module.", "first_stage_model.", "_orig_mod.", "net.vqvae."):
        behind = find_codebooks({prefix + key: shape for key, shape in case.shapes.items()})
        assert {key.removeprefix(prefix): value for key, value in answer(behind).items()} == answer(plain)
        companions = [tuple(prefix + key for key in book.companions) for book in plain.codebooks]
        assert [book.companions for book in behind.codebooks] == companions


ALONE = ("nothing", "word vectors", "knowledge graph")


# `vqvae.embeddings.weight` and no layer beside it would be a codebook, by every convention.
@pytest.mark.parametrize("case", [c for c in NONE if c.name not in ALONE], ids=lambda c: c.name)
def test_a_prefix_makes_no_codebook(case: StateDict) -> None:
    for prefix in ("module.", "model.", "vqvae.", "vq_model."):
        assert answer(find_codebooks({prefix + key: shape for key, shape in case.shapes.items()})) == {}, prefix


# --- what is said of a codebook beside its key and shape ------------------------------------------------------------
LDM, Q = "quantize.embedding.weight", "quantizer."
FACTS: dict[str, tuple[Shapes, dict[str, set[str]], set[str]]] = {
    "what has an axis of K and the same owner": (
        {**convs(width=96), "_vq_vae._embedding.weight": (512, 64), "_vq_vae._ema_w": (512, 64)}
        | {"_vq_vae._ema_cluster_size": (512,), "_vq_vae.hits": (3, 512), "_vq_vae.temperature": (1,)},
        {"_vq_vae._embedding.weight": {"_vq_vae._ema_w", "_vq_vae._ema_cluster_size", "_vq_vae.hits"}}, set()),
    "numbered codebooks": (
        {f"{Q}codebooks.{i}": (256, 16) for i in (0, 1)}
        | {f"{Q}cluster_sizes.{i}": (256,) for i in (0, 1)} | {f"{Q}hits": (2, 256)},
        {f"{Q}codebooks.{i}": {f"{Q}cluster_sizes.{i}", f"{Q}hits"} for i in (0, 1)}, set()),
    "a padding row is no code": (
        {f"{Q}0.weight": (1025, 32), f"{Q}0.cluster_size_ema": (1024,), f"{Q}0.embed_ema": (1024, 32)},
        {f"{Q}0.weight": {f"{Q}0.cluster_size_ema", f"{Q}0.embed_ema"}}, set()),
    "a window of recent indices longer than K": (
        {**convs(latent=4), LDM: (16384, 4), "quantize.codebook_used": (65536,)}, {LDM: set()}, set()),
    "a window of recent indices of length K": (
        {**convs(latent=4), LDM: (16384, 4), "quantize.codebook_used": (16384,)},
        {LDM: {"quantize.codebook_used"}}, set()),
    "shadows without dots": (
        {**convs(), LDM: (512, 64), f"pixel_{LDM}": (512, 64), "model_ema.decoderconv_inweight": (128, 64, 3, 3)}
        | {f"model_ema.{name}quantizeembeddingweight": (512, 64) for name in ("", "pixel_")},
        {f"{name}{LDM}": {f"model_ema.{name}quantizeembeddingweight"} for name in ("pixel_", "")}, set()),
    "a shadow module with its statistics": (
        {**convs(latent=4), LDM: (16384, 4), f"ema_{LDM}": (16384, 4), "ema_encoder.conv_in.weight": (128, 3, 3, 3)}
        | {"quantize.cluster_size": (16384,), "ema_quantize.cluster_size": (16384,)},
        {LDM: {"quantize.cluster_size", "ema_quantize.cluster_size", f"ema_{LDM}"}}, set()),
    "a shadow behind the prefix of its model": (
        {f"first.{LDM}": (256, 4), "first.model_ema.quantizeembeddingweight": (256, 4)},
        {f"first.{LDM}": {"first.model_ema.quantizeembeddingweight"}}, set()),
    "a projection whose width happens to be K": (
        {f"{Q}in_proj.weight": (8, 1024, 1), f"{Q}out_proj.weight": (1024, 8, 1), f"{Q}codebook.weight": (1024, 8)},
        {f"{Q}codebook.weight": set()}, {f"{Q}in_proj.weight", f"{Q}out_proj.weight"}),
    "a convolution without bias that is called like a codebook": (
        {**convs(), LDM: (512, 64), "quantize.embed.weight": (512, 64, 1)}, {LDM: {"quantize.embed.weight"}}, set()),
    "an encoder inside the quantizer": (
        {f"{Q}embedding.weight": (512, 64), f"{Q}cluster_size": (512,), f"{Q}encoder.fc.weight": (512, 64)},
        {f"{Q}embedding.weight": {f"{Q}cluster_size"}}, {f"{Q}encoder.fc.weight"}),
    "a projection to logits": (
        {**convs(), LDM: (512, 64), "quantize.proj.weight": (512, 64, 1, 1), "quantize.proj.bias": (512,)},
        {LDM: {"quantize.proj.weight", "quantize.proj.bias"}}, set()),
    "K to K + 4 of a prior": (
        {**convs(), LDM: (512, 64), "prior.tok.weight": (513, 96), "prior.head.weight": (512, 96)}
        | {"prior.mask.weight": (96, 514), "prior.other.weight": (517, 511), "prior.special.weight": (516, 96)},
        {LDM: set()}, {"prior.head.weight", "prior.mask.weight", "prior.special.weight", "prior.tok.weight"}),
    "a head over the codes of all codebooks, in natural order": (
        {f"rvq.{i}._codebook.embed": (1, 16, 8) for i in (10, 2, 1, 0, 11)}
        | {"head.weight": (80, 30), "tok.weight": (84, 30), "wide.weight": (85, 30)},
        {f"rvq.{i}._codebook.embed": set() for i in (0, 1, 2, 10, 11)}, {"head.weight", "tok.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_companions_belong_to_a_codebook_and_what_else_may_follow_k_is_listed(name: str) -> None:
    shapes, companions, elsewhere = FACTS[name]
    detection = find_codebooks(shapes)
    assert [(c.key, c.companions) for c in detection.codebooks] == [
        (key, tuple(sorted(names))) for key, names in companions.items()
    ]
    assert detection.elsewhere == tuple((key, shapes[key]) for key in sorted(elsewhere))


def test_floats_are_codebooks_of_their_dtype_and_sure_where_they_lie_one_way() -> None:
    shapes: Shapes = {"quantizer.codebook": (512, 64), "quantizer.embedding.weight": (512, 64)}
    for dtype in ("F64", "F32", "F16", "BF16", "F8_E4M3"):
        (c,) = find_codebooks(shapes, {"quantizer.codebook": "I64", "quantizer.embedding.weight": dtype}).codebooks
        assert (c.key, c.dtype) == ("quantizer.embedding.weight", dtype)
    for shape, confidence in (((64, 512), "low"), ((512, 64), "high")):  # which could lie either way
        assert find_codebooks({"quantizer.codebook": shape}).codebooks[0].confidence == confidence


def test_a_codebook_that_is_no_rows_of_floats_is_named_as_what_it_is() -> None:
    key, conv, rows = "_vq_vae._embedding.weight", "_encoder._conv_1.weight", (512, 64)
    for shape, dtype in ((rows, "I8"), (rows, "BOOL"), (rows, "C64"), ((0, 64), "F32"), ((512, 0), "F32")):
        detection = find_codebooks({key: shape, conv: (64, 3, 3, 3)}, {key: dtype, conv: "F32"})
        reason = f"{key} is {dtype} {[*shape]}, where a codebook is rows of floats"
        assert detection.codebooks == () and detection.reason == reason


@pytest.mark.parametrize("stages", [0, 32])
def test_a_large_language_model_is_searched_in_linear_time(stages: int) -> None:
    # A search over pairs of keys, or a pattern that backtracks over all of them, would take minutes.
    shapes: Shapes = {f"model.layers.{i // 200}.experts.{i % 200}.up_proj.weight": (64, 32) for i in range(15_000)}
    shapes |= {f"codec.quantizer.layers.{i}.codebook.embed": (2048, 128) for i in range(stages)}
    start = time.perf_counter()
    detection = find_codebooks(shapes)
    assert time.perf_counter() - start < 10
    assert len(detection.codebooks) == stages and (detection.reason is None) == bool(stages)
