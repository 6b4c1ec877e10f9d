"""The client of the Hugging Face hub: lists, fetches and commits files, and says in one line what went wrong."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime.hub_ids import ModelId, copy_of, model_id
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


def library(purpose: str) -> Any:
    """The module huggingface_hub. Raises CodebookError where it is not installed."""
    for part in ("constants", "errors", "utils"):  # the module imports none by itself
        require(purpose, "hub", f"huggingface_hub.{part}")
    return require(purpose, "hub", "huggingface_hub")


def listed(model: ModelId) -> Listing:
    """Ask for the files of a model; offline, look into the cache.

    Raises:
        CodebookError: There is no such model or revision, it is not for this user, or the hub cannot be asked.
    """
    hub = library(str(model))
    with in_one_line(str(model), model.repository, model.revision):
        if hub.constants.HF_HUB_OFFLINE:
            folder = Path(hub.snapshot_download(model.repository, revision=model.revision, local_files_only=True))
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
        api.whoami()
        try:
            info = api.model_info(name, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
        except hub.errors.RepositoryNotFoundError:
            return None
    files = frozenset(one.rfilename for one in info.siblings or ()) - {".gitattributes"}
    if place.private and not info.private:
        raise CodebookError(f"{option} exists and is public; leave out --private, or name another")
    if files and not place.replaced:
        raise CodebookError(f"{option} holds {len(files)} files; --force replaces them, or name another")
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


def _bar(watch: Watch, what: str, before: int, total: int) -> type:
    """A stand-in for tqdm that reports bytes to a watch."""

    class Bar:
        def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
            self.done = before + initial

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

        def update(self, count: float | None = 1) -> None:
            self.done += int(count or 0)
            watch.progress(what, self.done, max(total, self.done))

    return Bar


@contextmanager
def in_one_line(title: str, repository: str, revision: str | None = None, file: str = "") -> Iterator[None]:
    """Turn what the client raises into one line with the next step.

    Args:
        title: What was asked for, as the user wrote it.
        repository: "org/name".
        revision: That was asked for.
        file: That was asked for.

    Raises:
        CodebookError: For any exception of the block.
    """
    import logging

    errors = library(title).errors
    levels = {name: logging.getLogger(name).level for name in ("huggingface_hub", "datasets", "fsspec")}
    for name in levels:  # what they say of each retry; the last one's reason is ours to say
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    except CodebookError:
        raise
    except Exception as error:
        raise CodebookError(_reason(errors, error, title, repository, revision, file)) from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _reason(errors: Any, error: Exception, title: str, repository: str, revision: str | None, file: str) -> str:
    from huggingface_hub import constants

    place, chain = constants.ENDPOINT, [*_causes(error)]
    page = f"{place}/{'datasets/' * title.startswith('hf://datasets/')}{repository}"
    status = next((code for one in chain if (code := _status(one)) is not None), None)
    said = " ".join(str(one) for one in chain)
    if any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) for one in chain):
        return f"{title}: the disk is full in {constants.HF_HUB_CACHE}; free some of it, or set HF_HOME elsewhere"
    if "nvalid credentials" in said or "nvalid username or password" in said or "nvalid user token" in said:
        return f"{title}: {place} does not accept the token; renew it with `hf auth login`, or in HF_TOKEN"
    if _among(chain, errors.GatedRepoError):
        return f"{title} is gated: accept its terms at {page}, then log in with `hf auth login`"
    if _among(chain, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision or 'main'}; its branches and tags are at {page}"
    if _among(chain, errors.RepositoryNotFoundError) or (status in (401, 404) and not file):
        return f"{title} is not on {place}, or is private: check the id, or log in with `hf auth login` or HF_TOKEN"
    if status == 403:
        return f"{title}: {place} refuses it to this token ({_short(said)}); use one with the right to write"
    if _among(chain, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return str(not_cached(title, "is not there"))
    if any("timeout" in type(one).__name__.lower() or isinstance(one, TimeoutError) for one in chain):
        return f"{title}: {place} does not answer in time; try again, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds"
    if status is not None:
        return f"{title}: {place} answers with error {status}; try again later"
    garbled = any("JSON" in type(one).__name__ for one in chain)
    lost = any(type(one).__module__.split(".")[0] in _TRANSPORTS or isinstance(one, ConnectionError) for one in chain)
    if lost and not garbled:
        return f"{title}: the connection to {place} failed ({_short(one_line(chain[-1]))}); run it again to go on"
    if "onsistency check" in said:
        return f"{title}: the download of {file} broke off; run it again to go on"
    if isinstance(error, OSError) and error.errno:
        return f"{title}: cannot write to {constants.HF_HUB_CACHE}: {one_line(error)}; set HF_HOME elsewhere"
    return f"{title}: {place} does not answer as the hub does ({_short(one_line(error))}); check HF_ENDPOINT"


_TRANSPORTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


def _causes(error: BaseException | None) -> Iterator[Exception]:
    """An error and what it came from."""
    while isinstance(error, Exception):
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Exception) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) and code >= 400 else None


def _among(chain: list[Exception], kind: type) -> bool:
    return any(isinstance(one, kind) for one in chain)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


_LONGEST = 100


def not_cached(title: str, what: str) -> CodebookError:
    """The error of what the cache lacks offline."""
    from huggingface_hub import constants

    return CodebookError(
        f"{title}: HF_HUB_OFFLINE is set, and the copy in {constants.HF_HUB_CACHE} {what}; fetch it online first"
    )
