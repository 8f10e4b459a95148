"""Real servers for tests: a throw-away Valkey on a unix socket, and an ASGI app under uvicorn."""

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import redis
import uvicorn
from redis.backoff import NoBackoff
from redis.retry import Retry

from llmhub_meter.embedded import find_binary

START_SECONDS = 20
STOP_SECONDS = 20


@contextmanager
def valkey(directory: Path, *, appendonly: bool = False) -> Iterator[str]:
    """A server of its own that lives as long as the block; yields its url."""
    run_directory = Path(tempfile.mkdtemp(prefix="llmhub-test-", dir="/tmp"))
    socket_path = run_directory / "valkey.sock"
    arguments: list[str | Path] = [
        "--port",
        "0",
        "--unixsocket",
        socket_path,
        "--dir",
        directory,
        "--save",
        "",
    ]
    arguments += ["--logfile", directory / "valkey.log", "--maxmemory-policy", "noeviction"]
    arguments += ["--appendonly", "yes" if appendonly else "no", "--appendfsync", "always"]
    process = subprocess.Popen([find_binary(), *arguments], stdin=subprocess.DEVNULL)
    try:
        wait_until_it_answers(socket_path, process)
        yield f"unix://{socket_path}"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(run_directory)


def wait_until_it_answers(socket_path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with closing(connect(f"unix://{socket_path}")) as client:
            try:
                client.ping()
                return
            except redis.ConnectionError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
        time.sleep(0.005)


def connect(url: str) -> redis.Redis:
    """A synchronous client that never retries."""
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), decode_responses=True)


@contextmanager
def serve_app(app: Any, *, host: str = "127.0.0.1") -> Iterator[str]:
    """Run an ASGI app under uvicorn in a thread with its own event loop; yields its base url."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        config = uvicorn.Config(
            app,
            lifespan="on",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        port = listener.getsockname()[1]
        thread.start()
        try:
            wait_until_started(server, thread)
            yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        finally:
            server.should_exit = True
            thread.join(STOP_SECONDS)
        assert not thread.is_alive(), "uvicorn did not stop"


def wait_until_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("uvicorn did not start")
        time.sleep(0.002)
