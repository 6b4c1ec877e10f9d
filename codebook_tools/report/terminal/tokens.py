"""Tables of the commands that write tokens and read them."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from codebook_tools.evaluation.beam import BeamGain
from codebook_tools.report.terminal.fitted import Prose
from codebook_tools.workflows.decode import Decoding
from codebook_tools.workflows.encode import Encoding, LevelUse


def encoding_table(encoding: Encoding) -> RenderableType:
    """How many tokens of what layout, the codes that they name, and how to decode them."""
    layout = " + ".join(dict.fromkeys("x".join(map(str, grid)) or "1" for grid in encoding.grids))
    levels = f"{encoding.levels} levels of " if encoding.levels > 1 else ""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("items", f"{encoding.items:,}")
    table.add_row("tokens", f"{encoding.tokens:,}, {levels}{layout} an item")
    table.add_row("codes used", _used(encoding.usage))
    lines = [Prose(f"written to {path}") for path in encoding.outputs.values()]
    tokens, folder = encoding.outputs["tokens"], "FOLDER"
    bounds = encoding.settings["input_range"]
    typed = ""
    if isinstance(bounds, list) and bounds != [0.0, 1.0]:
        typed = f" --input-range={bounds[0]:g},{bounds[1]:g}"
    back = Prose(f"back to media: codebook decode {tokens} {encoding.model}{typed} -o {folder}", style="dim")
    return Group(table, *lines, back)


def _used(usage: tuple[LevelUse, ...]) -> str:
    used, size = (sum(getattr(level, name) for level in usage) for name in ("used", "size"))
    each = ": " + ", ".join(str(level.used) for level in usage) if len(usage) > 1 else ""
    return f"{used:,} of {size:,} ({used / size:.1%}){each}"


def decoding_table(decoding: Decoding) -> RenderableType:
    """How many items of what shape, and where they are."""
    shape = "x".join(map(str, decoding.shape))
    return Prose(f"{decoding.items:,} items of {shape} written to {decoding.outputs['folder']}")


def beam_line(gain: BeamGain) -> RenderableType:
    """What a beam search gains, and how to write its tokens."""
    (low, lower), (error, less) = ((of["greedy"], of["beam"]) for of in (gain.distortion, gain.mse))
    return Prose(
        f"a beam of {gain.width}: distortion of all levels {low:.4g} -> {lower:.4g}, mse {error:.6f} -> {less:.6f}; "
        f"`codebook encode --beam {gain.width}` writes its tokens"
    )
