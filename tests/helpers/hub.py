"""A Hugging Face hub on this machine, over HTTP: what huggingface_hub asks of one, and a note of what was asked.

Repositories are folders, KIND/OWNER/NAME/REVISION with / in a revision as +; those named `gated` want a token.
"""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34


class Hub:
    def __init__(self, root: Path, gated: tuple[str, ...] = ()):
        self.root, self.gated, self.asked = root, gated, []
        self.url = ""

    def commit(self, kind: str, name: str, revision: str) -> Path | None:
        """The folder of a revision, which may be given by its hash."""
        top = self.root / kind / name
        folders = sorted(top.iterdir()) if top.is_dir() else []
        return next((f for f in folders if revision in (f.name.replace("+", "/"), _hash(f))), None)

    def describe(self, parts: list[str]) -> Any:
        """What the API says: of a repository at a revision, or its files."""
        kind, name = parts[0], "/".join(parts[1:3])
        what, revision = parts[3:5] if len(parts) > 4 else ("revision", "main")
        folder = self.commit(kind, name, revision)
        if folder is None:
            return None
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if what == "tree":
            return [
                {"type": "file", "path": _name(p, folder), "size": p.stat().st_size, "oid": _blob(p)} for p in files
            ]
        siblings = [{"rfilename": _name(path, folder)} for path in files]
        return {"id": name, "sha": _hash(folder), "siblings": siblings, "private": False, "tags": [], "downloads": 0,
                "likes": 0, "gated": "manual" if name in self.gated else False}  # fmt: skip

    def answer(self, request: http.server.BaseHTTPRequestHandler, body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(request.path).path.strip("/").split("/")]
        self.asked.append("/".join(parts))
        if parts[0] == "api":
            facts = self.describe(parts[1:])
            if facts is None:
                there = (self.root / "/".join(parts[1:4])).is_dir()
                self.send(request, 404, error="RevisionNotFound" if there else "RepoNotFound")
            else:
                self.send(request, 200, json.dumps(facts).encode(), {"Content-Type": "application/json"}, body)
            return
        kind = "datasets" if parts[0] == "datasets" else "models"
        owner, repo, _, revision, *path = parts[1:] if kind == "datasets" else parts
        if f"{owner}/{repo}" in self.gated and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(request, 403, error="GatedRepo")
            return
        folder = self.commit(kind, f"{owner}/{repo}", revision)
        file = folder / "/".join(path) if folder else None
        if file is None or folder is None or not file.is_file():
            self.send(request, 404, error="EntryNotFound")
            return
        headers = {"ETag": f'"{_blob(file)}"', "X-Repo-Commit": _hash(folder)}
        self.send(request, 200, file.read_bytes(), headers, body)

    def send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        code: int,
        data: bytes = b"",
        headers: dict[str, str] | None = None,
        body: bool = True,
        error: str = "",
    ) -> None:
        request.send_response(code)
        for name, value in ({"X-Error-Code": error} if error else {} | (headers or {})).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, which answers as long as the context lasts."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.answer(self, True)

        def do_HEAD(self) -> None:
            hub.answer(self, False)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()


def _hash(folder: Path) -> str:
    return sha1(str(folder).encode()).hexdigest()


def _blob(file: Path) -> str:
    return sha1(file.read_bytes()).hexdigest()


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
