"""Two residual codebooks through every command: each is operated on with what those before it leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GREY, Run, assert_refused
from runs import BrokenError, breaking_at
from safetensors.torch import load_file, save_file
from sources_of_images import Images
from surgeries import do, maps_of, output_of, written
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.clustering.balanced import BALANCED
from codebook_tools.codebook import REMOVED
from codebook_tools.data.images import array_items
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.figures import IdUse
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

Ask = Callable[..., Request]
KEYS = ("quantizers.0.embed", "quantizers.1.embed")

RESIDUAL = (
    GREY.partition("def make")[0]
    + '''
class Residual(Grey):
    """A grey pixel x has the latent (x, 0); a second codebook codes what the first leaves of it."""

    codebooks = ("quantizers.0.embed", "quantizers.1.embed")

    def __init__(self) -> None:
        super().__init__(1)
        del self.quantizer
        self.between = nn.Parameter(Tensor([1.0]))

    def walk(self, latents: Tensor, quantise) -> Tensor:
        first = quantise(0, latents)
        return first + quantise(1, (latents - first) * self.between)


def make(codebook_size: int) -> Residual:
    return Residual()
'''
)
PIXELS = (0.0, 0.2, 0.6, 0.8)
FIRST, SECOND = (0.0, 0.3, 9.0, -9.0), (0.0, 0.3, 0.5, 9.0)
"""The first codebook takes 0.0 as its code 0, and 0.2, 0.6 and 0.8 as 1: that leaves 0, -0.1, 0.3 and 0.5, of which
the second takes two as its code 0, one as 1 and one as 2."""


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """ask((0.0, 1.0), (0.0, 0.1)): a checkpoint of codes (0, 0), (1, 0) and (0, 0), (0.1, 0), and its EMA; with 40
    images, each of which holds the four PIXELS four times."""
    image = np.repeat(np.array([round(255 * x) for x in PIXELS], dtype=np.uint8), 4).reshape(4, 4)
    np.save(tmp_path / "images.npy", np.stack([image] * 40))
    given = {"data": (str(tmp_path / "images.npy"),), "network": f"{tmp_path / 'residual.py'}:make"}

    def write(*books: tuple[float, ...]) -> Path:
        (tmp_path / "residual.py").write_text(RESIDUAL)
        pick = torch.tensor([1.0, 0.0])
        state = {"encoder.weight": pick.reshape(2, 1, 1, 1), "decoder.weight": pick.reshape(1, 2, 1, 1).clone()}
        for i, numbers in enumerate(books):
            codes = torch.tensor([[number, 0.0] for number in numbers])
            state |= {f"quantizers.{i}.embed": codes, f"quantizers.{i}.embed_avg": codes.clone()}
            state[f"quantizers.{i}.cluster_size"] = torch.ones(len(codes))
        save_file(state | {"between": torch.ones(1)}, tmp_path / "residual.safetensors", {"format": "pt"})
        return tmp_path / "residual.safetensors"

    def make(*books: tuple[float, ...], model: Path | None = None, **more: Any) -> Request:
        path = model or write(*books or (FIRST, SECOND))
        return Request(path, **given | {"input_range": (0.0, 1.0)} | more)

    return make


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
def test_each_codebook_is_measured_with_what_the_one_before_leaves(ask: Ask, tmp_path: Path) -> None:
    asked = ask()
    found = measure_model(asked, Watch()).before
    assert found is not None
    first, second = found.codebooks
    assert (first.key, second.key) == KEYS and first.latents == second.latents and (first.used, second.used) == (2, 3)
    errors = (first.distortion, second.distortion, found.mse)
    assert errors == pytest.approx(((0 + 0.01 + 0.09 + 0.25) / 4, 0.01 / 4, 0.01 / 4), rel=1e-4)
    stats = tmp_path / "stats.safetensors"
    assert counts(asked, stats) == [[0.25, 0.75, 0, 0], [0.5, 0.25, 0.25, 0]]
    images = 40 - found.images  # the other images are those that are counted
    assert int(load_file(stats)[f"{KEYS[1]}/counts"].sum()) == 16 * images


def test_a_balanced_refit_is_fine_tuned_as_it_was_made(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    powers, tuned = list[Any](), pipeline.finetune
    monkeypatch.setattr(pipeline, "finetune", lambda *a, **more: powers.append(more["powers"]) or tuned(*a, **more))
    do(ask(), Refit(2, balance=True), FineTune(steps=2, batch_size=8, lr=1e-3))
    assert powers == [{0: BALANCED, 1: BALANCED}]
    with pytest.raises(CodebookError, match="--codebook-update gradient lowers the mean error"):
        do(ask(force=True), Refit(2, balance=True), FineTune(steps=2, codebook_update="gradient"))


def test_ids_of_shards_add_up_to_those_of_the_pass(ask: Ask, tmp_path: Path) -> None:
    whole, parts = measure_model(ask(), Watch()), [tmp_path / f"{i}.safetensors" for i in (1, 2, 3)]
    for i, part in enumerate(parts, 1):
        measure_model(ask(), Watch(), part, (i, 3))
    merged = measure_model(replace(ask(), data=()), Watch(), merging=parts[::-1])
    assert whole.before is not None and whole.before.ids and whole.before.ids.unique == 4
    assert merged.before is not None and merged.before.ids == whole.before.ids


def test_a_refit_of_the_second_sees_what_the_refitted_first_leaves(ask: Ask, tmp_path: Path) -> None:
    result = do(ask(), Refit(2))
    # 0.1 and 0.7 leave -0.1 and 0.1 of each pixel; the old first codes would have left -0.1, 0, 0.3 and 0.5.
    assert sorted(firsts(result, 0)) == [0.1, 0.7] and sorted(firsts(result, 1)) == [-0.1, 0.1]
    assert result.surgery is not None and result.surgery.mse == pytest.approx(0, abs=1e-10)
    assert [use.size for use in result.surgery.codebooks] == [2, 2] and result.warnings == ()
    before, after = (stage.ids for stage in (result.before, result.surgery) if stage)
    items = 16 * result.surgery.images if result.surgery.images else 0
    assert before == IdUse(items, 4, 1 - 4 / items) and after is not None and (after.items, after.unique) == (items, 4)
    assert counts(ask(model=output_of(result)), tmp_path / "after.safetensors") == [[0.5, 0.5], [0.5, 0.5]]
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
    # So 0.2 has another id than was expected of it, and 0.0 too if its second code went with 0.2.
    assert after.changed == (0.25 if less == 0 else 0.5)
    # 0.6 was 0.3 + 0.3 and is 0.7 - 0.1, though 0.1 is nearer to 0.3; 0.8 was 0.3 + 0.5 and is 0.7 + 0.1. The pixels
    # 0.0 and 0.2 had code 0 and have one each: the lowest.
    assert second == [0, less, more, more]


def test_codebooks_of_one_size_stay_so_by_images_and_counts_and_under_a_prefix(ask: Ask, tmp_path: Path) -> None:
    asked, stats = ask(), tmp_path / "stats.safetensors"
    result, path = do(asked, Prune()), asked.source
    assert firsts(result, 0) == pytest.approx([0, 0.3, 9]) and firsts(result, 1) == pytest.approx([0, 0.3, 0.5])
    assert maps(result, "index_map") == [[0, 1, 2, REMOVED], [0, 1, 2, REMOVED]]
    said = "codebooks must be of one size that the config takes, 3: dead codes fill them up, 1 of quantizers.0.embed"
    assert [warning for warning in result.warnings if "one size" in warning] == [said]
    assert result.surgery is not None and result.before is not None and result.surgery.mse == result.before.mse
    assert [(use.size, use.used) for use in result.surgery.codebooks] == [(3, 2), (3, 3)]
    counts(asked, stats)
    by_counts = do(Request(path, stats=stats, output=tmp_path / "counted.safetensors"), Prune())
    assert all(torch.equal(written(by_counts)[key], written(result)[key]) for key in KEYS)
    assert maps(by_counts, "index_map") == maps(result, "index_map")
    assert by_counts.before is not None and [use.used for use in by_counts.before.codebooks] == [2, 3]
    # As Lightning does, with `model.`; the result has the file's names.
    save_file({f"model.net.{key}": tensor for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    prefixed = do(replace(asked, force=True), Prune())
    assert prefixed.surgery is not None and prefixed.surgery.mse == result.surgery.mse
    assert [use.key for use in prefixed.surgery.codebooks] == [f"model.net.{key}" for key in KEYS]


def test_a_codebook_that_was_not_chosen_by_its_key_stays_but_for_what_fills_it_up(ask: Ask) -> None:
    asked = ask(codebook_key=(KEYS[1],))
    result = do(asked, Refit(2))
    # The old first codes leave -0.1, 0, 0.3 and 0.5; and two codes are filled up to the four that the first one has.
    assert sorted(firsts(result, 1)[:2]) == [-0.05, 0.4] and firsts(result, 1)[2:] == [firsts(result, 1)[0]] * 2
    assert "2 of quantizers.1.embed" in " ".join(result.warnings)
    before, after = load_file(asked.source), written(result)
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("quantizers.1"))
    assert maps(result, "index_map") == [[REMOVED] * 4]  # of the second alone
    result = do(replace(asked, codebook_key=(KEYS[0],), force=True), Refit(2))
    assert sorted(firsts(result, 0)[:2]) == [0.1, 0.7] and len(firsts(result, 0)) == 4
    grown = do(ask((0.0, 0.3), (0.0, 0.4), codebook_key=(KEYS[0],), force=True), Grow(3))
    assert len(firsts(grown, 0)) == 3 and firsts(grown, 0)[:2] == pytest.approx([0, 0.3])
    assert firsts(grown, 1) == pytest.approx([0, 0.4, 0])
    assert [of[:2] for of in maps(grown, "index_map")] == [[0, 1], [0, 1]]


def test_merged_codes_of_the_second_weigh_what_the_merged_first_leaves(ask: Ask) -> None:
    result = do(ask((0.0, 0.3, 0.4, -9.0), (0.0, 0.3, -0.32)), Quantize(k=2, method="pnn"))
    # Of the first, 0.3 has the pixel 0.2, and 0.4 has 0.6 and 0.8; -9 has none, and weighs nothing.
    assert firsts(result, 0) == pytest.approx([0, 11 / 30], abs=1e-4)
    # That leaves 0, -1/6, 7/30 and 13/30: -0.32 has one of them, which was -0.1, and 0.0's.
    assert sorted(firsts(result, 1)) == pytest.approx([-0.16, 0.3], abs=1e-4)
    first, second = maps(result, "index_map")
    assert first == [0, 1, 1, 0] and second[0] == second[2] != second[1]


def test_a_restart_of_the_second_sees_what_the_restarted_first_leaves(ask: Ask) -> None:
    """The dead code of the first goes to 0.8 or to 0.2, and the other one of them is left to the second."""
    result = do(ask((0.0, 0.3, 0.6, 9.0), (0.05, 9.0)), Restart())
    moved = firsts(result, 0)[3]
    assert firsts(result, 0)[:3] == pytest.approx([0, 0.3, 0.6]) and moved in (0.2, 0.8)
    assert firsts(result, 1) == pytest.approx([0.05, {0.8: -0.1, 0.2: 0.2}[moved]], abs=1e-5)
    assert result.surgery is not None and result.surgery.mse == pytest.approx(3 / 4 * 0.05**2, rel=1e-4)
    assert maps(result, "index_map") == [[0, 1, 2, REMOVED], [0, REMOVED]]
    assert "one size" not in " ".join(result.warnings)  # they never had one


# --- fine-tuning
def model_of(asked: Request, **more: Any) -> Model:
    model = load_model(read_checkpoint(asked.source), network=asked.network, **more)
    model.input_range = (0.0, 1.0)
    return model


def tune(model: Model, hits: list[list[int]], **recipe: Any) -> FineTuned:
    pixels = np.array([[[0.0, 0.2], [0.6, 0.8]]], dtype=np.float32)
    images, counts = Images(array_items("grey.npy", pixels), channels=1), [torch.tensor(of) for of in hits]
    return finetune(model, images, images, FineTune(batch_size=1, **recipe), counts, seed=0, watch=Watch())


HALVES, HUNDREDTHS = (0.0, 0.5), (0.04, 0.24)


def test_one_step_of_both_moving_averages_is_the_one_worked_by_hand_and_only_chosen_codebooks_move(
    ask: Ask,
) -> None:
    model = model_of(ask(HALVES, HUNDREDTHS))
    tune(model, [[1, 1], [1, 1]], steps=1, train="none")
    # The first: 5% towards the means of 0, 0.2 and of 0.6, 0.8. That leaves 0, 0.1 and 0.2, 0.3 to the second's.
    torch.testing.assert_close(model.books[0].vectors[:, 0], torch.tensor([0.005, 0.51]))
    torch.testing.assert_close(model.books[1].vectors[:, 0], torch.tensor([0.0405, 0.2405]))
    for update in ("ema", "gradient"):
        model = model_of(ask(HALVES, HUNDREDTHS), codebook_keys=[KEYS[1]])
        tune(model, [[1, 1], [1, 1]], steps=2, train="none", codebook_update=update)
        assert model.books[0].vectors[:, 0].tolist() == [0, 0.5]
        assert model.books[1].vectors[0, 0] > 0.04 and model.books[1].vectors[1, 0] > 0.24


@torch.no_grad()
def latents_of(model: Model) -> tuple[Tensor, ...]:
    return model.pass_through(torch.tensor(PIXELS).reshape(1, 1, 2, 2)).latents


def test_the_decoder_alone_moves_no_latent_of_any_codebook(ask: Ask) -> None:
    """`between` shapes what the second codebook meets: it is of the encoder, though only the decoder's side uses it."""
    for train, trained in (("decoder", ["decoder.weight"]), ("all", ["between", "decoder.weight", "encoder.weight"])):
        model = model_of(ask(HALVES, HUNDREDTHS))
        before = latents_of(model)
        found = tune(model, [[1, 1], [1, 1]], steps=5, train=train, codebook_update="frozen", lr=0.01)
        assert list(found.trained) == trained
        same = [torch.equal(a, b) for a, b in zip(before, latents_of(model), strict=True)]
        assert same == [train == "decoder"] * 2
        assert model.network.get_parameter("decoder.weight").flatten()[0] != 1


