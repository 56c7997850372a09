"""A stand-in of the hub on this machine: as much of its HTTP interface as huggingface_hub needs to
log in, to create a repository, to put files into it in commits (LFS included), and to read them.

A process that is to use it starts with `Hub.environment`, as the client reads it when imported;
within a test, `use` has the same effect.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants

TOKEN = "hf_" + "t" * 34
LARGE = (".safetensors", ".jpg", ".png")  # what goes through LFS


@dataclass(kw_only=True)
class Repository:
    """files: content by path. commits: their messages, the newest last."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@dataclass(kw_only=True)
class Hub:
    """What the server knows. writes: whether the token may. asked: methods and paths of requests.
    breaks: a path whose requests end in a fault of the server."""

    url: str
    user: str = "me"
    writes: bool = True
    breaks: str = "never"
    repos: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """For processes whose hub this is. Transfers by Xet, a protocol of its own, are off."""
        told = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return told | ({"HF_TOKEN": token} if token else {})


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub that serves as long as the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(url=f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


def use(hub: Hub, patch: pytest.MonkeyPatch, *, token: str | None = TOKEN) -> None:
    """Have this process's client talk to `hub`, as `Hub.environment` has those that start."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    template = "{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{template}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    bars = import_module("huggingface_hub.utils.tqdm")  # the package has a class of that name
    patch.setitem(bars.progress_bar_states, "_global", False)
    for place in ("HF_TOKEN_PATH", "AGENT_HARNESSES_PATH"):  # the person's who runs the tests
        patch.setattr(constants, place, "/proc/none")
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    else:
        patch.setenv("HF_TOKEN", token)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        told = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in (told | {k.replace("_", "-"): v for k, v in headers.items()}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, reason: str, code: str = "") -> None:
        more = {"X_Error_Code": code} if code else {}
        self.answer({"error": reason}, status, X_Error_Message=reason, **more)

    def serve(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.hub.breaks in path:
            self.refuse(400, "a fault of the server")
            return
        if path.startswith("/objects/"):  # without a token, as the storage behind the hub
            self.hub.objects[path.removeprefix("/objects/")] = body
            self.answer({})
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "Invalid credentials in Authorization header")
            return
        for method, pattern, serve in ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command and found:
                serve(self, body, *found.groups())
                return
        self.refuse(404, f"no such page {path}")

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def repository(self, repo: str) -> Repository | None:
        if repo not in self.hub.repos:
            self.refuse(404, "Repository not found", "RepoNotFound")
        return self.hub.repos.get(repo)


def whoami(to: Handler, _: bytes) -> None:
    to.answer({"type": "user", "name": to.hub.user, "orgs": [{"name": "our-lab"}]})


def create(to: Handler, body: bytes) -> None:
    asked = json.loads(body)
    repo = f"{asked['organization'] or to.hub.user}/{asked['name']}"
    if not to.hub.writes:
        to.refuse(403, "You don't have the rights to create a model under this namespace")
        return
    status = 409 if repo in to.hub.repos else 200
    private = asked.get("visibility") == "private"
    to.hub.repos.setdefault(repo, Repository(private=private))
    to.answer({"url": f"{to.hub.url}/{repo}"}, status)


def info(to: Handler, _: bytes, repo: str) -> None:
    if found := to.repository(repo):
        siblings = [{"rfilename": name} for name in found.files]
        told = {"id": repo, "modelId": repo, "private": found.private, "sha": found.sha}
        to.answer(told | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})


def tree(to: Handler, _: bytes, repo: str) -> None:
    if found := to.repository(repo):
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
            for name, content in found.files.items()
        ]
        to.answer(entries)


def validate(to: Handler, body: bytes) -> None:
    """The hub refuses a card whose front matter it cannot read."""
    content = json.loads(body)["content"]
    errors = [] if content.startswith("---\n") else [{"message": "no front matter"}]
    to.answer({"errors": errors, "warnings": []}, 400 if errors else 200)


def preupload(to: Handler, body: bytes, repo: str) -> None:
    if found := to.repository(repo):
        told = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": oid_of(file["path"], found),
            }
            for file in json.loads(body)["files"]
        ]
        to.answer({"files": told})


def oid_of(path: str, repository: Repository) -> str | None:
    """What the client compares with its own file, to send only what has changed."""
    content = repository.files.get(path)
    if content is None:
        return None
    large = path.endswith(LARGE)
    return hashlib.sha256(content).hexdigest() if large else git_hash(content)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def batch(to: Handler, body: bytes, _: str) -> None:
    told = [
        {
            **{key: one[key] for key in ("oid", "size")},
            "actions": {"upload": {"href": f"{to.hub.url}/objects/{one['oid']}"}},
        }
        for one in json.loads(body)["objects"]
    ]
    to.answer({"transfer": "basic", "objects": told})


def commit(to: Handler, body: bytes, repo: str) -> None:
    found = to.repository(repo)
    if found is None:
        return
    if not to.hub.writes:
        to.refuse(403, "Forbidden: you need the right to write")
        return
    for line in body.splitlines():
        one = json.loads(line)
        value = one["value"]
        if one["key"] == "header":
            found.commits.append(value["summary"])
        elif one["key"] == "file":
            found.files[value["path"]] = base64.b64decode(value["content"])
        elif one["key"] == "lfsFile":
            found.files[value["path"]] = to.hub.objects[value["oid"]]
        else:
            found.files.pop(value["path"], None)
    address = f"{to.hub.url}/{repo}/commit/{found.sha}"
    to.answer({"commitUrl": address, "commitOid": found.sha})


def resolve(to: Handler, _: bytes, repo: str, name: str) -> None:
    found = to.repository(repo)
    if found is None:
        return
    if name not in found.files:
        to.refuse(404, "Entry not found", "EntryNotFound")
        return
    content = found.files[name]
    told = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": found.sha}
    to.answer(content, **told)


MODEL = r"/api/models/([^/]+/[^/]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validate),
    ("GET", MODEL, info),
    ("GET", rf"{MODEL}/revision/[^/]+", info),
    ("GET", rf"{MODEL}/tree/[^/]+", tree),
    ("POST", rf"{MODEL}/preupload/[^/]+", preupload),
    ("POST", rf"{MODEL}/commit/[^/]+", commit),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
    ("GET", r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", resolve),
    ("HEAD", r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", resolve),
)
