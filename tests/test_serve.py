"""The live page: every route, who is let in, what hostile text does, and a real server and browser.

Needs the extra ``serve``; the last part a Chromium of the machine and playwright besides.
"""

from __future__ import annotations

import builtins
import html.parser
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from typer.testing import CliRunner

import unwrite
from unwrite.errors import BadSetting
from unwrite.files import only_writer

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("httpx2", reason="starlette's test client needs httpx2")

from starlette.testclient import TestClient

from unwrite.serve import BODY, EDITS, TOKENS, application, is_loopback, serve
from unwrite.session import Session

KEY, TOKEN = "a-key", "a-token"
HERE = "http://127.0.0.1:8642"
HOSTILE = "<script>alert(1)</script>\"'&\u202e\x1b[31m<img src=http://x.test/a onerror=b>"
VISIBLE = "<script>alert(1)</script>\"'&[U+202E][U+001B][31m<img src=http://x.test/a onerror=b>"
QUICK = {"method": "full-ft", "settings": ["lr=2e-3", "epochs=60"]}
POSTS = ("/ask", "/plan", "/update", "/decide", "/stop", "/undo", "/redo", "/verify")
GETS = ("/", "/report", "/state", "/favicon.ico")


@pytest.fixture(scope="module")
def made(worlds, tmp_path_factory):
    """A home with one update; tests copy it."""
    home = unwrite.open(tmp_path_factory.mktemp("made") / "home", base=worlds().folder)
    home.update(worlds().edits[:2], unwrite.FullFT(lr=2e-3, epochs=60), why=HOSTILE)
    return home


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def session(folder):
    session = Session(folder)
    yield session
    assert session.close(timeout=60)


@pytest.fixture
def stranger(session):
    """A client that has not been given the key."""
    return TestClient(application(session, KEY, token=TOKEN), base_url=HERE)


@pytest.fixture
def client(stranger):
    assert stranger.get(f"/?key={KEY}").status_code == 200
    stranger.headers |= {"origin": HERE, "x-unwrite-token": TOKEN}
    return stranger


@pytest.fixture
def edit(worlds):
    """A fact that the home does not have yet, as the form sends it."""
    one = worlds().edits[10]
    return {
        "prompt": one.prompt,
        "new": one.new,
        "old": one.old,
        "subject": one.subject,
        "paraphrases": list(one.paraphrases),
        "bystanders": [probe.prompt for probe in one.bystanders],
    }


def until(client, *states):
    """The job, when it is in one of these states."""
    give_up = time.monotonic() + 120
    while True:
        job = client.get("/state").json()["job"]
        if job["state"] in states:
            return job
        assert time.monotonic() < give_up, job
        time.sleep(0.01)


def post(client, path, body=None, status=202):
    response = client.post(path, json={} if body is None else body)
    assert response.status_code == status, response.text
    return response.json()


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


# ---- the routes ----------------------------------------------------------------------------------


def test_the_page_may_run_its_own_script_and_nothing_else(client):
    first, second = client.get("/"), client.get("/")
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in first.headers["content-security-policy"].split(";")
    )
    nonce = policy["script-src"]
    assert policy == {
        "default-src": "'none'",
        "script-src": nonce,
        "style-src": nonce,
        "connect-src": "'self'",
        "frame-src": "'self'",
        "img-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    tags = Tags(first.text).tags
    for tag, attributes in tags:
        if tag in ("script", "style"):
            assert f"'nonce-{attributes['nonce']}'" == nonce
        assert not {"style", "onclick", "onload", "srcset", "action"} & attributes.keys()
        assert attributes.get("src", "/report") == "/report"
        assert attributes.get("href", "/report") == "/report"
    assert {"meta", "script", "style", "iframe", "form"} <= {tag for tag, _ in tags}
    assert nonce not in second.headers["content-security-policy"], "a nonce is used once"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", first.text)
    assert "https://" not in first.text.replace("https://x.test", "")


def test_every_answer_is_guarded_by_its_headers(client):
    answers = [client.get(path) for path in GETS] + [client.post(path) for path in POSTS]
    answers += [client.get("/nothing"), client.get("/ask")]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors" in answer.headers["content-security-policy"]
    assert [one.status_code for one in answers[-2:]] == [404, 405]


def test_the_report_keeps_its_own_policy(client):
    answer = client.get("/report")
    assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]
    assert "script-src 'sha256-" in answer.text
    assert "1 update, 1 live" in answer.text


