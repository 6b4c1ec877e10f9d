"""A MODEL that is typed as an id of the Hugging Face hub, fetched before a command begins."""

from __future__ import annotations

import os
import time
from pathlib import Path

from codebook_tools.errors import CodebookError
from codebook_tools.runtime.hub_ids import is_uri, model_id

from .errors import LAST_WORDS, reported


def on_disk(model: Path, quiet: bool) -> Path:
    """The path of a model, or of its copy in the hub's cache. quiet: without progress."""
    if os.path.lexists(model) or not (is_uri(model) or model_id(model)):
        return model
    with reported():
        from codebook_tools.checkpoints.hub import located
        from codebook_tools.runtime.progress import Watch

        from .output import ProgressShow

        try:
            with ProgressShow(quiet) as show:
                return located(model, Watch(show))
        except CodebookError as error:
            failure = error
            if os.environ.get("LOCAL_RANK", "0") == "0":
                raise
    time.sleep(LAST_WORDS)  # the first process of a machine says what is wrong; torchrun ends all as soon as one ends
    with reported():
        raise failure
