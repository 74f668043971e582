"""A server on the loopback address that answers as the Hugging Face Hub does for one model or data set."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(NamedTuple):
    """A served model.

    Attributes:
      url: what HF_ENDPOINT must be.
      downloads: names of the files that were sent, in order.
    """

    url: str
    downloads: list[str]


@contextlib.contextmanager
def serving(folder: Path, repo: str, refuse: str = "", kind: str = "model") -> Iterator[Hub]:
    """Serves the files of a folder as the model or data set `repo`, with one commit on the branch `main`.

    Args:
      folder: the files.
      repo: its name.
      refuse: an error code of the Hub, such as GatedRepo, that every request is answered with.
      kind: "model" or "dataset".
    """
    downloads: list[str] = []
    files_at = f"/{repo}/resolve/{COMMIT}/" if kind == "model" else f"/datasets/{repo}/resolve/{COMMIT}/"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            if refuse:
                self.fail(refuse)
            elif path.startswith(f"/api/{kind}s/{repo}/tree/{COMMIT}"):
                self.reply(json.dumps([_entry(file, folder) for file in _files(folder)]).encode())
            elif path in (f"/api/{kind}s/{repo}", f"/api/{kind}s/{repo}/revision/main"):
                self.reply(json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode())
            elif path.startswith(f"/api/{kind}s/{repo}/revision/"):
                self.fail("RevisionNotFound")
            elif path.startswith(files_at):
                name = path.partition(f"{COMMIT}/")[2]
                if self.command == "GET":
                    downloads.append(name)
                self.reply((folder / name).read_bytes())
            else:
                self.fail("RepoNotFound")

        def fail(self, code: str) -> None:
            self.reply(b"", 403 if code == "GatedRepo" else 404, {"X-Error-Code": code})

        def reply(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            for name, value in (etag | (headers or {})).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", downloads)
    finally:
        server.shutdown()
        server.server_close()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    content = file.read_bytes()
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": file.relative_to(folder).as_posix(), "size": len(content), "oid": oid}
