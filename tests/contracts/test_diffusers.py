"""A diffusers VQModel goes through every command, and what comes out is what diffusers loads and computes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Grey, Outcome, assert_refused, contents
from diffusers import VQModel
from diffusers.models.autoencoders.vq_model import VectorQuantizer
from image_models import BOOK, DEAD, vqmodel
from safetensors.torch import load_file, save_file
from torch import Tensor

from codebook_tools.checkpoints import atomic
from codebook_tools.checkpoints.layout import index_map_path, partial_path
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.measure import reconstruct
from codebook_tools.models.load import load_model
from codebook_tools.models.output import written_config
from codebook_tools.models.sizes import size_warning
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.operate import measure_model
from codebook_tools.workflows.request import Request

Run = Callable[..., Outcome]
Save = Callable[..., Path]

FEW_STEPS = ("--steps", "12", "--batch-size", "16")
RANGE = ("--input-range=-1,1",)
WEIGHTS = "diffusion_pytorch_model.safetensors"
MOVQ = {"norm_type": "spatial"}
AMUSED = {"lookup_from_codebook": True}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="session")
def saved(image_tensor: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Save:
    """saved(norm_type="spatial"): a directory that diffusers wrote, of 16 codes of which DEAD lie far from all latents.

    It is made once for each config: do not write into it.
    """
    made: dict[str, Path] = {}

    def save(**more: Any) -> Path:
        name = json.dumps(more)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("diffusers") / "vae"
            vqmodel(image_tensor, **more).save_pretrained(made[name], safe_serialization=True)
        return made[name]

    return save


@pytest.fixture
def vae(saved: Save, tmp_path: Path) -> Path:
    """A copy of the plain model, alone in tmp_path."""
    return Path(shutil.copytree(saved(), tmp_path / "vae"))


def by_diffusers(folder: Path, images: Tensor) -> Tensor:
    """What diffusers' own encode, quantiser and decode make of images in [0, 1], clamped to it."""
    model = VQModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return ((model(images * 2 - 1).sample + 1) / 2).clamp(0, 1)


def by_us(path: Path, images: Tensor) -> Tensor:
    model = load_model(read_checkpoint(path))
    return reconstruct(model, images).media


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


# --- what the network computes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [AMUSED, {"latent_channels": 6, "vq_embed_dim": 4}], ids=str)
def test_reconstructions_are_those_of_diffusers(more: dict[str, Any], image_tensor: Tensor, tmp_path: Path) -> None:
    vqmodel(image_tensor, **more).save_pretrained(tmp_path)
    assert torch.allclose(by_us(tmp_path, image_tensor), by_diffusers(tmp_path, image_tensor), atol=1e-5)


def test_any_family_can_be_made_anew(tiny: Path, saved: Save, grey: Callable[..., Grey]) -> None:
    own = grey([0.0, 0.5, 1.0])
    for path, network in ((tiny, None), (saved(), None), (own.path, own.network)):
        model = load_model(read_checkpoint(path), network=network)
        size, loaded = model.books[0].stored.size, model.network.state_dict()
        first, second = (model.build(model.checkpoint, size).state_dict() for _ in range(2))
        assert {name: t.shape for name, t in first.items()} == {name: t.shape for name, t in loaded.items()}
        name = next(name for name, key in model.keys.items() if key == model.books[0].key)
        assert not torch.equal(first[name], second[name]) and not torch.equal(first[name], loaded[name])


# --- what is reported is held against the library ------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loads others", "chooses others"])
def test_a_result_that_the_library_does_not_bear_out_is_exit_code_3(
    what: str, vae: Path, images_folder: Path, codebook: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "loads others":
        load = VQModel.from_pretrained

        def moved(folder: Path, **options: Any) -> object:
            model, info = load(folder, **options)
            model.quantize.embedding.weight.data += 1
            return model, info

        monkeypatch.setattr(VQModel, "from_pretrained", moved)
    else:
        choose = VectorQuantizer.forward

        def shifted(self: VectorQuantizer, latents: Tensor) -> object:
            quantized, loss, (perplexity, one_hot, codes) = choose(self, latents)
            return quantized, loss, (perplexity, one_hot, codes.roll(1))

        monkeypatch.setattr(VectorQuantizer, "forward", shifted)
    found = codebook("prune", vae, "--data", images_folder, *RANGE)
    told = {"loads others": "is not the codebook that was meant", "chooses others": "chooses other codes of"}
    assert found.exit_code == 3 and told[what] in found.stderr
    assert [path.name for path in vae.parent.iterdir()] == ["vae"]


def renamed(folder: Path) -> Path:
    """The weights in `folder`, with the attention's names of 2022."""
    state = load_file(folder / WEIGHTS)
    for new, old in OLD_NAMES.items():
        state = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in state.items()}
    assert any(".proj_attn." in key for key in state)
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    return folder


