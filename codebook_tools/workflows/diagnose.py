"""Why a codebook collapsed: every check, causes before symptoms."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path

from codebook_tools.clustering.metric import prepared
from codebook_tools.diagnosis.checks.dead_codes import dead_codes
from codebook_tools.diagnosis.checks.dimensional_collapse import dimensional_collapse
from codebook_tools.diagnosis.checks.duplicate_codes import copies, duplicate_codes
from codebook_tools.diagnosis.checks.encoder_drift import encoder_drift
from codebook_tools.diagnosis.checks.few_modes import few_modes
from codebook_tools.diagnosis.checks.learning_rate import learning_rate
from codebook_tools.diagnosis.checks.no_lloyd import no_lloyd
from codebook_tools.diagnosis.checks.not_installed import not_installed
from codebook_tools.diagnosis.checks.scale_mismatch import scale_mismatch
from codebook_tools.diagnosis.checks.split_mismatch import counting
from codebook_tools.diagnosis.checks.stale_ema import stale_ema
from codebook_tools.diagnosis.checks.uninitialized_flag import uninitialized_flag
from codebook_tools.diagnosis.checks.wrong_encoder import wrong_encoder
from codebook_tools.diagnosis.checks.wrong_input_range import wrong_input_range
from codebook_tools.diagnosis.checks.wrong_layout import wrong_layout
from codebook_tools.diagnosis.evidence import Evidence
from codebook_tools.diagnosis.finding import Check, CheckFunction, of_each_book, of_each_book_in
from codebook_tools.runtime.hub_ids import title_of
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.gather_evidence import gather
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import ResultHeader, header

CHECKS: dict[str, tuple[CheckFunction, str]] = {
    "not-installed": (
        not_installed,
        "codebook refit {source} --k {k}{data}, then codebook verify RESULT --against {source}",
    ),
    "uninitialised-flag": (
        of_each_book(uninitialized_flag),
        "codebook prune {model}{data} sets it; or set that tensor to true before anybody trains",
    ),
    "stale-ema": (stale_ema, "codebook prune {model}{data} writes sums and counts that are of the codes"),
    "few-modes": (few_modes, "shrink, do not repair: codebook prune {model}{data}"),
    "dimensional-collapse": (
        of_each_book_in(dimensional_collapse),
        "no surgery on codes alone repairs it: train the encoder on, codebook finetune {model}{training}",
    ),
    "wrong-layout": (
        of_each_book(wrong_layout),
        "codebook refit {source} --k {k}{data}; in code of your own, move the channels last before you flatten",
    ),
    "wrong-input-range": (wrong_input_range, "codebook refit {source} --k {k}{data_in_range}"),
    "wrong-encoder": (
        of_each_book_in(wrong_encoder),
        "codebook refit {original} --k {k}{data} keeps the trained encoder",
    ),
    "scale-mismatch": (
        of_each_book(scale_mismatch),
        "codebook finetune {model}{training} revives dead codes; codebook refit {model} --k {k}{data} replaces all",
    ),
    "encoder-drift": (
        encoder_drift,
        "codebook refit {original} --k {k}{data}: its codes follow the encoder; --train decoder freezes it",
    ),
    "learning-rate": (learning_rate, "codebook refit {original} --k {k}{data}{slower}"),
    "no-lloyd": (
        no_lloyd,
        "codebook refit {source} --k {k}{data}, which goes on from seeds by k-means",
    ),
    "counting": (of_each_book(counting), "codebook measure {model} --data ALL --test-data TEST, of the same kind"),
    "dead-codes": (
        of_each_book(dead_codes),
        "codebook finetune {model}{training} revives them{drop}",
    ),
    "duplicate-codes": (
        of_each_book(duplicate_codes),
        "codebook quantize {model} --k {distinct} --method pnn{data} merges them",
    ),
}
"""Causes before symptoms; of the causes, first those that lie in the tensors, then what the data say: of themselves, of
how the codes were made, of how they were trained. Beside each look, what mends it."""


SYMPTOMS = ("dead-codes", "duplicate-codes")
"""Checks of what a collapse looks like, and not of why."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis(ResultHeader):
    """The result of `diagnose`.

    Attributes:
        checks: In the order of CHECKS.
    """

    checks: tuple[Check, ...]

    json_keys = ("healthy", "checks")

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks whose verdict is "found"."""
        return tuple(check for check in self.checks if check.verdict == "found")

    @property
    def headline(self) -> str:
        """What was found, and whether a cause is among it."""
        names = ", ".join(check.name for check in self.failed)
        only_symptoms = all(check.name in SYMPTOMS for check in self.failed)
        unknown = "; no cause was found, these are symptoms" if only_symptoms else ""
        return f"not healthy: {names}{unknown}" if names else "healthy: nothing was found"

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return not self.failed


def diagnose(request: Request, watch: Watch, against: Path | None = None, trace: Path | None = None) -> Diagnosis:
    """Run every check on a model.

    Args:
        request: The model and its data.
        watch: Progress and seconds by phase.
        against: The original, before the surgery or the training.
        trace: The JSON of that surgery or training, with its history.

    Raises:
        CodebookError: A file cannot be opened, or the two models do not take the same data.
    """
    opened, evidence = gather(request, against, trace, watch)
    words = _words(request, against, evidence)
    checks = tuple(
        Check(**vars(look(evidence)), name=name, fix=" ".join(fix.format(**words).split()))
        for name, (look, fix) in CHECKS.items()
    )
    return Diagnosis(**header("diagnose", opened), checks=checks, seconds=watch.seconds)


def _words(request: Request, against: Path | None, evidence: Evidence) -> dict[str, object]:
    """What the fields in the repair commands stand for."""
    model, trace, data = request.title if request.model else "", evidence.trace, _as_typed(request)
    first, original = evidence.books[0], title_of(against) if against else ""
    return {
        "model": shlex.quote(model) if model else "",
        "original": shlex.quote(original) if original else "ORIGINAL",
        "source": shlex.quote(original or model) if original or model else "",
        "k": first.codebook.size,
        "distinct": first.codebook.size - int(copies(prepared(first.codebook).vectors).sum()),
        "data": data,
        "training": " --data DATA" if request.latents else data,
        "data_in_range": _as_typed(replace(request, input_range=evidence.input_range)) if evidence.ranges else data,
        "slower": f" --lr {trace.lr / 10:g}" if trace and trace.lr else "",
        # Of few latents, codes without one may have some among others.
        "drop": f"; codebook prune {shlex.quote(model) if model else ''}{data} drops them" if first.counted else "",
    }


_NAMED = {"data", "test_data", "network", "family", "metric", "size", "limit", "device", "precision", "workers"}
_NAMED |= {"latents", "seed", "batch_size", "codebook_key", "companion", "as_stored", "channels", "crop"}
_NAMED |= {"modality", "latent_axis", "group"}


def _as_typed(request: Request) -> str:
    """The options that another command needs for the same data and network: all that differ from their defaults."""
    words = list[str]()
    for option in fields(Request):
        value = getattr(request, option.name)
        if option.name not in _NAMED or value == option.default:
            continue
        name = option.name.replace("_", "-")
        if option.name == "size" and isinstance(value, tuple):
            value = ",".join(map(str, value))
        words += [f" --{name} {shlex.quote(str(one))}" for one in (value if isinstance(value, tuple) else (value,))]
    if request.input_range is not None:
        words.append(" --input-range={:g},{:g}".format(*request.input_range))
    return "".join([*words, " --skip-bad" * request.skip_bad])
