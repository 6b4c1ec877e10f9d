"""Finding codebooks from names and shapes: the surveyed state dicts, and others written before the detector was."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest

from codebook_tools.checkpoints import detect
from codebook_tools.checkpoints.detect import Detection, find_codebooks

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Answer = dict[str, tuple[int, int, int, int]]
"""key -> size, dim, axis, heads."""

LAYOUTS_JSON = Path(__file__).parents[1] / ".." / "shared" / "data" / "layouts.json"
SURVEY = json.loads(LAYOUTS_JSON.read_text()) if LAYOUTS_JSON.exists() else {}
NEGATIVE = "not a codebook: "


def answer(found: Detection) -> Answer:
    return {c.key: (c.size, c.dim, c.axis, c.heads) for c in found.codebooks}


# --- the surveyed layouts ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SURVEY, reason="../shared/data/layouts.json is absent")
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


@pytest.mark.skipif(not SURVEY, reason="../shared/data/layouts.json is absent")
@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("T5", "language model"),
        ("Llama", "language model"),
        ("Whisper", "language model"),
        ("LlamaGen GPT (keys)", "language model"),
        ("Beit", "patch"),
        ("FSQ", "FSQ"),
        ("LFQ", "LFQ"),
    ],
)
def test_surveyed_negative_says_why(name: str, word: str) -> None:
    shapes = {key: tuple(shape) for key, shape in SURVEY[NEGATIVE + name]["tensors"].items()}
    reason = find_codebooks(shapes).reason
    assert reason is not None and word in reason


@pytest.mark.skipif(not SURVEY, reason="../shared/data/layouts.json is absent")
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


# --- layouts held out: written before the detector ------------------------------------------------------------------


def convs(prefix: str = "", latent: int = 64, width: int = 128) -> Shapes:
    """The encoder and decoder of a plain convolutional autoencoder of images."""
    return {
        f"{prefix}encoder.conv_in.weight": (width, 3, 3, 3),
        f"{prefix}encoder.conv_in.bias": (width,),
        f"{prefix}encoder.conv_out.weight": (latent, width, 3, 3),
        f"{prefix}encoder.conv_out.bias": (latent,),
        f"{prefix}decoder.conv_in.weight": (width, latent, 3, 3),
        f"{prefix}decoder.conv_in.bias": (width,),
        f"{prefix}decoder.conv_out.weight": (3, width, 3, 3),
        f"{prefix}decoder.conv_out.bias": (3,),
    }


def gpt(prefix: str = "", width: int = 192, vocabulary: int = 1000) -> Shapes:
    """A small GPT with its vocabulary in and out."""
    return {
        f"{prefix}wte.weight": (vocabulary, width),
        f"{prefix}wpe.weight": (256, width),
        f"{prefix}h.0.attn.c_attn.weight": (width, 3 * width),
        f"{prefix}h.0.attn.c_attn.bias": (3 * width,),
        f"{prefix}h.0.mlp.c_fc.weight": (width, 4 * width),
        f"{prefix}h.0.ln_1.weight": (width,),
        f"{prefix}ln_f.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }


@dataclass(frozen=True)
class HeldOut:
    name: str
    shapes: Shapes
    codebooks: Answer
    search: str = "euclidean"
    confidence: str = "high"


TRANSPOSED = {"encoder.0.weight": (32, 3, 4, 4), "encoder.2.weight": (24, 32, 4, 4), "decoder.0.weight": (24, 32, 4, 4)}

POSITIVE = [
    HeldOut(
        "Jukebox: bare k under a bottleneck",
        {
            **{f"bottleneck.level_blocks.{i}.k": (2048, 64) for i in range(3)},
            "encoders.0.level_blocks.0.model.0.0.weight": (32, 1, 4),
            "encoders.0.level_blocks.0.model.3.weight": (64, 32, 3),
            "decoders.0.level_blocks.0.model.0.weight": (32, 64, 3),
            "decoders.0.out.weight": (1, 64, 3),
        },
        {f"bottleneck.level_blocks.{i}.k": (2048, 64, 0, 1) for i in range(3)},
    ),
    HeldOut(
        "Jukebox clone with its sums stored",
        {
            "vqvae.bottleneck.level_blocks.0.k": (512, 64),
            "vqvae.bottleneck.level_blocks.0.k_sum": (512, 64),
            "vqvae.bottleneck.level_blocks.0.k_elem": (512,),
            "vqvae.encoders.0.model.0.weight": (64, 1, 4),
            "vqvae.decoders.0.model.0.weight": (64, 64, 3),
        },
        {"vqvae.bottleneck.level_blocks.0.k": (512, 64, 0, 1)},
    ),
    HeldOut(
        "VideoGPT: codebook.embeddings with N and z_avg",
        {
            "encoder.convs.0.conv.weight": (240, 3, 4, 4, 4),
            "pre_vq_conv.conv.weight": (256, 240, 1, 1, 1),
            "pre_vq_conv.conv.bias": (256,),
            "post_vq_conv.conv.weight": (240, 256, 1, 1, 1),
            "codebook.embeddings": (2048, 256),
            "codebook.N": (2048,),
            "codebook.z_avg": (2048, 256),
        },
        {"codebook.embeddings": (2048, 256, 0, 1)},
    ),
    HeldOut(
        "Tortoise dVAE: codebook.embed stored (D, K)",
        {
            "encoder.0.0.weight": (256, 80, 3),
            "encoder.5.weight": (512, 512, 1),
            "decoder.0.weight": (1024, 512, 3),
            "codebook.embed": (512, 8192),
            "codebook.cluster_size": (8192,),
            "codebook.embed_avg": (512, 8192),
        },
        {"codebook.embed": (8192, 512, 1, 1)},
    ),
    HeldOut(
        "FunCodec: all residual stages in one tensor",
        {
            "quantizer.rq.model.inited": (32, 1),
            "quantizer.rq.model.cluster_size": (32, 1024),
            "quantizer.rq.model.embed": (32, 1024, 128),
            "quantizer.rq.model.embed_avg": (32, 1024, 128),
            "encoder.model.0.conv.conv.weight": (32, 1, 7),
        },
        {"quantizer.rq.model.embed": (1024, 128, 1, 32)},
    ),
    HeldOut(
        "SpeechTokenizer: K equals D",
        {
            **{f"quantizer.vq.layers.{i}._codebook.inited": (1,) for i in range(8)},
            **{f"quantizer.vq.layers.{i}._codebook.cluster_size": (1024,) for i in range(8)},
            **{f"quantizer.vq.layers.{i}._codebook.embed": (1024, 1024) for i in range(8)},
            **{f"quantizer.vq.layers.{i}._codebook.embed_avg": (1024, 1024) for i in range(8)},
            "transform.weight": (768, 1024),
            "transform.bias": (768,),
            "encoder.model.15.conv.conv.weight": (1024, 1024, 7),
            "decoder.model.0.conv.conv.weight": (1024, 1024, 7),
        },
        {f"quantizer.vq.layers.{i}._codebook.embed": (1024, 1024, 0, 1) for i in range(8)},
    ),
    HeldOut(
        "HiFi-Codec: groups and residual stages",
        {
            **{f"quantizer.quantizer_modules.{i}.embedding.weight": (1024, 256) for i in range(2)},
            **{f"quantizer.quantizer_modules2.{i}.embedding.weight": (1024, 256) for i in range(2)},
            "encoder.conv_pre.weight_v": (32, 1, 7),
            "generator.conv_pre.weight_v": (512, 512, 7),
        },
        {
            f"quantizer.quantizer_modules{s}.{i}.embedding.weight": (1024, 256, 0, 1)
            for s in ("", "2")
            for i in range(2)
        },
    ),
    HeldOut(
        "Kyutai Moshi codec: embedding_sum over cluster_usage",
        {
            "quantizer.rvq_first.input_proj.weight": (256, 512, 1),
            "quantizer.rvq_first.output_proj.weight": (512, 256, 1),
            "quantizer.rvq_first.vq.layers.0._codebook._initialized": (1,),
            "quantizer.rvq_first.vq.layers.0._codebook.cluster_usage": (2048,),
            "quantizer.rvq_first.vq.layers.0._codebook.embedding_sum": (2048, 256),
            "quantizer.rvq_rest.vq.layers.0._codebook.cluster_usage": (2048,),
            "quantizer.rvq_rest.vq.layers.0._codebook.embedding_sum": (2048, 256),
        },
        {f"quantizer.rvq_{s}.vq.layers.0._codebook.embedding_sum": (2048, 256, 0, 1) for s in ("first", "rest")},
    ),
    HeldOut(
        "fairseq wav2vec 2.0: quantizer.vars",
        {
            "quantizer.vars": (1, 640, 128),
            "quantizer.weight_proj.weight": (640, 512),
            "quantizer.weight_proj.bias": (640,),
            "project_q.weight": (256, 256),
            "mask_emb": (768,),
            "feature_extractor.conv_layers.0.0.weight": (512, 1, 10),
            "final_proj.weight": (256, 768),
        },
        {"quantizer.vars": (640, 128, 1, 1)},
        search="logits",
    ),
    HeldOut(
        "fairseq vq-wav2vec k-means: groups on the middle axis",
        {
            "vector_quantizer.embedding": (320, 2, 256),
            "vector_quantizer.projection.0.weight": (512, 256, 1),
            "vector_quantizer.projection.1.weight": (512,),
            "feature_extractor.conv_layers.0.0.weight": (512, 1, 10),
        },
        {"vector_quantizer.embedding": (320, 256, 0, 2)},
    ),
    HeldOut(
        "torchtools VectorQuantize of the first Paella",
        {
            **convs(latent=4),
            "vquantizer.codebook.weight": (8192, 4),
            "vquantizer.ema_element_count": (8192,),
            "vquantizer.ema_weight_sum": (8192, 4),
        },
        {"vquantizer.codebook.weight": (8192, 4, 0, 1)},
    ),
    HeldOut(
        "parameter list: vq.codebooks.0",
        {**convs(), **{f"vq.codebooks.{i}": (256, 64) for i in range(4)}},
        {f"vq.codebooks.{i}": (256, 64, 0, 1) for i in range(4)},
    ),
    HeldOut(
        "numbered names: codebook_0",
        {**convs(), **{f"codebook_{i}.weight": (256 * (i + 1), 64) for i in range(3)}},
        {f"codebook_{i}.weight": (256 * (i + 1), 64, 0, 1) for i in range(3)},
    ),
    HeldOut(
        "underscored stack: _codebooks",
        {**convs(), "_quantizer._codebooks": (4, 256, 16)},
        {"_quantizer._codebooks": (256, 16, 1, 4)},
    ),
    HeldOut(
        "embed_code",
        {**convs(), "z_quantizer.embed_code.weight": (512, 64)},
        {"z_quantizer.embed_code.weight": (512, 64, 0, 1)},
    ),
    HeldOut(
        "T2M-GPT: a square buffer without companions",
        {"vqvae.encoder.model.0.weight": (512, 263, 3), "vqvae.quantizer.codebook": (512, 512)},
        {"vqvae.quantizer.codebook": (512, 512, 0, 1)},
    ),
    HeldOut(
        "dim first without companions: the encoder's channels tell",
        {**TRANSPOSED, "quantizer.codebook": (24, 512)},
        {"quantizer.codebook": (512, 24, 1, 1)},
    ),
    HeldOut(
        "nadavbh12 without EMA",
        {**TRANSPOSED, "emb.weight": (24, 512)},
        {"emb.weight": (512, 24, 1, 1)},
        search="unknown",
        confidence="low",
    ),
    HeldOut(
        "Keras documentation example",
        {
            "encoder/conv2d/kernel:0": (3, 3, 1, 32),
            "encoder/conv2d_2/kernel:0": (1, 1, 64, 16),
            "encoder/conv2d_2/bias:0": (16,),
            "vector_quantizer/embeddings_vqvae:0": (16, 128),
            "decoder/conv2d_transpose/kernel:0": (3, 3, 64, 16),
        },
        {"vector_quantizer/embeddings_vqvae:0": (128, 16, 1, 1)},
    ),
    HeldOut(
        "Sonnet VectorQuantizerEMA",
        {
            "vector_quantizer_ema.embeddings": (64, 512),
            "vector_quantizer_ema.ema_cluster_size.hidden": (512,),
            "vector_quantizer_ema.ema_cluster_size.average": (512,),
            "vector_quantizer_ema.ema_dw.hidden": (64, 512),
            "vector_quantizer_ema.ema_dw.average": (64, 512),
            "encoder.enc_1.w": (4, 4, 3, 64),
        },
        {"vector_quantizer_ema.embeddings": (512, 64, 1, 1)},
    ),
    HeldOut(
        "Flax VQGAN: embedding.embedding",
        {"quantize.embedding.embedding": (16384, 256), "quant_conv.kernel": (1, 1, 256, 256)},
        {"quantize.embedding.embedding": (16384, 256, 0, 1)},
    ),
    HeldOut(
        "vvvm23 VQ-VAE-2: three levels, dim first",
        {
            **convs(),
            **{f"codebooks.{i}.embed": (64, 512) for i in range(3)},
            **{f"codebooks.{i}.cluster_size": (512,) for i in range(3)},
            **{f"codebooks.{i}.embed_avg": (64, 512) for i in range(3)},
            **{f"codebooks.{i}.conv_in.weight": (64, 192, 1, 1) for i in range(3)},
            **{f"codebooks.{i}.conv_in.bias": (64,) for i in range(3)},
        },
        {f"codebooks.{i}.embed": (512, 64, 1, 1) for i in range(3)},
    ),
    HeldOut(
        "FeMaSR: quantize_group",
        {
            "multiscale_encoder.in_conv.weight": (64, 3, 4, 4),
            "quantize_group.0.embedding.weight": (1024, 512),
            "before_quant_group.0.weight": (512, 256, 1, 1),
            "before_quant_group.0.bias": (512,),
            "after_quant_group.0.conv.weight": (256, 512, 3, 3),
            "out_conv.weight": (3, 64, 3, 3),
        },
        {"quantize_group.0.embedding.weight": (1024, 512, 0, 1)},
    ),
    HeldOut(
        "latent diffusion behind first_stage_model, class embedding beside it",
        {
            **convs("first_stage_model.", latent=3),
            "first_stage_model.quantize.embedding.weight": (8192, 3),
            "first_stage_model.quant_conv.weight": (3, 3, 1, 1),
            "first_stage_model.post_quant_conv.weight": (3, 3, 1, 1),
            "cond_stage_model.embedding.weight": (1001, 512),
            "model.diffusion_model.input_blocks.0.0.weight": (192, 3, 3, 3),
            "model.diffusion_model.time_embed.0.weight": (768, 192),
            "model_ema.diffusion_modelinput_blocks00weight": (192, 3, 3, 3),
        },
        {"first_stage_model.quantize.embedding.weight": (8192, 3, 0, 1)},
    ),
    HeldOut(
        "taming Net2Net: two VQ models and a transformer",
        {
            **convs("first_stage_model.", latent=256),
            **convs("cond_stage_model.", latent=256),
            "first_stage_model.quantize.embedding.weight": (1024, 256),
            "cond_stage_model.quantize.embedding.weight": (512, 256),
            "transformer.tok_emb.weight": (1024, 1024),
            "transformer.pos_emb": (1, 512, 1024),
            "transformer.head.weight": (1024, 1024),
        },
        {
            "first_stage_model.quantize.embedding.weight": (1024, 256, 0, 1),
            "cond_stage_model.quantize.embedding.weight": (512, 256, 0, 1),
        },
    ),
    HeldOut(
        "compiled, parallel and wrapped: module._orig_mod.model.",
        {**convs("module._orig_mod.model."), "module._orig_mod.model.vq_layer.embedding.weight": (512, 64)},
        {"module._orig_mod.model.vq_layer.embedding.weight": (512, 64, 0, 1)},
    ),
    HeldOut(
        "VQ-Diffusion with its token transformer",
        {
            "content_codec.quantize.embedding": (2886, 256),
            "content_codec.enc.encoder.conv_in.weight": (128, 3, 3, 3),
            "transformer.transformer.content_emb.emb.weight": (2887, 1024),
            "transformer.transformer.content_emb.height_emb.weight": (32, 1024),
            "transformer.transformer.to_logits.1.weight": (2886, 1024),
        },
        {"content_codec.quantize.embedding": (2886, 256, 0, 1)},
    ),
    HeldOut(
        "MAGE: masked transformer round a VQGAN",
        {
            **convs("vqgan.", latent=256),
            "vqgan.quantize.embedding.weight": (1024, 256),
            "token_emb.word_embeddings.weight": (2025, 768),
            "token_emb.position_embeddings.weight": (257, 768),
            "pos_embed": (1, 257, 768),
            "mask_token": (1, 1, 768),
            "mlm_layer.fc.weight": (768, 768),
        },
        {"vqgan.quantize.embedding.weight": (1024, 256, 0, 1)},
    ),
    HeldOut(
        "language model with a VQ model inside",
        {
            **gpt("transformer."),
            **convs("model.vision_tokenizer.", latent=8),
            "model.vision_tokenizer.quantize.embedding.weight": (16384, 8),
            "model.gen_embed.weight": (16384, 8),
        },
        {"model.vision_tokenizer.quantize.embedding.weight": (16384, 8, 0, 1)},
    ),
    HeldOut(
        "Whisper encoder with a codebook in its middle (GLM-4-Voice)",
        {
            "encoder.conv1.weight": (1280, 128, 3),
            "encoder.embed_positions.weight": (1500, 1280),
            "encoder.embed_positions2.weight": (375, 1280),
            "encoder.codebook.weight": (16384, 1280),
            "encoder.ema_count": (16384,),
            "encoder.ema_weight": (16384, 1280),
            "encoder.layers.0.self_attn.q_proj.weight": (1280, 1280),
        },
        {"encoder.codebook.weight": (16384, 1280, 0, 1)},
    ),
    HeldOut(
        "EMA copy of the whole model beside it",
        {
            **convs("model."),
            **convs("ema_model."),
            "model.quantizer.embedding.weight": (512, 64),
            "ema_model.quantizer.embedding.weight": (512, 64),
        },
        {"model.quantizer.embedding.weight": (512, 64, 0, 1)},
    ),
    HeldOut(
        "only the EMA weights were kept",
        {**convs("params_ema."), "params_ema.quantize.embedding.weight": (1024, 64)},
        {"params_ema.quantize.embedding.weight": (1024, 64, 0, 1)},
    ),
    HeldOut(
        "RQ-VAE for recommenders: multilayer perceptrons round residual layers",
        {
            "encoder.mlp_layers.1.weight": (512, 768),
            "encoder.mlp_layers.1.bias": (512,),
            "decoder.mlp_layers.1.weight": (512, 32),
            **{f"rq.vq_layers.{i}.embedding.weight": (256, 32) for i in range(3)},
        },
        {f"rq.vq_layers.{i}.embedding.weight": (256, 32, 0, 1) for i in range(3)},
    ),
    HeldOut(
        "recommender whose layers have no telling name",
        {
            "encoder.mlp.0.weight": (512, 768),
            "encoder.mlp.2.weight": (32, 512),
            "decoder.mlp.0.weight": (512, 32),
            **{f"layers.{i}.embedding.weight": (256, 32) for i in range(3)},
        },
        {f"layers.{i}.embedding.weight": (256, 32, 0, 1) for i in range(3)},
        search="unknown",
        confidence="low",
    ),
    HeldOut(
        "self-made EMA quantiser",
        {
            **convs(),
            "bottleneck.codebook": (300, 64),
            "bottleneck.ema_count": (300,),
            "bottleneck.ema_sum": (300, 64),
            "bottleneck.usage": (300,),
            "bottleneck.initialized": (1,),
        },
        {"bottleneck.codebook": (300, 64, 0, 1)},
    ),
    HeldOut(
        "QINCo: codebook and steps",
        {
            "codebook0.weight": (256, 128),
            "steps.0.codebook.weight": (256, 128),
            "steps.0.MLPconcat.weight": (128, 256),
            "steps.0.MLPconcat.bias": (128,),
            "steps.0.residual_blocks.0.0.weight": (256, 128),
        },
        {"codebook0.weight": (256, 128, 0, 1), "steps.0.codebook.weight": (256, 128, 0, 1)},
    ),
    HeldOut(
        "product quantisation: centroids of each sub-space",
        {"pq.centroids": (8, 256, 16), "backbone.fc.weight": (128, 512)},
        {"pq.centroids": (256, 16, 1, 8)},
    ),
    HeldOut(
        "BEST-RQ: frozen projection and codebook",
        {
            "quantizer.random_projection": (320, 16),
            "quantizer.codebook": (8192, 16),
            "encoder.layers.0.self_attn.linear_q.weight": (512, 512),
        },
        {"quantizer.codebook": (8192, 16, 0, 1)},
    ),
    HeldOut(
        "DAC with old weight norm, width equal to K",
        {
            **{f"quantizer.quantizers.{i}.in_proj.weight_g": (8, 1, 1) for i in range(11)},
            **{f"quantizer.quantizers.{i}.in_proj.weight_v": (8, 1024, 1) for i in range(11)},
            **{f"quantizer.quantizers.{i}.in_proj.bias": (8,) for i in range(11)},
            **{f"quantizer.quantizers.{i}.out_proj.weight_g": (1024, 1, 1) for i in range(11)},
            **{f"quantizer.quantizers.{i}.out_proj.weight_v": (1024, 8, 1) for i in range(11)},
            **{f"quantizer.quantizers.{i}.out_proj.bias": (1024,) for i in range(11)},
            **{f"quantizer.quantizers.{i}.codebook.weight": (1024, 8) for i in range(11)},
            "decoder.model.0.weight_v": (1536, 1024, 7),
        },
        {f"quantizer.quantizers.{i}.codebook.weight": (1024, 8, 0, 1) for i in range(11)},
        search="cosine",
    ),
    HeldOut(
        "bshall: one codebook for each latent dimension, all in one buffer",
        {
            **convs(),
            "codebook.embedding": (8, 128, 32),
            "codebook.ema_count": (8, 128),
            "codebook.ema_weight": (8, 128, 32),
        },
        {"codebook.embedding": (128, 32, 1, 8)},
    ),
    HeldOut(
        "ZeroSpeech: the codebook is part of the encoder",
        {
            "encoder.conv.weight": (768, 80, 4),
            "encoder.codebook.embedding": (512, 64),
            "encoder.codebook.ema_count": (512,),
            "encoder.codebook.ema_weight": (512, 64),
            "decoder.rnn1.weight_ih_l0": (2688, 192),
        },
        {"encoder.codebook.embedding": (512, 64, 0, 1)},
    ),
    HeldOut(
        "PCT: buffers of the tokenizer itself",
        {
            "tokenizer.encoder.0.mlp.weight": (64, 64),
            "tokenizer.codebook": (2048, 512),
            "tokenizer.ema_cluster_size": (2048,),
            "tokenizer.ema_w": (2048, 512),
            "tokenizer.feature_embed.weight": (512, 128),
            "tokenizer.feature_embed.bias": (512,),
            "tokenizer.decoder_token_mlp.weight": (17, 34),
        },
        {"tokenizer.codebook": (2048, 512, 0, 1)},
    ),
    HeldOut(
        "Haiku: tildes in the path",
        {
            "vqvae/~/vector_quantizer_ema/embeddings": (64, 512),
            "vqvae/~/vector_quantizer_ema/ema_cluster_size/hidden": (512,),
            "vqvae/~/vector_quantizer_ema/ema_dw/hidden": (64, 512),
            "vqvae/~/conv2_d/w": (4, 4, 3, 64),
        },
        {"vqvae/~/vector_quantizer_ema/embeddings": (512, 64, 1, 1)},
    ),
    HeldOut(
        "module dictionary: quantizers.top",
        {
            **convs(),
            "quantizers.top.embedding.weight": (512, 64),
            "quantizers.bottom.embedding.weight": (1024, 64),
        },
        {"quantizers.bottom.embedding.weight": (1024, 64, 0, 1), "quantizers.top.embedding.weight": (512, 64, 0, 1)},
    ),
    HeldOut(
        "two levels named on the buffers",
        {
            **convs(),
            "vq.codebook_top": (512, 64),
            "vq.codebook_bottom": (256, 64),
            "vq.ema_count_top": (512,),
            "vq.ema_count_bottom": (256,),
        },
        {"vq.codebook_bottom": (256, 64, 0, 1), "vq.codebook_top": (512, 64, 0, 1)},
    ),
    HeldOut(
        "the quantiser is itself the embedding layer",
        {**convs(), "quantizer.weight": (512, 64)},
        {"quantizer.weight": (512, 64, 0, 1)},
    ),
    HeldOut(
        "a dictionary in a quantiser, with the usage of its entries",
        {**convs(), "vq.dictionary.weight": (512, 64), "vq.usage": (512,)},
        {"vq.dictionary.weight": (512, 64, 0, 1)},
    ),
    HeldOut(
        "EMA copy whose prefix is shorter than the model's",
        {
            **convs("vqvae."),
            "vqvae.vector_quantizer.embedding.weight": (512, 64),
            "ema.vector_quantizer.embedding.weight": (512, 64),
        },
        {"vqvae.vector_quantizer.embedding.weight": (512, 64, 0, 1)},
    ),
    HeldOut(
        "CSM: a codec inside a speech language model",
        {
            "backbone_model.embed_tokens.embed_audio_tokens.weight": (65632, 2048),
            "backbone_model.layers.0.self_attn.q_proj.weight": (2048, 2048),
            "depth_decoder.codebooks_head.weight": (31, 1024, 2051),
            "codec_model.quantizer.semantic_residual_vector_quantizer.layers.0.codebook.cluster_usage": (2048,),
            "codec_model.quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum": (2048, 256),
            "codec_model.quantizer.semantic_residual_vector_quantizer.input_proj.weight": (256, 512, 1),
            "lm_head.weight": (2051, 2048),
        },
        {"codec_model.quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum": (2048, 256, 0, 1)},
    ),
    HeldOut(
        "VQGAN with its training losses beside it",
        {
            **convs(latent=256),
            "quantize.embedding.weight": (1024, 256),
            "loss.perceptual_loss.lin0.model.1.weight": (1, 64, 1, 1),
            "loss.discriminator.main.0.weight": (64, 3, 4, 4),
            "loss.discriminator.embed.weight": (1000, 512),
        },
        {"quantize.embedding.weight": (1024, 256, 0, 1)},
    ),
    HeldOut(
        "hidden width equal to K all through a self-attending VQ model",
        {
            "encoder.layers.0.self_attn.q_proj.weight": (512, 512),
            "encoder.proj_out.weight": (64, 512),
            "quantizer.embedding.weight": (512, 64),
            "decoder.proj_in.weight": (512, 64),
            "decoder.layers.0.self_attn.q_proj.weight": (512, 512),
            "decoder.head.weight": (512, 512),
        },
        {"quantizer.embedding.weight": (512, 64, 0, 1)},
    ),
    *(
        HeldOut(
            f"a vague name in a quantiser: {name}",
            {**convs(), f"quantizer.{name}": (512, 64), "quantizer.temperature": ()},
            {f"quantizer.{name}": (512, 64, 0, 1)},
            search="unknown",
            confidence="low",
        )
        for name in ("embedding_matrix", "embedding_layer.weight", "lookup_table.weight", "W")
    ),
    HeldOut(
        "two codebooks of one size in one quantiser",
        {**convs(), "quantizer.semantic_codebook": (512, 64), "quantizer.acoustic_codebook": (512, 64)},
        {"quantizer.acoustic_codebook": (512, 64, 0, 1), "quantizer.semantic_codebook": (512, 64, 0, 1)},
    ),
    HeldOut(
        "heads stacked over codes that lie dim first",
        {"vq.embed": (2, 64, 512), "vq.cluster_size": (2, 512), "vq.embed_avg": (2, 64, 512)},
        {"vq.embed": (512, 64, 2, 2)},
    ),
    HeldOut(
        "lucidrains with affine parameters: vectors of length D beside those of length K",
        {
            "vq._codebook.embed": (1, 512, 16),
            "vq._codebook.cluster_size": (1, 512),
            "vq._codebook.codebook_mean": (1, 1, 16),
            "vq._codebook.codebook_variance": (1, 1, 16),
        },
        {"vq._codebook.embed": (512, 16, 1, 1)},
        search="unknown",
    ),
    HeldOut(
        "fewer codes than dimensions, dim first",
        {"quantize.embed": (256, 64), "quantize.cluster_size": (64,), "quantize.embed_avg": (256, 64)},
        {"quantize.embed": (64, 256, 1, 1)},
    ),
    HeldOut(
        "the buffers of a quantiser saved alone",
        {"embedding": (512, 64), "ema_cluster_size": (512,), "ema_w": (512, 64)},
        {"embedding": (512, 64, 0, 1)},
    ),
    HeldOut(
        "ema-pytorch: an online and an averaged model",
        {
            **{f"{m}.vq._codebook.embed": (1, 512, 64) for m in ("online_model", "ema_model")},
            **{f"{m}.vq._codebook.cluster_size": (1, 512) for m in ("online_model", "ema_model")},
        },
        {"online_model.vq._codebook.embed": (512, 64, 1, 1)},
        search="unknown",
    ),
    HeldOut(
        "fewer codes than dimensions in an embedding layer, the rest of the model left out",
        {"quantize.embedding.weight": (64, 512)},
        {"quantize.embedding.weight": (64, 512, 0, 1)},
    ),
    HeldOut(
        "a sum for each code, and no count",
        {"vq.codebook": (300, 32), "vq.cluster_sum": (300, 32)},
        {"vq.codebook": (300, 32, 0, 1)},
    ),
]

NEGATIVES: dict[str, tuple[Shapes, str]] = {
    "GPT-2": (gpt("transformer."), "language model"),
    "BERT": (
        {
            "embeddings.word_embeddings.weight": (30522, 768),
            "embeddings.position_embeddings.weight": (512, 768),
            "embeddings.token_type_embeddings.weight": (2, 768),
            "encoder.layer.0.attention.self.query.weight": (768, 768),
        },
        "language model",
    ),
    "CLIP": (
        {
            "text_model.embeddings.token_embedding.weight": (49408, 512),
            "text_model.embeddings.position_embedding.weight": (77, 512),
            "vision_model.embeddings.class_embedding": (768,),
            "vision_model.embeddings.patch_embedding.weight": (768, 3, 32, 32),
            "vision_model.embeddings.position_embedding.weight": (50, 768),
            "text_projection.weight": (512, 512),
            "logit_scale": (),
        },
        "language model",
    ),
    "ViT": (
        {
            "cls_token": (1, 1, 768),
            "pos_embed": (1, 197, 768),
            "patch_embed.proj.weight": (768, 3, 16, 16),
            "blocks.0.attn.qkv.weight": (2304, 768),
            "head.weight": (1000, 768),
            "head.bias": (1000,),
        },
        "patch",
    ),
    "KL-VAE": (
        {**convs(latent=8), "quant_conv.weight": (8, 8, 1, 1), "post_quant_conv.weight": (4, 4, 1, 1)},
        "KL",
    ),
    "conditional VAE": (
        {**convs(), "embedding.weight": (100, 64), "fc_mu.weight": (32, 1024), "fc_logvar.weight": (32, 1024)},
        "KL",
    ),
    "plain autoencoder": (convs(), "no quantiser"),
    "autoencoder whose embedding is a linear layer": (
        {**convs(), "embedding.weight": (64, 2048), "embedding.bias": (64,)},
        "no quantiser",
    ),
    "PixelCNN over tokens": (
        {
            "embedding.weight": (512, 64),
            "layers.0.class_cond_embedding.weight": (10, 128),
            "layers.0.vert_stack.weight": (128, 64, 4, 7),
            "layers.0.vert_stack.bias": (128,),
            "output_conv.0.weight": (512, 64, 1, 1),
            "output_conv.2.weight": (512, 512, 1, 1),
        },
        "prior",
    ),
    "DiT with class labels": (
        {
            "y_embedder.embedding_table.weight": (1001, 1152),
            "x_embedder.proj.weight": (1152, 4, 2, 2),
            "t_embedder.mlp.0.weight": (1152, 256),
            "pos_embed": (1, 256, 1152),
        },
        "label",
    ),
    "conditional GAN": (
        {"label_emb.weight": (10, 100), "model.0.weight": (128, 110), "model.0.bias": (128,)},
        "label",
    ),
    "conditional autoencoder": ({**convs(), "label_embedding.weight": (1000, 64)}, "label"),
    "seq2seq transformer": (
        {
            "embedding.weight": (8000, 512),
            "transformer.encoder.layers.0.self_attn.in_proj_weight": (1536, 512),
            "transformer.decoder.layers.0.self_attn.in_proj_weight": (1536, 512),
            "generator.weight": (8000, 512),
        },
        "language model",
    ),
    "shared-embedding transformer": (
        {
            "embedding.weight": (8000, 512),
            "encoder.layers.0.self_attn.in_proj_weight": (1536, 512),
            "decoder.layers.0.self_attn.in_proj_weight": (1536, 512),
            "fc_out.weight": (8000, 512),
            "fc_out.bias": (8000,),
        },
        "language model",
    ),
    "seq2seq LSTM": (
        {
            "encoder.embedding.weight": (8000, 256),
            "encoder.rnn.weight_ih_l0": (2048, 256),
            "decoder.embedding.weight": (6000, 256),
            "decoder.rnn.weight_ih_l0": (2048, 256),
            "decoder.fc_out.weight": (6000, 512),
        },
        "language model",
    ),
    "Moshi: an embedding for each codebook": (
        {
            **{f"emb.{i}.weight": (2049, 4096) for i in range(3)},
            "text_emb.weight": (32001, 4096),
            "text_linear.weight": (32000, 4096),
            "linears.0.weight": (2048, 1024),
            "transformer.layers.0.self_attn.in_proj_weight": (12288, 4096),
        },
        "language model",
    ),
    "Fish Speech: codebook_embeddings in a language model": (
        {
            "embeddings.weight": (32000, 1024),
            "codebook_embeddings.weight": (4096, 1024),
            "layers.0.attention.wqkv.weight": (3072, 1024),
            "output.weight": (32000, 1024),
            "fast_output.weight": (1024, 1024),
        },
        "language model",
    ),
    "CSM: codebooks_head": (
        {
            "codebooks_head.weight": (31, 1024, 2051),
            "model.embed_tokens.weight": (65632, 2048),
            "model.layers.0.self_attn.q_proj.weight": (1024, 1024),
            "model.inputs_embeds_projector.weight": (1024, 2048),
        },
        "language model",
    ),
    "AudioLM: quantiser ids": (
        {
            "coarse_quantize_embedding.weight": (3, 512),
            "coarse_embedding.weight": (3072, 512),
            "coarse_logit_weights": (3, 1024, 512),
            "transformer.layers.0.0.to_q.weight": (512, 512),
        },
        "language model",
    ),
    "IQN: quantile embedding": (
        {"quantile_embedding.weight": (64, 128), "quantile_fc.weight": (512, 64), "fc.weight": (6, 512)},
        "--codebook-key",
    ),
    "Perceiver latents behind a bottleneck": (
        {**convs(), "bottleneck.latents": (32, 512), "bottleneck.cross_attn.to_q.weight": (512, 512)},
        "no quantiser",
    ),
    "NetVLAD": ({"pool.centroids": (64, 512), "pool.conv.weight": (64, 512, 1, 1)}, "--codebook-key"),
    "SwAV prototypes": ({"prototypes.weight": (3000, 128), "layer1.0.conv1.weight": (64, 64, 1, 1)}, "--codebook-key"),
    "AQLM: codebooks of weights": (
        {
            "model.embed_tokens.weight": (32000, 4096),
            "model.layers.0.self_attn.q_proj.codebooks": (1, 65536, 1, 8),
            "model.layers.0.self_attn.q_proj.codes": (4096, 512, 1),
            "model.layers.0.self_attn.q_proj.scales": (4096, 1, 1, 1),
        },
        "language model",
    ),
    "bitsandbytes": (
        {
            "fc1.weight": (4096, 1),
            "fc1.weight.absmax": (128,),
            "fc1.weight.quant_map": (16,),
            "fc1.weight.quant_state.bitsandbytes__nf4": (90,),
        },
        "weights",
    ),
    "FSQ with its levels and implicit codebook stored": (
        {
            **convs(latent=4),
            "quantizer._levels": (4,),
            "quantizer._basis": (4,),
            "quantizer.implicit_codebook": (1000, 4),
        },
        "FSQ",
    ),
    "residual FSQ": (
        {"vq.residual_fsq.rvqs.0.project_in.weight": (4, 512), "vq.residual_fsq.rvqs.0.project_in.bias": (4,)},
        "FSQ",
    ),
    "LFQ with its table of bits stored": (
        {**convs(latent=12), "quantize.codebook": (4096, 12), "quantize.bits_to_indices": (12,)},
        "LFQ",
    ),
    "OpenAI dVAE: logits, and no codebook as such": (
        {
            "encoder.blocks.input.w": (256, 3, 7, 7),
            "encoder.blocks.output.conv.w": (8192, 2048, 1, 1),
            "decoder.blocks.input.w": (128, 8192, 1, 1),
            "decoder.blocks.output.conv.w": (6, 256, 1, 1),
        },
        "no quantiser",
    ),
    "VITS": (
        {
            "enc_p.emb.weight": (178, 192),
            "enc_p.encoder.attn_layers.0.conv_q.weight": (192, 192, 1),
            "enc_q.pre.weight": (192, 513, 1),
            "dec.conv_pre.weight": (512, 192, 7),
            "emb_g.weight": (109, 256),
        },
        "language model",
    ),
    "Tacotron 2": (
        {
            "embedding.weight": (148, 512),
            "encoder.convolutions.0.0.conv.weight": (512, 512, 5),
            "encoder.lstm.weight_ih_l0": (1024, 512),
            "decoder.prenet.layers.0.linear_layer.weight": (256, 80),
            "postnet.convolutions.0.0.conv.weight": (512, 80, 5),
        },
        "language model",
    ),
    "masked autoencoder": (
        {
            "cls_token": (1, 1, 768),
            "pos_embed": (1, 197, 768),
            "mask_token": (1, 1, 512),
            "decoder_pos_embed": (1, 197, 512),
            "decoder_embed.weight": (512, 768),
            "decoder_embed.bias": (512,),
            "patch_embed.proj.weight": (768, 3, 16, 16),
            "blocks.0.attn.qkv.weight": (2304, 768),
        },
        "patch",
    ),
    "DETR": (
        {
            "query_embed.weight": (100, 256),
            "class_embed.weight": (92, 256),
            "class_embed.bias": (92,),
            "transformer.encoder.layers.0.self_attn.in_proj_weight": (768, 256),
            "transformer.decoder.layers.0.self_attn.in_proj_weight": (768, 256),
            "backbone.0.body.conv1.weight": (64, 3, 7, 7),
        },
        "--codebook-key",
    ),
    "visual question answering": (
        {
            "vqa_model.embedding.weight": (20000, 300),
            "vqa_model.rnn.weight_ih_l0": (4096, 300),
            "vqa_model.classifier.weight": (3129, 1024),
        },
        "language model",
    ),
    "hash grid of a radiance field": (
        {
            "encoder.embeddings": (524288, 2),
            "encoder.offsets": (17,),
            "sigma_net.0.weight": (64, 32),
            "decoder.0.weight": (3, 64),
        },
        "--codebook-key",
    ),
    "DeepSDF latent codes": ({"latent_codes.weight": (5000, 256), "decoder.lin0.weight": (512, 259)}, "--codebook-key"),
    "conditional BigGAN discriminator": (
        {"embed.weight": (1000, 1536), "blocks.0.0.conv1.weight": (96, 3, 3, 3), "linear.weight": (1, 1536)},
        "--codebook-key",
    ),
    "word vectors": ({"embeddings.weight": (10000, 300)}, "language model"),
    "unit vocoder": (
        {"dict.weight": (100, 128), "spkr.weight": (10, 128), "conv_pre.weight": (512, 256, 7)},
        "--codebook-key",
    ),
    "weights fake-quantised for eight bits": (
        {
            "layers.0.fc1.weight": (4096, 1024),
            "layers.0.fc1.weight_quantizer.amax": (4096, 8),
            "layers.0.fc1.weight_quantizer.zero_point": (4096, 8),
            "layers.0.fc1.weight_quantizer.alpha": (4096, 1024),
            "layers.0.fc1.weight_quantizer.delta": (4096, 8),
        },
        "weights",
    ),
    "Show-o LFQ: signs stored as an embedding": (
        {**convs(latent=13), "quantize.embedding": (8192, 13), "quantize.power_vals": (13,)},
        "LFQ",
    ),
    "BSQ with its groups stored": (
        {
            **convs(latent=36),
            "quantize.basis": (36,),
            "quantize.group_basis": (9,),
            "quantize.group_codes": (512, 9),
        },
        "BSQ",
    ),
    "recommender": (
        {"user_embedding.weight": (6040, 64), "item_embedding.weight": (3706, 64), "mlp.0.weight": (64, 128)},
        "--codebook-key",
    ),
    "prior in a model's own prefix, class embedding beside it": (
        {
            "prior.embedding.weight": (512, 64),
            "prior.label_embedding.weight": (10, 64),
            "prior.blocks.0.weight": (128, 64, 3, 3),
            "prior.to_logits.weight": (512, 128, 1, 1),
        },
        "prior",
    ),
    "ELECTRA: factorised vocabulary": (
        {
            "embeddings.word_embeddings.weight": (30522, 128),
            "embeddings_project.weight": (256, 128),
            "embeddings_project.bias": (256,),
            "encoder.layer.0.attention.self.query.weight": (256, 256),
        },
        "language model",
    ),
    "FSQ whose projections have no bias": (
        {**convs(), "quantizer.project_in.weight": (5, 64), "quantizer.project_out.weight": (64, 5)},
        "FSQ",
    ),
    "token transformer whose embedding is called vq_emb": (
        {
            "vq_emb.weight": (1024, 768),
            "pos_emb.weight": (256, 768),
            "blocks.0.attn.qkv.weight": (2304, 768),
            "head.weight": (1024, 768),
        },
        "--codebook-key",
    ),
    "convolutional seq2seq": (
        {
            "embedding.weight": (5000, 256),
            "encoder.convs.0.weight": (512, 256, 3),
            "decoder.convs.0.weight": (512, 256, 3),
            "decoder.fc_out.weight": (5000, 256),
        },
        "language model",
    ),
    "class embedding with the plainest of names": (
        {"encoder.0.weight": (128, 784), "embedding.weight": (10, 128), "decoder.0.weight": (784, 128)},
        "--codebook-key",
    ),
    "a distribution over quantiles": (
        {"quantile_net.embedding.weight": (64, 128), "quantile_net.fc.weight": (512, 64), "fc.weight": (6, 512)},
        "language model",
    ),
    "class embedding in the decoder of a model called vq": (
        {**convs("vq."), "vq.decoder.embed.weight": (1000, 64)},
        "--codebook-key",
    ),
    "language model that embeds each codebook of a codec": (
        {
            "codebook_emb.embeddings.0.weight": (1025, 768),
            "codebook_emb.embeddings.1.weight": (1025, 768),
            "layers.0.self_attn.q_proj.weight": (768, 768),
        },
        "language model",
    ),
    "FSQ that counts how often its codes are used": (
        {"quantizer.project_in.weight": (4, 64), "quantizer.usage_count": (2, 1000)},
        "FSQ",
    ),
    "nothing": ({}, "no matrix"),
}


@pytest.mark.parametrize("case", POSITIVE, ids=lambda case: case.name)
def test_held_out_layout(case: HeldOut) -> None:
    found = find_codebooks(case.shapes)
    assert answer(found) == case.codebooks
    assert {c.search for c in found.codebooks} == {case.search}
    assert {c.confidence for c in found.codebooks} == {case.confidence}
    assert found.reason is None
    for c in found.codebooks:
        assert all(c.size in case.shapes[key] for key in c.companions)
        assert not case.codebooks.keys() & set(c.companions)
    listed = {*case.codebooks, *(key for c in found.codebooks for key in c.companions)}
    assert not listed & {key for key, _ in found.elsewhere}


@pytest.mark.parametrize("name", NEGATIVES)
def test_held_out_negative(name: str) -> None:
    shapes, word = NEGATIVES[name]
    found = find_codebooks(shapes)
    assert answer(found) == {} and found.elsewhere == ()
    assert found.reason is not None and word in found.reason


@pytest.mark.parametrize("case", POSITIVE, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "first_stage_model.", "_orig_mod.", "generator.", "net.vqvae."]
)
def test_a_prefix_on_every_key_changes_nothing(case: HeldOut, prefix: str) -> None:
    plain = find_codebooks(case.shapes)
    behind = find_codebooks({prefix + key: shape for key, shape in case.shapes.items()})
    assert {key.removeprefix(prefix): value for key, value in answer(behind).items()} == answer(plain)
    assert [c.companions for c in behind.codebooks] == [
        tuple(prefix + key for key in c.companions) for c in plain.codebooks
    ]


# `vqvae.embeddings.weight` and nothing else would be a codebook, by every convention.
@pytest.mark.parametrize("name", [name for name in NEGATIVES if name not in ("nothing", "word vectors")])
@pytest.mark.parametrize("prefix", ["module.", "model.", "vqvae.", "vq_model."])
def test_a_prefix_makes_no_codebook(name: str, prefix: str) -> None:
    shapes = {prefix + key: shape for key, shape in NEGATIVES[name][0].items()}
    assert answer(find_codebooks(shapes)) == {}


@pytest.mark.parametrize("case", POSITIVE, ids=lambda case: case.name)
def test_the_order_of_the_keys_changes_nothing(case: HeldOut) -> None:
    assert find_codebooks(dict(reversed(case.shapes.items()))) == find_codebooks(case.shapes)


# --- companions, elsewhere, order, dtypes ---------------------------------------------------------------------------


def only(shapes: Mapping[str, Shape], dtypes: Mapping[str, str] | None = None) -> detect.FoundCodebook:
    (codebook,) = find_codebooks(shapes, dtypes).codebooks
    return codebook


def test_companions_have_an_axis_of_k_and_belong_to_the_owner() -> None:
    codebook = only(
        {
            **convs(width=512),
            "_vq_vae._embedding.weight": (512, 64),
            "_vq_vae._ema_w": (512, 64),
            "_vq_vae._ema_cluster_size": (512,),
            "_vq_vae.hits": (3, 512),
            "_vq_vae.temperature": (1,),
        }
    )
    assert codebook.companions == ("_vq_vae._ema_cluster_size", "_vq_vae._ema_w", "_vq_vae.hits")


def test_companions_of_numbered_codebooks_keep_apart() -> None:
    shapes: Shapes = {f"quantizer.codebooks.{i}": (256, 16) for i in (0, 1)}
    shapes |= {f"quantizer.cluster_sizes.{i}": (256,) for i in (0, 1)} | {"quantizer.hits": (2, 256)}
    first, second = find_codebooks(shapes).codebooks
    assert first.companions == ("quantizer.cluster_sizes.0", "quantizer.hits")
    assert second.companions == ("quantizer.cluster_sizes.1", "quantizer.hits")


def test_padding_row_is_no_code() -> None:
    codebook = only(
        {
            "quantizer.codebooks.0.weight": (1025, 32),
            "quantizer.codebooks.0.cluster_size_ema": (1024,),
            "quantizer.codebooks.0.embed_ema": (1024, 32),
        }
    )
    assert (codebook.size, codebook.dim, codebook.axis) == (1024, 32, 0)
    assert codebook.companions == ("quantizer.codebooks.0.cluster_size_ema", "quantizer.codebooks.0.embed_ema")


def test_window_of_recent_indices_is_a_companion_only_at_length_k() -> None:
    shapes: Shapes = {**convs(latent=8), "quantize.embedding.weight": (16384, 8)}
    assert only({**shapes, "quantize.codebook_used": (65536,)}).companions == ()
    assert only({**shapes, "quantize.codebook_used": (16384,)}).companions == ("quantize.codebook_used",)


def test_shadow_goes_to_the_codebook_of_its_name() -> None:
    found = find_codebooks(
        {
            **convs(),
            "quantize.embedding.weight": (512, 64),
            "pixel_quantize.embedding.weight": (512, 64),
            "model_ema.quantizeembeddingweight": (512, 64),
            "model_ema.pixel_quantizeembeddingweight": (512, 64),
            "model_ema.decoderconv_inweight": (128, 64, 3, 3),
            "model_ema.num_updates": (),
        }
    )
    assert {c.key: c.companions for c in found.codebooks} == {
        "pixel_quantize.embedding.weight": ("model_ema.pixel_quantizeembeddingweight",),
        "quantize.embedding.weight": ("model_ema.quantizeembeddingweight",),
    }


def test_shadow_module_follows_with_its_statistics() -> None:
    codebook = only(
        {
            **convs(latent=4),
            "quantize.embedding.weight": (16384, 4),
            "quantize.cluster_size": (16384,),
            "ema_quantize.embedding.weight": (16384, 4),
            "ema_quantize.cluster_size": (16384,),
            "ema_encoder.conv_in.weight": (128, 3, 3, 3),
        }
    )
    assert codebook.key == "quantize.embedding.weight"
    assert codebook.companions == (
        "ema_quantize.cluster_size",
        "ema_quantize.embedding.weight",
        "quantize.cluster_size",
    )


def test_shadow_behind_the_prefix_of_its_model() -> None:
    codebook = only(
        {
            "first_stage_model.quantize.embedding.weight": (256, 4),
            "first_stage_model.model_ema.quantizeembeddingweight": (256, 4),
        }
    )
    assert codebook.companions == ("first_stage_model.model_ema.quantizeembeddingweight",)


def test_projection_whose_width_happens_to_be_k_is_elsewhere() -> None:
    found = find_codebooks(
        {
            "quantizer.quantizers.0.in_proj.weight": (8, 1024, 1),
            "quantizer.quantizers.0.out_proj.weight": (1024, 8, 1),
            "quantizer.quantizers.0.codebook.weight": (1024, 8),
        }
    )
    assert found.codebooks[0].companions == ()
    assert [key for key, _ in found.elsewhere] == [
        "quantizer.quantizers.0.in_proj.weight",
        "quantizer.quantizers.0.out_proj.weight",
    ]


def test_encoder_inside_the_quantiser_is_elsewhere() -> None:
    found = find_codebooks(
        {
            "quantizer.embedding.weight": (512, 64),
            "quantizer.cluster_size": (512,),
            "quantizer.encoder.fc.weight": (512, 64),
        }
    )
    assert found.codebooks[0].companions == ("quantizer.cluster_size",)
    assert found.elsewhere == (("quantizer.encoder.fc.weight", (512, 64)),)


def test_projection_to_logits_is_a_companion() -> None:
    codebook = only(
        {
            **convs(),
            "quantize.embed.weight": (512, 64),
            "quantize.proj.weight": (512, 64, 1, 1),
            "quantize.proj.bias": (512,),
        }
    )
    assert codebook.search == "logits"
    assert codebook.companions == ("quantize.proj.bias", "quantize.proj.weight")


def test_elsewhere_lists_k_to_k_plus_2_and_nothing_else() -> None:
    found = find_codebooks(
        {
            **convs(),
            "vq.embedding.weight": (512, 64),
            "vq.cluster_size": (512,),
            "prior.tok.weight": (513, 96),
            "prior.head.weight": (512, 96),
            "prior.mask.weight": (96, 514),
            "prior.other.weight": (515, 511),
        }
    )
    assert found.elsewhere == (
        ("prior.head.weight", (512, 96)),
        ("prior.mask.weight", (96, 514)),
        ("prior.tok.weight", (513, 96)),
    )


def test_natural_order() -> None:
    shapes: Shapes = {f"rvq.layers.{i}._codebook.embed": (1, 64, 8) for i in (10, 2, 1, 0, 11)}
    assert [c.key.split(".")[2] for c in find_codebooks(shapes).codebooks] == ["0", "1", "2", "10", "11"]


def test_integers_are_never_codebooks() -> None:
    shapes: Shapes = {"quantizer.codebook": (512, 64), "quantizer.embedding.weight": (512, 64)}
    assert only({**shapes}, {"quantizer.codebook": "I64", "quantizer.embedding.weight": "BF16"}).dtype == "BF16"
    nothing = find_codebooks(shapes, {"quantizer.codebook": "U8", "quantizer.embedding.weight": "I32"})
    assert nothing.codebooks == () and nothing.reason is not None


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
def test_dtype_is_passed_on(dtype: str) -> None:
    assert only({"vq.embedding.weight": (512, 64)}, {"vq.embedding.weight": dtype}).dtype == dtype


def test_dtype_left_out_reads_as_float32() -> None:
    assert only({"vq.embedding.weight": (512, 64)}).dtype == "F32"


def test_raw_matrix_that_could_lie_either_way_is_low() -> None:
    assert only({"quantizer.codebook": (64, 512)}).confidence == "low"
    assert only({"quantizer.codebook": (512, 64)}).confidence == "high"


def test_results_are_frozen() -> None:
    codebook = only({"vq.embedding.weight": (512, 64)})
    with pytest.raises(FrozenInstanceError):
        codebook.size = 3  # type: ignore[misc]


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
