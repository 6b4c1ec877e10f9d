"""Sound: waveforms cut into clips, each read where it stands, at the model's rate and in its channels."""

from __future__ import annotations

import io
import re
import sys
import tarfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from drawing import names, tar_of
from numpy.typing import NDArray
from scipy.signal import resample_poly
from torch import Tensor

from codebook_tools.data import dataset as media_module
from codebook_tools.data.audio import Waveforms
from codebook_tools.data.dataset import Beyond, Media
from codebook_tools.data.items import Item, find_items
from codebook_tools.data.splits import limited, split
from codebook_tools.errors import CodebookError

Wave = NDArray[np.float32]
RATE = 8000


def sine(hertz: float, rate: int, seconds: float, amplitude: float = 0.5) -> Wave:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def sweep(rate: int, seconds: float) -> Wave:
    """From silence to a tenth of the rate, so that no two stretches of it are alike."""
    time = np.arange(round(rate * seconds)) / rate
    return (0.5 * np.sin(np.pi * 0.1 * rate / seconds * time**2)).astype(np.float32)


def stored(wave: NDArray[np.generic], rate: int = RATE, kind: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    """wave: (samples,) or (samples, channels)."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def find(*paths: Path, rate: int = RATE, hop: int = 1, size: int | None = None) -> list[Item]:
    return find_items(paths, Waveforms(rate=rate, stride=hop, size=size))


def media(items: list[Item], channels: int = 1, skip_bad: bool = False, mixing: str | None = None) -> Media:
    return Media(items, Waveforms(rate=RATE, channels=channels), skip_bad, mixing=mixing)


def read(items: Sequence[Item], channels: int = 1, mixing: str | None = None) -> Tensor:
    """All of the items' waveforms, (n, channels, samples)."""
    return media(list(items), channels, mixing=mixing).load(items)[1]


def in_order(items: list[Item]) -> list[Item]:
    """Of one file, as they follow each other."""
    return sorted(items, key=lambda item: int(item.name.rpartition("#")[2]))


# --- clips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_clips_follow_each_other_and_the_rest_is_dropped(source: str, tmp_path: Path) -> None:
    """1.3 seconds at 8 kHz are 10,400 samples: ten clips of 1,000."""
    wave = sweep(RATE, 1.3)
    path = put(tmp_path / "d" / "a" / "x.wav", stored(wave)).parents[1]
    if source == "tar":
        path = tar_of(tmp_path / "s.tar", {"./a/x.wav": stored(wave)})
    items = in_order(find(path, size=1000))
    assert names(items) == [f"a/x.wav#{i}" for i in range(10)]
    assert {item.group for item in items} == {"a/x.wav"}
    found = read(items)
    assert found.shape == (10, 1, 1000) and found.dtype == torch.float32
    assert torch.equal(found.flatten(), torch.from_numpy(wave[:10_000]))


@pytest.mark.parametrize(
    ("hop", "size", "samples"),
    [(1, None, 8000), (320, None, 8000), (300, None, 7800), (256, 1000, 768), (9000, None, 9000)],
)
def test_a_clip_is_a_second_or_the_size_given_cut_to_the_hop(
    hop: int, size: int | None, samples: int, tmp_path: Path
) -> None:
    wave = sweep(RATE, 4)
    items = in_order(find(put(tmp_path / "x.flac", stored(wave, RATE, "FLAC", "PCM_24")), hop=hop, size=size))
    found = read(items)
    assert found.shape == (32_000 // samples, 1, samples)
    assert np.abs(found.flatten().numpy() - wave[: found.numel()]).max() <= 2**-23  # clips leave no gap


def test_a_size_below_the_hop_is_the_users_error() -> None:
    with pytest.raises(CodebookError, match=r"--size 100 is smaller than the model's hop of 320 samples"):
        Waveforms(rate=RATE, stride=320, size=100)


@pytest.mark.parametrize(("samples", "clips"), [(1, 1), (999, 1), (1000, 1), (1999, 1), (2000, 2)])
def test_only_a_file_shorter_than_a_clip_is_filled_up_with_silence(samples: int, clips: int, tmp_path: Path) -> None:
    wave = np.full(samples, 0.25, dtype=np.float32)
    found = read(find(put(tmp_path / "x.wav", stored(wave)), size=1000)).flatten()
    assert len(found) == clips * 1000
    heard = min(samples, clips * 1000)
    assert bool((found[:heard] == 0.25).all()) and bool((found[heard:] == 0).all())


def test_a_clip_of_a_long_file_reads_little_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(self: soundfile.SoundFile, frames: int, **how: object) -> Wave:
        asked.append(frames)
        return original(self, frames, **how)

    original = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    items = find(put(tmp_path / "x.flac", stored(np.zeros(60 * RATE), RATE, "FLAC", "PCM_16")), rate=2 * RATE)
    assert len(items) == 60 and asked == []  # listed from headers
    read(items[30:31])
    assert len(asked) == 1 and RATE <= asked[0] <= RATE + 40


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "subtype", "values", "expected"),
    [
        ("WAV", "PCM_U8", [0, 2**14, -(2**15)], [0, 0.5, -1]),
        ("WAV", "PCM_16", [1, 2**14, -(2**15), 2**15 - 1], [2**-15, 0.5, -1, 1 - 2**-15]),
        ("WAV", "PCM_24", [1, 2**14, -(2**15)], [2**-15, 0.5, -1]),
        ("WAV", "PCM_32", [1, 2**14, -(2**15)], [2**-15, 0.5, -1]),
        ("FLAC", "PCM_S8", [0, 2**14, -(2**15)], [0, 0.5, -1]),
        ("FLAC", "PCM_16", [1, 2**14, -(2**15)], [2**-15, 0.5, -1]),
        ("FLAC", "PCM_24", [1, 2**14, -(2**15)], [2**-15, 0.5, -1]),
        ("RF64", "PCM_16", [1, 2**14], [2**-15, 0.5]),
    ],
)
def test_integers_of_any_depth_are_parts_of_full_scale(
    kind: str, subtype: str, values: list[int], expected: list[float], tmp_path: Path
) -> None:
    data = stored(np.array(values, dtype=np.int16), RATE, kind, subtype)
    assert read(find(put(tmp_path / "x.wav", data), size=len(values))).flatten().tolist() == expected


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floating_point_is_kept_beyond_full_scale_and_told(subtype: str, tmp_path: Path) -> None:
    wave = np.array([0.0, 0.25, -1.0, 1.5, -3.75, 1.0, 0.5, 0.0])
    source = media(in_order(find(put(tmp_path / "x.wav", stored(wave, subtype=subtype)), size=4)))
    for _ in range(2):
        assert source.load(source.items)[1].flatten().tolist() == wave.tolist()
        assert source.beyond == {"x.wav#0": Beyond(1, 4, 1.5), "x.wav#1": Beyond(1, 4, 3.75)}


