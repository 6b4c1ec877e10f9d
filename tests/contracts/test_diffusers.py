"""A directory of diffusers goes through the command line: what is written beside the weights, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Patch, Run, assert_refused, contents
from diffusers import VQModel
from diffusers.models.autoencoders.vq_model import VectorQuantizer
from image_models import BOOK, vqmodel
from points import DEAD
from safetensors.torch import load_file, save_file
from torch import Tensor

from codebook_tools.checkpoints.layout import index_map_path
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.evaluation.measure import reconstruct
from codebook_tools.models.load import load_model
from codebook_tools.models.output import written_config
from codebook_tools.models.sizes import size_warning

Save = Callable[..., Path]

RANGE = ("--input-range=-1,1",)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(image_tensor: Tensor, tmp_path: Path) -> Save:
    """saved(norm_type="spatial"): a directory that diffusers wrote, of 16 codes of which DEAD lie far from all latents;
    each takes the place of the one before."""

    def save(**config: Any) -> Path:
        vqmodel(image_tensor, **config).save_pretrained(tmp_path / "vae", safe_serialization=True)
        return tmp_path / "vae"

    return save


@pytest.fixture
def vae(saved: Save) -> Path:
    """The plain model, alone in tmp_path."""
    return saved()


@pytest.fixture
def run(codebook: Run, images_folder: Path) -> Run:
    """run("prune", model, ...): a command on the images."""
    return lambda command, model, *words: codebook(command, model, "--data", images_folder, *RANGE, *words)


@pytest.fixture
def written(run: Run) -> Callable[..., Path]:
    """written("prune", model, ...): the output of a command that succeeds."""
    return lambda *words: Path(run(*words, "--json").json["outputs"]["model"])


def by_diffusers(folder: Path, images: Tensor) -> Tensor:
    """What diffusers' own encode, quantizer and decode make of images in [0, 1], clamped to it."""
    with torch.no_grad():
        return ((VQModel.from_pretrained(folder).eval()(images * 2 - 1).sample + 1) / 2).clamp(0, 1)


def by_us(path: Path, images: Tensor) -> Tensor:
    return reconstruct(load_model(read_checkpoint(path)), images).media


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def edit(folder: Path, **entries: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | entries))


@pytest.mark.parametrize("config", [{"lookup_from_codebook": True}, {"latent_channels": 6, "vq_embed_dim": 4}], ids=str)
def test_reconstructions_are_those_of_diffusers(config: dict[str, Any], image_tensor: Tensor, saved: Save) -> None:
    path = saved(**config)
    assert torch.allclose(by_us(path, image_tensor), by_diffusers(path, image_tensor), atol=1e-5)


def loads_others(monkeypatch: Patch) -> None:
    load = VQModel.from_pretrained

    def moved(folder: Path, **options: Any) -> object:
        model, info = load(folder, **options)
        model.quantize.embedding.weight.data += 1
        return model, info

    monkeypatch.setattr(VQModel, "from_pretrained", moved)


def chooses_others(monkeypatch: Patch) -> None:
    choose = VectorQuantizer.forward

    def shifted(self: VectorQuantizer, latents: Tensor) -> object:
        quantized, loss, (perplexity, one_hot, codes) = choose(self, latents)
        return quantized, loss, (perplexity, one_hot, codes.roll(1))

    monkeypatch.setattr(VectorQuantizer, "forward", shifted)


@pytest.mark.parametrize(
    ("patch", "message"),
    [(loads_others, "is not the codebook that was meant"), (chooses_others, "chooses other codes of")],
)
def test_a_result_with_other_codes_than_the_librarys_is_exit_code_3(
    patch: Callable[[Patch], None], message: str, vae: Path, run: Run, monkeypatch: Patch
) -> None:
    patch(monkeypatch)
    outcome = run("prune", vae)
    assert outcome.exit_code == 3 and message in outcome.stderr
    assert [path.name for path in vae.parent.iterdir()] == ["vae"]


