"""The client of the Hugging Face hub, and one line for whatever it raises."""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from codebook_tools.errors import CodebookError, one_line
from codebook_tools.runtime.optional import require


def library(purpose: str) -> Any:
    """The module huggingface_hub. Raises CodebookError where it is not installed."""
    for part in ("constants", "errors", "utils"):  # the module imports none by itself
        require(purpose, "hub", f"huggingface_hub.{part}")
    return require(purpose, "hub", "huggingface_hub")


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
    errors = library(title).errors
    levels = {name: logging.getLogger(name).level for name in ("huggingface_hub", "datasets", "fsspec")}
    for name in levels:  # what they say of each retry; the last one's reason is ours to say
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
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
    if "nvalid metadata" in said:
        return f"{title}: {place} does not accept the metadata of README.md ({_short(said)}); mend it there"
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
