"""Arrays as data: files of every kind, rows of any length, groups, and the choice between images and arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import Run
from numpy.typing import NDArray
from pyarrow import feather, parquet
from safetensors.torch import save_file
from torch import Tensor, nn

import codebook_tools as ct
from codebook_tools.codebook import Codebook
from codebook_tools.data.arrays import Arrays
from codebook_tools.data.dataset import Media
from codebook_tools.data.groups import grouped, read_groups
from codebook_tools.data.items import InMemory, Item, find_items
from codebook_tools.data.rows import Rows
from codebook_tools.data.sampling import sample_keys
from codebook_tools.data.splits import Splits, limited, split
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.accumulators import Totals
from codebook_tools.evaluation.figures import measurement_of
from codebook_tools.evaluation.one_pass import Batch

ROWS = np.random.default_rng(0).normal(3, 2, (50, 2, 6)).astype(np.float32)


def table(rows: NDArray[np.float32]) -> pa.Table:
    return pa.table({"text": ["x"] * len(rows), "x": rows.tolist()})


def arrow_stream(path: Path, rows: NDArray[np.float32]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table(rows).schema) as writer:
        writer.write_table(table(rows), max_chunksize=20)


WRITERS: dict[str, Callable[[Path, NDArray[np.float32]], None]] = {
    "a.npy": lambda path, rows: np.save(path, rows),
    "a.npz": lambda path, rows: np.savez(path, x=rows),
    "a.npz:x": lambda path, rows: np.savez(path, x=rows, y=rows[:1]),
    "a.pt": lambda path, rows: torch.save(torch.from_numpy(rows), path),
    "a.pt:x": lambda path, rows: torch.save({"x": torch.from_numpy(rows), "y": torch.ones(3, 3)}, path),
    "a.safetensors": lambda path, rows: save_file({"x": torch.from_numpy(rows)}, path),
    "a.safetensors:x": lambda path, rows: save_file({"x": torch.from_numpy(rows), "y": torch.ones(2, 2)}, path),
    "a.parquet": lambda path, rows: parquet.write_table(table(rows), path, row_group_size=20),
    "a.parquet:x": lambda path, rows: parquet.write_table(table(rows).append_column("y", table(rows)["x"]), path),
    "a.feather": lambda path, rows: feather.write_feather(table(rows), path),
    "a.arrow": arrow_stream,
}


def read(paths: Sequence[Path | InMemory], size: int = 7) -> tuple[list[Item], Tensor]:
    items = find_items(list(paths), Arrays())
    batches = list(Media(items, Arrays()).batches(size))
    assert [str(item) for batch, _ in batches for item in batch] == [str(item) for item in items]
    return list(items), torch.cat([values for _, values in batches])


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_every_kind_of_file_are_the_same_items(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name.partition(":")[0], ROWS)
    items, values = read([tmp_path / name])
    assert torch.equal(values, torch.from_numpy(ROWS)) and values.dtype == torch.float32
    assert [item.name.rpartition("#")[2] for item in items] == [str(i) for i in range(50)]
    loaded, few = Media(items, Arrays()).load([items[40], items[3], items[40]])
    assert len(loaded) == 3 and torch.equal(few, torch.from_numpy(ROWS[[40, 3, 40]]))


def test_several_files_are_one_data_set_in_order_of_name(tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", ROWS[30:].astype(np.float16))
    np.save(tmp_path / "a.npy", ROWS[:30].astype(">f8"))
    (tmp_path / "c").mkdir()
    save_file({"x": torch.from_numpy(ROWS[:1])}, tmp_path / "c" / "a.npy.safetensors")
    items, values = read([tmp_path])
    assert len(items) == 51 and torch.equal(values[:31], torch.from_numpy(np.concatenate([ROWS[:30], ROWS[:1]])))
    assert torch.equal(values[31:], torch.from_numpy(ROWS[30:].astype(np.float16).astype(np.float32)))
    again, _ = read([tmp_path / "*.npy", InMemory(ROWS, "mine")])
    assert [again[0].name, again[-1].name] == ["a.npy#0", "mine#49"]
    np.save(tmp_path / "c" / "a.npy", ROWS[:2])
    shared, _ = read([tmp_path / "a.npy", tmp_path / "c" / "a.npy"])
    assert shared[0].name == f"{tmp_path.as_posix()}/a.npy#0" and shared[0].kin == "a.npy#0"
    with pytest.raises(CodebookError, match=r"a.npy stands twice in the data"):
        read([tmp_path / "a.npy", tmp_path / "a.npy"])


def damaged(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 no more")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "x.npy": (
        lambda path: np.save(path, np.array([{}, None])),
        "cannot read .*x.npy: Array can't be memory-mapped: Py",
    ),
    "o.npz": (lambda path: np.savez(path, x=np.array([{}, None])), "is not a readable array file"),
    "c.npy": (lambda path: np.save(path, np.zeros((3, 2), complex)), "its dtype is complex128; expected floats or int"),
    "b.npy": (lambda path: np.save(path, np.zeros((3, 2), bool)), "has dtype bool: expected floats or integers"),
    "n.npy": (lambda path: np.save(path, np.zeros(3)), r"has shape \(3,\): expected \(n, ...\)"),
    "e.npy": (lambda path: np.save(path, np.zeros((0, 3))), r"has shape \(0, 3\)"),
    "t.npy": (lambda path: path.write_text("no array"), "cannot read .*t.npy"),
    "z.npz": (damaged, "z.npz is not a readable array file"),
    "z.pt": (damaged, "z.pt is no sound PyTorch file"),
    "d.pt": (
        lambda path: torch.save({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, path),
        "holds 2 arrays: a, b; say w",
    ),
    "s.pt": (lambda path: torch.save("text", path), "holds str; expected a tensor"),
    "z.safetensors": (damaged, "z.safetensors"),
    "two.safetensors": (lambda p: save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, p), "two.safetensors:a"),
    "t.parquet": (
        lambda p: parquet.write_table(pa.table({"t": ["a"]}), p),
        r"no column of lists of numbers; .*t \(str",
    ),
    "n.parquet": (lambda p: parquet.write_table(pa.table({"t": [1.0]}), p), r"no column of lists of numbers"),
    "two.parquet": (
        lambda p: parquet.write_table(pa.table({"a": [[1.0]], "b": [[2]]}), p),
        "has 2 columns of lists: a, b; say which: .*two.parquet:a",
    ),
    "z.parquet": (damaged, "z.parquet is not a readable parquet file"),
    "z.arrow": (damaged, "z.arrow is not a readable Arrow file"),
    "gone.npy": (lambda path: None, "no such file or folder: .*gone.npy"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_array_of_numbers_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    write, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(CodebookError, match=message) as caught:
        read([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_a_later_file_of_another_shape_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    np.save(tmp_path / "b.npy", ROWS[:, :, :5])
    with pytest.raises(CodebookError, match=r"items of unlike shapes: b.npy has rows of 2x5, a.npy of 2x6"):
        read([tmp_path])


def test_a_value_that_is_not_finite_names_its_row_or_costs_it_alone(tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[[7, 31], 1, 2] = np.nan, np.inf
    np.save(tmp_path / "a.npy", rows)
    items = find_items([tmp_path / "a.npy"], Arrays())
    with pytest.raises(CodebookError, match=r"cannot read item a.npy#7: a value is not finite; --skip-bad goes on"):
        list(Media(items, Arrays()).batches(20))
    media = Media(items, Arrays(), skip_bad=True)
    kept = torch.cat([values for _, values in media.batches(20)])
    assert torch.equal(kept, torch.from_numpy(np.delete(rows, [7, 31], 0))) and list(media.bad) == [
        "a.npy#7",
        "a.npy#31",
    ]


# --- rows of unlike length -------------------------------------------------------------------------------------------
LENGTHS = [4, 8, 4, 6, 8, 4, 4, 6, 8, 8, 4]
RAGGED = [torch.randn(length, 3, generator=torch.Generator().manual_seed(i)) for i, length in enumerate(LENGTHS)]


@pytest.fixture(params=["parquet", "pt"])
def ragged(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"r.{request.param}"
    if request.param == "pt":
        torch.save(RAGGED, path)
    else:
        parquet.write_table(pa.table({"x": [rows.tolist() for rows in RAGGED]}), path, row_group_size=3)
    return path


def test_rows_of_unlike_length_are_batched_by_length(ragged: Path) -> None:
    items = find_items([ragged], Arrays())
    media = Media(items, Arrays())
    batches = list(media.batches(2))
    assert all(len(values) <= 2 for _, values in batches) and len(batches) == 3 + 1 + 2
    by_name = {str(item): row for batch, values in batches for item, row in zip(batch, values, strict=True)}
    assert all(torch.equal(by_name[f"{ragged.name}#{i}"], rows) for i, rows in enumerate(RAGGED))
    halves = [
        [str(item) for batch, _ in Media(items, Arrays(), part=(i, 2)).batches(2) for item in batch] for i in (0, 1)
    ]
    assert sorted(halves[0] + halves[1]) == sorted(by_name)


def test_the_shape_of_a_row_is_that_of_its_lists_whichever_axis_differs(tmp_path: Path) -> None:
    rows = [torch.randn(2, 3, length) for length in (4, 6, 4, 5)]
    parquet.write_table(pa.table({"x": [row.tolist() for row in rows]}), tmp_path / "r.parquet", row_group_size=3)
    torch.save(rows, tmp_path / "r.pt")
    for name in ("r.parquet", "r.pt"):
        items = find_items([tmp_path / name], Arrays())
        batches = list(Media(items, Arrays()).batches(3))
        assert [tuple(values.shape) for _, values in batches] == [(2, 2, 3, 4), (1, 2, 3, 6), (1, 2, 3, 5)]
        assert torch.equal(batches[0][1], torch.stack([rows[0], rows[2]]))


def test_a_row_of_lists_must_be_whole(tmp_path: Path) -> None:
    rows = [[[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0]], None, [[None, 1.0]], [[float("nan"), 1.0]], []]
    parquet.write_table(pa.table({"x": rows}), tmp_path / "r.parquet")
    media = Media(find_items([tmp_path / "r.parquet"], Arrays()), Arrays(), skip_bad=True)
    assert [len(batch) for batch, _ in media.batches(9)] == [1]
    assert [why for _, why in sorted(media.bad.items())] == [
        "lists within it have unlike lengths", "its row is empty", "a value is missing", "a value is not finite",
        "it holds no value",
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [[None, [1.0] * 8], [[], [1.0] * 8], [None, None]])
def test_rows_that_cannot_be_read_do_not_hinder_the_choice(rows: list[object], tmp_path: Path) -> None:
    parquet.write_table(pa.table({"x": pa.array(rows, pa.list_(pa.float32()))}), tmp_path / "r.parquet")
    save_file(conv(1, 1).state_dict(), tmp_path / "m.safetensors")
    model = ct.load(tmp_path / "m.safetensors", network=lambda codebook_size: conv(1, 1), codebooks=["codes.weight"])
    with pytest.raises(CodebookError, match=r"cannot read item r.parquet#|test split of 2 items|none of"):
        ct.measure(model, tmp_path / "r.parquet")


# --- many rows -----------------------------------------------------------------------------------------------------
def test_rows_are_selected_by_bits_as_items_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits and draws of rows are those of items one by one: a tenth by SHA-256 of the names."""
    monkeypatch.setattr("codebook_tools.data.rows.BLOCK", 64)
    np.save(tmp_path / "a.npy", np.arange(600.0).reshape(300, 2))
    np.save(tmp_path / "b.npy", np.arange(200.0).reshape(100, 2) - 1e6)
    rows = find_items([tmp_path], Arrays())
    assert isinstance(rows, Rows) and len(rows) == 400
    one_by_one, by_bits = split([*rows]), split(rows)
    for name in ("train", "validation", "test", "calibration"):
        assert list(map(str, getattr(by_bits, name))) == list(map(str, getattr(one_by_one, name)))
    assert 20 < len(by_bits.test) < 65
    assert isinstance(Splits(rows, [], []).calibration, Rows)  # a list would hold an object for each of millions
    few = limited(by_bits.calibration, 50, seed=3)
    assert len(few) == 50 and [str(item) for item in few] == [str(few[i]) for i in range(50)] == [
        str(i) for i in few[:]
    ]
    assert str(few[-1]) == str([*few][-1]) and {*map(str, few)} < {*map(str, by_bits.calibration)}
    batches = list(Media(few, Arrays()).batches(9))
    assert torch.equal(torch.cat([v for _, v in batches]), Media(few, Arrays()).load([*few])[1])
    batched = [sample_keys(batch, 2, 5) for batch, _ in batches]
    assert np.array_equal(np.concatenate(batched), sample_keys([*few], 2, 5))
    with pytest.raises(IndexError):
        rows[400]


