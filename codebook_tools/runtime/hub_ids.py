"""Ids of the Hugging Face hub as users write them, and what a path in its cache is a copy of; without its library."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

_REPOSITORY = r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)"
_SPECIAL = r"refs/(?:pr|convert)/[\w.-]+"
"""Revisions with slashes, which end where their name does; in other ones a slash is written %2F."""

_PLAIN = re.compile(rf"{_REPOSITORY}(?:@(?P<revision>{_SPECIAL}|[^/@\s]+))?", re.ASCII)
_URI = re.compile(rf"hf://?{_REPOSITORY}(?:@(?P<revision>{_SPECIAL}|[^/@\s]+))?(?:/(?P<inside>.+?))?/?", re.ASCII)
_DATA_SET = re.compile(
    rf"hf://?datasets/{_REPOSITORY}(?:@(?P<revision>{_SPECIAL}|[^/@:\s]+))?(?::(?P<split>[^:]*))?(?::(?P<column>.+))?",
    re.ASCII,
)
_OF_FILES = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".json"}
"""Suffixes of which a text without hf:// names a file and no repository."""


@dataclass(frozen=True)
class ModelId:
    """A model on the hub.

    Attributes:
        repository: "org/name".
        revision: Branch, tag or commit; None for main.
        inside: Path of a file or folder in it; "" for its top.
    """

    repository: str
    revision: str | None = None
    inside: str = ""

    def __str__(self) -> str:
        name = self.repository + _at(self.revision)
        return f"hf://{name}/{self.inside}" if self.inside else name


@dataclass(frozen=True)
class DataSetId:
    """A column of a split of a data set on the hub.

    Attributes:
        repository: "org/name".
        revision: Branch, tag or commit; None for main.
        split: None for the only one, or train.
        column: None for the only one with data of a kind.
    """

    repository: str
    revision: str | None = None
    split: str | None = None
    column: str | None = None

    def __str__(self) -> str:
        column = f":{self.column}" if self.column else ""
        split = f":{self.split or ''}" if self.split or column else ""
        return f"hf://datasets/{self.repository}{_at(self.revision)}{split}{column}"


def model_id(text: str | Path) -> ModelId | None:
    """Read "org/name", "org/name@revision" or "hf://org/name[@revision][/path]"; None where a text is none of these.

    A Path has lost one of the slashes after "hf:".
    """
    text = str(text)
    if is_uri(text):
        parts = None if data_set_id(text) else _URI.fullmatch(text)
    else:
        parts = None if Path(text).suffix.lower() in _OF_FILES else _PLAIN.fullmatch(text)
    if parts is None:
        return None
    return ModelId(parts["repository"], _unquoted(parts["revision"]), parts.groupdict().get("inside") or "")


def data_set_id(text: str | Path) -> DataSetId | None:
    """Read "hf://datasets/org/name[@revision][:split][:column]"; None where a text is something else."""
    parts = _DATA_SET.fullmatch(str(text))
    if parts is None:
        return None
    revision = _unquoted(parts["revision"])
    return DataSetId(parts["repository"], revision, parts["split"] or None, parts["column"] or None)


def is_uri(text: str | Path) -> bool:
    """Whether a text can name nothing but what is on the hub, in a form that is known or not."""
    return str(text).startswith("hf:/")


def _at(revision: str | None) -> str:
    if revision is None:
        return ""
    return f"@{revision if re.fullmatch(_SPECIAL, revision) else quote(revision, safe='')}"


def _unquoted(revision: str | None) -> str | None:
    return None if revision is None else unquote(revision)


@dataclass(frozen=True)
class Copy:
    """What a path in the hub's cache is a copy of.

    Attributes:
        model: With the commit as its revision.
        blobs: Folder of the contents, which the files link to.
    """

    model: ModelId
    blobs: Path

    @property
    def name(self) -> str:
        """For files that are named after the model: the repository's own name, and where in it the model lies."""
        own = self.model.repository.partition("/")[2]
        parts = [part for part in self.model.inside.split("/") if part]
        if parts and parts[-1].lower().endswith(tuple(_OF_FILES)):
            parts[-1] = parts[-1].rpartition(".")[0]
            if parts[-1] in ("model", "diffusion_pytorch_model", "pytorch_model"):  # of any model
                parts.pop()
        return "-".join([own, *(part for part in parts if part != own)])


def copy_of(path: Path) -> Copy | None:
    """What a path in the hub's cache is a copy of, by the layout of that cache; None for any other path."""
    parts = _SNAPSHOT.search(path.absolute().as_posix())
    if parts is None:
        return None
    model = ModelId(f"{parts['org']}/{parts['name']}", parts["commit"], parts["inside"] or "")
    return Copy(model, Path(parts.string[: parts.start("snapshots")], "blobs"))


_SNAPSHOT = re.compile(
    r"/models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)/(?P<snapshots>snapshots)/(?P<commit>[0-9a-f]{40})"
    r"(?:/(?P<inside>.+))?$",
    re.ASCII,
)


def title_of(path: Path) -> str:
    """How results call a model: by its path, or the id and commit that it is a copy of."""
    copy = copy_of(path)
    return str(copy.model) if copy else str(path)


def lies_within(path: Path, folder: Path) -> bool:
    """Whether a file of a folder is its own, and no link out of it; the hub's cache links to its contents."""
    copy = copy_of(folder)
    if copy and path.is_symlink():  # where the contents lie in turn is up to the hub's library
        target = os.path.dirname(os.path.join(path.parent, os.readlink(path)))
        return os.path.realpath(target) == os.path.realpath(copy.blobs)
    return os.path.dirname(os.path.realpath(path)) == os.path.realpath(folder)
