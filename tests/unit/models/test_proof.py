"""What is reported is what the model's own code does with the file, or nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome, Run, assert_refused
from proven_networks import LIBRARIES, NETWORKS, Tied, nearest, write_images, write_network
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.models import stored_codes
from codebook_tools.models.registry import detected
from codebook_tools.models.twins import twins

RANGE = ("--input-range", "0,1")
TRAINED = ("--steps", 3, "--batch-size", 16)


@pytest.fixture
def run(tmp_path: Path, codebook: Run) -> Run:
    """run("refit", "tied", "--k", 8): a command on a network of that name and its data, its output in tmp_path."""
    calibration, held_out = write_images(tmp_path)

    def go(command: str, name: str, *words: object) -> Outcome:
        model, network = write_network(tmp_path, name, 24)
        data = ("--data", calibration, "--test-data", held_out, "-o", tmp_path / "out.safetensors", "--json")
        return codebook(command, model, "--network", network, *RANGE, *data, *words)

    return go


@pytest.fixture
def images(tmp_path: Path, run: Run) -> Tensor:
    return torch.from_numpy(np.load(tmp_path / "held_out.npy")).float()[:, None] / 255


def succeeded(outcome: Outcome) -> Any:
    assert outcome.exit_code == 0, outcome.stderr
    return outcome.json


def kept_use(result: Any) -> tuple[float, Any]:
    """Error and codebook of the stage that was kept."""
    kept = result["stages"][result["kept"]]
    (use,) = kept["codebooks"]
    return pytest.approx(kept["mse"], rel=1e-5, abs=1e-6), use


# --- one tensor, several names -------------------------------------------------------------------------------------
@pytest.mark.parametrize("words", [("refit", "--k", 8, *TRAINED), ("prune",), ("grow", "--k", 20)])
def test_stages_keep_sharing_a_codebook_and_verify_finds_where_they_do_not(
    words: tuple[Any, ...], run: Run, tmp_path: Path, images: Tensor, codebook: Run
) -> None:
    result = succeeded(run(words[0], "tied", *words[1:]))
    mse, use = kept_use(result)
    state = load_file(tmp_path / "out.safetensors")
    assert torch.equal(state["stages.0.weight"], state["stages.1.weight"])
    maps = load_file(tmp_path / "out.index_map.safetensors")
    assert {"stages.0.weight/index_map", "stages.1.weight/index_map", "stages.1.weight/nearest"} <= maps.keys()

    module: Any = Tied(use["size"]).requires_grad_(False)
    module.load_state_dict(state)
    chosen = list[Tensor]()

    def quantize(stage: int, latents: Tensor) -> Tensor:
        vectors, codes = nearest(latents, module.stages[0].weight)
        chosen.append(codes)
        return vectors

    decoded = module.decode(module.walk(module.encode(images), quantize)).clamp(0, 1)
    assert float((decoded - images).square().mean()) == mse
    assert use["used"] == len(torch.stack(chosen).unique())
    assert use["latents"] == sum(codes.numel() for codes in chosen)
    assert any("are one codebook" in warning for warning in result["warnings"])

    state["stages.1.weight"] += 1
    out, against = tmp_path / "out.safetensors", ("--against", tmp_path / "model.safetensors")
    with safe_open(out, "pt") as file:
        save_file(state, out, file.metadata())
    network = ("--network", f"{tmp_path / 'network.py'}:make", "--data", tmp_path / "calibration.npy", *RANGE)
    for words, message in ((against, "in the original they are equal"), (network, "one tensor in the network")):
        refused = codebook("verify", out, *words, "--json")
        assert refused.exit_code == 3 and any(message in one["what"] for one in refused.json["differences"]), message


def test_the_codebook_of_a_shared_library_quantizer_is_written_under_every_name(tmp_path: Path, codebook: Run) -> None:
    state = {key: tensor.clone().contiguous() for key, tensor in LIBRARIES["shared"](24).state_dict().items()}
    model, latents, out = tmp_path / "shared.safetensors", tmp_path / "z.npy", tmp_path / "out.safetensors"
    save_file(state, model)
    np.save(latents, np.random.default_rng(0).normal(size=(600, 6)).astype(np.float32))
    key = "vq.layers.0._codebook.embed"
    words = ("--latents", latents, "--codebook-key", key, "--metric", "euclidean", "--k", 8)
    result = succeeded(codebook("refit", model, *words, "-o", out, "--json"))
    assert result["proof"] == {"by": "file", "agree": 8, "of": 8, "near_ties": 0}
    written, loaded = load_file(out), LIBRARIES["shared"](8)
    loaded.load_state_dict(written)  # the last of the names is what the library keeps
    assert torch.equal(loaded.state_dict()[key], written[key]) and not torch.equal(written[key], state[key][:, :8])
    sums, counts = (written[f"vq.layers.2._codebook.{leaf}"] for leaf in ("embed_avg", "cluster_size"))
    torch.testing.assert_close(sums, written[key] * counts[..., None])
    assert codebook("verify", out, "--against", model).exit_code == 0


def test_codebooks_that_are_equal_by_chance_are_no_twins(tmp_path: Path) -> None:
    for rows, flag, count in ((torch.randn, 1.0, 1), (torch.randn, 0.0, 0), (torch.zeros, 1.0, 0)):
        codes = rows(1, 16, 4)
        state = {f"vq.layers.{i}._codebook.embed": codes.clone() for i in range(2)}
        flags = {f"vq.layers.{i}._codebook.initted": torch.tensor([flag]) for i in range(2)}
        save_file(state | flags, tmp_path / "model.safetensors")
        checkpoint = read_checkpoint(tmp_path / "model.safetensors")
        books = detected(checkpoint).codebooks
        assert len(twins(checkpoint, books[0], books)) == count, (rows, flag)


# --- EMA state by its numbers --------------------------------------------------------------------------------------
def write_codes(folder: Path, codes: Tensor | None = None, **beside: Tensor) -> tuple[object, ...]:
    """A refit to half as many codes, with other tensors in their module."""
    torch.manual_seed(2)
    codes = torch.randn(16, 4) if codes is None else codes
    model, latents = folder / "m.safetensors", folder / "z.npy"
    save_file({"vq.embedding": codes, **{f"vq.{name}": tensor for name, tensor in beside.items()}}, model)
    rows = codes[torch.randint(len(codes), (600,))].float()
    np.save(latents, (rows + 0.1 * torch.randn(rows.shape)).numpy())
    words = ("--latents", latents, "--codebook-key", "vq.embedding", "--metric", "euclidean", "--k", len(codes) // 2)
    return ("refit", model, *words, "-o", folder / "out.safetensors", "--json")


ROLES = [
    ("N", "z_avg", "plain"), ("cluster_size", "cluster_sum", "smoothed"), ("_ema_cluster_size", "_ema_w", "across"),
    ("code_count", "code_sum", "half"), *(("q7", "x_bar", kind) for kind in ("plain", "smoothed", "across", "half")),
]  # fmt: skip


@pytest.mark.parametrize(("counts", "sums", "kind"), ROLES)
def test_sums_and_counts_are_known_by_numbers(counts: str, sums: str, kind: str, tmp_path: Path, codebook: Run) -> None:
    torch.manual_seed(1)
    dtype = torch.float16 if kind == "half" else torch.float32
    codes, n = torch.randn(64, 8).to(dtype).float(), (torch.rand(64) * 60).to(dtype).float()
    divisors = (n + 1e-5) / (n.sum() + 64 * 1e-5) * n.sum() if kind == "smoothed" else n
    rows = codes * divisors[:, None]
    beside = {counts: n, sums: rows.T.contiguous() if kind == "across" else rows}
    words = write_codes(tmp_path, codes.to(dtype), **{name: tensor.to(dtype) for name, tensor in beside.items()})
    assert not any("stale" in warning for warning in succeeded(codebook(*words))["warnings"])
    new = {key: tensor.float() for key, tensor in load_file(tmp_path / "out.safetensors").items()}
    rows = new[f"vq.{sums}"].T if kind == "across" else new[f"vq.{sums}"]
    assert new[f"vq.{counts}"].sum() > 500
    torch.testing.assert_close(rows / new[f"vq.{counts}"][:, None], new["vq.embedding"], rtol=5e-3, atol=1e-3)
    assert codebook("verify", tmp_path / "out.safetensors", "--against", tmp_path / "m.safetensors").exit_code == 0


def test_a_tensor_of_unknown_role_is_refused_by_name_until_the_role_is_declared(tmp_path: Path, codebook: Run) -> None:
    words = write_codes(tmp_path, gizmo=torch.randn(16, 4), widget=torch.randn(16).abs() * 9)
    assert_refused(codebook(*words), "vq.gizmo")
    assert not (tmp_path / "out.safetensors").exists()
    expected = "expected KEY=ROLE"
    for role, message in (("gizmo=fine", expected), ("gizmo", expected), ("none=sums", "no such")):
        assert_refused(codebook(*words, "--companion", f"vq.{role}"), message)
    declared = (*words, "--companion", "vq.gizmo=sums")
    assert_refused(codebook(*declared), "--companion vq.widget=sums|counts|copy|flag|fresh")
    succeeded(codebook(*declared, "--companion", "vq.widget=counts"))
    new = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(new["vq.gizmo"], new["vq.embedding"] * new["vq.widget"][:, None])
    assert codebook("verify", tmp_path / "out.safetensors", "--against", tmp_path / "m.safetensors").exit_code == 0


def test_stale_sums_become_fresh_copies_stay_so_and_heads_over_codes_are_named(tmp_path: Path, codebook: Run) -> None:
    codes = torch.randn(16, 4)
    stale = {"ema_cluster_size": torch.full((16,), 7.0), "ema_w": torch.randn(16, 4)}
    words = write_codes(tmp_path, codes, mirror=codes.clone(), **stale)
    state = load_file(tmp_path / "m.safetensors") | {"policy.head.weight": torch.randn(16, 30)}
    save_file(state, tmp_path / "m.safetensors")
    warnings = " ".join(succeeded(codebook(*words))["warnings"])
    assert "vq.ema_w is stale" in warnings and "policy.head.weight may follow" in warnings
    new = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(new["vq.ema_w"], new["vq.embedding"] * new["vq.ema_cluster_size"][:, None])
    assert torch.equal(new["vq.mirror"], new["vq.embedding"])


# --- what stands beside a codebook ---------------------------------------------------------------------------------
def test_each_tensor_that_may_change_the_codes_stops_what_has_no_network(tmp_path: Path, codebook: Run) -> None:
    beside = {"blend.weight": torch.randn(4, 4), "boost": torch.tensor(3.0), "gains": torch.rand(4) + 2}
    words = write_codes(tmp_path, **beside)
    for number, key in enumerate(beside):
        refused = codebook(*words)
        remaining = ", ".join(f"vq.{name}" for name in [*beside][number:])
        assert_refused(refused, f"error: {remaining} may change the codes of vq.embedding")
        assert "--network" in refused.stderr and f"--as-stored vq.{key}" in refused.stderr
        assert not (tmp_path / "out.safetensors").exists()
        words = (*words, "--as-stored", f"vq.{key}")
    succeeded(codebook(*words))
    assert all(torch.equal(load_file(tmp_path / "out.safetensors")[f"vq.{key}"], beside[key]) for key in beside)
    # It is written into the result, so that what follows need not be told again.
    again = ("prune", tmp_path / "out.safetensors", *words[2:8], "--keep", 4, "-o", tmp_path / "again.safetensors")
    assert codebook(*again).exit_code == 0


def test_what_leaves_codes_as_they_are_stops_nothing(tmp_path: Path, codebook: Run) -> None:
    beside = {"identity.weight": torch.eye(4), "scale": torch.ones(4), "bias": torch.zeros(4),
              "decay": torch.tensor(0.99), "in_proj.weight": torch.randn(4, 4),
              "wide.weight": torch.randn(4, 9), "wide.bias": torch.randn(4)}  # fmt: skip
    succeeded(codebook(*write_codes(tmp_path, **beside)))


def by_module(name: str, result: Path, size: int, images: Tensor) -> tuple[float, int]:
    """Error and used codes by the module's own code alone."""
    module: Any = NETWORKS[name](size).eval().requires_grad_(False)
    module.load_state_dict(load_file(result))
    quantized, codes = module.quantize(module.encode(images))
    return float((module.decode(quantized).clamp(0, 1) - images).square().mean()), len(codes.unique())