@pytest.mark.parametrize(("peak", "refused"), [(4.0, False), (4.01, True), (-4.01, True)])
def test_a_peak_of_more_than_four_is_of_another_scale(peak: float, refused: bool, tmp_path: Path) -> None:
    items = find(put(tmp_path / "x.wav", stored(np.array([0.0, 0.25, peak]))), size=3)
    if not refused:
        assert float(read(items).max()) == peak
        return
    with pytest.raises(CodebookError, match=r"cannot read clip x\.wav#0: its waveform reaches 4\.01, beyond 4; scale"):
        read(items)


SIX = [0.5, 0.25, -0.25, 0, 0, 0.125]


@pytest.mark.parametrize("mixing", [None, "mix", "first"])
@pytest.mark.parametrize(
    ("wave", "channels", "expected"),
    [
        (SIX[:1], 1, [[0.5]]),
        (SIX[:1], 2, [[0.5], [0.5]]),
        (SIX[:2], 2, [[0.5], [0.25]]),
        (SIX, 6, [[0.5], [0.25], [-0.25], [0], [0], [0.125]]),
        ([0.5, 0.5], 1, [[0.5]]),
        ([0.5, 0.5, 0.5], 2, [[0.5], [0.5]]),
    ],
)
def test_channels_that_agree_or_are_alike_need_no_option(
    wave: list[float], channels: int, expected: list[list[float]], mixing: str | None, tmp_path: Path
) -> None:
    for path in in_both_formats(tmp_path, wave):
        assert read(find(path, size=1), channels, mixing).tolist() == [expected]


