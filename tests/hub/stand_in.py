"""A local Hub. It implements the part of the HTTP interface that `huggingface_hub` uses to push and load models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

TOKEN = "hf_ThisIsTheSecretOfTheTests0123456789"

_NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


class StandIn(ThreadingHTTPServer):
    """A server that stores repositories, and every received request without its Authorization header."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.received: list[bytes] = []
        self.tokens: set[str] = set()
        self.interrupt: Callable[[], object] | None = None
        """Called once during an upload, whose connection is then closed."""
        self.is_full = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that a test kills closes its connection, which is no error

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return found.commits[found.branches.get(revision, revision)]


@contextmanager
def running() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def reachable(home: Path) -> Iterator[StandIn]:
    """Run a local Hub, and make `huggingface_hub` in this process and in its child processes use it.

    `home` becomes HF_HOME, the folder of the local cache.
    """
    with running() as server, pytest.MonkeyPatch.context() as patch:
        environment = {
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }
        for name, value in environment.items():
            patch.setenv(name, value)
        # `huggingface_hub` reads the environment variables only when it is imported.
        patch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        yield server


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        self.path, _, _ = (unquote(part) for part in urlsplit(self.path)[2:5])
        headers = {name: value for name, value in self.headers.items() if name.lower() != "authorization"}
        self.server.tokens.add(self.headers.get("Authorization", ""))
        self.server.received.append(f"{self.command} {self.path} {headers}".encode())
        for method, pattern, answer in self.routes:
            if method == self.command and (match := re.fullmatch(pattern, self.path)):
                return answer(self, **match.groupdict())
        self._error(404, "EntryNotFound", f"no route {self.command} {self.path}")

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.received.append(body)
        return body

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, Content_Type="application/json")

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(json.dumps({"error": message}).encode(), status, X_Error_Code=code, X_Error_Message=message)

    def _create(self) -> None:
        asked = json.loads(self._body())
        name = f"{asked.get('organization', 'me')}/{asked['name']}"
        answer = {"url": f"{self.server.endpoint}/{name}", "name": name, "id": "0"}
        if name in self.server.repos:
            return self._json({"error": "exists", **answer}, 409)
        repo = self.server.repos[name] = Repo(asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b""})
        self._json(answer)

    def _branch(self, repo: str, branch: str) -> None:
        self._body()
        branches = self.server.repos[repo].branches
        if branch in branches:
            return self._error(409, "Conflict", "exists")
        branches[branch] = branches["main"]
        self._json({})

    def _validate(self) -> None:
        content = json.loads(self._body())["content"]
        metadata = yaml.safe_load(content.split("---")[1])
        errors = [
            {"message": f'"{key}" must be a text'}
            for key in ("license", "library_name", "pipeline_tag", "base_model")
            if not isinstance(metadata.get(key, ""), str)
        ]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, repo: str, revision: str) -> None:
        modes = {True: "lfs", False: "regular"}
        asked = json.loads(self._body())["files"]
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": modes[file["path"].endswith((".safetensors", ".png"))],
                        "shouldIgnore": False,
                    }
                    for file in asked
                ]
            }
        )

    def _batch(self, repo: str) -> None:
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{asked['oid']}"}}}
            if asked["oid"] not in self.server.objects
            else asked
            for asked in json.loads(self._body())["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if self.server.is_full:
            self._body()
            return self._error(403, "Full", "no space is left for you")
        if self.server.interrupt is not None:
            interrupt, self.server.interrupt = self.server.interrupt, None
            self.rfile.read(1000)
            interrupt()
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._send(b"")

    def _commit(self, repo: str, revision: str) -> None:
        found = self.server.repos[repo]
        files = dict(self.server.files(repo, revision))
        for line in self._body().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = found.commit(revision, files)
        self._json({"commitUrl": f"{self.server.endpoint}/{repo}/commit/{sha}", "commitOid": sha})

    def _info(self, repo: str, revision: str = "main") -> None:
        if (found := self._found(repo, revision)) is not None:
            sha, files = found
            self._json({"id": repo, "sha": sha, "siblings": [{"rfilename": path} for path in files], "tags": []})

    def _tree(self, repo: str, revision: str) -> None:
        if (found := self._found(repo, revision)) is not None:
            entries = [{"type": "file", "oid": sha1(c), "size": len(c), "path": path} for path, c in found[1].items()]
            self._json(entries)

    def _found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        known = self.server.repos.get(repo)
        if known is None:
            self._error(404, "RepoNotFound", "Repository not found")
            return None
        sha = known.branches.get(revision, revision)
        if sha not in known.commits:
            self._error(404, "RevisionNotFound", "Invalid rev id")
            return None
        return sha, known.commits[sha]

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self._found(repo, revision)) is None:
            return
        sha, files = found
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {"X_Repo_Commit": sha, "ETag": f'"{sha1(content)}"'}
        if (oid := hashlib.sha256(content).hexdigest()) in self.server.objects:
            headers |= {
                "X_Linked_Etag": f'"{oid}"',
                "X_Linked_Size": str(len(content)),
                # The name of the host differs, as on the real Hub, so that the client sends no token.
                "Location": f"http://localhost:{self.server.server_port}/lfs/{oid}",
            }
            return self._send(b"", 302, **headers)
        self._send(content, **headers)

    def _get(self, oid: str) -> None:
        self._send(self.server.objects[oid])

    routes: ClassVar[list[tuple[str, str, Callable[..., None]]]] = [
        ("POST", "/api/repos/create", _create),
        ("POST", "/api/validate-yaml", _validate),
        ("POST", rf"/api/models/{_NAME}/branch/(?P<branch>.+)", _branch),
        ("POST", rf"/api/models/{_NAME}/preupload/(?P<revision>.+)", _preupload),
        ("POST", rf"/api/models/{_NAME}/commit/(?P<revision>.+)", _commit),
        ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _batch),
        ("PUT", r"/lfs/(?P<oid>\w+)", _put),
        ("GET", r"/lfs/(?P<oid>\w+)", _get),
        ("GET", rf"/api/models/{_NAME}", _info),
        ("GET", rf"/api/models/{_NAME}/revision/(?P<revision>.+)", _info),
        ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>.+)", _tree),
        ("GET", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
        ("HEAD", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
    ]


def sha1(content: bytes) -> str:
    """Return the hash of a file's content as git computes it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
