"""Sound: waveforms cut into clips, each read where it stands, at the model's rate and in its channels."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from drawing import names
from scipy.signal import resample_poly
from sounds import RATE, Wave, find_clips, put_bytes, stored, sweep
from torch import Tensor

from codebook_tools.data.audio import Waveforms
from codebook_tools.data.dataset import Beyond, Media
from codebook_tools.data.items import Item
from codebook_tools.errors import CodebookError


def media(items: list[Item], channels: int = 1, skip_bad: bool = False, mixing: str | None = None) -> Media:
    return Media(items, Waveforms(rate=RATE, channels=channels), skip_bad, mixing=mixing)


def read(items: list[Item], channels: int = 1, mixing: str | None = None) -> Tensor:
    """All of the items' waveforms, (n, channels, samples)."""
    return media(items, channels, mixing=mixing).load(items)[1]


# --- clips -----------------------------------------------------------------------------------------------------------
def test_clips_follow_each_other_and_the_rest_is_dropped(tmp_path: Path) -> None:
    """1.3 seconds at 8 kHz are 10,400 samples: ten clips of 1,000."""
    wave = sweep(RATE, 1.3)
    path = put_bytes(tmp_path / "d" / "a" / "x.wav", stored(wave)).parents[1]
    items = find_clips(path, size=1000)
    assert names(items) == [f"a/x.wav#{i}" for i in range(10)]
    assert {item.group for item in items} == {"a/x.wav"}
    clips = read(items)
    assert clips.shape == (10, 1, 1000) and clips.dtype == torch.float32
    assert torch.equal(clips.flatten(), torch.from_numpy(wave[:10_000]))


