"""What is operated on and measured: codebooks with data, with latents from files, or with counts alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.hashing import file_sha256
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.codebook import Codebook, Latents
from codebook_tools.data.dataset import Beyond, Media
from codebook_tools.data.items import items_sha256
from codebook_tools.data.latent_files import FileLatents, limited_latents
from codebook_tools.data.latents import EncodedLatents, ItemLatents
from codebook_tools.data.rows import Rows
from codebook_tools.data.splits import Splits
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.accumulators import Draw, Sums, Totals
from codebook_tools.evaluation.coverage import POINTS, reference_distance, reference_latents
from codebook_tools.evaluation.figures import Measurement, ids_of, measurement_of, use_of
from codebook_tools.evaluation.ids import Ids
from codebook_tools.evaluation.measure import reconstructions, totals_of
from codebook_tools.evaluation.one_pass import Accumulator, MediaSource, WalkSource, run_pass
from codebook_tools.evaluation.quoted.figure import QuotedFigure, Tallies
from codebook_tools.evaluation.quoted.tally import remarks
from codebook_tools.evaluation.stats_file import Part
from codebook_tools.evaluation.usage import Survey, Tokens, survey, tally, tokenize
from codebook_tools.models.agreement import LEAST, Agreement, has_quantizer, in_training
from codebook_tools.models.from_latents import LatentsModel, WalkedLatents
from codebook_tools.models.latent_cache import CachedLatents, cached
from codebook_tools.models.model import Book, Model
from codebook_tools.models.proof import Proof, prove, prove_file
from codebook_tools.models.stored_codes import added_bytes
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.request import Request

Split = Literal["calibration", "test"]
"""What strategies see, and what figures are of."""


@dataclass(eq=False, kw_only=True)
class Target(ABC):
    """Codebooks, and where their latents and counts come from.

    Attributes:
        request: The model and its data.
        model: The codebooks and their file. Without a network it has no tensors.
        warnings: For the user, in the order in which they came up.
        settings: All that was asked for, chosen or detected, for the JSON.
    """

    request: Request
    model: Model
    warnings: list[str] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def codebooks(self) -> list[FoundCodebook]:
        """Key, axis and size of each codebook in the file."""
        return [book.stored for book in self.model.books]

    @property
    def size(self) -> int:
        """Codes, now, of the largest codebook that is operated on."""
        return max(self.model.books[stage].codebook.size for stage in self.model.chosen)

    def bytes_at(self, size: int) -> int:
        """Bytes of the model's file with the codebooks that are operated on at that size, without metadata."""
        checkpoint = self.model.checkpoint
        books = [self.codebooks[stage] for stage in self.model.chosen]
        return checkpoint.nbytes + sum(added_bytes(checkpoint, book, size) for book in books)

    @abstractmethod
    def survey(self, stage: int, watch: Watch) -> Survey:
        """Counts, and a sample, of the calibration latents that reach the codebook `stage`."""

    @abstractmethod
    def tokens(self, watch: Watch) -> tuple[Tokens, ...]:
        """The tokens of the calibration data, of each codebook."""

    @abstractmethod
    def all_latents(self, stage: int, survey: Survey) -> Latents:
        """All calibration latents that were surveyed.

        Raises:
            CodebookError: They cannot be read again.
        """

    @abstractmethod
    def reference_latents(self, stage: int) -> Tensor | None:
        """(n, dim): the calibration latents that coverage is measured against; None where there are none."""

    @abstractmethod
    def sums(self, references: Sequence[Tensor | None], watch: Watch, *, compared: bool = True) -> Sums:
        """The sums of a measurement of the codebooks as they are.

        Args:
            references: `reference_latents` of each codebook.
            watch: Is told the progress.
            compared: Whether those of another state of the codebooks will be compared, for which ids are sampled.
        """

    @abstractmethod
    def measurement(self, sums: Sums) -> Measurement | None:
        """The figures of those sums; None where nothing is known of the use of the codebooks."""

    def media(self) -> list[Tensor]:
        """Batches that a proof of the written file needs."""
        return []

    @abstractmethod
    def prove(self, written: Checkpoint, media: Sequence[Tensor]) -> Proof:
        """Compare a written file with the codebooks as they are. media: of `media`.

        Raises:
            VerificationError: The file holds something else.
        """

    def of_data(self) -> list[str]:
        """Warnings of the passes over data."""
        return []

    def reference_distances(self, references: Sequence[Tensor | None]) -> list[float | None]:
        """Of each codebook as it is now, the squared distance up to which a latent counts as covered."""
        return [
            reference_distance(rows, book.codebook, seed=self.request.seed)
            for rows, book in zip(references, self.model.books, strict=True)
        ]


