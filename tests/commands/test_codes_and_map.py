"""What codes stand for: the patches at their ends, what they decode to, their neighbours; and where they lie on a map,
one projection for latents, codes and centroids."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from browsers import browser  # noqa: F401  # a fixture
from conftest import Grey, Run, assert_refused
from sources_of_images import Images
from torch import Tensor, nn

from codebook_tools.data.images import array_items
from codebook_tools.evaluation.extreme_latents import lowest_of_each
from codebook_tools.evaluation.receptive_field import Place, patches, receptive_side
from codebook_tools.models.model import Model
from codebook_tools.report.html.codes import codes_page
from codebook_tools.report.html.map import _ON_PAGE, draw_map, map_plot, mapped_page
from codebook_tools.report.html.page import STYLE, html
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows import latent_map
from codebook_tools.workflows.code_cards import Codes, look_at_codes
from codebook_tools.workflows.latent_map import Map, look_at_map, principal
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
        data, test_data = ((str(tmp_path / f"{name}.npy"),) for name in ("data", "test"))
        asked = {"network": made.network, "input_range": (0.0, 1.0), "batch_size": batch}
        return look_at_codes(Request(made.path, data, test_data, **asked), top, most, sort, Watch())

    return look


def middles(patches: Tensor) -> list[float]:
    """The pixel in the middle of each."""
    return [round(float(patch[0, patch.shape[1] // 2, patch.shape[2] // 2]), 2) for patch in patches]


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_the_cards_the_example_and_the_page_are_those_worked_by_hand(looked: Callable[..., Codes], batch: int) -> None:
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
    (example,) = found.examples
    assert example.tokens.tolist() == [[0, 0], [0, 1]]
    assert example.decoded[0].tolist() == [[0.0, 0.0], [0.0, 0.5]]
    text = html(codes_page(found, "codebook codes"))
    assert "3 of 4 codes are used, 75.0% of the codebook." in text
    # The example's; three of each code in use; what the dead one decodes to.
    assert text.count("<img ") == 3 + 3 * 3 + 1
    assert "code 0: 41.67% of tokens (5), distortion 0.0105, closest codes 1, 2, 3" in text
    assert 'alt="what dead code 3 decodes to"' in text


def test_codes_come_in_the_order_and_number_asked_for_and_dead_ones_last(looked: Callable[..., Codes]) -> None:
    orders = {sort: [card.code for card in looked(sort=sort).cards] for sort in ("share", "error", "map")}
    assert orders["share"] == [0, 1, 2, 3] and orders["error"] == [2, 0, 1, 3]
    assert orders["map"] in ([0, 1, 2, 3], [2, 1, 0, 3]), "those that are alike stand together"
    assert [(card.code, len(card.typical)) for card in looked(top=1, most=2).cards] == [(0, 1), (1, 1)]


def test_the_lowest_of_each_code_are_those_of_a_search() -> None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 20, (500,), generator=random)
    scores = torch.randint(0, 50, (500,), generator=random).double()
    order = sorted(range(500), key=lambda i: (int(codes[i]), float(scores[i]), i))
    expected = [i for code in range(20) for i in [j for j in order if codes[j] == code][:7]]
    assert lowest_of_each(codes, scores, 7).tolist() == expected
    assert lowest_of_each(codes[:0], scores[:0], 7).tolist() == []


# --- patches
@pytest.mark.parametrize(("kernel", "stride", "side"), [(1, 1, 1), (4, 4, 4), (5, 1, 5), (8, 4, 8)])
def test_a_patch_is_what_a_latent_depends_on(line: Callable[..., Model], kernel: int, stride: int, side: int) -> None:
    model, convolution = line([0.0, 1.0]), nn.Conv2d(1, 2, kernel, stride, padding=(kernel - stride) // 2)
    nn.init.constant_(convolution.weight, 0.1)
    model.network.encoder = convolution
    images = Images(array_items("grey.npy", np.random.default_rng(0).random((3, 32, 32), dtype=np.float32)), channels=1)
    assert abs((receptive_side(model, images) or 0) - side) <= 1


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


def test_codes_writes_a_page_and_says_what_is_in_it(
    tiny: Path, images_folder: Path, codebook: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("top", "most"):
        assert_refused(codebook("codes", tiny, f"--{name}", 0), f"{name}=0 is below 1")
    options = ("codes", tiny, "--data", images_folder, "--input-range", "-1,1")
    found = codebook(*options, "--json")
    assert found.exit_code == 0, found.stderr
    assert found.json["outputs"] == {"report": "tiny.codes.html"} and (tmp_path / "tiny.codes.html").exists()
    assert sum(code["share"] for code in found.json["codes"]) == pytest.approx(1.0)
    shown = codebook(*options, "--report", tmp_path / "other.html", "--top", 2)
    assert "to be seen in" in shown.stdout and (tmp_path / "other.html").exists()


# --- the map
@pytest.fixture
def without_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_map, "find_spec", lambda name: None)


@pytest.fixture
def mapped(grey: Callable[..., Grey], tmp_path: Path, without_umap: None) -> Callable[..., Map]:
    """Pixels are latents: black, grey and white ones, a code at each, and one that is never chosen."""
    made, data = grey(FIRSTS), tmp_path / "data.npy"
    np.save(data, np.random.default_rng(0).choice([0.0, 0.1, 0.5, 0.6, 1.0], (12, 4, 4)).astype(np.float32))
    request = Request(made.path, (str(data),), network=made.network, input_range=(0.0, 1.0))
    return lambda k=None: look_at_map(request, k, "umap", Watch())


def test_one_projection_shows_all_and_the_coverage_is_that_of_a_measurement(
    mapped: Callable[..., Map], codebook: Run, tmp_path: Path
) -> None:
    """The latents' only direction is that of brightness: distances along it are those of the vectors."""
    found = mapped()
    assert (found.method, found.size, found.used, found.k) == ("pca", 4, 3, 3)
    along = found.codes[:, 0] - found.codes[0, 0]
    assert (along * along[1].sign()).tolist() == pytest.approx([0.0, 0.5, 1.0, 5.0], abs=1e-5)
    assert found.latents[:, 1].abs().max() < 1e-5
    for latent, code, patch in zip(found.latents, found.chosen, found.patches, strict=True):
        value = float((latent[0] - found.codes[0, 0]) * along[1].sign())
        assert value == pytest.approx(float(patch.mean()), abs=1e-5)
        assert abs(value - FIRSTS[int(code)]) < 0.26
    assert mapped(2).k == 2 and len(mapped(2).centroids) == 2
    options = ("--network", f"{tmp_path / 'grey.py'}:make", "--data", tmp_path / "data.npy", "--input-range", "0,1")
    measured = codebook("measure", tmp_path / "grey.safetensors", *options, "--json")
    assert found.coverage == measured.json["stages"]["before"]["codebooks"][0]["coverage"]


