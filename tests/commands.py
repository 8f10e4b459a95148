"""The command line as a user has it: a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 30


@dataclass
class Running:
    """A command that keeps running, and what it has said so far."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    def read_until(self, word: str) -> str:
        """The output up to a line with this word; fails when it does not come."""
        assert self.process.stdout is not None
        deadline = threading.Timer(START_SECONDS, self.process.kill)
        deadline.start()
        try:
            while not self.said or word not in self.said[-1]:
                line = self.process.stdout.readline()
                assert line, f"no {word!r} in {self.said}: {self.process.communicate()[1]}"
                self.said.append(line)
        finally:
            deadline.cancel()
        return "".join(self.said)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Sends a signal and waits; the exit code, and what stood on stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "llmhub_meter", *words],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@contextmanager
def start(*words: str, cwd: Path, **environment: str) -> Iterator[Running]:
    """A command that runs until it is ended, at the latest with the block; in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llmhub_meter", *words],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        start_new_session=True,
    )
    try:
        yield Running(process)
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=30)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
