"""Robustness: which tokens are swapped, for which codes, and the error after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from audio_codecs import CASES, save, waveforms
from torch import Tensor

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.codebook import Codebook
from codebook_tools.data.images import Images
from codebook_tools.data.items import find_items
from codebook_tools.data.sampling import sample_keys
from codebook_tools.evaluation.one_pass import Batch
from codebook_tools.evaluation.quoted.figure import open_figures
from codebook_tools.evaluation.quoted.robustness import NEAR, SHARE, Robustness, neighbors, swapped
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_network


def codebook(rows: Tensor) -> Codebook:
    return Codebook(rows.float())


def test_a_token_may_be_swapped_for_the_ten_codes_nearest_to_its_own() -> None:
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    near = neighbors(codebook(rows))
    distances = torch.cdist(rows.double(), rows.double()).fill_diagonal_(torch.inf)
    assert near.shape == (40, NEAR)
    assert torch.equal(near.sort(1).values, distances.topk(NEAR, largest=False).indices.sort(1).values)


def test_of_few_codes_all_others_are_near_and_of_one_none() -> None:
    assert neighbors(codebook(torch.tensor([[0.0], [1.0], [5.0]]))).tolist() == [[1, 2], [0, 2], [1, 0]]
    near = neighbors(codebook(torch.zeros(1, 1)))
    assert near.shape == (1, 0)
    codes = torch.zeros(2, 3, dtype=torch.int64)
    assert torch.equal(swapped(codes, near, np.arange(6, dtype=np.uint64)), codes)


def test_equal_codes_are_near_each_other_and_no_code_is_near_itself() -> None:
    near = neighbors(codebook(torch.cat([torch.zeros(30, 2), torch.ones(1, 2)])))
    assert near.shape == (31, NEAR) and not bool((near == torch.arange(31)[:, None]).any())
    assert bool((near[:30] < 30).all())


def test_a_tenth_of_the_tokens_are_swapped_each_choice_as_often() -> None:
    codes = torch.zeros(200, 500, dtype=torch.int64)
    near = torch.arange(1, NEAR + 1).expand(5, NEAR)
    after = swapped(codes, near, sample_keys(np.arange(200, dtype=np.uint64), 500, seed=3))
    share = float((after != 0).double().mean())
    assert share == pytest.approx(SHARE, abs=0.004)  # four standard deviations
    counts = torch.bincount(after[after != 0], minlength=NEAR + 1)[1:].double()
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 27.9  # chi-squared of 9 degrees, p = 0.001


def test_swaps_do_not_depend_on_batches() -> None:
    names, near = np.arange(8, dtype=np.uint64), torch.arange(1, 5).expand(9, 4)
    codes = torch.randint(0, 9, (8, 4, 4), generator=torch.Generator().manual_seed(0))
    whole = swapped(codes, near, sample_keys(names, 16, 0))
    parts = [swapped(codes[some], near, sample_keys(names[some], 16, 0)) for some in (slice(0, 3), slice(3, 8))]
    assert torch.equal(whole, torch.cat(parts)) and not torch.equal(whole, codes)


def robustness_of(model: Model, media: Tensor) -> tuple[Robustness, Batch]:
    (figure,) = open_figures({"robustness": None}, Images(size=16, channels=3), torch.device("cpu"), 0)
    assert isinstance(figure, Robustness)
    done = model.pass_through(media)
    figure.begin(model)
    return figure, Batch(np.arange(len(media), dtype=np.uint64), [], [], (media, done.media), done.stages)


def test_the_error_is_that_of_the_decoded_tokens(tiny: Path, images_folder: Path) -> None:
    model = load_model(read_checkpoint(tiny))
    modality = Images(size=16, channels=3)
    items = find_items([images_folder], modality)[:30]
    media = torch.stack([torch.tensor(item.decode()) / 255 for item in items]).float()
    figure, batch = robustness_of(model, media)
    with torch.no_grad():
        near = neighbors(model.books[0].codebook)
        codes = swapped(batch.stages[0], near, sample_keys(batch.items, batch.stages[0][0].numel(), 0))
        decoded = model.network.decode(model.books[0].codebook.emitted[codes].movedim(-1, 1))
    low, high = model.input_range
    by_hand = float((((decoded - low) / (high - low)).clamp(0, 1) - media).double().square().mean())
    assert figure.tally(batch, model).value == pytest.approx(by_hand, rel=1e-5)
    assert not torch.equal(codes, batch.stages[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encodec", "encodec, chunks", "dac", "mimi", "xcodec"])
def test_tokens_of_all_quantizer_stages_are_swapped_and_none_is_chosen_anew(name: str, tmp_path: Path) -> None:
    model = open_network(Request(save(CASES[name], tmp_path / "model")))
    media = waveforms(model.network)
    figure, batch = robustness_of(model, media)
    assert len(batch.stages) == CASES[name].quantisers
    figure._near = [torch.empty(16, 0, dtype=torch.int64)] * len(batch.stages)  # without swaps it is the plain error
    assert batch.media is not None
    plain = float((batch.media[1] - media).double().square().mean())
    unswapped = figure.tally(batch, model).value
    assert unswapped == pytest.approx(plain, rel=1e-5)
    figure.begin(model)
    assert figure.tally(batch, model).value != unswapped