def test_old_names_of_attention_layers_are_understood_and_kept(
    vae: Path, codebook: Run, images_folder: Path, image_tensor: Tensor
) -> None:
    before = by_us(vae, image_tensor)
    assert torch.equal(by_us(renamed(vae), image_tensor), before)
    found = codebook("finetune", vae, "--data", images_folder, *RANGE, *FEW_STEPS, "--json")
    output = Path(found.json["outputs"]["model"])
    assert load_file(output / WEIGHTS).keys() == load_file(vae / WEIGHTS).keys()
    assert torch.allclose(by_us(output, image_tensor), by_diffusers(output, image_tensor), atol=1e-5)


# --- every command -------------------------------------------------------------------------------------------------


def test_inspect_names_the_family_and_does_not_import_diffusers(
    saved: Save, codebook: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)  # an import would fail
    found = codebook("inspect", saved(), "--json").json
    assert found["family"] == "diffusers-vqmodel"
    (book,) = found["codebooks"]
    assert (book["key"], book["size"], book["dim"], book["confidence"]) == (BOOK, 16, 4, "high")


def test_inspect_says_what_the_other_commands_would_refuse(codebook: Run, vae: Path) -> None:
    edit(vae, num_vq_embeddings=32)
    shown = codebook("inspect", vae)
    assert shown.exit_code == 0 and "num_vq_embeddings=32, but quantize.embedding." in shown.stdout


