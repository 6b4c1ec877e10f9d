"""Files of a model on the hub: listed, and fetched into the cache of the hub's library, which alone writes there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any

from codebook_tools.errors import CodebookError
from codebook_tools.runtime.hub import in_one_line, library, not_cached
from codebook_tools.runtime.hub_ids import ModelId, copy_of
from codebook_tools.runtime.optional import require
from codebook_tools.runtime.progress import Watch


@dataclass(frozen=True)
class Listing:
    """The files of a model at a commit.

    Attributes:
        model: What was asked for.
        commit: Its hash.
        files: Bytes by path; 0 where the size is not known.
        folder: Where they lie in the cache, offline; None online.
    """

    model: ModelId
    commit: str
    files: Mapping[str, int]
    folder: Path | None = None


def listed(model: ModelId) -> Listing:
    """Ask for the files of a model; offline, look into the cache.

    Raises:
        CodebookError: There is no such model or revision, it is not for this user, or the hub cannot be asked.
    """
    hub = library(str(model))
    with in_one_line(str(model), model.repository, model.revision):
        if hub.constants.HF_HUB_OFFLINE:
            folder = Path(  # no patterns: whatever of it is there
                hub.snapshot_download(
                    model.repository, revision=model.revision, local_files_only=True, allow_patterns=[]
                )
            )
            names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
            return Listing(model, folder.name, dict.fromkeys(names, 0), folder)
        info = hub.HfApi().model_info(
            model.repository, revision=model.revision, files_metadata=True, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT
        )
        files = {one.rfilename: one.size or 0 for one in info.siblings or ()}
        if not isinstance(info.sha, str):
            raise ValueError("no commit")
    return Listing(model, info.sha, files)


def fetched(listing: Listing, names: list[str], watch: Watch) -> Path:
    """Bring files of a listing into the cache; those that are there already are not fetched again.

    Returns:
        The folder that holds them under their names.

    Raises:
        CodebookError: The hub or the disk fails; files that are whole stay, for the next time.
    """
    model = listing.model
    if listing.folder is not None:
        missing = [name for name in names if name not in listing.files]
        if missing:
            raise not_cached(str(model), f"lacks {missing[0]}")
        return listing.folder
    hub = library(str(model))
    total = sum(listing.files.get(name, 0) for name in names)
    done, what = 0, f"download {model.repository}"
    for i, name in enumerate(names):
        bar = _bar(watch, what, done, total)
        with_bar = {"tqdm_class": bar} if "tqdm_class" in signature(hub.hf_hub_download).parameters else {}
        with in_one_line(str(model), model.repository, model.revision, name):
            # The first is asked for by its revision, which the cache then knows offline; a commit's files never change.
            revision = model.revision if i == 0 else listing.commit
            path = Path(hub.hf_hub_download(model.repository, name, revision=revision, **with_bar))
        copy = copy_of(path)
        if copy is None or copy.model.revision != listing.commit:
            raise CodebookError(f"{model} changed on the hub while it was fetched; try again")
        done += listing.files.get(name, 0)
        watch.progress(what, done, total)
    return Path(str(path)[: -len(name) - 1])


def _bar(watch: Watch, what: str, before: int, total: int) -> type:
    """A progress bar of the client's kind that reports bytes to a watch and draws nothing.

    Args:
        watch: Is told the bytes.
        what: Is being done.
        before: Bytes of earlier files.
        total: Bytes of all files.
    """
    tqdm: Any = require(what, "hub", "tqdm").tqdm
    most = 0  # of a file, for which there may be two bars: bytes received and bytes written

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread that watches over bars

        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **options | {"file": StringIO(), "disable": False})

        def display(self, *_: Any, **__: Any) -> bool:
            nonlocal most
            most = max(most, int(self.n))
            watch.progress(what, before + most, max(total, before + most))
            return True

    return Bar
