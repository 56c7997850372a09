"""A hub on this machine: the few requests that an upload of huggingface_hub makes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import huggingface_hub.constants
import pytest

Files = dict[str, bytes]


class Hub(BaseHTTPRequestHandler):
    """Keeps what is committed in `server.repos`, by repository and path."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repos: dict[str, Files] = self.server.repos
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            known = repo in repos
            repos.setdefault(repo, {})
            return self.reply(409 if known else 200, {"url": f"{self.server.address}/{repo}"})
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        repo, action = self.path.removeprefix("/api/models/").rsplit("/", 2)[:2]
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        for line in body.splitlines():
            told = json.loads(line)
            if told["key"] == "file":
                content = base64.b64decode(told["value"]["content"])
                repos[repo][told["value"]["path"]] = content
        address = f"{self.server.address}/{repo}/commit/1"
        return self.reply(200, {"commitUrl": address, "commitOid": "1"})

    def do_HEAD(self) -> None:
        owner, name, _, _, *path = self.path.removeprefix("/").split("/")
        found = "/".join(path) in self.server.repos.get(f"{owner}/{name}", {})
        self.send_response(200 if found else 404)
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "1")
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def reply(self, status: int, told: object) -> None:
        content = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def local_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Files]]:
    """The repositories of a hub that the library uses within: their files by path."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos = {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.repos
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
