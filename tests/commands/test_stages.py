"""Two residual codebooks through every command: each is operated on with what those before it leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, assert_refused
from runs import BrokenError, breaking_at
from safetensors.torch import load_file, save_file
from sources_of_images import Images
from surgeries import do, maps_of, output_of, written
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.codebook import REMOVED
from codebook_tools.data.images import array_items
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Grow, Prune, Quantize, Refit, Restart
from codebook_tools.training.finetune import FineTune, FineTuned, finetune
from codebook_tools.training.state import State as Kept
from codebook_tools.workflows import pipeline
from codebook_tools.workflows.operate import measure_model, operate
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import Result

Write = Callable[..., Path]
Ask = Callable[..., Request]
KEYS = ("quantizers.0.embed", "quantizers.1.embed")

RESIDUAL = '''
from torch import Tensor, nn, ones


class Residual(nn.Module):
    """A grey pixel x has the latent (x, 0); a second codebook codes what the first leaves of it."""

    codebooks = ("quantizers.0.embed", "quantizers.1.embed")

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, 2, 1, bias=False)
        self.between = nn.Parameter(ones(1))
        self.decoder = nn.Conv2d(2, 1, 1, bias=False)

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def walk(self, latents: Tensor, quantise) -> Tensor:
        first = quantise(0, latents)
        return first + quantise(1, (latents - first) * self.between)

    def decode(self, quantised: Tensor) -> Tensor:
        return self.decoder(quantised)


def make(codebook_size: int) -> Residual:
    return Residual()
'''

PIXELS = (0.0, 0.2, 0.6, 0.8)
FIRST, SECOND = (0.0, 0.3, 9.0, -9.0), (0.0, 0.3, 0.5, 9.0)
"""The first codebook takes 0.0 as its code 0, and 0.2, 0.6 and 0.8 as 1: that leaves 0, -0.1, 0.3 and 0.5, of which
the second takes two as its code 0, one as 1 and one as 2."""


@pytest.fixture
def residual(tmp_path: Path) -> Callable[..., Path]:
    """residual((0.0, 1.0), (0.0, 0.1)): a checkpoint of codes (0, 0), (1, 0) and (0, 0), (0.1, 0), and its EMA."""

    def write(*books: tuple[float, ...]) -> Path:
        (tmp_path / "residual.py").write_text(RESIDUAL)
        pick = torch.tensor([1.0, 0.0])
        state = {"encoder.weight": pick.reshape(2, 1, 1, 1), "decoder.weight": pick.reshape(1, 2, 1, 1).clone()}
        for i, numbers in enumerate(books or (FIRST, SECOND)):
            codes = torch.tensor([[number, 0.0] for number in numbers])
            state |= {f"quantizers.{i}.embed": codes, f"quantizers.{i}.embed_avg": codes.clone()}
            state[f"quantizers.{i}.cluster_size"] = torch.ones(len(codes))
        save_file(state | {"between": torch.ones(1)}, tmp_path / "residual.safetensors", {"format": "pt"})
        return tmp_path / "residual.safetensors"

    return write


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """ask(path): with 40 images, each of which holds the four PIXELS four times."""
    image = np.repeat(np.array([round(255 * x) for x in PIXELS], dtype=np.uint8), 4).reshape(4, 4)
    np.save(tmp_path / "images.npy", np.stack([image] * 40))

    given = {"data": (str(tmp_path / "images.npy"),), "network": f"{tmp_path / 'residual.py'}:make"}
    return lambda path, **more: Request(path, **given | {"input_range": (0.0, 1.0)} | more)


def firsts(result: Result, stage: int) -> list[float]:
    """The first numbers of the written codes."""
    return [round(first, 5) for first in written(result)[KEYS[stage]][:, 0].tolist()]


def maps(result: Result, kind: str) -> list[list[int]]:
    """By codebook."""
    return [pair[kind == "nearest"].tolist() for pair in maps_of(result).values()]


def counts(request: Request, path: Path) -> list[list[float]]:
    """What `measure --stats` counts of each book, as shares."""
    measure_model(request, Watch(), path)
    found = [load_file(path)[f"{key}/counts"] for key in KEYS]
    return [(of / of.sum()).tolist() for of in found]


# --- surgeries
def test_each_codebook_is_measured_with_what_the_one_before_leaves(residual: Write, ask: Ask, tmp_path: Path) -> None:
    path = residual()
    found = measure_model(ask(path), Watch()).before
    assert found is not None
    first, second = found.codebooks
    assert (first.key, second.key) == KEYS and first.latents == second.latents
    assert (first.used, second.used) == (2, 3)
    assert first.distortion == pytest.approx((0 + 0.01 + 0.09 + 0.25) / 4, rel=1e-4)
    assert second.distortion == pytest.approx(0.01 / 4, rel=1e-4)
    assert found.mse == pytest.approx(0.01 / 4, rel=1e-4)
    stats = tmp_path / "stats.safetensors"
    assert counts(ask(path), stats) == [[0.25, 0.75, 0, 0], [0.5, 0.25, 0.25, 0]]
    images = 40 - found.images  # the other images are those that are counted
    assert int(load_file(stats)[f"{KEYS[1]}/counts"].sum()) == 16 * images


def test_a_refit_of_the_second_sees_what_the_refitted_first_leaves(residual: Write, ask: Ask, tmp_path: Path) -> None:
    path = residual()
    result = do(ask(path), Refit(2))
    # 0.1 and 0.7 leave -0.1 and 0.1 of each pixel; the old first codes would have left -0.1, 0, 0.3 and 0.5.
    assert sorted(firsts(result, 0)) == [0.1, 0.7] and sorted(firsts(result, 1)) == [-0.1, 0.1]
    assert result.surgery is not None and result.surgery.mse == pytest.approx(0, abs=1e-10)
    assert [use.size for use in result.surgery.codebooks] == [2, 2] and result.warnings == ()
    output = output_of(result)
    assert counts(ask(output), tmp_path / "after.safetensors") == [[0.5, 0.5], [0.5, 0.5]]
    new = written(result)
    for i in range(2):
        size = new[f"quantizers.{i}.cluster_size"]
        assert size.tolist() == [size.sum() / 2] * 2 and size.sum() > 500  # counted anew: not the ones of the file
        torch.testing.assert_close(new[f"quantizers.{i}.embed_avg"], new[KEYS[i]] * size[:, None])
    assert maps(result, "index_map") == [[REMOVED] * 4] * 2
    low, high = (firsts(result, 0).index(x) for x in (0.1, 0.7))
    less, more = (firsts(result, 1).index(x) for x in (-0.1, 0.1))
    first, second = maps(result, "nearest")
    # Of 0.2, 0.6 and 0.8, once code 1, two are now with 0.7; dead codes go by distance.
    assert first == [low, high, high, low]
    # 0.6 was 0.3 + 0.3 and is 0.7 - 0.1, though 0.1 is nearer to 0.3; 0.8 was 0.3 + 0.5 and is 0.7 + 0.1. The pixels
    # 0.0 and 0.2 had code 0 and have one each: the lowest.
    assert second == [0, less, more, more]


def test_codebooks_of_one_size_stay_so_with_dead_codes_and_it_is_said(residual: Write, ask: Ask) -> None:
    result = do(ask(residual()), Prune())
    assert firsts(result, 0) == pytest.approx([0, 0.3, 9]) and firsts(result, 1) == pytest.approx([0, 0.3, 0.5])
    assert maps(result, "index_map") == [[0, 1, 2, REMOVED], [0, 1, 2, REMOVED]]
    said = "codebooks must be of one size that the config takes, 3: dead codes fill them up, 1 of quantizers.0.embed"
    assert [warning for warning in result.warnings if "one size" in warning] == [said]
    assert result.surgery is not None and result.before is not None and result.surgery.mse == result.before.mse
    assert [(use.size, use.used) for use in result.surgery.codebooks] == [(3, 2), (3, 3)]


def test_one_of_the_codebooks_is_chosen_by_its_key(residual: Write, ask: Ask) -> None:
    path = residual()
    result = do(ask(path, codebook_key=(KEYS[1],)), Refit(2))
    # The old first codes leave -0.1, 0, 0.3 and 0.5; and two codes are filled up to the four that the first one has.
    assert sorted(firsts(result, 1)[:2]) == [-0.05, 0.4] and firsts(result, 1)[2:] == [firsts(result, 1)[0]] * 2
    assert "2 of quantizers.1.embed" in " ".join(result.warnings)
    before, after = load_file(path), written(result)
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("quantizers.1"))
    assert maps(result, "index_map") == [[REMOVED] * 4]  # of the second alone


def test_a_codebook_that_was_not_chosen_is_filled_up_where_the_chosen_one_grows(residual: Write, ask: Ask) -> None:
    result = do(ask(residual(), codebook_key=(KEYS[0],)), Refit(2))
    assert sorted(firsts(result, 0)[:2]) == [0.1, 0.7] and len(firsts(result, 0)) == 4
    grown = do(ask(residual((0.0, 0.3), (0.0, 0.4)), codebook_key=(KEYS[0],), force=True), Grow(3))
    assert len(firsts(grown, 0)) == 3 and firsts(grown, 0)[:2] == pytest.approx([0, 0.3])
    assert firsts(grown, 1) == pytest.approx([0, 0.4, 0])
    assert [of[:2] for of in maps(grown, "index_map")] == [[0, 1], [0, 1]]


def test_merged_codes_of_the_second_weigh_what_the_merged_first_leaves(residual: Write, ask: Ask) -> None:
    result = do(ask(residual((0.0, 0.3, 0.4, -9.0), (0.0, 0.3, -0.32))), Quantize(k=2, method="pnn"))
    # Of the first, 0.3 has the pixel 0.2, and 0.4 has 0.6 and 0.8; -9 has none, and weighs nothing.
    assert firsts(result, 0) == pytest.approx([0, 11 / 30], abs=1e-4)
    # That leaves 0, -1/6, 7/30 and 13/30: -0.32 has one of them, which was -0.1, and 0.0's.
    assert sorted(firsts(result, 1)) == pytest.approx([-0.16, 0.3], abs=1e-4)
    first, second = maps(result, "index_map")
    assert first == [0, 1, 1, 0] and second[0] == second[2] != second[1]


def test_a_restart_of_the_second_sees_what_the_restarted_first_leaves(residual: Write, ask: Ask) -> None:
    """The dead code of the first goes to 0.8 or to 0.2, and the other one of them is left to the second."""
    result = do(ask(residual((0.0, 0.3, 0.6, 9.0), (0.05, 9.0))), Restart())
    moved = firsts(result, 0)[3]
    assert firsts(result, 0)[:3] == pytest.approx([0, 0.3, 0.6]) and moved in (0.2, 0.8)
    assert firsts(result, 1) == pytest.approx([0.05, {0.8: -0.1, 0.2: 0.2}[moved]], abs=1e-5)
    assert result.surgery is not None and result.surgery.mse == pytest.approx(3 / 4 * 0.05**2, rel=1e-4)
    assert maps(result, "index_map") == [[0, 1, 2, REMOVED], [0, REMOVED]]
    assert "one size" not in " ".join(result.warnings)  # they never had one


def test_counts_from_a_file_prune_both(residual: Write, ask: Ask, tmp_path: Path) -> None:
    path, stats = residual(), tmp_path / "stats.safetensors"
    by_images = do(ask(path), Prune())
    counts(ask(path), stats)
    by_counts = do(Request(path, stats=stats, output=tmp_path / "counted.safetensors"), Prune())
    assert all(torch.equal(written(by_counts)[key], written(by_images)[key]) for key in KEYS)
    assert maps(by_counts, "index_map") == maps(by_images, "index_map")
    assert by_counts.before is not None and [use.used for use in by_counts.before.codebooks] == [2, 3]


# --- fine-tuning
@pytest.fixture
def model_of(residual: Write) -> Callable[..., Model]:
    """model_of((0.0, 1.0), (0.0, 0.1), ...): the checkpoint as a model."""

    def make(*books: tuple[float, ...], **more: Any) -> Model:
        path = residual(*books)
        model = load_model(read_checkpoint(path), network=f"{path.parent / 'residual.py'}:make", **more)
        model.input_range = (0.0, 1.0)
        return model

    return make


def tune(model: Model, hits: list[list[int]], **recipe: Any) -> FineTuned:
    pixels = np.array([[[0.0, 0.2], [0.6, 0.8]]], dtype=np.float32)
    images, counts = Images(array_items("grey.npy", pixels), channels=1), [torch.tensor(of) for of in hits]
    return finetune(model, images, images, FineTune(batch_size=1, **recipe), counts, seed=0, watch=Watch())


HALVES, HUNDREDTHS = (0.0, 0.5), (0.04, 0.24)


def test_one_step_of_both_moving_averages_is_the_one_worked_by_hand(model_of: Callable[..., Model]) -> None:
    model = model_of(HALVES, HUNDREDTHS)
    tune(model, [[1, 1], [1, 1]], steps=1, train="none")
    # The first: 5% towards the means of 0, 0.2 and of 0.6, 0.8. That leaves 0, 0.1 and 0.2, 0.3 to the second's.
    torch.testing.assert_close(model.books[0].vectors[:, 0], torch.tensor([0.005, 0.51]))
    torch.testing.assert_close(model.books[1].vectors[:, 0], torch.tensor([0.0405, 0.2405]))


def test_only_chosen_codebooks_move(model_of: Callable[..., Model]) -> None:
    for update in ("ema", "gradient"):
        model = model_of(HALVES, HUNDREDTHS, codebook_keys=[KEYS[1]])
        tune(model, [[1, 1], [1, 1]], steps=2, train="none", codebook_update=update)
        assert model.books[0].vectors[:, 0].tolist() == [0, 0.5]
        assert model.books[1].vectors[0, 0] > 0.04 and model.books[1].vectors[1, 0] > 0.24


@torch.no_grad()
def latents_of(model: Model) -> tuple[Tensor, ...]:
    return model.pass_through(torch.tensor(PIXELS).reshape(1, 1, 2, 2)).latents


def test_the_decoder_alone_moves_no_latent_of_any_codebook(model_of: Callable[..., Model]) -> None:
    """`between` shapes what the second codebook meets: it is of the encoder, though only the decoder's side uses it."""
    for train, trained in (("decoder", ["decoder.weight"]), ("all", ["between", "decoder.weight", "encoder.weight"])):
        model = model_of(HALVES, HUNDREDTHS)
        before = latents_of(model)
        found = tune(model, [[1, 1], [1, 1]], steps=5, train=train, codebook_update="frozen", lr=0.01)
        assert list(found.trained) == trained
        same = [torch.equal(a, b) for a, b in zip(before, latents_of(model), strict=True)]
        assert same == [train == "decoder"] * 2
        assert model.network.get_parameter("decoder.weight").flatten()[0] != 1


