"""The outermost layer. Before the routes it checks access and limits size and time; after them it adds
security headers, metrics and the log.

A request that does work takes a seat before its body is read, so the queue bounds the bodies in memory. When
its time is over or its client disconnects, the request is cancelled with all of its jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from hashlib import sha256
from typing import Any

from blip_fast.serve.http.observing import Observing
from blip_fast.serve.refusals import Refused, busy, draining, internal, timed_out, too_large
from blip_fast.serve.settings import Limits, Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CSP = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
       "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
HEADERS = {"Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff",
           "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
OPEN = ("/v1/info",)  # the only route under /v1/ that needs no key
# After an early response, keep reading and discarding up to DISCARDED × the upload limit, for at most LINGER
# s.
DISCARDED = 4
LINGER = 10.0
GRACE = 2.0  # seconds that a response already under way gets to finish after the time limit
METHODS = ("GET", "HEAD", "POST")
CLIENT_GONE = 499

_log = logging.getLogger("blip_fast.serve")


class House:
    """Counts the pictures and questions in the server (`taken`). While `draining`, it admits no more."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.taken, self.draining = limits, 0, False

    @contextlib.contextmanager
    def seat(self) -> Iterator[Seat]:
        """A seat for one picture or question. Raises Refused (`busy`, `draining`)."""
        if self.draining:
            raise draining()
        seat = Seat(self, asyncio.get_running_loop().time() + self.limits.seconds)
        seat.take(1)
        try:
            yield seat
        finally:
            self.taken -= seat.size


class Seat:
    """A request's places in the house, and its deadline by the event loop's clock."""

    def __init__(self, house: House, deadline: float) -> None:
        self._house, self.deadline, self.size = house, deadline, 0

    def take(self, more: int) -> None:
        """Take more places. Raises Refused (`busy`)."""
        if self._house.taken + more > self._house.limits.queue:
            raise busy()
        self._house.taken += more
        self.size += more


class Guard:
    """The ASGI application around all others. The routes find their seat in `scope["seat"]`."""

    def __init__(self, app: App, settings: Settings, house: House, observing: Observing) -> None:
        self._app, self._settings, self._house, self._observing = app, settings, house, observing
        self._key = None if settings.api_key is None else sha256(settings.api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, asked = time.perf_counter(), scope["method"]
        body = _Body(receive, self._house.limits.upload_bytes, asked == "POST")
        answer = _Answer(send, body)
        if asked == "HEAD":  # the routes answer as for GET, and the HTTP library leaves the body out
            scope = {**scope, "method": "GET"}
        try:
            self._check(scope)
            if _is_guarded(scope):
                await self._work(scope, body, answer)
            else:
                await self._app(scope, receive, answer.send)
        except Refused as refused:
            await answer.refuse(refused)
        except Exception as error:  # log the type only: the message may quote what was sent
            _log.error("%s at a request", type(error).__name__)
            await answer.refuse(internal())
        finally:
            method = asked if asked in METHODS else "other"
            route = getattr(scope.get("route"), "path", "other")
            self._observing.answered(method, route, answer.status or CLIENT_GONE, time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        """Check the host name, the site and the key. Raises Refused."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        names = self._settings.host_names
        if names and _host_name(headers.get(b"host", b"")) not in names:
            raise Refused(403, "wrong_host", "This server answers to names of this machine alone: ask for "
                          f"{names[0]}, or start it with an API key.")
        if not _is_guarded(scope):
            return
        if headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site"):
            raise Refused(403, "other_site", "Pages of other sites may not ask this server: open "
                          "its own page.")
        if self._key is not None:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            digest = sha256(key.strip()).digest()
            if scheme.lower() != b"bearer" or not hmac.compare_digest(digest, self._key):
                raise Refused(401, "unauthorized", "This needs the server's API key: send it as "
                              "Authorization: Bearer KEY.")

    async def _work(self, scope: Scope, body: _Body, answer: _Answer) -> None:
        limits = self._house.limits
        with self._house.seat() as seat:
            scope["seat"] = seat
            body.check_length(scope)
            work = asyncio.ensure_future(self._app(scope, body.receive, answer.send))
            gone = asyncio.ensure_future(body.gone())
            try:
                await asyncio.wait((work, gone), timeout=limits.seconds, return_when=asyncio.FIRST_COMPLETED)
                if answer.status and not gone.done():  # a response is under way: let it finish
                    await asyncio.wait((work, gone), timeout=GRACE, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    return await work
                if not gone.done():
                    raise timed_out(limits.seconds)
            finally:
                work.cancel()
                gone.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)


class _Body:
    """A request's body while it arrives: limits its size, and notices when the client disconnects."""

    def __init__(self, receive: Receive, most: int, is_read: bool) -> None:
        """`is_read`: whether the route reads the body; otherwise it counts as ended."""
        self._receive, self._most, self._size = receive, most, 0
        self._ended, self._left = asyncio.Event(), asyncio.Event()
        if not is_read:
            self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def check_length(self, scope: Scope) -> None:
        """Check the announced length before anything is read. Raises Refused (`too_large`)."""
        lengths = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
        if lengths and lengths[0].isdigit() and int(lengths[0][:20]) > self._most:
            raise too_large(self._most)

    async def receive(self) -> MutableMapping[str, Any]:
        """The next part. Routes never receive the disconnect message: they are cancelled instead. Raises
        Refused (`too_large`)."""
        if not self._ended.is_set():
            message = await self._next()
            if self._size > self._most:
                raise too_large(self._most)
            if not self._left.is_set():
                return message
        return await asyncio.Future()

    async def gone(self) -> None:
        """Return when the client disconnects."""
        await self._ended.wait()
        while not self._left.is_set():
            await self._next()

    async def discard(self) -> None:
        """Read the rest, within limits, and drop it. A client that is still sending when the connection is
        closed may never read the response."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while not self.ended and self._size <= DISCARDED * self._most:
                    await self._next()

    async def _next(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if message["type"] == "http.disconnect":
            self._left.set()
        if not message.get("more_body"):
            self._ended.set()
        return message


class _Answer:
    """Sends the routes' response with the common headers. `status` is None until the response has begun."""

    def __init__(self, send: Send, body: _Body) -> None:
        """`body` is the request's. A response that begins before the body has ended closes the connection."""
        self._send, self._body = send, body
        self.status: int | None = None

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name.lower() for name, _ in message.get("headers", ())}
            added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()
                     if name.lower().encode() not in given]
            if not self._body.ended:
                added.append((b"connection", b"close"))
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        elif not (self._body.ended or message.get("more_body")):
            await self._send({**message, "more_body": True})
            await self._body.discard()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        """Send a refusal as JSON, unless a response has already begun."""
        if self.status is not None:
            return
        body = json.dumps(refused.body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refused.headers()}
        if refused.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        await self.send({"type": "http.response.start", "status": refused.status,
                         "headers": [(name.lower().encode(), value.encode())
                                     for name, value in headers.items()]})
        await self.send({"type": "http.response.body", "body": body})


def _is_guarded(scope: Scope) -> bool:
    """Whether a request does work, and so needs a seat and the key."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))  # as the routes see it
    return path.startswith("/v1/") and path not in OPEN


def _host_name(host: bytes) -> str:
    """The name in a Host header, without the port and without the brackets of an IPv6 address."""
    text = host.decode("latin-1").lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