def test_a_clip_is_a_second_or_the_size_given_cut_to_the_hop(tmp_path: Path) -> None:
    wave = sweep(RATE, 4)
    path = put_bytes(tmp_path / "x.flac", stored(wave, RATE, "FLAC", "PCM_24"))
    for hop, size, samples in ((1, None, 8000), (300, None, 7800), (256, 1000, 768), (9000, None, 9000)):
        clips = read(find_clips(path, hop=hop, size=size))
        assert clips.shape == (32_000 // samples, 1, samples)
        assert np.abs(clips.flatten().numpy() - wave[: clips.numel()]).max() <= 2**-23
    with pytest.raises(CodebookError, match=r"--size 100 is smaller than the model's hop of 320 samples"):
        Waveforms(rate=RATE, stride=320, size=100)


def test_only_a_file_shorter_than_a_clip_is_padded_with_silence(tmp_path: Path) -> None:
    for samples, clips in ((1, 1), (999, 1), (1000, 1), (1999, 1), (2000, 2)):
        path = put_bytes(tmp_path / "x.wav", stored(np.full(samples, 0.25, dtype=np.float32)))
        wave = read(find_clips(path, size=1000)).flatten()
        sounding = min(samples, clips * 1000)
        assert len(wave) == clips * 1000 and bool((wave[:sounding] == 0.25).all() and (wave[sounding:] == 0).all())


def test_a_clip_of_a_long_file_reads_little_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, original = [], soundfile.SoundFile.read

    def counted(self: soundfile.SoundFile, frames: int, **how: object) -> Wave:
        lengths.append(frames)
        return original(self, frames, **how)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    path = put_bytes(tmp_path / "x.flac", stored(np.zeros(60 * RATE), RATE, "FLAC", "PCM_16"))
    items = find_clips(path, rate=2 * RATE)
    assert len(items) == 60 and lengths == []  # listed from headers
    read(items[30:31])
    assert len(lengths) == 1 and RATE <= lengths[0] <= RATE + 40


# --- values ----------------------------------------------------------------------------------------------------------
def test_integers_of_any_depth_are_parts_of_full_scale(tmp_path: Path) -> None:
    kinds = {"WAV": ("U8", "16", "24", "32"), "FLAC": ("S8", "16", "24"), "RF64": ("16",)}
    for kind, depth in ((kind, depth) for kind, depths in kinds.items() for depth in depths):
        least = 0 if depth.endswith("8") else 1  # what 16 bits have and 8 have not
        data = stored(np.array([least, 2**14, -(2**15)], dtype=np.int16), RATE, kind, f"PCM_{depth}")
        clip = read(find_clips(put_bytes(tmp_path / "x.wav", data), size=3))
        assert clip.flatten().tolist() == [least * 2**-15, 0.5, -1], (kind, depth)


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floating_point_is_kept_beyond_full_scale_and_reported(subtype: str, tmp_path: Path) -> None:
    wave = np.array([0.0, 0.25, -1.0, 1.5, -3.75, 1.0, 0.5, 0.0, 4.0, 0, 0, 0, 1, 0, 0, -1, -4.01, 0, 0, 0])
    items = find_clips(put_bytes(tmp_path / "x.wav", stored(wave, subtype=subtype)), size=4)
    source = media(items[:4])
    for _ in range(2):
        assert source.load(source.items)[1].flatten().tolist() == wave[:16].tolist()
        counts = {"x.wav#0": Beyond(1, 4, 1.5), "x.wav#1": Beyond(1, 4, 3.75), "x.wav#2": Beyond(1, 4, 4)}
        assert source.beyond == counts
    with pytest.raises(CodebookError, match=r"cannot read clip x\.wav#4: its waveform reaches 4\.01, beyond 4; scale"):
        read(items)


def test_other_channels_are_refused_until_their_mean_or_the_first_are_asked_for(tmp_path: Path) -> None:
    for wave, channels, mean, first in (
        ([0.5, 0.25], 1, [0.375], [0.5]),
        ([0.5, 0.25, -0.25, 0], 2, [0.125, 0.125], [0.5, 0.25]),
        ([0.5, 0.25], 4, [0.375] * 4, [0.5] * 4),
    ):
        items = find_clips(put_bytes(tmp_path / "x.wav", stored(np.array([wave]))), size=1)
        message = f"^clip x.wav#0 has {len(wave)} channels, and the network takes {channels}: give --channels mix.first"
        with pytest.raises(CodebookError, match=message):
            media(items, channels, skip_bad=True).load(items)  # it is not damaged: --skip-bad must not hide it
        assert read(items, channels, "mix").flatten().tolist() == mean
        assert read(items, channels, "first").flatten().tolist() == first
        assert read(items, len(wave)).flatten().tolist() == wave


# --- resampling ------------------------------------------------------------------------------------------------------
def test_clips_join_up_as_if_the_file_had_been_resampled_whole(tmp_path: Path) -> None:
    rates = [*((rate, 24_000) for rate in (8000, 11_025, 44_100, 192_000)), (44_100, 16_000), (8001, 8000)]
    for theirs, ours in rates:
        wave = sweep(theirs, 1.01)
        clips = read(find_clips(put_bytes(tmp_path / "x.wav", stored(wave, theirs)), rate=ours, size=997))
        divisor = np.gcd(theirs, ours)
        whole = resample_poly(wave.astype(np.float64), ours // divisor, theirs // divisor)
        assert len(clips) == len(wave) * ours // theirs // 997
        assert np.abs(clips.flatten().numpy() - whole[: clips.numel()]).max() < 2e-6, (theirs, ours)


# --- damaged files ---------------------------------------------------------------------------------------------------
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE).astype(np.float32)
NOT_FINITE = NOISE.copy()
NOT_FINITE[10] = np.nan
FLAC = stored(NOISE, RATE, "FLAC", "PCM_16")


def test_damage_costs_only_the_clips_that_it_is_in(tmp_path: Path) -> None:
    half = FLAC[: len(FLAC) // 2]
    for name, data, readable in (("x.flac", half, [0, 1]), ("x.wav", stored(NOT_FINITE), [1, 2, 3, 4, 5])):
        source = media(find_clips(put_bytes(tmp_path / name, data), size=RATE // 2), skip_bad=True)
        items, waves = source.load(source.items)
        assert names(items) == [f"{name}#{i}" for i in readable]
        assert set(source.bad) == {f"{name}#{i}" for i in range(6)} - set(names(items))
        assert np.abs(waves.numpy() - NOISE.reshape(6, 1, RATE // 2)[readable]).max() < 2**-15


def test_a_wav_that_was_cut_off_is_as_long_as_what_is_left(tmp_path: Path) -> None:
    data = bytearray(stored(NOISE, subtype="PCM_16"))
    path = put_bytes(tmp_path / "x.wav", data[: len(data) * 2 // 3 - 100])
    assert names(find_clips(path)) == ["x.wav#0"]
    data[4:8] = data[40:44] = b"\xff" * 4  # as a pipe writes it
    assert len(find_clips(put_bytes(path, data))) == 3


def test_a_file_shorter_than_it_was_listed_or_read_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = find_clips(put_bytes(tmp_path / "x.wav", stored(NOISE)))
    for frames in (1, 2 * RATE - 10, 2 * RATE - 9, 2 * RATE):
        put_bytes(tmp_path / "x.wav", stored(NOISE[:frames]))
        with pytest.raises(CodebookError, match=r"cannot read clip x\.wav#2: damaged file"):
            read(items[2:])
    original = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, frames, **how: original(self, frames - 1, **how))
    with pytest.raises(CodebookError, match=r"cannot read clip x\.wav#0: damaged file: it ends before sample 8011"):
        read(find_clips(put_bytes(tmp_path / "x.wav", stored(NOISE))))


def test_without_the_library_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_bytes(tmp_path / "x.wav", stored(NOISE))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(CodebookError, match=r"sound needs soundfile .*: pip install 'codebook-tools\[audio\]'$"):
        find_clips(tmp_path)
