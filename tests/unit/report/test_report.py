"""Pages: what they show, that they need nothing else, and that a browser shows them; and usage in a terminal."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from browsers import WIDTHS, beyond_the_page, browser  # noqa: F401  # a fixture
from conftest import Run, assert_refused, contents
from PIL import Image
from rich.console import Console

from codebook_tools.evaluation.figures import CodebookUse, Measurement
from codebook_tools.report.html.axes import plain_log_ticks
from codebook_tools.report.html.operate import books_plot, headline, operated_page, usage_plot
from codebook_tools.report.html.page import Gallery, Listing, Page, Picture, Plot, Table, html
from codebook_tools.report.terminal.histogram import UsageLines, bars
from codebook_tools.workflows.gallery import GalleryImage
from codebook_tools.workflows.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def measured(used: int, size: int, mse: float | None) -> Measurement:
    use = CodebookUse("codes", size, 4, 1000, used, used / size, used, float(used), 1.0, 0.1, 0.5, None)
    counts = torch.cat([torch.arange(1, used + 1), torch.zeros(size - used, dtype=torch.int64)])
    return Measurement("test", 10, mse, None, None, (use,), None, (counts,))


def result(**fields: Any) -> Result:
    plain = {"command": "refit", "model": "m.safetensors", "family": "zalando", "settings": {"k": 128}, "seed": 0}
    return Result(**{**plain, "warnings": (), "before": measured(85, 512, 0.01), "kept": "surgery", **fields})


def page() -> Page:
    def line(figure: Figure) -> None:
        figure.subplots().plot([1, 2], [3, 4])

    picture = Picture(torch.tensor([[[0.0, 1.0]], [[0.5, 0.0]], [[0.0, 0.0]]]), 'an image called "a<b>"', "0.01")
    parts = [
        Table("Figures", ("", "before"), (("used", "85"), ("mse", "0.01")), "a note", frozenset({1})),
        Plot("Curve", "it rises", [line], {"x": [1, 2], 'a "name", quoted': [3, 4]}),
        Gallery("Pictures", {"worst": [picture]}),
        Listing("Settings", {"k": "128"}),
    ]
    command = "codebook refit --k 128"
    return Page("a <script>alert(1)</script> model", "85 of 512 & no more", parts, command, ["something is odd"])


def test_a_page_asks_for_nothing_and_runs_nothing() -> None:
    text = html(page())
    assert "<script" not in text and "a &lt;script&gt;alert(1)&lt;/script&gt; model" in text
    asked = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", text) + re.findall(r"url\(([^)]*)\)", text)
    assert asked and all(link.startswith(("data:", "#")) for link in asked)
    assert "@import" not in text and 'alt="an image called &#34;a&lt;b&gt;&#34;"' in text
    assert html(page()) == text


def test_what_a_plot_shows_can_be_had_as_csv_and_a_picture_as_it_was() -> None:
    text = html(page())
    (figures,) = re.findall(r'href="data:text/csv;base64,([^"]*)"', text)
    rows = [*csv.reader(io.StringIO(b64decode(figures).decode()))]
    assert rows == [["x", 'a "name", quoted'], ["1", "3"], ["2", "4"]]
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    stored = Image.open(io.BytesIO(b64decode(picture)))
    assert [stored.getpixel((x, 0)) for x in range(stored.width)] == [(0, 128, 0), (255, 0, 0)]
    gray = Picture(torch.full((1, 2, 3), 0.2), "")
    assert Image.open(io.BytesIO(b64decode(gray.uri.partition(",")[2]))).size == (3, 2)


@pytest.mark.parametrize(("fields", "after"), [
    ({"surgery": measured(128, 128, 0.0056)}, "; now 128 of 128, and the error fell by 44%."),
    ({"surgery": measured(13, 128, 0.01005)}, "; now 13 of 128, and the error rose by 0.50%."),
    ({"surgery": measured(85, 85, 0.01)}, "; now 85 of 85, and no reconstruction changed in error."),
    ({"before": measured(85, 512, None), "surgery": measured(128, 128, None)}, "; now 128 of 128."),
    ({"kept": "before"}, "; nothing lowered the error, and the model was left as it is."), ({"kept": None}, "."),
])  # fmt: skip
def test_the_headline_says_what_came_out(fields: dict[str, Any], after: str) -> None:
    one = result(**fields)
    sentence = headline("m", one.before, one.kept_stage if one.kept else None)
    assert sentence == f"85 of 512 codes were used, 16.6% of the codebook{after}"


def test_the_figures_of_a_usage_plot_are_the_hits_in_falling_order() -> None:
    plot = usage_plot("usage", {"before": torch.tensor([0, 7, 2]), "after surgery": torch.tensor([3, 4])})
    columns = {name: [*column] for name, column in plot.columns.items()}
    assert columns == {"rank": [1, 2, 3], "before": [7, 2, 0], "after surgery": [4, 3, ""]}
    assert "before: 2 of 3, after surgery: 2 of 2" in plot.description


def test_the_page_of_a_surgery_has_its_stages_pictures_and_settings() -> None:
    original = torch.full((3, 8, 8), 0.5)
    shown = GalleryImage("a.png", "worst", original, {"before": original + 0.1, "surgery": original + 0.2})
    one = result(surgery=measured(128, 128, 0.0056), gallery=(shown,), warnings=("odd",))
    text = html(operated_page(one, "codebook refit m.safetensors --k 128"))
    for words in ("after surgery *", "85 of 512 (16.6%)", "a.png, after surgery", "mse 0.04000", "odd", "--k 128"):
        assert words in text


def test_of_several_codebooks_the_page_shows_how_many_codes_of_each_are_used() -> None:
    def of(*used: int) -> Measurement:
        books = [measured(n, 8, 0.01) for n in used]
        return replace(books[0], codebooks=tuple(book.codebooks[0] for book in books), counts=())

    plot = books_plot({"before": of(2, 4), "after surgery": of(8, 6)})
    assert plot.columns == {"codebook": ["codes", "codes"], "before": [0.25, 0.5], "after surgery": [1.0, 0.75]}
    text = html(operated_page(result(before=of(2, 4), surgery=of(8, 6)), ""))
    assert text.count("<svg ") == 1 and "6 of 16 codes were used, 37.5% of the codebook; now 14 of 16" in text


def test_columns_of_numbers_are_aligned_at_the_right_and_sentences_at_the_left() -> None:
    head = ("check", "verdict", "measured", "evidence")
    long = "442 of 512 codes are as an initialization drew them"
    table = Table("Checks", head, (("dead", "ok", "0.2", long), ("few", "not-checked", "–", "2 of 4 codes")))
    assert table.numeric == {2} and table.has_prose and not table.is_wide
    kept = Table(
        "Rows", ("", *"abcde"), (("refit", "0.1 ± 0.02", "85 of 512 (16.6%)", "1e-05", "1 to 3", "surgery 1/1"),)
    )
    assert kept.numeric == {1, 2, 3, 4} and kept.is_wide and not kept.has_prose


def test_a_log_axis_has_ticks_also_within_a_decade() -> None:
    from matplotlib.figure import Figure

    for low, high in ((0.031, 0.047), (0.4, 3.4), (1e-5, 1e-1)):
        axes = Figure().subplots()
        axes.semilogy([0, 1], [low, high])
        plain_log_ticks(axes.yaxis)
        bottom, top = axes.get_ylim()
        ticks = [tick for tick in axes.get_yticks() if bottom <= tick <= top]
        labels = axes.yaxis.get_major_formatter().format_ticks(ticks)
        assert len(ticks) >= 2 and [float(label) for label in labels] == pytest.approx(ticks)


# From the command line

OnImages = tuple[object, ...]


@pytest.fixture
def on_images(tiny: Path, images_folder: Path) -> OnImages:
    return (tiny, "--data", images_folder, "--input-range", "-1,1")


def test_a_surgery_writes_its_page_and_changes_nothing_else(
    on_images: OnImages, codebook: Run, tmp_path: Path, held_out_folder: Path
) -> None:
    """Of one test image, its error at each stage is the mse of that stage."""
    (tmp_path / "one").mkdir()
    image = sorted(held_out_folder.iterdir())[0]
    (tmp_path / "one" / image.name).write_bytes(image.read_bytes())
    refit = ("refit", *on_images, "--test-data", tmp_path / "one", "--k", 4, "--steps", 3, "--json")
    plain = codebook(*refit, "-o", tmp_path / "plain.safetensors").json
    done = codebook(*refit, "-o", tmp_path / "out.safetensors", "--report", tmp_path / "page.html").json
    assert done["outputs"]["report"] == str(tmp_path / "page.html")
    assert done["stages"] == plain["stages"] and done.keys() == plain.keys()
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    text = (tmp_path / "page.html").read_text()
    assert len(text) < 5_000_000 and text.count("<img ") > 3 * 4 and text.count("<svg ") == 1 + 4 + 1 + 1
    for words in ("Principal components of", "Items and their tokens", "4 of the 4 codes in use are drawn here"):
        assert words in text
    for stage, name in (("before", "before"), ("surgery", "after surgery"), ("finetuned", "after fine-tuning")):
        assert f"{name}, mse {done['stages'][stage]['mse']:.5f}" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("measure",),
        ("prune", "--threshold", 0, "-o", "out.safetensors"),
        ("refit", "--k", 4, "--steps", 2, "-o", "out.safetensors"),
        ("finetune", "--steps", 2, "-o", "out.safetensors"),
        ("diagnose",),
        ("codes",),
        ("map",),
        ("sweep", "--k", "2,4", "-o", "out"),
        ("compare", "--k", 4, "--steps", 2, "--seeds", 2, "-o", "out"),
        ("run", "recipe.yaml"),
    ],
    ids=lambda command: command[0],
)
def test_the_page_of_each_command_fits_a_screen_and_a_phone(
    command: tuple[object, ...],
    on_images: tuple[object, ...],
    codebook: Run,
    tmp_path: Path,
    monkeypatch: Any,
    browser: Any,  # noqa: F811
) -> None:
    monkeypatch.chdir(tmp_path)
    if command[0] == "run":
        model, _, data, *_ = on_images
        recipe = {"model": str(model), "data": str(data), "surgeries": ["prune", {"refit": {"k": 4, "steps": 2}}]}
        Path("recipe.yaml").write_text(json.dumps({**recipe, "input-range": "-1,1"}))
        on_images = ()
    done = codebook(command[0], *on_images, *command[1:], "--report", "page.html")
    assert done.exit_code in (0, 3), done.stderr
    text = (tmp_path / "page.html").read_text()
    assert f"<h1>codebook {command[0]}: " in text and len(text) < 5_000_000
    assert "<dt>code</dt> <dd>a row of the codebook, or its index</dd>" in text
    if command[0] == "measure":
        assert text.count("reconstructed, mse ") == 3 and "the state that the file holds" not in text
    assert beyond_the_page(browser, tmp_path / "page.html") == {width: [] for width in WIDTHS}


def test_the_command_to_repeat_has_no_quiet(
    on_images: tuple[object, ...], codebook: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "page.html"
    command = ("measure", *on_images, "--quiet", "--report", path)
    monkeypatch.setattr(sys, "argv", ["codebook", *map(str, command)])
    assert codebook(*command).exit_code == 0
    (repeated,) = re.findall("<pre>(.*?)</pre>", path.read_text())
    assert repeated == " ".join(["codebook", *(str(word) for word in command if word != "--quiet")])


@pytest.mark.parametrize(("name", "message"), [
    ("model.safetensors", "a page ends in .html; what is not one is never replaced"),
    ("nowhere/page.html", "no such folder"), ("folder.html", "a folder"),
])  # fmt: skip
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_done(
    name: str, message: str, on_images: OnImages, codebook: Run, tmp_path: Path
) -> None:
    (tmp_path / "folder.html").mkdir()
    before = contents(tmp_path)
    assert_refused(codebook("refit", *on_images, "--k", 4, "--report", tmp_path / name), message)
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "width", "scripts"), [("light", 1200, True), ("dark", 390, True), ("light", 390, False)]
)
def test_a_browser_shows_a_page(browser: Any, tmp_path: Path, scheme: str, width: int, scripts: bool) -> None:  # noqa: F811
    original = torch.rand(3, 32, 32)
    stages = dict.fromkeys(("before", "surgery"), original * 0.9)
    shown = tuple(GalleryImage(f"{rank}.png", rank, original, stages) for rank in ("worst", "median", "best"))
    one = result(surgery=measured(128, 128, 0.0056), gallery=shown, settings={"a": "b" * 300})
    path = tmp_path / "page.html"
    path.write_text(html(operated_page(one, "codebook refit")))
    view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=scripts)
    messages, requests = list[str](), list[str]()
    view.on("console", lambda message: messages.append(message.text))
    view.on("pageerror", lambda error: messages.append(str(error)))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(path.as_uri())
    assert view.locator("table").first.is_visible() and view.locator("svg").first.is_visible()
    assert messages == [] and all(url.startswith(("file:", "data:")) for url in requests)
    if scripts:
        sizes = view.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
        assert len(sizes) == 9 and all(sizes)
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        paper = view.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
    view.close()


@pytest.mark.parametrize(
    ("counts", "width", "expected"),
    [([0, 255, 0, 15], 4, "█▅"), ([3, 1, 0, 0], 2, "█"), ([1] * 10, 5, "█████"), ([0, 0], 2, ""), ([7], 5, "█")],
)
def test_the_most_used_stand_first_and_dead_ones_leave_nothing(counts: list[int], width: int, expected: str) -> None:
    """log(1 + 15) is half of log(1 + 255): the fifth of eight heights."""
    assert bars(torch.tensor(counts), width, "▁▂▃▄▅▆▇█") == expected


@pytest.mark.parametrize(("encoding", "mark"), [("utf-8", "█"), ("ascii", "%")])
def test_a_console_without_blocks_has_plain_letters(encoding: str, mark: str) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=40)
    console.print(UsageLines({"before": torch.tensor([5, 0]), "after surgery": torch.ones(200)}))
    file.seek(0)
    assert file.read().splitlines() == [f"before         {mark}", f"after surgery  {mark * 25}"]
