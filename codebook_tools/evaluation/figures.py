"""The figures of a measurement. Each is one field, annotated with how it is computed, formatted and compared."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cache
from typing import Annotated, Any, get_origin, get_type_hints

from torch import Tensor

from codebook_tools.errors import CodebookError
from codebook_tools.evaluation import metrics
from codebook_tools.evaluation.accumulators import BookSums, Sums
from codebook_tools.evaluation.ids import share_changed
from codebook_tools.evaluation.quoted.registry import QUOTED, field_of

STAGES = {"before": "before", "surgery": "after surgery", "finetuned": "after fine-tuning"}


@dataclass(frozen=True)
class Figure:
    """How a figure of a codebook or a measurement is computed and reported.

    Attributes:
        of: Computes it from the sums of a pass: BookSums for a codebook, Sums for a measurement.
        label: Row heading in tables of stages; None for no row.
        form: Format of the value there; several codebooks give the lowest and the highest value.
        cell: Text of the cell for a measurement, in place of the formatted value.
        mean: Whether a comparison reports its mean over seeds.
    """

    of: Callable[[Any], Any] = field(repr=False)  # the documentation prints the other fields
    label: str | None = None
    form: str = ""
    cell: Callable[["Measurement"], str] | None = field(default=None, repr=False)
    mean: bool = False


def codes_used(stage: "Measurement") -> tuple[int, int]:
    """Number of codes in use and of all codes, in all codebooks together."""
    return sum(use.used for use in stage.codebooks), sum(use.size for use in stage.codebooks)


def _used(stage: "Measurement") -> str:
    used, size = codes_used(stage)
    return f"{used} of {size} ({used / size:.1%})"


def _distortion(book: BookSums) -> float:
    return float(book.error / max(1, book.latents))


def _coverage(book: BookSums) -> float | None:
    return None if book.near is None else book.near / max(1, book.latents)


def _of_covariance(which: int, metric: Callable[[Tensor], float]) -> Callable[[BookSums], float | None]:
    """A metric of the covariance of the latents (which=0) or of the codes that replace them (which=1)."""

    def of(book: BookSums) -> float | None:
        if book.moments is None or not book.latents:
            return None
        return metric(metrics.covariance_of_moments(book.moments[which][0], book.moments[which][1:], book.latents))

    return of


def _effective_dimension(covariance: Tensor) -> float:
    """The participation ratio to four digits, which do not depend on the order of summation."""
    return float(f"{metrics.participation_ratio(covariance):.4g}")


@dataclass(frozen=True)
class CodebookUse:
    """Figures of one codebook.

    Attributes:
        key: Name of the codebook in the checkpoint.
        size: Number of codes.
        dim: Dimensions of a code.
        latents: Number of latents.
        used: Codes with at least one assignment.
        usage: Share of such codes.
        used_10: Codes with at least 10 assignments.
        perplexity: exp of the entropy, in nats, of code usage.
        bits: log2 of the perplexity.
        top_share: Share of all assignments that the most used code takes.
        distortion: Mean squared distance from a latent to its emitted code, summed over dimensions.
        coverage: Share of the latents within the reference distance of their code (see coverage.py); None without a
            reference distance.
        effective_dimension: Participation ratio of the latents' covariance; this and the next three are None where
            moments were not computed.
        effective_dimension_codes: The same for the codes that replace the latents.
        dimensions_99: Principal directions that hold 99 % of the latents' variance.
        dimensions_99_codes: The same for the codes that replace the latents.
    """

    key: str
    size: int
    dim: int
    latents: int
    used: Annotated[int, Figure(lambda book: metrics.used(book.counts), "codes used", cell=_used, mean=True)]
    usage: Annotated[float, Figure(lambda book: metrics.usage(book.counts), mean=True)]
    used_10: Annotated[int, Figure(lambda book: metrics.used(book.counts, 10), "codes with 10 hits", "d")]
    perplexity: Annotated[float, Figure(lambda book: metrics.perplexity(book.counts), "perplexity", ".2f", mean=True)]
    bits: Annotated[float, Figure(lambda book: metrics.bits(book.counts), "bits per token", ".2f")]
    top_share: Annotated[float, Figure(lambda book: metrics.top_share(book.counts))]
    distortion: Annotated[float, Figure(_distortion, "distortion", ".4g", mean=True)]
    coverage: Annotated[float | None, Figure(_coverage, "coverage", ".1%", mean=True)]
    effective_dimension: Annotated[float | None, Figure(_of_covariance(0, _effective_dimension))] = None
    effective_dimension_codes: Annotated[float | None, Figure(_of_covariance(1, _effective_dimension))] = None
    dimensions_99: Annotated[int | None, Figure(_of_covariance(0, metrics.dimensions_that_hold))] = None
    dimensions_99_codes: Annotated[int | None, Figure(_of_covariance(1, metrics.dimensions_that_hold))] = None


def _mse(sums: Sums) -> float:
    return float(sums.error / sums.values)


def _psnr(sums: Sums) -> float | None:
    mse = _mse(sums)
    return metrics.psnr(mse) if mse else None


def _ssim(sums: Sums) -> float | None:
    return None if sums.similarity is None else float(sums.similarity / sums.images)


def _sharpness(sums: Sums) -> float | None:
    reconstructed = sums.reconstructed_detail
    return float(reconstructed / sums.detail) if sums.detail and reconstructed is not None else None


def _nmse(sums: Sums) -> float | None:
    if sums.total is None or sums.squares is None or not sums.values:
        return None
    variance = sums.squares / sums.values - (sums.total / sums.values) ** 2
    return float(sums.error / sums.values / variance) if variance > 0 else None


def _per_second(each: Callable[[BookSums], float]) -> Callable[[Sums], float | None]:
    """The sum over the tokens of a second of sound of what each costs by its codebook; None of other data."""

    def of(sums: Sums) -> float | None:
        if sums.rate is None or not sums.books[0].latents:
            return None
        total = sum(Fraction(each(book)) * book.latents for book in sums.books)
        return float(total * sums.rate / sums.books[0].latents)

    return of


def _bits(book: BookSums) -> float:
    return math.log2(len(book.counts))


def _entropy(book: BookSums) -> float:
    return metrics.bits(book.counts)


@dataclass(frozen=True)
class IdUse:
    """Figures of ids, the tuples of codes over all quantizer stages.

    Attributes:
        items: Number of ids: of items where latents have no grid or the grids of stages differ, else of positions.
        unique: Distinct ones.
        collision_rate: 1 - unique / items.
        changed: Share of the ids that are not what the surgery's nearest map makes of the id before, on a sample of at
            most 200,000; None before a surgery.
    """

    items: int
    unique: int
    collision_rate: float
    changed: float | None = field(default=None, compare=False)  # not of the state alone


def _quoted(name: str, label: str, form: str) -> Figure:
    """A figure of --metrics, whose cell says of how many items where it is not defined for all."""

    def of(sums: Sums) -> float | None:
        return sums.quoted[name].value if name in sums.quoted else None

    def cell(stage: "Measurement") -> str:
        value, without = getattr(stage, field_of(name)), stage.uncounted.get(name)
        if value is None:
            return "-"
        return f"{value:{form}} (without {without})" if without else f"{value:{form}}"

    return Figure(of, label, form, cell, mean=True)


def ids_of(sums: Sums) -> IdUse | None:
    """How many ids of a pass are distinct; None of one quantizer stage."""
    ids = sums.ids
    return IdUse(ids.items, ids.unique, 1 - ids.unique / ids.items) if ids is not None and ids.items else None


def _id_cell(stage: "Measurement") -> str:
    ids = stage.ids
    return "-" if ids is None else f"{ids.unique:,} of {ids.items:,} ({ids.collision_rate:.2%} collide)"


@dataclass(frozen=True)
class Measurement:
    """All figures of a model in one state, on one split.

    Attributes:
        split: Name of the split.
        images: Number of images, or of clips; None where there were only latents.
        mse: Mean squared error per value, of images in [0, 1] and reconstructions clamped to it, of waveforms, or of
            arrays in their own units; None where nothing was reconstructed.
        psnr: Peak signal-to-noise ratio in dB; None without any error.
        ssim: Mean structural similarity; None for waveforms, and for images smaller than its window.
        codebooks: Figures of each codebook.
        sharpness: metrics.detail of the reconstructions over that of the images, 1 where they are as sharp; None for
            waveforms, and for images without detail.
        counts: (size,) int64 of each codebook, assignments per code; empty where the measurement was read from JSON.
        nmse: mse of arrays over the variance of all their values; None for images and waveforms.
        ids: How many ids are distinct; None of one quantizer stage, and not in the JSON then.
        sampled_ids: (n, stages), ids of a sample of the items; None where there is none.
        tokens_per_second: Of sound, over all quantizer stages, from the hop; None, as those below, of other data, and
            not in the JSON then.
        bitrate: Bits in a second of sound, each token costing log2 of its codebook's size.
        entropy_bitrate: The same with the bits per token that counts give, for an ideal entropy coder.
        rfid: The figures of --metrics, from here on: docs/figures.md has their protocols. None of those that were not
            asked for, or are not defined for any item, which are not in the JSON then.
        lpips: As rfid.
        pesq: As rfid.
        stoi: As rfid.
        si_sdr: As rfid, in dB.
        mel: As rfid.
        stft: As rfid.
        robustness: As rfid: the mse with a tenth of the tokens swapped for codes near theirs.
        uncounted: By name of a figure of --metrics the items that it is not defined for, which are not in its mean.
    """

    split: str
    images: int | None
    mse: Annotated[float | None, Figure(_mse, "mse", ".6f", mean=True)]
    psnr: Annotated[float | None, Figure(_psnr, "PSNR, dB", ".2f", mean=True)]
    ssim: Annotated[float | None, Figure(_ssim, "SSIM", ".4f", mean=True)]
    codebooks: tuple[CodebookUse, ...]
    sharpness: Annotated[float | None, Figure(_sharpness, "sharpness", ".1%", mean=True)] = None
    counts: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    nmse: Annotated[float | None, Figure(_nmse, "nmse", ".4f", mean=True)] = None
    ids: Annotated[IdUse | None, Figure(ids_of, "unique ids", cell=_id_cell)] = None
    sampled_ids: Tensor | None = field(default=None, repr=False, compare=False)
    tokens_per_second: Annotated[float | None, Figure(_per_second(lambda book: 1), "tokens per second", ".6g")] = None
    bitrate: Annotated[float | None, Figure(_per_second(_bits), "bits per second", ".0f")] = None
    entropy_bitrate: Annotated[
        float | None, Figure(_per_second(_entropy), "bits per second, coded", ".0f", mean=True)
    ] = None
    rfid: Annotated[float | None, _quoted("rfid", "rFID", ".3f")] = None
    lpips: Annotated[float | None, _quoted("lpips", "LPIPS", ".4f")] = None
    pesq: Annotated[float | None, _quoted("pesq", "PESQ", ".3f")] = None
    stoi: Annotated[float | None, _quoted("stoi", "STOI", ".4f")] = None
    si_sdr: Annotated[float | None, _quoted("si-sdr", "SI-SDR, dB", ".2f")] = None
    mel: Annotated[float | None, _quoted("mel", "mel distance", ".4f")] = None
    stft: Annotated[float | None, _quoted("stft", "STFT distance", ".4f")] = None
    robustness: Annotated[float | None, _quoted("robustness", "mse, swapped tokens", ".6f")] = None
    uncounted: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All fields but the counts and the sample, which are long, and what other models or data have."""
        record = asdict(replace(self, counts=(), sampled_ids=None))
        absent = [name for name in _OPTIONAL if not getattr(self, name) and getattr(self, name) != 0]
        for name in ("counts", "sampled_ids", *absent):
            del record[name]
        return record

    @property
    def error(self) -> float:
        """The mse of a measurement with reconstructions."""
        assert self.mse is not None
        return self.mse


