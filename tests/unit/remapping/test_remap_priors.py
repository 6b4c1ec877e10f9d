"""Priors follow an index map: loaded by their own library they give every kept token the logits that it had."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, Run, WriteMap, assert_refused, contents, save_map
from safetensors.torch import load_file, save_file
from torch import Tensor

from codebook_tools.checkpoints.layout import index_map_path
from codebook_tools.checkpoints.read import file_sha256, read_checkpoint

PRUNE = [0, -1, 1, 2, -1, 3], [0, 0, 1, 2, 3, 3]
KEPT = [0, 2, 3, 5]
TWO = {"layers.0.embed": PRUNE, "layers.1.embed": ([-1, 0, -1, 1, 2, 3], [0, 0, 1, 1, 2, 3])}
KEPT_OF_TWO = KEPT, [1, 3, 4, 5]


def llama(folder: Path, vocabulary: int, tied: bool = False, **more: Any) -> Any:
    """A tiny Llama, whose head is its embedding where they are tied, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied, **more,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, about = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(about[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), about
    return model.eval()


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(tokens).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_after_an_exact_prune_kept_tokens_have_their_logits(
    codebook: Run, with_model: WriteMap, tmp_path: Path, tied: bool
) -> None:
    """Ids: 0 a special one, 1 to 6 the codes, 7 and 8 special ones."""
    prior, output = tmp_path / "prior", tmp_path / "prior.remapped"
    old = llama(prior, 9, tied, bos_token_id=0, eos_token_id=7, pad_token_id=8)
    done = codebook("remap", prior, "--map", with_model("m", 4, PRUNE), "--offset", 1, "--json")
    assert done.json == {
        "tokens": 9, "changed": 7, "removed": 2, "nearest": 0, "outputs": {str(prior): str(output)}, "warnings": [],
        "next_step": None,
    }  # fmt: skip
    new, kept = loaded(output), [0, 1, 3, 4, 6, 7, 8]
    tokens = [0, 4, 1, 6, 3, 3, 7, 8]
    before, after = logits(old, torch.tensor([tokens])), logits(new, torch.tensor([[*map(kept.index, tokens)]]))
    assert torch.equal(new.get_input_embeddings().weight, old.get_input_embeddings().weight[kept])
    assert torch.equal(new.get_output_embeddings().weight, old.get_output_embeddings().weight[kept])
    assert torch.allclose(after, before[:, :, kept], rtol=0, atol=1e-6)
    assert (new.config.bos_token_id, new.config.pad_token_id, new.generation_config.eos_token_id) == (0, 6, 5)
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in prior.iterdir())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (prior, output)]
    differ = {name: value for name, value in configs[1].items() if configs[0][name] != value}
    assert differ == {"vocab_size": 7, "eos_token_id": 5, "pad_token_id": 6}
    assert not (tmp_path / "prior.remapped.index_map.safetensors").exists()


PLAIN = (
    {"n_embd": 6, "vocab_size": 6, "bos_token_id": 2, "eos_token_id": [0, 5], "codebook_size": 6},
    {"n_embd": 6, "vocab_size": 4, "bos_token_id": 1, "eos_token_id": [0, 3], "codebook_size": 4},
)
"""A width that equals the number of codes stays."""
JANUS = tuple(
    {"text_config": {"vocab_size": 64, "eos_token_id": 2}, "vq_config": {"num_embeddings": size, "width": 6}}
    for size in (6, 4)
)
"""A language model's ids stand at the level of its own vocabulary."""


@pytest.mark.parametrize(("before", "after", "generation"), [(*PLAIN, 1), (*JANUS, 2)])
def test_in_a_config_only_what_depends_on_the_vocabulary_changes(
    codebook: Run, with_model: WriteMap, tmp_path: Path, before: Any, after: Any, generation: int
) -> None:
    (tmp_path / "prior").mkdir()
    save_file(state(6), tmp_path / "prior" / "model.safetensors")
    for name, values in {"config": before, "generation_config": {"eos_token_id": 2}}.items():
        (tmp_path / "prior" / f"{name}.json").write_text(json.dumps(values, indent=3))
    assert codebook("remap", tmp_path / "prior", "--map", with_model("m", 4, PRUNE)).exit_code == 0
    written = [(tmp_path / "prior.remapped" / f"{name}.json").read_text() for name in ("config", "generation_config")]
    assert written == [json.dumps(values, indent=3) for values in (after, {"eos_token_id": generation})]


