"""Results as tables for the terminal: renderables, which the command line prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from codebook_tools.evaluation.figures import STAGES, Measurement, rows_of, stage_rows
from codebook_tools.models.demo import DEMO
from codebook_tools.models.proof import Proof
from codebook_tools.models.verification import Verification
from codebook_tools.remapping.remap import Remapped
from codebook_tools.report.terminal.diagnosis import diagnosis_table
from codebook_tools.report.terminal.histogram import UsageLines
from codebook_tools.workflows.chain import Chain, ChainPlan
from codebook_tools.workflows.code_cards import Codes
from codebook_tools.workflows.comparison_rows import Comparison, notes, table_rows
from codebook_tools.workflows.diagnose import Diagnosis
from codebook_tools.workflows.dry_run import Plan
from codebook_tools.workflows.latent_map import Map
from codebook_tools.workflows.result import Result
from codebook_tools.workflows.session import UNSEEN
from codebook_tools.workflows.sweep import Sweep, sweep_rows

_FEW = 10  # codes that a terminal shows

Found = Result | Chain | Comparison | Sweep | Codes | Map | Diagnosis
"""What a command that measures ends in."""


def table_of(found: Found | Plan | ChainPlan) -> RenderableType:
    """What a command found, as its table."""
    tables: dict[type, Callable[[Any], RenderableType]] = {
        Result: result_table,
        Chain: chain_table,
        Comparison: comparison_table,
        Sweep: sweep_table,
        Codes: codes_table,
        Map: map_table,
        Diagnosis: diagnosis_table,
        Plan: plan_table,
        ChainPlan: chain_plan_table,
    }
    return tables[type(found)](found)


def result_table(result: Result) -> RenderableType:
    """The stages side by side, and what was written."""
    stages = {name: stage for name, stage in result.stages.items() if stage is not None}
    table = _table(stage_rows(result.stages, result.kept))
    lines: list[RenderableType] = [Text(UNSEEN)] if UNSEEN in result.warnings else []
    lines += [table] if stages else []
    for first in [*stages.values()][:1]:
        lines.append(Text(_about(first, result.settings), style="dim"))
        if len(first.codebooks) > 1:
            lines += ["", books_table(stages), ""]
        elif first.counts:
            names = STAGES if len(stages) > 1 else dict.fromkeys(stages, "usage")
            lines.append(UsageLines({names[name]: its.counts[0] for name, its in stages.items() if its.counts}))
    if "shard" in result.settings:
        lines.append(
            Text(f"of shard {result.settings['shard']} alone; `codebook measure --merge` adds all", style="dim")
        )
    if "codes" in result.settings:
        lines.append(Text(f"codes {result.settings['codes']}"))
    if result.command == "measure" and "stats" in result.settings:
        lines.append(Text(f"counts written to {result.settings['stats']}"))
    if result.outputs["model"]:
        lines.append(Text(f"{'* kept, and ' if len(stages) > 1 else ''}written to {result.outputs['model']}"))
    if "packed" in result.bytes:
        packed = f"packed, the codebook would take {result.bytes['packed']:,} bytes; the file stores it as before"
        lines.append(Text(packed, style="dim"))
    if result.proof is not None:
        lines.append(Text(proof_line(result.proof), style="dim"))
    return Group(*lines)


def proof_line(proof: Proof | None) -> str:
    """How figures were held against the model that loads the file, in words."""
    if proof is None:
        return "nothing was held against a network"
    if proof.by == "file":
        return "the file alone was read back: no network was given that could load it"
    revived = f"; one step of its training moved {proof.revived} codes" if proof.revived else ""
    if proof.by == "module":
        return f"the network loads the file, and its {proof.of:,} codes are those that were meant{revived}"
    ties = f", {proof.near_ties:,} others being as near" if proof.near_ties else ""
    return f"the network's own quantizer chooses the same {proof.agree:,} of {proof.of:,} codes{ties}{revived}"


def _about(first: Measurement, settings: Mapping[str, object]) -> str:
    """What was measured."""
    if first.images is None:
        done = "measured on" if "latents" in settings else "counts of"
        return f"{done} {first.codebooks[0].latents:,} {first.split} latents"
    if "input_range" not in settings:
        return f"counts of {first.images:,} items"
    bounds = f", input range {settings['input_range']}" if first.ssim is not None else ""
    rough = "; so few that figures are rough" if first.images < _FEW else ""
    return f"measured on {first.images:,} {first.split} items{bounds}{rough}"


def books_table(stages: Mapping[str, Measurement]) -> RenderableType:
    """Codes used and perplexity of each of several codebooks, stage by stage."""
    table = Table("codebook", *(STAGES[name] for name in stages), box=None, pad_edge=False, header_style="bold")
    for uses in zip(*(stage.codebooks for stage in stages.values()), strict=True):
        cells = [f"{use.used} of {use.size}, perplexity {use.perplexity:.1f}" for use in uses]
        table.add_row(uses[0].key, *cells)
    return table


def details_table(result: Found) -> RenderableType:
    """Settings, seconds by phase, and the trace of a fine-tuning."""
    settings = Table("setting", "value", box=None, pad_edge=False, header_style="bold")
    for name, value in result.settings.items():
        settings.add_row(name, str(value))
    seconds = Table("phase", "seconds", box=None, pad_edge=False, header_style="bold")
    for name, value in result.seconds.items():
        seconds.add_row(name, f"{value:.1f}")
    parts: list[RenderableType] = ["", settings, "", seconds]
    if isinstance(result, Result) and result.trace:
        trace = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("step", "loss", "validation mse", "used", "perplexity", "distortion", "revived"):
            trace.add_column(heading, justify="right")
        for p in result.trace:
            loss = "-" if p.loss is None else f"{p.loss:.4f}"
            spread = (f"{p.perplexity:.2f}", f"{p.distortion:.4g}", str(p.revived))
            trace.add_row(str(p.step), loss, f"{p.validation_mse:.6f}", str(p.used), *spread)
        parts += ["", trace]
    return Group(*parts)


def plan_table(found: Plan) -> RenderableType:
    """What a dry run says."""
    table = Table(box=None, pad_edge=False, show_header=False)
    images = found.settings["images"]
    assert isinstance(images, dict)
    limit = "" if found.size["after"] else " at most"
    for label, value in (
        ("would run", found.command),
        ("family", found.family),
        ("codes", f"{found.size['before']} -> {found.size['after'] or 'as the counts decide'}"),
        ("images", ", ".join(f"{count:,} {name}" for name, count in images.items())),
        ("would write", found.outputs["model"] or "a file named after the new size"),
        ("and", found.outputs["index_map"] or "its index map"),
        ("bytes", f"{found.bytes['before']:,} -> {found.bytes['after']:,}{limit}"),
        ("time", f"about {found.seconds['estimate']:.0f} s"),
    ):
        table.add_row(label, value)
    return Group(table, "Nothing was written.")


def chain_table(found: Chain) -> RenderableType:
    """What each step left side by side, and what was written."""
    parts: list[RenderableType] = [_table(chain_rows(found))]
    parts += [Text(f"written to {path}") for path in found.outputs.values()]
    parts += [Text(proof_line(found.proof), style="dim")] if found.proof else []
    return Group(*parts)


def chain_rows(found: Chain) -> list[tuple[str, ...]]:
    """The headings, and the figures of the model as it was and after each step."""
    stages = {"before": found.steps[0].before}
    stages |= {f"{i}, {step.command}": step.kept_stage for i, step in enumerate(found.steps, 1)}
    return rows_of(stages)


def chain_plan_table(found: ChainPlan) -> RenderableType:
    """What a dry run of a recipe says."""
    lines: list[Sequence[str]] = [("step", "codes", "about")]
    for i, its in enumerate(found.plans, 1):
        after = its.size["after"] or "as the counts decide"
        before = its.size["before"] or "as before"
        lines.append((f"{i}, {its.command}", f"{before} -> {after}", f"{its.seconds['estimate']:.0f} s"))
    return Group(_table(lines), Text("Nothing was written."))


def comparison_table(found: Comparison) -> RenderableType:
    """A line for each strategy and size."""
    table = _table(table_rows(found.summaries))
    about = f"rows: {found.outputs['rows']}, table: {found.outputs['table']}"
    if any(summary.seeds > 1 for summary in found.summaries):
        about += "; figures are mean ± standard deviation over the seeds"
    first = [Text(UNSEEN)] if UNSEEN in found.warnings else []
    return Group(*first, table, *(Text(note) for note in notes(found.summaries)), Text(about, style="dim"))


def sweep_table(found: Sweep) -> RenderableType:
    """A line for each point, and what is suggested."""
    dimension = found.effective_dimension
    told = "" if dimension is None else f"the latents' effective dimension is {dimension:.1f}; "
    about = Text(f"{told}rows: {found.outputs['rows']}, table: {found.outputs['table']}", style="dim")
    suggested = Text(f"suggested: {found.suggested_k} codes", style="bold")
    return Group(_table(sweep_rows(found)), suggested, Text(found.headline), about)


def codes_table(found: Codes) -> RenderableType:
    """The first of the codes, and where they are to be seen."""
    lines: list[Sequence[str]] = [("code", "tokens", "share", "error", "near")]
    for card in found.cards[:_FEW]:
        error = "-" if card.error is None else f"{card.error:.4g}"
        lines.append(
            (str(card.code), f"{card.count:,}", f"{card.share:.2%}", error, ", ".join(map(str, card.neighbours)))
        )
    told = f"{found.used} of {found.size} codes used ({found.used / found.size:.1%})"
    return Group(_table(lines), Text(told), Text(f"to be seen in {found.outputs['report']}"))


def map_table(found: Map) -> RenderableType:
    """How well the codes are placed, and where that is to be seen."""
    covered = "" if found.coverage is None else f"; they cover {found.coverage:.1%} of the test latents"
    told = f"{found.used} of {found.size} codes used ({found.used / found.size:.1%}){covered}"
    return Group(Text(told), *(Text(f"written to {path}") for path in found.outputs.values()))


def _table(lines: Iterable[Sequence[str]]) -> Table:
    """The first line is the headings; the first column names the others."""
    headings, *rows = lines
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def verification_table(found: Verification) -> RenderableType:
    """What differs and must not."""
    if found.ok and not found.against:
        return Text(f"{found.model} is sound: {proof_line(found.proof)}")
    if found.ok:
        original = "the bundled demo" if found.against == str(DEMO) else found.against
        sound = f"{found.model} is sound: only what may differ from {original} differs"
        return Text(f"{sound}; {proof_line(found.proof)}" if found.proof else sound)
    table = Table("tensor", "what is wrong", box=None, pad_edge=False, header_style="bold")
    for difference in found.differences:
        table.add_row(difference.key, difference.what)
    return table


def remap_table(found: Remapped) -> RenderableType:
    """What became of the ids, of tokens or of a prior's rows, and what was written."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, count in (
        ("ids", found.tokens),
        ("changed", found.changed),
        ("of removed codes", found.removed),
        ("by their nearest code", found.nearest),
    ):
        table.add_row(label, f"{count:,}")
    return Group(table, *(Text(f"written to {output}") for output in found.outputs.values()))
