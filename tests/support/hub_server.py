"""A server on loopback that speaks the API of the Hugging Face hub: what its clients ask to read and to commit.

It keeps repositories in memory, and can misbehave as servers do: break off, be silent, answer with garbage.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_good"
USER = "me"
Query = Mapping[str, list[str]]
_LARGE = re.compile(r"\.(safetensors|bin|pt|ckpt|parquet|tar|png|wav|zip)$")


@dataclass
class Repository:
    """One repository, with all its commits.

    Attributes:
        commits: Files by path, of each commit by its hash.
        refs: Commit hash by branch or tag.
        private: Whether only TOKEN sees it.
        gated: Whether its terms have not been accepted.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Add a commit that holds exactly `files`; its hash."""
        digest = hashlib.sha1(repr(len(self.commits)).encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + b"\0" + content)
        self.commits[digest.hexdigest()] = dict(files)
        self.refs[ref] = digest.hexdigest()
        return digest.hexdigest()

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the last commit on main."""
        return self.commits[self.refs["main"]] if self.refs else {}


@dataclass
class Hub:
    """The server's state.

    Attributes:
        url: Of the server.
        models: Repositories by id.
        datasets: The same, of data sets.
        requests: Method, path and Range header of each request.
        uploaded: Contents by SHA-256, before they are committed.
        break_after: Bytes of a large file after which a download breaks off; None for never.
        breaks: So many downloads break off.
        fault: Called with method and path before each request; what it returns is sent in place of the answer.
        delay: Seconds before each answer.
        stall: Seconds before the content of a large file.
        role: Of TOKEN: write or read.
    """

    url: str = ""
    models: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    break_after: int | None = None
    breaks: int = 0
    fault: Callable[[str, str], tuple[int, bytes] | None] = lambda method, path: None
    delay: float = 0.0
    stall: float = 0.0
    role: str = "write"

    def model(self, name: str, files: Mapping[str, bytes], **more: Any) -> str:
        """Make a model repository, or add a commit to it; the commit's hash."""
        return _with_commit(self.models, name, files, more)

    def dataset(self, name: str, files: Mapping[str, bytes], **more: Any) -> str:
        """As `model`, of a data set."""
        return _with_commit(self.datasets, name, files, more)

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        paths = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in paths]


def _with_commit(place: dict[str, Repository], name: str, files: Mapping[str, bytes], more: Mapping[str, Any]) -> str:
    repository = place.setdefault(name, Repository())
    for key, value in more.items():
        setattr(repository, key, value)
    return repository.commit(files)


@contextmanager
def serving() -> Iterator[Hub]:
    """Run the server in a thread."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that left."""


