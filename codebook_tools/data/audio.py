"""Waveforms as items: files cut into clips at the model's sampling rate, each read by seeking to it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from codebook_tools.data.channels import in_channels
from codebook_tools.data.items import Item, Values
from codebook_tools.data.modality import AUDIO, BINARY, Modality
from codebook_tools.data.sources import Source
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.optional import require

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC")
"""What is decoded, whatever a file's suffix. libsndfile knows other formats, but seeking in MP3 and Vorbis misses the
requested sample by up to a block: clips would neither join nor be the same at each reading."""

RATES = range(1_000, 768_001)
"""Accepted sampling rates in Hz: a damaged header may hold any number, and the resampling filter grows with it."""

PEAK = 4.0
"""Floating-point waveforms above 1 are kept and reported; above this (12 dB) they have another scale."""

LONGEST_CLIP = 1 << 28
"""Samples of a clip, 93 minutes at 48 kHz: 1 GB in float32, and an encoder's activations are a multiple of it."""

ZEROS = 10
"""Length of resample_poly's filter to either side, in samples of the lower rate."""


@dataclass(frozen=True, kw_only=True)
class Waveforms(Modality):
    """Clips of WAV and FLAC files, float32 (channels, samples) with 1 at full scale.

    Clips follow each other without a gap. An incomplete clip at the end of a file is dropped; a file shorter than one
    clip is padded with silence.

    Attributes:
        rate: Sampling rate in Hz, to which files are resampled.
        size: Samples of a clip, rounded down to a multiple of `stride`; None for one second.
        channels: Any number.
        stride: The network's hop, in samples.

    Raises:
        CodebookError: `size` is below the hop or above LONGEST_CLIP.
    """

    name = "audio"
    one = "clip"
    many = "clips"
    suffixes = (".wav", ".flac")
    columns = frozenset({AUDIO, BINARY})
    mixes = "their mean, or the first of them"
    full = 1
    figures = frozenset({"psnr"})
    ending = ".wav"

    size: int | None = None
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
        """Whether the network has a `sampling_rate` (Hz); it then has a `hop` (samples per latent) and `channels`."""
        return hasattr(network, "sampling_rate")

    @classmethod
    def of(cls, network: Any, size: int | tuple[int, int] | None, crop: str = "center") -> Self:
        """The modality with the network's sampling rate, channels and hop."""
        if isinstance(size, tuple):
            raise CodebookError(f"--size {size[0]},{size[1]}: height and width are of images; a clip has samples")
        return cls(rate=network.sampling_rate, size=size, channels=network.channels, stride=network.hop)

    @property
    def samples(self) -> int:
        """Length of a clip, a multiple of the hop."""
        return max(self.stride, (self.size or self.rate) // self.stride * self.stride)

    def items(self, source: Source) -> list[Item]:
        """Clips of a file, named FILE#number; all clips of a file are one group."""
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
        """Cut waveforms in memory into clips, as files are.

        Args:
            name: Of the array.
            array: (n, samples) or (n, channels, samples) at the network's rate, floating point with 1 at full scale.

        Returns:
            Clips named NAME#row#number; the clips of a row are one group.

        Raises:
            CodebookError: The array has another shape or dtype, or no value.
        """
        if array.ndim not in (2, 3) or not array.size:
            raise CodebookError(f"{name} has shape {array.shape}: expected (n, samples) or (n, channels, samples)")
        if array.dtype.kind != "f":
            raise CodebookError(f"{name} has dtype {array.dtype}: expected floating point, 1 being full scale")
        waves = array[:, None] if array.ndim == 2 else array
        return [
            _clip_in_memory(f"{name}#{row}", wave, i, self.samples)
            for row, wave in enumerate(waves)
            for i in range(max(1, wave.shape[-1] // self.samples))
        ]

    def in_channels(self, values: Values, how: str | None) -> Values | None:
        """The waveform in `channels`; mixed channels are their mean."""
        return in_channels(values, self.channels, how, lambda waves: waves.mean(axis=0, keepdims=True))

    def shape_of(self, grid: Sequence[int], encode: Callable[[Tensor], Tensor]) -> tuple[int, ...] | None:
        """Channels and samples, a multiple of the hop, for a grid of positions: of more samples there are no fewer."""
        import torch

        if len(grid) != 1:
            raise CodebookError(
                f"tokens of {'x'.join(map(str, grid))} are not this model's: a clip has one axis of them"
            )

        def positions(hops: int) -> int:
            try:
                return encode(torch.zeros(1, self.channels, hops * self.stride)).shape[-1]
            except CodebookError:  # of a clip that is too short for the network
                return 0

        wanted = self.size // self.stride if self.size else grid[0]
        if self.size or positions(wanted) == grid[0]:
            return self.channels, wanted * self.stride
        least, most = 1, 2 * grid[0]  # overlapping chunks have more positions than hops
        while least < most:
            middle = (least + most) // 2
            least, most = (least, middle) if positions(middle) >= grid[0] else (middle + 1, most)
        if positions(least) != grid[0]:
            raise CodebookError(f"tokens of {grid[0]} positions are not this model's: no clip has so many")
        return self.channels, least * self.stride

    @classmethod
    def positions_per_second(cls, network: Any) -> Fraction:
        """The sampling rate over the hop."""
        return Fraction(network.sampling_rate) / Fraction(network.hop)

    def save(self, values: Values, path: Path) -> None:
        """Write a WAV of 32-bit floating point at the model's rate: no sample is rounded or clipped."""
        soundfile = require("sound", "audio", "soundfile")
        soundfile.write(path, values.T, self.rate, subtype="FLOAT", format="WAV")


def _clip_in_memory(name: str, wave: Values, number: int, samples: int) -> Item:
    source = Source(name, wave.nbytes, lambda: io.BytesIO(wave.tobytes()))

    def decode() -> Values:
        return padded(np.asarray(wave[:, number * samples :][:, :samples], dtype=np.float32), samples)

    return Item(f"{name}#{number}", source, decode, name)


def decode_clip(source: Source, rate: int, start: int, samples: int) -> NDArray[np.float32]:
    """Decode one clip of a file by seeking to it.

    Polyphase resampling reads all the context that the filter reaches, so clips join as if the whole file had been
    resampled at once.

    Args:
        source: The file.
        rate: Sampling rate of the clip, in Hz.
        start: First sample of the clip, at `rate`.
        samples: Length of the clip, at `rate`.

    Returns:
        (channels, samples) with 1 at full scale, in the file's own channels; silent beyond the end of the file.

    Raises:
        ValueError: The file cannot be read, or a value is not finite or beyond PEAK; with the reason.
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
    """Check a clip and pad it with silence.

    Args:
        clip: (channels, n), n at most `samples`.
        samples: Length of the result.

    Raises:
        ValueError: A value is not finite, or beyond PEAK.
    """
    if not np.isfinite(clip).all():
        raise ValueError("its waveform holds values that are not finite")
    if (peak := float(np.abs(clip).max())) > PEAK:
        raise ValueError(f"its waveform reaches {peak:.4g}, beyond {PEAK:g}; scale it so that 1 is its full scale")
    whole = np.zeros((len(clip), samples), dtype=np.float32)
    whole[:, : clip.shape[1]] = clip
    return whole


@contextmanager
def _opened(source: Source) -> Iterator[Any]:
    """Open a non-empty soundfile.SoundFile; ValueError says why it cannot be, CodebookError that soundfile lacks."""
    soundfile = require("sound", "audio", "soundfile")
    with source.open() as stream:
        if not source.nbytes:
            raise ValueError("the file is empty")
        try:
            with soundfile.SoundFile(stream) as sound:
                _refuse(sound, source.nbytes)
                yield sound
        except soundfile.LibsndfileError as error:
            kind = "no WAV or FLAC sound" if error.code == 1 else "damaged file"
            reason = error.error_string.rstrip(".") or f"code {error.code}"
            raise ValueError(f"{kind}: libsndfile says {reason!r}") from None


def _refuse(sound: Any, nbytes: int) -> None:
    """Raise ValueError for what libsndfile opens and is not read here. nbytes: length of the file."""
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
