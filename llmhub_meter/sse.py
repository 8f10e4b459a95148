"""Server-sent events as bytes: split, look, write. Grammar: WHATWG HTML, "Event stream interpretation"."""

import re
from collections.abc import Mapping

MAX_EVENT_BYTES = 16 * 1024 * 1024
DONE = b"data: [DONE]\n\n"

# A blank line: two line ends in a row, of any kind. CR LF is one line end, never two.
_BORDER = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
_LINE = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"
_LONGEST_BORDER = 4


class EventSplitter:
    """Cuts a byte stream into whole events; what it gives, joined, is the input byte for byte."""

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        self._waiting = bytearray()
        self._searched = 0

    @property
    def pending(self) -> int:
        """Bytes that wait for the end of their event."""
        return len(self._waiting)

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are whole now, each with the blank line that ends it.

        An event that ends in a CR does not wait for a LF that may belong to it: that comes with the next. One
        that grows past the limit is handed out in pieces, which no reader takes for an event.
        """
        if not self._waiting and data.endswith(b"\n\n") and data.count(b"\n\n") == 1 and b"\r" not in data:
            return [data]
        self._waiting += data
        events: list[bytes] = []
        start = 0
        # A border may have begun in the last bytes that were searched before.
        position = max(0, self._searched - _LONGEST_BORDER)
        while found := _BORDER.search(self._waiting, position):
            end = found.end()
            if self._waiting[end - 1] == 0x0D and self._waiting[end : end + 1] == b"\n":
                end += 1
            events.append(bytes(self._waiting[start:end]))
            start = position = end
        del self._waiting[:start]
        if len(self._waiting) > self._max:
            events.append(self.rest())
        self._searched = len(self._waiting)
        return events

    def rest(self) -> bytes:
        """What is left: an event without its blank line. The splitter is empty afterwards."""
        left = bytes(self._waiting)
        self._waiting.clear()
        self._searched = 0
        return left


def data_of(event: bytes) -> bytes | None:
    """The data lines joined by a line feed; None for an event without any, such as a comment."""
    if event.startswith(b"data: ") and event.endswith(b"\n\n") and event.find(b"\n") == len(event) - 2:
        if b"\r" not in event:
            return event[6:-2]
    values = _values(event, b"data")
    return b"\n".join(values) if values else None


def name_of(event: bytes) -> bytes | None:
    """The event's name, where it has one."""
    values = _values(event, b"event")
    return values[-1] if values else None


def is_done(event: bytes) -> bool:
    """Whether the event is the `[DONE]` that ends a chat stream."""
    if b"[DONE]" not in event:
        return False
    data = data_of(event)
    return data is not None and data.strip() == b"[DONE]"


def comment(text: str) -> bytes:
    """A comment line, which clients skip."""
    return b": %b\n\n" % text.encode()


def data_event(data: bytes, *, name: str | None = None) -> bytes:
    """An event with these data, and a name."""
    head = b"" if name is None else b"event: %b\n" % name.encode()
    return head + b"".join(b"data: %b\n" % line for line in _LINE.split(data)) + b"\n"


def add_to_usage(event: bytes, fields: Mapping[str, str]) -> bytes:
    """The event with `fields` at the end of its top-level "usage" object; all else stays byte for byte.

    Unchanged where there is no such object.
    """
    place = _usage_end(event)
    if place is None or not fields:
        return event
    end, empty = place
    added = ",".join(f'"{name}":"{value}"' for name, value in fields.items()).encode()
    return event[:end] + (b"" if empty else b",") + added + event[end:]


def _values(event: bytes, field: bytes) -> list[bytes]:
    values: list[bytes] = []
    for line in _LINE.split(event.removeprefix(_BOM)):
        if line.startswith(field):
            rest = line[len(field) :]
            if rest.startswith(b":"):
                values.append(rest[2:] if rest.startswith(b": ") else rest[1:])
            elif not rest:
                values.append(b"")
    return values


def _usage_end(event: bytes) -> tuple[int, bool] | None:
    """Where the top-level "usage" object closes, and whether it is empty: a walk over strings and brackets.

    The field names of the event (`data:`) and line ends between stand outside of strings and brackets, so the
    walk passes over them.
    """
    depth = 0
    wanted = False
    inside: int | None = None
    for token in _TOKEN.finditer(event):
        text = token[0]
        if text in (b"{", b"["):
            if wanted and depth == 1 and text == b"{":
                inside = token.end()
            depth += 1
            wanted = False
        elif text in (b"}", b"]"):
            depth -= 1
            if inside is not None and depth == 1:
                empty = _BETWEEN.fullmatch(event[inside : token.start()]) is not None
                return token.start(), empty
        elif text.startswith(b'"'):
            wanted = depth == 1 and inside is None and token[1] is not None and text == b'"usage"'
    return None


_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"(?=(\s*(?:data:\s*)?:))?|[{}\[\]]', re.DOTALL)
_BETWEEN = re.compile(rb"(?:\s|data:)*")