@pytest.mark.parametrize("words", [("refit", "--k", 8, *TRAINED), ("prune", "--steps", 0), ("restart", "--steps", 0)])
def test_codes_behind_a_projection_are_read_and_written_as_the_module_has_them(
    words: tuple[Any, ...], run: Run, tmp_path: Path, images: Tensor
) -> None:
    result = succeeded(run(words[0], "projected", *words[1:]))
    proof, (mse, use) = result["proof"], kept_use(result)
    assert proof["by"] == "quantizer" and proof["of"] >= 4096 and proof["agree"] + proof["near_ties"] == proof["of"]
    assert by_module("projected", tmp_path / "out.safetensors", use["size"], images) == (mse, use["used"])
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("model", "out"))
    assert torch.equal(after["vq.blend"], before["vq.blend"])
    if words[0] == "prune":  # rows are moved, and lose none of their bits
        index_map = load_file(tmp_path / "out.index_map.safetensors")["vq.codebook.weight/index_map"]
        new, old = after["vq.codebook.weight"], before["vq.codebook.weight"]
        assert torch.equal(new[index_map[index_map >= 0]], old[index_map >= 0])


def test_codes_that_no_formula_gives_are_pruned_and_not_refitted(run: Run, tmp_path: Path, images: Tensor) -> None:
    assert_refused(run("refit", "warped", "--k", 8, "--steps", 0), "cannot be inverted")
    assert_refused(run("prune", "warped", "--steps", 2), "--codebook-update frozen, or --steps 0")
    mse, use = kept_use(succeeded(run("prune", "warped")))
    assert by_module("warped", tmp_path / "out.safetensors", use["size"], images) == (mse, use["used"])


