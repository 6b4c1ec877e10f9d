"""Figures of sound that papers quote, each compared with another implementation on the same clips."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import get_window, resample_poly
from speech import damaged, voice
from torch import Tensor

from codebook_tools.data.audio import Waveforms
from codebook_tools.evaluation.one_pass import Batch
from codebook_tools.evaluation.quoted.figure import ItemMean, open_figures
from codebook_tools.evaluation.quoted.registry import parse_metrics
from codebook_tools.evaluation.quoted.spectral import BANDS, LOWEST, WINDOWS
from codebook_tools.evaluation.quoted.tally import Tally

CPU = torch.device("cpu")


def opened(name: str, rate: int) -> ItemMean:
    (figure,) = open_figures(parse_metrics(name), Waveforms(rate=rate), CPU, 0)
    assert isinstance(figure, ItemMean)
    return figure


def clips(rate: int, seconds: float = 1.0, channels: int = 1, count: int = 2) -> tuple[Tensor, Tensor]:
    waves = np.stack([[voice(rate, seconds, i + channel) for channel in range(channels)] for i in range(count)])
    return torch.from_numpy(waves), torch.from_numpy(damaged(waves))


def tally(figure: ItemMean, media: Tensor, reconstructed: Tensor) -> Tally:
    return figure.tally(Batch(range(len(media)), [], [], (media, reconstructed)), model=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rate", "to", "mode"),
    [(16_000, 16_000, "wb"), (24_000, 16_000, "wb"), (8_000, 8_000, "nb"), (12_000, 8_000, "nb")],
)
def test_pesq_is_what_the_package_says_of_resampled_clips(rate: int, to: int, mode: str) -> None:
    pesq = pytest.importorskip("pesq").pesq
    media, reconstructed = clips(rate)
    expected = []
    for pair in zip(media[:, 0].double().numpy(), reconstructed[:, 0].double().numpy(), strict=True):
        divisor = math.gcd(rate, to)
        reference, degraded = (resample_poly(wave, to // divisor, rate // divisor) for wave in pair)
        expected.append(pesq(to, reference, degraded, mode))
    done = tally(opened("pesq", rate), media, reconstructed)
    assert done.value == pytest.approx(np.mean(expected), abs=1e-5) and 1 < np.mean(expected) < 4.5
    best = tally(opened("pesq", rate), media, media).value
    assert best is not None and best > 4.4


@pytest.mark.parametrize("rate", [10_000, 16_000, 24_000])
def test_stoi_is_what_the_package_says(rate: int) -> None:
    stoi = pytest.importorskip("pystoi").stoi
    media, reconstructed = clips(rate, 2.0)
    pairs = zip(media[:, 0].double().numpy(), reconstructed[:, 0].double().numpy(), strict=True)
    expected = np.mean([stoi(clip, other, rate) for clip, other in pairs])
    assert tally(opened("stoi", rate), media, reconstructed).value == pytest.approx(expected, abs=1e-5)
    assert 0.5 < expected < 0.999


@pytest.mark.parametrize("name", ["pesq", "stoi"])
def test_clips_that_are_too_short_or_silent_are_counted_and_left_out(name: str) -> None:
    pytest.importorskip({"pesq": "pesq", "stoi": "pystoi"}[name])
    figure, (media, reconstructed) = opened(name, 16_000), clips(16_000)
    silence = torch.zeros_like(media)
    both = tally(figure, torch.cat([media, silence]), torch.cat([reconstructed, silence]))
    assert (both.count, both.skipped) == (2, 2) and both.value == tally(figure, media, reconstructed).value
    for samples in (1, 100, 1000, 3000):
        short = tally(figure, *(waves[..., 2000 : 2000 + samples] for waves in (media, reconstructed)))
        assert (short.count, short.skipped, short.value) == (0, 2, None)


@pytest.mark.parametrize("name", ["pesq", "stoi", "si-sdr", "mel", "stft"])
def test_a_silent_reconstruction_is_no_crash_and_no_nan(name: str) -> None:
    pytest.importorskip({"pesq": "pesq", "stoi": "pystoi", "si-sdr": "torchmetrics"}.get(name, "transformers"))
    media, _ = clips(16_000)
    done = tally(opened(name, 16_000), media, torch.zeros_like(media))
    assert done.count + done.skipped == 2 and (done.value is None or math.isfinite(done.value))


def test_channels_of_speech_are_averaged() -> None:
    pytest.importorskip("pystoi")
    media, reconstructed = clips(16_000, channels=2)
    one = [waves.mean(1, keepdim=True) for waves in (media, reconstructed)]
    figure = opened("stoi", 16_000)
    assert tally(figure, media, reconstructed).value == pytest.approx(tally(figure, *one).value, abs=1e-5)


def test_si_sdr_is_the_energy_over_that_of_the_error_at_the_best_scale() -> None:
    pytest.importorskip("torchmetrics")
    media, reconstructed = clips(8_000, channels=2, count=3)
    x, y = (waves.double().numpy() for waves in (media, reconstructed))
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    target = (x * y).sum(-1, keepdims=True) / (x * x).sum(-1, keepdims=True) * x
    by_hand = 10 * np.log10((target**2).sum(-1) / ((target - y) ** 2).sum(-1))
    assert tally(opened("si-sdr", 8_000), media, reconstructed).value == pytest.approx(by_hand.mean(), abs=1e-5)
    louder = tally(opened("si-sdr", 8_000), media, 0.3 * reconstructed + 0.1).value  # neither scale nor offset count
    assert louder == pytest.approx(by_hand.mean(), abs=1e-4)
    media[0] = 0.25  # silence, with an offset
    done = tally(opened("si-sdr", 8_000), media, reconstructed)
    assert (done.count, done.skipped) == (2, 1) and done.value == pytest.approx(by_hand[1:].mean(), abs=1e-5)


def spectra(wave: Any, window: int) -> Any:
    """(frequencies, frames): magnitudes of Hann windows around every quarter of one, the ends mirrored."""
    padded = np.pad(np.asarray(wave, dtype=np.float64), window // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[:: window // 4]
    return np.abs(np.fft.rfft(frames * get_window("hann", window), axis=1)).T


def slaney(hertz: Any) -> Any:
    """Mel by Slaney: linear up to 1 kHz, which is 15, then 27 steps for each factor of 6.4."""
    return np.where(hertz < 1000, 3 * hertz / 200, 15 + 27 * np.log(np.maximum(hertz, 1) / 1000) / np.log(6.4))


def bank(rate: int, window: int, bands: int) -> Any:
    """(bands, frequencies): triangles between neighbors on Slaney's scale, each of area 1 in Hz."""
    frequencies = np.linspace(0, rate / 2, window // 2 + 1)
    grid = np.linspace(0, rate / 2, 2_000_001)
    edges = np.interp(np.linspace(0, slaney(rate / 2), bands + 2), slaney(grid), grid)
    low, middle, high = (edges[i : bands + i, None] for i in range(3))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)


