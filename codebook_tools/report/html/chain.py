"""The page of surgeries in a row: the original model, and after each surgery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from codebook_tools.evaluation.tables import rows_of
from codebook_tools.report.html.operate import gallery, headline, trace_plot, usage_plot
from codebook_tools.report.html.page import Page, Part, Table
from codebook_tools.report.html.result_page import result_page
from codebook_tools.report.terminal.tables import stages_of
from codebook_tools.workflows.chain import Chain


def chained_page(chain: Chain, command: str, more: Sequence[Part] = ()) -> Page:
    """The page of several surgeries. more: parts on the model that was written."""
    sentence = headline(chain.model, chain.steps[0].before, chain.steps[-1].kept_stage)
    return result_page(chain, sentence, [*_parts(chain), *more], command)


def _parts(chain: Chain) -> Iterator[Part]:
    head, *rows = rows_of(stages_of(chain))
    yield Table("Step by step", head, tuple(rows), "On test data, which no step trained on.")
    if chain.gallery:
        yield gallery(chain.gallery)
    counts = {name: stage.counts[0] for name, stage in stages_of(chain).items() if stage and stage.counts}
    if counts:
        yield usage_plot("How often codes are used", counts)
    for i, step in enumerate(chain.steps, 1):
        if len(step.trace) > 1:
            yield trace_plot(f"{i}, {step.command}, step by step", step.trace)