_OPTIONAL = ("nmse", "ids", "tokens_per_second", "bitrate", "entropy_bitrate", *map(field_of, QUOTED), "uncounted")
"""What other models or data have, or was not asked for."""


def with_changed(after: Measurement, before: Measurement | None, nearest: Sequence[Tensor]) -> Measurement:
    """A measurement after a surgery, with the share of the ids that it changed.

    Args:
        after: The measurement.
        before: That of the same data before the surgery; None where there is none, and then nothing is added.
        nearest: Of each quantizer stage (old size,) int64, the new code of each old one.
    """
    if before is None or before.sampled_ids is None or after.sampled_ids is None or after.ids is None:
        return after
    changed = share_changed(before.sampled_ids, after.sampled_ids, nearest)
    return replace(after, ids=replace(after.ids, changed=changed))


@cache
def figures_of(record: type[CodebookUse] | type[Measurement]) -> dict[str, Figure]:
    """The figures of a record by field name, in order."""
    hints = get_type_hints(record, include_extras=True).items()
    return {name: hint.__metadata__[0] for name, hint in hints if get_origin(hint) is Annotated}


def quoted_in(names: Collection[str]) -> dict[str, Figure]:
    """The figures of --metrics among the named fields of measurements, in order."""
    return {name: figure for name, figure in figures_of(Measurement).items() if name in names and name in _QUOTED}


