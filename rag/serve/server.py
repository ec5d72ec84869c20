"""What `python -m rag serve` runs: where it binds, and how it ends."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from rag.errors import InputError
from rag.serve.admission import Admission
from rag.serve.gate import Gate
from rag.serve.keys import KEYS_VARIABLE, Keys, RateLimit
from rag.serve.metrics import Metrics
from rag.serve.routes import Service, make_app

if TYPE_CHECKING:
    from rag.pipeline import Rag


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How the server serves; what it answers with are the settings."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None  # a file with `NAME KEY` in each line
    rate: int = 60  # requests a minute for each key; 0 is none
    running: int = 8  # answers that are written at once
    waiting: int = 32  # requests that wait for their turn
    max_body_bytes: int = 1_000_000
    grace_seconds: float = 30.0  # what runs when the server is told to end has this long

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535), ("rate", 0, 1_000_000), ("running", 1, 1024), ("waiting", 0, 100_000),
            ("max_body_bytes", 1_000, 1_000_000_000), ("grace_seconds", 0.0, 3600.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name} is {value}; it must be from {low} to {high}.")


class Server(uvicorn.Server):
    """Told to end (SIGTERM, Ctrl-C), it takes nothing new, and gives what runs time to finish."""

    def __init__(self, rag: Rag, options: ServeOptions, keys: Keys) -> None:
        self._admission = Admission(running=options.running, waiting=options.waiting)
        self._executor = ThreadPoolExecutor(options.running, thread_name_prefix="rag-serve")
        self._grace = options.grace_seconds
        metrics = Metrics(
            waiting=lambda: self._admission.waiting, running=lambda: self._admission.running,
            cached_bytes=lambda: rag.generator.cached_bytes,
        )
        service = Service(rag, admission=self._admission, executor=self._executor, metrics=metrics)
        app: Any = make_app(service, metrics, closing=lambda: self._admission.closing)
        self._gate = Gate(
            app, keys=keys, rate=RateLimit(options.rate), max_body_bytes=options.max_body_bytes,
            metrics=metrics,
        )
        super().__init__(uvicorn.Config(
            self._gate, host=options.host, port=options.port, log_level="warning", access_log=False,
            server_header=False, timeout_keep_alive=5, lifespan="off",
            # Those that wait, those that run, and some for health and metrics; each costs a socket.
            limit_concurrency=4 * (options.running + options.waiting) + 256,
            # It must outlast our own grace, after which what still runs is ended and answered.
            timeout_graceful_shutdown=int(options.grace_seconds) + 10,
        ))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            print(f"listening on http://{host}:{self.port}/v1", file=sys.stderr, flush=True)

    @property
    def port(self) -> int:
        """Where it listens; of port 0, the one that was free."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._admission.close()
        timer = asyncio.get_running_loop().call_later(self._grace, self._gate.stop_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            self._gate.stop_all()  # where a second Ctrl-C did not wait
            self._executor.shutdown(wait=False, cancel_futures=True)


def read_keys(options: ServeOptions, environ: Mapping[str, str]) -> Keys:
    """The keys. Raises InputError where others could reach the server and there are none."""
    keys = Keys.read(options.keys, environ)
    if not keys.digests and not _is_loopback(options.host):
        raise InputError(
            f"without keys anybody who reaches {options.host} could read your documents. Give --keys "
            f"FILE (`NAME KEY` in each line) or {KEYS_VARIABLE}=NAME:KEY, or bind to 127.0.0.1."
        )
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(rag: Rag, options: ServeOptions, keys: Keys) -> int:
    """Serve until told to end. Returns the exit code."""
    rag.generator  # noqa: B018  now, so that a model that can't be loaded is an error before it binds
    server = Server(rag, options, keys)
    _check_port(options)
    # Once it has ended, uvicorn sends itself again what it was told to end with; by then it is done.
    earlier = {each: signal.signal(each, _let_pass) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run()
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)
    return 0 if server.started else 1


def _let_pass(number: int, frame: FrameType | None) -> None:
    pass


def _check_port(options: ServeOptions) -> None:
    """Raise InputError where the place is taken: the server below would only log it and exit."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise InputError(
                f"{options.host}:{options.port} can't be bound: {error}. Choose another --port."
            ) from error
