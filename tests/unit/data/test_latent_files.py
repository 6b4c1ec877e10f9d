"""Latents from files: every format and dtype gives the same rows, and a row's name alone decides where it goes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from codebook_tools.data.latent_files import FileLatents, limited_latents, open_latents, split_latents
from codebook_tools.data.sampling import mixed
from codebook_tools.errors import CodebookError

DIM = 3
ROWS = torch.randn(200, DIM, generator=torch.Generator().manual_seed(0))
DTYPES = {".npy": (torch.float16, torch.float32, torch.float64),
          ".safetensors": (torch.bfloat16, torch.float32, torch.float64)}  # fmt: skip
Write = Callable[..., Path]
of_both_formats = pytest.mark.parametrize("ending", DTYPES)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write("a.npy", rows): a file of latents, of the format that its name says."""

    def save(name: str, rows: Tensor = ROWS) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, rows.numpy())
        else:
            save_file({"latents": rows.contiguous()}, path)
        return path

    return save


def names(latents: FileLatents) -> list[str]:
    return [f"{file.name}#{number}" for file in latents.files for rows in file.blocks() for number in rows]


def rows_of(latents: FileLatents) -> Tensor:
    return torch.cat(list(latents))


def assert_refused(message: str, *paths: Path) -> None:
    with pytest.raises(CodebookError, match=message):
        open_latents(paths, DIM)


# --- what is read ----------------------------------------------------------------------------------------------------
@of_both_formats
def test_rows_of_any_floating_dtype_come_as_float32_from_files_that_are_mapped(ending: str, write: Write) -> None:
    for dtype in DTYPES[ending]:
        latents = open_latents([write(f"a{ending}", ROWS.to(dtype))], DIM)
        assert len(latents) == 200 and rows_of(latents).dtype == torch.float32
        assert torch.equal(rows_of(latents), ROWS.to(dtype).float())
    path = write(f"a{ending}")
    latents, content = open_latents([path], DIM), path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(content) - 4)
        file.write(np.float32(7).tobytes())
    assert rows_of(latents)[-1, -1] == 7
    latents.files[0].mapped()[0] = 5.0  # which is never written
    assert path.read_bytes()[:-4] == content[:-4]


def test_files_follow_one_another_and_rows_are_named_by_file_and_number(write: Write) -> None:
    latents = open_latents([write("deep/b.safetensors", ROWS[:2]), write("a.npy", ROWS[2:5])], DIM)
    assert names(latents) == ["b.safetensors#0", "b.safetensors#1", "a.npy#0", "a.npy#1", "a.npy#2"]
    assert torch.equal(rows_of(latents), ROWS[:5])
    assert all(rows.shape == (len(hashes), 1, DIM) for hashes, rows in latents.by_item())


