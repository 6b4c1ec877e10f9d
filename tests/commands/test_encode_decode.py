"""`encode` and `decode`: layouts and bytes of every format, parts that are the whole, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, assert_refused, contents
from image_models import write
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file
from tutorial_networks import two_levels

from codebook_tools.errors import CodebookError
from codebook_tools.evaluation import tokens as evaluation_tokens
from codebook_tools.evaluation.tokens import tokens_of
from codebook_tools.remapping.token_readers import integers, open_tokens
from codebook_tools.remapping.token_writers import writing_tokens
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_network

FORMATS = (".npy", ".safetensors", ".parquet", ".jsonl")
RANGE = ("--input-range", "-1,1")


@pytest.fixture
def encoded(codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path) -> Path:
    """A folder with the tokens of 60 images in every format; no image's first token is 0 by chance."""
    folder = tmp_path / "encoded"
    folder.mkdir()
    for ending in FORMATS:
        done = codebook("encode", tiny, "--data", images_folder, *RANGE, "-o", folder / f"tokens{ending}", "--json")
        assert done.exit_code == 0, done.stderr
        assert done.json["shape"] == [60, 4, 4] and done.json["tokens"] == 960 and done.json["items"] == 60
    return folder


def test_every_format_holds_the_same_tokens_and_names(
    encoded: Path, tiny: Path, image_tensor: torch.Tensor, images_folder: Path, codebook: Run
) -> None:
    model = open_network(Request(tiny))
    model.input_range = (-1, 1)
    (expected,) = tokens_of(model, image_tensor)
    names = sorted(path.relative_to(images_folder).as_posix() for path in images_folder.rglob("*.png"))
    array = np.load(encoded / "tokens.npy")
    assert array.dtype == np.int32 and np.array_equal(array, expected.numpy())
    np.save(encoded / "again.npy", array)
    assert (encoded / "again.npy").read_bytes() == (encoded / "tokens.npy").read_bytes()
    assert np.array_equal(load_file(encoded / "tokens.safetensors")["codes"], array)
    for beside in ("tokens.npy", "tokens.safetensors"):
        assert (encoded / f"{beside}.items.txt").read_text().splitlines() == names
    table = parquet.read_table(encoded / "tokens.parquet").to_pydict()
    lines = [json.loads(line) for line in (encoded / "tokens.jsonl").read_text().splitlines()]
    assert table["item"] == names == [line["item"] for line in lines]
    assert np.array_equal(table["codes"], array) and np.array_equal([line["codes"] for line in lines], array)
    assert len(contents(encoded)) == 4 + 2 + 1, "nothing else is left"
    before = contents(encoded)
    for ending in FORMATS:
        again = ("encode", tiny, "--data", images_folder, *RANGE, "-o", encoded / f"tokens{ending}")
        assert_refused(codebook(*again), "exists; --force replaces it")
        assert codebook(*again, "--force").exit_code == 0
    assert contents(encoded) == before


def test_the_table_says_how_to_go_back(codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path) -> None:
    done = codebook("encode", tiny, "--data", images_folder, *RANGE, "-o", tmp_path / "t.npy")
    assert f"codebook decode {tmp_path / 't.npy'} {tiny} --input-range=-1,1 -o FOLDER" in done.stdout
    assert "codes used" in done.stdout


