"""A folder as a Google Cloud Storage bucket on the loopback: the reading half of its JSON API, for tests."""

import http.server
import json
import pathlib
import re
import threading
import urllib.parse


def serve(root: pathlib.Path) -> tuple[http.server.ThreadingHTTPServer, list[str]]:
    """Starts a server; its buckets are the folders in `root`. Returns it and the list of requests that it answers."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            url = urllib.parse.urlsplit(self.path)
            query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
            requests.append(f"{self.path} {self.headers.get('Range', '')}")
            match = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", url.path)
            bucket, name = match.group(1), urllib.parse.unquote(match.group(2) or "")
            path = root / bucket / name
            if not name:
                self._answer(200, json.dumps(listing(root / bucket, bucket, query)).encode())
            elif not path.is_file():
                self._answer(404, b'{"error": {"code": 404, "message": "No such object"}}')
            elif query.get("alt") != "media":
                self._answer(200, json.dumps(facts(path, bucket, name)).encode())
            else:
                self._media(path.read_bytes())

        def _media(self, data: bytes):
            start, end = re.fullmatch(r"(?:bytes=(\d*)-(\d*))?", self.headers.get("Range") or "").groups()
            if start is None:
                return self._answer(200, data)
            first = int(start) if start else max(len(data) - int(end), 0)
            last = min(int(end), len(data) - 1) if start and end else len(data) - 1
            self._answer(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None):
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a reader that hangs up early
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, requests


def facts(path: pathlib.Path, bucket: str, name: str) -> dict[str, str]:
    time = "2026-01-01T00:00:00.000Z"
    size, kind = str(path.stat().st_size), "storage#object"
    return {
        "kind": kind,
        "bucket": bucket,
        "name": name,
        "size": size,
        "timeCreated": time,
        "updated": time,
        "generation": "1",
    }


def listing(folder: pathlib.Path, bucket: str, query: dict[str, str]) -> dict[str, list]:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    items, prefixes = [], set()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(facts(path, bucket, name))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}
