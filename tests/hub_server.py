"""A stand-in for the hub on this machine: one data set's repository, behind the paths that the
hub's client asks for."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


@contextlib.contextmanager
def serving(name: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """The address of a hub that has one data set of that name, until the block ends."""
    about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": one} for one in files]}
    tree = [
        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for path, data in files.items()
    ]
    folders = sorted({path.rpartition("/")[0] for path in files} - {""})
    tree += [{"type": "directory", "path": path, "size": 0, "oid": COMMIT} for path in folders]

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            asked = json.loads(self.rfile.read(size) or b"{}").get("paths", [])
            self.send([one for one in tree if one["path"] in asked])

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/datasets/{name}/tree/"):
                inside = path.split("/tree/")[1].partition("/")[2].strip("/")
                under = [one for one in tree if one["path"].startswith(f"{inside}/" * bool(inside))]
                self.send(under)
            elif path.startswith(f"/api/datasets/{name}"):
                self.send(about)
            elif path.startswith(f"/datasets/{name}/resolve/"):
                self.send_file(path.split("/resolve/")[1].partition("/")[2])
            else:
                self.missing("RepoNotFound")

        def send(self, value: object) -> None:
            self.send_bytes(json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send_file(self, path: str) -> None:
            if path not in files:
                self.missing("EntryNotFound")
                return
            digest = hashlib.sha1(files[path]).hexdigest()
            self.send_bytes(files[path], {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})

        def missing(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_bytes(self, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
