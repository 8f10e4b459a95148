"""Starts and ends what a measurement needs, and reads from /proc what it cost."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 20.0
STOP_SECONDS = 5.0
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Processes:
    """Everything that was started, in a folder of its own; leaving the context ends and removes it all."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[str]] = []
        self._spawning = False
        self._signalled = 0
        self._folder = tempfile.TemporaryDirectory(prefix="llmhub-bench-")
        self.folder = Path(self._folder.name)

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._on_signal) for number in _ENDING_SIGNALS}
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _ignore_signals()
        for process in reversed(self._running):
            _end(process)
        self._folder.cleanup()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        # While a process is being started, nobody knows it yet who could end it.
        if self._spawning:
            self._signalled = number
        else:
            _leave(number)

    def start(self, name: str, command: Sequence[str], *, port: int) -> subprocess.Popen[str]:
        """Starts a server and waits until its port accepts. Its output goes to a log in the folder."""
        log = self.folder / f"{name}.log"
        with log.open("w") as output:
            process = self._spawn(command, output.fileno(), output.fileno())
        deadline = time.monotonic() + START_SECONDS
        while not _accepts(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)
        return process

    def output_of(self, command: Sequence[str], *, timeout_seconds: float) -> str:
        """Runs a command to its end and returns what it printed."""
        process = self._spawn(command, subprocess.PIPE, subprocess.PIPE)
        output, errors = process.communicate(timeout=timeout_seconds)
        self._running.remove(process)
        if process.returncode:
            raise SystemExit(f"{command[0]} ended with {process.returncode}:\n{errors[-2000:]}")
        return output

    def _spawn(self, command: Sequence[str], output: int, errors: int) -> subprocess.Popen[str]:
        self._spawning = True
        # A session of its own: Ctrl-C reaches us alone, and we end the others in order.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        self._running.append(process)
        self._spawning = False
        if self._signalled:
            _leave(self._signalled)
        return process


def _leave(number: int) -> NoReturn:
    """Exits through every `finally`; a second signal must not leave half of it running."""
    _ignore_signals()
    sys.exit(128 + number)


def _ignore_signals() -> None:
    for number in _ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def pinned(command: Sequence[str], cpus: str | None) -> list[str]:
    """The command, held to these CPUs."""
    return list(command) if cpus is None else ["taskset", "-c", cpus, *command]


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def cpu_seconds(process_id: int) -> float:
    """User and system time that a process has used."""
    # The name stands in brackets and may hold blanks; utime and stime are fields 14 and 15.
    fields = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def rss_mib(process_id: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * _PAGE_BYTES / 2**20


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.5).close()
    except OSError:
        return False
    return True