def test_revived_codes_are_told_apart_by_codebook(model_of: Callable[..., Model]) -> None:
    model = model_of((0.0, 0.5, 9.0), (0.0, 0.1, 0.2))
    found = tune(model, [[2, 2, 0], [1, 1, 2]], steps=12, train="none")
    assert found.best.step >= 10
    assert [codes.tolist() for codes in found.best.revived] == [[False, False, True], [False] * 3]
    assert found.trace[-1].revived == 1


def test_an_interrupted_fine_tuning_of_both_goes_on_to_the_same_bytes(
    residual: Write, ask: Ask, tmp_path: Path
) -> None:
    recipe = FineTune(steps=20, batch_size=8, weight_ema=0.5)
    asked = [ask(residual(), output=tmp_path / name, resume=True) for name in ("a.safetensors", "b.safetensors")]
    whole = do(asked[0], Refit(2), recipe)
    with pytest.raises(BrokenError):
        operate("refit", asked[1], Refit(2), recipe, breaking_at(13))
    parts = do(asked[1], Refit(2), recipe)
    assert parts.trace == whole.trace
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_fine_tuning_is_written_and_the_second_meets_what_the_trained_first_leaves(
    residual: Write, ask: Ask, tmp_path: Path
) -> None:
    path = residual(HALVES, HUNDREDTHS)
    result = do(ask(path), None, FineTune(steps=20, batch_size=8, lr=1e-3))
    assert result.kept == "finetuned" and result.before and result.finetuned
    assert result.finetuned.mse < result.before.mse  # type: ignore[operator]
    old, new = load_file(path), written(result)
    assert not any(torch.equal(old[key], new[key]) for key in (*KEYS, "encoder.weight", "decoder.weight"))
    again = measure_model(ask(output_of(result)), Watch())
    assert again.before == result.finetuned
    assert maps(result, "index_map") == maps(result, "nearest") == [[0, 1], [0, 1]]
    latents = torch.tensor(PIXELS)[:, None] * new["encoder.weight"].flatten()
    first = new[KEYS[0]]
    left = (latents - first[torch.cdist(latents, first).argmin(1)]) * new["between"]
    distortion = torch.cdist(left, new[KEYS[1]]).amin(1).square().mean()
    assert result.finetuned.codebooks[1].distortion == pytest.approx(float(distortion), rel=1e-3)