def test_a_home_that_cannot_be_reported_says_why(client, folder):
    next((folder / "updates").glob("*/scores.json")).write_text("{}")
    answer = client.get("/report")
    assert answer.status_code == 500
    assert "is not as it was written" in answer.text
    post(client, "/verify")
    assert until(client, "done")["result"]["problems"]


def test_asking_side_by_side(client, worlds):
    edit = worlds().edits[0]
    (update,) = client.get("/state").json()["updates"]
    assert post(client, "/ask", {"prompt": edit.prompt}, 200) == {
        "answers": [{"label": "Now", "text": edit.new}]
    }
    answers = post(client, "/ask", {"prompt": edit.prompt, "update": update["id"]}, 200)["answers"]
    assert [one["text"] for one in answers] == [edit.old, edit.new]


def test_plan_update_commit_undo_redo_to_the_bit(client, edit, folder, snapshot):
    before, start = snapshot(folder), client.get("/state").json()
    order = {"edits": [edit], **QUICK, "why": "said so", "require": ["reliability>=1"]}
    assert post(client, "/plan", order, 200)["rows"][1] == ["method", "full-ft"]
    assert snapshot(folder) == before

    number = post(client, "/update", order)["job"]
    job = until(client, "waiting", "failed")
    assert job["state"] == "waiting", job
    asked = {"prompt": edit["prompt"], "update": job["result"]["id"]}
    answers = post(client, "/ask", asked, 200)["answers"]
    assert [one["text"] for one in answers] == [edit["old"], edit["new"]]
    assert client.get("/state").json()["head"] == start["head"]
    post(client, "/decide", {"job": number, "commit": True})
    assert until(client, "done", "failed")["error"] is None
    done = client.get("/state").json()
    assert done["updates"][0]["why"] == "said so"
    assert done["fingerprint"] != start["fingerprint"]
    assert "2 updates, 2 live" in client.get("/report").text

    update = {"id": job["result"]["id"]}
    post(client, "/undo", update)
    until(client, "done", "failed")
    assert client.get("/state").json()["fingerprint"] == start["fingerprint"]
    post(client, "/redo", update)
    until(client, "done", "failed")
    assert client.get("/state").json()["fingerprint"] == done["fingerprint"]
    post(client, "/verify")
    assert until(client, "done", "failed")["result"] == {"problems": []}
    assert unwrite.open(folder).verify() == []


@pytest.mark.parametrize("path", ["/decide", "/stop"])
def test_discarded_to_the_bit(client, edit, folder, snapshot, path):
    before = snapshot(folder)
    number = post(client, "/update", {"edits": [edit], **QUICK})["job"]
    until(client, "waiting")
    post(client, path, {"job": number} | ({"commit": False} if path == "/decide" else {}))
    assert "discarded" in until(client, "dropped", "failed", "done")["error"]
    assert snapshot(folder) == before
    assert "over" in post(client, "/decide", {"job": number, "commit": True}, 400)["error"]


def test_one_writer_at_a_time(client, edit, folder, snapshot):
    before = snapshot(folder)
    order = {"edits": [edit], **QUICK}
    with only_writer(folder):
        post(client, "/update", order)
        assert "Another process is changing" in until(client, "failed", "waiting")["error"]
    assert snapshot(folder) == before
    number = post(client, "/update", order)["job"]
    until(client, "waiting")
    for path, body in (("/update", order), ("/undo", {"id": "u-1"}), ("/verify", {})):
        assert "not finished" in post(client, path, body, 409)["error"]
    post(client, "/decide", {"job": number, "commit": False})
    until(client, "dropped")
    assert snapshot(folder) == before


