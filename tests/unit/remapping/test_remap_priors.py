"""Priors follow an index map: loaded by their own library they say of every kept token what they said before."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome, WriteMap, assert_refused, contents, save_map
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sources_of_images import Images
from test_remap_tokens import index_maps
from torch import Tensor
from torch.nn import functional

from codebook_tools.checkpoints.layout import index_map_path
from codebook_tools.checkpoints.read import file_sha256, read_checkpoint
from codebook_tools.codebook import REMOVED
from codebook_tools.data.images import sample_images
from codebook_tools.models.demo import DEMO
from codebook_tools.models.load import load_model
from codebook_tools.remapping.vocabulary import Vocabulary

Run = Callable[..., Outcome]

PRUNE = [0, -1, 1, 2, -1, 3], [0, 0, 1, 2, 3, 3]
KEPT = [0, 2, 3, 5]


def gpt2(folder: Path, vocabulary: int, **more: Any) -> Any:
    """A tiny GPT-2, whose head is its embedding, saved by transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=2, n_head=2, **more)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return model


def llama(folder: Path, vocabulary: int, **more: Any) -> Any:
    """A tiny Llama with a head of its own, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False, **more,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


def logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([tokens])).logits[0]
        return found


@pytest.mark.parametrize("make", [gpt2, llama])
def test_after_an_exact_prune_every_kept_token_has_the_logits_it_had(
    codebook: Run, with_model: WriteMap, tmp_path: Path, make: Callable[..., Any]
) -> None:
    """Ids: 0 a special one, 1 to 6 the codes, 7 and 8 special ones."""
    old = make(tmp_path / "prior", 9, bos_token_id=0, eos_token_id=7, pad_token_id=8)
    found = codebook("remap", tmp_path / "prior", "--map", with_model("m", 4, PRUNE), "--offset", 1, "--json")
    assert found.exit_code == 0, found
    output = tmp_path / "prior.remapped"
    assert found.json == {
        "tokens": 9, "changed": 7, "removed": 2, "nearest": 0,
        "outputs": {str(tmp_path / "prior"): str(output)}, "warnings": [],
    }  # fmt: skip
    new, kept = loaded(output), [0, 1, 3, 4, 6, 7, 8]
    tokens = [0, 4, 1, 6, 3, 3, 7, 8]
    mapped = [kept.index(token) for token in tokens]
    assert torch.equal(new.get_input_embeddings().weight, old.get_input_embeddings().weight[kept])
    assert torch.equal(new.get_output_embeddings().weight, old.get_output_embeddings().weight[kept])
    assert torch.allclose(logits(new, mapped), logits(old, tokens)[:, kept], rtol=0, atol=1e-6)
    assert (new.config.vocab_size, new.config.bos_token_id, new.config.eos_token_id) == (7, 0, 5)
    assert (new.config.pad_token_id, new.generation_config.eos_token_id) == (6, 5)
    assert sorted(path.name for path in output.iterdir()) == sorted(p.name for p in (tmp_path / "prior").iterdir())
    before, after = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "prior", output))
    assert {name for name in before if before[name] != after[name]} == {"vocab_size", "eos_token_id", "pad_token_id"}
    assert not (tmp_path / "prior.remapped.index_map.safetensors").exists()


def test_a_width_that_equals_the_number_of_codes_stays(codebook: Run, with_model: WriteMap, tmp_path: Path) -> None:
    gpt2(tmp_path / "prior", 16, bos_token_id=3, eos_token_id=[3, 15])
    pair = [*range(8), *[-1] * 8], [*range(8), *[7] * 8]
    found = codebook("remap", tmp_path / "prior", "--map", with_model("m", 8, pair))
    assert found.exit_code == 0, found
    config = loaded(tmp_path / "prior.remapped").config
    assert (config.n_embd, config.vocab_size, config.bos_token_id, config.eos_token_id) == (16, 8, 3, [3, 7])


def state(rows: int, bias: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    embedding, head, offsets = (torch.randn(*shape, generator=generator) for shape in ((rows, 3), (rows, 3), (rows,)))
    tensors = {"tok_emb.weight": embedding, "head.weight": head, "blocks.0.w": torch.ones(rows, 3)}
    return tensors | ({"head.bias": offsets} if bias else {})


def remapped(codebook: Run, tensors: dict[str, Tensor], map_path: Path, *options: object) -> tuple[Any, Any]:
    """The tensors of a prior in a file of its own after `remap`, and what the command said."""
    path = map_path.with_name("prior.safetensors")
    save_file(tensors, path)
    found = codebook("remap", path, "--map", map_path, "--force", "--json", *options)
    assert found.exit_code == 0, found
    return load_file(path.with_name("prior.remapped.safetensors")), found.json


def test_merged_codes_have_the_mean_row_and_their_number_in_the_bias(
    codebook: Run, with_model: WriteMap, tmp_path: Path
) -> None:
    old = state(5)
    map_path = with_model("m", 2, ([1, 0, 1, 1], [1, 0, 1, 1]))
    new, said = remapped(codebook, old, map_path)
    merged = [0, 2, 3]
    for key in ("tok_emb.weight", "head.weight"):
        meant = torch.stack([old[key][1], old[key][merged].double().mean(0).float(), old[key][4]])
        assert torch.equal(new[key], meant)
    bias = old["head.bias"][merged].double().mean() + math.log(3)
    assert torch.equal(new["head.bias"], torch.stack([old["head.bias"][1], bias.float(), old["head.bias"][4]]))
    assert torch.equal(new["blocks.0.w"], old["blocks.0.w"])
    assert {k: said[k] for k in ("tokens", "changed", "removed", "nearest")} == {
        "tokens": 5, "changed": 5, "removed": 0, "nearest": 0,
    }  # fmt: skip
    (warning,) = said["warnings"]
    assert warning.startswith("1 codes stand for several old ones") and "for want" not in warning
    del old["head.bias"]
    assert "for want of a head bias" in remapped(codebook, old, map_path)[1]["warnings"][0]


@given(st.data())
def test_a_merged_code_is_as_likely_as_its_parts_where_these_are_alike(data: st.DataObject) -> None:
    one = data.draw(index_maps())
    vocabulary = Vocabulary(one)
    bias = torch.full((one.old_size,), 0.25)
    new = vocabulary.new_bias(bias)
    handed_on = (vocabulary.heir != REMOVED).sum()
    total = sum(new[i].exp() for i in range(len(new)) if vocabulary.inherited[i])
    assert float(total) == pytest.approx(float(handed_on * bias[0].exp()), rel=1e-5)
    for code, heir in enumerate(vocabulary.heir.tolist()):
        identity = one.index_map.tolist()[code]
        taken = one.nearest.tolist()[code] in one.index_map.tolist()
        assert heir == (identity if identity != REMOVED or taken else one.nearest.tolist()[code])


def test_new_codes_inherit_from_those_nearest_to_them(codebook: Run, with_model: WriteMap, tmp_path: Path) -> None:
    """After a Re-Fit to three codes: 0 and 2 go to code 1, 1 goes to code 0, and none to code 2."""
    old, lost = state(3), ([-1, -1, -1], [1, 0, 1])
    map_path = with_model("m", 3, lost)
    new, said = remapped(codebook, old, map_path, "--on-removed", "nearest")
    for key in ("tok_emb.weight", "head.weight"):
        meant = torch.stack(
            [old[key][1], (old[key][[0, 2]].double().mean(0)).float(), old[key].double().mean(0).float()]
        )
        assert torch.equal(new[key], meant)
    assert (said["removed"], said["nearest"]) == (3, 3)
    assert said["warnings"][-1].startswith("1 new codes are nearest to no old one")
    for options, message in (
        ((), "3 of 3 new codes of quantizer.codebook.weight, the first 0, are no old one's"),
        (("--on-removed", "mask=1"), "--on-removed mask=1 is for tokens; for a prior, give error or nearest"),
    ):
        assert_refused(
            codebook("remap", tmp_path / "prior.safetensors", "--map", map_path, *options, "--force"), message
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_padding_is_never_drawn_and_rows_keep_their_bits(
    codebook: Run, with_model: WriteMap, dtype: torch.dtype
) -> None:
    old = {key: tensor.to(dtype) for key, tensor in state(7).items()}
    new, _ = remapped(codebook, old, with_model("m", 4, PRUNE), "--pad-to-multiple", 8)
    for key in ("tok_emb.weight", "head.weight"):
        assert torch.equal(new[key][:5], old[key][[*KEPT, 6]]) and new[key].dtype == dtype
        assert new[key].shape == (8, 3) and not new[key][5:].any()
    assert torch.equal(new["head.bias"][:5], old["head.bias"][[*KEPT, 6]])
    assert not torch.softmax(new["head.bias"].float(), 0)[5:].any()
    del old["head.bias"]
    said = remapped(codebook, old, with_model("m", 4, PRUNE), "--pad-to-multiple", 8)[1]
    assert said["warnings"] == ["rows of padding have the logit 0, not a low one, for the head has no bias"]


def test_several_codebooks_have_tables_of_their_own(codebook: Run, tmp_path: Path) -> None:
    """As in MusicGen: an embedding has a row for the start token, and a head has none."""
    pairs = {
        f"layers.{i}.codebook.embed": pair for i, pair in enumerate((PRUNE, ([-1, 0, -1, 1, 2, 3], [0, 0, 1, 1, 2, 3])))
    }
    model = tmp_path / "codec.safetensors"
    save_file({key: torch.randn(4, 4) for key in pairs}, model)
    map_path = save_map(index_map_path(model), pairs, file_sha256(model))
    old = {f"decoder.embed_tokens.{i}.weight": torch.randn(7, 3) for i in (0, 1)}
    old |= {f"lm_heads.{i}.weight": torch.randn(6, 3) for i in (0, 1)}
    new, said = remapped(codebook, old, map_path)
    for i, kept in enumerate((KEPT, [1, 3, 4, 5])):
        assert torch.equal(new[f"decoder.embed_tokens.{i}.weight"], old[f"decoder.embed_tokens.{i}.weight"][[*kept, 6]])
        assert torch.equal(new[f"lm_heads.{i}.weight"], old[f"lm_heads.{i}.weight"][kept])
    assert (said["tokens"], said["removed"]) == (14, 4)
    path = tmp_path / "prior.safetensors"
    one = codebook("remap", path, "--map", map_path, "--embedding-key", "decoder.embed_tokens.0.weight", "--force")
    assert_refused(one, "1 tables (decoder.embed_tokens.0.weight) for 2 codebooks")
    assert_refused(codebook("remap", path, "--map", map_path, "--pad-to-multiple", 4, "--force"), "differ in length")


def test_a_head_over_the_codes_of_all_codebooks_is_cut_into_them(codebook: Run, tmp_path: Path) -> None:
    """Two codebooks of 6 codes, one after the other, and 3 special ids; each is pruned by a map of its own."""
    pairs = {"a": PRUNE, "b": ([-1, 0, -1, 1, 2, 3], [0, 0, 1, 1, 2, 3])}
    model = tmp_path / "m.safetensors"
    save_file({key: torch.randn(4, 4) for key in pairs}, model)
    map_path = save_map(index_map_path(model), pairs, file_sha256(model))
    prior = tmp_path / "policy.safetensors"
    rows = torch.arange(15.0)[:, None].expand(15, 4).contiguous()
    save_file({"tok_emb.weight": rows, "head.weight": rows * 2, "head.bias": torch.arange(15.0)}, prior)
    found = codebook("remap", prior, "--map", map_path, "--json")
    assert found.exit_code == 0, found
    new = load_file(tmp_path / "policy.remapped.safetensors")
    kept = [0.0, 2.0, 3.0, 5.0, 7.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0]
    assert new["tok_emb.weight"][:, 0].tolist() == kept and new["head.bias"].tolist() == kept
    assert new["head.weight"][:, 0].tolist() == [2 * row for row in kept]
    assert found.json["tokens"] == 15 and found.json["removed"] == 4


def test_musicgen_follows_the_maps_of_its_codebooks(codebook: Run, tmp_path: Path) -> None:
    from transformers import MusicgenForCausalLM
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    kept, map_path = (KEPT, [1, 3, 4, 5]), tmp_path / "codec.index_map.safetensors"
    pairs = {
        f"layers.{i}.codebook.embed": pair for i, pair in enumerate((PRUNE, ([-1, 0, -1, 1, 2, 3], [0, 0, 1, 1, 2, 3])))
    }
    save_file({key: torch.randn(4, 3) for key in pairs}, tmp_path / "codec.safetensors")
    save_map(map_path, pairs, file_sha256(tmp_path / "codec.safetensors"))
    torch.manual_seed(0)
    config = MusicgenDecoderConfig(
        vocab_size=6, num_codebooks=2, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=6, bos_token_id=6,
    )  # fmt: skip
    old = MusicgenForCausalLM(config).eval()
    old.save_pretrained(tmp_path / "prior")
    found = codebook("remap", tmp_path / "prior", "--map", map_path, "--json")
    assert found.exit_code == 0, found
    new = MusicgenForCausalLM.from_pretrained(tmp_path / "prior.remapped").eval()
    assert (new.config.vocab_size, new.config.pad_token_id, new.config.bos_token_id) == (4, 4, 4)
    tokens = torch.tensor([[6, 0, 5, 3], [6, 6, 1, 4]])  # a row for each codebook; 6 starts
    mapped = torch.tensor(
        [[([*KEPT, 6], [*kept[1], 6])[i].index(token) for token in row] for i, row in enumerate(tokens.tolist())]
    )
    with torch.no_grad():
        before, after = old(tokens).logits, new(mapped).logits
    for i in (0, 1):
        assert torch.allclose(after[i], before[i][:, list(kept[i])], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (state(5), (), "tok_emb.weight in"),
        (state(5), (), "has 5 rows, and the map's 6 codes from id 0 on need 6; is the map of another checkpoint"),
        (state(6), ("--offset", 1), "has 6 rows, and the map's 6 codes from id 1 on need 7"),
        ({"x.weight": torch.ones(9, 3)}, (), "has no tensor named like an embedding of tokens"),
        (
            {"encoder.embed_tokens.weight": torch.ones(9, 3), "decoder.embed_tokens.weight": torch.ones(9, 3)},
            (),
            "each of decoder.embed_tokens.weight, encoder.embed_tokens.weight could be meant; name it with --embed",
        ),
        (state(6), ("--embedding-key", "wte.weight"), "has no tensor wte.weight"),
        (
            state(6) | {"wte.weight": torch.ones(6, 3, dtype=torch.int8)},
            ("--embedding-key", "wte.weight"),
            "wte.weight in",
        ),
    ],
)
def test_what_is_refused(
    codebook: Run, with_model: WriteMap, tmp_path: Path, tensors: dict[str, Tensor], options: Any, message: str
) -> None:
    map_path, path = with_model("m", 4, PRUNE), tmp_path / "prior.safetensors"
    save_file(tensors, path)
    before = contents(tmp_path)
    assert_refused(codebook("remap", path, "--map", map_path, *options), message)
    assert contents(tmp_path) == before


def test_keys_that_the_user_names(codebook: Run, with_model: WriteMap) -> None:
    """A head under a name of its own, and a bias that stands alone, as BERT's does."""
    old = {
        "cls.predictions.bias": torch.arange(7.0),
        "codes.weight": torch.randn(7, 3),
        "predict.weight": torch.randn(7, 3),
    }
    keys = ("--embedding-key", "codes.weight", "--head-key", "predict.weight", "--head-key", "cls.predictions.bias")
    new, _ = remapped(codebook, old, with_model("m", 4, PRUNE), *keys)
    assert torch.equal(new["codes.weight"], old["codes.weight"][[*KEPT, 6]])
    assert torch.equal(new["predict.weight"], old["predict.weight"][[*KEPT, 6]])
    assert new["cls.predictions.bias"].tolist() == [*KEPT, 6]


