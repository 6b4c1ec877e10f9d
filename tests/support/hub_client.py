"""The hub's client libraries, pointed at a server on loopback and at a cache of their own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow as pa
import pytest
from hub_server import TOKEN, Hub, serving
from pyarrow import parquet


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server on loopback that the libraries in this process take for the hub; the current folder is an empty one."""
    from huggingface_hub import constants

    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", _briefly)
        if "datasets" in sys.modules:
            _redirect_datasets(server, tmp_path / "home", monkeypatch)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield server


def _redirect_datasets(server: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config
    from huggingface_hub import HfFileSystem

    from codebook_tools.data import hub as streamed

    monkeypatch.setattr(config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(config, "HF_MODULES_CACHE", home / "modules")
    monkeypatch.setattr(streamed, "_OPENED", {})
    monkeypatch.setattr(streamed, "_READ", {})
    HfFileSystem.clear_instance_cache()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The variables that do the same for another process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


def tree(folder: Path) -> dict[str, str]:
    """All that lies below a folder: links with where they lead, files with the hash of their bytes."""
    return {
        path.relative_to(folder).as_posix(): f"-> {os.readlink(path)}"
        if path.is_symlink()
        else "folder"
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def parquet_of(column: str, kind: str, cells: Any) -> bytes:
    """A parquet file with a column of a kind that the library datasets has, Image or Audio, as it writes them."""
    features = {"info": {"features": {column: {"_type": kind}}}}
    rows, content = pa.table({column: cells}), io.BytesIO()
    parquet.write_table(rows.replace_schema_metadata({"huggingface": json.dumps(features)}), content, row_group_size=4)
    return content.getvalue()


def _briefly(seconds: float) -> None:
    """The client waits seconds before it tries again."""
    Event().wait(min(seconds, 0.05))