# --- the command line
def test_the_commands_tell_of_both_codebooks(residual: Write, ask: Ask, codebook: Run, tmp_path: Path) -> None:
    asked = ask(residual())
    given = ("--network", asked.network, "--data", *asked.data, "--input-range", "0,1", "--json")
    done = codebook("prune", asked.model, *given)
    assert done.exit_code == 0, done.stderr
    assert [use["key"] for use in done.json["stages"]["surgery"]["codebooks"]] == list(KEYS)
    assert codebook("verify", done.json["outputs"]["model"], "--against", asked.model).exit_code == 0
    one = codebook("prune", asked.model, *given, "--codebook-key", KEYS[1], "-o", tmp_path / "one.safetensors")
    assert one.exit_code == 0, one.stderr
    listed = read_checkpoint(tmp_path / "one.safetensors").metadata["codebook_tools.codebooks"]
    assert KEYS[1] in listed and KEYS[0] not in listed
    wrong = codebook("measure", asked.model, *given[:-1], "--codebook-key", "quantizers.0.embed_avg")
    assert_refused(wrong, "quantizers.0.embed_avg")


def test_a_file_that_puts_something_before_every_name_is_the_networks_all_the_same(residual: Write, ask: Ask) -> None:
    """As Lightning does, with `model.`; the result has the file's names."""
    path = residual()
    alone = do(ask(path, force=True), Prune())
    save_file({f"model.net.{key}": t for key, t in load_file(path).items()}, path, {"format": "pt"})
    found = do(ask(path, force=True), Prune())
    assert found.surgery is not None and alone.surgery is not None and found.surgery.mse == alone.surgery.mse
    assert [use.key for use in found.surgery.codebooks] == [f"model.net.{use.key}" for use in alone.surgery.codebooks]


def test_codes_that_a_fine_tuning_loses_are_warned_of(
    residual: Write, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that leaves one code of each book, and is said to be better."""

    def lose(model: Model, *_: object, **more: object) -> FineTuned:
        tensors = model.network.state_dict(), tuple(book.vectors for book in model.books)
        revived = tuple(torch.zeros(len(book.vectors), dtype=torch.bool) for book in model.books)
        for book in model.books:
            book.vectors = torch.full_like(book.vectors, 9.0)
        start, best = Kept(0, 1.0, *tensors, revived), Kept(1, 0.5, *tensors, revived)
        return FineTuned(start, best, (), (), ("encoder",), 0.1, None)

    monkeypatch.setattr(pipeline, "finetune", lose)
    result = do(ask(residual()), Refit(3), FineTune(steps=1))
    assert "fine-tuning lowered the error with 2 of 6 codes in use" in " ".join(result.warnings)
