"""The local page over a real socket: what it answers, and what it refuses."""

import base64
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from gptfit import serve
from gptfit.answers import answer
from gptfit.serve import MAX_BODY_BYTES, Server
from test_imports import PASTE

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(0) as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield one
        one.shutdown()
        thread.join()


def ask(
    server: Server, method: str, path: str, body: str | bytes | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, str]:
    """One request as a browser on this page makes it, but for `headers` (content_type is Content-Type)."""
    own = f"127.0.0.1:{server.server_port}"
    sent = {"Host": own}
    if method == "POST":
        sent |= {"Origin": f"http://{own}", "Content-Type": "application/x-www-form-urlencoded"}
    sent |= {name.replace("_", "-").title(): text for name, text in headers.items()}
    sent = {name: text for name, text in sent.items() if text}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        connection.request(method, path, body, sent)
        got = connection.getresponse()
        return got.status, got.headers, got.read().decode()
    finally:
        connection.close()


def post(server: Server, path: str, **fields: str) -> tuple[int, str]:
    status, _, page = ask(server, "POST", path, urlencode(fields))
    return status, page


def test_the_page_has_both_forms_and_needs_no_script(server: Server) -> None:
    status, headers, page = ask(server, "GET", "/")
    assert status == 200
    assert re.findall(r'<form method="post" action="([^"]*)"', page) == ["/fit", "/oom"]
    fields = re.findall(r'<(?:input|select|textarea) id="([^"]*)"', page)
    assert fields == re.findall(r'<label for="([^"]*)"', page), "each field has its label"
    assert headers["Content-Type"] == "text/html; charset=utf-8"


def test_only_the_style_and_the_script_of_the_page_are_allowed(server: Server) -> None:
    status, headers, page = ask(server, "POST", "/fit", urlencode({"gpu": "rtx4070", "what": "estimate"}))
    assert status == 200
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    for element, rule in (("style", "style-src-elem"), ("script", "script-src")):
        inline = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline]
        assert policy[rule] == " ".join(f"'sha256-{one}'" for one in hashes)
    assert " onclick=" not in page
    assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")


def test_an_estimate_and_a_plan_are_the_pages_of_the_commands(server: Server, gptfit: Any, tmp_path: Any) -> None:
    for what in ("estimate", "plan"):
        file = tmp_path / f"{what}.html"
        gptfit(what, "gpt2", "batch_size=4", "--gpu", "rtx4070", "--html", str(file))
        status, page = post(server, "/fit", what=what, gpu="rtx4070", preset="gpt2", keys="batch_size=4")
        assert status == 200
        assert re.sub(r"<nav>.*?</nav>", "", page) == file.read_text()


def test_a_pasted_config_is_read_as_nanogpts(server: Server) -> None:
    pasted = "# mine\r\nbatch_size = 3\r\nblock_size = 2 * 128\r\n"
    status, page = post(server, "/fit", what="estimate", gpu="l4", preset="gpt2-xl", pasted=pasted)
    assert status == 200
    assert "<td>block_size</td><td>256</td><td>set</td>" in page
    assert "nanogpt" in page


def test_a_traceback_is_explained(server: Server) -> None:
    status, page = post(server, "/oom", paste=PASTE, run="n_layer=12 n_embd=768 batch_size=16 block_size=1024")
    assert status == 200
    assert "logits" in page
    assert "What helps" in page and "1.50 GiB" in page


# Refused


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("GET", "/etc/passwd", 404), ("GET", "/../pyproject.toml", 404), ("GET", "/?x=1", 404)),
        *(("POST", "/nowhere", 404), ("GET", "/oom", 405), ("GET", "/fit", 405), ("POST", "/", 405)),
        *(("PUT", "/", 405), ("DELETE", "/oom", 405), ("OPTIONS", "/fit", 405), ("HEAD", "/", 200)),
    ],
)
def test_paths_and_methods(server: Server, method: str, path: str, status: int) -> None:
    got, headers, page = ask(server, method, path, "" if method == "POST" else None)
    assert got == status
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ("Allow" in headers) == (status == 405)
    assert page or method == "HEAD"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil"])
def test_another_hosts_name_is_refused(server: Server, host: str) -> None:
    assert ask(server, "GET", "/", host=host.format(port=server.server_port))[0] == 403
    assert ask(server, "GET", "/", host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize("origin", ["", "null", "https://evil.example", "http://127.0.0.1:1"])
def test_a_form_of_another_page_is_refused(server: Server, origin: str) -> None:
    assert ask(server, "POST", "/oom", "paste=x", origin=origin)[0] == 403


def test_a_long_text_is_refused_and_one_below_the_limit_taken(server: Server) -> None:
    assert ask(server, "POST", "/oom", b"paste=" + b"x" * MAX_BODY_BYTES)[0] == 413
    assert ask(server, "POST", "/oom", b"", content_length="9" * 30)[0] == 413
    status, _, page = ask(server, "POST", "/oom", f"paste={urlencode({'': PASTE})[1:]}{'x' * (MAX_BODY_BYTES - 2000)}")
    assert status == 200 and "1.50 GiB" in page


def test_odd_bodies(server: Server) -> None:
    assert ask(server, "POST", "/oom", "{}", content_type="application/json")[0] == 415
    assert ask(server, "POST", "/oom", "paste=x", content_length="x")[0] == 400
    assert ask(server, "POST", "/oom", b"paste=\xff")[0] == 400
    assert ask(server, "POST", "/oom", "&".join(f"a{i}=" for i in range(99)))[0] == 400
    assert ask(server, "POST", "/oom", "paste=x", transfer_encoding="chunked")[0] == 411


def test_a_text_that_does_not_come_ends_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "body", 0.4)
    started = time.monotonic()
    assert ask(server, "POST", "/oom", "paste=", content_length="1000")[0] == 408
    assert time.monotonic() - started < 5


