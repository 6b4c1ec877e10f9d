"""`codebook inspect`."""

from __future__ import annotations

from typing import Any

from ..errors import reported, show_result
from ..options import JSON, ModelArgument, command


@command("Look", "codebook inspect model.safetensors", JSON)
def inspect(options: dict[str, Any], model: ModelArgument = None) -> None:
    """Which codebooks a checkpoint holds, and what depends on them. Reads its header, codebooks and counts."""
    with reported():
        from codebook_tools.models.demo import DEMO
        from codebook_tools.report.terminal.inspection import inspection_table
        from codebook_tools.workflows.inspect_checkpoint import inspect_checkpoint

        show_result(inspect_checkpoint(model or DEMO), inspection_table, options["json_"])