@pytest.mark.parametrize(
    ("wave", "channels", "mean", "first"),
    [
        (SIX[:2], 1, [[0.375]], [[0.5]]),
        (SIX[:4], 1, [[0.125]], [[0.5]]),
        (SIX[:4], 2, [[0.125], [0.125]], [[0.5], [0.25]]),
        (SIX[:2], 4, [[0.375]] * 4, [[0.5]] * 4),
    ],
)
def test_other_channels_are_refused_until_their_mean_or_the_first_are_asked_for(
    wave: list[float], channels: int, mean: list[list[float]], first: list[list[float]], tmp_path: Path
) -> None:
    for path in in_both_formats(tmp_path, wave):
        items = find(path, size=1)
        told = f"^clip {path.name}#0 has {len(wave)} channels, and the network takes {channels}: give --channels mix.f"
        with pytest.raises(CodebookError, match=told):
            media(items, channels, skip_bad=True).load(items)  # it is not damaged: --skip-bad must not hide it
        assert read(items, channels, "mix").tolist() == [mean]
        assert read(items, channels, "first").tolist() == [first]


def in_both_formats(folder: Path, wave: list[float]) -> list[Path]:
    """One sample of so many channels."""
    data = np.array([wave], dtype=np.float32)
    return [
        put(folder / f"x.{kind}", stored(data, RATE, kind, subtype))
        for kind, subtype in (("WAV", "FLOAT"), ("FLAC", "PCM_16"))
    ]


# --- resampling ----------------------------------------------------------------------------------------------------

RATES = [(r, 24_000) for r in (8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000)] + [(44_100, 16_000)]