def test_test_rows_that_are_calibration_rows_are_refused(tmp_path: Path) -> None:
    data = find_items([InMemory(ROWS, "a")], Arrays())
    with pytest.raises(CodebookError, match=r"test item t#1 is also in --data, as a#8: take it out"):
        split(data, find_items([InMemory(np.stack([ROWS[8] + 1, ROWS[8]]), "t")], Arrays()))
    assert len(split(data, find_items([InMemory(ROWS + 1, "t")], Arrays())).test) == 50


@pytest.mark.parametrize("kind", ["npy", "txt", "text.npy"])
def test_rows_of_one_group_stay_in_one_split(kind: str, tmp_path: Path) -> None:
    keys = [i // 10 for i in range(200)]
    file = tmp_path / f"g.{kind}"
    if kind == "txt":
        file.write_text("\n".join(map(str, keys)) + "\n")
    else:
        np.save(file, np.array(keys) if kind == "npy" else np.array([f"k{key}" for key in keys]))
    items = find_items([InMemory(np.random.rand(120, 3), "a"), InMemory(np.random.rand(80, 3), "b")], Arrays())
    parts = split(grouped(items, read_groups(file)))
    one_by_one = split([*grouped(items, read_groups(file))])
    groups = [{keys[int(str(i).partition("#")[2]) + 120 * str(i).startswith("b")] for i in part}
              for part in (parts.train, parts.validation, parts.test)]  # fmt: skip
    assert all(groups) and sum(map(len, groups)) == 20
    assert list(map(str, parts.test)) == list(map(str, one_by_one.test))
    with pytest.raises(CodebookError, match=r"--group has 200 keys for 120 rows of --data"):
        grouped(find_items([InMemory(np.ones((120, 3)), "a")], Arrays()), read_groups(file))


# --- which kind of data ----------------------------------------------------------------------------------------------
class Any2(nn.Module):
    """Accepts what its layers accept; latents have four dimensions in the last axis."""

    def __init__(self, down: nn.Module, up: nn.Module, codebook_size: int = 16) -> None:
        super().__init__()
        self.down, self.up, self.codes = down, up, nn.Embedding(codebook_size, 4)

    def encode(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.down(x))

    def decode(self, q: Tensor) -> Tensor:
        return torch.as_tensor(self.up(q))


def modality(net: nn.Module, data: NDArray[np.generic], tmp_path: Path, **how: object) -> str:
    np.save(tmp_path / "d.npy", data)
    from codebook_tools.runtime.progress import Watch
    from codebook_tools.workflows.request import Request
    from codebook_tools.workflows.session import open_request

    save_file(net.state_dict(), tmp_path / "m.safetensors")
    model = ct.load(tmp_path / "m.safetensors", network=lambda codebook_size: net, codebooks=["codes.weight"], **how)
    request: Request = model.request
    object.__setattr__(request, "data", (str(tmp_path / "d.npy"),))
    opened = open_request(request, Watch())
    return str(opened.settings["modality"]) + (
        " warned" if any("--modality arrays" in w for w in opened.warnings) else ""
    )


def conv(dims: int, channels: int) -> Any2:
    down, up = (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1],
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1],
    )
    return Any2(down(channels, 4, 2, 2), up(4, channels, 2, 2))