class _RefusedError(Exception):
    """An answer other than 200.

    Attributes:
        status: Of HTTP.
        code: As the hub names the reason.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 (names of the base class)

    def _answer(self) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        path = unquote(parts.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command != "GET" else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunked()
        hub.requests.append((self.command, path, self.headers.get("Range")))
        threading.Event().wait(hub.delay)
        fault = hub.fault(self.command, path)
        if fault is not None:
            self._send(fault[0], fault[1], {"Content-Type": "text/html"})
            return
        try:
            token = self._token()
            for pattern, answer in _ROUTES:
                if matched := re.fullmatch(pattern, path):
                    answer(self, token, parse_qs(parts.query), **matched.groupdict())
                    return
            raise _RefusedError(404, "", f"no such page: {path}")
        except _RefusedError as error:
            reason = {"X-Error-Code": error.code} if error.code else {}
            self._send(
                error.status, json.dumps({"error": str(error)}).encode(), reason | {"X-Error-Message": str(error)}
            )

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _token(self) -> str | None:
        sent = self.headers.get("Authorization")
        if sent is None:
            return None
        if sent != f"Bearer {TOKEN}":
            raise _RefusedError(401, "", "Invalid credentials in Authorization header")
        return TOKEN

    def _send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode())

    def _repository(self, token: str | None, kind: str, name: str) -> Repository:
        repository = getattr(self.hub, kind).get(name)
        if repository is None or (repository.private and token is None):
            raise _RefusedError(401 if token is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def whoami(self, token: str | None, query: object) -> None:
        if token is None:
            raise _RefusedError(401, "", "Invalid username or password.")
        self._json(
            {"type": "user", "name": USER, "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": self.hub.role}}}
        )

    def info(self, token: str | None, query: Query, kind: str, name: str, revision: str = "main") -> None:
        repository = self._repository(token, kind, name)
        commit = "" if revision == "main" and not repository.refs else self._commit_of(repository, revision)
        files = repository.commits.get(commit, {})
        siblings = [{"rfilename": path, **({"size": len(files[path])} if "blobs" in query else {})} for path in files]
        answer = {"_id": "1", "id": name, "modelId": name, "sha": commit or "0" * 40, "siblings": siblings}
        more = {"private": repository.private, "gated": "manual" if repository.gated else False, "disabled": False}
        self._json(answer | more | {"tags": [], "downloads": 0, "likes": 0})

    def tree(
        self, token: str | None, query: Query, kind: str, name: str, revision: str, folder: str | None = None
    ) -> None:
        repository = self._repository(token, kind, name)
        files = repository.commits[self._commit_of(repository, revision)]
        front = f"{folder}/" if folder else ""
        below = {path: content for path, content in files.items() if path.startswith(front)}
        if folder and not below:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        whole = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {path.rpartition("/")[0] for path in below if "/" in path[len(front) :]}
        if not whole:
            folders = {front + path[len(front) :].partition("/")[0] for path in folders}
            below = {path: content for path, content in below.items() if "/" not in path[len(front) :]}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        self._json([*entries, *(_entry(path, content) for path, content in below.items())])

    def paths_info(self, token: str | None, query: object, kind: str, name: str, revision: str) -> None:
        repository = self._repository(token, kind, name)
        files = repository.commits[self._commit_of(repository, revision)]
        paths = json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())["paths"]
        folders = {path for path in paths if any(name.startswith(f"{path}/") for name in files)}
        entries = [_entry(path, files[path]) for path in paths if path in files]
        self._json([*entries, *({"type": "directory", "path": path, "oid": "0" * 40} for path in folders)])

    def resolve(
        self, token: str | None, query: object, name: str, revision: str, file: str, kind: str | None = None
    ) -> None:
        repository = self._repository(token, "datasets" if kind else "models", name)
        if repository.gated:
            raise _RefusedError(403, "GatedRepo", f"Access to {name} is restricted: accept its terms")
        commit = self._commit_of(repository, revision)
        content = repository.commits[commit].get(file)
        if content is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        self.send_response(206 if self.headers.get("Range") else 200)
        start, stop = 0, len(content)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(wanted[1]), min(len(content), int(wanted[2]) + 1 if wanted[2] else len(content))
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("ETag", f'"{_etag(file, content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        hub, sent = self.hub, content[start:stop]
        threading.Event().wait(hub.stall if _LARGE.search(file) else 0)
        if hub.breaks and hub.break_after is not None and len(sent) > hub.break_after and _LARGE.search(file):
            hub.breaks -= 1
            self.wfile.write(sent[: hub.break_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(sent)

    def create(self, token: str | None, query: object) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if token is None:
            raise _RefusedError(401, "", "Invalid username or password.")
        if not name.startswith((f"{USER}/", "org/")):
            raise _RefusedError(403, "", f"You don't have the rights to create a model under the namespace {name}")
        if name in self.hub.models:
            raise _RefusedError(409, "", "You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.models[name] = Repository(private=private)
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})

    def delete(self, token: str | None, query: object) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        self._repository(token, "models", name)
        del self.hub.models[name]
        self._json({})

    def validate(self, token: str | None, query: object) -> None:
        import yaml

        head = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        errors = [] if head and isinstance(yaml.safe_load(head[1]), dict) else [{"message": "no metadata"}]
        self._send(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())

    def preupload(self, token: str | None, query: object, kind: str, name: str, revision: str) -> None:
        self._repository(token, kind, name)
        files = json.loads(self.body)["files"]
        modes = {file["path"]: "lfs" if _LARGE.search(file["path"]) else "regular" for file in files}
        self._json(
            {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
        )

    def batch(self, token: str | None, query: object, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        self._json(
            {
                "transfer": "basic",
                "objects": [
                    one | {"actions": {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}}} for one in objects
                ],
            }
        )

    def upload(self, token: str | None, query: object, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusedError(400, "", "the content has another hash")
        self.hub.uploaded[oid] = self.body
        self._json({})

    def commit(self, token: str | None, query: object, kind: str, name: str, revision: str) -> None:
        repository = self._repository(token, kind, name)
        if token is None:
            raise _RefusedError(401, "", "Invalid username or password.")
        files = dict(repository.files)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get(
                "parentCommit", repository.refs.get("main")
            ) != repository.refs.get("main"):
                raise _RefusedError(412, "", "A commit has happened since")
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] == "deletedFolder":
                files = {path: of for path, of in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        oid = repository.commit(files)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})


def _etag(path: str, content: bytes) -> str:
    """As the hub has it: the SHA-256 of a large file, else git's hash of the blob."""
    if _LARGE.search(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, object]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    large = {"lfs": {"oid": _etag(path, content), "size": len(content), "pointerSize": 130}}
    return {"type": "file", "oid": blob, "size": len(content), "path": path, **(large if _LARGE.search(path) else {})}


_KIND, _NAME, _REVISION = r"(?P<kind>models|datasets)", r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>refs/\w+/\w+|[^/]+)"
_ROUTES: tuple[tuple[str, Any], ...] = (
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/repos/create", _Handler.create),
    (r"/api/repos/delete", _Handler.delete),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/{_KIND}/{_NAME}", _Handler.info),
    (rf"/api/{_KIND}/{_NAME}/revision/{_REVISION}", _Handler.info),
    (rf"/api/{_KIND}/{_NAME}/tree/{_REVISION}(?:/(?P<folder>.*))?", _Handler.tree),
    (rf"/api/{_KIND}/{_NAME}/paths-info/{_REVISION}", _Handler.paths_info),
    (rf"/api/{_KIND}/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    (rf"/api/{_KIND}/{_NAME}/commit/{_REVISION}", _Handler.commit),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/upload/(?P<oid>\w+)", _Handler.upload),
    (rf"/(?P<kind>datasets)/{_NAME}/resolve/{_REVISION}/(?P<file>.+)", _Handler.resolve),
    (rf"/{_NAME}/resolve/{_REVISION}/(?P<file>.+)", _Handler.resolve),
)