def test_of_many_codes_some_are_drawn_and_the_page_says_so(
    mapped: Callable[..., Map], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mapped()
    monkeypatch.setattr(latent_map, "CODES", 2)
    part = mapped()
    assert (part.size, part.used, part.k, part.indices.tolist()) == (4, 3, 2, [0, 2])
    assert torch.equal(part.codes, whole.codes[[0, 2]])
    plot = map_plot(part)
    assert "2 of 4 codes are drawn" in plot.note and "4 codes" not in plot.title and len(plot.svgs) == 1


def test_principal_components_are_those_of_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0)
    others = torch.randn(10, 6)
    theirs, ours = PCA(2).fit(rows.numpy()).transform(others.numpy()), principal(rows)(others)
    np.testing.assert_allclose(np.abs(ours.numpy()), np.abs(theirs), rtol=1e-4)
    assert principal(torch.zeros(3, 1))(torch.ones(2, 1)).shape == (2, 2)


@pytest.mark.parametrize("scale", [1e-4, 0.03, 30, 4e4])
def test_labels_of_the_axes_lie_within_the_map(mapped: Callable[..., Map], scale: float) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    first = mapped()
    scaled = {name: getattr(first, name) * scale - scale / 2 for name in ("latents", "centroids", "codes")}
    for points in scaled.values():
        points[:, 1] = points[:, 0]
    figure = Figure(_ON_PAGE)
    with matplotlib.rc_context(STYLE):
        draw_map(replace(first, **scaled), figure)
        figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [axis.label.get_window_extent() for axis in (axes.xaxis, axes.yaxis)]
    assert min(min(box.x0, box.y0) for box in boxes) >= 0


