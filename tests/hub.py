"""A local Hub server: the part of huggingface.co that its client uses, served from a directory."""

from __future__ import annotations

import hashlib
import http.server
import json
from pathlib import Path
from typing import Any


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository at one commit: the list of its files, and the files."""

    repository: str  # models/some/model or datasets/some/data
    files: Path  # what the repository holds
    asked: list[str]  # paths of all requests
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        sizes = {str(p.relative_to(self.files)): p.stat().st_size for p in self.files.rglob("*") if p.is_file()}
        name = path.partition("/resolve/")[2].partition("/")[2]  # what follows the revision
        if path.startswith(f"/api/{self.repository}/tree/"):
            tree = [{"type": "file", "path": n, "size": sizes[n], "oid": etag(n)} for n in sorted(sizes)]
            self.send(json.dumps(tree).encode(), with_body)
        elif path.startswith(f"/api/{self.repository}/"):
            siblings = [{"rfilename": n} for n in sorted(sizes)]
            listing = {"id": self.repository.partition("/")[2], "sha": self.commit, "siblings": siblings}
            self.send(json.dumps(listing).encode(), with_body)
        elif path.startswith(f"/{self.repository.removeprefix('models/')}/resolve/") and name in sizes:
            self.send((self.files / name).read_bytes(), with_body, name)
        else:
            self.send_error(404, "no such repository")

    def send(self, body: bytes, with_body: bool, name: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/octet-stream" if name else "application/json")
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{etag(name)}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def etag(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()