# ---- who is let in -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "attack",
    [
        {"x-unwrite-token": None},
        {"x-unwrite-token": "another"},
        {"x-unwrite-token": KEY},
        {"x-unwrite-token": "\xff".encode("latin-1")},
        {"origin": None},
        {"origin": "null"},
        {"origin": "http://evil.test"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "https://127.0.0.1:8642"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"cookie": "unwrite-00000000=a-key"},
        {"host": "evil.test:8642", "origin": "http://evil.test:8642"},
    ],
    ids=lambda attack: "-".join(f"{key}={value}" for key, value in attack.items()),
)
def test_nobody_else_makes_the_page_act(client, folder, snapshot, path, attack):
    before = snapshot(folder)
    if "cookie" in attack:
        client.cookies.clear()
    headers = {"content-type": "application/json"} | attack
    for name in [name for name, value in headers.items() if value is None]:
        del headers[name]
        del client.headers[name]
    (update,) = unwrite.open(folder).ledger.live()
    body = {"id": update} if path in ("/undo", "/redo") else {}
    answer = client.post(path, content=json.dumps(body), headers=headers)
    assert answer.status_code == 403
    assert set(answer.json()) == {"error"}
    assert snapshot(folder) == before


def test_an_attack_without_its_fault_would_work(client, folder):
    """The test above fails where it should: the same request, honest, is carried out."""
    (update,) = unwrite.open(folder).ledger.live()
    headers = {"content-type": "application/json; charset=utf-8", "sec-fetch-site": "same-origin"}
    answer = client.post("/undo", content=json.dumps({"id": update}), headers=headers)
    assert answer.status_code == 202
    until(client, "done")
    assert unwrite.open(folder).ledger.live() == []


@pytest.mark.parametrize("path", GETS)
def test_without_the_key_nothing_is_shown(stranger, path):
    for query in ("", "?key=", "?key=b-key", f"?token={TOKEN}"):
        answer = stranger.get(path + query)
        assert answer.status_code == 403
        assert TOKEN not in answer.text and "home" not in answer.text.lower()
        assert "set-cookie" not in answer.headers


def test_the_key_becomes_a_strict_cookie(stranger):
    cookie = stranger.get(f"/?key={KEY}").headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "domain" not in cookie
    assert stranger.get("/state").status_code == 200
    assert stranger.get("/state?key=wrong").status_code == 200, "the key is read by the page only"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1:8642", 200),
        ("127.0.0.1", 200),
        ("localhost:8642", 200),
        ("LOCALHOST", 200),
        ("127.8.8.8:1", 200),
        ("[::1]:8642", 200),
        ("[::1]", 200),
        ("evil.test", 403),
        ("evil.test:8642", 403),
        ("127.0.0.1.evil.test", 403),
        ("localhost.evil.test:8642", 403),
        ("192.168.0.7:8642", 403),
        ("[2001:db8::1]:8642", 403),
        ("0.0.0.0:8642", 403),
        ("127.0.0.1:8642:evil.test", 403),
        ("127.0.0.1:evil", 403),
        ("me@127.0.0.1", 403),
        ("", 403),
    ],
)
def test_foreign_hosts_are_refused(client, host, expected):
    for path in GETS[:3]:
        answer = client.get(f"{path}?key={KEY}", headers={"host": host, "cookie": cookie(client)})
        assert answer.status_code == expected, path


def cookie(client):
    return "; ".join(f"{one.name}={one.value}" for one in client.cookies.jar)


def test_an_exposed_page_answers_to_its_names_and_to_numbers(session):
    app = application(session, KEY, token=TOKEN, names=("box.lan",))
    for host, expected in (
        ("box.lan:8642", 200),
        ("BOX.lan", 200),
        ("192.168.0.7:8642", 200),
        ("localhost:8642", 200),
        ("evil.test:8642", 403),
    ):
        client = TestClient(app, base_url=f"http://{host}")
        assert client.get(f"/?key={KEY}").status_code == expected, host


