"""Apps under uvicorn: `serve` with its workers, and single servers inside a running event loop."""

import asyncio
import errno
import http.client
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import uvicorn

from .config import DEFAULT_FILE, Config
from .embedded import EmbeddedServer
from .errors import ConfigError
from .meter import Meter, running
from .proxy import CONFIG_VARIABLE
from .replies import ASGIApp
from .upstream import UpstreamBroken

PORTS_TO_TRY = 100
_POLL_SECONDS = 0.02


def serve(
    config: Config,
    path: Path | None,
    *,
    host: str,
    port: int,
    workers: int,
    background: bool,
    announce: Callable[[str], None],
) -> None:
    """The proxy until SIGTERM or Ctrl-C; running answers end first. `announce` gets the URL once it serves.

    Raises ConfigError for a config that can't be served, a busy port, or prices that change too much;
    MeteringUnavailable.
    """
    _check_servable(config, path)
    with listen(host, port) as listener:
        port = listener.getsockname()[1]
    with ExitStack() as stack:
        stack.enter_context(end_on_sigterm())
        if config.redis.url is None:
            # Held while the workers run: they come and go, and the last user would stop the server.
            stack.enter_context(EmbeddedServer.start(config.data_dir))
        asyncio.run(_publish_prices(config))
        _leave_for_workers(path, background)
        watch = threading.Thread(target=_announce_when_up, args=(host, port, announce), daemon=True)
        watch.start()
        uvicorn.run(
            "llmhub_meter.proxy:worker_app",
            factory=True,
            workers=workers,
            host=host,
            port=port,
            loop="auto",
            **_SETTINGS,
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where the port is busy or the host is not ours."""
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family)
    except OSError as error:
        raise ConfigError([f"can't listen on {host}: {error.strerror}"]) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortBusy([f"port {port} of {host} is busy; choose another with --port"]) from None
        raise ConfigError([f"can't listen on port {port} of {host}: {error.strerror}"]) from None
    return listener


def listen_next(host: str, port: int) -> socket.socket:
    """A listening socket on the port or the next free one. Raises ConfigError."""
    for candidate in range(port, min(port + PORTS_TO_TRY, 65_536)):
        try:
            return listen(host, candidate)
        except PortBusy:
            continue
    raise PortBusy([f"port {port} of {host} and the {PORTS_TO_TRY} after it are busy; choose with --port"])


class PortBusy(ConfigError):
    """Somebody listens there already."""


@contextmanager
def end_on_sigterm() -> Iterator[None]:
    """SIGTERM is an ordinary end, exit code 0, also while starting; uvicorn raises it again in the end."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def url_of(host: str, port: int) -> str:
    """The URL of a server on this host and port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@asynccontextmanager
async def app_server(app: ASGIApp, listener: socket.socket) -> AsyncIterator[uvicorn.Server]:
    """An app served within the running event loop, for as long as the block; then its answers end first."""
    server = _Server(uvicorn.Config(app, **_SETTINGS))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if task.done():
                raise ConfigError(["the server could not start"])
            await asyncio.sleep(_POLL_SECONDS)
        yield server
    finally:
        server.should_exit = True
        await task


def cut_answers(*servers: uvicorn.Server) -> None:
    """Ends the answers that still run, for who can't wait for them; each is charged what it delivered."""
    for server in servers:
        for task in server.server_state.tasks:
            task.cancel()


class BrokenAnswers(logging.Filter):
    """An answer that was broken off on purpose is one line and no traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, UpstreamBroken | asyncio.CancelledError):
            reason = str(error) or "the server was told to stop at once"
            record.msg, record.args = "an answer was broken off: %s", (reason,)
            record.exc_info = record.exc_text = None
        return True


_LOGGING: Mapping[str, object] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "filters": {"broken": {"()": "llmhub_meter.serving.BrokenAnswers"}},
    "handlers": {
        "stderr": {
            "class": "logging.StreamHandler",
            "stream": "ext://sys.stderr",
            "formatter": "plain",
            "filters": ["broken"],
        }
    },
    "loggers": {
        "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "llmhub_meter": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}

_SETTINGS: Mapping[str, Any] = {
    "http": "httptools",
    "ws": "none",
    "lifespan": "on",
    "proxy_headers": False,
    # An answer of an upstream brings its own.
    "server_header": False,
    "date_header": False,
    "access_log": False,
    "log_level": "warning",
    "log_config": _LOGGING,
    "timeout_graceful_shutdown": None,
}


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs the event loop."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


def _check_servable(config: Config, path: Path | None) -> None:
    source = path or (DEFAULT_FILE if Path(DEFAULT_FILE).exists() else "config")
    faults = []
    if not config.upstreams:
        faults.append(f"{source}: there is no upstream to forward to: add [upstreams.NAME] with a base_url")
    if not config.models:
        faults.append(f'{source}: there is no model to serve: add [models."NAME"] with its prices')
    if faults:
        raise ConfigError(faults)


async def _publish_prices(config: Config) -> None:
    async with running(Meter.from_config(config)):
        pass


def _leave_for_workers(path: Path | None, background: bool) -> None:
    """What `worker_app` reads in each worker's process."""
    if path is None and Path(DEFAULT_FILE).exists():
        path = Path(DEFAULT_FILE)
    values = {
        CONFIG_VARIABLE: None if path is None else str(path.absolute()),
        f"{CONFIG_VARIABLE}_BACKGROUND": None if background else "off",
    }
    for variable, value in values.items():
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value


def _announce_when_up(host: str, port: int, announce: Callable[[str], None]) -> None:
    """Waits until a worker answers: a listening socket alone takes connections before there is one."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    while not _is_up(local, port):
        time.sleep(_POLL_SECONDS)
    announce(url_of(host, port))


def _is_up(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
