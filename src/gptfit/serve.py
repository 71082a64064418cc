"""`gptfit serve`: the forms and their answers at 127.0.0.1, for one person's browser.

It keeps no state and runs nothing that it is sent. Another site cannot ask it: the Host header has to be this
machine's own (a foreign name that is made to point here is refused), and a form's Origin this page's. Each question
is answered in a process of its own, which is ended when it takes too long; a few at once.
"""

import base64
import errno
import hashlib
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

from gptfit.answers import home
from gptfit.errors import GptfitError
from gptfit.report.html_assets import CSS, SCRIPT
from gptfit.report.html_forms import message_page
from gptfit.report.html_parts import Html

ADDRESS = "127.0.0.1"
MAX_BODY_BYTES = 2 << 20
MAX_FIELDS = 20
MAX_CONNECTIONS = 32
FORM = "application/x-www-form-urlencoded"
PAGES = {"/": ("GET", "HEAD"), "/fit": ("POST",), "/oom": ("POST",)}


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# Only the style and the script that every page brings along; style attributes give the charts their places.
POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src-elem {_hash(CSS)}",
        "style-src-attr 'unsafe-inline'",
        f"script-src {_hash(SCRIPT)}",
        "img-src data:",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
    # Not no-referrer: a form's Origin would then be null.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Server(ThreadingHTTPServer):
    """Bound to this machine alone. `deadline` seconds for an answer, `patience` for its turn, `body` for the text."""

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # on Windows it would share the port with another program
    allow_reuse_port = False
    deadline, patience, body = 60.0, 20.0, 20.0

    def __init__(self, port: int, at_once: int = 3) -> None:
        self.turns = threading.BoundedSemaphore(at_once)
        super().__init__((ADDRESS, port), Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks for a name by DNS, which may take seconds
        self.server_name, self.server_port = ADDRESS, int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        names = (ADDRESS, "localhost")
        return tuple(f"{name}:{self.server_port}" for name in names) + (names if self.server_port == 80 else ())

    def verify_request(self, request: object, client_address: object) -> bool:
        return threading.active_count() < MAX_CONNECTIONS

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a browser that went away is no error."""

    def answer(self, path: str, fields: dict[str, str]) -> tuple[int, str | Html]:
        """Status and page, from a process of its own."""
        if not self.turns.acquire(timeout=self.patience):
            return 503, message_page("Too many questions at once", "Ask again in a moment.")
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "gptfit.answers"],
                input=json.dumps({"path": path, "fields": fields}).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=self.deadline,
                check=True,
            )
            status, _, page = done.stdout.decode().partition("\n")
            return int(status), page
        except subprocess.TimeoutExpired:
            text = f"No answer within {self.deadline:.0f} seconds"
            return 503, message_page(text, "Fewer layers or a larger loss_chunk_size are answered sooner.")
        except (subprocess.CalledProcessError, ValueError):
            return 500, message_page("Internal error", "Please report it, with what was asked.")
        finally:
            self.turns.release()


class Handler(BaseHTTPRequestHandler):
    """One request. Errors are pages too; nothing is logged, as a paste is its owner's."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = 10.0  # seconds of silence

    def handle_request(self) -> None:
        host = self.headers.get_all("Host", [])
        if len(host) != 1 or host[0].lower() not in self.server.hosts:
            self.say(403, "Not for this host", f"The page is at {self.server.url}")
        elif self.path not in PAGES:
            self.say(404, "There is no such page", f"The page is at {self.server.url}")
        elif self.command not in PAGES[self.path]:
            self.say(405, "This page is not asked that way", allow=PAGES[self.path])
        elif self.command == "POST":
            self.post(f"http://{host[0].lower()}")
        else:
            self.send(200, home())

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = handle_request

    def post(self, own: str) -> None:
        """Answers a form, once it is known to be this page's own and small enough."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Origin", "").lower() != own:
            self.say(403, "Not asked by this page", f"The page is at {self.server.url}")
        elif self.headers.get_content_type() != FORM:
            self.say(415, "Not a form")
        elif "Transfer-Encoding" in self.headers or not length:
            self.say(411, "The length of the text is not told")
        elif not (length.isascii() and length.isdecimal()):
            self.say(400, "The length of the text is no number")
        elif len(length) > 12 or int(length) > MAX_BODY_BYTES:
            self.say(413, "The text is too long", "At most 2 MiB; of a log the end is enough: tail -n 2000 train.log")
            self.drain()
        elif (body := self.read(int(length))) is None:
            self.say(408, "The text did not come")
        else:
            try:
                fields = dict(parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_FIELDS))
            except ValueError:
                self.say(400, "Not a form")
                return
            fields = {name: text.replace("\r\n", "\n") for name, text in fields.items()}
            self.send(*self.server.answer(self.path, fields))

    def read(self, length: int) -> bytes | None:
        """The body, or None where it does not come in time."""
        body, end = b"", time.monotonic() + self.server.body
        try:
            while len(body) < length:
                self.connection.settimeout(max(0.01, end - time.monotonic()))
                piece = self.rfile.read1(length - len(body)) if time.monotonic() < end else b""
                if not piece:
                    return None
                body += piece
        except TimeoutError:
            return None
        return body

    def drain(self) -> None:
        """Takes a little more of what is too long, so that the answer is read before the connection ends."""
        end, left = time.monotonic() + 2, 8 * MAX_BODY_BYTES
        self.connection.settimeout(0.5)
        try:
            while left > 0 and time.monotonic() < end and (piece := self.rfile.read1(1 << 16)):
                left -= len(piece)
        except OSError:
            return

    def say(self, status: int, text: str, hint: str = "", allow: tuple[str, ...] = ()) -> None:
        self.send(status, message_page(text, hint), allow)

    def send(self, status: int, page: str, allow: tuple[str, ...] = ()) -> None:
        content = page.encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        if allow:
            self.send_header("Allow", ", ".join(allow))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            self.wfile.flush()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses: a request that cannot be read."""
        self.close_connection = True
        self.say(int(code), "The request cannot be read")

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def version_string(self) -> str:
        return "gptfit"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def serve(port: int, ready: Callable[[str], None]) -> None:
    """Serves until it is interrupted; `ready` is told the address. Raises GptfitError where the port cannot be had."""
    try:
        server = Server(port)
    except (OSError, OverflowError) as error:
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        reason = "is taken" if taken else f"cannot be had: {error}"
        raise GptfitError(f"port {port} {reason}", f"try another: gptfit serve --port {port % 60000 + 1}") from None
    with server:
        ready(server.url)
        server.serve_forever()