COMMANDS = {
    "prune": ("prune",),
    "quantize to few bits": ("quantize", "--bits", "6"),
    "grow": ("grow", "--k", "12"),
    "frozen": ("finetune", *FEW_STEPS, "--codebook-update", "frozen", "--train", "decoder"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_writes_a_directory_that_is_measured_as_it_was_reported(
    command: str, vae: Path, codebook: Run, images_folder: Path, held_out_folder: Path, tmp_path: Path
) -> None:
    before = contents(vae)
    name, *options = COMMANDS[command]
    data = ("--data", images_folder, "--test-data", held_out_folder, *RANGE)
    result = codebook(name, vae, *options, *data, "--json").json
    assert contents(vae) == before
    kept = result["stages"][result["kept"]]
    size = kept["codebooks"][0]["size"]
    assert size == {"prune": 10, "grow": 12}.get(name, 16)
    output = tmp_path / f"vae.{name}-k{size}"
    index_map = tmp_path / f"{output.name}.index_map.safetensors"
    assert result["outputs"] == {"model": str(output), "index_map": str(index_map), "report": None}
    sizes = {"before": (vae / WEIGHTS).stat().st_size, "after": (output / WEIGHTS).stat().st_size}
    assert result["bytes"] == sizes | ({"packed": 16 * 4 * 6 // 8 + 4 * 16} if "--bits" in options else {})
    assert {path.name for path in tmp_path.iterdir()} == {"vae", output.name, index_map.name}
    assert {path.name for path in output.iterdir()} == {WEIGHTS, "config.json", "README.md"}
    assert config_of(output) == config_of(vae) | {"num_vq_embeddings": size}
    assert codebook("verify", output, "--against", vae, "--json").json == {"ok": True, "differences": []}
    assert codebook("measure", output, *data, "--json").json["stages"]["before"] == kept


def test_it_is_compared_with_a_fresh_network_of_the_librarys_own(
    vae: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = vae.rename(vae.with_name("vae.v1"))
    given = ("--strategies", "prune,refit,refit+fresh-network", "--k", 6, "--steps", 2, "--batch-size", 8, "--seed", 3)
    found = codebook("compare", model, "--data", images_folder, *RANGE, *given, "--json")
    assert found.exit_code == 0, found.stderr
    assert [row["error"] for row in found.json["rows"]] == [None] * 4
    assert Path(found.json["outputs"]["rows"]) == Path("vae.v1.compare/rows.json")
    errors = {(row["strategy"], row["k"]): row["stages"]["surgery"]["mse"] for row in found.json["rows"]}
    assert errors["refit+fresh-network", 6] != errors["refit", 6]


def test_pruning_dead_codes_drops_just_those(vae: Path, codebook: Run, images_folder: Path) -> None:
    found = codebook("prune", vae, "--data", images_folder, *RANGE, "--json").json
    output = Path(found["outputs"]["model"])
    old, new = (load_file(folder / WEIGHTS)[BOOK] for folder in (vae, output))
    assert torch.equal(new, old[[i for i in range(16) if i not in DEAD]])
    maps = load_file(index_map_path(output))
    assert [i for i, to in enumerate(maps[f"{BOOK}/index_map"].tolist()) if to == -1] == list(DEAD)


def test_fine_tuning_lowers_the_error_and_trains_both_networks(vae: Path, codebook: Run, images_folder: Path) -> None:
    found = codebook("finetune", vae, "--data", images_folder, *RANGE, "--steps", "40", "--json").json
    assert found["kept"] == "finetuned"
    assert found["stages"]["finetuned"]["mse"] < 0.9 * found["stages"]["before"]["mse"]
    trained = json.loads(read_checkpoint(Path(found["outputs"]["model"])).metadata["codebook_tools.trained_tensors"])
    assert {key.split(".")[0] for key in trained} == {"encoder", "quant_conv", "post_quant_conv", "decoder"}


def test_the_spatial_norm_is_warned_of_and_no_other(saved: Save, codebook: Run, held_out_folder: Path) -> None:
    for more, warned in ((MOVQ, True), ({}, False)):
        found = codebook("measure", saved(**more), "--test-data", held_out_folder, *RANGE, "--json").json
        assert any("force_not_quantize" in warning for warning in found["warnings"]) is warned


# --- a single file, with its config beside it ----------------------------------------------------------------------


@pytest.fixture
def single(saved: Save, tmp_path: Path) -> Callable[[str], Path]:
    """single("config.json"): the weights as tmp_path/one.safetensors, with their config under that name."""

    def place(config: str | None) -> Path:
        shutil.copy(saved() / WEIGHTS, tmp_path / "one.safetensors")
        if config:
            shutil.copy(saved() / "config.json", tmp_path / config)
        return tmp_path / "one.safetensors"

    return place


@pytest.mark.parametrize("config", ["config.json", "one.config.json"])
def test_a_file_with_a_config_becomes_a_directory_that_diffusers_loads(
    config: str, single: Callable[[str], Path], codebook: Run, images_folder: Path, image_tensor: Tensor, tmp_path: Path
) -> None:
    path = single(config)
    found = codebook("refit", path, "--k", "6", "--steps", "0", "--data", images_folder, *RANGE, "--json").json
    output = tmp_path / "one.refit-k6"
    assert found["outputs"]["model"] == str(output)
    assert {file.name for file in output.iterdir()} == {WEIGHTS, "config.json", "README.md"}
    assert (tmp_path / "one.refit-k6.index_map.safetensors").is_file()
    assert VQModel.from_pretrained(output).config.num_vq_embeddings == 6
    assert torch.allclose(by_us(output, image_tensor), by_diffusers(output, image_tensor), atol=1e-5)
    assert codebook("verify", output, "--against", path).exit_code == 0


def test_asked_for_a_file_its_config_is_written_beside_it_and_found_there_again(
    vae: Path, codebook: Run, images_folder: Path, image_tensor: Tensor, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for source, output, size in ((vae, first, 8), (first, second, 5)):
        done = codebook(
            "refit", source, "--k", size, "--steps", "0", "--data", images_folder, *RANGE, "-o", output, "--json"
        )
        assert done.json["outputs"]["model"] == str(output)
        assert json.loads(output.with_name(f"{output.stem}.config.json").read_text())["num_vq_embeddings"] == size
        assert codebook("verify", output, "--against", source).exit_code == 0
    assert by_us(second, image_tensor).shape == image_tensor.shape
    again = ("refit", first, "--k", "5", "--steps", "0", "--data", images_folder, *RANGE, "-o", second)
    assert_refused(codebook(*again), "second.safetensors exists; --force")
    second.unlink()
    index_map_path(second).unlink()
    assert_refused(codebook(*again), "second.config.json exists; --force")


def test_a_config_of_its_own_goes_before_that_of_the_folder(single: Callable[[str], Path], tmp_path: Path) -> None:
    path = single("one.config.json")
    (tmp_path / "config.json").write_text("[]")
    assert written_config(read_checkpoint(path), 16) == path.with_name("one.config.json").read_bytes()


def test_a_config_that_lies_beside_a_file_of_another_family_is_not_looked_at(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{")
    done = codebook("prune", tiny, "--data", images_folder, *RANGE)
    assert done.exit_code == 0, done.stderr
    output = tmp_path / "tiny.prune-k10.safetensors"
    assert output.is_file() and not output.with_name("tiny.prune-k10.config.json").exists()
    assert codebook("verify", output, "--against", tiny).exit_code == 0


# --- the rest of the directory, and its config ---------------------------------------------------------------------


def test_small_files_go_along_and_nothing_else(vae: Path, codebook: Run, images_folder: Path, tmp_path: Path) -> None:
    (vae / "README.md").write_text("of mine")
    (tmp_path / "secret").write_text("not yours")
    (vae / "link").symlink_to(tmp_path / "secret")
    (vae / "folder").mkdir()
    (vae / "folder" / "file").touch()
    (vae / "diffusion_pytorch_model.fp16.safetensors").write_bytes((vae / WEIGHTS).read_bytes())
    found = codebook("prune", vae, "--data", images_folder, *RANGE, "--json").json
    output = Path(found["outputs"]["model"])
    assert {path.name for path in output.iterdir()} == {WEIGHTS, "config.json", "README.md"}
    assert (output / "README.md").read_text().startswith("of mine\n\n## Codebook surgery\n")
    assert any("diffusion_pytorch_model.fp16.safetensors, folder, link" in warning for warning in found["warnings"])


def test_a_model_whose_files_are_links_is_read(vae: Path, codebook: Run, images_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()  # as the hub's cache keeps them
    for name in (WEIGHTS, "config.json"):
        (tmp_path / "snapshot" / name).symlink_to(vae / name)
    found = codebook("prune", tmp_path / "snapshot", "--data", images_folder, *RANGE, "--json").json
    output = Path(found["outputs"]["model"])
    assert not any(path.is_symlink() for path in output.iterdir())
    assert VQModel.from_pretrained(output).config.num_vq_embeddings == 10


def test_the_config_stays_byte_for_byte_where_k_stays(vae: Path, codebook: Run, images_folder: Path) -> None:
    odd = json.dumps(config_of(vae) | {"note": "Ünal", "num_vq_embeddings": 16}, indent=7, ensure_ascii=False)
    (vae / "config.json").write_text(odd, encoding="utf-8")
    data = ("--data", images_folder, *RANGE, "--json")
    same = Path(codebook("finetune", vae, *FEW_STEPS, *data).json["outputs"]["model"])
    assert (same / "config.json").read_bytes() == (vae / "config.json").read_bytes()
    other = Path(codebook("prune", vae, *data).json["outputs"]["model"])
    expected = odd.replace('"num_vq_embeddings": 16', '"num_vq_embeddings": 10')
    assert (other / "config.json").read_text(encoding="utf-8") == expected


def test_a_config_of_another_model_goes_along_with_a_warning(
    tiny: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"n_embed":16}')
    tiny.rename(tmp_path / "own" / "weights.safetensors")
    for k, warned in ((16, False), (8, True)):
        done = codebook(
            "refit", tmp_path / "own", "--k", k, "--steps", "0", "--data", images_folder, *RANGE, "--json"
        ).json
        output = tmp_path / f"own.refit-k{k}"
        assert any("no entry of it is known to be K" in warning for warning in done["warnings"]) is warned
        assert {path.name for path in output.iterdir()} == {"weights.safetensors", "config.json", "README.md"}
        assert (output / "config.json").read_text() == '{"n_embed":16}'
        assert codebook("verify", output, "--against", tmp_path / "own").exit_code == 0


# --- verification --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda config: config.update(num_vq_embeddings=11), "entry num_vq_embeddings: 11 where 10 belongs"),
        (lambda config: config.update(act_fn="relu"), "entry act_fn: 'relu' where 'silu' belongs"),
        (lambda config: config.pop("act_fn"), "entry act_fn: extra or missing"),
    ],
)
def test_a_config_that_does_not_belong_to_the_result_is_found(
    change: Callable[[dict[str, Any]], object], what: str, vae: Path, codebook: Run, images_folder: Path
) -> None:
    output = Path(codebook("prune", vae, "--data", images_folder, *RANGE, "--json").json["outputs"]["model"])
    config = config_of(output)
    change(config)
    (output / "config.json").write_text(json.dumps(config))
    found = codebook("verify", output, "--against", vae, "--json")
    assert found.exit_code == 3
    assert found.json["differences"] == [{"key": "config.json", "what": what}]


@pytest.mark.parametrize("change", ["changed", "missing"])
def test_what_goes_along_is_verified_too_but_for_the_card(
    change: str, vae: Path, codebook: Run, images_folder: Path
) -> None:
    beside = vae / "preprocessor_config.json"
    beside.write_text('{"mean": 0.5}')
    output = Path(codebook("prune", vae, "--data", images_folder, *RANGE, "--json").json["outputs"]["model"])
    with (output / "README.md").open("a") as card:
        card.write("More of it.")
    assert codebook("verify", output, "--against", vae).exit_code == 0
    its = output / beside.name
    its.write_text('{"mean": 0.6}') if change == "changed" else its.unlink()
    found = codebook("verify", output, "--against", vae, "--json")
    assert found.exit_code == 3 and found.json["differences"] == [{"key": beside.name, "what": change}]


def test_a_directory_can_be_verified_from_within(
    vae: Path, codebook: Run, images_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(vae)
    found = codebook("prune", ".", "--data", images_folder, *RANGE, "--json").json
    monkeypatch.chdir(found["outputs"]["model"])
    assert codebook("verify", ".", "--against", vae).exit_code == 0


# --- what a user can mend ------------------------------------------------------------------------------------------


def edit(folder: Path, **entries: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | entries))


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "garbage": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"), "is no JSON"),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 200_000), "is no JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[16]"), "holds a JSON list"),
    "another K": (lambda folder: edit(folder, num_vq_embeddings=32), "num_vq_embeddings=32, but quantize.embedding."),
    "K as text": (lambda folder: edit(folder, num_vq_embeddings="16"), "num_vq_embeddings='16'"),
    "K as yes": (lambda folder: edit(folder, num_vq_embeddings=True), "num_vq_embeddings=True"),
    "another class": (lambda folder: edit(folder, _class_name="AutoencoderKL"), "no network is known"),
    "wrong types": (lambda folder: edit(folder, block_out_channels="8"), "diffusers makes no VQModel of"),
    "another network": (lambda folder: edit(folder, layers_per_block=2), "the network wants"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "a directory without a .safetensors file"),
    "two weights": (
        lambda folder: (shutil.copy(folder / WEIGHTS, folder / "a.safetensors"),
                        (folder / WEIGHTS).rename(folder / "b.safetensors")),
        "holds 2 .safetensors files",
    ),
    "shards": (lambda folder: (folder / f"{WEIGHTS}.index.json").write_text("{}"), "sharded weights"),
}  # fmt: skip
AT_ONCE = ("no config", "garbage", "deep", "a list", "no weights", "two weights", "shards")


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_directory_that_is_amiss_is_refused(
    kind: str, vae: Path, codebook: Run, images_folder: Path, tmp_path: Path
) -> None:
    change, message = BAD_MODELS[kind]
    change(vae)
    before = contents(tmp_path)
    assert_refused(codebook("prune", vae, "--data", images_folder, *RANGE), message)
    assert (codebook("inspect", vae).exit_code == 1) == (kind in AT_ONCE)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "without its config"), ("[]", "holds a JSON list"), ("{", "is no JSON"), ("{}", "no network is known")],
)
def test_a_file_whose_config_is_amiss_is_refused(
    config: str | None, message: str, single: Callable[[str | None], Path], codebook: Run, images_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    path = single(None)
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = contents(tmp_path)
    assert_refused(codebook("prune", path, "--data", images_folder, *RANGE), message)
    assert contents(tmp_path) == before


def test_without_diffusers_it_is_asked_for(
    vae: Path, codebook: Run, images_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert_refused(codebook("prune", vae, "--data", images_folder), "pip install diffusers")


BAD_OUTPUTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "it exists": (lambda folder: (folder / "out").mkdir(), "out", "out exists; --force replaces it"),
    "its map exists": (lambda folder: (folder / "out.index_map.safetensors").touch(), "out", "exists; --force"),
    "the model": (lambda folder: None, "vae", "is the model itself"),
    "the model's weights": (lambda folder: None, f"vae/{WEIGHTS}", "is the model itself"),
    "around the model": (lambda folder: None, ".", "holds the model"),
    "a path without a name": (lambda folder: None, "..", "has no name of its own"),
    "a pickle": (lambda folder: None, "out.pt", "does not end in .safetensors"),
    "no folder": (lambda folder: None, "gone/out", "no such folder"),
    "left over, not whole": (lambda folder: partial_path(folder / "out").mkdir(), "out", "codebook.partial is left of"),
    "left over, the old": (lambda folder: (folder / "out.old").mkdir(), "out", "rename it to out, or delete it"),
    "left over, both": (
        lambda folder: ((folder / "out.old").mkdir(), (folder / "out").mkdir()), "out", "already written out; delete it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_OUTPUTS)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    kind: str, vae: Path, codebook: Run, tmp_path: Path
) -> None:
    change, output, message = BAD_OUTPUTS[kind]
    change(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert_refused(codebook("prune", vae, "--data", "nowhere", "-o", tmp_path / output), message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["a home", "another model", "a link", "a file", "empty"])
def test_force_replaces_nothing_that_is_not_ours(kind: str, vae: Path, codebook: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if kind == "a home":
        (output / "letters").mkdir(parents=True)
    elif kind == "another model":
        shutil.copytree(vae, output)
    elif kind == "a link":
        output.symlink_to(vae)
    elif kind == "a file":
        output.write_text("precious")
    else:
        output.mkdir()
    before = sorted(tmp_path.rglob("*"))
    message = "is the model itself" if kind == "a link" else "is not a directory that codebook-tools wrote"
    assert_refused(codebook("prune", vae, "--data", "nowhere", "-o", output, "--force"), message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("failing", ["rename", "fsync"])
def test_a_failure_on_the_way_leaves_the_old_directory_as_it_was(
    failing: str, vae: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("prune", vae, "--data", images_folder, *RANGE, "-o", tmp_path / "out", "--force")
    assert codebook(*command).exit_code == 0
    before = contents(tmp_path)
    real = getattr(os, failing)

    def fail(*arguments: Any) -> Any:
        if failing == "rename" and not str(arguments[0]).endswith(".partial"):
            return real(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    assert_refused(codebook(*command), "No space left on device")
    assert contents(tmp_path) == before


def test_an_old_directory_that_cannot_be_deleted_is_named(
    vae: Path, codebook: Run, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("prune", vae, "--data", images_folder, *RANGE, "-o", tmp_path / "out", "--force")
    assert codebook(*command).exit_code == 0

    def rmtree(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(atomic.shutil, "rmtree", rmtree)
    assert_refused(codebook(*command), "out.old, which it replaced, cannot be deleted")
    assert VQModel.from_pretrained(tmp_path / "out").config.num_vq_embeddings == 10
    assert_refused(codebook(*command), "had already written out; delete it")


def test_a_directory_is_read_as_its_file_is(vae: Path) -> None:
    found, file = read_checkpoint(vae), read_checkpoint(vae / WEIGHTS)
    assert (found.path, found.folder, file.folder) == (vae / WEIGHTS, vae, None)
    assert found.entries == file.entries and found.config == file.config == config_of(vae)
    (vae / WEIGHTS).rename(vae / "only.safetensors")
    assert read_checkpoint(vae).path == vae / "only.safetensors"
    shutil.copy(vae / "only.safetensors", vae / "model.safetensors")
    assert read_checkpoint(vae).path == vae / "model.safetensors"
    (vae / "config.json").unlink()
    with pytest.raises(CodebookError, match=r"has no config\.json"):
        read_checkpoint(vae)


# --- the size of its images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "far"), [(31, True), (32, False), (128, False), (129, True)])
def test_a_size_below_half_or_above_twice_the_configs_is_far_from_it(size: int, far: bool, saved: Save) -> None:
    warnings = size_warning(read_checkpoint(saved(sample_size=64)), "diffusers-vqmodel", size)
    expected = f"--size {size} is far from 64, which is sample_size in the model's config; --size 64 is its own"
    assert warnings == ([expected] if far else [])
    assert config_of(saved())["sample_size"] == 32  # the library's default says nothing
    assert size_warning(read_checkpoint(saved()), "diffusers-vqmodel", 256) == []


def test_a_typed_size_far_from_the_configs_is_told(saved: Save, images_folder: Path) -> None:
    asked = Request(saved(sample_size=64), (str(images_folder),), size=16, input_range=(-1.0, 1.0))
    assert any("--size 16 is far from 64" in warning for warning in measure_model(asked, Watch()).warnings)
    of_images = measure_model(replace(asked, size=None), Watch())
    assert not any("is far from" in warning for warning in of_images.warnings)
