"""MODEL on the hub: found, fetched, repaired in the current folder; the cache keeps nothing but what was fetched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import Run, assert_refused
from hub_client import hub as hub
from hub_client import tree
from hub_server import Hub
from huggingface_hub import ModelCard
from processes import ran

import codebook_tools as ct
from codebook_tools.errors import VerificationError

RANGE = ("--input-range", "-1,1")


def test_a_model_on_the_hub_is_fetched_once_and_measured(
    codebook: Run, hub: Hub, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    commit = hub.model("org/vq.model", {"tiny.safetensors": tiny.read_bytes(), "other.bin": b"x", "a/b.onnx": b"y"})
    done = codebook("measure", "org/vq.model", "--data", images_folder, *RANGE, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.json["model"] == f"hf://org/vq.model@{commit}/tiny.safetensors"
    assert hub.downloads() == ["tiny.safetensors"]
    before = tree(tmp_path / "home")
    done = codebook("prune", "org/vq.model", "--data", images_folder, *RANGE, "--json")
    assert done.exit_code == 0, done.stderr
    assert hub.downloads() == ["tiny.safetensors"] and tree(tmp_path / "home") == before
    name = Path("vq.model-tiny.prune-k10")
    endings = ("README.md", "index_map.safetensors", "safetensors")
    assert sorted(Path().iterdir()) == [Path(f"{name}.{ending}") for ending in endings]
    assert codebook("verify", f"{name}.safetensors", "--against", "org/vq.model").exit_code == 0


CARD = b"---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\ntags: [vae]\nmodel-index: []\n---\n# Base\n"


@pytest.fixture
def vae(hub: Hub, tmp_path: Path) -> str:
    """A diffusers VQModel at org/vae, with a card, in shards in a subfolder, and the commit."""
    from diffusers import VQModel

    torch.manual_seed(0)
    model = VQModel(block_out_channels=(8,), num_vq_embeddings=16, latent_channels=4, norm_num_groups=4, sample_size=16)
    model.save_pretrained(tmp_path / "vae")
    model.save_pretrained(tmp_path / "vae" / "sub", max_shard_size="4KB")
    folder = tmp_path / "vae"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return hub.model("org/vae", files | {"README.md": CARD, "big.png": b"png"})


PUSHED = ("--push-to-hub", "me/vae-k8", "--private")


@pytest.mark.slow
def test_a_directory_goes_from_the_hub_to_the_hub(
    codebook: Run, hub: Hub, vae: str, images_folder: Path, tmp_path: Path
) -> None:
    options = ("--k", 8, "--steps", 0, "--data", images_folder, *RANGE)
    done = codebook("refit", "org/vae", *options, *PUSHED, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.json["model"] == f"org/vae@{vae}" and done.json["outputs"]["model"] == "vae.refit-k8"
    pushed = hub.models["me/vae-k8"]
    assert pushed.private and len(pushed.commits) == 1
    assert done.json["outputs"]["hub"] == f"{hub.url}/me/vae-k8/commit/{pushed.refs['main']}"
    local = {path.name: path.read_bytes() for path in [*Path("vae.refit-k8").iterdir(), *Path().glob("*.safetensors")]}
    assert pushed.files == local and set(local) > {"config.json", "vae.refit-k8.index_map.safetensors", "README.md"}
    before = tree(tmp_path / "home")
    again = codebook("verify", "me/vae-k8", "--against", "org/vae")
    assert again.exit_code == 0, again
    fetched = {name: of for name, of in tree(tmp_path / "home").items() if "me--vae-k8" not in name}
    assert fetched == before

    card = ModelCard(pushed.files["README.md"].decode()).data
    assert card.base_model == "org/vae" and card.base_model_relation == "finetune" and card.license_name == "own"
    assert {"vae", "codebook-surgery"} <= set(card.tags or ()) and card.library_name == "diffusers"
    metrics = {result.metric_type: result.metric_value for result in card.eval_results or ()}
    kept = done.json["stages"][done.json["kept"]]
    assert metrics["mse"] == pytest.approx(kept["mse"], rel=1e-5) and metrics["used"] == kept["codebooks"][0]["used"]

    assert_refused(
        codebook("refit", "org/vae", *options, *PUSHED, "-o", "b"),
        "me/vae-k8 holds README.md, config.json, diffusion_pytorch_model.safetensors and 1 more; --force",
    )
    assert not Path("b").exists()
    done = codebook("quantize", "hf://org/vae/sub", "--k", 4, *options[4:], *PUSHED, "--force", "--json")
    assert done.exit_code == 0, done.stderr
    assert done.json["outputs"]["model"] == "vae-sub.quantize-k4"
    assert set(pushed.files) == {path.name for path in Path("vae-sub.quantize-k4").iterdir()} | {
        "vae-sub.quantize-k4.index_map.safetensors"
    }
    card = ModelCard(pushed.files["README.md"].decode()).data
    assert (
        card.base_model_relation == "quantized"
        and card.license_link == f"https://huggingface.co/org/vae/blob/{vae}/LICENSE"
    )


@pytest.mark.slow
def test_a_file_that_is_pushed_has_a_card(codebook: Run, hub: Hub, tiny: Path, images_folder: Path) -> None:
    words = ("prune", tiny, "--data", images_folder, *RANGE, "-o", "out.safetensors", "--push-to-hub", "me/out")
    assert codebook(*words).exit_code == 0
    files = hub.models["me/out"].files
    assert (
        set(files) == {"out.safetensors", "out.index_map.safetensors", "README.md"} and not hub.models["me/out"].private
    )
    assert files["README.md"] == Path("out.README.md").read_bytes()
    card = ModelCard(files["README.md"].decode()).data
    assert card.base_model is None and {result.dataset_name for result in card.eval_results or ()} == {"own data"}
    assert codebook("verify", "me/out", "--against", tiny).exit_code == 0


@pytest.mark.slow
def test_outputs_are_named_after_the_model_and_lie_in_the_current_folder(
    codebook: Run, hub: Hub, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    commit = hub.model("org/vq", {"model.safetensors": tiny.read_bytes()})
    title, data = f"hf://org/vq@{commit}/model.safetensors", ("--data", images_folder, *RANGE)
    Path("recipe.yaml").write_text("model: org/vq\nsurgeries: [prune]\n")
    assert codebook("inspect", "org/vq").exit_code == 0
    before = tree(tmp_path / "home")
    commands = [
        ("encode", "org/vq", *data),
        ("codes", "org/vq", *data),
        ("sweep", "org/vq", "--k", 4, *data),
        ("compare", "org/vq", "--k", 4, "--strategies", "prune", "--steps", 0, *data),
        ("run", "recipe.yaml", *data),
        ("diagnose", "org/vq", "--against", "org/vq", *data),
        ("measure", "org/vq", "--stats", "vq.stats.safetensors", *data),
        ("refit", "org/vq", "--k", 4, "--steps", 1, "--latents-cache", "vq.latents", *data),
        ("finetune", "org/vq", "--steps", 1, "--report", "vq.html", *data),
        ("quantize", "org/vq", "--k", 4),
        ("map", "org/vq", "--method", "pca", *data),
        ("decode", "vq.tokens.npy", "org/vq", "--input-range=-1,1"),
        ("verify", "vq.quantize-k4.safetensors", "--against", "org/vq"),
        ("init", "org/vq", *data),
    ]
    for command in commands:
        done = codebook(*command, "--json")
        assert done.exit_code in (0, 3) and done.json.get("model", title) == title, (command, done.stderr)
        assert tree(tmp_path / "home") == before
    ours = {path.name for path in Path().iterdir()} - {"recipe.yaml", "codebook.toml"}
    assert {name.partition(".")[0] for name in ours} == {"vq"}
    assert {"vq.tokens.npy", "vq.codes.html", "vq.sweep", "vq.compare", "vq.run-k10.safetensors"} <= ours
    recipe = Path("vq.run-k10.recipe.yaml")
    assert f"model: {title}" in recipe.read_text()
    assert codebook("run", recipe, "-o", "again.safetensors").exit_code == 0
    assert Path("again.safetensors").read_bytes() == Path("vq.run-k10.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["org/vae", "org/file", "local"])
def test_a_chain_is_pushed_once_with_the_card_of_all_its_steps(
    model: str, codebook: Run, hub: Hub, vae: str, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    hub.model("org/file", {"model.safetensors": tiny.read_bytes(), "README.md": CARD})
    Path("recipe.yaml").write_text("surgeries: [{refit: {k: 8, steps: 0}}, {prune: {keep: 4}}]\n")
    options = ("--data", images_folder, *RANGE, "--push-to-hub", "me/out")
    done = codebook("run", "recipe.yaml", tiny if model == "local" else model, *options, "--json")
    assert done.exit_code == 0, done.stderr
    pushed = hub.models["me/out"]
    assert len(pushed.commits) == 1 and done.json["outputs"]["hub"].startswith(f"{hub.url}/me/out/commit/")
    card = pushed.files["README.md"].decode()
    assert card.index("`codebook refit`") < card.index("`codebook prune`") and card.count("---\n") >= 2
    data = ModelCard(card).data
    assert (data.base_model, data.get("license_name")) == ((None, None) if model == "local" else (model, "own"))


def test_from_python(hub: Hub, tiny: Path, images_folder: Path) -> None:
    commit = hub.model("org/vq", {"model.safetensors": tiny.read_bytes()})
    model = ct.load("org/vq", input_range=(-1, 1))
    assert repr(model) == f"Model('hf://org/vq@{commit}/model.safetensors')"
    assert ct.measure(model, images_folder) == ct.measure(ct.load(tiny, input_range=(-1, 1)), images_folder)
    assert (
        ct.inspect("org/vq").model == ct.inspect(f"org/vq@{commit}").model == f"hf://org/vq@{commit}/model.safetensors"
    )


LOCAL = """
import sys
import codebook_tools as ct
from codebook_cli.app import app