# ---- what is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/ask", [], "not a JSON object"),
        ("/ask", {}, "prompt is empty"),
        ("/ask", {"prompt": 7}, "prompt is not a text"),
        ("/ask", {"prompt": "x", "other": 1}, "'other', which means nothing"),
        ("/ask", {"prompt": "x", "update": "u-00000000"}, "no update"),
        ("/ask", {"prompt": "x", "update": "../../etc"}, "no update"),
        ("/ask", {"prompt": "x", "max_new_tokens": TOKENS + 1}, "whole number"),
        ("/ask", {"prompt": "x", "max_new_tokens": True}, "whole number"),
        ("/ask", {"prompt": "x", "max_new_tokens": 1.5}, "whole number"),
        ("/plan", {}, f"1 to {EDITS} facts"),
        ("/plan", {"edits": [{}] * (EDITS + 1)}, f"1 to {EDITS} facts"),
        ("/plan", {"edits": [7]}, "Fact 1 is an object"),
        ("/plan", {"edits": [{"prompt": "a"}]}, "Fact 1: `new`"),
        ("/plan", {"edits": [{"prompt": "a", "new": "b", "id": "c"}]}, "Fact 1 is an object"),
        ("/plan", {"edits": [{"prompt": "a", "new": "b", "old": "b"}]}, "Fact 1"),
        ("/plan", {"edits": [{"prompt": "a", "new": "b", "paraphrases": "c"}]}, "list of texts"),
        ("/update", {"edits": [{"prompt": "a", "new": "b"}], "method": "magic"}, "no method"),
        ("/update", {"edits": [{"prompt": "a", "new": "b"}], "settings": ["x"]}, "KEY=VALUE"),
        ("/update", {"edits": [{"prompt": "a", "new": "b"}], "settings": ["x=1"]}, "no field"),
        ("/update", {"edits": [{"prompt": "a", "new": "b"}], "require": ["x"]}, "cannot be read"),
        ("/decide", {"job": 1, "commit": "yes"}, "true or false"),
        ("/decide", {"job": "1", "commit": True}, "number of a job"),
        ("/decide", {"job": 1, "commit": True}, "over"),
        ("/stop", {"job": True}, "number of a job"),
        ("/undo", {"id": ["u"]}, "not a text"),
        ("/verify", {"x": 1}, "means nothing"),
    ],
)
def test_what_cannot_be_done_is_said(client, folder, snapshot, path, body, says):
    before = snapshot(folder)
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]
    assert snapshot(folder) == before
    assert client.get("/state").json()["job"] is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"prompt": NaN'],
    ids=["empty", "cut", "bytes", "deep", "nan"],
)
def test_what_is_not_json_is_refused(client, content):
    answer = client.post("/ask", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]


