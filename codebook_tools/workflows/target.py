"""What is operated on and measured: codebooks in a network that runs, or in a file without one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.codebook import Latents
from codebook_tools.data.dataset import Beyond, Media
from codebook_tools.data.latents import EncodedLatents
from codebook_tools.data.splits import Splits
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.accumulators import Sums
from codebook_tools.evaluation.coverage import reference_distance, reference_latents
from codebook_tools.evaluation.figures import Measurement, measurement_of
from codebook_tools.evaluation.ids import Ids
from codebook_tools.evaluation.measure import reconstructions, totals_of
from codebook_tools.evaluation.one_pass import run_pass
from codebook_tools.evaluation.usage import Survey, Tokens, survey, tokenize
from codebook_tools.models.agreement import LEAST, Agreement, has_quantizer, in_training
from codebook_tools.models.latent_cache import CachedLatents, cached
from codebook_tools.models.model import Model
from codebook_tools.models.stored_codes import added_bytes
from codebook_tools.runtime import distributed
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.request import Request


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

    def tokens(self, watch: Watch) -> tuple[Tokens, ...]:
        """The tokens of the calibration data, of each codebook."""
        surveys = (self.survey(stage, watch) for stage in range(len(self.model.books)))
        return tuple(Tokens(each.counts, each.codes) for each in surveys)

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
    def sums(self, references: Sequence[Tensor | None], watch: Watch) -> Sums:
        """The sums of a measurement of the codebooks as they are. references: `reference_latents` of each codebook."""

    @abstractmethod
    def measurement(self, sums: Sums) -> Measurement | None:
        """The figures of those sums; None where nothing is known of the use of the codebooks."""

    def media(self) -> list[Tensor]:
        """Batches that a proof of the written file needs."""
        return []

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
class Opened(Target):
    """Codebooks in a network that runs.

    Attributes:
        splits: The items of the data.
        calibration: The items for training and validation.
        test: The items that figures are of.
        agreed: How far the network's own quantizer chose the same codes, where it was asked.
    """

    splits: Splits
    calibration: Media
    test: Media
    agreed: Agreement | None = None

    @cached_property
    def few(self) -> list[Tensor]:
        """Batches of data with as many latents as an agreement is judged on, or all that there are."""
        media = self.calibration if len(self.calibration) else self.test
        batches, positions = list[Tensor](), 0
        size = self.request.batch_size
        for start in range(0, len(media.items), size):
            items, batch = media.load(media.items[start : start + size])
            if not items:
                continue
            batches.append(batch)
            with torch.no_grad():
                positions += self.model.encode(batch, keep=False)[:, 0].numel()
            if positions >= LEAST:
                break
        return batches

    def latents(self, stage: int) -> EncodedLatents | CachedLatents:
        """All calibration latents that reach the codebook `stage`."""
        request, model = self.request, self.model
        return cached(request.latents_cache, model.latents(self.calibration, request.batch_size, stage), model, stage)

    def survey(self, stage: int, watch: Watch) -> Survey:
        with watch.phase("encode"):
            codebook = self.model.books[stage].codebook
            return survey(self.latents(stage), codebook, seed=self.request.seed, watch=watch)

    def tokens(self, watch: Watch) -> tuple[Tokens, ...]:
        """The tokens that the model as it is chooses."""
        request = self.request
        with watch.phase("encode"):
            return tokenize(self.model, self.calibration, seed=request.seed, batch=request.batch_size, watch=watch)

    def all_latents(self, stage: int, survey: Survey) -> Latents:
        if self.request.latents_cache is None:
            raise CodebookError(
                f"--exact goes over {survey.total:,} latents many times: keep them with --latents-cache DIR, or "
                f"leave --exact out for k-means on {len(survey.sample):,} of them"
            )
        return self.latents(stage)

    def reference_latents(self, stage: int) -> Tensor | None:
        request = self.request
        return reference_latents(self.model, self.calibration, seed=request.seed, batch=request.batch_size, stage=stage)

    def sums(self, references: Sequence[Tensor | None], watch: Watch) -> Sums:
        with watch.phase("measure"):
            totals = totals_of(self.model, self.reference_distances(references))
            source = reconstructions(self.model, self.test, self.request.batch_size)
            if len(self.model.route) == 1:
                run_pass(source, [totals], watch)
                return totals.sums
            size = max(book.codebook.size for book in self.model.books)
            ids = Ids(size, len(self.model.route), self.request.seed)
            run_pass(source, [totals, ids], watch)
            return replace(totals.sums, ids=ids.done())

    def measurement(self, sums: Sums) -> Measurement:
        return measurement_of(sums, "test", self.model.modality.figures)

    def media(self) -> list[Tensor]:
        network = self.model.network
        return self.few if has_quantizer(network) or in_training(network) else []

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
        self.model.kept.limit = _LITTLE


_LITTLE = 32 << 20


def _beyond_warning(beyond: Mapping[str, Beyond], many: str) -> str:
    share = sum(of.count for of in beyond.values()) / sum(of.values for of in beyond.values())
    farthest = min(beyond, key=lambda name: (-beyond[name].peak, name))
    return (
        f"{len(beyond)} {many} go beyond ±1: {share:.2%} of their samples, up to {beyond[farthest].peak:.4g} in "
        f"{farthest}; nothing is clipped: scale the files where that is not meant"
    )