def state(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    embedding, head, bias = (torch.randn(*shape, generator=generator) for shape in ((rows, 3), (rows, 3), (rows,)))
    return {"tok_emb.weight": embedding, "head.weight": head, "blocks.0.w": torch.ones(rows, 3), "head.bias": bias}


def remapped(codebook: Run, tensors: dict[str, Tensor], map_path: Path, *options: object) -> tuple[Any, Any]:
    """The tensors of a prior in a file of its own after `remap`, and what the command printed."""
    path = map_path.with_name("prior.safetensors")
    save_file(tensors, path)
    done = codebook("remap", path, "--map", map_path, "--force", "--json", *options)
    assert done.exit_code == 0, done
    return load_file(path.with_name("prior.remapped.safetensors")), done.json


def counts(done: Any) -> tuple[int, ...]:
    return tuple(done[name] for name in ("tokens", "changed", "removed", "nearest"))


def test_merged_codes_have_the_mean_row_and_their_number_in_the_bias(codebook: Run, with_model: WriteMap) -> None:
    old, merged = state(5), [0, 2, 3]
    map_path = with_model("m", 2, ([1, 0, 1, 1], [1, 0, 1, 1]))
    new, done = remapped(codebook, old, map_path)
    for key in ("tok_emb.weight", "head.weight"):
        assert torch.equal(new[key], torch.stack([old[key][1], old[key][merged].double().mean(0).float(), old[key][4]]))
    bias = old["head.bias"][merged].double().mean() + math.log(3)
    assert torch.equal(new["head.bias"], torch.stack([old["head.bias"][1], bias.float(), old["head.bias"][4]]))
    assert torch.equal(new["blocks.0.w"], old["blocks.0.w"])
    assert counts(done) == (5, 5, 0, 0)
    (warning,) = done["warnings"]
    assert warning.startswith("1 codes stand for several old ones") and "for want" not in warning
    del old["head.bias"]
    assert "for want of a head bias" in remapped(codebook, old, map_path)[1]["warnings"][0]


def test_new_codes_inherit_from_those_nearest_to_them(codebook: Run, with_model: WriteMap, tmp_path: Path) -> None:
    """After a Re-Fit to three codes: 0 and 2 go to code 1, 1 goes to code 0, and none to code 2."""
    old, map_path = state(3), with_model("m", 3, ([-1, -1, -1], [1, 0, 1]))
    new, done = remapped(codebook, old, map_path, "--on-removed", "nearest")
    for key in ("tok_emb.weight", "head.weight"):
        means = [old[key][rows].double().mean(0).float() for rows in ([0, 2], [0, 1, 2])]
        assert torch.equal(new[key], torch.stack([old[key][1], *means]))
    assert counts(done)[2:] == (3, 3)
    assert done["warnings"][-1].startswith("1 new codes are nearest to no old one")
    again = ("remap", tmp_path / "prior.safetensors", "--map", map_path, "--force")
    assert_refused(codebook(*again), "3 of 3 new codes of quantizer.codebook.weight, the first 0, are no old one's")
    message = "--on-removed mask=1 is for tokens; for a prior, give error or nearest"
    assert_refused(codebook(*again, "--on-removed", "mask=1"), message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_padding_is_never_drawn_and_rows_keep_bits(codebook: Run, with_model: WriteMap, dtype: torch.dtype) -> None:
    old = {key: tensor.to(dtype) for key, tensor in state(7).items()}
    map_path, options = with_model("m", 4, PRUNE), ("--pad-to-multiple", 8)
    new, _ = remapped(codebook, old, map_path, *options)
    for key in ("tok_emb.weight", "head.weight"):
        assert torch.equal(new[key][:5], old[key][[*KEPT, 6]]) and new[key].dtype == dtype
        assert new[key].shape == (8, 3) and not new[key][5:].any()
    assert torch.equal(new["head.bias"][:5], old["head.bias"][[*KEPT, 6]])
    assert not torch.softmax(new["head.bias"].float(), 0)[5:].any()
    del old["head.bias"]
    (warning,) = remapped(codebook, old, map_path, *options)[1]["warnings"]
    assert warning == "rows of padding have the logit 0, not a low one, for the head has no bias"


def map_of_two(folder: Path) -> Path:
    """The maps of two codebooks, beside their model."""
    model = folder / "codec.safetensors"
    save_file({key: torch.randn(4, 4) for key in TWO}, model)
    return save_map(index_map_path(model), TWO, file_sha256(model))


def test_a_head_over_the_codes_of_all_codebooks_is_cut_into_them(codebook: Run, tmp_path: Path) -> None:
    """Two codebooks of 6 codes, one after the other, and 3 special ids; each is pruned by a map of its own."""
    rows = torch.arange(15.0)[:, None].expand(15, 4).contiguous()
    old = {"tok_emb.weight": rows, "head.weight": rows * 2, "head.bias": torch.arange(15.0)}
    new, done = remapped(codebook, old, map_of_two(tmp_path))
    kept = [*KEPT, *(6 + code for code in KEPT_OF_TWO[1]), 12, 13, 14]
    assert all(torch.equal(new[key], tensor[kept]) for key, tensor in old.items())
    assert (done["tokens"], done["removed"]) == (15, 4)


def test_musicgen_follows_the_maps_of_its_codebooks(codebook: Run, tmp_path: Path) -> None:
    from transformers import MusicgenForCausalLM
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    torch.manual_seed(0)
    config = MusicgenDecoderConfig(
        vocab_size=6, num_codebooks=2, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=6, bos_token_id=6,
    )  # fmt: skip
    old = MusicgenForCausalLM(config).eval()
    old.save_pretrained(tmp_path / "prior")
    remap = ("remap", tmp_path / "prior", "--map", map_of_two(tmp_path), "--force")
    done = codebook(*remap, "--json").json
    assert (done["tokens"], done["removed"]) == (14, 4)
    new = MusicgenForCausalLM.from_pretrained(tmp_path / "prior.remapped").eval()
    assert (new.config.vocab_size, new.config.pad_token_id, new.config.bos_token_id) == (4, 4, 4)
    tokens = torch.tensor([[6, 0, 5, 3], [6, 6, 1, 4]])  # a row for each codebook; 6 starts
    rows = zip(KEPT_OF_TWO, tokens.tolist(), strict=True)
    mapped = [[[*kept, 6].index(token) for token in row] for kept, row in rows]
    before, after = logits(old, tokens), logits(new, torch.tensor(mapped))
    for i, kept in enumerate(KEPT_OF_TWO):
        assert torch.allclose(after[i], before[i][:, kept], rtol=0, atol=1e-6)
    alone = codebook(*remap, "--embedding-key", "model.decoder.embed_tokens.0.weight")
    assert_refused(alone, "1 tables (model.decoder.embed_tokens.0.weight) for 2 codebooks")
    assert_refused(codebook(*remap, "--pad-to-multiple", 4), "differ in length")


NINE = torch.ones(9, 3)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (state(5), (), "has 5 rows, and the map's 6 codes from id 0 on need 6; is the map of another checkp"),
        (state(6), ("--offset", 1), "has 6 rows, and the map's 6 codes from id 1 on need 7"),
        ({"x.weight": NINE}, (), "has no tensor named like an embedding of tokens"),
        ({"encoder.embed_tokens.weight": NINE, "decoder.embed_tokens.weight": NINE.clone()}, (),
         "each of decoder.embed_tokens.weight, encoder.embed_tokens.weight could be meant; name it with --embed"),
        (state(6), ("--embedding-key", "wte.weight"), "has no tensor wte.weight"),
        ({"a": NINE, "wte.weight": NINE.char()}, ("--embedding-key", "wte.weight"), "is I8 [9, 3]; expected rows"),
    ],
)  # fmt: skip
def test_what_is_refused(codebook: Run, with_model: WriteMap, tensors: Any, options: Any, message: str) -> None:
    map_path = with_model("m", 4, PRUNE)
    save_file(tensors, path := map_path.with_name("prior.safetensors"))
    before = contents(path.parent)
    assert_refused(codebook("remap", path, "--map", map_path, *options), message)
    assert contents(path.parent) == before