def test_a_body_has_a_limit(client):
    def chunks():
        yield b'{"prompt": "'
        for _ in range(BODY // 1000 + 1):
            yield b"a" * 1000

    for content in (b'{"prompt": "' + b"a" * BODY, chunks()):
        answer = client.post("/ask", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413


def test_text_that_is_no_text_is_refused(client, edit):
    content = b'{"prompt": "\\ud800"}'
    answer = client.post("/ask", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "Unicode" in answer.json()["error"]


def test_hostile_text_is_text(client, edit):
    """In the ledger, in the method's name, in a question, in an error: it stays text."""
    state = client.get("/state")
    assert state.headers["content-type"] == "application/json"
    assert state.json()["updates"][0]["why"] == VISIBLE
    assert state.text.isascii() and "\x1b" not in state.text
    tags = [tag for tag, _ in Tags(client.get("/report").text).tags]
    assert "img" not in tags and tags.count("script") == 1
    answers = post(client, "/ask", {"prompt": HOSTILE}, 200)["answers"]
    assert all(one["text"].isprintable() for one in answers)
    order = {"edits": [edit], "method": HOSTILE}
    refused = client.post("/update", json=order)
    assert refused.headers["content-type"] == "application/json"
    assert refused.json()["error"].isprintable()


def test_a_hostile_name_of_a_home_is_text(made, tmp_path):
    name = "<script>alert(1)<"
    shutil.copytree(made.folder, tmp_path / name)
    session = Session(tmp_path / name)
    try:
        client = TestClient(application(session, KEY, token=TOKEN), base_url=HERE)
        text = client.get(f"/?key={KEY}").text
    finally:
        session.close()
    assert "&lt;script&gt;alert(1)&lt;" in text
    assert name not in text


def test_a_bug_is_an_answer_too(session, monkeypatch):
    monkeypatch.setattr(session, "state", lambda: 1 / 0)
    app = application(session, KEY, token=TOKEN)
    client = TestClient(app, base_url=HERE, raise_server_exceptions=False)
    client.get(f"/?key={KEY}")
    answer = client.get("/state")
    assert answer.status_code == 500
    assert "by a bug" in answer.json()["error"]
    assert "division" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(folder, monkeypatch, missing):
    from unwrite.cli import app

    real = builtins.__import__

    def without(name, *arguments, **named):
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *arguments, **named)

    monkeypatch.delitem(sys.modules, "unwrite.serve")
    monkeypatch.delattr(unwrite, "serve")
    monkeypatch.setattr(builtins, "__import__", without)
    done = CliRunner().invoke(app, ["serve", str(folder)])
    assert done.exit_code == 2
    assert "pip install 'unwrite[serve]'" in done.output


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.7", False),
        ("localhost.evil.test", False),
        ("", False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected


def test_other_machines_need_a_flag(folder):
    with pytest.raises(BadSetting, match="--expose"):
        serve(folder, host="0.0.0.0", port=0, on_ready=pytest.fail, say=pytest.fail)


def test_a_port_that_is_taken(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadSetting, match=f"Port {port} .*--port"):
            serve(folder, port=port, on_ready=pytest.fail, say=pytest.fail)


class Server:
    """A real ``unwrite serve`` and a client of its own: no test client, no shared memory."""

    def __init__(self, folder, *options):
        words = [sys.executable, "-m", "unwrite", "serve", str(folder), "--port", "0", "--json"]
        self.process = subprocess.Popen(
            [*words, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.address = json.loads(line)["address"]
        self.origin = self.address.partition("/?")[0]
        with urllib.request.urlopen(self.address, timeout=60) as page:
            self.cookie = page.headers["set-cookie"].partition(";")[0]
            self.token = re.search(r'unwrite-token" content="([^"]+)"', page.read().decode())[1]

    def call(self, path, body=None, **headers):
        headers = {"cookie": self.cookie, "x-unwrite-token": self.token} | headers
        data = None
        if body is not None:
            headers = {"origin": self.origin, "content-type": "application/json"} | headers
            data = json.dumps(body).encode()
        request = urllib.request.Request(self.origin + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def wait(self, *states):
        give_up = time.monotonic() + 120
        while (job := self.call("/state")["job"])["state"] not in states:
            assert time.monotonic() < give_up, job
            time.sleep(0.02)
        return job

    def end(self, number: int = signal.SIGINT):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out + err


def test_a_real_server_ends_cleanly_in_the_middle(folder, edit, snapshot):
    before = snapshot(folder)
    server = Server(folder)
    try:
        assert server.call("/ask", {"prompt": edit["prompt"]})["answers"][0]["text"] == edit["old"]
        with pytest.raises(urllib.error.HTTPError, match="403") as refused:
            server.call("/verify", {}, origin="http://evil.test")
        refused.value.close()
        server.call("/update", {"edits": [edit], **QUICK})
        assert server.wait("waiting", "failed")["state"] == "waiting"
        code, said = server.end()
    finally:
        server.process.kill()
    assert code == 0, said
    assert "Traceback" not in said
    assert snapshot(folder) == before
    with only_writer(folder):
        assert unwrite.open(folder).verify() == []


# ---- in a browser --------------------------------------------------------------------------------


def test_the_whole_story_in_a_browser(page, folder, edit, artefacts):
    server = Server(folder)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(server.address)
        assert page.url == server.origin + "/", "the key is gone from the address bar"
        page.wait_for_selector("#updates tr")
        fingerprint = page.inner_text("#fingerprint")
        assert VISIBLE in page.inner_text("#updates")

        page.fill("#ask [name=prompt]", edit["prompt"])
        page.click("#ask button")
        page.wait_for_selector(".answer")
        assert page.inner_text("#answers").split("\n") == ["Now", edit["old"]]

        assert page.is_disabled("#train"), "a plan comes first"
        for name in ("prompt", "new", "old"):
            page.fill(f"#change [name={name}]", edit[name])
        page.click("text=Subject, paraphrases, bystanders")
        page.fill("#change [name=bystanders]", "\n".join(edit["bystanders"]))
        page.click("text=Settings, requirements, reason")
        page.fill("#change [name=settings]", "\n".join(QUICK["settings"]))
        page.fill("#change [name=why]", HOSTILE.replace("\x1b", ""))
        page.click("button:text-is('Plan')")
        page.wait_for_selector("#planned table")
        page.fill("#change [name=new]", edit["new"] + "x")
        assert page.is_disabled("#train"), "another plan is needed"
        page.fill("#change [name=new]", edit["new"])

        page.click("button:text-is('Plan')")
        page.click("#train:enabled")
        page.wait_for_selector("#job[data-state=waiting]")
        page.click("#choices button:text-is('Discard')")
        page.wait_for_selector("#job[data-state=dropped]")
        assert page.inner_text("#fingerprint") == fingerprint

        page.click("button:text-is('Plan')")
        page.click("#train:enabled")
        page.wait_for_selector("#job[data-state=waiting]")
        assert "✓ right" in page.inner_text("#outcome")
        page.click("#ask button")
        page.wait_for_selector("text=With this change")
        said = page.inner_text("#answers").split("\n")
        assert said == ["Now", edit["old"], "With this change", edit["new"]]
        page.screenshot(path=artefacts / "serve-waiting.png", full_page=True)
        page.click("#choices button:text-is('Commit')")
        page.wait_for_selector("#job[data-state=done]")
        page.wait_for_selector("#updates tr:nth-child(2)")
        committed = page.inner_text("#fingerprint")
        assert committed != fingerprint
        report = page.frame_locator("#report")
        report.locator("h1:has-text('2 updates, 2 live')").wait_for()

        page.click("#updates tr:first-child button:text-is('Undo')")
        page.wait_for_selector("#updates tr:first-child button:text-is('Redo'):enabled")
        assert page.inner_text("#fingerprint") == fingerprint
        page.click("#updates tr:first-child button:text-is('Redo')")
        page.wait_for_selector("#updates tr:nth-child(3)")
        page.wait_for_selector("#job[data-state=done]")
        assert page.inner_text("#fingerprint") == committed
        page.click("#verify")
        page.wait_for_selector("text=Sound: history, files, tensors")

        page.set_viewport_size({"width": 380, "height": 800})
        width = page.evaluate("() => document.documentElement.scrollWidth")
        assert width <= 380, "nothing sticks out on a phone"
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=artefacts / "serve-phone-dark.png", full_page=True)

        assert server.end(signal.SIGTERM)[0] == 0
        page.click("#ask button")
        page.wait_for_selector("#ask-fault:has-text('does not answer')")
    finally:
        server.process.kill()
    assert all(url.startswith(server.origin + "/") for url in asked)
    assert [fault for fault in page.faults if "ERR_CONNECTION_REFUSED" not in fault] == []
    assert unwrite.open(folder).verify() == []
