"""The page of a home, live in the browser: ask, change, look, commit or discard, undo.

A thin web face of ``session.Session`` (starlette on uvicorn, the extra ``serve``). Who may use it
is decided in one place, ``Guard``, before anything else runs:

- the address printed at the start carries a key; the browser keeps it as a strict same-site cookie;
- the ``Host`` has to be this machine by a name nobody else can point here (against DNS rebinding);
- whatever changes or asks is a POST of JSON from the page itself: same ``Origin``, and a token that
  only the page was given. Key and token are made when the process begins and end with it.

The page may run one script and one style sheet, named by a nonce, and reach nothing but its server;
what models and files say gets into it as text only.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import json
import logging
import re
import secrets
import socket
import webbrowser
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import uvicorn
from jinja2 import Environment, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unwrite import methods
from unwrite.edits import Edit
from unwrite.errors import BadEdits, BadSetting, HomeBusy, UnwriteError
from unwrite.home_report import render
from unwrite.page import plain
from unwrite.session import Order, Session

PORT = 8642
BODY = 256 * 1024  # bytes of a request that are read
EDITS = 100  # of one update by the form; files of edits are for the command line
TOKENS = 256  # of an answer
PATIENCE = 3  # seconds that open requests get at the end

_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
}


def serve(
    home: Path,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    expose: bool = False,
    open_browser: bool = False,
    trust_remote_code: bool = False,
    command: str = "unwrite serve",
    on_ready: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Serve a home until Ctrl-C or SIGTERM; what is going on then is stopped, and the home stays as
    it was last committed.

    ``host`` other than this machine alone needs ``expose``. ``port`` 0 takes any free one.
    ``on_ready`` gets the address, with its key, when connections are accepted. Raises
    ``BadSetting`` for an address that cannot be used, and like ``Home.open``.
    """
    local = is_loopback(host)
    if not local and not expose:
        raise BadSetting(
            f"--host {host} lets other machines in, who could then change the model. Add --expose "
            "if that is meant; better keep 127.0.0.1 and come through 'ssh -L'."
        )
    with _bound(host, port) as listening:
        port = listening.getsockname()[1]
        session = Session(home, trust_remote_code=trust_remote_code, command=command)
        key = secrets.token_urlsafe(24)
        app = application(session, key, names=() if local else (host, socket.gethostname()))
        config = uvicorn.Config(
            app,
            log_level=logging.WARNING,
            access_log=False,  # it would show the key
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=PATIENCE,
        )
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{port}/?key={key}"
        if not local:
            say(
                "Other machines can reach this page, and what passes is not encrypted: whoever "
                "reads the address with its key on the way can change the model."
            )
        on_ready(address)
        if open_browser:
            webbrowser.open(address)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn ends orderly first, and raises the signal again then
            say("The server has ended.")
        finally:
            if not session.close(timeout=1):
                say("Stopping the work that is going on; nothing of it is kept.")
                session.close()