def test_keys_that_the_user_names(codebook: Run, with_model: WriteMap) -> None:
    """A head under a name of its own, and a bias that stands alone, as BERT's does."""
    weights = {"codes.weight": torch.randn(7, 3), "predict.weight": torch.randn(7, 3)}
    old = {"cls.predictions.bias": torch.arange(7.0), **weights}
    keys = ("--embedding-key", "codes.weight", "--head-key", "predict.weight", "--head-key", "cls.predictions.bias")
    new, _ = remapped(codebook, old, with_model("m", 4, PRUNE), *keys)
    assert all(torch.equal(new[key], tensor[[*KEPT, 6]]) for key, tensor in old.items())


def test_other_files_of_the_directory(codebook: Run, with_model: WriteMap, tmp_path: Path) -> None:
    prior = tmp_path / "prior"
    llama(prior, 6)
    for name in ("tokenizer.json", "training_args.bin"):
        (prior / name).write_text("{}")
    options = ("--map", with_model("m", 4, PRUNE))
    assert codebook("remap", prior, *options, "--json").json["warnings"] == [
        "tokenizer.json goes along as it is, with the ids of the old vocabulary",
        "of the prior's directory, training_args.bin does not go into the new one",
    ]
    before = contents(tmp_path)
    assert_refused(codebook("remap", prior, *options), "exists; --force replaces it")
    assert contents(tmp_path) == before
    assert codebook("remap", prior, *options, "--force", "--quiet").exit_code == 0
    assert codebook("remap", prior, *options, "-o", tmp_path / "one.safetensors", "--quiet").exit_code == 0
    assert json.loads((tmp_path / "one.config.json").read_text())["vocab_size"] == 4
    alone = codebook("remap", prior / "model.safetensors", *options, "--json").json["warnings"]
    assert alone == ["config.json beside it is left as it is; give the directory to have it follow"]
    assert load_file(prior / "model.remapped.safetensors")["lm_head.weight"].shape == (4, 16)