@dataclass(eq=False, kw_only=True)
class Streamed(Target):
    """Codebooks whose latents can be read again, so that each state of the codebooks is measured.

    Attributes:
        agreed: How far the network's own quantizer chose the same codes, where it was asked.
    """

    agreed: Agreement | None = None

    @abstractmethod
    def latents(self, stage: int) -> ItemLatents:
        """All calibration latents that reach the codebook `stage`."""

    @abstractmethod
    def source(self, split: Split, task: str) -> MediaSource | WalkSource:
        """A split of the data, to be passed through all codebooks. task: label of the progress."""

    @abstractmethod
    def data_sha256(self) -> dict[str, str]:
        """By split, what tells these data from others."""

    @abstractmethod
    def measurement(self, sums: Sums) -> Measurement: ...

    def survey(self, stage: int, watch: Watch) -> Survey:
        with watch.phase("encode"):
            codebook = self.model.books[stage].codebook
            return survey(self.latents(stage), codebook, seed=self.request.seed, watch=watch)

    def tokens(self, watch: Watch) -> tuple[Tokens, ...]:
        """The tokens that the model as it is chooses."""
        with watch.phase("encode"):
            return tokenize(self.model, self.source("calibration", "tokens"), seed=self.request.seed, watch=watch)

    def _with_ids(
        self, source: MediaSource | WalkSource, totals: Totals, watch: Watch, sampled: bool, *more: Accumulator
    ) -> Sums:
        """The sums of a pass, and the ids of its items where there are several quantizer stages."""
        if len(self.model.route) == 1:
            run_pass(source, [totals, *more], watch)
            return totals.sums
        size = max(book.codebook.size for book in self.model.books)
        ids = Ids(size, len(self.model.route), self.request.seed if sampled else None)
        run_pass(source, [totals, ids, *more], watch)
        return replace(totals.sums, ids=ids.done())


@dataclass(eq=False, kw_only=True)
class Opened(Streamed):
    """Codebooks in a network that runs.

    Attributes:
        splits: The items of the data.
        calibration: The items for training and validation.
        test: The items that figures are of.
        quoted: The figures of --metrics.
    """

    splits: Splits
    calibration: Media
    test: Media
    quoted: tuple[QuotedFigure, ...] = ()

    @property
    def batch(self) -> int:
        """Items in a batch of a pass."""
        return (self.calibration if len(self.calibration) else self.test).at_once(self.request.batch_size)

    @cached_property
    def few(self) -> list[Tensor]:
        """Batches of data with as many latents as an agreement is judged on, or all that there are."""
        media = self.calibration if len(self.calibration) else self.test
        batches, positions = list[Tensor](), 0
        for _, batch in media.whole().batches(self.batch):
            batches.append(batch)
            with torch.no_grad():
                positions += self.model.encode(batch, keep=False)[:, 0].numel()
            if positions >= LEAST:
                break
        return batches

    def latents(self, stage: int) -> EncodedLatents | CachedLatents:
        """All calibration latents that reach the codebook `stage`."""
        request, model = self.request, self.model
        return cached(request.latents_cache, model.latents(self.calibration, self.batch, stage), model, stage)

    def source(self, split: Split, task: str) -> MediaSource:
        media = self.calibration if split == "calibration" else self.test
        return MediaSource(media, self.model.pass_through, self.batch, task)

    def data_sha256(self) -> dict[str, str]:
        splits = self.splits
        return {"calibration": items_sha256(splits.calibration), "test": items_sha256(splits.test)}

    def all_latents(self, stage: int, survey: Survey) -> Latents:
        if self.request.latents_cache is None:
            raise CodebookError(
                f"--exact goes over {survey.total:,} latents many times: keep them with --latents-cache DIR, or "
                f"leave --exact out for k-means on {len(survey.sample):,} of them"
            )
        return self.latents(stage)

    def reference_latents(self, stage: int) -> Tensor | None:
        request = self.request
        return reference_latents(self.model, self.calibration, seed=request.seed, batch=self.batch, stage=stage)

    def sums(self, references: Sequence[Tensor | None], watch: Watch, *, compared: bool = True) -> Sums:
        with watch.phase("measure"):
            model, quoted = self.model, Tallies(self.quoted, self.model)
            totals = totals_of(model, self.reference_distances(references))
            source = reconstructions(model, self.test, self.batch)
            sums = self._with_ids(source, totals, watch, compared, quoted)
        positions = model.modality.positions_per_second(model.network)
        rate = positions and positions * model.route.count(0)
        return replace(sums, quoted=quoted.done, rate=rate)

    def measurement(self, sums: Sums) -> Measurement:
        new = [remark for remark in remarks(sums.quoted, self.model.modality.many) if remark not in self.warnings]
        self.warnings += new
        return measurement_of(sums, "test", self.model.modality.figures)

    def media(self) -> list[Tensor]:
        network = self.model.network
        return self.few if has_quantizer(network) or in_training(network) else []

    def prove(self, written: Checkpoint, media: Sequence[Tensor]) -> Proof:
        return prove(self.model, written, media)

    def unreadable(self) -> dict[str, str]:
        """Names of the items that some process could not read, and why."""
        parts = distributed.each(self.calibration.bad | self.test.bad)
        return {name: reason for bad in parts for name, reason in bad.items()}

    def of_data(self) -> list[str]:
        """Items left out, and audio beyond full scale."""
        many, warnings = self.model.modality.many, list[str]()
        if bad := self.unreadable():
            first = "; ".join(f"{name} ({bad[name]})" for name in sorted(bad)[:3])
            warnings.append(f"{len(bad)} unreadable {many} were skipped: {first}")
        beyond = dict[str, Beyond]()
        for part in distributed.each(self.calibration.beyond | self.test.beyond):
            beyond |= part
        return [*warnings, _beyond_warning(beyond, many)] if beyond else warnings

    def pass_once(self) -> None:
        """Limit what is cached of data, where calibration data are read once and test data twice.

        Memory must not grow with the data.
        """
        self.calibration.keep(0)
        self.test.keep(_LITTLE)
        self.model.kept.limit = 0 if isinstance(self.test.items, Rows) else _LITTLE  # rows are small: encoded anew


