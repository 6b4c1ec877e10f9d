"""A MODEL that is typed as an id of the Hugging Face hub, fetched before a command begins."""

from __future__ import annotations

import os
from pathlib import Path

from codebook_tools.runtime.hub_ids import is_uri, model_id

from .errors import reported


def on_disk(model: Path, quiet: bool) -> Path:
    """The path of a model, or of its copy in the hub's cache. quiet: without progress."""
    if os.path.lexists(model) or not (is_uri(model) or model_id(model)):
        return model
    with reported():
        from codebook_tools.checkpoints.hub import located
        from codebook_tools.runtime.progress import Watch

        from .output import ProgressShow

        with ProgressShow(quiet) as show:
            return located(model, Watch(show))
