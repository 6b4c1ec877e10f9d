"""What is reported is what the model's own code does with the file, or nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome, assert_refused
from proven_networks import LIBRARIES, NETWORKS, Tied, write_images, write_network
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.models import stored_codes
from codebook_tools.models.registry import detected
from codebook_tools.models.twins import twins

Run = Callable[..., Outcome]
RANGE = ("--input-range", "0,1")


@pytest.fixture
def run(tmp_path: Path, codebook: Run) -> Callable[..., Outcome]:
    """run("refit", "tied", "--k", 8): a command on a network of that name and its data, its output in tmp_path."""
    calibration, held_out = write_images(tmp_path)

    def go(command: str, name: str, *words: object, size: int = 24) -> Outcome:
        model, network = write_network(tmp_path, name, size)
        data = ("--data", calibration, "--test-data", held_out)
        output = ("-o", tmp_path / "out.safetensors") if command not in ("measure", "verify") else ()
        return codebook(command, model, "--network", network, *data, *RANGE, *output, "--json", *words)

    return go


def images_of(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path)).float()[:, None] / 255


# --- one tensor, several names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("command", [("refit", "--k", 8), ("prune",), ("grow", "--k", 20)])
def test_stages_that_share_a_codebook_keep_sharing_it(
    run: Callable[..., Outcome], tmp_path: Path, command: tuple[object, ...], steps: int
) -> None:
    found = run(command[0], "tied", *command[1:], "--steps", steps, "--batch-size", 16)
    assert found.exit_code == 0, found.stderr
    result = found.json
    (use,) = result["stages"][result["kept"]]["codebooks"]
    state = load_file(tmp_path / "out.safetensors")
    assert torch.equal(state["stages.0.weight"], state["stages.1.weight"])
    maps = load_file(tmp_path / "out.index_map.safetensors")
    assert {"stages.0.weight/index_map", "stages.1.weight/index_map", "stages.1.weight/nearest"} <= maps.keys()

    module = Tied(use["size"]).requires_grad_(False)
    module.load_state_dict(state)
    codes, chosen = module.stages[0].weight, list[Tensor]()  # type: ignore[index]

    def quantise(stage: int, latents: Tensor) -> Tensor:
        squared = (latents.movedim(1, -1)[..., None, :].double() - codes.double()).square().sum(-1)  # type: ignore[operator]
        chosen.append(squared.argmin(-1))
        return codes[chosen[-1]].movedim(-1, 1)  # type: ignore[index]

    images = images_of(tmp_path / "held_out.npy")
    decoded = module.decode(module.walk(module.encode(images), quantise)).clamp(0, 1)
    mse = float((decoded - images).square().mean())
    assert mse == pytest.approx(result["stages"][result["kept"]]["mse"], rel=1e-5, abs=1e-6)
    assert use["used"] == len(torch.stack(chosen).unique())
    assert use["latents"] == sum(codes.numel() for codes in chosen)
    assert any("are one codebook" in warning for warning in result["warnings"])


def test_the_codebook_of_a_shared_library_quantizer_is_written_under_every_name(tmp_path: Path, codebook: Run) -> None:
    state = {key: tensor.clone() for key, tensor in LIBRARIES["shared"](24).state_dict().items()}
    model, latents = tmp_path / "shared.safetensors", tmp_path / "z.npy"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, model)
    np.save(latents, np.random.default_rng(0).normal(size=(600, 6)).astype(np.float32))
    key = "vq.layers.0._codebook.embed"
    words = ("--latents", latents, "--codebook-key", key, "--metric", "euclidean", "--k", 8)
    found = codebook("refit", model, *words, "-o", tmp_path / "out.safetensors", "--json")
    assert found.exit_code == 0, found.stderr
    assert found.json["proof"] == {"by": "file", "agree": 8, "of": 8, "near_ties": 0}
    written = load_file(tmp_path / "out.safetensors")
    loaded = LIBRARIES["shared"](8)
    loaded.load_state_dict(written)  # the last of the names is what the library keeps
    assert torch.equal(loaded.state_dict()[key], written[key]) and not torch.equal(written[key], state[key][:, :8])
    sums, counts = (written[f"vq.layers.2._codebook.{leaf}"] for leaf in ("embed_avg", "cluster_size"))
    torch.testing.assert_close(sums, written[key] * counts[..., None])
    assert codebook("verify", tmp_path / "out.safetensors", "--against", model).exit_code == 0


def test_verify_finds_names_of_one_codebook_that_differ(
    run: Callable[..., Outcome], tmp_path: Path, codebook: Run
) -> None:
    assert run("refit", "tied", "--k", 8, "--steps", 0).exit_code == 0
    out = tmp_path / "out.safetensors"
    state = load_file(out)
    state["stages.1.weight"] = state["stages.1.weight"] + 1
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    save_file(state, out, metadata)
    alone = codebook("verify", out, "--against", tmp_path / "model.safetensors", "--json")
    assert alone.exit_code == 3 and any(
        "in the original they are equal" in one["what"] for one in alone.json["differences"]
    )
    network = ("--network", f"{tmp_path / 'network.py'}:make", "--data", tmp_path / "calibration.npy", *RANGE)
    asked = codebook("verify", out, *network, "--json")
    assert asked.exit_code == 3 and "one tensor in the network" in asked.json["differences"][0]["what"]


def test_equal_codebooks_are_no_twins_where_they_are_equal_by_chance(tmp_path: Path) -> None:
    drawn = torch.randn(16, 4)

    def found(rows: Tensor, flag: float) -> int:
        path = tmp_path / "model.safetensors"
        state = {f"vq.layers.{i}._codebook.embed": rows[None].clone() for i in range(2)}
        save_file(state | {f"vq.layers.{i}._codebook.initted": torch.tensor([flag]) for i in range(2)}, path)
        checkpoint = read_checkpoint(path)
        books = detected(checkpoint).codebooks
        return len(twins(checkpoint, books[0], books))

    assert found(drawn, 1.0) == 1
    assert found(drawn, 0.0) == 0 and found(torch.zeros(16, 4), 1.0) == 0


# --- EMA state by its numbers --------------------------------------------------------------------------------------

PAIRS = [
    ("ema_count", "ema_sum"), ("N", "z_avg"), ("ema_cluster_size", "ema_dw"), ("cluster_size", "cluster_sum"),
    ("code_count", "code_sum"), ("cluster_size", "embed_avg"), ("_ema_cluster_size", "_ema_w"), ("N_i_ts", "m_i_ts"),
    ("ema_count", "ema_weight"), ("running_size", "running_sum"), ("usage", "codebook_avg"), ("counts", "sums"),
    ("k_elem", "k_sum"), ("cluster_usage", "embed_ema"), ("ema_n", "ema_m"), ("hits", "totals"), ("q7", "x_bar"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "smoothed", "across", "half"])
@pytest.mark.parametrize(("counts", "sums"), PAIRS)
def test_sums_and_counts_are_known_by_their_numbers(
    counts: str, sums: str, kind: str, tmp_path: Path, codebook: Run
) -> None:
    torch.manual_seed(1)
    codes, n = torch.randn(64, 8), torch.rand(64) * 60
    if kind == "half":
        codes, n = codes.half().float(), n.half().float()
    divisors = (n + 1e-5) / (n.sum() + 64 * 1e-5) * n.sum() if kind == "smoothed" else n
    state = {"vq.embedding": codes, f"vq.{counts}": n, f"vq.{sums}": codes * divisors[:, None]}
    if kind == "across":
        state[f"vq.{sums}"] = state[f"vq.{sums}"].T
    model, latents = tmp_path / "m.safetensors", tmp_path / "z.npy"
    dtype = torch.float16 if kind == "half" else torch.float32
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in state.items()}, model)
    np.save(latents, (codes[torch.randint(64, (900,))] + 0.1 * torch.randn(900, 8)).numpy())
    out = tmp_path / "out.safetensors"
    words = ("--latents", latents, "--codebook-key", "vq.embedding", "--metric", "euclidean", "--k", 32)
    found = codebook("refit", model, *words, "-o", out, "--json")
    assert found.exit_code == 0, found.stderr
    assert not any("stale" in warning for warning in found.json["warnings"])
    new = {key: tensor.float() for key, tensor in load_file(out).items()}
    rows = new[f"vq.{sums}"].T if kind == "across" else new[f"vq.{sums}"]
    assert new[f"vq.{counts}"].sum() > 500
    torch.testing.assert_close(rows / new[f"vq.{counts}"][:, None], new["vq.embedding"], rtol=5e-3, atol=1e-3)
    assert codebook("verify", out, "--against", model).exit_code == 0


def write_codes(folder: Path, **beside: Tensor) -> tuple[object, ...]:
    """A refit of 16 codes of 4 dimensions, with other tensors in their module."""
    torch.manual_seed(2)
    model, latents = folder / "m.safetensors", folder / "z.npy"
    save_file({"vq.embedding": torch.randn(16, 4), **{f"vq.{name}": tensor for name, tensor in beside.items()}}, model)
    np.save(latents, torch.randn(400, 4).numpy())
    words = ("--latents", latents, "--codebook-key", "vq.embedding", "--metric", "euclidean", "--k", 8)
    return ("refit", model, *words, "-o", folder / "out.safetensors", "--json")


def test_what_neither_numbers_nor_names_tell_is_refused_by_name_until_it_is_told(tmp_path: Path, codebook: Run) -> None:
    words = write_codes(tmp_path, gizmo=torch.randn(16, 4), widget=torch.randn(16).abs() * 9)
    assert_refused(codebook(*words), "vq.gizmo")
    assert not (tmp_path / "out.safetensors").exists()
    told = (*words, "--companion", "vq.gizmo=sums")
    assert_refused(codebook(*told), "--companion vq.widget=sums|counts|copy|flag|fresh")
    assert codebook(*told, "--companion", "vq.widget=counts").exit_code == 0
    new = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(new["vq.gizmo"], new["vq.embedding"] * new["vq.widget"][:, None])
    assert codebook("verify", tmp_path / "out.safetensors", "--against", tmp_path / "m.safetensors").exit_code == 0


@pytest.mark.parametrize(
    ("said", "message"),
    [("vq.gizmo=fine", "expected KEY=ROLE"), ("vq.gizmo", "expected KEY=ROLE"), ("vq.none=sums", "no such tensor")],
)
def test_a_role_that_is_none_is_refused(said: str, message: str, tmp_path: Path, codebook: Run) -> None:
    words = write_codes(tmp_path, gizmo=torch.randn(16, 4))
    assert_refused(codebook(*words, "--companion", said), message)


def test_state_under_a_known_name_that_is_not_of_the_codes_is_called_stale_and_written_fresh(
    tmp_path: Path, codebook: Run
) -> None:
    words = write_codes(tmp_path, ema_cluster_size=torch.full((16,), 7.0), ema_w=torch.randn(16, 4))
    found = codebook(*words)
    assert found.exit_code == 0 and any("vq.ema_w is stale" in warning for warning in found.json["warnings"])
    new = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(new["vq.ema_w"], new["vq.embedding"] * new["vq.ema_cluster_size"][:, None])


def test_a_copy_of_the_codes_under_any_name_stays_one(tmp_path: Path, codebook: Run) -> None:
    torch.manual_seed(2)
    codes = torch.randn(16, 4)
    assert codebook(*write_codes(tmp_path, mirror=codes)).exit_code == 0
    new = load_file(tmp_path / "out.safetensors")
    assert torch.equal(new["vq.mirror"], new["vq.embedding"])


# --- what stands beside a codebook ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "beside",
    [
        {"blend.weight": torch.randn(4, 4)},
        {"out_proj.0.weight": torch.randn(4, 4)},
        {"gains": torch.rand(4) + 2},
        {"offset": torch.rand(1, 4) + 2},
        {"boost": torch.tensor(3.0)},
    ],
)
def test_a_tensor_that_may_change_the_codes_stops_what_has_no_network(
    beside: dict[str, Tensor], tmp_path: Path, codebook: Run
) -> None:
    words, (key,) = write_codes(tmp_path, **beside), beside
    found = codebook(*words)
    assert_refused(found, f"vq.{key} may change the codes of vq.embedding")
    assert "--network" in found.stderr and f"--as-stored vq.{key}" in found.stderr
    assert not (tmp_path / "out.safetensors").exists()
    assert codebook(*words, "--as-stored", f"vq.{key}").exit_code == 0
    state = load_file(tmp_path / "out.safetensors")
    assert torch.equal(state[f"vq.{key}"], beside[key])
    # It is written into the result, so that what follows need not be told again.
    again = ("prune", tmp_path / "out.safetensors", *words[2:8], "--keep", 4, "-o", tmp_path / "again.safetensors")
    assert codebook(*again).exit_code == 0


@pytest.mark.parametrize(
    "beside",
    [
        {"identity.weight": torch.eye(4)},
        {"scale": torch.ones(4)},
        {"bias": torch.zeros(4)},
        {"decay": torch.tensor(0.99)},
        {"in_proj.weight": torch.randn(4, 4)},
        {"wide.weight": torch.randn(4, 9), "wide.bias": torch.randn(4)},
    ],
)
def test_what_leaves_codes_as_they_are_stops_nothing(beside: dict[str, Tensor], tmp_path: Path, codebook: Run) -> None:
    assert codebook(*write_codes(tmp_path, **beside)).exit_code == 0


def reconstructed(name: str, state: dict[str, Tensor], size: int, images: Tensor) -> tuple[float, int]:
    """Error and used codes by the module's own code alone."""
    module = NETWORKS[name](size).eval().requires_grad_(False)
    module.load_state_dict(state)
    quantized, codes = module.quantize(module.encode(images))  # type: ignore[operator]
    decoded = module.decode(quantized).clamp(0, 1)  # type: ignore[operator]
    return float((decoded - images).square().mean()), len(codes.unique())


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("command", [("refit", "--k", 8), ("prune",), ("quantize", "--k", 6), ("restart",)])
def test_codes_behind_a_projection_are_read_and_written_as_the_module_has_them(
    run: Callable[..., Outcome], tmp_path: Path, command: tuple[object, ...], steps: int
) -> None:
    found = run(command[0], "projected", *command[1:], "--steps", steps, "--batch-size", 16)
    assert found.exit_code == 0, found.stderr
    result = found.json
    proof = result["proof"]
    assert proof["by"] == "quantizer" and proof["of"] >= 4096 and proof["agree"] + proof["near_ties"] == proof["of"]
    kept = result["stages"][result["kept"]]
    (use,) = kept["codebooks"]
    state = load_file(tmp_path / "out.safetensors")
    mse, used = reconstructed("projected", state, use["size"], images_of(tmp_path / "held_out.npy"))
    assert mse == pytest.approx(kept["mse"], rel=1e-5, abs=1e-6) and used == use["used"]
    assert torch.equal(state["vq.blend"], load_file(tmp_path / "model.safetensors")["vq.blend"])