@pytest.mark.slow
def test_old_names_of_attention_layers_are_known_trained_and_kept(vae: Path, run: Run, image_tensor: Tensor) -> None:
    before, state = by_us(vae, image_tensor), load_file(vae / WEIGHTS)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in state.items()}
    assert any(".proj_attn." in key for key in state)
    save_file(state, vae / WEIGHTS, {"format": "pt"})
    assert torch.equal(by_us(vae, image_tensor), before)
    result = run("finetune", vae, "--steps", "40", "--json").json
    output, stages = Path(result["outputs"]["model"]), result["stages"]
    assert result["kept"] == "finetuned" and stages["finetuned"]["mse"] < 0.9 * stages["before"]["mse"]
    trained = json.loads(read_checkpoint(output).metadata["codebook_tools.trained_tensors"])
    assert {key.split(".")[0] for key in trained} == {"encoder", "quant_conv", "post_quant_conv", "decoder"}
    assert load_file(output / WEIGHTS).keys() == state.keys()
    assert torch.allclose(by_us(output, image_tensor), by_diffusers(output, image_tensor), atol=1e-5)


def test_inspect_names_the_family_and_does_not_import_diffusers(vae: Path, codebook: Run, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # an import would fail
    result = codebook("inspect", vae, "--json").json
    assert result["family"] == "diffusers-vqmodel"
    (book,) = result["codebooks"]
    assert (book["key"], book["size"], book["dim"], book["confidence"]) == (BOOK, 16, 4, "high")
    edit(vae, num_vq_embeddings=32)  # which other commands refuse
    outcome = codebook("inspect", vae)
    assert outcome.exit_code == 0 and "num_vq_embeddings=32, but quantize.embedding." in outcome.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        *("prune", "quantize --bits 6", "grow --k 12"),
        "finetune --steps 12 --batch-size 16 --codebook-update frozen --train decoder",
    ],
)
def test_a_command_writes_a_directory_that_is_measured_as_it_was_reported(
    command: str, vae: Path, run: Run, codebook: Run, held_out_folder: Path, tmp_path: Path
) -> None:
    before = contents(vae)
    name, *options = command.split()
    test_data = ("--test-data", held_out_folder, "--json")
    result = run(name, vae, *options, *test_data).json
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
    assert run("measure", output, *test_data).json["stages"]["before"] == kept
    if name == "prune":
        old, new = (load_file(folder / WEIGHTS)[BOOK] for folder in (vae, output))
        assert torch.equal(new, old[[i for i in range(16) if i not in DEAD]])
        codes = load_file(index_map)[f"{BOOK}/index_map"].tolist()
        assert [i for i, to in enumerate(codes) if to == -1] == list(DEAD)