def distance(wave: Any, other: Any, rate: int, mel: bool) -> float:
    """As descript-audio-codec defines it."""
    total = 0.0
    for window, bands in zip(WINDOWS, BANDS, strict=True):
        pair = [spectra(of, window) for of in (wave, other)]
        if mel:
            pair = [bank(rate, window, bands) @ of for of in pair]
        logs = [np.log10(np.maximum(of, LOWEST) ** 2) for of in pair]
        total += np.abs(pair[0] - pair[1]).mean() + np.abs(logs[0] - logs[1]).mean()
    return total


@pytest.mark.parametrize("name", ["mel", "stft"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.filterwarnings("error:At least one mel filter")
def test_distances_of_spectra_are_those_of_their_definition(name: str, rate: int) -> None:
    pytest.importorskip("transformers")
    media, reconstructed = clips(rate, 0.5, channels=2)
    pairs = [*zip(media.numpy(), reconstructed.numpy(), strict=True)]
    expected = np.mean([distance(x, y, rate, name == "mel") for pair in pairs for x, y in zip(*pair, strict=True)])
    assert tally(opened(name, rate), media, reconstructed).value == pytest.approx(expected, rel=1e-5)
    assert tally(opened(name, rate), media, media).value == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Empty filters detected")
def test_the_reference_of_spectra_is_librosa() -> None:
    librosa = pytest.importorskip("librosa")
    wave = voice(16_000, 0.5)
    for window, bands in zip(WINDOWS, BANDS, strict=True):
        theirs = np.abs(librosa.stft(wave.astype(float), n_fft=window, hop_length=window // 4, pad_mode="reflect"))
        assert np.allclose(spectra(wave, window), theirs, atol=1e-4)
        assert np.allclose(bank(16_000, window, bands), librosa.filters.mel(sr=16_000, n_fft=window, n_mels=bands))


def test_clips_under_half_a_window_have_no_spectral_distance() -> None:
    media, reconstructed = clips(16_000)
    for samples, skipped in ((1024, 2), (1025, 0)):
        assert tally(opened("stft", 16_000), media[..., :samples], reconstructed[..., :samples]).skipped == skipped
