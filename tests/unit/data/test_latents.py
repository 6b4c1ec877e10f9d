"""Latents, encoded and from files: the same rows in every reading, counted, measured and sampled in one pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sources_of_images import Images
from torch import Tensor

from codebook_tools.clustering.metric import COSINE_UNIT, DOT, METRICS
from codebook_tools.codebook import EUCLIDEAN, Codebook, Latents, Metric
from codebook_tools.data.images import array_items
from codebook_tools.data.items import Item
from codebook_tools.data.latent_files import FileLatents, limited_latents, open_latents, split_latents
from codebook_tools.data.latents import EncodedLatents, StoredLatents
from codebook_tools.data.sampling import SAMPLE_LIMIT, sample_keys
from codebook_tools.data.sampling import mixed as mixed_array
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.usage import Survey, survey
from codebook_tools.runtime.progress import Watch


def items_of(count: int, side: int = 4) -> list[Item]:
    """Gray images of noise."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, side, side), dtype=np.uint8)
    return array_items("x.npy", pixels)


def encode(images: Tensor) -> Tensor:
    """(n, 1, h, w) -> (n, h * w, 2): a pixel x has the latent (x, 1 - 2x), whatever batch it comes in."""
    pixels = images.flatten(1)
    return torch.stack([pixels, 1 - 2 * pixels], dim=2)


def encoded(items: list[Item], batch: int = 64, encoder: Callable[[Tensor], Tensor] = encode) -> EncodedLatents:
    return EncodedLatents(Images(items, 1), encoder, batch)


def surveyed(items: list[Item], *, batch: int = 64, seed: int = 0, limit: int = SAMPLE_LIMIT) -> Survey:
    return survey(encoded(items, batch), CODES, seed=seed, limit=limit, watch=Watch())


def all_of(items: list[Item]) -> Tensor:
    """(items * positions, 2): their latents, computed at once."""
    return encode(Images(items, 1).load(items)[1]).flatten(0, 1)


CODES = Codebook(torch.tensor([[0.0, 1.0], [0.5, 0.0], [1.0, -1.0], [9.0, 9.0]]))
ITEMS = items_of(30)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_streams_come_whole_in_order_and_again_even_two_at_once(batch: int) -> None:
    vectors = all_of(ITEMS)
    for latents in (StoredLatents(vectors, batch), encoded(ITEMS, batch)):
        assert isinstance(latents, Latents)
        one, two = zip(*zip(latents, latents, strict=True), strict=True)
        assert torch.equal(torch.cat(one), vectors) and torch.equal(torch.cat(two), vectors)
    assert max(map(len, StoredLatents(vectors, batch))) == batch and len(StoredLatents(vectors)) == 480
    assert [item for items, _ in encoded(ITEMS, batch).by_item() for item in items] == ITEMS


@pytest.mark.parametrize(("value", "batch"), [(torch.nan, 1), (torch.nan, 100), (torch.inf, 1), (-torch.inf, 100)])
def test_latents_that_are_not_finite_are_named_by_the_first_item_that_has_them(value: float, batch: int) -> None:
    items = items_of(9)
    pixels = Images(items, 1).load(items)[1]

    def encoder(images: Tensor) -> Tensor:
        latents = encode(images)
        for i, image in enumerate(images):
            if any(torch.equal(image, pixels[bad]) for bad in (5, 7)):
                latents[i, 3, 1] = value
        return latents

    with pytest.raises(CodebookError, match=r"latents of x\.npy#5 are not finite"):
        list(encoded(items, batch, encoder))