@pytest.mark.parametrize("batch", [4, 50])  # 15 batches, or 2: fewer than shards
def test_shards_in_order_are_the_whole(
    batch: int, encoded: Path, codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    for i in (1, 2, 3):
        for ending in (".npy", ".jsonl"):
            shard = ("--shard", f"{i}/3", "--batch-size", batch, "-o", tmp_path / f"{i}{ending}")
            assert codebook("encode", tiny, "--data", images_folder, *RANGE, *shard).exit_code == 0
    parts = [np.load(tmp_path / f"{i}.npy") for i in (1, 2, 3)]
    assert min(map(len, parts)) >= 16
    assert np.array_equal(np.concatenate(parts), np.load(encoded / "tokens.npy"))
    for name in ("{}.jsonl", "{}.npy.items.txt"):
        joined = b"".join((tmp_path / name.format(i)).read_bytes() for i in (1, 2, 3))
        assert joined == (encoded / name.format("tokens")).read_bytes()
    shard = ("--limit", "2", "--shard", "3/3", "-o", tmp_path / "few.npy")
    assert_refused(codebook("encode", tiny, "--data", images_folder, *shard), "2 images make 2 shards at most")


def test_a_bad_image_is_left_out_of_array_and_names(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(images_folder, tmp_path / "data")
    (data / "a" / "000.png").write_bytes(b"no picture")
    for ending in (".npy", ".safetensors"):
        asked = ("encode", tiny, "--data", data, *RANGE, "-o", tmp_path / f"t{ending}")
        assert_refused(codebook(*asked), "--skip-bad goes on without it")
        assert not list(tmp_path.glob(f"t{ending}*")), "nothing is left, not even a partial file"
        done = codebook(*asked, "--skip-bad", "--json")
        assert done.json["shape"] == [59, 4, 4] and done.json["warnings"]
        assert (tmp_path / f"t{ending}.items.txt").read_text().split()[0] == "a/002.png"
    assert np.array_equal(np.load(tmp_path / "t.npy"), load_file(tmp_path / "t.safetensors")["codes"])


def test_an_interrupted_encoding_leaves_nothing(
    codebook: Run, tiny: Path, images_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tokens_of(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("codebook_tools.workflows.encode.tokens_of", interrupted)
    out = tmp_path / "out"
    out.mkdir()
    asked = ("encode", tiny, "--data", images_folder, *RANGE, "--batch-size", "20", "-o", out / "t.parquet")
    assert codebook(*asked).exit_code == 130
    assert contents(out) == {}


def test_levels_of_unlike_grids_go_into_lists_alone(codebook: Run, images_folder: Path, tmp_path: Path) -> None:
    model = write(two_levels(sizes=(16, 16)), tmp_path / "levels.safetensors")
    asked = ("encode", model, "--data", images_folder, *RANGE, "--limit", "8", "--json", "-o")
    refused = codebook(*asked, tmp_path / "t.npy")
    assert_refused(refused, "unlike grids, 2x2, 4x4, and an array holds one; write .parquet or .jsonl")
    assert not list(tmp_path.glob("t.npy*"))
    pictures = list[dict[str, bytes]]()
    for ending in (".parquet", ".jsonl"):
        done = codebook(*asked, tmp_path / f"t{ending}").json
        assert (done["shape"], done["grids"], done["levels"]) == (None, [[2, 2], [4, 4]], 2)
        assert done["tokens"] == 8 * 20
        back = codebook("decode", tmp_path / f"t{ending}", model, *RANGE, "-o", tmp_path / f"back{ending}")
        assert back.exit_code == 0, back.stderr
        pictures.append(contents(tmp_path / f"back{ending}"))
    assert pictures[0] == pictures[1] and len(pictures[0]) == 8


def test_every_format_decodes_to_the_reconstruction(
    encoded: Path, codebook: Run, tiny: Path, image_tensor: torch.Tensor, tmp_path: Path
) -> None:
    model = open_network(Request(tiny))
    model.input_range = (-1, 1)
    with torch.no_grad():
        expected = model.pass_through(image_tensor).media.clamp(0, 1)
    folders = list[dict[str, bytes]]()
    for ending in FORMATS:
        folder = tmp_path / f"back{ending}"
        done = codebook("decode", encoded / f"tokens{ending}", tiny, *RANGE, "-o", folder, "--json")
        assert done.exit_code == 0 and done.json["shape"] == [3, 16, 16], done.stderr
        folders.append(contents(folder))
    assert all(folder == folders[0] for folder in folders[1:])
    for i, name in enumerate(sorted(folders[0])):
        pixels = np.asarray(Image.open(tmp_path / "back.npy" / name), dtype=np.float32).transpose(2, 0, 1) / 255
        assert np.abs(pixels - expected[i].numpy()).max() <= 0.5 / 255 + 1e-5
    again = codebook("decode", encoded / "tokens.npy", tiny, *RANGE, "-o", tmp_path / "back.npy")
    assert_refused(again, "a folder of media is never replaced")


@pytest.mark.slow
def test_the_range_comes_from_the_file_or_is_warned_of(
    encoded: Path, codebook: Run, tiny: Path, tmp_path: Path
) -> None:
    kept = codebook("decode", encoded / "tokens.parquet", tiny, "-o", tmp_path / "a", "--json").json
    assert kept["settings"]["input_range"] == [-1, 1] and kept["warnings"] == []
    guessed = codebook("decode", encoded / "tokens.npy", tiny, "-o", tmp_path / "b", "--json").json
    assert any("give --input-range" in warning for warning in guessed["warnings"])


def test_tokens_that_are_not_the_models_are_refused(encoded: Path, codebook: Run, tiny: Path, tmp_path: Path) -> None:
    array = np.load(encoded / "tokens.npy")
    cases = {
        "beyond": (np.where(np.arange(60)[:, None, None] == 59, 10_000, array), "token 10000 of item 59"),
        "negative": (array - 10_000, "is not within 0 and"),
        "levels": (np.stack([array, array], 1), "are not this model's"),
        "flat": (array.reshape(60, 16), "are not this model's: it makes rows and columns"),
        "real": (array.astype(np.float32), "tokens are integers"),
        "none": (array[:0], "holds no token"),
        "no grid": (array[:, :0], "holds no token: its shape is (60, 0, 4)"),
    }
    before = set(tmp_path.iterdir())
    for name, (values, message) in cases.items():
        np.save(encoded / f"{name}.npy", values)
        asked = codebook("decode", encoded / f"{name}.npy", tiny, *RANGE, "-o", tmp_path / name)
        assert_refused(asked, message)
    (encoded / "tokens.npy.items.txt").write_text("one\n")
    asked = codebook("decode", encoded / "tokens.npy", tiny, *RANGE, "-o", tmp_path / "names")
    assert_refused(asked, "names 1 items")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 1 is no JSON"),
        ('{"item": "a"}', "line 1 is no"),
        ('{"item": "a", "codes": [[1, 2], [3]]}', "no grid of integers"),
        ('{"item": "a", "codes": [[1.5]]}', "no grid of integers"),
        ('{"item": "a", "codes": []}', "no grid of integers"),
    ],
)
def test_a_line_that_holds_no_tokens_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(CodebookError, match=message):
        [*open_tokens(path).batches(1, 8)]


def test_no_name_of_an_item_leads_out_of_the_folder(codebook: Run, tiny: Path, tmp_path: Path) -> None:
    grid = [[0] * 4] * 4
    names = ["../../x", "/etc/y.jpg", "a:b\\c", "d/e.png"]
    lines = [json.dumps({"item": name, "codes": grid}) for name in names]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    out = tmp_path / "deep" / "er"
    out.mkdir(parents=True)
    done = codebook("decode", tmp_path / "t.jsonl", tiny, *RANGE, "-o", out / "back")
    assert done.exit_code == 0, done.stderr
    assert sorted(contents(out / "back")) == ["a_b_c.png", "d/e.png", "etc/y.jpg.png", "x.png"]
    (tmp_path / "t.jsonl").write_text("\n".join([lines[0], json.dumps({"item": "x.png", "codes": grid})]))
    assert_refused(codebook("decode", tmp_path / "t.jsonl", tiny, *RANGE, "-o", out / "2"), "x.png is that of another")
    assert [path.name for path in out.iterdir()] == ["back"]


def test_integers_of_any_width_and_nothing_else() -> None:
    assert integers([[1, 2], [3, 4]], "x").shape == (2, 2)
    assert integers(3, "x").shape == ()
    with pytest.raises(CodebookError, match="x holds no grid"):
        integers([True, False], "x")


def test_the_encoder_runs_once_for_a_size_of_batch(
    encoded: Path, codebook: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens take the place of what it says: 60 items in batches of 25 are two sizes."""
    encodings = list[int]()
    real = evaluation_tokens.Model.encode_media
    monkeypatch.setattr(
        evaluation_tokens.Model, "encode_media", lambda model, media: encodings.append(len(media)) or real(model, media)
    )
    asked = ("decode", encoded / "tokens.npy", tiny, *RANGE, "--batch-size", "25", "-o", tmp_path / "back")
    assert codebook(*asked).exit_code == 0
    assert [n for n in encodings if n > 1] == [25, 10]


def test_a_modality_without_files_of_its_own_gets_one_array(
    encoded: Path,
    codebook: Run,
    tiny: Path,
    image_tensor: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("codebook_tools.data.images.Images.ending", None)
    asked = ("decode", encoded / "tokens.npy", tiny, *RANGE, "--batch-size", "25", "-o", tmp_path / "back")
    assert codebook(*asked).exit_code == 0
    model = open_network(Request(tiny))
    model.input_range = (-1, 1)
    with torch.no_grad():
        expected = model.pass_through(image_tensor).media.clamp(0, 1)
    assert np.allclose(np.load(tmp_path / "back" / "decoded.npy"), expected.numpy(), atol=1e-6)
    names = (tmp_path / "back" / "decoded.npy.items.txt").read_bytes()
    assert names == (encoded / "tokens.npy.items.txt").read_bytes() and len(contents(tmp_path / "back")) == 2


def test_a_failed_decoding_leaves_nothing(encoded: Path, codebook: Run, tiny: Path, tmp_path: Path) -> None:
    """The last of three batches holds a token that is no code."""
    array = np.load(encoded / "tokens.npy")
    array[-1] = 10_000
    np.save(encoded / "tokens.npy", array)
    asked = ("decode", encoded / "tokens.npy", tiny, *RANGE, "--batch-size", "20", "-o", tmp_path / "back")
    assert_refused(codebook(*asked), "token 10000 of item b/059.png is not within 0 and")
    assert not list(tmp_path.glob("back*"))


def test_rows_of_parquet_do_not_depend_on_batches(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 9, (2500, 3))
    for batch in (7, 2500):
        with writing_tokens(tmp_path / f"{batch}.parquet", 2500, {"a": "b"}, force=False) as writer:
            for start in range(0, 2500, batch):
                some = codes[start : start + batch]
                writer.add([str(start + i) for i in range(len(some))], [some])
    assert (tmp_path / "7.parquet").read_bytes() == (tmp_path / "2500.parquet").read_bytes()
    assert parquet.ParquetFile(tmp_path / "7.parquet").num_row_groups == 3
    assert open_tokens(tmp_path / "7.parquet").about == {"a": "b"}
