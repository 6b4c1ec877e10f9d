"""A result on the hub: whether it may go there, and its commit, which is whole or not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codebook_tools.errors import CodebookError, few_of
from codebook_tools.runtime.hub import in_one_line, library
from codebook_tools.runtime.hub_ids import model_id
from codebook_tools.runtime.progress import Watch


@dataclass(frozen=True)
class Place:
    """Where a result goes on the hub.

    Attributes:
        repository: "org/name".
        private: Whether it is private.
        replaced: Whether what it holds may be replaced; its history keeps that.
    """

    repository: str
    private: bool
    replaced: bool


def check_place(place: Place) -> frozenset[str] | None:
    """Check that a result may be committed.

    Returns:
        Paths of the files that the repository holds; None where there is none yet.

    Raises:
        CodebookError: The text is no id, nobody is logged in, or the repository holds something.
    """
    name, option = place.repository, f"--push-to-hub {place.repository}"
    asked = model_id(name)
    if asked is None or str(asked) != asked.repository:
        raise CodebookError(f"{option}: expected ORG/NAME")
    hub = library(option)
    if hub.constants.HF_HUB_OFFLINE:
        raise CodebookError(f"{option}: HF_HUB_OFFLINE is set; unset it, or leave the option out")
    api = hub.HfApi()
    with in_one_line(option, name):
        if hub.get_token() is None:
            raise CodebookError(f"{option}: nobody is logged in; log in with `hf auth login`, or set HF_TOKEN")
        try:
            info = api.model_info(name, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
        except hub.errors.RepositoryNotFoundError:
            info = None
        user = api.whoami()
        places = [user["name"], *(one["name"] for one in user.get("orgs", ()))]
        role = user.get("auth", {}).get("accessToken", {}).get("role")
    if name.partition("/")[0] not in places:
        raise CodebookError(f"{option}: the token writes to {', '.join(places)} alone; name one of these")
    if role == "read":
        raise CodebookError(f"{option}: the token may only read; log in with one that may write")
    if info is None:
        return None
    files = frozenset(one.rfilename for one in info.siblings or ()) - {".gitattributes"}
    if place.private and not info.private:
        raise CodebookError(f"{option} exists and is public; leave out --private, or name another")
    if files and not place.replaced:
        raise CodebookError(f"{option} holds {few_of(sorted(files))}; --force replaces all of it, or name another")
    return files


def committed(place: Place, files: Mapping[str, Path], message: str, watch: Watch) -> str:
    """Commit files to the hub, as one commit after which a repository holds these alone.

    Args:
        place: Where to; the repository is made where there is none.
        files: Paths on the disk by path in the repository.
        message: Of the commit.
        watch: Is told how many bytes there are.

    Returns:
        The address of the commit.

    Raises:
        CodebookError: It cannot be done; what the hub had is unchanged then, and a repository made for it is gone.
    """
    before = check_place(place)
    option, hub = f"--push-to-hub {place.repository}", library("--push-to-hub")
    api, nbytes = hub.HfApi(), sum(path.stat().st_size for path in files.values())
    added = [hub.CommitOperationAdd(name, path) for name, path in files.items()]
    gone = [hub.CommitOperationDelete(name) for name in sorted((before or frozenset()) - {*files})]
    watch.progress(f"upload {place.repository}", 0, nbytes)
    with in_one_line(option, place.repository), _without_bars(hub.utils):
        if before is None:
            api.create_repo(place.repository, private=place.private or None)
        try:
            done = api.create_commit(place.repository, [*added, *gone], commit_message=message)
        except BaseException:
            if before is None:
                with suppress(Exception):  # the first error counts
                    api.delete_repo(place.repository)
            raise
    watch.progress(f"upload {place.repository}", nbytes, nbytes)
    return str(done.commit_url)


@contextmanager
def _without_bars(utils: Any) -> Iterator[None]:
    """Without the client's own progress bars, beside which others may be on the screen."""
    were = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not were:
            utils.enable_progress_bars()