def test_what_is_no_http(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as one:
        one.sendall(b"\x16\x03\x01 <script>\r\n\r\n")
        got = one.makefile(encoding="utf-8").read()
    assert "The request cannot be read" in got and got.count("<script>") == 1


def test_a_question_that_takes_too_long_is_ended(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "deadline", 0.02)  # less than a process takes to start
    started = time.monotonic()
    status, page = post(server, "/fit", what="plan", gpu="h200", preset="gpt2")
    assert status == 503 and "No answer within" in page
    assert time.monotonic() - started < 8


def test_of_too_many_at_once_some_wait_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(0, at_once=1) as one:
        monkeypatch.setattr(Server, "patience", 0.05)
        assert one.turns.acquire()
        assert one.answer("/oom", {"paste": "x"})[0] == 503
        one.turns.release()
        assert one.answer("/oom", {"paste": PASTE})[0] == 200


# Hostile words


@pytest.mark.parametrize("field", ["paste", "run", "keys", "pasted", "gpu", "preset", "program", "reserve"])
def test_markup_in_a_field_stays_text(field: str) -> None:
    status, page = answer(
        "/oom" if field in ("paste", "run") else "/fit", {"gpu": "l4", "paste": PASTE, field: HOSTILE}
    )
    assert status in (200, 400)
    assert "<img" not in page and "alert(1)</script>" not in page
    assert page.count("<script>") == 1, "the page's own"


def test_a_hostile_paste_comes_back_escaped(server: Server) -> None:
    name = "x <script>alert(1)</script>"
    status, page = post(server, "/oom", paste=f"{PASTE}\n{name}", run=HOSTILE)
    assert status == 400
    assert page.count("<script>") == 1, "the page's own"
    assert "x &lt;script&gt;alert(1)&lt;/script&gt;" in page, "the text is still in its box"


@pytest.mark.parametrize(
    "fields",
    [
        {"preset": "/etc/passwd"},
        {"preset": "../models/gpt2"},
        {"preset": "run.yaml"},
        {"keys": "/etc/passwd"},
        {"keys": "run.yaml"},
        {"keys": "init_from=/etc"},
        {"keys": "init_from=out"},
        {"keys": "--init-from=~/gpt2"},
        {"pasted": "init_from = '/etc'"},
        {"pasted": "exec(open('configurator.py').read())\nexec('batch_size = 1')"},
        {"pasted": "batch_size = open('/etc/passwd').read()"},
        {"gpu": "/etc/passwd"},
        {"gpu": "../profiles/l4"},
    ],
)
def test_a_path_is_no_config(fields: dict[str, str]) -> None:
    status, page = answer("/fit", {"gpu": "l4", "what": "estimate"} | fields)
    assert status == 400
    assert 'role="alert"' in page and "root:" not in page


def test_nothing_of_this_machine_is_read(tmp_path: Any) -> None:
    """By the audit hook of Python itself: every file that is opened for an answer is Python's or gptfit's."""
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    (tmp_path / "gpt2.yaml").write_text("batch_size: 99")
    script = """
import json, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from gptfit.answers import answer
for path, fields in json.loads(sys.argv[1]):
    assert answer(path, fields)[0] == 200, fields
print(json.dumps(opened))
"""
    asked = [
        ("/fit", {"gpu": "l4", "what": "estimate", "keys": "init_from=gpt2 dataset=gpt2/config.json"}),
        ("/fit", {"gpu": "l4", "what": "estimate", "pasted": "init_from = 'gpt2'\ndataset = 'gpt2'"}),
        ("/oom", {"paste": PASTE + "init_from=gpt2 config=gpt2.yaml python train.py gpt2.yaml", "run": "n_layer=3"}),
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, json.dumps(asked)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    opened = json.loads(done.stdout)
    assert any(file.endswith("l4.yaml") for file in opened)
    assert [file for file in opened if file.startswith(str(tmp_path)) or not os.path.isabs(file)] == []


# The command


def test_a_taken_port_is_one_line(server: Server, gptfit: Any) -> None:
    result = gptfit("serve", "--port", str(server.server_port))
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0] == f"error: port {server.server_port} is taken"


def test_it_ends_quietly() -> None:
    main = "from gptfit.cli import main; main(['serve', '--port', '0'])"
    running = subprocess.Popen([sys.executable, "-c", main], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    line = running.stdout.readline()
    port = int(re.findall(r"http://127\.0\.0\.1:(\d+)/", line)[0])
    with socket.create_connection(("127.0.0.1", port), timeout=10):
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=20)
    assert (running.returncode, out, err) == (130, "", "")


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    assert server.socket.getsockname()[0] == serve.ADDRESS == "127.0.0.1"