@dataclass(eq=False, kw_only=True)
class LatentsTarget(Streamed):
    """Codebooks, and files of the latents that meet the first one.

    Attributes:
        model: Which rows of the files enter; one codebook without a network, or all with theirs.
        calibration: Rows that strategies see.
        test: Rows that figures are of.
    """

    model: LatentsModel
    calibration: FileLatents
    test: FileLatents
    _references: tuple[Sequence[Book], Sequence[Tensor]] = field(default=((), ()), init=False, repr=False)

    @property
    def with_network(self) -> bool:
        """Whether there is a network around the codebooks."""
        return bool(self.model.network.state_dict())

    def latents(self, stage: int) -> WalkedLatents:
        return WalkedLatents(self.calibration, self.model, stage)

    def source(self, split: Split, task: str) -> WalkSource:
        return WalkSource(self.calibration if split == "calibration" else self.test, self.model, task)

    def data_sha256(self) -> dict[str, str]:
        request = self.request
        files = {"calibration": request.latents, "test": tuple(map(str, request.test_data))}
        return {split: " ".join(file_sha256(Path(path)) for path in paths) for split, paths in files.items()}

    def drawn(self, count: int) -> FileLatents:
        """At most so many rows for calibration, by seed; the same in every process."""
        return limited_latents(replace(self.calibration, part=(0, 1)), count, self.request.seed)

    @cached_property
    def _reference(self) -> FileLatents:
        return self.drawn(POINTS)

    def all_latents(self, stage: int, survey: Survey) -> Latents:
        return self.latents(stage)

    def reference_latents(self, stage: int) -> Tensor:
        books = self.model.books
        if self._references[0] is not books:  # of all stages in one pass, for each walks through those before it
            seed = self.request.seed
            draws = [Draw(book.codebook, ("latents",), seed, POINTS, i) for i, book in enumerate(books)]
            run_pass(WalkSource(self._reference, self.model, "encode"), draws, Watch())
            self._references = books, [draw.sampler.columns()[0] for draw in draws]
        return self._references[1][stage]

    def sums(self, references: Sequence[Tensor | None], watch: Watch, *, compared: bool = True) -> Sums:
        with watch.phase("measure"):
            totals = totals_of(self.model, self.reference_distances(references), structure=False)
            return replace(self._with_ids(self.source("test", "measure on test"), totals, watch, compared), images=0)

    def measurement(self, sums: Sums) -> Measurement:
        return Measurement("test", None, None, None, None, tuple(map(use_of, sums.books)), ids=ids_of(sums))

    def part(self, watch: Watch) -> Part:
        """The counts, as `measure --stats` keeps them."""
        sums, _ = tally(self.model, self.source("calibration", "encode"), seed=self.request.seed, limit=1, watch=watch)
        return Part(self.model.checkpoint.sha256, "calibration", {}, (1, 1), replace(sums, images=0), {})

    def rows(self, count: int) -> Tensor:
        """(n, dim) float32: at most so many rows for calibration."""
        return torch.cat(list(self.drawn(count)))

    def media(self) -> list[Tensor]:
        return [self.rows(LEAST)] if has_quantizer(self.model.network) else []

    def prove(self, written: Checkpoint, media: Sequence[Tensor]) -> Proof:
        if self.with_network:
            return prove(self.model, written, media)
        return prove_file(written, written_books(self.model))


def written_books(model: Model) -> list[tuple[FoundCodebook, Codebook]]:
    """Each codebook as it is, with its place in the file that holds it."""
    return [(book.stored.resized(len(book.vectors)), book.codebook) for book in model.books]


_LITTLE = 32 << 20


def _beyond_warning(beyond: Mapping[str, Beyond], many: str) -> str:
    share = sum(of.count for of in beyond.values()) / sum(of.values for of in beyond.values())
    farthest = min(beyond, key=lambda name: (-beyond[name].peak, name))
    return (
        f"{len(beyond)} {many} go beyond ±1: {share:.2%} of their samples, up to {beyond[farthest].peak:.4g} in "
        f"{farthest}; nothing is clipped: scale the files where that is not meant"
    )
