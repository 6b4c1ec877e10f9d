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
from huggingface_hub import HfFileSystem, file_download, hf_api
from pyarrow import parquet


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server on loopback that the libraries in this process take for the hub; the current folder is an empty one."""
    home = tmp_path / "home"
    with serving() as server:
        _set(monkeypatch, "huggingface_hub", _of_hub(server.url, home))
        if "datasets" in sys.modules:
            _set(monkeypatch, "datasets", {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": False})
            _set(
                monkeypatch, "datasets", {"HF_DATASETS_CACHE": home / "datasets", "HF_MODULES_CACHE": home / "modules"}
            )
            for name in ("_OPENED", "_READ"):
                monkeypatch.setattr(f"codebook_tools.data.hub.{name}", {})
            HfFileSystem.clear_instance_cache()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", _briefly)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield server


assert file_download and hf_api  # imported, so that they are redirected


def _of_hub(url: str, home: Path) -> dict[str, Any]:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    cache, token = str(home / "hub"), str(home / "token")
    places = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    return places | {"HF_HUB_CACHE": cache, "HUGGINGFACE_HUB_CACHE": cache, "HF_TOKEN_PATH": token}


def _set(monkeypatch: pytest.MonkeyPatch, library: str, constants: dict[str, Any]) -> None:
    """Set constants of a library in each module that has imported them."""
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] == library:
            for constant in constants.keys() & vars(module).keys():
                monkeypatch.setattr(module, constant, constants[constant])


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
