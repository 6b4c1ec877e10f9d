"""Waveforms as items: files cut into clips at the model's sampling rate, each read by seeking to it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from codebook_tools.data.channels import in_channels
from codebook_tools.data.items import Item, Values
from codebook_tools.data.modality import Modality
from codebook_tools.data.sources import Source
from codebook_tools.errors import CodebookError

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC")
"""What is decoded, whatever a file's name says. libsndfile knows others, but in MP3 and Vorbis it misses the sample it
is asked to seek to, by up to a block, so that clips would neither join nor be the same twice."""

RATES = range(1_000, 768_001)
"""Sampling rates in Hz; a damaged header says any number, and the resampling filter grows with it."""

PEAK = 4.0
"""Floating-point waveforms above 1 are told and kept; above this (12 dB) they are of another scale."""

LONGEST_CLIP = 1 << 28
"""Samples of a clip, an hour and a half at 48 kHz: 1 GB in float32, and an encoder makes a multiple of it."""

ZEROS = 10
"""Length of resample_poly's filter to either side, in samples of the lower rate."""


@dataclass(frozen=True, kw_only=True)
class Waveforms(Modality):
    """Clips of WAV and FLAC files, float32 (channels, samples) with 1 at full scale.

    Clips follow each other without a gap. What is left at a file's end is dropped; a file shorter than one clip is one
    clip, silent at its end.

    Attributes:
        rate: Sampling rate in Hz, to which files are resampled.
        size: Samples of a clip; None for a second. What `stride` does not divide is left out.
        channels: Any number.
        stride: The network's hop, in samples.

    Raises:
        CodebookError: A size below the hop, or beyond an hour and a half.
    """

    one = "clip"
    many = "clips"
    suffixes = (".wav", ".flac")
    mixes = "their mean, or the first of them"
    full = 1
    figures = frozenset({"psnr"})

    rate: int

    def __post_init__(self) -> None:
        size, hop = self.size, self.stride
        if size is not None and size < hop:
            raise CodebookError(
                f"--size {size} is smaller than the model's hop of {hop} samples; give a multiple of that"
            )
        if size is not None and size > LONGEST_CLIP:
            raise CodebookError(f"--size {size} is longer than {LONGEST_CLIP} samples")

    @classmethod
    def accepts(cls, network: object) -> bool:
        """A network of waveforms says its `sampling_rate` in Hz, its `hop` in samples a latent, and its `channels`."""
        return hasattr(network, "sampling_rate")

    @classmethod
    def of(cls, network: Any, size: int | None) -> Self:
        return cls(rate=network.sampling_rate, size=size, channels=network.channels, stride=network.hop)

    @property
    def samples(self) -> int:
        """Of a clip."""
        return max(self.stride, (self.size or self.rate) // self.stride * self.stride)

    def items(self, source: Source) -> list[Item]:
        """Clips named FILE#number; one file is one group."""
        name, rate, samples = source.name, self.rate, self.samples
        try:
            with _opened(source) as sound:
                count = sound.frames * rate // sound.samplerate // samples
        except (OSError, ValueError):
            count = 0
        return [
            Item(f"{name}#{i}", source, partial(decode_clip, source, rate, i * samples, samples), name)
            for i in range(max(1, count))
        ]

    def rows(self, name: str, array: Values) -> list[Item]:
        """Clips of waveforms (n, samples) or (n, channels, samples) at the network's rate, floating point with 1 at
        full scale; cut as those of a file are."""
        if array.ndim not in (2, 3) or not array.size:
            raise CodebookError(f"{name} has shape {array.shape}: expected (n, samples) or (n, channels, samples)")
        if array.dtype.kind != "f":
            raise CodebookError(f"{name} has dtype {array.dtype}: expected floating point, 1 being full scale")
        waves = array[:, None] if array.ndim == 2 else array
        return [
            _held_clip(f"{name}#{row}", wave, i, self.samples)
            for row, wave in enumerate(waves)
            for i in range(max(1, wave.shape[-1] // self.samples))
        ]

    def in_channels(self, values: Values, how: str | None) -> Values | None:
        return in_channels(values, self.channels, how, lambda waves: waves.mean(axis=0, keepdims=True))


def _held_clip(name: str, wave: Values, number: int, samples: int) -> Item:
    source = Source(name, wave.nbytes, lambda: io.BytesIO(wave.tobytes()))

    def decode() -> Values:
        return padded(np.asarray(wave[:, number * samples :][:, :samples], dtype=np.float32), samples)

    return Item(f"{name}#{number}", source, decode, name)


def decode_clip(source: Source, rate: int, start: int, samples: int) -> NDArray[np.float32]:
    """(channels, samples), 1 being full scale, in the file's own channels: of the whole waveform at `rate`, `samples`
    from `start` on, then silence.

    Resampled by polyphase filtering with all the context that the filter reaches, so that clips join up as if the file
    had been resampled whole. Raises ValueError with the reason where the file cannot be read, or goes beyond PEAK.
    """
    from scipy.signal import resample_poly

    with _opened(source) as sound:
        divisor = gcd(rate, sound.samplerate)
        up, down = rate // divisor, sound.samplerate // divisor
        reach = -(-ZEROS * max(up, down) // up)
        block = max(0, (start * down - reach * up) // (down * up))  # `down` frames become `up` samples, in phase
        first = block * down
        last = min(sound.frames, (start + samples) * down // up + reach + 1)
        sound.seek(first)
        frames = sound.read(last - first, dtype="float32", always_2d=True).T
    if frames.shape[1] < last - first or start * down >= last * up:
        raise ValueError(f"damaged file: it ends before sample {last}")
    clip = resample_poly(frames, up, down, axis=1)[:, start - block * up :][:, :samples]
    return padded(clip, samples)


def padded(clip: NDArray[np.floating[Any]], samples: int) -> NDArray[np.float32]:
    """A clip (channels, samples or fewer), silent at its end. Raises ValueError where a value is not finite, or beyond
    PEAK."""
    if not np.isfinite(clip).all():
        raise ValueError("its waveform holds values that are not finite")
    if (peak := float(np.abs(clip).max())) > PEAK:
        raise ValueError(f"its waveform reaches {peak:.4g}, beyond {PEAK:g}; scale it so that 1 is its full scale")
    whole = np.zeros((len(clip), samples), dtype=np.float32)
    whole[:, : clip.shape[1]] = clip
    return whole


@contextmanager
def _opened(source: Source) -> Iterator[Any]:
    """A soundfile.SoundFile that has frames. Raises ValueError with the reason why not, CodebookError without the
    library."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package without libsndfile
        reason = str(error).partition("\n")[0]
        raise CodebookError(
            f'sound is read by the soundfile library: {reason}; pip install "codebook-tools[audio]"'
        ) from error
    with source.open() as stream:
        if not source.nbytes:
            raise ValueError("the file is empty")
        try:
            with soundfile.SoundFile(stream) as sound:
                _refuse(sound, source.nbytes)
                yield sound
        except soundfile.LibsndfileError as error:
            kind = "no WAV or FLAC sound" if error.code == 1 else "damaged file"
            told = error.error_string.rstrip(".") or f"code {error.code}"
            raise ValueError(f"{kind}: libsndfile says {told!r}") from None


def _refuse(sound: Any, nbytes: int) -> None:
    """Raise ValueError for what libsndfile opens and we do not read. nbytes: of the file."""
    if sound.format not in FORMATS:
        raise ValueError(f"its content is {sound.format}; expected WAV or FLAC")
    if sound.samplerate not in RATES:
        raise ValueError(f"damaged file: its sampling rate is {sound.samplerate} Hz")
    if not sound.frames:
        raise ValueError("it holds no samples")
    if sound.frames == 2**63 - 1:
        raise ValueError("its header does not say how long it is: write it anew, with ffmpeg or sox")
    if sound.frames > _MOST_FRAMES * nbytes:
        raise ValueError(f"damaged file: its header says {sound.frames:,} samples, more than {nbytes:,} bytes can hold")


_MOST_FRAMES = 6554  # of a byte: FLAC writes 65,535 equal samples in 10 bytes