def is_loopback(host: str) -> bool:
    """Whether an address reaches nobody but this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def application(
    session: Session, key: str, *, token: str | None = None, names: tuple[str, ...] = ()
) -> Guard:
    """The ASGI application. ``key`` opens the page, ``token`` (default: a new one) is what the page
    shows with every POST. ``names``: what the machine may be called from outside; with none, it
    answers to loopback names only."""
    token = token or secrets.token_urlsafe(24)
    face = _Face(session, key, token)
    inner = Starlette(
        routes=[
            Route("/", face.page),
            Route("/report", face.report),
            Route("/state", face.state),
            Route("/favicon.ico", face.icon),
            Route("/ask", face.ask, methods=["POST"]),
            Route("/plan", face.plan, methods=["POST"]),
            Route("/update", face.update, methods=["POST"]),
            Route("/decide", face.decide, methods=["POST"]),
            Route("/stop", face.stop, methods=["POST"]),
            Route("/undo", face.undo, methods=["POST"]),
            Route("/redo", face.redo, methods=["POST"]),
            Route("/verify", face.verify, methods=["POST"]),
        ],
        exception_handlers={
            UnwriteError: _refused,
            HTTPException: _http_fault,
            Exception: _bug,
        },
        max_body_size=BODY,
    )
    return Guard(inner, key, token, names)


class Guard:
    """ASGI middleware: refuses with 403 whoever is not the page of this process, and gives every
    answer its security headers."""

    def __init__(self, app: ASGIApp, key: str, token: str, names: tuple[str, ...]) -> None:
        self.app, self.key, self.token = app, key, token
        self.names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # uvicorn is told to do without the others

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        request = Request(scope)
        if fault := self.fault(request):
            await _answer({"error": fault}, 403)(scope, receive, sending)
        else:
            await self.app(scope, receive, sending)

    def fault(self, request: Request) -> str | None:
        """Why a request is refused, or None."""
        headers = request.headers
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._is_here(host):
            return "This server answers only to the address that 'unwrite serve' printed."
        given = request.cookies.get(_cookie(self.key), "")
        if request.url.path == "/" and request.method == "GET":
            given = request.query_params.get("key", given)
        if not _same(given, self.key):
            return "Open the whole address, with its key, that 'unwrite serve' printed."
        if request.method in ("GET", "HEAD"):
            return None
        if headers.get("origin") != f"http://{host}":
            return "Only the page itself may do that: the request came from elsewhere."
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return "Only the page itself may do that: the request came from another site."
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return "Requests are JSON."
        if not _same(headers.get("x-unwrite-token", ""), self.token):
            return "This page is of an earlier server: open the address printed by the new one."
        return None

    def _is_here(self, host: str) -> bool:
        """No name from the DNS but our own: a number cannot be pointed elsewhere."""
        name = re.sub(r":\d{1,5}$", "", host).lower()  # of [::1] too: it ends with a bracket
        if name == "localhost" or name in self.names:
            return True
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
            return address.is_loopback or bool(self.names)
        return False


class _Face:
    """The routes: each reads its request, calls the session, and says what came back."""

    def __init__(self, session: Session, key: str, token: str) -> None:
        self.session, self.key, self.token = session, key, token
        environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=plain)
        source = resources.files("unwrite").joinpath("serve.html.jinja").read_text("utf-8")
        self._template = environment.from_string(source)
        self._methods = [methods.describe(name) for name in methods.method_names()]

    def page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        text = self._template.render(
            name=self.session.home.folder.resolve().name,
            base=self.session.home.base,
            methods=self._methods,
            default=methods.DEFAULT,
            token=self.token,
            nonce=nonce,
            edits=EDITS,
            tokens=TOKENS,
        )
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; frame-src 'self'; img-src 'self'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'"
        )
        response = HTMLResponse(text, headers={"content-security-policy": policy})
        response.set_cookie(_cookie(self.key), self.key, httponly=True, samesite="strict")
        return response

    def report(self, request: Request) -> Response:
        # The report names its style and script by hash in a policy of its own; both policies hold.
        policy = (
            "frame-ancestors 'self'; base-uri 'none'; form-action 'none'; connect-src 'none'; "
            "img-src 'none'; object-src 'none'"
        )
        try:
            text = render(self.session.home.folder)
        except UnwriteError as error:
            return PlainTextResponse(
                plain(str(error)), 500, headers={"content-security-policy": policy}
            )
        return HTMLResponse(text, headers={"content-security-policy": policy})

    def state(self, request: Request) -> Response:
        return _answer(self.session.state())

    def icon(self, request: Request) -> Response:
        return Response(status_code=204)

    async def ask(self, request: Request) -> Response:
        body = await _body(request, "prompt", "update", "max_new_tokens")
        tokens = body.get("max_new_tokens", 32)
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 < tokens <= TOKENS:
            raise BadSetting(f"max_new_tokens is a whole number from 1 to {TOKENS}.")
        future = self.session.ask(_text(body, "prompt"), _text(body, "update") or None, tokens)
        return _answer({"answers": await asyncio.wrap_future(future)})

    async def plan(self, request: Request) -> Response:
        order = await _order(request)
        return _answer(await asyncio.wrap_future(self.session.plan(order)))

    async def update(self, request: Request) -> Response:
        order = await _order(request)
        return _answer({"job": self.session.update(order).number}, 202)

    async def decide(self, request: Request) -> Response:
        body = await _body(request, "job", "commit")
        if not isinstance(body.get("commit"), bool):
            raise BadSetting("commit is true or false.")
        self.session.decide(_number(body), body["commit"])
        return _answer({"job": body["job"]}, 202)

    async def stop(self, request: Request) -> Response:
        body = await _body(request, "job")
        self.session.stop(_number(body))
        return _answer({"job": body["job"]}, 202)

    async def undo(self, request: Request) -> Response:
        body = await _body(request, "id", "why")
        return _answer(
            {"job": self.session.undo(_text(body, "id"), _text(body, "why")).number}, 202
        )

    async def redo(self, request: Request) -> Response:
        body = await _body(request, "id")
        return _answer({"job": self.session.redo(_text(body, "id")).number}, 202)

    async def verify(self, request: Request) -> Response:
        await _body(request)
        return _answer({"job": self.session.verify().number}, 202)


# Reading requests ---------------------------------------------------------------------------------


async def _body(request: Request, *allowed: str) -> dict[str, Any]:
    """The JSON object of a request, with no keys but these."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise BadSetting("The request is not JSON.") from None
    if not isinstance(body, dict):
        raise BadSetting("The request is not a JSON object.")
    if unknown := sorted(body.keys() - set(allowed)):
        raise BadSetting(f"The request has {plain(unknown[0], 80)!r}, which means nothing here.")
    return body