sys.argv = ["codebook", "inspect", sys.argv[1]]
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
assert not {"huggingface_hub", "datasets"} & {*sys.modules}, sys.modules.keys()
sys.modules["huggingface_hub"] = None
for call in (lambda: ct.load("org/name"), lambda: ct.measure(ct.load(sys.argv[2]), "hf://datasets/org/name")):
    try:
        call()
    except ct.CodebookError as error:
        assert "pip install 'codebook-tools[hub]'" in str(error), error
    else:
        raise AssertionError
"""


@pytest.mark.slow
def test_a_local_model_does_without_the_library_which_a_hub_id_names(tiny: Path) -> None:
    done = ran(sys.executable, "-c", LOCAL, tiny)
    assert done.exit_code == 0, done


def unwritten(hub: Hub) -> None:
    """Nothing is on the hub, not even an empty repository."""
    assert not hub.models


@pytest.mark.parametrize(
    ("place", "token", "said"),
    [
        ("me/new", None, "--push-to-hub me/new: nobody is logged in; log in with `hf auth login`, or set HF_TOKEN"),
        ("me/new", "hf_wrong", "does not accept the token"),
        ("new", "hf_good", "--push-to-hub new: expected ORG/NAME"),
        ("me/new@v1", "hf_good", "expected ORG/NAME"),
        ("other/new", "hf_good", "the token writes to me, org alone"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_any_work(
    place: str, token: str | None, said: str, codebook: Run, hub: Hub, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert_refused(codebook("prune", tiny, "--push-to-hub", place, "-o", "out.safetensors"), said)
    assert not [*Path().iterdir()]
    unwritten(hub)


def test_a_token_that_may_only_read_is_refused_before_any_work(codebook: Run, hub: Hub, tiny: Path) -> None:
    hub.role = "read"
    assert_refused(codebook("prune", tiny, "--push-to-hub", "me/new", "-o", "x.safetensors"), "the token may only read")
    assert not [*Path().iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["preupload", "upload/", "commit/"])
def test_a_push_that_fails_leaves_nothing_on_the_hub_and_the_result_on_the_disk(
    page: str, codebook: Run, hub: Hub, tiny: Path, images_folder: Path
) -> None:
    hub.fault = lambda method, path: (500, b"broken") if page in path else None
    words = ("prune", tiny, "--data", images_folder, *RANGE, "-o", "out.safetensors", "--push-to-hub", "me/out")
    said = "out.safetensors is written and verified, but not on the hub: --push-to-hub me/out: http://127.0.0.1"
    refused = codebook(*words, "--quiet")
    assert_refused(refused, said)
    assert "error 500" in refused.stderr and Path("out.safetensors").is_file()
    unwritten(hub)


def test_a_model_that_fails_its_proof_is_not_pushed(
    codebook: Run, hub: Hub, tiny: Path, images_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disagree(*_: object) -> None:
        raise VerificationError("the quantizer disagrees")

    monkeypatch.setattr("codebook_tools.workflows.target.prove", disagree)
    done = codebook("prune", tiny, "--data", images_folder, *RANGE, "-o", "out.safetensors", "--push-to-hub", "me/out")
    assert done.exit_code == 3 and "disagrees" in done.stderr
    unwritten(hub)


def test_what_is_fetched_may_be_no_model(codebook: Run, hub: Hub) -> None:
    hub.model("org/page", {"model.safetensors": b"<html>Not found</html>"})
    hub.model("org/index", {"config.json": b"{}", "model.safetensors.index.json": b"<html>"})
    assert_refused(codebook("inspect", "org/page"), "model.safetensors")
    assert_refused(codebook("inspect", "org/index"), "model.safetensors.index.json is no JSON")


def test_the_model_itself_is_never_overwritten_and_private_needs_a_place(codebook: Run, hub: Hub, tiny: Path) -> None:
    commit = hub.model("me/own", {"tiny.safetensors": tiny.read_bytes()})
    assert_refused(codebook("prune", "me/own", "--push-to-hub", "me/own", "--force"), "never overwritten")
    assert_refused(codebook("prune", "me/own", "--private"), "--private is of --push-to-hub org/name; give both")
    inside = next(Path("../home").rglob("snapshots"))
    assert_refused(codebook("prune", "me/own", "-o", inside / commit / "x.safetensors"), "lies in the hub's cache")
