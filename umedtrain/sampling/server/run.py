"""The server's process: a socket, signals, and an end that waits for answers under way."""

import asyncio
import signal
import socket
import time
from types import FrameType

import uvicorn

from umedtrain.sampling.sampler import Sampler
from umedtrain.sampling.server.app import build_app
from umedtrain.sampling.server.protocol import Limits


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

    Raises:
        ValueError: when the sampler has no tokenizer, or one of another model.
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
        self.gate, self.service = build_app(sampler, name=name, limits=limits, api_key=api_key)
        super().__init__(
            uvicorn.Config(
                self.gate,
                host=host,
                port=port,
                access_log=False,
                log_level="warning",
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
            print(f"serving {self.service.name} at http://{host}:{port}/v1", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end, or end at once when told so again."""
        if self.service.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def _begin_drain(self, reason: str) -> None:
        print(f"{reason}: finishing {self.gate.open} requests, for {self._drain_seconds:g} s at most", flush=True)
        self._drain = asyncio.ensure_future(self._finish())

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


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}") from None
