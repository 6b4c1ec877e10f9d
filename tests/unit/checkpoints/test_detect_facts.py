"""What detection says of a codebook beside its key and shape: companions, what lies elsewhere, dtype, confidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import FrozenInstanceError

import pytest
from state_dicts import Shape, Shapes, convs

from codebook_tools.checkpoints.detect import FoundCodebook, find_codebooks


def only(shapes: Mapping[str, Shape], dtypes: Mapping[str, str] | None = None) -> FoundCodebook:
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


def test_elsewhere_lists_k_to_k_plus_4_and_nothing_else() -> None:
    found = find_codebooks(
        {
            **convs(),
            "vq.embedding.weight": (512, 64),
            "vq.cluster_size": (512,),
            "prior.tok.weight": (513, 96),
            "prior.head.weight": (512, 96),
            "prior.mask.weight": (96, 514),
            "prior.other.weight": (517, 511),
            "prior.special.weight": (516, 96),
        }
    )
    assert found.elsewhere == (
        ("prior.head.weight", (512, 96)),
        ("prior.mask.weight", (96, 514)),
        ("prior.special.weight", (516, 96)),
        ("prior.tok.weight", (513, 96)),
    )


def test_elsewhere_lists_heads_over_the_codes_of_all_codebooks() -> None:
    books = {f"rvq.layers.{i}._codebook.embed": (1, 64, 8) for i in range(3)}
    heads = {"policy.head.weight": (192, 30), "policy.tok.weight": (196, 30), "policy.wide.weight": (197, 30)}
    found = find_codebooks({**books, **heads})
    assert [key for key, _ in found.elsewhere] == ["policy.head.weight", "policy.tok.weight"]


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