def test_unit_codes_of_an_unknown_search_are_chosen_alike_by_both(run: Run, tmp_path: Path, images: Tensor) -> None:
    warnings = succeeded(run("refit", "round", "--k", 8, "--steps", 0))["warnings"]
    assert any("have unit length" in warning for warning in warnings)
    state, module = load_file(tmp_path / "out.safetensors"), NETWORKS["round"](8).requires_grad_(False)
    codes = state["vq.codebook.weight"]
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(8))
    module.load_state_dict(state)
    latents = module.encode(images).movedim(1, -1).flatten(0, -2)
    assert torch.equal(torch.cdist(latents, codes).argmin(1), (latents @ codes.T).argmax(1))


UNFIT = {
    "headed": "head.weight follows the number of codes, too",
    "fixed": "--network must be a function that makes as many codes as it is asked for",
    "swapped": "the network's quantize disagrees",
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_network_that_does_not_fit_the_surgery_is_refused_before_work(name: str, run: Run, tmp_path: Path) -> None:
    assert_refused(run("refit", name, "--k", 8, "--steps", 0), UNFIT[name])
    assert not (tmp_path / "out.safetensors").exists()
    if name != "swapped":  # as many codes as before need no other network
        assert run("restart", name, "--steps", 0).exit_code == 0


# --- the module's own training -------------------------------------------------------------------------------------
def test_written_state_survives_a_step_of_the_module_and_verify_tells(run: Run, tmp_path: Path, codebook: Run) -> None:
    succeeded(run("refit", "averaged", "--k", 8, "--steps", 0))
    state = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(state["vq.moment"].T, state["vq.codebook.weight"] * state["vq.mass"][:, None])
    network = ("--network", f"{tmp_path / 'network.py'}:make", "--data", tmp_path / "calibration.npy", *RANGE)
    words = ("verify", tmp_path / "out.safetensors", "--against", tmp_path / "model.safetensors", *network)
    result = succeeded(codebook(*words, "--json"))
    assert result["ok"] and result["proof"]["by"] == "quantizer"
    assert "own quantizer chooses the same" in codebook(*words).stdout
    any_file = succeeded(codebook("verify", tmp_path / "model.safetensors", *network, "--json"))
    assert any_file["proof"]["of"] >= 4096


def test_what_one_step_wipes_out_is_exit_code_3(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: Any = stored_codes.companion_values

    def zeroed(*arguments: object) -> dict[str, Tensor]:
        return {key: value * (0 if "moment" in key else 1) for key, value in whole(*arguments).items()}

    monkeypatch.setattr(stored_codes, "companion_values", zeroed)
    outcome = run("refit", "averaged", "--k", 8, "--steps", 0)
    assert outcome.exit_code == 3 and "one training step of the network undoes vq.codebook.weight" in outcome.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"calibration.npy", "held_out.npy", "model.safetensors", "network.py"}


def test_a_chain_says_how_its_result_was_proved(tmp_path: Path, codebook: Run) -> None:
    calibration, held_out = write_images(tmp_path)
    model, network = write_network(tmp_path, "averaged", 24)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("surgeries: [prune, {refit: {k: 6, steps: 0}}]\n")
    words = ("--network", network, "--data", calibration, "--test-data", held_out, *RANGE)
    result = succeeded(codebook("run", recipe, model, *words, "-o", tmp_path / "out.safetensors", "--json"))
    assert result["proof"]["by"] == "quantizer" and result["proof"]["of"] >= 4096


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "heads", "shared"])  # others: tests/contracts/test_families.py
def test_the_librarys_quantizers_choose_the_codes_reported(name: str, run: Run, tmp_path: Path, images: Tensor) -> None:
    result = succeeded(run("refit", f"library {name}", "--k", 8, *TRAINED))
    assert result["proof"]["by"] == "quantizer" and result["proof"]["agree"] > 0
    kept = result["stages"][result["kept"]]
    module: Any = LIBRARIES[name](8).eval().requires_grad_(False)
    module.load_state_dict(load_file(tmp_path / "out.safetensors"))
    latents = module.encode(images)
    if name == "images":
        quantized = module.vq(latents)[0]
    else:
        quantized = module.vq(latents.flatten(2).movedim(1, -1))[0].movedim(-1, 1).reshape(latents.shape)
    decoded = module.decode(quantized).clamp(0, 1)
    assert float((decoded - images).square().mean()) == pytest.approx(kept["mse"], rel=1e-5, abs=1e-6)