UNIT = np.random.default_rng(1).random((40, 1, 12, 12), dtype=np.float32)
CHOICES = {
    "vectors": (Any2(nn.Linear(12, 4), nn.Linear(4, 12)), UNIT[:, 0, 0], {}, "arrays"),
    "signals": (conv(1, 1), UNIT[:, :, 0], {}, "arrays"),
    "clips": (conv(3, 1), UNIT[:, :, None].repeat(6, 2), {}, "arrays"),
    "pictures without channels": (conv(2, 1), UNIT[:, 0], {}, "images"),
    "pictures or arrays": (conv(2, 1), UNIT, {}, "images warned"),
    "beyond [0, 1]": (conv(2, 1), 3 * UNIT, {}, "arrays"),
    "a range was typed": (conv(2, 1), UNIT, {"input_range": (0, 1)}, "images"),
    "bytes": (conv(2, 1), (255 * UNIT).astype(np.uint8), {}, "images"),
    "asked": (conv(2, 1), UNIT, {"modality": "arrays"}, "arrays"),
    "time before dimensions": (Any2(nn.Linear(6, 4), nn.Linear(4, 6)), 2 * ROWS, {}, "arrays"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_kind_of_data_follows_from_what_the_network_takes(case: str, tmp_path: Path) -> None:
    net, data, how, expected = CHOICES[case]
    assert modality(net, data, tmp_path, **how) == expected


def test_two_axes_of_one_length_are_asked_about(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(30, 4, 6)).astype(np.float32)
    net = Any2(nn.Linear(6, 4), nn.Linear(4, 6))
    with pytest.raises(
        CodebookError, match=r"latents \(2, 4, 4\): axes 1 and 2 .* a code, 4; say which with --latent-axis"
    ):
        modality(net, rows, tmp_path)
    with pytest.raises(CodebookError, match=r"expected --latent-axis 3"):
        modality(net, rows, tmp_path, latent_axis=3)
    model = ct.wrap(net, codebooks=["codes.weight"], latent_axis=-1)
    with torch.no_grad():
        codes = ct.nearest(net.encode(torch.from_numpy(rows)).reshape(-1, 4), Codebook(net.codes.weight.detach()))
    assert ct.measure(model, ct.Data(rows[:1] + 1, test=rows)).codebooks[0].used == len(codes.unique())


# --- figures ---------------------------------------------------------------------------------------------------------
def test_errors_are_in_units_of_the_data_and_over_their_variance() -> None:
    """Values 1, 3, 5, 7 and their reconstructions 1, 3, 5, 9: mse 1, variance 5."""
    totals = Totals([("c", Codebook(torch.zeros(1, 1)), None)], measured=True, figures={"nmse"})
    for rows, error in (([[1.0, 3.0]], 0.0), ([[5.0, 7.0]], 2.0)):
        media = torch.tensor(rows)
        made = media + torch.tensor([[0.0, error]])
        totals.add(Batch([object()], [torch.zeros(1, 1)], [torch.zeros(1, dtype=torch.int64)], (media, made)))  # type: ignore[list-item]
    measured = measurement_of(totals.sums, "test", {"nmse"})
    assert (measured.mse, measured.nmse, measured.psnr, measured.ssim) == (1.0, 0.2, None, None)
    assert json.loads(json.dumps(measured.to_json()))["nmse"] == 0.2


def test_whole_numbers_reach_a_network_that_takes_them_and_are_floats_for_others(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 9, (60, 8))
    down = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(1), nn.Linear(32, 4))
    assert modality(Any2(down, nn.Linear(4, 8)), rows, tmp_path) == "arrays"
    assert modality(Any2(nn.Linear(8, 4), nn.Linear(4, 8)), rows.astype(np.int16), tmp_path) == "arrays"
    run = ct.operate(
        ct.wrap(Any2(down, nn.Linear(4, 8)), ["codes.weight"]), rows, ct.strategies.Refit(k=3), ct.FineTune(steps=2)
    )
    assert run.finetuned is not None and run.finetuned.codebooks[0].size == 3
    assert run.run.opened.settings["augment"] == "none"


@pytest.mark.filterwarnings("ignore::codebook_tools.CodebookWarning")
def test_shards_of_rows_add_up_to_one_pass(tmp_path: Path, codebook: Run) -> None:
    net = Any2(nn.Linear(12, 4), nn.Linear(4, 12))
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    np.save(tmp_path / "d.npy", np.random.default_rng(0).normal(size=(900, 12)).astype(np.float16))
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self, k):\n        super().__init__()\n"
        "        self.down, self.up, self.codes = nn.Linear(12, 4), nn.Linear(4, 12), nn.Embedding(k, 4)\n"
        "    def encode(self, x): return self.down(x)\n    def decode(self, q): return self.up(q)\n"
        "def make(codebook_size): return Net(codebook_size)\n"
    )
    model, how = tmp_path / "m.safetensors", ("--network", f"{tmp_path / 'net.py'}:make", "--batch-size", 20)
    key = ("--codebook-key", "codes.weight")
    data = ("--data", tmp_path / "d.npy", *how, "--json")
    whole = codebook("measure", model, *data, "--stats", tmp_path / "whole")
    for i in (1, 2, 3):
        assert codebook("measure", model, *data, "--shard", f"{i}/3", "--stats", tmp_path / f"{i}").exit_code == 0
    merged = codebook("measure", model, "--merge", *(tmp_path / f"{i}" for i in (3, 1, 2)), *key, "--json")
    assert merged.exit_code == 0, merged.stderr
    assert merged.json["stages"]["before"] == whole.json["stages"]["before"]
    out = tmp_path / "p.safetensors"
    pruned = codebook("prune", model, "--stats", tmp_path / "whole", *key, "--metric", "euclidean", "--json", "-o", out)
    assert pruned.exit_code == 0, pruned.stderr