@pytest.mark.parametrize(("theirs", "ours"), RATES)
def test_resampling_keeps_frequency_amplitude_and_place_of_a_sine(theirs: int, ours: int, tmp_path: Path) -> None:
    path = put(tmp_path / "x.wav", stored(sine(440, theirs, 1), theirs))
    clips = read(in_order(find(path, rate=ours, size=ours // 10)))
    assert len(clips) == 10
    found, expected = clips.flatten().numpy(), sine(440, ours, 1)
    edge = ours // 100  # beyond the file there is silence, which the filter sees
    assert np.abs(found - expected)[edge:-edge].max() < 0.002


@pytest.mark.parametrize(("theirs", "ours"), [*RATES, (8001, 8000)])
def test_clips_join_up_as_if_the_file_had_been_resampled_whole(theirs: int, ours: int, tmp_path: Path) -> None:
    wave = sweep(theirs, 1.01)
    clips = read(in_order(find(put(tmp_path / "x.wav", stored(wave, theirs)), rate=ours, size=997)))
    divisor = np.gcd(theirs, ours)
    whole = resample_poly(wave.astype(np.float64), ours // divisor, theirs // divisor)
    assert len(clips) == len(wave) * ours // theirs // 997
    assert np.abs(clips.flatten().numpy() - whole[: clips.numel()]).max() < 2e-6


def test_frequencies_that_the_model_cannot_hold_are_filtered_not_folded(tmp_path: Path) -> None:
    """7 kHz at 48 kHz would sound as 1 kHz at 8 kHz."""
    found = read(find(put(tmp_path / "x.wav", stored(sine(7000, 48_000, 1), 48_000)), size=RATE))
    assert float(found[..., 100:-100].abs().max()) < 0.002


# --- one way of listing --------------------------------------------------------------------------------------------


def test_a_tar_holds_the_same_clips_as_the_folder_it_was_made_of(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    for i in range(30):
        kind, subtype = (("WAV", "PCM_16"), ("FLAC", "PCM_24"))[i % 2]
        wave = np.stack([sweep(16_000, 0.3 + i / 100)] * (1 + i % 3), axis=1) * (i / 30)
        put(folder / "ab"[i % 2] / f"{i}.{kind.lower()}", stored(wave, 16_000, kind, subtype))
    put(folder / "._x.wav", b"hidden")
    put(folder / "notes.txt", b"no sound")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(folder, ".")
    loose, packed = find(folder, size=800), find(tmp_path / "s.tar", size=800)
    assert names(loose) == names(packed) and len(loose) == sum((4800 + 160 * i) // 2 // 800 for i in range(30))
    assert torch.equal(read(loose), read(packed))
    assert names(split(loose).test) == names(split(packed).test)
    both = find(folder, tmp_path / "s.tar", size=800)
    assert names(both) == sorted([f"d/{name}" for name in names(loose)] + [f"s.tar/{name}" for name in names(loose)])
    assert {item.group for item in both} == {item.group for item in loose}


def test_a_name_that_two_paths_share_is_told_apart_in_every_clip(tmp_path: Path) -> None:
    for folder, seconds in (("p", 1), ("q", 3)):
        put(tmp_path / folder / "x.wav", stored(sweep(RATE, seconds)))
    assert names(find(tmp_path / "p", tmp_path / "q")) == ["p/x.wav#0", "q/x.wav#0", "q/x.wav#1", "q/x.wav#2"]


def test_no_file_is_in_two_splits_even_of_a_few_clips_drawn(tmp_path: Path) -> None:
    for i in range(40):
        put(tmp_path / f"{i}.wav", stored(sweep(RATE, 1)))
    items = find(tmp_path, size=1000)
    for drawn in (items, limited(items, 150, seed=1)):
        found = split(drawn)
        files = [{item.group for item in part} for part in (found.train, found.validation, found.test)]
        assert all(files) and not any(one & other for one, other in pairwise([*files, files[0]]))
        assert sum(map(len, files)) == 40 or drawn is not items


def test_one_file_cannot_be_split(tmp_path: Path) -> None:
    items = find(put(tmp_path / "x.wav", stored(sweep(RATE, 9))))
    with pytest.raises(CodebookError, match=r"split of 9 clips in 1 groups that stay together is empty: .*more clips"):
        split(items, many="clips")


def test_a_file_in_both_parts_is_refused_under_any_name_but_silence_is_not(tmp_path: Path) -> None:
    wave = sweep(RATE, 2)
    silent = np.concatenate([np.zeros(RATE, dtype=np.float32), sine(50, RATE, 1)])
    for name, data in (("d/a", wave), ("d/b", silent), ("t/c", -wave), ("t/d", -silent)):
        put(tmp_path / f"{name}.wav", stored(data))
    assert len(split(find(tmp_path / "d"), find(tmp_path / "t")).test) == 4  # of which one is silent in both
    put(tmp_path / "t" / "e.wav", stored(wave))
    with pytest.raises(CodebookError, match=r"test item e\.wav#0 is also in --data, as a\.wav#0"):
        split(find(tmp_path / "d"), find(tmp_path / "t"))


@pytest.mark.parametrize("cache", [0, 4 * 500 * 3, 2 << 30])
def test_reading_twice_gives_the_same_whatever_fits_the_cache(
    cache: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_module, "CACHE_BYTES", cache)
    source = media(find(put(tmp_path / "x.wav", stored(sweep(44_100, 1), 44_100)), size=500))
    first, second = (list(source.batches(7)) for _ in range(2))
    assert [len(items) for items, _ in first] == [7, 7, 2]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))
    held = source._cache
    assert held.nbytes == sum(values.nbytes for values in held.values.values()) == min(cache // 2000, 16) * 2000


def test_what_is_no_sound_source_says_what_is_looked_for(tmp_path: Path) -> None:
    put(tmp_path / "d" / "x.mp3", b"")
    with pytest.raises(CodebookError, match=r"no clips in .*: expected files ending in \.wav, \.flac"):
        find(tmp_path / "d")
    with pytest.raises(CodebookError, match=r"x\.mp3 is no clip source: give a folder of clips, or .* \.tar, \.wav"):
        find(tmp_path / "d" / "x.mp3")


# --- unreadable files ----------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE).astype(np.float32)
FLAC = stored(NOISE, RATE, "FLAC", "PCM_16")
NAN, LOUD = NOISE.copy(), NOISE * 32768
NAN[10] = np.nan


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


BAD = {
    "nothing": (b"", "the file is empty"),
    "text": (b"<html>404</html>", "no WAV or FLAC sound"),
    "a header alone": (stored(NOISE)[:30], "damaged file"),
    "no samples": (stored(NOISE[:0], subtype="PCM_16"), "it holds no samples"),
    "a bit of a FLAC": (FLAC[:30], "damaged file"),
    "a FLAC that starts and ends": (FLAC[:300], "damaged file"),
    "noughts within a FLAC": (patched(FLAC, 300, bytes(600)), "damaged file"),
    "no number": (stored(NAN), "not finite"),
    "another scale": (stored(LOUD), r"its waveform reaches 1\.6\d+e\+04, beyond 4; scale it so"),
    "another kind": (stored(NOISE, RATE, "AIFF", "PCM_16"), "its content is AIFF; expected WAV or FLAC"),
    "an odd rate": (stored(NOISE, 1, subtype="PCM_16"), "its sampling rate is 1 Hz"),
    "no length": (patched(FLAC, 21, bytes([FLAC[21] & 0xF0, 0, 0, 0, 0])), "does not say how long it is"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_with_its_reason_on_one_line(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, reason = BAD[kind]
    put(tmp_path / "a.wav", stored(NOISE))
    put(tmp_path / "b.wav", data)
    items = find(tmp_path)
    with pytest.raises(CodebookError, match=rf"^cannot read clip b\.wav#0: .*{reason}.*--skip-bad") as caught:
        read(items)
    assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)
    source = media(items, skip_bad=True)
    assert names(source.load(items)[0])[:3] == ["a.wav#0", "a.wav#1", "a.wav#2"]
    assert re.search(reason, source.bad["b.wav#0"])
    assert capfd.readouterr() == ("", "")


def test_of_a_damaged_file_the_clips_before_the_damage_are_read(tmp_path: Path) -> None:
    items = in_order(find(put(tmp_path / "x.flac", FLAC[: len(FLAC) // 2]), size=RATE // 2))
    source = media(items, skip_bad=True)
    found, waves = source.load(items)
    assert names(found) == ["x.flac#0", "x.flac#1"] and set(source.bad) == {f"x.flac#{i}" for i in range(2, 6)}
    assert np.abs(waves.flatten().numpy() - NOISE[:RATE]).max() < 2**-15


def test_a_wav_that_was_cut_off_is_as_long_as_what_is_left(tmp_path: Path) -> None:
    data = stored(NOISE, subtype="PCM_16")
    items = in_order(find(put(tmp_path / "x.wav", data[: len(data) * 2 // 3 - 100])))
    assert names(items) == ["x.wav#0"]
    streamed = patched(patched(data, 4, b"\xff" * 4), 40, b"\xff" * 4)  # as a pipe writes it
    assert len(find(put(tmp_path / "x.wav", streamed))) == 3


def test_a_value_that_is_not_finite_costs_only_its_own_clip(tmp_path: Path) -> None:
    items = find(put(tmp_path / "x.wav", stored(NAN)))
    source = media(items, skip_bad=True)
    assert names(source.load(items)[0]) == ["x.wav#1", "x.wav#2"]


def test_a_file_that_vanished_after_listing_is_unreadable(tmp_path: Path) -> None:
    items = find(put(tmp_path / "x.wav", stored(NOISE)))
    (tmp_path / "x.wav").unlink()
    with pytest.raises(CodebookError, match=r"cannot read clip x\.wav#0: No such file or directory"):
        read(items)


@pytest.mark.parametrize("frames", [1, 2 * RATE - 10, 2 * RATE - 9, 2 * RATE])
def test_a_file_that_became_shorter_after_listing_is_damaged(frames: int, tmp_path: Path) -> None:
    items = in_order(find(put(tmp_path / "x.wav", stored(NOISE))))
    put(tmp_path / "x.wav", stored(NOISE[:frames]))
    with pytest.raises(CodebookError, match=r"cannot read clip x\.wav#2: damaged file"):
        read(items[2:])


def test_frames_that_the_library_leaves_out_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, frames, **how: original(self, frames - 1, **how))
    with pytest.raises(CodebookError, match=r"cannot read clip x\.wav#0: damaged file: it ends before sample 8011"):
        read(find(put(tmp_path / "x.wav", stored(NOISE))))


def test_without_the_library_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "x.wav", stored(NOISE))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(CodebookError, match=r'read by the soundfile library: .*pip install "codebook-tools\[audio\]"$'):
        find(tmp_path)
