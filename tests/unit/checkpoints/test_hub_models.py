"""Ids of models on the hub: which path they give, which files are fetched, and one line for whatever goes wrong."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_client import hub as hub
from hub_client import tree
from hub_server import Hub

from codebook_tools.checkpoints.hub import located
from codebook_tools.checkpoints.layout import split_others
from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.hub_download import _bar
from codebook_tools.runtime.hub_ids import DataSetId, ModelId, copy_of, data_set_id, model_id
from codebook_tools.runtime.progress import Watch

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("org/name", ModelId("org/name")),
        ("org/FLUX.1-dev", ModelId("org/FLUX.1-dev")),
        ("org/name@v1.0", ModelId("org/name", "v1.0")),
        ("org/name@refs/pr/3", ModelId("org/name", "refs/pr/3")),
        ("hf://org/name", ModelId("org/name")),
        ("hf:/org/name/", ModelId("org/name")),
        ("hf://org/name@v1/vae", ModelId("org/name", "v1", "vae")),
        ("hf://org/name@refs/pr/3/a/b.safetensors", ModelId("org/name", "refs/pr/3", "a/b.safetensors")),
        ("hf://org/name@my%2Fbranch/x.pt", ModelId("org/name", "my/branch", "x.pt")),
        *((text, None) for text in ("name", "a/b/c", "/org/name", "./name", "../name", "org/name.safetensors", "org/")),
        *((text, None) for text in ("org/x.ckpt", "org/name@", "hf://name", "hf://datasets/org/name", "org/na me")),
    ],
)
def test_a_text_is_an_id_in_exactly_these_forms(text: str, meant: ModelId | None) -> None:
    assert model_id(text) == meant
    assert meant is None or model_id(str(meant)) == meant


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("hf://datasets/org/name", DataSetId("org/name")),
        ("hf:/datasets/org/name:test", DataSetId("org/name", None, "test")),
        ("hf://datasets/org/name@v2:train[:100]:a b", None),
        ("hf://datasets/org/name@v2:train:a b", DataSetId("org/name", "v2", "train", "a b")),
        ("hf://datasets/org/name::image", DataSetId("org/name", None, None, "image")),
        ("hf://org/name:test", None),
    ],
)
def test_a_data_set_has_a_split_and_a_column(text: str, meant: DataSetId | None) -> None:
    read = data_set_id(text)
    assert meant is None or (read == meant and data_set_id(str(meant)) == meant)


@pytest.mark.parametrize(
    ("inside", "title", "name"),
    [
        ("", f"org/vq-x@{COMMIT}", "vq-x"),
        ("/vae", f"hf://org/vq-x@{COMMIT}/vae", "vq-x-vae"),
        ("/model.safetensors", f"hf://org/vq-x@{COMMIT}/model.safetensors", "vq-x"),
        ("/vae/a.b.ckpt", f"hf://org/vq-x@{COMMIT}/vae/a.b.ckpt", "vq-x-vae-a.b"),
    ],
)
def test_a_path_in_the_cache_says_what_it_is_a_copy_of(inside: str, title: str, name: str) -> None:
    copy = copy_of(Path(f"/c/hub/models--org--vq-x/snapshots/{COMMIT}{inside}"))
    assert (
        copy and (str(copy.model), copy.name) == (title, name) and copy.blobs == Path("/c/hub/models--org--vq-x/blobs")
    )
    assert copy_of(Path(f"/c/models--org--vq-x/blobs/{COMMIT}")) is None


def of(hub: Hub, text: str) -> Path:
    return located(text)


def test_only_what_the_model_needs_is_fetched(hub: Hub, tiny: Path) -> None:
    weights, index = tiny.read_bytes(), {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    hub.model(
        "org/name",
        {
            "config.json": b"{}",
            "model.safetensors": weights,
            "pytorch_model.bin": b"pickle",
            "README.md": b"# Card",
            "preprocessor_config.json": b"{ }",
            "sample.png": b"png",
            "onnx/model.onnx": b"onnx",
            "sharded/config.json": b"{  }",
            "sharded/model.safetensors.index.json": json.dumps(index).encode(),
            "sharded/model-00001-of-00002.safetensors": b"of the index",
            "sharded/model-00002-of-00002.safetensors": b"not of the index",
            "sharded/flax_model.msgpack": b"flax",
        },
    )
    folder = of(hub, "org/name")
    assert folder.is_dir() and read_checkpoint(folder).path.name == "model.safetensors"
    assert sorted(hub.downloads()) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    hub.requests.clear()
    assert of(hub, "hf://org/name/sharded") == folder / "sharded"
    expected = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert sorted(hub.downloads()) == [f"sharded/{name}" for name in expected]


def test_a_repository_without_a_config_gives_the_file(hub: Hub, tiny: Path) -> None:
    hub.model("org/name", {"tiny.safetensors": tiny.read_bytes(), "tiny.config.json": b"{}", "x/last.ckpt": b"pickle"})
    path = of(hub, "org/name")
    assert path.name == "tiny.safetensors" and read_checkpoint(path).sha256 == read_checkpoint(tiny).sha256
    assert sorted(hub.downloads()) == ["tiny.config.json", "tiny.safetensors"]
    assert of(hub, "hf://org/name/x/last.ckpt").read_bytes() == b"pickle"


def test_a_local_path_goes_first(hub: Hub, tiny: Path) -> None:
    Path("org").mkdir()
    Path("org/name").write_bytes(tiny.read_bytes())
    assert of(hub, "org/name") == Path("org/name") and not hub.requests


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, tiny: Path) -> None:
    first = hub.model("org/name", {"a.safetensors": tiny.read_bytes()})
    hub.model("org/name", {"b.safetensors": tiny.read_bytes()})
    hub.models["org/name"].refs["refs/pr/1"] = first
    assert [of(hub, f"org/name{at}").name[0] for at in ("", f"@{first}", "@refs/pr/1")] == ["b", "a", "a"]


def test_offline_the_cache_is_enough_and_nothing_is_asked(
    hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, snapshot_download

    hub.model("org/name", {"config.json": b"{}", "model.safetensors": tiny.read_bytes(), "x/a.safetensors": b"large"})
    snapshot_download("org/name", allow_patterns=["config.json"])  # others may have fetched a part
    online, before = of(hub, "org/name"), tree(tmp_path / "home")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert of(hub, "org/name") == online and not hub.requests and tree(tmp_path / "home") == before
    refused(hub, "hf://org/name/x/a.safetensors", "HF_HUB_OFFLINE is set, and the copy in", "lacks it; fetch it online")
    (online / "model.safetensors").unlink()
    refused(hub, "org/name", "lacks its weights")
    refused(hub, "org/other", "HF_HUB_OFFLINE is set, and the copy in")


def refused(hub: Hub, text: str, *said: str) -> None:
    """One line, and no part of a file in the cache."""
    with pytest.raises(CodebookError) as error:
        of(hub, text)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in said), message
    whole = {content for one in hub.models.values() for files in one.commits.values() for content in files.values()}
    links = [path for path in Path().absolute().parent.glob("home/hub/*/snapshots/*/**/*") if path.is_file()]
    assert {path.read_bytes() for path in links} <= whole


def test_both_readings_are_named(hub: Hub) -> None:
    refused(hub, "org/name", "no such file: org/name; and as a model of the hub, org/name is not on http://127.0.0.1")
    refused(hub, "hf://org/name/a.pt", "hf://org/name/a.pt is not on http://127.0.0.1", "or is private")
    refused(hub, "hf://datasets/org/name", "is a data set; give it with --data")
    refused(hub, "hf://name", "hf://name: expected hf://org/name[@revision][/path]")


def test_what_is_not_for_this_user(hub: Hub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.model("org/private", {"a.safetensors": tiny.read_bytes()}, private=True)
    hub.model("org/gated", {"a.safetensors": tiny.read_bytes()}, gated=True)
    assert of(hub, "org/private").is_file()
    refused(hub, "org/gated", "org/gated is gated: accept its terms at", "hf auth login")
    refused(hub, "org/private@v9", "org/private has no revision v9")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(hub, "org/private", "does not accept the token; renew it with `hf auth login`")
    monkeypatch.delenv("HF_TOKEN")
    refused(hub, "org/private", "org/private is not on", "or is private: check the id, or log in")


def test_weights_that_no_name_decides_on(hub: Hub) -> None:
    hub.model("org/two", {"a.safetensors": b"", "b.safetensors": b""})
    hub.model("org/parts", {"README.md": b"", "vae/model.safetensors": b"", "unet/model.safetensors": b""})
    hub.model("org/none", {"README.md": b""})
    hub.model("org/bin", {"pytorch_model.bin.index.json": b"", "pytorch_model-00001-of-00001.bin": b""})
    refused(hub, "org/bin", "org/bin holds pytorch_model.bin in shards")
    refused(hub, "org/two", "does not say which weights are meant; give hf://org/two/a.safetensors or hf://org/two/b")
    refused(hub, "org/parts", "give hf://org/parts/unet or hf://org/parts/vae")
    refused(hub, "org/none", "org/none has no weights: no file of it ends in .safetensors")


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: Hub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.model("org/name", {"a.safetensors": tiny.read_bytes()})
    hub.break_after, hub.breaks = 1000, 2
    for _ in range(hub.breaks):  # former versions of the library go on in the next run, present ones in this one
        with suppress(CodebookError):
            of(hub, "org/name")
    assert of(hub, "org/name").read_bytes() == tiny.read_bytes()
    ranges = [sent for method, path, sent in hub.requests if method == "GET" and path.endswith("a.safetensors")]
    assert ranges == [None, "bytes=1000-", "bytes=2000-"]


def test_a_download_that_fails_keeps_whole_files_and_the_next_one_fetches_the_rest(hub: Hub, tiny: Path) -> None:
    index = json.dumps({"weight_map": {"a": "b.safetensors"}}).encode()
    files = {"model.safetensors.index.json": index, "b.safetensors": tiny.read_bytes(), "config.json": b"{}"}
    hub.model("org/name", files)
    hub.break_after, hub.breaks = 0, 1000
    refused(hub, "org/name", "the connection to http://127.0.0.1", "failed", "run it again to go on")
    hub.requests.clear()
    hub.breaks = 0
    assert of(hub, "org/name").is_dir()
    assert sorted(hub.downloads()) == ["b.safetensors", "config.json"]


def test_a_full_disk(hub: Hub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import file_download

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.model("org/name", {"a.safetensors": tiny.read_bytes()})
    monkeypatch.setattr(file_download, "http_get", full)
    refused(hub, "org/name", "the disk is full in", "free some of it, or set HF_HOME elsewhere")


def html(method: str, path: str) -> tuple[int, bytes]:
    return 200, b"<html>Log in to the wireless network</html>"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (html, "does not answer as the hub does"),
        (lambda method, path: (500, b"broken"), "answers with error 500; try again later"),
        (lambda method, path: (200, b"[1, 2]"), "does not answer as the hub does"),
        (lambda method, path: (200, b'{"sha": 3, "siblings": 4}'), "does not answer as the hub does"),
        (lambda method, path: html(method, path) if "/resolve/" in path else None, "does not answer as the hub does"),
        (lambda method, path: (503, b"") if "/resolve/" in path else None, "answers with error 503"),
    ],
)
def test_garbage(fault: Callable[..., tuple[int, bytes] | None], said: str, hub: Hub, tiny: Path) -> None:
    hub.model("org/name", {"a.safetensors": tiny.read_bytes()})
    hub.fault = fault
    refused(hub, "hf://org/name", "http://127.0.0.1", said)


def test_a_server_that_is_slow_or_gone(hub: Hub, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.model("org/name", {"a.safetensors": tiny.read_bytes()})
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    hub.delay = 0.5
    refused(hub, "org/name", "does not answer in time; try again, or set HF_HUB_DOWNLOAD_TIMEOUT")
    hub.delay, hub.stall = 0, 0.5
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    refused(hub, "org/name", "does not answer in time")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(hub, "org/name", "the connection to http://127.0.0.1:9 failed")


def test_progress_is_told(hub: Hub, tiny: Path) -> None:
    hub.model("org/name", {"a.safetensors": tiny.read_bytes(), "README.md": b"12345"})
    reports = list[tuple[str, int, int | None]]()
    located("org/name", Watch(lambda what, done, total, figures: reports.append((what, done, total))))
    nbytes = tiny.stat().st_size + 5
    assert reports[-1] == ("download org/name", nbytes, nbytes)


def test_contents_may_lie_elsewhere_but_links_out_of_the_cache_are_none_of_the_model(hub: Hub, tmp_path: Path) -> None:
    hub.model("org/name", {"config.json": b"{}", "a.safetensors": b"1", "b.txt": b"2"})
    folder = of(hub, "org/name")
    blob = (folder / "b.txt").resolve()
    blob.rename(tmp_path / "shared")  # as the library does with contents that several repositories share
    blob.symlink_to(tmp_path / "shared")
    (folder / "c.txt").symlink_to(tmp_path / "shared")
    copied, left = split_others(folder, [folder / "a.safetensors"])
    assert [path.name for path in copied] == ["b.txt"] and left == ["c.txt"]


def test_progress_of_a_download_by_chunks_has_two_bars_and_one_report() -> None:
    """The library's other way to fetch, which a server on loopback does not offer."""
    module = pytest.importorskip("huggingface_hub.utils._xet_progress_reporting")
    if not hasattr(module, "XetDownloadProgressReporter"):
        pytest.skip("the library has no such reporter yet")
    reports = list[tuple[str, int, int | None]]()
    bar = _bar(Watch(lambda what, done, total, figures: reports.append((what, done, total))), "download", 10, 110)
    rates = {"total_bytes_completion_rate": 1.0, "total_transfer_bytes_completion_rate": 1.0, "total_bytes": 100}
    with module.XetDownloadProgressReporter(
        reconstruction_desc="a", transfer_desc="b", total=100, log_level=30, tqdm_class=bar
    ) as progress:
        for received, written in ((30, 0), (60, 50), (90, 100)):
            counts = {"total_bytes_completed": written, "total_transfer_bytes_completed": received}
            progress.update_progress(SimpleNamespace(**rates, **counts))
    done = [count for _, count, _ in reports]
    assert done == sorted(done) and reports[-1] == ("download", 110, 110)
