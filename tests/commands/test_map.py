"""The map: one projection for latents, codes and centroids, its page and its files."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from browsers import browser  # noqa: F401  # a fixture
from conftest import Grey, Run, assert_refused

from codebook_tools.report.html.map import map_plot, mapped_page
from codebook_tools.report.html.page import html
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows import latent_map
from codebook_tools.workflows.latent_map import Map, look_at_map, principal
from codebook_tools.workflows.request import Request


@pytest.fixture
def without_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_map, "find_spec", lambda name: None)


@pytest.fixture
def looked(grey: Callable[..., Grey], tmp_path: Path, without_umap: None) -> Callable[..., Map]:
    """Pixels are latents: black, grey and white ones, a code at each, and one that is never chosen."""
    made = grey([0.0, 0.5, 1.0, 5.0])
    pixels = np.random.default_rng(0).choice([0.0, 0.1, 0.5, 0.6, 1.0], (12, 4, 4)).astype(np.float32)
    np.save(tmp_path / "data.npy", pixels)

    def look(k: int | None = None) -> Map:
        request = Request(
            model=made.path, network=made.network, data=(str(tmp_path / "data.npy"),), input_range=(0.0, 1.0)
        )
        return look_at_map(request, k, "umap", Watch())

    return look


def test_one_projection_shows_all(looked: Callable[..., Map]) -> None:
    """The latents' only direction is that of brightness: distances along it are those of the vectors."""
    found = looked()
    assert (found.method, found.size, found.used, found.k) == ("pca", 4, 3, 3)
    along = found.codes[:, 0] - found.codes[0, 0]
    assert (along * along[1].sign()).tolist() == pytest.approx([0.0, 0.5, 1.0, 5.0], abs=1e-5)
    assert found.latents[:, 1].abs().max() < 1e-5
    for latent, code, patch in zip(found.latents, found.chosen, found.patches, strict=True):
        value = float((latent[0] - found.codes[0, 0]) * along[1].sign())
        assert value == pytest.approx(float(patch.mean()), abs=1e-5)
        assert abs(value - [0.0, 0.5, 1.0][int(code)]) < 0.26
    assert looked(2).k == 2 and len(looked(2).centroids) == 2


def test_the_coverage_is_that_of_a_measurement(looked: Callable[..., Map], codebook: Run, tmp_path: Path) -> None:
    options = ("--network", f"{tmp_path / 'grey.py'}:make", "--data", tmp_path / "data.npy", "--input-range", "0,1")
    found = codebook("measure", tmp_path / "grey.safetensors", *options, "--json")
    assert looked().coverage == found.json["stages"]["before"]["codebooks"][0]["coverage"]


def test_principal_components_are_those_of_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0)
    others = torch.randn(10, 6)
    theirs, ours = PCA(2).fit(rows.numpy()).transform(others.numpy()), principal(rows)(others)
    np.testing.assert_allclose(np.abs(ours.numpy()), np.abs(theirs), rtol=1e-4)
    assert principal(torch.zeros(3, 1))(torch.ones(2, 1)).shape == (2, 2)


def test_the_places_of_the_page_are_where_the_points_are_drawn(looked: Callable[..., Map]) -> None:
    found = looked()
    hover = map_plot(found).hover
    assert hover is not None
    (figure_of,) = map_plot(found).svgs
    assert figure_of.count("<use ") >= len(found.latents)
    # From left and top: the brightest latent and the darkest are as far apart as a fifth of the axes.
    spread = float(hover.places[:, 0].max() - hover.places[:, 0].min())
    assert spread == pytest.approx(0.87 / 5.0 / 1.06, rel=0.01)
    text = html(mapped_page(found, "codebook map"))
    (told,) = re.findall(r'<script type="application/json">(.*?)</script>', text, re.S)
    assert len(json.loads(told)["places"]) == len(json.loads(told)["labels"]) == len(found.latents)
    assert "3 of 4 codes are used" in text and b64decode(re.findall(r"image/webp;base64,([^)]*)\)", text)[0])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_map_by_umap(tiny: Path, images_folder: Path) -> None:
    request = Request(model=tiny, data=(str(images_folder),), input_range=(-1.0, 1.0))
    first, second = (look_at_map(request, 4, "umap", Watch()) for _ in range(2))
    assert first.method == "umap" and torch.equal(first.latents, second.latents)
    assert torch.equal(first.codes, second.codes) and len(first.codes) == first.size
    assert bool(torch.isfinite(torch.cat([first.latents, first.codes, first.centroids])).all())


def test_the_command_writes_a_page_and_pictures_and_a_table(
    tiny: Path, images_folder: Path, codebook: Run, tmp_path: Path, without_umap: None
) -> None:
    assert_refused(codebook("map", tiny, "--k", 0), "k=0 is below 1")
    options = ("map", tiny, "--data", images_folder, "--input-range", "-1,1")
    found = codebook(*options, "--report", tmp_path / "here.html", "--json")
    assert found.exit_code == 0, found.stderr
    assert any("pip install umap-learn" in warning for warning in found.json["warnings"])
    outputs = {"report": "html", "png": "png", "svg": "svg", "parquet": "parquet"}
    assert found.json["outputs"] == {name: str(tmp_path / f"here.{ending}") for name, ending in outputs.items()}
    table = pyarrow.parquet.read_table(tmp_path / "here.parquet").to_pydict()
    assert {*table} == {"kind", "x", "y", "code", "image", "row", "column"}
    assert table["kind"].count("code") == found.json["size"] and table["kind"].count("centroid") == found.json["k"]
    latents = [i for i, kind in enumerate(table["kind"]) if kind == "latent"]
    assert all(table[name][i] is not None for name in ("code", "image", "row", "column") for i in latents)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "touch"), [(1000, False), (390, True)])
def test_a_browser_shows_the_patch_under_the_pointer(
    browser: Any,  # noqa: F811
    looked: Callable[..., Map],
    tmp_path: Path,
    width: int,
    touch: bool,
) -> None:
    found = looked()
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
    shown = view.locator(".tip span").inner_text()
    assert shown in {label for label, place in zip(hover.labels, hover.places, strict=True) if abs(place[0] - x) < 1e-3}
    view.close()
