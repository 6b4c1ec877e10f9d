"""The part of an item that is drawn for a latent."""

from __future__ import annotations

import pytest
import torch

from codebook_tools.data.array_pictures import draw, lay_out, span


@pytest.mark.parametrize(
    ("shape", "grid", "position", "start", "part"),
    [
        ((64, 29), (16,), (8,), (24, 0), (20, 29)),  # (t, channels): 64 is 16 times 4, 29 is no multiple
        ((29, 64), (16,), (8,), (0, 24), (29, 20)),
        ((1, 256), (64,), (0,), (0, 0), (1, 12)),
        ((64, 32), (16,), (8,), (0, 12), (64, 10)),  # both are multiples: the last axis
        ((3, 50), (16,), (15,), (0, 41), (3, 9)),  # none is
        ((1, 8, 32, 32), (4, 8, 8), (3, 0, 4), (0, 2, 0, 8), (1, 6, 12, 20)),
        ((768,), (), (), (0,), (768,)),
        ((8,), (16,), (3,), (0,), (8,)),
    ],
)
def test_a_span_is_two_cells_to_each_side_along_the_axes_that_follow_the_grid(
    shape: tuple[int, ...],
    grid: tuple[int, ...],
    position: tuple[int, ...],
    start: tuple[int, ...],
    part: tuple[int, ...],
) -> None:
    numbered = torch.arange(torch.tensor(shape).prod()).reshape(shape)
    cut = span(numbered, position, grid)
    assert cut.shape == part and int(cut.flatten()[0]) == int(numbered[start])


def test_each_frame_of_a_clip_has_the_tokens_of_its_time() -> None:
    tokens = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])  # two times of 2 by 2
    laid_out = lay_out(tokens, (1, 4, 6, 6))
    assert laid_out.tolist() == [[1, 2, 1, 2, 5, 6, 5, 6], [3, 4, 3, 4, 7, 8, 7, 8]]
    assert draw(torch.rand(1, 4, 6, 6)).shape == (3, 6, 24)
    sixteen = lay_out(torch.arange(16).reshape(16, 1, 1), (1, 16, 6, 6))  # of which eight are drawn
    assert sixteen.tolist() == [[0, 2, 4, 6, 9, 11, 13, 15]]
    assert lay_out(tokens, (2, 2, 6, 6)).tolist()[0] == [1, 2, 5, 6, 1, 2, 5, 6]  # two channels, each of two frames
    assert lay_out(tokens, (3, 2, 6, 6)).tolist()[0] == [1, 2, 5, 6]
    assert lay_out(torch.arange(4), (64, 29)).tolist() == [[0, 1, 2, 3]]
    assert lay_out(torch.tensor(7), (768,)).tolist() == [[7]]
