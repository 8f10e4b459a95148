"""The upstream of a measurement: stub.c where there is a C compiler, else the same answers from Python."""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

EVENTS = 64
"""Events of a stream; the last one carries the usage and [DONE]."""
_SOURCE = Path(__file__).with_name("stub.c")
_TEXT = "The quick brown fox jumps over the lazy dog. " * 11
_COMMON = {"id": "chatcmpl-bench", "created": 1_700_000_000, "model": "gpt-4o-mini"}


def command(folder: Path, port: int) -> list[str]:
    """How to start the stub on a port, compiled into `folder` first where that can be."""
    compiler = shutil.which("cc")
    if compiler is None:
        return [sys.executable, "-m", "benchmarks.stub", str(port)]
    program = folder / "stub"
    subprocess.run([compiler, "-O2", "-o", str(program), str(_SOURCE)], check=True)
    return [str(program), str(port), str(EVENTS)]


class StubProtocol(asyncio.Protocol):
    """Answers each POST whole, or event by event where its body asks for a stream."""

    def __init__(self) -> None:
        self._received = b""
        self._streaming = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._serve()

    def _serve(self) -> None:
        while not self._streaming:
            head, separator, rest = self._received.partition(b"\r\n\r\n")
            if not separator or len(rest) < (length := _length(head)):
                return
            body, self._received = rest[:length], rest[length:]
            if json.loads(body).get("stream"):
                self._streaming = True
                self._send_event(0)
            else:
                self._transport.write(_ANSWER)

    def _send_event(self, index: int) -> None:
        self._transport.write(_EVENTS[index])
        if index + 1 < EVENTS:
            asyncio.get_running_loop().call_soon(self._send_event, index + 1)
        else:
            self._streaming = False
            self._serve()


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return 0


def _usage(prompt: int, completion: int) -> dict[str, int]:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def _answer() -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": _TEXT}, "finish_reason": "stop"}
    body = json.dumps(
        {**_COMMON, "object": "chat.completion", "choices": [choice], "usage": _usage(57, 110)}
    ).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


def _event(index: int) -> bytes:
    last, finish = index == EVENTS - 1, "stop" if index == EVENTS - 2 else None
    delta = {"index": 0, "delta": {} if finish else {"content": f" tok{index}"}, "finish_reason": finish}
    chunk = {**_COMMON, "object": "chat.completion.chunk", "choices": [] if last else [delta]}
    if last:
        chunk["usage"] = _usage(57, EVENTS - 2)
    data = b"data: %b\n\n" % json.dumps(chunk).encode() + (b"data: [DONE]\n\n" if last else b"")
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    framed = b"%x\r\n%b\r\n" % (len(data), data)
    return (b"" if index else head) + framed + (b"0\r\n\r\n" if last else b"")


_ANSWER = _answer()
_EVENTS = [_event(index) for index in range(EVENTS)]


async def serve(port: int) -> None:
    """Serves until it is ended."""
    server = await asyncio.get_running_loop().create_server(StubProtocol, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.stub", description=__doc__)
    parser.add_argument("port", type=int)
    asyncio.run(serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
