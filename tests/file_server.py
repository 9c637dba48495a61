"""A local HTTP server with the faults that downloads meet."""

import contextlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What is served, and how badly.

    Attributes:
        files: content by path, without the slash.
        ranges: whether parts are given.
        cut: bytes after which the connection is closed, for the first answers in turn.
        status: answers given in place of the first requests in turn.
        etag: sent with every file.
        moved: path -> URL that it redirects to.
        log: the Range header ("" if none) of every request for a file.
    """

    url: str = ""
    files: dict = field(default_factory=dict)
    ranges: bool = True
    cut: list = field(default_factory=list)
    status: list = field(default_factory=list)
    etag: str = '"one"'
    moved: dict = field(default_factory=dict)
    log: list = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def do_GET(self):
        site, name = self.site, self.path.lstrip("/")
        if name in site.moved:
            self.send_response(302)
            self.send_header("Location", site.moved[name])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if site.status:
            return self.send_error(site.status.pop(0))
        if name not in site.files:
            return self.send_error(404)
        site.log.append(self.headers.get("Range", ""))
        data, start = site.files[name], 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", site.etag) == site.etag
        if asked and site.ranges and same:
            start = int(asked[1])
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        if site.etag:
            self.send_header("ETag", site.etag)
        self.end_headers()
        body = data[start:]
        if site.cut:
            body = body[: site.cut.pop(0)]
        with contextlib.suppress(OSError):
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(**settings):
    """A :class:`Site` that is up."""
    site = Site(**settings)
    handler = type("Handler", (_Handler,), {"site": site})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        site.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield site
        finally:
            server.shutdown()
