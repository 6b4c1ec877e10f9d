"""What codes stand for: the patches at their ends, what they decode to, their neighbours; images and their tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Grey, Run, assert_refused
from sources_of_images import Images
from torch import Tensor, nn

from codebook_tools.data.images import array_items
from codebook_tools.evaluation.extreme_latents import lowest_of_each
from codebook_tools.evaluation.receptive_field import Place, patches, receptive_side
from codebook_tools.models.model import Model
from codebook_tools.report.html.codes import codes_page
from codebook_tools.report.html.page import html
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.code_cards import Codes, look_at_codes
from codebook_tools.workflows.request import Request

# A pixel is a latent: code 0 is black, 1 is grey, 2 is white, 3 is never chosen.
FIRSTS = [0.0, 0.5, 1.0, 5.0]
IMAGES = np.array([[[0.0, 0.1], [0.2, 0.38]], [[0.6, 0.5], [0.9, 1.0]], [[0.05, 0.55], [0.0, 0.8]]], dtype=np.float32)


@pytest.fixture
def looked(grey: Callable[..., Grey], tmp_path: Path) -> Callable[..., Codes]:
    made = grey(FIRSTS)
    np.save(tmp_path / "data.npy", IMAGES)
    np.save(tmp_path / "test.npy", IMAGES[:1] * 0.9)

    def look(top: int = 2, most: int = 8, sort: str = "share", batch: int = 2) -> Codes:
        request = Request(
            model=made.path,
            network=made.network,
            data=(str(tmp_path / "data.npy"),),
            test_data=(str(tmp_path / "test.npy"),),
            input_range=(0.0, 1.0),
            batch_size=batch,
        )
        return look_at_codes(request, top, most, sort, Watch())

    return look


def middles(patches: Tensor) -> list[float]:
    """The pixel in the middle of each."""
    return [round(float(patch[0, patch.shape[1] // 2, patch.shape[2] // 2]), 2) for patch in patches]


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_the_cards_are_those_worked_by_hand(looked: Callable[..., Codes], batch: int) -> None:
    found = looked(batch=batch)
    assert (found.size, found.used, found.side) == (4, 3, 1)
    black, grey, white, dead = (next(card for card in found.cards if card.code == code) for code in range(4))
    # black: 0, 0.1, 0.2, 0.05, 0; grey: 0.38, 0.6, 0.5, 0.55; white: 0.9, 1, 0.8
    assert [card.count for card in (black, grey, white, dead)] == [5, 4, 3, 0]
    assert black.share == pytest.approx(5 / 12)
    assert black.error == pytest.approx((0.01 + 0.04 + 0.0025) / 5, rel=1e-6) and dead.error is None
    assert (middles(black.typical), middles(black.unusual)) == ([0.0, 0.0], [0.2, 0.1])
    assert (middles(grey.typical), middles(grey.unusual)) == ([0.5, 0.55], [0.38, 0.6])
    assert (middles(white.typical), middles(white.unusual)) == ([1.0, 0.9], [0.8, 0.9])
    assert len(dead.typical) == len(dead.unusual) == 0
    assert (black.neighbours, dead.neighbours) == ((1, 2, 3), (2, 1, 0))
    assert grey.decoded is not None and grey.decoded.unique().tolist() == [0.5]
    assert dead.decoded is not None and dead.decoded.unique().tolist() == [1.0]  # clamped


@pytest.mark.parametrize(("sort", "order"), [("share", [0, 1, 2, 3]), ("error", [2, 0, 1, 3])])
def test_the_order_is_the_one_asked_for_and_dead_codes_come_last(
    looked: Callable[..., Codes], sort: str, order: list[int]
) -> None:
    assert [card.code for card in looked(sort=sort).cards] == order


def test_by_the_map_codes_that_are_alike_stand_together(looked: Callable[..., Codes]) -> None:
    assert [card.code for card in looked(sort="map").cards] in ([0, 1, 2, 3], [2, 1, 0, 3])


def test_as_many_codes_are_shown_as_are_asked_for(looked: Callable[..., Codes]) -> None:
    assert [(card.code, len(card.typical)) for card in looked(top=1, most=2).cards] == [(0, 1), (1, 1)]


def test_an_example_has_its_tokens_and_what_they_decode_to(looked: Callable[..., Codes]) -> None:
    (example,) = looked().examples
    assert example.tokens.tolist() == [[0, 0], [0, 1]]
    assert example.decoded[0].tolist() == [[0.0, 0.0], [0.0, 0.5]]


def test_the_page_shows_every_card(looked: Callable[..., Codes]) -> None:
    text = html(codes_page(looked(), "codebook codes"))
    assert "3 of 4 codes are used, 75.0% of the codebook." in text
    # The example's; three of each code in use; what the dead one decodes to.
    assert text.count("<img ") == 3 + 3 * 3 + 1
    assert "code 0: 41.67% of tokens (5), distortion 0.0105, closest codes 1, 2, 3" in text
    assert 'alt="what dead code 3 decodes to"' in text


def test_the_lowest_of_each_code_are_those_of_a_search() -> None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 20, (500,), generator=random)
    scores = torch.randint(0, 50, (500,), generator=random).double()
    expected = [
        i
        for code in range(20)
        for i in sorted((codes == code).nonzero()[:, 0].tolist(), key=lambda i: (float(scores[i]), i))[:7]
    ]
    assert lowest_of_each(codes, scores, 7).tolist() == expected
    assert lowest_of_each(codes[:0], scores[:0], 7).tolist() == []


# --- patches --------------------------------------------------------------------------------------------------------


def with_encoder(line: Callable[..., Model], encoder: nn.Module) -> Model:
    model = line([0.0, 1.0])
    model.network.encoder = encoder
    return model


@pytest.mark.parametrize(("kernel", "stride", "side"), [(1, 1, 1), (4, 4, 4), (5, 1, 5), (8, 4, 8)])
def test_a_patch_is_as_large_as_what_a_latent_depends_on(
    line: Callable[..., Model], kernel: int, stride: int, side: int
) -> None:
    convolution = nn.Conv2d(1, 2, kernel, stride, padding=(kernel - stride) // 2)
    nn.init.constant_(convolution.weight, 0.1)
    images = Images(array_items("grey.npy", np.random.default_rng(0).random((3, 32, 32), dtype=np.float32)), channels=1)
    assert abs((receptive_side(with_encoder(line, convolution), images) or 0) - side) <= 1


def test_patches_are_cut_around_their_places_and_images_go_on_beyond_their_edge() -> None:
    rows = np.arange(64, dtype=np.float32).reshape(1, 8, 8) / 255
    images = Images(array_items("grey.npy", rows), channels=1)
    (item,) = images.items
    # Latents of 2 × 2 pixels: that at (1, 2) is in rows 2 and 3, columns 4 and 5.
    middle, corner = patches(images, [Place(item, 1, 2), Place(item, 0, 0)], (4, 4), 4, 64)
    torch.testing.assert_close(middle[0], torch.from_numpy(rows[0, 1:5, 3:7]))
    torch.testing.assert_close(corner[0, 1:, 1:], torch.from_numpy(rows[0, :3, :3]))
    assert corner[0, 0].tolist() == corner[0, 1].tolist()
    (whole,) = patches(images, [Place(item, 0, 3)], (1, 16), None, 64)
    torch.testing.assert_close(whole[0], torch.from_numpy(rows[0]))


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_page_and_says_what_is_in_it(
    tiny: Path, images_folder: Path, codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("codes", tiny, "--data", images_folder, "--input-range", "-1,1")
    found = codebook(*options, "--json")
    assert found.exit_code == 0, found.stderr
    assert found.json["outputs"] == {"report": "tiny.codes.html"} and (tmp_path / "tiny.codes.html").exists()
    assert sum(code["share"] for code in found.json["codes"]) == pytest.approx(1.0)
    shown = codebook(*options, "--report", tmp_path / "other.html", "--top", 2)
    assert "to be seen in" in shown.stdout and (tmp_path / "other.html").exists()


@pytest.mark.parametrize(
    ("options", "message"), [(("--top", 0), "top=0 is below 1"), (("--most", 0), "most=0 is below 1")]
)
def test_nonsense_is_refused(options: tuple[object, ...], message: str, tiny: Path, codebook: Run) -> None:
    assert_refused(codebook("codes", tiny, *options), message)