_QUOTED = [*map(field_of, QUOTED)]


def use_of(sums: BookSums) -> CodebookUse:
    """The figures of a codebook."""
    values = {name: figure.of(sums) for name, figure in figures_of(CodebookUse).items()}
    return CodebookUse(sums.key, len(sums.counts), sums.dim, sums.latents, **values)


def measurement_of(sums: Sums, split: str, figures: Collection[str] = ("psnr",)) -> Measurement:
    """Compute the figures of a pass with reconstructions.

    Args:
        sums: Of all data of the split.
        split: Name of the split.
        figures: Those of the modality; psnr is None where it is not among them.

    Raises:
        CodebookError: The sums are of no image.
    """
    if not sums.images:
        raise CodebookError(f"nothing was measured: none of the {split} data can be read")
    values = {name: figure.of(sums) for name, figure in figures_of(Measurement).items()}
    if "psnr" not in figures:
        values["psnr"] = None
    return Measurement(
        split=split,
        images=sums.images,
        codebooks=tuple(map(use_of, sums.books)),
        counts=tuple(book.counts.cpu() for book in sums.books),
        sampled_ids=sums.ids.sample if sums.ids else None,
        uncounted={name: tally.skipped for name, tally in sums.quoted.items() if tally.skipped},
        **values,
    )