def test_a_prior_of_torch_save_becomes_safetensors(codebook: Run, with_model: WriteMap, tmp_path: Path) -> None:
    torch.save({"model": state(6), "step": 3}, tmp_path / "prior.pt")
    assert codebook("remap", tmp_path / "prior.pt", "--map", with_model("m", 4, PRUNE)).exit_code == 0
    new = load_file(tmp_path / "prior.remapped.safetensors")
    assert torch.equal(new["head.weight"], state(6)["head.weight"][KEPT])


# Verification


Followed = tuple[Path, tuple[object, ...]]
"""The directory of a remapped prior, and the `verify` that compares it with the original."""


@pytest.fixture
def followed(codebook: Run, with_model: WriteMap, tmp_path: Path) -> Callable[..., Followed]:
    """followed(shards=2): a tiny Llama that followed PRUNE, its weights in one file or several."""

    def make(shards: int = 1) -> Followed:
        model = llama(tmp_path / "prior", 9, bos_token_id=0, eos_token_id=7)
        if shards > 1:
            model.save_pretrained(tmp_path / "prior", max_shard_size="4KB")
            (tmp_path / "prior" / "model.safetensors").unlink()
        map_path, output = with_model("m", 4, PRUNE), tmp_path / "prior.remapped"
        assert codebook("remap", tmp_path / "prior", "--map", map_path, "--offset", 1).exit_code == 0
        return output, ("verify", output, "--against", tmp_path / "prior", "--map", map_path)

    return make


def differing(found: Outcome) -> list[str]:
    assert found.exit_code == 3, found
    return sorted(difference["key"] for difference in found.json["differences"])


def test_a_remapped_prior_is_verified_against_its_original_and_its_map_number_by_number(
    codebook: Run, with_model: WriteMap, followed: Callable[..., Followed]
) -> None:
    output, verify = followed()
    assert codebook(*verify).exit_code == 0
    assert_refused(codebook(*verify[:-2]), "name the maps that it followed with --map")
    other = with_model("n", 4, ([0, -1, 1, 2, 3, -1], [0, 0, 1, 2, 3, 3]))
    assert differing(codebook(*verify[:-1], other, "--json")) == ["lm_head.weight", "model.embed_tokens.weight"]
    weights, config = output / "model.safetensors", output / "config.json"
    whole, metadata = load_file(weights), read_checkpoint(output).metadata
    for key in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        changed = whole[key].clone()
        changed.view(-1)[-1] += 1
        save_file({**whole, key: changed}, weights, metadata)
        assert differing(codebook(*verify, "--json")) == [key]
    save_file(whole, weights, metadata)
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 8}))
    assert differing(codebook(*verify, "--json")) == ["config.json"]


def test_settings_that_no_command_can_have_had_are_refused(codebook: Run, followed: Callable[..., Followed]) -> None:
    output, verify = followed()
    weights = output / "model.safetensors"
    tensors, metadata = load_file(weights), read_checkpoint(output).metadata
    settings = json.loads(metadata["codebook_tools.settings"])
    for name, values in {
        "offset": (None, "x", -600, True, 0.5),
        "pad_to_multiple": (0, 10**12, None),
        "embedding_keys": (5, [[]], "wte.weight", None),
        "head_keys": ({},),
        "on_removed": ([1], "errop", 3),
    }.items():
        for value in values:
            text = json.dumps({**settings, name: value})
            save_file(tensors, weights, {**metadata, "codebook_tools.settings": text})
            assert_refused(codebook(*verify), "does not say how it was remapped")


OURS = ("codebooks", "command", "nearest_sha256", "settings", "source_sha256", "version", "about_sha256")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_character_of_a_remapped_priors_metadata_that_is_another_is_found(
    shards: int, codebook: Run, followed: Callable[..., Followed]
) -> None:
    output, verify = followed(shards)
    assert codebook(*verify).exit_code == 0
    about = {name: read_checkpoint(output).metadata[f"codebook_tools.{name}"] for name in OURS}
    digest = about.pop("about_sha256")  # the same in all versions, which verify each other's files
    assert digest == hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
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
            found = codebook(*verify)
            assert found.exit_code in (1, 3), f"{name} in {path.name}: {found}"
            checked += 1
        path.write_bytes(whole)
    assert checked > len(OURS) * shards
    if shards > 1:
        index = output / "model.safetensors.index.json"
        text = json.loads(index.read_text())
        text["metadata"]["total_size"] ^= 1
        index.write_text(json.dumps(text))
        assert differing(codebook(*verify, "--json")) == [index.name]
