"""Networks, their codebooks and what must follow them: against independent code, and against numbers worked by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GREY, Grey, State, WriteModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tutorial_networks import Tutorial

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

VARIANTS = ("plain", "ema", "weight_norm_older", "weight_norm_newer", "module_prefix", "tied", "extra")


def load(path: Path) -> Model:
    return load_model(read_checkpoint(path))


# --- the zalando network -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_zalando_network_computes_what_the_tutorial_computes_and_leaves_its_input(
    variant: str, write_model: WriteModel, variants: dict[str, State], image_tensor: Tensor
) -> None:
    model, theirs, images = load(write_model(variant)), Tutorial(variants[variant]), image_tensor.clone()
    latents = model.encode(images)
    assert latents.shape == (60, 4, 4, 4) and latents.dtype == torch.float32
    torch.testing.assert_close(latents.double(), theirs.encode(image_tensor * 2 - 1), rtol=1e-5, atol=1e-6)
    passed = list[Tensor]()
    decoded = model.run(images, lambda stage, rows: passed.extend((rows, rows.clone())) or rows)
    torch.testing.assert_close(decoded.double(), (theirs.decode(latents) + 1) / 2, rtol=1e-5, atol=1e-6)
    assert torch.equal(images, image_tensor) and torch.equal(*passed)


def test_a_fresh_network_has_the_tutorials_sizes_and_initial_codes() -> None:
    state = zalando.make().state_dict()
    assert state[CODEBOOK].shape == (512, 64) and state["_encoder._conv_3.weight"].shape == (128, 128, 3, 3)
    assert state["_decoder._residual_stack._layers.1._block.1.weight"].shape == (32, 128, 3, 3)
    assert 0.99 / 512 < state[CODEBOOK].abs().max() <= 1 / 512


def test_a_layout_is_recognized_by_shapes_behind_any_prefix(
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
    assert probe(load(write_model(state=grey)).encode, 28, 30) == (1, 4)


# --- what flows through a model ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 255.0)])
def test_images_are_mapped_into_the_input_range_and_back(line: Callable[..., Model], low: float, high: float) -> None:
    model, images = line([0.0, 1.0]), torch.tensor([0.0, 0.25, 1.0]).reshape(1, 1, 1, 3)
    model.input_range = low, high
    latents = model.encode(images)
    torch.testing.assert_close(latents[0, 0, 0], torch.tensor([low, low + 0.25 * (high - low), high]))
    assert not latents[0, 1].any()
    torch.testing.assert_close(model.run(images, lambda stage, rows: rows), images)


def test_codes_keep_the_grid_and_get_gradients_where_they_are_looked_up(line: Callable[..., Model]) -> None:
    model = line([0.0, 0.5, 1.0])
    codes = model.assign(model.encode(torch.tensor([[0.1, 0.6, 0.9], [0.2, 0.7, 0.8]]).reshape(1, 1, 2, 3)))
    assert codes.tolist() == [[[0, 1, 2], [0, 1, 2]]]
    embedded = model.embed(codes)
    assert embedded.shape == (1, 2, 2, 3)
    assert embedded[0, 0].tolist() == [[0, 0.5, 1], [0, 0.5, 1]] and not embedded[0, 1].any()
    vectors = model.books[0].vectors.requires_grad_(True)
    model.embed_trained(torch.tensor([[[0, 2, 2]]])).sum().backward()
    assert vectors.grad is not None and vectors.grad.tolist() == [[1, 1], [0, 0], [2, 2]]


def test_unit_codes_are_emitted_at_length_one_in_training_too(grey: Callable[..., Grey]) -> None:
    made = grey([0.5, -3.0])
    model = load_model(read_checkpoint(made.path), network=made.network, metric="cosine-unit")
    assert model.books[0].metric == COSINE_UNIT
    for embed in (model.embed, model.embed_trained):
        assert embed(torch.tensor([[[0, 1]]]))[0, 0, 0].tolist() == [1.0, -1.0]


# --- installation --------------------------------------------------------------------------------------------------
def test_codes_of_any_number_are_rounded_to_the_stored_dtype_which_must_hold_them(write_model: WriteModel) -> None:
    codes = torch.rand(40, 4, generator=torch.Generator().manual_seed(0))
    for variant, dtype in (("plain", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        model = load(write_model(variant))
        for size in (1, 40):
            model.install(Codebook(codes[:size]))
            assert torch.equal(model.books[0].vectors, codes[:size].to(dtype).float())
            assert model.books[0].stored.size == 16
    with pytest.raises(CodebookError, match=r"do not fit torch\.float16"):
        model.install(Codebook(torch.full((2, 4), 1e5)))


def test_what_the_network_itself_holds_of_a_codebook_is_never_looked_up(line: Callable[..., Model]) -> None:
    model, images = line([0.0, 1.0]), torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
    model.network.get_parameter("quantizer.codebook.weight").data.fill_(torch.nan)
    for size in (1, 5):
        model.install(Codebook(torch.tensor([[0.25, 0.0]] * size)))
        result = model.pass_through(images)
        assert result.media.flatten().tolist() == [0.25, 0.25] and not result.codes[0].any()
        assert list(model.changed({0: torch.ones(size)}, {0: torch.tensor([0, -1])})) == ["quantizer.codebook.weight"]


def stored_as(
    size: int, dim: int, axis: int = 0, companions: tuple[str, ...] = (), dtype: str = "F32"
) -> FoundCodebook:
    return FoundCodebook("q.embed", size, dim, axis, 1, dtype, "euclidean", companions, "high")


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), others=st.lists(st.integers(1, 3), min_size=1, max_size=2), axis=st.integers(0, 2))
def test_rows_can_be_laid_out_as_they_were_stored(rows: int, others: list[int], axis: int) -> None:
    axis = min(axis, len(others))
    shape = [*others[:axis], rows, *others[axis:]]
    stored = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    codes = stored_rows(stored, stored_as(rows, stored.numel() // rows, axis))
    assert codes.shape == (rows, stored.numel() // rows)
    assert torch.equal(codes[0].flatten(), stored.select(axis, 0).flatten())
    assert torch.equal(laid_out(codes, stored, axis), stored)
    assert laid_out(codes[:1], stored, axis).shape == torch.Size([*others[:axis], 1, *others[axis:]])


# --- what follows a codebook ---------------------------------------------------------------------------------------
CODES, COUNTS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([3, 1])
SUMS = [[3.0, 6.0, 9.0], [4.0, 5.0, 6.0]]
FIVE_BY_3, FIVE = torch.ones(5, 3), torch.ones(5)


def new_values(book: FoundCodebook, stored: State, codes: Tensor = CODES, counts: Tensor = COUNTS) -> State:
    """What follows a codebook whose numbers say nothing of its companions."""
    old = torch.arange(1.0, book.size * book.dim + 1).reshape(book.size, book.dim)
    return companion_values(book, companions_of(book, old, stored, {}), stored, codes, counts)


COMPANIONS: list[tuple[str, Tensor, list[Any]]] = [
    *((key, FIVE_BY_3, SUMS) for key in ("_ema_w", "embed_avg", "k_sum", "m_i_ts", "ema_embed_shadow")),
    *((key, FIVE, [3, 1]) for key in ("_ema_cluster_size", "cluster_usage", "k_elem")),
    ("cluster_size", torch.ones(1, 5), [[3, 1]]), ("N_i_ts", torch.ones(5, dtype=torch.int64), [3, 1]),
    ("embed_prob", FIVE, [0.75, 0.25]), ("weight_shadow", FIVE_BY_3, CODES.tolist()),
    ("vocab_hit", torch.ones(2, 5), [[3, 1], [3, 1]]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "old", "expected"), COMPANIONS)
def test_a_companion_is_what_its_name_says_for_the_new_codes(key: str, old: Tensor, expected: list[float]) -> None:
    value = new_values(stored_as(5, 3, 0, (f"q.{key}",)), {f"q.{key}": old})[f"q.{key}"]
    assert value.tolist() == expected and value.dtype == old.dtype


def test_a_companion_lies_as_its_codebook_does_also_where_the_new_size_is_the_dimension() -> None:
    across, along = (stored_as(5, dim, axis, ("q.embed_avg",)) for dim, axis in ((3, 1), (2, 0)))
    value = new_values(across, {"q.embed_avg": torch.ones(3, 5)})["q.embed_avg"]
    assert torch.equal(value, torch.tensor(SUMS).T)
    value = new_values(along, {"q.embed_avg": torch.ones(5, 2)}, CODES[:, :2])["q.embed_avg"]
    assert value.tolist() == [[3, 6], [4, 5]]


def test_flags_beside_a_codebook_say_that_it_is_initialised() -> None:
    others = {"other.initted": torch.zeros(1), "q.initial_value": torch.ones(1)}
    names = ("initted", "inited", "is_initialized", "data_initialized", "_init", "initialised")
    for name, dtype in (*((name, torch.float32) for name in names), ("initted", torch.bool), ("initted", torch.uint8)):
        stored = {f"q.{name}": torch.zeros(1, dtype=dtype)} | others
        assert flags("q.embed", stored) == [f"q.{name}"]
        value = new_values(stored_as(5, 3), stored)
        assert list(value) == [f"q.{name}"] and torch.equal(value[f"q.{name}"], torch.ones(1, dtype=dtype))


def test_companions_in_half_precision_hold_the_counts_of_any_data_set() -> None:
    half = stored_as(5, 3, 0, ("q.cluster_size", "q.embed_avg"), "F16")
    old = {"q.cluster_size": FIVE.half(), "q.embed_avg": FIVE_BY_3.half()}
    value = new_values(half, old, CODES, torch.tensor([1_000_000, 2_000]))
    sizes, sums = value["q.cluster_size"].float(), value["q.embed_avg"].float()
    assert torch.isfinite(sums).all() and sizes[0] > 1000
    assert torch.equal(sums / sizes[:, None], CODES)
    assert sizes[0] / sizes[1] == 512  # the power of two next to 500


# --- from a file to a model ----------------------------------------------------------------------------------------
def test_layers_with_the_same_bytes_in_a_file_become_one_and_fresh_ones_that_are_alike_do_not(
    write_model: WriteModel, grey: Callable[..., Grey]
) -> None:
    for variant in ("tied", "plain"):
        network = load(write_model(variant)).network
        first, second = (network.get_submodule(f"_encoder._residual_stack._layers.{i}._block.1") for i in range(2))
        assert (first.weight is second.weight) == (variant == "tied")
    fresh = {"weight": torch.ones(2), "bias": torch.zeros(2)}
    made = grey([0.0, 1.0], more={f"norms.{i}.{n}": t.clone() for i in range(2) for n, t in fresh.items()})
    norms = "self.norms = nn.ModuleList([nn.GroupNorm(1, 2), nn.GroupNorm(1, 2)])"
    Path(made.network.removesuffix(":make")).write_text(GREY.replace("self.quantizer =", f"{norms}; self.quantizer ="))
    network = load_model(read_checkpoint(made.path), network=made.network).network
    first, second = (network.get_submodule(f"norms.{i}") for i in range(2))
    assert first.weight is not second.weight and first.bias is not second.bias


def test_tensors_of_no_network_are_listed_but_companions(write_model: WriteModel, variants: dict[str, State]) -> None:
    assert set(load(write_model("extra")).carried) == {"teacher.head.weight", "step"}
    mask = torch.full((3, 3), -torch.inf)  # which a tensor that no network has may hold
    assert load(write_model(state=variants["ema"] | {"attention.mask": mask})).carried == ("attention.mask",)


def test_weights_go_back_to_the_file_as_they_came_and_a_surgery_changes_the_codebook_alone(
    write_model: WriteModel, variants: dict[str, State]
) -> None:
    for variant in variants:
        model = load(write_model(variant))
        same = model.changed({0: torch.ones(16)}, {0: torch.arange(16)})
        key = model.books[0].stored.key
        assert tensor_bytes(same[key]) == tensor_bytes(variants[variant][key])
        assert set(same) == {key, *model.books[0].stored.companions}
    assert variant == "float64"  # a file wider than the network runs
    model.install(Codebook(model.books[0].vectors[:3]))
    changed = model.changed({0: torch.ones(3)}, {0: torch.arange(16).where(torch.arange(16) < 3, -1)})
    assert list(changed) == [CODEBOOK]
    assert torch.equal(changed[CODEBOOK], model.checkpoint.tensor(CODEBOOK)[:3])  # with digits that float32 has not
    assert not torch.equal(changed[CODEBOOK], changed[CODEBOOK].float().double())


def test_what_cannot_be_worked_on_is_refused_with_its_tensor_or_family(
    write_model: WriteModel, variants: dict[str, State], grey: Callable[..., Grey]
) -> None:
    odd = torch.tensor([[1.0, 2.0, -torch.inf, 4.0]] * 16)
    with pytest.raises(CodebookError, match=r"_decoder\._conv_1\.bias in .* nan at \[0\]"):
        load(write_model(state=variants["plain"] | {"_decoder._conv_1.bias": torch.full((8,), torch.nan)}))
    with pytest.raises(CodebookError, match=r"_embedding\.weight in .* -inf at \[0, 2\]"):
        load(write_model(state=variants["plain"] | {CODEBOOK: odd}))
    unknown, none = "no family 'vqgan'; there are zalando", r"no network is known .*codebook\.weight, 2x2.*--network"
    for family, message in (("vqgan", unknown), ("zalando", "layout"), (None, none)):
        with pytest.raises(CodebookError, match=message):
            load_model(read_checkpoint(grey([0.0, 1.0]).path), family=family)


def test_a_codebook_is_chosen_by_a_key_that_names_a_matrix(write_model: WriteModel, variants: dict[str, State]) -> None:
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


# --- the user's own network ----------------------------------------------------------------------------------------
def encoding(body: str) -> str:
    """A network whose encoder does something else."""
    return GREY.replace("return self.encoder(images)", body)


NETWORKS = {
    "import sys; x = (": "cannot be imported: SyntaxError",
    "raise OSError('no weights here')": "cannot be imported: OSError: no weights here",
    "def make(size): ...": r"failed: TypeError: .*codebook_size",
    "def make(codebook_size): return {}": "returned dict without encode and decode",
    f"{GREY}\n    pass\nclass Half(Grey):\n    decode = None\nmake = Half": "returned Half without decode",
    f"{GREY}\ndef make(codebook_size): return Grey(9)": r"shapes differ: .*codebook\.weight is \(2, 2\).*\(9, 2\)",
    encoding("return None"): "encode returns a NoneType",
    encoding("return self.encoder(images).mean((1, 2, 3))"): r"encode returns \(1,\); expected \(n, 2, ...\)",
    encoding("raise ValueError('odd')"): "encodes neither RGB images .* nor gray ones .*ValueError: odd",
}


@pytest.mark.parametrize("source", NETWORKS)
def test_a_network_that_does_not_do_is_refused_with_why(source: str, grey: Callable[..., Grey], tmp_path: Path) -> None:
    path = grey([0.0, 1.0]).path
    (tmp_path / "own.py").write_text(source)
    with pytest.raises(CodebookError, match=NETWORKS[source]):
        probe(load_model(read_checkpoint(path), network=f"{tmp_path / 'own.py'}:make").encode, 16, 16)


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from neighbor_of_network import Grey
@dataclass
class Config:
    size: int
def make(codebook_size: int) -> Grey:
    return Grey(Config(codebook_size).size)
"""


def test_a_network_is_a_file_and_a_function_and_may_import_its_neighbors_and_define_dataclasses(tmp_path: Path) -> None:
    (tmp_path / "neighbor_of_network.py").write_text(GREY)
    (tmp_path / "own.py").write_text(OWN)
    assert type(make_network(f"{tmp_path / 'own.py'}:make", 7)).__name__ == "Grey"
    (tmp_path / "own.txt").touch()
    gone, no_python = f"{tmp_path}/gone.py:make", f"{tmp_path}/own.txt:make"
    for spec, message in ((gone, "no such network file"), (no_python, "no Python"), ("own.py", "FILE")):
        with pytest.raises(CodebookError, match=message):
            make_network(spec, 2)
