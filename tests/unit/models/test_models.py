"""Networks, their codebooks and what must follow them: against independent code, and against numbers worked by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GREY, Grey, State
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from tutorial import Tutorial

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.checkpoints.write import tensor_bytes
from codebook_tools.clustering.metric import COSINE_UNIT
from codebook_tools.codebook import Codebook
from codebook_tools.data.images import probe
from codebook_tools.errors import CodebookError
from codebook_tools.models.choose import choose_codebook
from codebook_tools.models.ema_state import companion_values, companions_of, flags, laid_out
from codebook_tools.models.families.zalando import CODEBOOK, prefix_of
from codebook_tools.models.load import family_of, load_model
from codebook_tools.models.model import Model
from codebook_tools.models.networks import zalando
from codebook_tools.models.stored_codes import stored_rows
from codebook_tools.models.user_network import make_network

WriteModel = Callable[..., Path]
VARIANTS = ("plain", "ema", "weight_norm_older", "weight_norm_newer", "module_prefix", "tied", "extra")


# --- the zalando network -------------------------------------------------------------------------------------------


def load(path: Path) -> Model:
    return load_model(read_checkpoint(path))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_zalando_network_computes_what_the_tutorial_computes(
    variant: str, write_model: WriteModel, variants: dict[str, State], image_tensor: Tensor
) -> None:
    model, theirs = load(write_model(variant)), Tutorial(variants[variant])
    latents = model.encode(image_tensor)
    assert latents.shape == (60, 4, 4, 4) and latents.dtype == torch.float32
    torch.testing.assert_close(latents.double(), theirs.encode(image_tensor * 2 - 1), rtol=1e-5, atol=1e-6)
    shown = model.run(image_tensor, lambda stage, found: found)
    torch.testing.assert_close(shown.double(), (theirs.decode(latents) + 1) / 2, rtol=1e-5, atol=1e-6)


def test_the_encoder_leaves_its_input_as_it_was(tiny: Path, image_tensor: Tensor) -> None:
    model, given_images = load(tiny), image_tensor.clone()
    met = []
    model.run(given_images, lambda stage, found: met.append((found, found.clone())) or found)
    ((latents, before),) = met
    assert torch.equal(given_images, image_tensor) and torch.equal(latents, before)


def test_a_fresh_network_has_the_tutorials_sizes_and_initial_codes() -> None:
    state = zalando.make().state_dict()
    assert state[CODEBOOK].shape == (512, 64) and state["_encoder._conv_3.weight"].shape == (128, 128, 3, 3)
    assert state["_decoder._residual_stack._layers.1._block.1.weight"].shape == (32, 128, 3, 3)
    assert 0.99 / 512 < state[CODEBOOK].abs().max() <= 1 / 512


def test_a_layout_is_recognized_by_its_shapes_whatever_prefix_its_names_have(
    variants: dict[str, State], write_model: WriteModel
) -> None:
    shapes = {name: {key: tuple(t.shape) for key, t in state.items()} for name, state in variants.items()}
    prefixes = {name: prefix_of(shape) for name, shape in shapes.items()}
    assert prefixes == dict.fromkeys(variants, "") | {"module_prefix": "module."}
    assert prefix_of({CODEBOOK: (16, 4)}) is None
    assert family_of(read_checkpoint(write_model())) == "zalando"
    other = write_model(state=variants["plain"] | {"_encoder._conv_3.weight": torch.zeros(8, 8, 5, 5)})
    assert family_of(read_checkpoint(other)) is None


def test_the_network_knows_its_stride_and_channels(tiny: Path, write_model: WriteModel) -> None:
    model = load(tiny)
    for side in (4, 6, 11, 16, 30, 33, 64):
        assert probe(model.encode, side, side) == (3, 4), side
    grey = {name: tensor.detach() for name, tensor in zalando.make(16, 1, 8, 4, 1, 4).state_dict().items()}
    model = load(write_model(state=grey))
    assert probe(model.encode, 28, 30) == (1, 4)


# --- what flows through a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 255.0)])
def test_images_are_mapped_into_the_input_range_and_back(line: Callable[..., Model], low: float, high: float) -> None:
    model, images = line([0.0, 1.0]), torch.tensor([0.0, 0.25, 1.0]).reshape(1, 1, 1, 3)
    model.input_range = low, high
    latents = model.encode(images)
    expected = torch.tensor([low, low + 0.25 * (high - low), high])
    torch.testing.assert_close(latents[0, 0, 0], expected)
    assert not latents[0, 1].any()
    torch.testing.assert_close(model.run(images, lambda stage, found: found), images)


def test_codes_and_what_the_decoder_gets_keep_the_grid(line: Callable[..., Model]) -> None:
    model = line([0.0, 0.5, 1.0])
    latents = model.encode(torch.tensor([[0.1, 0.6, 0.9], [0.2, 0.7, 0.8]]).reshape(1, 1, 2, 3))
    codes = model.assign(latents)
    assert codes.tolist() == [[[0, 1, 2], [0, 1, 2]]]
    embedded = model.embed(codes)
    assert embedded.shape == (1, 2, 2, 3)
    assert embedded[0, 0].tolist() == [[0, 0.5, 1], [0, 0.5, 1]] and not embedded[0, 1].any()


def test_unit_codes_are_emitted_at_length_one_in_training_too(grey: Callable[..., Grey]) -> None:
    made = grey([0.5, -3.0])
    model = load_model(read_checkpoint(made.path), network=made.network, metric="cosine-unit")
    assert model.books[0].metric == COSINE_UNIT
    codes = torch.tensor([[[0, 1]]])
    for embed in (model.embed, model.embed_trained):
        assert embed(codes)[0, 0, 0].tolist() == [1.0, -1.0]


def test_gradients_reach_the_codes_that_are_looked_up(line: Callable[..., Model]) -> None:
    model = line([0.0, 0.5, 1.0])
    vectors = model.books[0].vectors.requires_grad_(True)
    model.embed_trained(torch.tensor([[[0, 2, 2]]])).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.tolist() == [[1, 1], [0, 0], [2, 2]]


# --- installation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 40])
def test_a_codebook_of_any_size_is_installed_bit_by_bit(tiny: Path, image_tensor: Tensor, size: int) -> None:
    model = load(tiny)
    meant = Codebook(torch.randn(size, 4, generator=torch.Generator().manual_seed(size)))
    model.install(meant)
    assert torch.equal(model.books[0].vectors, meant.vectors) and model.books[0].stored.size == 16
    latents = model.encode(image_tensor)
    distances = torch.cdist(latents.movedim(1, -1).flatten(0, -2).double(), meant.vectors.double())
    assert torch.equal(model.assign(latents).flatten(), distances.argmin(1))


@pytest.mark.parametrize("variant", ["float16", "bfloat16"])
def test_codes_are_rounded_to_the_stored_dtype_before_they_are_used(write_model: WriteModel, variant: str) -> None:
    model, codes = load(write_model(variant)), torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    model.install(Codebook(codes))
    assert torch.equal(model.books[0].vectors, codes.to(getattr(torch, variant)).float())
    assert not torch.equal(model.books[0].vectors, codes)


def test_codes_that_the_stored_dtype_cannot_hold_are_refused(write_model: WriteModel) -> None:
    with pytest.raises(CodebookError, match=r"do not fit torch\.float16"):
        load(write_model("float16")).install(Codebook(torch.full((2, 4), 1e5)))


@pytest.mark.parametrize("size", [1, 5])
def test_what_the_network_itself_holds_of_a_codebook_is_never_looked_up(line: Callable[..., Model], size: int) -> None:
    model = line([0.0, 1.0])
    model.network.get_parameter("quantizer.codebook.weight").data.fill_(torch.nan)
    model.install(Codebook(torch.tensor([[0.25, 0.0]] * size)))
    found = model.pass_through(torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2))
    assert found.media.flatten().tolist() == [0.25, 0.25] and not found.codes[0].any()
    assert list(model.changed({0: torch.ones(size)}, {0: torch.tensor([0, -1])})) == ["quantizer.codebook.weight"]


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), others=st.lists(st.integers(1, 3), min_size=1, max_size=2), axis=st.integers(0, 2))
def test_rows_can_be_laid_out_as_they_were_stored(rows: int, others: list[int], axis: int) -> None:
    axis = min(axis, len(others))
    shape = [*others[:axis], rows, *others[axis:]]
    stored = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    found = FoundCodebook("k", rows, stored.numel() // rows, axis, 1, "F32", "euclidean", (), "high")
    codes = stored_rows(stored, found)
    assert codes.shape == (rows, stored.numel() // rows)
    assert torch.equal(codes[0].flatten(), stored.select(axis, 0).flatten())
    assert torch.equal(laid_out(codes, stored, axis), stored)
    assert laid_out(codes[:1], stored, axis).shape == torch.Size([*others[:axis], 1, *others[axis:]])


# --- what follows a codebook ---------------------------------------------------------------------------------------

CODES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
COUNTS = torch.tensor([3, 1])
SUMS = [[3.0, 6.0, 9.0], [4.0, 5.0, 6.0]]


def new_values(found: FoundCodebook, stored: State, codes: Tensor = CODES, counts: Tensor = COUNTS) -> State:
    """What follows a codebook whose numbers say nothing of its companions."""
    old = torch.arange(1.0, found.size * found.dim + 1).reshape(found.size, found.dim)
    return companion_values(found, companions_of(found, old, stored, {}), stored, codes, counts)


@pytest.mark.parametrize(
    ("key", "old", "meant"),
    [
        ("_ema_w", torch.ones(5, 3), SUMS),
        ("embed_avg", torch.ones(5, 3), SUMS),
        ("k_sum", torch.ones(5, 3), SUMS),
        ("m_i_ts", torch.ones(5, 3), SUMS),
        ("_ema_cluster_size", torch.ones(5), [3, 1]),
        ("cluster_usage", torch.ones(5), [3, 1]),
        ("k_elem", torch.ones(5), [3, 1]),
        ("cluster_size", torch.ones(1, 5), [[3, 1]]),
        ("N_i_ts", torch.ones(5, dtype=torch.int64), [3, 1]),
        ("embed_prob", torch.ones(5), [0.75, 0.25]),
        ("ema_embed_shadow", torch.ones(5, 3), SUMS),
        ("weight_shadow", torch.ones(5, 3), CODES.tolist()),
        ("vocab_hit", torch.ones(2, 5), [[3, 1], [3, 1]]),
    ],
)
def test_a_companion_is_what_its_name_says_for_the_new_codes(key: str, old: Tensor, meant: list[float]) -> None:
    found = FoundCodebook("q.codes", 5, 3, 0, 1, "F32", "euclidean", (f"q.{key}",), "high")
    value = new_values(found, {f"q.{key}": old}, CODES, COUNTS)[f"q.{key}"]
    assert value.tolist() == meant and value.dtype == old.dtype


def test_a_companion_lies_as_its_codebook_does_also_where_the_new_size_is_the_dimension() -> None:
    found = FoundCodebook("q.embed", 5, 3, 1, 1, "F32", "euclidean", ("q.embed_avg",), "high")
    assert new_values(found, {"q.embed_avg": torch.ones(3, 5)})["q.embed_avg"].tolist() == torch.tensor(SUMS).T.tolist()
    square = FoundCodebook("q.embed", 5, 2, 0, 1, "F32", "euclidean", ("q.embed_avg",), "high")
    value = new_values(square, {"q.embed_avg": torch.ones(5, 2)}, CODES[:, :2])["q.embed_avg"]
    assert value.tolist() == [[3, 6], [4, 5]]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("initted", dtype) for dtype in (torch.bool, torch.float32, torch.uint8)),
        *((name, torch.float32) for name in ("inited", "is_initialized", "data_initialized", "_init", "initialised")),
    ],
)
def test_flags_beside_a_codebook_say_that_it_is_initialised(name: str, dtype: torch.dtype) -> None:
    found = FoundCodebook("q.embed", 5, 3, 0, 1, "F32", "euclidean", (), "high")
    stored = {
        f"q.{name}": torch.zeros(1, dtype=dtype),
        "other.initted": torch.zeros(1),
        "q.initial_value": torch.ones(1),
    }
    assert flags("q.embed", stored) == [f"q.{name}"]
    value = new_values(found, stored, CODES, COUNTS)
    assert list(value) == [f"q.{name}"] and torch.equal(value[f"q.{name}"], torch.ones(1, dtype=dtype))


def test_companions_in_half_precision_hold_the_counts_of_any_data_set() -> None:
    found = FoundCodebook("q.embed", 5, 3, 0, 1, "F16", "euclidean", ("q.cluster_size", "q.embed_avg"), "high")
    old = {"q.cluster_size": torch.ones(5).half(), "q.embed_avg": torch.ones(5, 3).half()}
    value = new_values(found, old, CODES, torch.tensor([1_000_000, 2_000]))
    sizes, sums = value["q.cluster_size"].float(), value["q.embed_avg"].float()
    assert torch.isfinite(sums).all() and sizes[0] > 1000
    torch.testing.assert_close(sums / sizes[:, None], CODES.half().float(), rtol=0, atol=0)
    torch.testing.assert_close(sizes[0] / sizes[1], torch.tensor(512.0), rtol=0, atol=0)  # the power of two next to 500


@pytest.mark.parametrize("command", [["refit", "--k", 6, "--steps", 0], ["finetune", "--steps", 4, "--batch-size", 8]])
def test_the_models_own_training_goes_on_from_the_written_codes(
    command: list[object], write_model: WriteModel, codebook: Callable[..., object], images_folder: Path, tmp_path: Path
) -> None:
    """One step of VectorQuantizerEMA without data, as the zalando tutorial writes it."""
    output = tmp_path / "out.safetensors"
    codebook(*command, write_model("ema"), "--data", images_folder, "-o", output)
    state = load_file(output)
    counts = state["_vq_vae._ema_cluster_size"] * 0.99
    counts = (counts + 1e-5) / (counts.sum() + len(counts) * 1e-5) * counts.sum()
    moved = state["_vq_vae._ema_w"] * 0.99 / counts[:, None]
    torch.testing.assert_close(moved, state[CODEBOOK], rtol=1e-3, atol=1e-5)


# --- from a file to a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["tied", "plain"])
def test_layers_with_the_same_bytes_become_one_and_others_do_not(variant: str, write_model: WriteModel) -> None:
    network = load(write_model(variant)).network
    first, second = (network.get_submodule(f"_encoder._residual_stack._layers.{i}._block.1") for i in range(2))
    assert (first.weight is second.weight) == (variant == "tied")


def test_fresh_layers_that_are_alike_are_not_tied(grey: Callable[..., Grey]) -> None:
    fresh = {"weight": torch.ones(2), "bias": torch.zeros(2)}
    made = grey([0.0, 1.0], more={f"norms.{i}.{n}": t.clone() for i in range(2) for n, t in fresh.items()})
    norms = "self.norms = nn.ModuleList([nn.GroupNorm(1, 2), nn.GroupNorm(1, 2)])"
    Path(made.network.removesuffix(":make")).write_text(GREY.replace("self.quantizer =", f"{norms}; self.quantizer ="))
    network = load_model(read_checkpoint(made.path), network=made.network).network
    first, second = (network.get_submodule(f"norms.{i}") for i in range(2))
    assert first.weight is not second.weight and first.bias is not second.bias


def test_tensors_that_the_network_does_not_have_are_listed_and_companions_are_not(
    write_model: WriteModel, variants: dict[str, State]
) -> None:
    assert set(load(write_model("extra")).carried) == {"teacher.head.weight", "step"}
    mask = torch.full((3, 3), -torch.inf)  # which a tensor that no network has may hold
    assert load(write_model(state=variants["ema"] | {"attention.mask": mask})).carried == ("attention.mask",)


def test_only_the_codebook_differs_in_a_file_wider_than_the_network_runs(write_model: WriteModel) -> None:
    model = load(write_model("float64"))
    model.install(Codebook(model.books[0].vectors[:3]))
    kept = torch.arange(16).where(torch.arange(16) < 3, -1)
    changed = model.changed({0: torch.ones(3)}, {0: kept})
    assert list(changed) == [CODEBOOK]
    assert torch.equal(changed[CODEBOOK], model.checkpoint.tensor(CODEBOOK)[:3])  # with digits that float32 has not
    assert not torch.equal(changed[CODEBOOK], changed[CODEBOOK].float().double())


def test_weights_go_back_to_the_file_as_they_came(write_model: WriteModel, variants: dict[str, State]) -> None:
    for variant in variants:
        model = load(write_model(variant))
        same = model.changed({0: torch.ones(16)}, {0: torch.arange(16)})
        key = model.books[0].stored.key
        assert tensor_bytes(same[key]) == tensor_bytes(variants[variant][key])
        assert set(same) == {key, *model.books[0].stored.companions}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_decoder._conv_1.bias": torch.full((8,), torch.nan)}, r"_decoder\._conv_1\.bias in .* nan at \[0\]"),
        ({CODEBOOK: torch.tensor([[1.0, 2.0, -torch.inf, 4.0]] * 16)}, r"_embedding\.weight in .* -inf at \[0, 2\]"),
    ],
)
def test_a_checkpoint_that_cannot_be_worked_on_is_refused_with_its_tensor(
    changes: State, message: str, write_model: WriteModel, variants: dict[str, State]
) -> None:
    with pytest.raises(CodebookError, match=message):
        load(write_model(state=variants["plain"] | changes))


def test_a_codebook_is_chosen_by_its_key_which_must_name_a_matrix_of_the_file(
    write_model: WriteModel, variants: dict[str, State]
) -> None:
    state = variants["plain"] | {"quantize_b.embedding.weight": torch.rand(12, 4)}
    checkpoint = read_checkpoint(write_model(state=state))
    assert choose_codebook(checkpoint, ["quantize_b.embedding.weight"]).size == 12
    assert load_model(checkpoint, codebook_keys=[CODEBOOK]).books[0].stored.size == 16
    with pytest.raises(CodebookError, match=r"the network has no quantize_b"):
        load_model(checkpoint, codebook_keys=["quantize_b.embedding.weight"])
    with pytest.raises(CodebookError, match=rf"no such tensor .* candidates: {re.escape(CODEBOOK)}"):
        choose_codebook(checkpoint, ["nowhere.weight"])
    with pytest.raises(CodebookError, match="is no matrix of codes"):
        choose_codebook(checkpoint, ["_encoder._conv_1.bias"])


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("vqgan", "no family 'vqgan'; there are zalando"),
        ("zalando", "layout"),
        (None, r"no network is known .*quantizer\.codebook\.weight, 2x2.*--network"),
    ],
)
def test_a_family_that_is_unknown_or_does_not_fit_is_refused(
    family: str | None, message: str, grey: Callable[..., Grey]
) -> None:
    with pytest.raises(CodebookError, match=message):
        load_model(read_checkpoint(grey([0.0, 1.0]).path), family=family)


# --- the user's own network ----------------------------------------------------------------------------------------

NETWORKS = {
    "import sys; x = (": "cannot be imported: SyntaxError",
    "raise OSError('no weights here')": "cannot be imported: OSError: no weights here",
    "def make(size): ...": r"failed: TypeError: .*codebook_size",
    "def make(codebook_size): return {}": "returned dict without encode and decode",
    f"{GREY}\n    pass\nclass Half(Grey):\n    decode = None\nmake = Half": "returned Half without decode",
    f"{GREY}\ndef make(codebook_size): return Grey(9)": r"shapes differ: .*codebook\.weight is \(2, 2\).*\(9, 2\)",
}


@pytest.mark.parametrize("source", NETWORKS)
def test_a_network_file_that_does_not_do_is_refused_with_the_reason(
    source: str, grey: Callable[..., Grey], tmp_path: Path
) -> None:
    path = grey([0.0, 1.0]).path
    (tmp_path / "own.py").write_text(source)
    with pytest.raises(CodebookError, match=NETWORKS[source]):
        load_model(read_checkpoint(path), network=f"{tmp_path / 'own.py'}:make")


@pytest.mark.parametrize(
    ("spec", "message"),
    [("{}/gone.py:make", "no such network file"), ("{}/own.txt:make", "no Python"), ("own.py", "FILE")],
)
def test_a_network_must_be_given_as_file_and_function(spec: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.txt").touch()
    with pytest.raises(CodebookError, match=message):
        make_network(spec.format(tmp_path), 2)


def test_a_network_file_may_import_its_neighbors_and_define_dataclasses(tmp_path: Path) -> None:
    (tmp_path / "neighbor_of_network.py").write_text(GREY)
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from neighbor_of_network import Grey\n"
        "@dataclass\nclass Config:\n    size: int\n"
        "def make(codebook_size: int) -> Grey:\n    return Grey(Config(codebook_size).size)\n"
    )
    assert type(make_network(f"{tmp_path / 'own.py'}:make", 7)).__name__ == "Grey"


RETURNS = {
    "return None": "encode returns a NoneType",
    "return self.encoder(images).mean((2, 3))": r"encode returns \(1, 2\); expected \(n, 2, ...\)",
    "raise ValueError('odd')": "encodes neither RGB images .* nor gray ones .*ValueError: odd",
}


@pytest.mark.parametrize("body", RETURNS)
def test_an_encoder_that_returns_something_else_is_refused_with_what_it_returned(
    body: str, grey: Callable[..., Grey], tmp_path: Path
) -> None:
    made = grey([0.0, 1.0])
    (tmp_path / "grey.py").write_text(GREY.replace("return self.encoder(images)", body))
    with pytest.raises(CodebookError, match=RETURNS[body]):
        probe(load_model(read_checkpoint(made.path), network=made.network).encode, 16, 16)