# --- counts and errors -----------------------------------------------------------------------------------------------
def test_a_pass_without_latents_is_refused() -> None:
    with pytest.raises(CodebookError, match="no latents"):
        surveyed([])


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_counts_and_error_equal_a_direct_computation_and_the_watch_sees_every_batch(metric: Metric) -> None:
    codebook = Codebook(torch.randn(12, 2, generator=torch.Generator().manual_seed(1)), metric)
    reports: list[tuple[str, int, int | None]] = []
    watch = Watch(lambda what, done, total, figures: reports.append((what, done, total)))
    result = survey(encoded(ITEMS, 7), codebook, seed=0, watch=watch)
    rows, codes = all_of(ITEMS).double(), codebook.vectors.double()
    unit_rows, unit_codes = (x / x.norm(dim=1, keepdim=True) for x in (rows, codes))
    if metric is EUCLIDEAN:
        chosen = torch.cdist(rows, codes).argmin(1)
    else:
        chosen = (rows @ codes.T if metric is DOT else unit_rows @ unit_codes.T).argmax(1)
    if metric is COSINE_UNIT:
        rows, codes = unit_rows, unit_codes
    assert result.counts.dtype == torch.int64
    assert result.counts.tolist() == torch.bincount(chosen, minlength=12).tolist()
    assert int(result.counts.sum()) == result.total == 30 * 16
    assert result.error == pytest.approx(float((rows - codes[chosen]).square().sum()), rel=1e-5)
    assert reports == [("encode", done, 30) for done in (7, 14, 21, 28, 30)]


# --- the sample ------------------------------------------------------------------------------------------------------
def mixed(x: int) -> int:
    """splitmix64's finalizer once more, in Python's own integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64s_as_published() -> None:
    """The generator adds 0x9E3779B97F4A7C15 to its state and finalizes: the first number from 0, and from 1234567."""
    gamma = 0x9E3779B97F4A7C15
    assert mixed(gamma) == 0xE220A8397B1DCDAF and mixed(1234567 + gamma) == 6457827717110365317
    values = [0, 1, gamma, 1234567 + gamma, 2**64 - 1, 2**63]
    assert mixed_array(np.array(values, dtype=np.uint64)).tolist() == [mixed(x) for x in values]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**64 - 1, 2**70 + 3])
def test_keys_depend_on_seed_name_and_position_alone(seed: int) -> None:
    items = items_of(5)
    firsts = [mixed(int.from_bytes(item.digest[24:], "big") ^ mixed(seed % 2**64)) for item in items]
    expected = [mixed((first + position) % 2**64) for first in firsts for position in range(7)]
    assert sample_keys(items, 7, seed).tolist() == expected and len(set(expected)) == 35


@pytest.mark.parametrize(("batch", "limit"), [(7, 100), (64, 100), (7, 480), (64, SAMPLE_LIMIT)])
def test_the_sample_is_the_latents_of_the_smallest_keys_in_any_order_of_reading(batch: int, limit: int) -> None:
    order = np.argsort(sample_keys(ITEMS, 16, 3))[:limit]
    shuffled = [ITEMS[i] for i in np.random.default_rng(0).permutation(30)]
    result, in_order = surveyed(shuffled, batch=batch, limit=limit, seed=3), surveyed(ITEMS, seed=3)
    assert torch.equal(result.sample.vectors, all_of(ITEMS)[torch.from_numpy(order)])
    assert result.sampled == (limit == 100) and result.total == int(result.counts.sum()) == 480
    assert torch.equal(result.counts, in_order.counts)
    assert result.error == pytest.approx(in_order.error, rel=1e-9)


def test_a_long_stream_that_is_trimmed_on_the_way_keeps_the_smallest_keys() -> None:
    """200,000 latents for a sample of 1,000: more than what is kept without trimming."""
    items = items_of(195, side=32)
    result = surveyed(items, batch=16, limit=1000)
    order = np.argsort(sample_keys(items, 1024, 0))[:1000]
    assert result.total == 195 * 1024
    assert torch.equal(result.sample.vectors, all_of(items)[torch.from_numpy(order.copy())])


# --- files: every format and dtype gives the same rows, and a row's name alone decides where it goes -----------------
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
    monkeypatch.setattr("codebook_tools.data.rows.BLOCK", 64)
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
    assert hashes[7] == mixed((word + 7) % 2**64)
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
    assert_refused("cannot read", tmp_path / "objects.npy")
    for name, content, message in (
        ("gone.npy", None, "cannot read .*gone"),
        ("gone.safetensors", None, "no such file: .*gone"),
        ("text.npy", b"latents", "cannot read .*text"),
        ("text.safetensors", b"latents", "not a sound safetensors file"),
        ("a.csv", b"1,2,3", r"is no file of latents; --latents takes \.npy and \.safetensors"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert_refused(message, tmp_path / name)
