"""The server's process: a socket, signals, and an end that waits for answers under way."""

import asyncio
import contextlib
import ipaddress
import math
import signal
import socket
import time
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from umedtrain.sampling.sampler import Sampler
from umedtrain.sampling.server.app import build_app
from umedtrain.sampling.server.protocol import Limits

_OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")  # as a Host header writes them


class _Connection(H11Protocol):
    """Closed when no whole head of a request arrives within `seconds`; what follows the head, `Gate` times."""

    seconds: float

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._patience = self.loop.call_later(self.seconds, self._give_up)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._patience.cancel()
        self._patience = self.loop.call_later(self.seconds, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self.transport.close()


class Server(uvicorn.Server):
    """Serves one model until it is told to end.

    SIGTERM or SIGINT ends it: new requests are refused with 503 at once, those under way have `drain_seconds` to
    finish, and what is left then is ended with an error. A second signal does not wait.

    Args:
        sampler: with a tokenizer.
        name: of the model, for clients.
        host, port: where to listen; port 0 takes a free one.
        limits: on requests.
        api_key: that clients must send; None for none.
        drain_seconds: see above.

    On a loopback address and without a key, only requests that name this machine as such are answered.

    Raises:
        ValueError: when the sampler has no tokenizer, or one of another model, or no time to finish is no time.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        name: str,
        host: str = "127.0.0.1",
        port: int = 8000,
        limits: Limits | None = None,
        api_key: str | None = None,
        drain_seconds: float = 30.0,
    ) -> None:
        if not 0 <= drain_seconds < math.inf:
            raise ValueError(f"drain_seconds must be 0 or a number of seconds, got {drain_seconds}")
        limits = limits or Limits()
        hosts = frozenset({*_OWN_NAMES, host.lower()}) if _is_loopback(host) and api_key is None else None
        self.gate, self.service = build_app(sampler, name=name, limits=limits, api_key=api_key, hosts=hosts)
        super().__init__(
            uvicorn.Config(
                self.gate,
                host=host,
                port=port,
                access_log=False,
                log_level="warning",
                http=type("Connection", (_Connection,), {"seconds": limits.client_seconds}),
                timeout_graceful_shutdown=1,
                server_header=False,
                ws="none",
            )
        )
        self._drain_seconds = drain_seconds
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, sockets: list | None = None) -> None:
        """Serve until told to end; returns when the engine has stopped, too.

        Raises:
            OSError: when the address cannot be had.
        """
        try:
            super().run(sockets or [_listening(self.config.host, self.config.port)])
        finally:
            self.service.worker.stop()

    async def startup(self, sockets: list | None = None) -> None:
        """Listen, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            room = self.service.sampler.engine.cache_tokens
            print(f"serving {self.service.name} at http://{host}:{port}/v1, cache of {room:,} tokens", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end, or end at once when told so again."""
        if self.service.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def _begin_drain(self, reason: str) -> None:
        self._drain = asyncio.ensure_future(self._finish())
        with contextlib.suppress(OSError):  # nobody may be reading any more
            print(f"{reason}: finishing {self.gate.open} requests, for {self._drain_seconds:g} s at most", flush=True)

    async def _finish(self) -> None:
        end = time.monotonic() + self._drain_seconds
        while self.gate.open and time.monotonic() < end:
            await asyncio.sleep(0.02)
        # Ends what is left with an error; its clients get that before the connections are closed.
        await asyncio.to_thread(self.service.worker.stop)
        end = time.monotonic() + 1
        while self.gate.open and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.should_exit = True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}") from None
