"""What every request passes before anything looks at it: key, rate, size; and its end.

The body is read here, whole and within bounds, so that from then on whatever comes from the client
can only be that it hung up: its work is then stopped at once.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from rag.serve.keys import Keys, RateLimit
from rag.serve.metrics import Metrics
from rag.stopping import Stop

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ROUTES = ("/v1/chat/completions", "/v1/answers", "/v1/models", "/health", "/metrics")
_BODY_SECONDS = 30.0
_LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
_HUNG_UP = 499  # in the metrics only: there is nobody to send it to


class _Refused(Exception):
    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}


class _HungUp(Exception):
    pass


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it. What a client sent may stand in the message, and need not be
    text that can be sent back."""
    message = message.encode(errors="replace").decode()
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Gate:
    """ASGI middleware. `scope["state"]` gets `owner` and `stop`."""

    def __init__(
        self, app: App, *, keys: Keys, rate: RateLimit, max_body_bytes: int, metrics: Metrics
    ) -> None:
        self._app = app
        self._keys = keys
        self._rate = rate
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics
        self._stops: set[Stop] = set()

    def stop_all(self) -> None:
        """End what runs."""
        for stop in tuple(self._stops):
            stop.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        route = scope["path"] if scope["path"] in ROUTES else "other"
        state = {"owner": "", "status": _HUNG_UP, "complete": False}

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
            # Before it is sent: the client may be gone as soon as it has it.
            if message["type"] == "http.response.body" and not message.get("more_body"):
                state["complete"] = True
            await send(message)

        stop = Stop()
        self._stops.add(stop)
        try:
            state["owner"] = self._check(scope)
            body = await self._read(scope, receive)
            scope["state"] = {**scope.get("state", {}), "owner": state["owner"], "stop": stop}
            await self._run(scope, body, receive, noting, state)
        except _Refused as refused:
            await _send_error(noting, refused)
        except _HungUp:
            pass
        finally:
            stop.set()
            self._stops.discard(stop)
            status = state["status"] if state["complete"] else _HUNG_UP
            self._metrics.requests.labels(route, state["owner"], status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)

    def _check(self, scope: Scope) -> str:
        """The owner of the request. Raises _Refused."""
        if scope["path"] == "/health":
            return ""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self._keys.digests:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            owner = self._keys.owner(given.strip()) if scheme.lower() == "bearer" else None
            if owner is None:
                raise _Refused(
                    401, "a key is needed: Authorization: Bearer KEY. This one is missing or not known.",
                    {"www-authenticate": "Bearer"},
                )
        else:
            owner = "local"
            # A web page whose name is made to point here could otherwise read one's documents.
            name = headers.get("host", "").rsplit(":", 1)[0] if "host" in headers else ""
            host = headers.get("host", "")
            if name not in _LOCAL_NAMES and host not in _LOCAL_NAMES:
                raise _Refused(403, "without keys this server answers only to 127.0.0.1 and localhost.")
        if scope["method"] == "POST":
            seconds = self._rate.take(owner)
            if seconds:
                raise _Refused(
                    429, f"too many requests with this key. Come back in {math.ceil(seconds)} s.",
                    {"retry-after": str(math.ceil(seconds))},
                )
        return owner

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._max_body_bytes
        refused = _Refused(
            413, f"the request is larger than {limit} bytes. Send less.", {"connection": "close"}
        )
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if int(stated) > limit:  # the server has checked that it is a number
            raise refused
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _HungUp
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise refused
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError as error:
            raise _Refused(
                408, f"the request did not come whole within {_BODY_SECONDS:.0f} s.", {"connection": "close"}
            ) from error

    async def _run(
        self, scope: Scope, body: bytes, receive: Receive, send: Send, state: dict[str, Any]
    ) -> None:
        """The request itself, cancelled as soon as its client hangs up."""
        left = [body]

        async def replay() -> Message:
            if left:
                return {"type": "http.request", "body": left.pop(), "more_body": False}
            await asyncio.Event().wait()  # whoever asks again waits until it is cancelled
            raise AssertionError("nothing sets this event")

        work = asyncio.ensure_future(self._app(scope, replay, send))
        watch = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not state["complete"]:
                scope["state"]["stop"].set()
                work.cancel()
            await asyncio.wait({work})
            if not work.cancelled():
                work.result()
        finally:
            watch.cancel()
            work.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_error(send: Send, refused: _Refused) -> None:
    body = json.dumps(error_body(refused.status, refused.message)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
