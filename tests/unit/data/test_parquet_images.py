"""Images in columns of parquet files, and in one of several arrays of a .npz file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from drawing import as_tensor, names, picture, png, put, read
from pyarrow import parquet
from sources_of_images import find_images

from codebook_tools.data import columns
from codebook_tools.data.dataset import Media
from codebook_tools.data.images import Images
from codebook_tools.data.splits import split
from codebook_tools.errors import CodebookError

PICTURES = [picture(i) for i in range(25)]
BYTES = [png(pixels) for pixels in PICTURES]


def table(path: Path, group: int = 7, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, row_group_size=group)
    return path


def as_hub(data: list[bytes | None]) -> Any:
    return pa.array([{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(data)])


def rows_in_order(items: list[Any]) -> list[Any]:
    return sorted(items, key=lambda item: int(item.name.rpartition("#")[2]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("column", [BYTES, as_hub(BYTES), pa.array(BYTES, pa.large_binary())], ids=["b", "hub", "l"])
def test_each_row_of_the_only_image_column_is_an_item(column: Any, workers: int, tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", image=column, label=list(range(25)))
    items = rows_in_order(find_images([path]))
    assert names(items) == [f"x.parquet#{i}" for i in range(25)]
    batches = list(Media(items, Images(), workers=workers).batches(4))
    assert torch.equal(torch.cat([pixels for _, pixels in batches]), as_tensor(*PICTURES))
    assert torch.equal(read(items), read(rows_in_order(find_images([f"{path}:image"]))))
    assert [item.source.read() for item in items] == BYTES


def test_a_folder_a_pattern_and_a_range_of_tables_are_read(tmp_path: Path) -> None:
    for i in range(3):
        table(tmp_path / "d" / ("sub" if i == 2 else "") / f"s-{i}.parquet", image=as_hub(BYTES[8 * i :][:8]))
    assert names(find_images([tmp_path / "d"]))[::8] == ["s-0.parquet#0", "s-1.parquet#0", "sub/s-2.parquet#0"]
    for pattern in ("d/*.parquet:image", "d/s-{0..1}.parquet", "d/s-?.parquet"):
        items = find_images([f"{tmp_path}/{pattern}"])
        assert names(items) == [f"s-{i}.parquet#{row}" for i in range(2) for row in range(8)]
        assert torch.equal(read(items), as_tensor(*PICTURES[:16]))
    with pytest.raises(CodebookError, match=r"no file matches .*/d/\*\.png"):
        find_images([f"{tmp_path}/d/*.png"])
    put(tmp_path / "d" / "a.png", PICTURES[0])  # then the folder is one of picture files
    assert names(find_images([tmp_path / "d"])) == ["a.png"]


def test_which_of_several_columns_holds_the_images_is_asked(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", image=as_hub(BYTES), mask=BYTES[::-1], label=list(range(25)))
    with pytest.raises(CodebookError, match=r"2 columns that may hold images: image, mask; say which: .*x\.parquet:im"):
        find_images([path])
    image, mask = (rows_in_order(find_images([f"{path}:{name}"])) for name in ("image", "mask"))
    assert torch.equal(read(mask), read(image).flip(0))
    assert names(mask)[:1] == ["x.parquet:mask#0"]  # rows of two columns are never taken for the same
    for name, reason in (("label", "column label holds int64"), ("nothing", "no column nothing")):
        with pytest.raises(CodebookError, match=rf"{reason}; expected one of encoded images .*: image, mask$"):
            find_images([f"{path}:{name}"])
    with pytest.raises(CodebookError, match=r"no column of encoded images .*; its columns: label \(int64\)"):
        find_images([table(tmp_path / "y.parquet", label=[1, 2])])


def test_damaged_rows_are_named_and_left_out_like_damaged_files(tmp_path: Path) -> None:
    data: list[bytes | None] = [*BYTES]
    data[3], data[4], data[5] = None, b"<html>", b""
    items = rows_in_order(find_images([table(tmp_path / "x.parquet", image=as_hub(data))]))
    for row, reason in ((3, "its row holds no bytes, only the path 3.png"), (4, "no PNG, JPEG"), (5, "is empty")):
        with pytest.raises(CodebookError, match=rf"^cannot read image x\.parquet#{row}: .*{reason}.*; --skip-bad"):
            read(items[row : row + 1])
    media = Media(items, Images(), skip_bad=True)
    assert len(media.load(items)[0]) == 22 and list(media.bad) == [f"x.parquet#{row}" for row in (3, 4, 5)]


def test_a_damaged_row_group_costs_only_its_own_rows(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", image=BYTES)
    start = parquet.read_metadata(path).row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 60] = bytes(60)
    path.write_bytes(content)
    items = rows_in_order(find_images([path]))
    media = Media(items, Images(), skip_bad=True)
    assert media.load(items)[0] == [*items[:7], *items[14:]]
    assert media.bad["x.parquet#7"].startswith("row group 1 is damaged: ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"PAR1 but no table", "is not a readable parquet file"), (b"", "is not a readable parquet file")],
)
def test_what_is_no_table_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(CodebookError, match=reason):
        find_images([tmp_path / "x.parquet"])


def test_a_table_without_rows_and_one_that_repeats_itself_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CodebookError, match=r"x\.parquet has no rows"):
        find_images([table(tmp_path / "x.parquet", image=pa.array([], pa.binary()))])
    with pytest.raises(CodebookError, match=r"claims 100,000 rows in [\d,]+ bytes"):
        find_images([table(tmp_path / "x.parquet", 100_000, image=[b"a"] * 100_000)])
    monkeypatch.setattr(columns, "_LARGE", 100)
    monkeypatch.setattr(columns, "_VALUES_A_BYTE", 1)
    items = find_images([table(tmp_path / "y.parquet", 1000, image=[BYTES[0]] * 1000)])
    with pytest.raises(CodebookError, match="row group 0 repeats itself to more than"):
        read(items[:1])


def test_row_groups_are_read_when_they_are_needed_and_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    inner = columns.Column.read
    monkeypatch.setattr(columns.Column, "read", lambda self, group: rows.append(group) or inner(self, group))
    items = find_images([table(tmp_path / "x.parquet", 100, image=BYTES * 60)])
    assert rows == []
    read(items)  # in order of name: 0, 1, 10, 100, 1000, ...
    assert sorted(rows) == list(range(15))
    rows.clear()
    monkeypatch.setattr(columns, "RECENT_BYTES", 1)
    items = rows_in_order(find_images([table(tmp_path / "y.parquet", 100, image=BYTES * 60)]))
    for row in (0, 1, 150, 151, 0):
        read([items[row]])
    assert rows == [0, 1, 0] and len(columns._RECENT) == 1


def test_a_test_row_that_is_in_the_data_is_refused_whatever_stores_it(tmp_path: Path) -> None:
    data = find_images([table(tmp_path / "d.parquet", image=BYTES[:20])])
    test = find_images([table(tmp_path / "t.parquet", 2, image=[*BYTES[20:], BYTES[4]])])
    with pytest.raises(CodebookError, match=r"test item t\.parquet#5 is also in --data, as d\.parquet#4"):
        split(data, test)
    assert len(split(data, test[:5]).test) == 5
    put(tmp_path / "p" / "a.png", PICTURES[0])
    with pytest.raises(CodebookError, match=r"test item a\.png is also in --data, as d\.parquet#0"):
        split(data, find_images([tmp_path / "p"]))


def test_without_pyarrow_the_extra_that_installs_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "x.parquet", image=BYTES)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(CodebookError, match=r"x\.parquet needs pyarrow .*pip install 'codebook-tools\[parquet\]'"):
        find_images([path])


# --- .npz ------------------------------------------------------------------------------------------------------------


def test_one_of_several_arrays_of_a_file_is_named_after_a_colon(tmp_path: Path) -> None:
    one, other = np.stack(PICTURES[:4]), np.stack(PICTURES[4:8])
    path = tmp_path / "x.npz"
    np.savez(path, **{"train/images": one, "test": other, "labels": np.arange(4)})
    with pytest.raises(
        CodebookError, match=r"x\.npz holds 3 arrays: train/images, test, labels; say which: .*x\.npz:t"
    ):
        find_images([path])
    for key, pixels in (("train/images", PICTURES[:4]), ("test", PICTURES[4:8])):
        items = find_images([f"{path}:{key}"])
        assert torch.equal(read(items), as_tensor(*pixels)), key
    both = find_images([f"{path}:train/images", f"{path}:test"])
    assert len(both) == 8 and len(set(names(both))) == 8
    with pytest.raises(CodebookError, match=r"x\.npz holds no array tset; its arrays: train/images, test, labels"):
        find_images([f"{path}:tset"])
    (tmp_path / "y.npz:z").mkdir()
    put(tmp_path / "y.npz:z" / "a.png", PICTURES[0])  # a name of a folder
    assert names(find_images([tmp_path / "y.npz:z"])) == ["a.png"]
