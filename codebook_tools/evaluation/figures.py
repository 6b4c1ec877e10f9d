"""The figures of a measurement: each is one field, which says how it is computed, shown and compared."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Annotated, Any, get_origin, get_type_hints

from torch import Tensor

from codebook_tools.errors import CodebookError
from codebook_tools.evaluation import metrics
from codebook_tools.evaluation.accumulators import BookSums, Sums

STAGES = {"before": "before", "surgery": "after surgery", "finetuned": "after fine-tuning"}


@dataclass(frozen=True)
class Figure:
    """A figure of a codebook or of a measurement, beside the field that holds it.

    Attributes:
        of: What it is, of the sums of a pass: BookSums where it is a codebook's, else Sums.
        label: What tables of stages call it; None where they leave it out.
        form: How those format it; of several codebooks, the lowest and the highest.
        cell: What they say of a measurement, where that is not its value.
        mean: Whether a comparison gives its mean over seeds.
    """

    of: Callable[[Any], Any] = field(repr=False)  # a page of the documents shows the rest
    label: str | None = None
    form: str = ""
    cell: Callable[["Measurement"], str] | None = field(default=None, repr=False)
    mean: bool = False


def codes_used(stage: "Measurement") -> tuple[int, int]:
    """How many codes of how many are in use, in all codebooks together."""
    return sum(use.used for use in stage.codebooks), sum(use.size for use in stage.codebooks)


def _used(stage: "Measurement") -> str:
    used, size = codes_used(stage)
    return f"{used} of {size} ({used / size:.1%})"


def _distortion(book: BookSums) -> float:
    return float(book.error / max(1, book.latents))


def _coverage(book: BookSums) -> float | None:
    return None if book.near is None else book.near / max(1, book.latents)


def _of_covariance(which: int, metric: Callable[[Tensor], float]) -> Callable[[BookSums], float | None]:
    """which: 0 of the latents, 1 of the codes that they are replaced by."""

    def of(book: BookSums) -> float | None:
        if book.moments is None or not book.latents:
            return None
        return metric(metrics.covariance_of_moments(book.moments[which][0], book.moments[which][1:], book.latents))

    return of


def _effective_dimension(covariance: Tensor) -> float:
    """To the digits in which it does not show in what order sums were added."""
    return float(f"{metrics.participation_ratio(covariance):.4g}")


@dataclass(frozen=True)
class CodebookUse:
    """How one codebook is used.

    Attributes:
        latents: How many were assigned.
        used_10: Codes with 10 hits or more.
        bits: log2 of the perplexity.
        distortion: Mean squared distance from a latent to its emitted code, summed over dimensions.
        coverage: Share of the latents that are nearer to their code than the reference distance; None without one
            (coverage.py says which).
        effective_dimension: Of the latents, by the participation ratio of their covariance; None where moments were not
            added up, as the next three.
        effective_dimension_codes: Of the codes that they are replaced by.
        dimensions_99: How many principal directions hold 99 % of the latents' variance.
        dimensions_99_codes: The same of the codes.
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
    return float(sums.shown_detail / sums.detail) if sums.detail and sums.shown_detail is not None else None


@dataclass(frozen=True)
class Measurement:
    """All figures of a model in one state, on one split.

    Attributes:
        images: Or clips; None where there were only latents.
        mse: Per value, images in [0, 1], reconstructions clamped to it, or of the waveform; None where nothing was
            reconstructed.
        psnr: dB, None without any error.
        ssim: None for waveforms, and where the images are too small for its window.
        sharpness: metrics.detail of the reconstructions over that of the images, 1 where they are as sharp; None for
            waveforms, and for images without any detail.
        counts: (size,) int64 of each codebook, how often each code was chosen; none where that was read from JSON.
    """

    split: str
    images: int | None
    mse: Annotated[float | None, Figure(_mse, "mse", ".6f", mean=True)]
    psnr: Annotated[float | None, Figure(_psnr, "PSNR, dB", ".2f", mean=True)]
    ssim: Annotated[float | None, Figure(_ssim, "SSIM", ".4f", mean=True)]
    codebooks: tuple[CodebookUse, ...]
    sharpness: Annotated[float | None, Figure(_sharpness, "sharpness", ".1%", mean=True)] = None
    counts: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """All but the counts, which are as many as there are codes."""
        record = asdict(replace(self, counts=()))
        del record["counts"]
        return record

    @property
    def error(self) -> float:
        """The mse of a measurement that reconstructed images."""
        assert self.mse is not None
        return self.mse


COLUMNS = (
    ("mse at step 0", "mse", "surgery", ".6f"),
    ("used at step 0", "used", "surgery", ".0f"),
    ("mse fine-tuned", "mse", "finetuned", ".6f"),
    ("used", "used", "finetuned", ".1f"),
    ("perplexity", "perplexity", "finetuned", ".1f"),
    ("coverage", "coverage", "finetuned", ".3f"),
)
"""Of a comparison: heading, figure, stage and format. A table has room for few."""


@cache
def figures_of(record: type[CodebookUse] | type[Measurement]) -> dict[str, Figure]:
    """The table of figures: those of a record by the names of their fields, in order."""
    hints = get_type_hints(record, include_extras=True).items()
    return {name: hint.__metadata__[0] for name, hint in hints if get_origin(hint) is Annotated}


def use_of(sums: BookSums) -> CodebookUse:
    """The figures of a codebook."""
    values = {name: figure.of(sums) for name, figure in figures_of(CodebookUse).items()}
    return CodebookUse(sums.key, len(sums.counts), sums.dim, sums.latents, **values)


def measurement_of(sums: Sums, split: str, figures: Collection[str] = ("psnr",)) -> Measurement:
    """The figures of a pass with reconstructions.

    Args:
        sums: Of all data of the split.
        split: Its name.
        figures: Of the modality; without psnr there is none.

    Raises:
        CodebookError: The pass saw nothing.
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
        **values,
    )


def in_markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, whose first line is the headings."""
    head, *rows = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def stage_rows(stages: Mapping[str, Measurement | None], kept: str | None) -> list[tuple[str, ...]]:
    """The headings, and the figures of each stage there is; a star is at the one that was kept, where there are others.
    kept: None of a measurement alone."""
    there = {name: stage for name, stage in stages.items() if stage is not None}
    names = {name: STAGES[name] if kept else "measured" for name in there}
    if len(there) > 1 and kept in there:
        names[kept] += " *"
    return rows_of({names[name]: stage for name, stage in there.items()})


def rows_of(stages: Mapping[str, Measurement | None]) -> list[tuple[str, ...]]:
    """The headings, and the figures of each, by name; those that none has are left out."""
    there = {name: stage for name, stage in stages.items() if stage is not None}
    rows = [("", *there)]
    for kind in (CodebookUse, Measurement):
        for name, figure in figures_of(kind).items():
            cells = [_cell(kind, name, figure, stage) for stage in there.values()]
            if figure.label and any(cell != "-" for cell in cells):
                rows.append((figure.label, *cells))
    return rows


def _cell(kind: type, name: str, figure: Figure, stage: Measurement) -> str:
    if figure.cell:
        return figure.cell(stage)
    values = [getattr(record, name) for record in (stage.codebooks if kind is CodebookUse else (stage,))]
    if None in values:
        return "-"
    low, high = format(min(values), figure.form), format(max(values), figure.form)
    return low if low == high else f"{low} to {high}"