def test_revived_codes_are_told_apart_by_codebook(ask: Ask) -> None:
    model = model_of(ask((0.0, 0.5, 9.0), (0.0, 0.1, 0.2)))
    found = tune(model, [[2, 2, 0], [1, 1, 2]], steps=12, train="none")
    assert found.best.step >= 10
    assert [codes.tolist() for codes in found.best.revived] == [[False, False, True], [False] * 3]
    assert found.trace[-1].revived == 1


def test_an_interrupted_fine_tuning_of_both_goes_on_to_the_same_bytes(ask: Ask, tmp_path: Path) -> None:
    recipe = FineTune(steps=20, batch_size=8, weight_ema=0.5)
    asked = [ask(output=tmp_path / name, resume=True) for name in ("a.safetensors", "b.safetensors")]
    whole = do(asked[0], Refit(2), recipe)
    with pytest.raises(BrokenError):
        operate("refit", asked[1], Refit(2), recipe, breaking_at(13))
    parts = do(asked[1], Refit(2), recipe)
    assert parts.trace == whole.trace
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_fine_tuning_is_written_and_the_second_meets_what_the_trained_first_leaves(ask: Ask, tmp_path: Path) -> None:
    asked = ask(HALVES, HUNDREDTHS)
    result = do(asked, None, FineTune(steps=20, batch_size=8, lr=1e-3))
    assert result.kept == "finetuned" and result.before and result.finetuned
    assert result.finetuned.mse < result.before.mse  # type: ignore[operator]
    old, new = load_file(asked.source), written(result)
    assert not any(torch.equal(old[key], new[key]) for key in (*KEYS, "encoder.weight", "decoder.weight"))
    again = measure_model(ask(model=output_of(result)), Watch())
    assert again.before == result.finetuned
    assert maps(result, "index_map") == maps(result, "nearest") == [[0, 1], [0, 1]]
    latents = torch.tensor(PIXELS)[:, None] * new["encoder.weight"].flatten()
    first = new[KEYS[0]]
    left = (latents - first[torch.cdist(latents, first).argmin(1)]) * new["between"]
    distortion = torch.cdist(left, new[KEYS[1]]).amin(1).square().mean()
    assert result.finetuned.codebooks[1].distortion == pytest.approx(float(distortion), rel=1e-3)


# --- the command line
def test_the_commands_tell_of_both_codebooks(ask: Ask, codebook: Run, tmp_path: Path) -> None:
    asked = ask()
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


def test_codes_that_a_fine_tuning_loses_are_warned_of(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that leaves one code of each book, and is said to be better."""

    def lose(model: Model, *_: object, **more: object) -> FineTuned:
        tensors = model.network.state_dict(), tuple(book.vectors for book in model.books)
        revived = tuple(torch.zeros(len(book.vectors), dtype=torch.bool) for book in model.books)
        for book in model.books:
            book.vectors = torch.full_like(book.vectors, 9.0)
        start, best = Kept(0, 1.0, *tensors, revived), Kept(1, 0.5, *tensors, revived)
        return FineTuned(start, best, (), (), ("encoder",), 0.1, "adam", "none", None)

    monkeypatch.setattr(pipeline, "finetune", lose)
    result = do(ask(), Refit(3), FineTune(steps=1))
    assert "fine-tuning lowered the error with 2 of 6 codes in use" in " ".join(result.warnings)
