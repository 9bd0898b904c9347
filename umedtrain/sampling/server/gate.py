"""What every HTTP request passes before it reaches an endpoint: the key, the size and time limits, the count."""

import asyncio
import hmac
import json
import logging
import re
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from umedtrain.sampling.server.protocol import ApiError, Limits

_LOG = logging.getLogger(__name__)
_LEFT = 499  # nginx's number for a client that did not wait
# Bodies over the limit are still read to this multiple of it, unseen, since clients look for an answer only then.
_DISCARDED = 16


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind it.
        limits: of bodies and of slow clients.
        api_key: asked for everywhere but at /health; None for none.
        hosts: names in the Host header that are let in; None for all. A web page can give this machine a name of its
            own and so reach a server that listens for this machine only.
        answered: called with (path, status, seconds) after every request.

    Attributes:
        open: requests under way.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        api_key: str | None,
        hosts: frozenset[str] | None,
        answered: Callable[[str, int, float], None],
    ) -> None:
        self.app, self.limits, self.hosts, self.answered = app, limits, hosts, answered
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), _LEFT

        async def send_in_time(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            async with asyncio.timeout(self.limits.client_seconds):
                await send(message)

        self.open += 1
        try:
            self._check_host(scope)
            self._check_key(scope)
            body = await self._body(scope, receive)
            if body is not None:
                await self.app(scope, _replay(body, receive), send_in_time)
        except ApiError as error:
            await _refuse(error, send_in_time)
        except TimeoutError:
            # The answer stays unfinished, which tells the client, should it ever read on.
            _LOG.warning("a client did not read its answer for %g seconds", self.limits.client_seconds)
        finally:
            self.open -= 1
            self.answered(scope["path"], status, time.monotonic() - began)

    def _check_host(self, scope: Scope) -> None:
        given = dict(scope["headers"]).get(b"host")
        if self.hosts is None or given is None:
            return
        name = re.sub(r":\d*$", "", given.decode("latin-1")).lower()
        if name not in self.hosts:
            raise ApiError(421, f"this server does not answer as {name!r}; ask for 127.0.0.1, or give it a key")

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] == "/health":
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self._key):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client has left before it was whole."""
        limit, size, pieces = self.limits.body_bytes, 0, []
        too_large = ApiError(413, f"the body must have at most {limit} bytes", code="body_too_large")
        try:
            async with asyncio.timeout(self.limits.client_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    if size <= limit:
                        pieces.append(message.get("body", b""))
                    elif size > _DISCARDED * limit:
                        raise too_large
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            seconds = self.limits.client_seconds
            raise ApiError(408, f"the body did not arrive within {seconds:g} seconds") from None
        if size > limit:
            raise too_large
        return b"".join(pieces)


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))  # what is left of the body is not read
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