def test_other_files_of_the_directory(codebook: Run, with_model: WriteMap, tmp_path: Path) -> None:
    gpt2(tmp_path / "prior", 6)
    for name in ("tokenizer.json", "training_args.bin"):
        (tmp_path / "prior" / name).write_text("{}")
    map_path = with_model("m", 4, PRUNE)
    found = codebook("remap", tmp_path / "prior", "--map", map_path, "--json")
    assert found.json["warnings"] == [
        "tokenizer.json goes along as it is, with the ids of the old vocabulary",
        "of the prior's directory, training_args.bin does not go into the new one",
    ]
    before = contents(tmp_path)
    assert_refused(codebook("remap", tmp_path / "prior", "--map", map_path), "exists; --force replaces it")
    assert contents(tmp_path) == before
    assert codebook("remap", tmp_path / "prior", "--map", map_path, "--force", "--quiet").exit_code == 0
    as_file = codebook("remap", tmp_path / "prior", "--map", map_path, "-o", tmp_path / "one.safetensors", "--quiet")
    assert as_file.exit_code == 0, as_file
    assert json.loads((tmp_path / "one.config.json").read_text())["vocab_size"] == 4
    alone = codebook("remap", tmp_path / "prior" / "model.safetensors", "--map", map_path, "--json")
    assert alone.json["warnings"] == ["config.json beside it is left as it is; give the directory to have it follow"]
    assert load_file(tmp_path / "prior" / "model.remapped.safetensors")["transformer.wte.weight"].shape == (4, 16)