def test_the_places_of_the_page_are_where_the_points_are_drawn(mapped: Callable[..., Map]) -> None:
    found = mapped()
    plot = map_plot(found)
    hover = plot.hover
    assert hover is not None and sum(svg.count("<use ") for svg in plot.svgs) >= len(found.latents)
    # From left and top: the brightest latent and the darkest are as far apart as a fifth of the axes.
    spread = float(hover.places[:, 0].max() - hover.places[:, 0].min())
    assert spread == pytest.approx(0.83 / 5.0 / 1.06, rel=0.01)
    text = html(mapped_page(found, "codebook map"))
    (script,) = re.findall(r'<script type="application/json">(.*?)</script>', text, re.S)
    assert len(json.loads(script)["places"]) == len(json.loads(script)["labels"]) == len(found.latents)
    assert "3 of 4 codes are used" in text and b64decode(re.findall(r"image/webp;base64,([^)]*)\)", text)[0])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_map_by_umap(tiny: Path, images_folder: Path) -> None:
    request = Request(model=tiny, data=(str(images_folder),), input_range=(-1.0, 1.0))
    first, second = (look_at_map(request, 4, "umap", Watch()) for _ in range(2))
    assert first.method == "umap" and torch.equal(first.latents, second.latents)
    assert torch.equal(first.codes, second.codes) and len(first.codes) == first.size
    assert bool(torch.isfinite(torch.cat([first.latents, first.codes, first.centroids])).all())


def test_map_writes_page_pictures_and_table(tiny: Path, images_folder: Path, codebook: Run, without_umap: None) -> None:
    assert_refused(codebook("map", tiny, "--k", 0), "k=0 is below 1")
    options = ("map", tiny, "--data", images_folder, "--input-range", "-1,1")
    found = codebook(*options, "--report", tiny.parent / "here.html", "--json")
    assert found.exit_code == 0, found.stderr
    assert any("pip install umap-learn" in warning for warning in found.json["warnings"])
    outputs = {"report": "html", "png": "png", "svg": "svg", "parquet": "parquet"}
    assert found.json["outputs"] == {name: str(tiny.parent / f"here.{ending}") for name, ending in outputs.items()}
    table = pyarrow.parquet.read_table(tiny.parent / "here.parquet").to_pydict()
    assert {*table} == {"kind", "x", "y", "code", "image", "row", "column"}
    assert table["kind"].count("code") == found.json["size"] and table["kind"].count("centroid") == found.json["k"]
    latents = [i for i, kind in enumerate(table["kind"]) if kind == "latent"]
    assert all(table[name][i] is not None for name in ("code", "image", "row", "column") for i in latents)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "touch"), [(1000, False), (390, True)])
def test_a_browser_shows_the_patch_under_the_pointer(
    browser: Any, mapped: Callable[..., Map], tmp_path: Path, width: int, touch: bool,  # noqa: F811
) -> None:  # fmt: skip
    found = mapped()
    path = tmp_path / "map.html"
    path.write_text(html(mapped_page(found, "codebook map")))
    view = browser.new_page(viewport={"width": width, "height": 900}, has_touch=touch)
    said = list[str]()
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.goto(path.as_uri())
    assert not view.locator(".tip").is_visible()
    box = view.locator(".hovered svg").bounding_box()
    hover = map_plot(found).hover
    assert hover is not None
    x, y = hover.places[0].tolist()
    (view.touchscreen.tap if touch else view.mouse.move)(box["x"] + x * box["width"], box["y"] + y * box["height"])
    assert view.locator(".tip").is_visible() and said == []
    label = view.locator(".tip span").inner_text()
    assert label in {of for of, place in zip(hover.labels, hover.places, strict=True) if abs(place[0] - x) < 1e-3}
    view.close()