def test_pruning_behind_a_projection_moves_rows_and_loses_none_of_their_bits(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert run("prune", "projected", "--steps", 0).exit_code == 0
    before, after = (
        load_file(tmp_path / name)["vq.codebook.weight"] for name in ("model.safetensors", "out.safetensors")
    )
    index_map = load_file(tmp_path / "out.index_map.safetensors")["vq.codebook.weight/index_map"]
    assert torch.equal(after[index_map[index_map >= 0]], before[index_map >= 0])


def test_codes_that_no_formula_gives_are_pruned_and_not_refitted(run: Callable[..., Outcome], tmp_path: Path) -> None:
    refused = run("refit", "warped", "--k", 8, "--steps", 0)
    assert_refused(refused, "cannot be inverted")
    assert_refused(run("prune", "warped", "--steps", 2), "--codebook-update frozen, or --steps 0")
    pruned = run("prune", "warped")
    assert pruned.exit_code == 0, pruned.stderr
    (use,) = pruned.json["stages"]["surgery"]["codebooks"]
    state = load_file(tmp_path / "out.safetensors")
    mse, used = reconstructed("warped", state, use["size"], images_of(tmp_path / "held_out.npy"))
    assert mse == pytest.approx(pruned.json["stages"]["surgery"]["mse"], rel=1e-5, abs=1e-6) and used == use["used"]


def test_unit_codes_of_an_unknown_search_are_written_so_that_both_searches_choose_the_same(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    found = run("refit", "round", "--k", 8, "--steps", 0)
    assert found.exit_code == 0, found.stderr
    assert any("have unit length" in warning for warning in found.json["warnings"])
    state = load_file(tmp_path / "out.safetensors")
    codes = state["vq.codebook.weight"]
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(8))
    module = NETWORKS["round"](8).requires_grad_(False)
    module.load_state_dict(state)
    latents = module.encode(images_of(tmp_path / "held_out.npy")).movedim(1, -1).flatten(0, -2)  # type: ignore[operator]
    assert torch.equal(torch.cdist(latents, codes).argmin(1), (latents @ codes.T).argmax(1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("headed", "head.weight follows the number of codes, too"),
        ("fixed", "--network must be a function that makes as many codes as it is asked for"),
    ],
)
def test_a_network_that_cannot_take_the_new_number_of_codes_is_refused_before_any_work(
    name: str, message: str, run: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert_refused(run("refit", name, "--k", 8, "--steps", 0), message)
    assert not (tmp_path / "out.safetensors").exists()
    # As many codes as before need no other network.
    assert run("restart", name, "--steps", 0).exit_code == 0


def test_a_search_that_is_not_ours_is_refused_before_any_work(run: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_refused(run("refit", "swapped", "--k", 8, "--steps", 0), "the network's quantize disagrees")
    assert not (tmp_path / "out.safetensors").exists()


# --- the module's own training -------------------------------------------------------------------------------------


def test_the_state_that_is_written_survives_a_step_of_the_module(run: Callable[..., Outcome], tmp_path: Path) -> None:
    found = run("refit", "averaged", "--k", 8, "--steps", 0)
    assert found.exit_code == 0, found.stderr
    state = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(state["vq.moment"].T, state["vq.codebook.weight"] * state["vq.mass"][:, None])


def test_a_result_that_one_step_wipes_out_is_exit_code_3_and_not_left_behind(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stored_codes.companion_values

    def zeroed(*given: object) -> dict[str, Tensor]:
        return {key: value * (0 if "moment" in key else 1) for key, value in whole(*given).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(stored_codes, "companion_values", zeroed)
    found = run("refit", "averaged", "--k", 8, "--steps", 0)
    assert found.exit_code == 3 and "one training step of the network undoes vq.codebook.weight" in found.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"calibration.npy", "held_out.npy", "model.safetensors", "network.py"}


def test_verify_with_a_network_says_what_its_quantizer_chose(
    run: Callable[..., Outcome], tmp_path: Path, codebook: Run
) -> None:
    assert run("refit", "averaged", "--k", 8, "--steps", 0).exit_code == 0
    network = ("--network", f"{tmp_path / 'network.py'}:make", "--data", tmp_path / "calibration.npy", *RANGE)
    words = ("verify", tmp_path / "out.safetensors", "--against", tmp_path / "model.safetensors", *network)
    found = codebook(*words, "--json")
    assert found.exit_code == 0 and found.json["ok"] and found.json["proof"]["by"] == "quantizer"
    assert "own quantizer chooses the same" in codebook(*words).stdout
    any_file = codebook("verify", tmp_path / "model.safetensors", *network, "--json")
    assert any_file.exit_code == 0 and any_file.json["proof"]["of"] >= 4096


def test_a_chain_says_how_its_result_was_proved(tmp_path: Path, codebook: Run) -> None:
    calibration, held_out = write_images(tmp_path)
    model, network = write_network(tmp_path, "averaged", 24)
    data = ("--data", calibration, "--test-data", held_out, *RANGE)
    output = ("-o", tmp_path / "out.safetensors", "--json")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("surgeries: [prune, {refit: {k: 6, steps: 0}}]\n")
    found = codebook("run", recipe, model, "--network", network, *data, *output)
    assert found.exit_code == 0, found.stderr
    assert found.json["proof"]["by"] == "quantizer" and found.json["proof"]["of"] >= 4096


# --- the library's own quantizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("refit", "--k", 8, "--steps", 0), ("prune", "--steps", 3, "--batch-size", 16)])
@pytest.mark.parametrize("name", LIBRARIES)
def test_quantizers_of_the_library_choose_the_codes_that_are_reported(
    name: str, command: tuple[object, ...], run: Callable[..., Outcome], tmp_path: Path
) -> None:
    found = run(command[0], f"library {name}", *command[1:])
    assert found.exit_code == 0, found.stderr
    result = found.json
    assert result["proof"]["by"] == "quantizer" and result["proof"]["agree"] > 0
    kept = result["stages"][result["kept"]]
    size = kept["codebooks"][0]["size"]
    module = LIBRARIES[name](size).eval().requires_grad_(False)
    module.load_state_dict(load_file(tmp_path / "out.safetensors"))
    images = images_of(tmp_path / "held_out.npy")
    latents = module.encode(images)  # type: ignore[operator]
    as_images = name == "images"
    given = latents if as_images else latents.flatten(2).movedim(1, -1)
    quantized = module.vq(given)[0]  # type: ignore[operator]
    quantized = quantized if as_images else quantized.movedim(-1, 1).reshape(latents.shape)
    decoded = module.decode(quantized).clamp(0, 1)  # type: ignore[operator]
    mse = float((decoded - images).square().mean())
    assert mse == pytest.approx(kept["mse"], rel=1e-5, abs=1e-6)


# --- what else follows K -------------------------------------------------------------------------------------------


def test_a_head_over_the_codes_is_named_where_their_number_changes(tmp_path: Path, codebook: Run) -> None:
    words = write_codes(tmp_path)
    state = load_file(tmp_path / "m.safetensors") | {"policy.head.weight": torch.randn(16, 30)}
    save_file(state, tmp_path / "m.safetensors")
    found = codebook(*words)
    assert found.exit_code == 0 and any("policy.head.weight may follow" in one for one in found.json["warnings"])