# The whole way: a prior over the tokens of the bundled model


def trained(folder: Path, tokens: Tensor, vocabulary: int) -> Any:
    """A tiny GPT-2 after 60 steps on rows of tokens, saved by transformers."""
    model = gpt2(folder, vocabulary).train()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        batch = tokens[step * 16 % len(tokens) :][:16]
        model(batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval().save_pretrained(folder)
    return model


def loss(model: Any, tokens: Tensor, among: Tensor) -> float:
    """Mean negative log-likelihood in nats of each next token, among the given ids alone."""
    with torch.no_grad():
        found = model(tokens).logits[:, :-1, among].flatten(0, 1).double()
    targets = torch.searchsorted(among, tokens[:, 1:].flatten())
    return float(functional.cross_entropy(found, targets))


@pytest.mark.slow
def test_a_prior_over_the_demo_models_tokens_loses_nothing(codebook: Run, tmp_path: Path) -> None:
    model = load_model(read_checkpoint(DEMO))
    images = Images(sample_images()[:64], 3)
    with torch.no_grad():
        tokens = torch.cat([model.assign(model.encode(pixels)).flatten(1) for _, pixels in images.batches(32)])
    tokens = tokens[:, :64]
    np.save(tmp_path / "tokens.npy", tokens.numpy().astype(np.int16))
    prior = trained(tmp_path / "prior", tokens, 512)

    done = codebook("prune", "--keep", 96, "-o", tmp_path / "pruned.safetensors", "--json")
    assert done.exit_code == 0, done
    map_path = done.json["outputs"]["index_map"]
    index_map = next(t for key, t in load_file(map_path).items() if key.endswith("/index_map"))
    found = codebook("remap", tmp_path / "tokens.npy", tmp_path / "prior", "--map", map_path, "--json")
    assert found.exit_code == 0, found
    assert found.json["tokens"] == tokens.numel() + 512 and found.json["removed"] == 512 - 96

    kept = (index_map != REMOVED).nonzero()[:, 0]
    new_tokens = torch.from_numpy(np.load(tmp_path / "tokens.remapped.npy")).long()
    assert torch.equal(kept[new_tokens], tokens)
    before = loss(prior, tokens, kept)
    after = loss(loaded(tmp_path / "prior.remapped"), new_tokens, torch.arange(96))
    assert before < math.log(96) - 0.3  # it learnt something
    assert after == pytest.approx(before, abs=1e-5)


def test_ids_of_another_vocabulary_in_the_same_config_stay(codebook: Run, with_model: WriteMap, tmp_path: Path) -> None:
    """As in a whole Janus: a language model's ids stand at the level of its own vocabulary."""
    (tmp_path / "prior").mkdir()
    save_file(state(6), tmp_path / "prior" / "model.safetensors")
    text = json.dumps(
        {"text_config": {"vocab_size": 64, "eos_token_id": 2}, "vq_config": {"num_embeddings": 6, "width": 6}}, indent=3
    )
    (tmp_path / "prior" / "config.json").write_text(text)
    (tmp_path / "prior" / "generation_config.json").write_text('{"eos_token_id": 2}')
    found = codebook("remap", tmp_path / "prior", "--map", with_model("m", 4, PRUNE))
    assert found.exit_code == 0, found
    output = tmp_path / "prior.remapped"
    assert (output / "config.json").read_text() == text.replace('"num_embeddings": 6', '"num_embeddings": 4')
    assert (output / "generation_config.json").read_text() == '{"eos_token_id": 2}'


def test_a_prior_of_torch_save_becomes_safetensors(codebook: Run, with_model: WriteMap, tmp_path: Path) -> None:
    torch.save({"model": state(6), "step": 3}, tmp_path / "prior.pt")
    found = codebook("remap", tmp_path / "prior.pt", "--map", with_model("m", 4, PRUNE), "--json")
    assert found.exit_code == 0, found
    written = load_file(tmp_path / "prior.remapped.safetensors")
    assert torch.equal(written["head.weight"], state(6)["head.weight"][KEPT])


# --- verified ---------------------------------------------------------------------------------------------------------


def test_a_remapped_prior_is_verified_against_its_original_and_its_map(
    codebook: Run, with_model: WriteMap, tmp_path: Path
) -> None:
    llama(tmp_path / "prior", 9, bos_token_id=0, eos_token_id=7)
    map_path = with_model("m", 4, PRUNE)
    done = codebook("remap", tmp_path / "prior", "--map", map_path, "--offset", 1)
    assert done.exit_code == 0, done
    asked = ("verify", tmp_path / "prior.remapped", "--against", tmp_path / "prior")
    assert codebook(*asked, "--map", map_path).exit_code == 0
    alone = codebook(*asked)
    assert alone.exit_code == 1 and "name the maps that it followed with --map" in alone.stderr
    other = codebook(*asked, "--map", with_model("n", 4, ([0, -1, 1, 2, 3, -1], [0, 0, 1, 2, 3, 3])), "--json")
    assert other.exit_code == 3
    assert {found["key"] for found in other.json["differences"]} == {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize("key", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "config.json"])
def test_one_number_of_a_remapped_prior_that_is_another_is_found(
    codebook: Run, with_model: WriteMap, tmp_path: Path, key: str
) -> None:
    llama(tmp_path / "prior", 9, bos_token_id=0, eos_token_id=7)
    map_path, output = with_model("m", 4, PRUNE), tmp_path / "prior.remapped"
    assert codebook("remap", tmp_path / "prior", "--map", map_path, "--offset", 1).exit_code == 0
    if key == "config.json":
        config = json.loads((output / key).read_text())
        (output / key).write_text(json.dumps({**config, "vocab_size": 8}))
    else:
        stored, metadata = load_file(output / "model.safetensors"), read_checkpoint(output).metadata
        stored[key].view(-1)[-1] += 1
        save_file(stored, output / "model.safetensors", metadata)
    found = codebook("verify", output, "--against", tmp_path / "prior", "--map", map_path, "--json")
    assert found.exit_code == 3 and [one["key"] for one in found.json["differences"]] == [key]


def with_settings(path: Path, **settings: object) -> None:
    """Say in a remapped prior's metadata that it was done with other settings."""
    metadata = read_checkpoint(path).metadata
    told = json.loads(metadata["codebook_tools.settings"]) | settings
    save_file(load_file(path), path, {**metadata, "codebook_tools.settings": json.dumps(told)})


@pytest.mark.parametrize(
    "settings",
    [
        *({"offset": value} for value in (None, "x", -600, True, 0.5)),
        *({"pad_to_multiple": value} for value in (0, -1, 10**12, None)),
        *({"embedding_keys": value} for value in (5, [[]], "wte.weight", None)),
        {"head_keys": {}},
        *({"on_removed": value} for value in ([1], "errop", 3)),
    ],
)
def test_settings_that_nobody_could_have_given_are_told_of(
    settings: dict[str, object], codebook: Run, with_model: WriteMap, tmp_path: Path
) -> None:
    save_file(state(6), tmp_path / "prior.safetensors")
    map_path, output = with_model("m", 4, PRUNE), tmp_path / "prior.remapped.safetensors"
    assert codebook("remap", tmp_path / "prior.safetensors", "--map", map_path).exit_code == 0
    with_settings(output, **settings)
    found = codebook("verify", output, "--against", tmp_path / "prior.safetensors", "--map", map_path)
    assert_refused(found, "does not say how it was remapped")


OURS = ("codebooks", "command", "nearest_sha256", "settings", "source_sha256", "version", "about_sha256")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_character_of_a_remapped_priors_metadata_that_is_another_is_found(
    shards: int, codebook: Run, with_model: WriteMap, tmp_path: Path
) -> None:
    model = llama(tmp_path / "prior", 9)
    if shards > 1:
        model.save_pretrained(tmp_path / "prior", max_shard_size="4KB")
        (tmp_path / "prior" / "model.safetensors").unlink()
    map_path, output = with_model("m", 4, PRUNE), tmp_path / "prior.remapped"
    assert codebook("remap", tmp_path / "prior", "--map", map_path, "--offset", 1).exit_code == 0
    asked = ("verify", output, "--against", tmp_path / "prior", "--map", map_path)
    assert codebook(*asked).exit_code == 0
    checked = 0
    for path in sorted(output.glob("*.safetensors")):
        whole = path.read_bytes()
        for name in (*(f"codebook_tools.{own}" for own in OURS), "format"):
            at = whole.find(f'"{name}":"'.encode())
            if at < 0:
                continue
            at += len(name) + 4
            at += name == "codebook_tools.settings" and whole[at:].index(b"offset")
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            found = codebook(*asked)
            assert found.exit_code, f"{name} in {path.name}: {found.stdout}"
            assert found.exit_code in (1, 3) and "Traceback" not in found.stderr, found
            checked += 1
        path.write_bytes(whole)
    assert checked > len(OURS) * shards
    assert codebook(*asked).exit_code == 0


def test_a_digit_of_a_remapped_priors_index_that_is_another_is_found(
    codebook: Run, with_model: WriteMap, tmp_path: Path
) -> None:
    model = llama(tmp_path / "prior", 9)
    model.save_pretrained(tmp_path / "prior", max_shard_size="4KB")
    (tmp_path / "prior" / "model.safetensors").unlink()
    map_path, output = with_model("m", 4, PRUNE), tmp_path / "prior.remapped"
    assert codebook("remap", tmp_path / "prior", "--map", map_path, "--offset", 1).exit_code == 0
    index = output / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["metadata"]["total_size"] ^= 1
    index.write_text(json.dumps(told))
    found = codebook("verify", output, "--against", tmp_path / "prior", "--map", map_path, "--json")
    assert found.exit_code == 3 and [one["key"] for one in found.json["differences"]] == [index.name]