def _text(body: Mapping[str, Any], key: str) -> str:
    value = body.get(key, "")
    if not isinstance(value, str):
        raise BadSetting(f"{key} is not a text.")
    return value


def _texts(body: Mapping[str, Any], key: str) -> list[str]:
    value = body.get(key, [])
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise BadSetting(f"{key} is not a list of texts.")
    return value


def _number(body: Mapping[str, Any]) -> int:
    value = body.get("job")
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadSetting("job is the number of a job.")
    return value


async def _order(request: Request) -> Order:
    body = await _body(request, "edits", "method", "settings", "require", "protect", "why")
    given = body.get("edits")
    if not isinstance(given, list) or not 0 < len(given) <= EDITS:
        raise BadEdits(
            f"An update by this page has 1 to {EDITS} facts; 'unwrite update' reads files of more."
        )
    settings = {}
    for line in _texts(body, "settings"):
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise BadSetting(f"A setting is KEY=VALUE, not {plain(line, 80)!r}.")
        settings[key.strip()] = value.strip()
    # Classes of methods are imported and checked here: that may take a moment, so not in the loop.
    method = await run_in_threadpool(
        methods.build, _text(body, "method") or methods.DEFAULT, settings
    )
    return Order(
        edits=[_edit(one, number) for number, one in enumerate(given, start=1)],
        method=method,
        require=_texts(body, "require"),
        protect=_texts(body, "protect"),
        why=_text(body, "why"),
    )


def _edit(given: Any, number: int) -> Edit:
    fields = ("prompt", "new", "old", "subject", "paraphrases", "bystanders")
    if not isinstance(given, dict) or given.keys() - set(fields):
        raise BadEdits(f"Fact {number} is an object with the keys {', '.join(fields)}.")
    try:
        return Edit(
            _text(given, "prompt"),
            _text(given, "new"),
            old=_text(given, "old") or None,
            subject=_text(given, "subject") or None,
            paraphrases=_texts(given, "paraphrases"),
            bystanders=_texts(given, "bystanders"),
        )
    except UnwriteError as error:
        raise BadEdits(f"Fact {number}: {error}") from None


# Answering ----------------------------------------------------------------------------------------


def _answer(value: Any, status: int = 200) -> Response:
    """JSON in ASCII: any text a model may say can be written that way."""
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")


def _refused(_request: Request, error: Exception) -> Response:
    status = 409 if isinstance(error, HomeBusy) else 400
    return _answer({"error": plain(str(error))}, status)


def _http_fault(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _answer({"error": error.detail}, error.status_code)


def _bug(_request: Request, _error: Exception) -> Response:
    sentence = "That failed by a bug; the terminal of the server says more."
    return _answer({"error": sentence}, 500)


def _cookie(key: str) -> str:
    """A name of its own for each server: cookies do not know ports."""
    return f"unwrite-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _same(given: str, secret: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "replace"), secret.encode("utf-8"))


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadSetting(
            f"Port {port} of {host} cannot be used ({reason}): name another with --port, or 0 for "
            "any free one."
        ) from None
