"""Results as tables for the terminal: renderables, which the command line prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from codebook_tools.evaluation.figures import STAGES, Measurement
from codebook_tools.evaluation.tables import rows_of, stage_rows
from codebook_tools.models.demo import DEMO
from codebook_tools.models.proof import Proof
from codebook_tools.models.verification import Verification
from codebook_tools.remapping.remap import Remapped
from codebook_tools.report.terminal.diagnosis import diagnosis_table
from codebook_tools.report.terminal.fitted import FittedTable, Prose
from codebook_tools.report.terminal.histogram import UsageLines
from codebook_tools.report.terminal.tokens import beam_line, decoding_table, encoding_table
from codebook_tools.workflows.chain import Chain, ChainPlan
from codebook_tools.workflows.code_cards import Codes
from codebook_tools.workflows.comparison_rows import Comparison, notes, table_rows
from codebook_tools.workflows.decode import Decoding
from codebook_tools.workflows.diagnose import Diagnosis
from codebook_tools.workflows.dry_run import Plan
from codebook_tools.workflows.encode import Encoding
from codebook_tools.workflows.latent_map import Map
from codebook_tools.workflows.result import Result
from codebook_tools.workflows.session import UNSEEN
from codebook_tools.workflows.sweep import Sweep, sweep_rows

_FEW_CODES = 10  # that are listed
_FEW_ITEMS = 10  # below which a warning is due

_COMPARISON_COLUMNS = (
    *(
        "mse fine-tuned",
        "mse at step 0",
        "distortion",
        "used",
        "perplexity",
        "used at step 0",
        "coverage",
        "kept",
        "seconds",
        "bytes",
    ),
)
_SWEEP_COLUMNS = ("mse", "distortion", "used", "coverage", "perplexity", "bits")

Found = Result | Chain | Comparison | Sweep | Codes | Map | Diagnosis | Encoding | Decoding
"""The result of a command that measures."""


def table_of(result: Found | Plan | ChainPlan) -> RenderableType:
    """The table of a result or of a dry run."""
    tables: dict[type, Callable[[Any], RenderableType]] = {
        Result: result_table,
        Chain: chain_table,
        Comparison: comparison_table,
        Sweep: sweep_table,
        Codes: codes_table,
        Map: map_table,
        Diagnosis: diagnosis_table,
        Encoding: encoding_table,
        Decoding: decoding_table,
        Plan: plan_table,
        ChainPlan: chain_plan_table,
    }
    return tables[type(result)](result)


def result_table(result: Result) -> RenderableType:
    """The phases side by side, the usage of codes, and what was written."""
    stages = {name: stage for name, stage in result.stages.items() if stage is not None}
    table = _table(stage_rows(result.stages, result.kept))
    lines: list[RenderableType] = [Prose(UNSEEN)] if UNSEEN in result.warnings else []
    lines += [table] if stages else []
    if stages:
        first = next(iter(stages.values()))
        lines.append(Prose(_about(first, result.settings), style="dim"))
        if len(first.codebooks) > 1:
            lines += ["", _books_table(stages), ""]
        elif first.counts:
            names = STAGES if len(stages) > 1 else dict.fromkeys(stages, "usage")
            lines.append(UsageLines({names[name]: stage.counts[0] for name, stage in stages.items() if stage.counts}))
    if result.beam:
        lines.append(beam_line(result.beam))
    if "shard" in result.settings:
        lines.append(
            Prose(f"of shard {result.settings['shard']} alone; `codebook measure --merge` adds all", style="dim")
        )
    if "codes" in result.settings:
        lines.append(Prose(f"codes {result.settings['codes']}"))
    if result.command == "measure" and "stats" in result.settings:
        lines.append(Prose(f"counts written to {result.settings['stats']}"))
    if result.outputs["model"]:
        lines.append(Prose(f"{'* kept, and ' if len(stages) > 1 else ''}written to {result.outputs['model']}"))
    if address := result.outputs.get("hub"):
        lines.append(Prose(f"committed to {address}"))
    if config := result.outputs.get("config"):
        lines.append(Prose(f"of one batch; written to {config}, which other commands read in this folder"))
    if "packed" in result.bytes:
        packed = f"packed, the codebook would take {result.bytes['packed']:,} bytes; the file stores it as before"
        lines.append(Prose(packed, style="dim"))
    if result.proof is not None:
        lines.append(Prose(proof_line(result.proof), style="dim"))
    return Group(*lines)


def proof_line(proof: Proof | None) -> str:
    """How the figures were proven on the model that loads the file, in words."""
    if proof is None:
        return "nothing was compared with a network"
    if proof.by == "file":
        return "the file alone was read back: no network was given that could load it"
    revived = f"; one step of its training moved {proof.revived} codes" if proof.revived else ""
    if proof.by == "module":
        return f"the network loads the file, and its {proof.of:,} codes are those that were meant{revived}"
    ties = f", {proof.near_ties:,} others being as near" if proof.near_ties else ""
    return f"the network's own quantizer chooses the same {proof.agree:,} of {proof.of:,} codes{ties}{revived}"


def _about(first: Measurement, settings: Mapping[str, object]) -> str:
    """What the figures were measured on."""
    if first.images is None:
        done = "measured on" if "latents" in settings else "counts of"
        return f"{done} {first.codebooks[0].latents:,} {first.split} latents"
    if "input_range" not in settings:
        return f"counts of {first.images:,} items"
    bounds = f", input range {settings['input_range']}" if first.ssim is not None else ""
    rough = "; so few that figures are rough" if first.images < _FEW_ITEMS else ""
    return f"measured on {first.images:,} {first.split} items{bounds}{rough}"


def _books_table(stages: Mapping[str, Measurement]) -> FittedTable:
    """Codes used and perplexity of each of several codebooks, phase by phase."""
    lines = [("codebook", *(STAGES[name] for name in stages))]
    for uses in zip(*(stage.codebooks for stage in stages.values()), strict=True):
        cells = [f"{use.used} of {use.size}, perplexity {use.perplexity:.1f}" for use in uses]
        lines.append((uses[0].key, *cells))
    return _table(lines, numbers=False)


def details_table(result: Found) -> RenderableType:
    """Settings, seconds by phase, and the trace of a fine-tuning."""
    settings = [("setting", "value"), *((name, str(value)) for name, value in result.settings.items())]
    seconds = [("phase", "seconds"), *((name, f"{value:.1f}") for name, value in result.seconds.items())]
    parts: list[RenderableType] = ["", _table(settings, numbers=False), "", _table(seconds, numbers=False)]
    if isinstance(result, Result) and result.trace:
        trace: list[tuple[str, ...]] = [
            ("step", "loss", "validation mse", "used", "perplexity", "distortion", "revived")
        ]
        for p in result.trace:
            loss = "-" if p.loss is None else f"{p.loss:.4f}"
            spread = (f"{p.perplexity:.2f}", f"{p.distortion:.4g}", str(p.revived))
            trace.append((str(p.step), loss, f"{p.validation_mse:.6f}", str(p.used), *spread))
        parts += ["", _table(trace)]
    return Group(*parts)


def plan_table(plan: Plan) -> RenderableType:
    """The plan of a dry run."""
    table = Table(box=None, pad_edge=False, show_header=False)
    images = plan.settings["images"]
    assert isinstance(images, dict)
    limit = "" if plan.size["after"] else " at most"
    for label, value in (
        ("would run", plan.command),
        ("family", plan.family),
        ("codes", f"{plan.size['before']} -> {plan.size['after'] or 'as the counts decide'}"),
        ("images", ", ".join(f"{count:,} {name}" for name, count in images.items())),
        ("would write", plan.outputs["model"] or "a file named after the new size"),
        ("and", plan.outputs["index_map"] or "its index map"),
        ("bytes", f"{plan.bytes['before']:,} -> {plan.bytes['after']:,}{limit}"),
        ("time", f"about {plan.seconds['estimate']:.0f} s"),
    ):
        table.add_row(label, value)
    return Group(table, "Nothing was written.")


def chain_table(chain: Chain) -> RenderableType:
    """The model before and after each step, side by side, and what was written."""
    parts: list[RenderableType] = [_table(rows_of(stages_of(chain)))]
    parts += [Prose(f"written to {path}") for path in chain.outputs.values()]
    parts += [Prose(proof_line(chain.proof), style="dim")] if chain.proof else []
    return Group(*parts)


def stages_of(chain: Chain) -> dict[str, Measurement | None]:
    """What was measured on the original model and after each step, by name."""
    after = {f"{i}, {step.command}": step.kept_stage for i, step in enumerate(chain.steps, 1)}
    return {"before": chain.steps[0].before, **after}


def chain_plan_table(chain: ChainPlan) -> RenderableType:
    """The plan of a dry run of a recipe, a line for each step."""
    lines: list[Sequence[str]] = [("step", "codes", "about")]
    for i, plan in enumerate(chain.plans, 1):
        after = plan.size["after"] or "as the counts decide"
        before = plan.size["before"] or "as before"
        lines.append((f"{i}, {plan.command}", f"{before} -> {after}", f"{plan.seconds['estimate']:.0f} s"))
    return Group(_table(lines), Prose("Nothing was written."))


def comparison_table(comparison: Comparison) -> RenderableType:
    """A line for each strategy and size."""
    lines = table_rows(comparison.summaries)
    if "mse fine-tuned" in lines[0]:
        step_0, finetuned = (lines[0].index(heading) for heading in ("mse at step 0", "mse fine-tuned"))
        for line, summary in zip(lines[1:], comparison.summaries, strict=True):
            if summary.error is not None:
                line[finetuned] = line[step_0]  # says so, whichever of the two is left out
    elsewhere = f"{comparison.outputs['table']} has all columns"
    importance = with_quoted(_COMPARISON_COLUMNS, lines[0])
    table = FittedTable(lines, fixed=2, importance=importance, elsewhere=elsewhere)
    about = f"rows: {comparison.outputs['rows']}, table: {comparison.outputs['table']}"
    if any(summary.seeds > 1 for summary in comparison.summaries):
        about += "; figures are mean ± standard deviation over the seeds"
    first = [Prose(UNSEEN)] if UNSEEN in comparison.warnings else []
    return Group(*first, table, *(Prose(note) for note in notes(comparison.summaries)), Prose(about, style="dim"))


def with_quoted(importance: Sequence[str], headings: Sequence[str]) -> list[str]:
    """The columns by importance, with those of --metrics, which the user asked for, right after the error."""
    first, *others = importance
    return [first, *(heading for heading in headings[2:] if heading not in importance), *others]


def sweep_table(sweep: Sweep) -> RenderableType:
    """A line for each point, and the suggested K."""
    dimension = sweep.effective_dimension
    effective = "" if dimension is None else f"the latents' effective dimension is {dimension:.1f}; "
    about = Prose(f"{effective}rows: {sweep.outputs['rows']}, table: {sweep.outputs['table']}", style="dim")
    suggested = Prose(f"suggested: {sweep.suggested_k} codes", style="bold")
    lines, elsewhere = sweep_rows(sweep), f"{sweep.outputs['table']} has all columns"
    importance = with_quoted(_SWEEP_COLUMNS, lines[0])
    table = FittedTable(lines, fixed=2, importance=importance, elsewhere=elsewhere)
    return Group(table, suggested, Prose(sweep.headline), about)


def codes_table(codes: Codes) -> RenderableType:
    """The first of the codes, and the page that shows them."""
    lines: list[Sequence[str]] = [("code", "tokens", "share", "error", "near")]
    for card in codes.cards[:_FEW_CODES]:
        error = "-" if card.error is None else f"{card.error:.4g}"
        near = ", ".join(map(str, card.neighbours))
        lines.append((str(card.code), f"{card.count:,}", f"{card.share:.2%}", error, near))
    page = f"to be seen in {codes.outputs['report']}"
    return Group(_table(lines), Prose(_usage(codes)), Prose(page))


def map_table(plane: Map) -> RenderableType:
    """The usage and coverage of the codes, and the files that show the map."""
    covered = "" if plane.coverage is None else f"; they cover {plane.coverage:.1%} of the test latents"
    return Group(Prose(_usage(plane) + covered), *(Prose(f"written to {path}") for path in plane.outputs.values()))


def _usage(result: Codes | Map) -> str:
    return f"{result.used} of {result.size} codes used ({result.used / result.size:.1%})"


def _table(lines: Iterable[Sequence[str]], numbers: bool = True) -> FittedTable:
    """The first line has the headings. numbers: whether all columns but the first are aligned at the right."""
    return FittedTable(list(lines), numbers)


def verification_table(verification: Verification) -> RenderableType:
    """Whether a file is sound, or what differs and must not."""
    if verification.ok and not verification.against:
        return Prose(f"{verification.model} is sound: {proof_line(verification.proof)}")
    if verification.ok:
        original = "the bundled demo" if verification.against == str(DEMO) else verification.against
        sound = f"{verification.model} is sound: only what may differ from {original} differs"
        return Prose(f"{sound}; {proof_line(verification.proof)}" if verification.proof else sound)
    rows = ((difference.key, difference.what) for difference in verification.differences)
    return _table([("tensor", "what is wrong"), *rows], numbers=False)


def remap_table(remapped: Remapped) -> RenderableType:
    """How many tokens, or rows of priors, changed, and what was written."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, count in (
        ("ids", remapped.tokens),
        ("changed", remapped.changed),
        ("of removed codes", remapped.removed),
        ("by their nearest code", remapped.nearest),
    ):
        table.add_row(label, f"{count:,}")
    lines = [Prose(f"written to {output}") for output in remapped.outputs.values()]
    return Group(table, *lines, *([Prose(remapped.next_step)] if remapped.next_step else []))
