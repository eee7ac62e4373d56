"""An S3 server in a process of its own: moto's, behind a gate that does to requests what networks do.

    python -m tests.s3_server FILE

writes the server's address to FILE, and serves until it is ended. PUT /-/faults with a JSON object says what goes
wrong:

    busy     of so many requests only the last is answered, the others get 503, slow down
    cut      the connection breaks in the middle of the first answer to every GET
    refuse   requests by these methods get 403; objects are deleted by POST
    hang     every request is answered so many seconds late
"""

import json
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>no</Message></Error>"


class Gate:
    """Lets requests through to a server, or does not."""

    def __init__(self, server: WSGIApplication) -> None:
        self.server = server
        self.faults: dict[str, Any] = {}
        self.n_requests, self.seen = 0, set[str]()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """As every WSGI application."""
        if environ["PATH_INFO"] == "/-/faults":
            if environ["REQUEST_METHOD"] == "PUT":
                self.faults = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
                self.n_requests, self.seen = 0, set()
            start_response("200 OK", [])
            return [json.dumps({"n_requests": self.n_requests}).encode()]
        self.n_requests += 1
        time.sleep(self.faults.get("hang", 0))
        if environ["REQUEST_METHOD"] in self.faults.get("refuse", ()):
            return self._refuse(environ, start_response, "403 Forbidden", "AccessDenied")
        if self.n_requests % self.faults.get("busy", 1):
            return self._refuse(environ, start_response, "503 Slow Down", "SlowDown")
        answer = self.server(environ, start_response)
        place = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        if self.faults.get("cut") and environ["REQUEST_METHOD"] == "GET" and place not in self.seen:
            self.seen.add(place)
            return self._cut(environ, answer)
        return answer

    def _refuse(
        self, environ: WSGIEnvironment, start_response: StartResponse, status: str, code: str
    ) -> Iterable[bytes]:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # or the client meets a closed connection
        start_response(status, [("Content-Type", "application/xml")])
        return [_ERROR.format(code).encode()]

    def _cut(self, environ: WSGIEnvironment, answer: Iterable[bytes]) -> Iterator[bytes]:
        content = b"".join(answer)
        yield content[: len(content) // 2]
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Serve."""
    gate = Gate(DomainDispatcherApplication(create_backend_app))
    with make_server("127.0.0.1", 0, gate, threaded=True) as server:
        Path(sys.argv[1]).write_text(f"http://127.0.0.1:{server.port}")
        server.serve_forever()


if __name__ == "__main__":
    main()