def test_rows_come_in_blocks_which_parts_of_a_pass_take_in_turn(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codebook_tools.data.latent_files._BATCH", 64)
    latents = open_latents([write("a.npy"), write("b.npy", ROWS[:90])], DIM)
    assert [len(rows) for rows, _ in latents.by_item()] == [64, 64, 64, 8, 64, 26]
    assert torch.equal(rows_of(latents), torch.cat([ROWS, ROWS[:90]]))
    calibration, _ = split_latents(latents)
    whole = [rows.tolist() for rows in calibration]
    parts = [[rows.tolist() for rows in replace(calibration, part=(i, 3))] for i in range(3)]
    assert [parts[i % 3][i // 3] for i in range(len(whole))] == whole and sum(map(len, parts)) == len(whole)


# --- which row goes where --------------------------------------------------------------------------------------------
def test_hashes_do_not_depend_on_which_rows_are_selected(write: Write) -> None:
    file = open_latents([write("a.npy")], DIM).files[0]
    word = int.from_bytes(hashlib.sha256(b"a.npy").digest()[24:], "big")
    hashes = file.hashes(np.arange(200)).tolist()
    assert len(set(hashes)) == 200
    assert hashes[7] == int(mixed(np.array([(word + 7) % 2**64], dtype=np.uint64))[0])
    few = file.where(lambda numbers: numbers % 3 == 1)
    assert [file.hashes(numbers).tolist() for numbers in few.blocks()] == [hashes[1::3]]
    assert torch.equal(few.rows(next(few.blocks())), ROWS[1::3])


def is_tenth(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 10 == 0


def test_a_tenth_by_name_is_held_out_whatever_rows_there_are(write: Write) -> None:
    latents = open_latents([write("a.npy"), write("b.safetensors", ROWS + 1)], DIM)
    everything = dict(zip(names(latents), rows_of(latents).tolist(), strict=True))
    calibration, test = split_latents(latents)
    for side, selected in ((test, True), (calibration, False)):
        assert names(side) == [name for name in everything if is_tenth(name) == selected]
        assert rows_of(side).tolist() == [everything[name] for name in names(side)]
    few = names(split_latents(open_latents([write("a.npy", ROWS[:100])], DIM))[1])
    assert few and names(test)[: len(few)] == few


@of_both_formats
def test_too_few_rows_for_both_splits_are_refused(ending: str, write: Write) -> None:
    for count in (0, 1):
        with pytest.raises(CodebookError, match=f"{count} latents leave the calibration or the test split empty"):
            split_latents(open_latents([write(f"a{ending}", ROWS[:count])], DIM))


def test_a_limit_draws_rows_by_seed_and_name_alone(write: Write) -> None:
    a, b = write("a.npy"), write("b.npy")
    latents = open_latents([a, b], DIM)
    assert limited_latents(latents, None, 0) is limited_latents(latents, 400, 0) is latents
    drawn = limited_latents(latents, 50, seed=3)
    assert len(drawn) == 50 == len(set(names(drawn))) and all(0 < file.count < 50 for file in drawn.files)
    assert set(names(limited_latents(latents, 20, seed=3))) < set(names(drawn)) < set(names(latents))
    assert set(names(limited_latents(open_latents([b, a], DIM), 50, seed=3))) == set(names(drawn))
    assert set(names(limited_latents(latents, 50, seed=4))) != set(names(drawn))
    numbers = [np.concatenate(list(file.blocks())) for file in drawn.files]
    assert all(bool((np.diff(part) > 0).all()) for part in numbers)  # files are read forwards


# --- what is refused -------------------------------------------------------------------------------------------------
@of_both_formats
def test_what_is_no_matrix_of_the_codebooks_latents_is_refused(ending: str, write: Write) -> None:
    for rows, message in (
        (torch.zeros(5, 4), r"a\.\w+ holds float32 \(5, 4\); latents of this codebook are \(n, 3\) of floats"),
        (torch.zeros(3), r"holds float32 \(3,\)"),
        (torch.zeros(2, 3, 3), r"holds float32 \(2, 3, 3\)"),
        (torch.zeros(5, 3, dtype=torch.int64), r"holds int64 \(5, 3\)"),
    ):
        assert_refused(message, write(f"a{ending}", rows))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_the_first_selected_latent_that_is_not_finite_is_named(value: float, write: Write) -> None:
    rows = ROWS.clone()
    rows[[150, 170], 1] = value
    latents = open_latents([write("good.npy"), write("bad.npy", rows)], DIM)
    few = FileLatents(tuple(file.where(lambda numbers: np.isin(numbers, [7, 170])) for file in latents.files))
    for selected, number in ((latents, 150), (few, 170)):
        with pytest.raises(CodebookError, match=rf"latent bad\.npy#{number} is not finite"):
            rows_of(selected)


def test_files_of_one_name_of_several_tensors_of_objects_or_of_none_are_refused(write: Write, tmp_path: Path) -> None:
    assert_refused(r"a\.npy stands twice in --latents", write("one/a.npy"), write("two/a.npy", ROWS + 1))
    save_file({"x": ROWS, "y": ROWS + 1}, tmp_path / "two.safetensors")
    assert_refused("holds 2 tensors; give latents in a file of their own", tmp_path / "two.safetensors")
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    assert_refused("cannot read latents", tmp_path / "objects.npy")
    for name, content, message in (
        ("gone.npy", None, "cannot read latents from .*gone"),
        ("gone.safetensors", None, "no such file: .*gone"),
        ("text.npy", b"latents", "cannot read latents from .*text"),
        ("text.safetensors", b"latents", "not a sound safetensors file"),
        ("a.csv", b"1,2,3", r"is no file of latents; --latents takes \.npy and \.safetensors"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert_refused(message, tmp_path / name)