@pytest.mark.slow
def test_it_is_compared_with_a_fresh_network(vae: Path, run: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--strategies", "prune,refit,refit+fresh-network", "--k", 6, "--steps", 2, "--batch-size", 8, "--seed", 3)
    outcome = run("compare", vae.rename(vae.with_name("vae.v1")), *words, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    assert [row["error"] for row in outcome.json["rows"]] == [None] * 4
    assert Path(outcome.json["outputs"]["rows"]) == Path("vae.v1.compare/rows.json")
    errors = {(row["strategy"], row["k"]): row["stages"]["surgery"]["mse"] for row in outcome.json["rows"]}
    assert errors["refit+fresh-network", 6] != errors["refit", 6]


@pytest.mark.parametrize(
    ("config", "options", "words", "warned"),
    [
        ({"norm_type": "spatial"}, (), "force_not_quantize", True),
        ({}, (), "force_not_quantize", False),
        ({"sample_size": 64}, ("--size", 16), "--size 16 is far from 64", True),
        ({"sample_size": 64}, (), "is far from", False),
    ],
)
def test_the_spatial_norm_and_a_size_far_from_the_configs_are_warned_of(
    config: dict[str, Any], options: tuple[object, ...], words: str, warned: bool, saved: Save, codebook: Run,
    held_out_folder: Path,
) -> None:  # fmt: skip
    result = codebook("measure", saved(**config), "--test-data", held_out_folder, *RANGE, *options, "--json").json
    assert any(words in warning for warning in result["warnings"]) is warned


@pytest.mark.slow
@pytest.mark.parametrize("config", ["config.json", "one.config.json"])
def test_a_file_with_a_config_becomes_a_directory_that_diffusers_loads(
    config: str, vae: Path, written: Callable[..., Path], codebook: Run, tmp_path: Path
) -> None:
    path = (vae / WEIGHTS).rename(tmp_path / "one.safetensors")
    (vae / "config.json").rename(tmp_path / config)
    output = written("refit", path, "--k", "6", "--steps", "0")
    assert output == tmp_path / "one.refit-k6"
    assert {file.name for file in output.iterdir()} == {WEIGHTS, "config.json", "README.md"}
    assert (tmp_path / "one.refit-k6.index_map.safetensors").is_file()
    assert VQModel.from_pretrained(output).config.num_vq_embeddings == 6
    assert codebook("verify", output, "--against", path).exit_code == 0
    if config == "one.config.json":  # which goes before that of the folder
        (tmp_path / "config.json").write_text("[]")
        assert written_config(read_checkpoint(path), 16) == path.with_name("one.config.json").read_bytes()


@pytest.mark.slow
def test_a_config_is_written_beside_a_file_and_found_again(
    vae: Path, run: Run, written: Callable[..., Path], codebook: Run, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for source, output, size in ((vae, first, 8), (first, second, 5)):
        assert written("refit", source, "--k", size, "--steps", "0", "-o", output) == output
        assert json.loads(output.with_name(f"{output.stem}.config.json").read_text())["num_vq_embeddings"] == size
        assert codebook("verify", output, "--against", source).exit_code == 0
    again = ("refit", first, "--k", "5", "--steps", "0", "-o", second)
    assert_refused(run(*again), "second.safetensors exists; --force")
    second.unlink()
    index_map_path(second).unlink()
    assert_refused(run(*again), "second.config.json exists; --force")


def test_a_config_beside_another_familys_file_is_not_read(
    tiny: Path, written: Callable[..., Path], codebook: Run, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{")
    output = written("prune", tiny)
    assert output.is_file() and not output.with_name(f"{output.stem}.config.json").exists()
    assert codebook("verify", output, "--against", tiny).exit_code == 0


@pytest.mark.slow
def test_what_lies_beside_the_weights_goes_along_as_it_is_but_for_k(vae: Path, run: Run, tmp_path: Path) -> None:
    odd = json.dumps(config_of(vae) | {"note": "Ünal", "num_vq_embeddings": 16}, indent=7, ensure_ascii=False)
    (vae / "config.json").write_text(odd, encoding="utf-8")
    (snapshot := tmp_path / "snapshot").mkdir()
    for name in (WEIGHTS, "config.json"):  # as the hub's cache keeps them
        (snapshot / name).symlink_to(vae / name)
    (snapshot / "README.md").write_text("of mine")
    (tmp_path / "secret").write_text("not yours")
    (snapshot / "link").symlink_to(tmp_path / "secret")
    (snapshot / "folder").mkdir()
    (snapshot / "folder" / "file").touch()
    (snapshot / "diffusion_pytorch_model.fp16.safetensors").write_bytes((vae / WEIGHTS).read_bytes())
    for command, size in (("restart --steps 0", 16), ("prune", 10)):
        result = run(*command.split()[:1], snapshot, *command.split()[1:], "--json").json
        output = Path(result["outputs"]["model"])
        assert {path.name for path in output.iterdir()} == {WEIGHTS, "config.json", "README.md"}
        assert not any(path.is_symlink() for path in output.iterdir())
        assert "---\n\nof mine\n\n## Codebook surgery\n" in (output / "README.md").read_text()
        assert any("diffusion_pytorch_model.fp16.safetensors, folder, link" in text for text in result["warnings"])
        expected = odd.replace('"num_vq_embeddings": 16', f'"num_vq_embeddings": {size}')
        assert (output / "config.json").read_bytes() == expected.encode()
        assert VQModel.from_pretrained(output).config.num_vq_embeddings == size


@pytest.mark.parametrize(("k", "warned"), [(16, False), (8, True)])
def test_another_models_config_goes_along_with_a_warning(
    k: int, warned: bool, tiny: Path, run: Run, codebook: Run, tmp_path: Path
) -> None:
    model, output = tmp_path / "own", tmp_path / f"own.refit-k{k}"
    model.mkdir()
    (model / "config.json").write_text('{"n_embed":16}')
    tiny.rename(model / "weights.safetensors")
    warnings = run("refit", model, "--k", k, "--steps", "0", "--json").json["warnings"]
    assert any("no entry of it is known to be K" in warning for warning in warnings) is warned
    assert {path.name for path in output.iterdir()} == {"weights.safetensors", "config.json", "README.md"}
    assert (output / "config.json").read_text() == '{"n_embed":16}'
    assert codebook("verify", output, "--against", model).exit_code == 0


@pytest.mark.slow
def test_a_config_or_a_file_that_does_not_belong_to_the_result_is_found_whatever_its_card_says(
    vae: Path, written: Callable[..., Path], codebook: Run, monkeypatch: Patch
) -> None:
    (vae / "preprocessor_config.json").write_text('{"mean": 0.5}')
    monkeypatch.chdir(vae)
    output = written("prune", ".").resolve()
    (output / "README.md").write_text((output / "README.md").read_text() + "More of it.")
    monkeypatch.chdir(output)
    assert codebook("verify", ".", "--against", vae).exit_code == 0
    copy, before = output / "preprocessor_config.json", (output / "config.json").read_bytes()
    amiss: dict[str, Callable[[], object]] = {
        "entry num_vq_embeddings: 11 where 10 belongs": lambda: edit(output, num_vq_embeddings=11),
        "entry act_fn: 'relu' where 'silu' belongs": lambda: edit(output, act_fn="relu"),
        "entry mine: extra or missing": lambda: edit(output, mine=1),
        "entry act_fn: extra or missing": lambda: (output / "config.json").write_text(
            json.dumps({key: value for key, value in config_of(output).items() if key != "act_fn"})
        ),
        "changed": lambda: copy.write_text('{"mean": 0.6}'),
        "missing": copy.unlink,
    }
    for what, change in amiss.items():
        change()
        outcome = codebook("verify", output, "--against", vae, "--json")
        key = "config.json" if "entry" in what else copy.name
        assert outcome.exit_code == 3 and outcome.json["differences"] == [{"key": key, "what": what}]
        (output / "config.json").write_bytes(before)


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
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
    "a file alone": (lambda folder: (folder / "config.json").unlink(), "without its config"),
    "a file beside no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is no JSON"),
    "a file beside nothing": (lambda folder: (folder / "config.json").write_text("{}"), "no network is known"),
}  # fmt: skip
AT_ONCE = ("no config", "no weights", "two weights", "shards", "a file beside no JSON")


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_directory_that_is_amiss_is_refused(kind: str, vae: Path, run: Run, codebook: Run, tmp_path: Path) -> None:
    change, message = BAD_MODELS[kind]
    change(vae)
    before, model = contents(tmp_path), vae / WEIGHTS if "a file" in kind else vae
    assert_refused(run("prune", model), message)
    assert (codebook("inspect", model).exit_code == 1) == (kind in AT_ONCE)
    assert contents(tmp_path) == before


def test_without_diffusers_it_is_asked_for(vae: Path, run: Run, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert_refused(run("prune", vae), "pip install 'codebook-tools[diffusers]'")


def test_of_several_weights_those_of_a_librarys_name_are_read(vae: Path) -> None:
    shutil.copy(vae / WEIGHTS, vae / "a.safetensors")
    assert read_checkpoint(vae).path == vae / WEIGHTS
    (vae / WEIGHTS).rename(vae / "model.safetensors")
    assert read_checkpoint(vae).path == vae / "model.safetensors"


def test_a_size_below_half_or_above_twice_the_configs_is_far_from_it(saved: Save) -> None:
    for size, far in ((31, True), (32, False), (128, False), (129, True)):
        warnings = size_warning(read_checkpoint(saved(sample_size=64)), "diffusers-vqmodel", size)
        expected = f"--size {size} is far from 64, which is sample_size in the model's config; --size 64 is its own"
        assert warnings == ([expected] if far else [])
    assert config_of(saved())["sample_size"] == 32  # the library's default says nothing
    assert size_warning(read_checkpoint(saved()), "diffusers-vqmodel", 256) == []
