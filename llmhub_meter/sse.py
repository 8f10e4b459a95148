"""Server-sent events as bytes: split, look, write. Grammar: WHATWG HTML, "Event stream interpretation"."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MAX_EVENT_BYTES = 16 * 1024 * 1024
DONE = b"data: [DONE]\n\n"

_BOM = b"\xef\xbb\xbf"
_CR, _LF, _COLON, _SPACE = b"\r\n: "
_LINE = re.compile(rb"[^\r\n]+")
_LINE_END = re.compile(rb"\r\n|\n|\r")
# A line end and the first byte of the next: an event is over before the LF of a last CR LF has come.
_BORDER = re.compile(rb"(?:\n|\r\n?+)[\r\n]")


class Piece(bytes):
    """A part of an event that is longer than the limit: it is passed on and never read."""


class EventSplitter:
    """Cuts a byte stream into whole events; what it gives, joined, is the input byte for byte."""

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        self._waiting = bytearray()
        self._searched = 0
        self._after_cr = False
        self._in_pieces = False

    @property
    def pending(self) -> int:
        """Bytes that wait for the end of their event."""
        return len(self._waiting)

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are whole now, each with the blank line that ends it.

        Nothing waits for the LF of a CR LF: one that is late comes alone. An event longer than the limit is
        given as `Piece`s.
        """
        if data.find(b"\n\n") == len(data) - 2 and data.find(b"\r") < 0 and 2 <= len(data) <= self._max:
            if not (self._waiting or self._after_cr or self._in_pieces):
                return [data]
        return self._split(data)

    def rest(self) -> bytes:
        """What is left: an event without its blank line. The splitter is empty afterwards."""
        left = self._event(bytes(self._waiting), len(self._waiting))
        self._waiting.clear()
        self._searched = 0
        self._after_cr = self._in_pieces = False
        return left

    def _split(self, data: bytes) -> list[bytes]:
        events: list[bytes] = []
        if self._after_cr and data:
            self._after_cr = False
            if data[0] == _LF:
                events.append(b"\n")
                data = data[1:]
        source: bytes | bytearray = data
        if self._waiting:
            self._waiting += data
            source = self._waiting
        start = 0
        # The last byte that was searched may be the line end before the blank line.
        position = max(0, self._searched - 1)
        while found := _BORDER.search(source, position):
            end = position = found.end()
            if source[end - 1] == _CR:
                if end == len(source):
                    self._after_cr = True
                elif source[end] == _LF:
                    position += 1
            events.append(self._event(bytes(source[start:position]), end - start))
            self._in_pieces = False
            start = position
        if source is data:
            self._waiting += data[start:]
        else:
            del self._waiting[:start]
        if len(self._waiting) > self._max:
            self._give_piece(events)
        self._searched = len(self._waiting)
        return events

    def _event(self, event: bytes, size: int) -> bytes:
        """`size` leaves out the LF that may come late: what is too long must not depend on the chunks."""
        return Piece(event) if self._in_pieces or size > self._max else event

    def _give_piece(self, events: list[bytes]) -> None:
        self._in_pieces = True
        # A line end at the end stays: it may be the first half of the border.
        size = len(self._waiting.rstrip(b"\r\n"))
        if size:
            events.append(Piece(self._waiting[:size]))
            del self._waiting[:size]


def begins_stream(data: bytes) -> bool | None:
    """Whether a body begins like events; None where there is too little of it to say."""
    text = data.removeprefix(_BOM).lstrip(b"\r\n")
    if text.startswith(_BEGINNINGS):
        return True
    return None if any(name.startswith(text) for name in _BEGINNINGS) or _BOM.startswith(data) else False


_BEGINNINGS = (b"data:", b"event:", b"id:", b"retry:", b":")


def data_of(event: bytes) -> bytes | None:
    """The data lines joined by a line feed; None for an event without any, such as a comment."""
    # Nearly all events are one data line, or a name and one data line.
    start = event.find(b"\n") + 1 if event.startswith(b"event: ") else 0
    if event.startswith(b"data: ", start) and event.find(b"\n", start) == len(event) - 2:
        if event.endswith(b"\n") and event.find(b"\r") < 0 and not isinstance(event, Piece):
            return event[start + 6 : -2]
    values = [event[start:end] for start, end in _spans(event, b"data")]
    return b"\n".join(values) if values else None


def name_of(event: bytes) -> bytes | None:
    """The event's name, where it has one."""
    name = None
    for start, end in _spans(event, b"event"):
        name = event[start:end]
    return name


def is_done(event: bytes) -> bool:
    """Whether the event is the `[DONE]` that ends a chat stream."""
    if b"[DONE]" not in event:
        return False
    data = data_of(event)
    return data is not None and data.strip() == b"[DONE]"


def has_usage(event: bytes) -> bool:
    """Whether the event may report usage: a search for the key, at any level."""
    return b'"usage"' in event and not isinstance(event, Piece)


def comment(text: str) -> bytes:
    """A comment, which clients skip."""
    return b"".join(b": %b\n" % line for line in _LINE_END.split(text.encode())) + b"\n"


def data_event(data: bytes, *, name: str | None = None) -> bytes:
    """An event with these data, and a name; data of several lines become several data lines."""
    head = b"" if name is None else b"event: %b\n" % name.encode()
    return head + b"".join(b"data: %b\n" % line for line in _LINE_END.split(data)) + b"\n"


def add_to_usage(event: bytes, fields: Mapping[str, str]) -> bytes:
    """The event with `fields` at the end of its top-level "usage" object; all else stays byte for byte.

    Members of the same names give way. Unchanged where the data are no JSON object with such an object.
    """
    lines = list(_spans(event, b"data"))
    data = b"\n".join([event[start:end] for start, end in lines])
    usage = _usage(data)
    if usage is None or not fields:
        return event
    members, close = usage
    parts: list[bytes] = []
    position = 0
    for member in members:
        if member.name in fields:
            # Its line feeds stay, so that the data still have as many lines as the event.
            parts += data[position : member.start], b"\n" * data.count(b"\n", member.start, member.end)
            position = member.end
    # A last member that gave way has left the comma of the one before it.
    comma = b"," if members and members[-1].name not in fields else b""
    added = json.dumps(dict(fields), separators=(",", ":")).encode()[1:-1]
    parts += data[position:close], comma, added, data[close:]
    return _replace(event, lines, b"".join(parts).split(b"\n"))


def _spans(event: bytes, field: bytes) -> Iterator[tuple[int, int]]:
    """Where the values of a field stand."""
    if isinstance(event, Piece):
        return
    for line in _LINE.finditer(event, len(_BOM) if event.startswith(_BOM) else 0):
        start, end = line.span()
        if not event.startswith(field, start):
            continue
        start += len(field)
        if start == end:
            yield end, end
        elif event[start] == _COLON:
            start += 1
            yield start + (start < end and event[start] == _SPACE), end


def _replace(event: bytes, spans: list[tuple[int, int]], values: list[bytes]) -> bytes:
    parts: list[bytes] = []
    position = 0
    for (start, end), value in zip(spans, values, strict=True):
        parts += event[position:start], value
        position = end
    return b"".join([*parts, event[position:]])


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    start: int
    value: int
    end: int
    """After the comma, where one follows."""


def _usage(data: bytes) -> tuple[list[_Member], int] | None:
    """The members of the top-level "usage" object, and where it closes."""
    try:
        # What any client's decoder might still take counts as JSON: bad UTF-8, lone surrogates, NaN.
        message = json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or not isinstance(message.get("usage"), dict):
        return None
    members, _ = _members(data, data.index(b"{"))
    # Of two members with one name decoders take the last.
    place = next(member.value for member in reversed(members) if member.name == "usage")
    return _members(data, place)


_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]')


def _members(data: bytes, start: int) -> tuple[list[_Member], int]:
    """The members of the object that opens at or after `start` in valid JSON, and where it closes."""
    members: list[_Member] = []
    key: re.Match[bytes] | None = None
    depth = value = 0
    for token in _TOKEN.finditer(data, start):
        mark = token[0][:1]
        if mark in b"{[":
            depth += 1
        elif depth == 1 and mark == b'"':
            key = key or token
        elif depth == 1 and mark == b":":
            value = token.end()
        elif mark in b",}]":
            closes = mark != b","
            if depth == 1 and key is not None:
                end = token.start() if closes else token.end()
                members.append(_Member(_text(key[0]), key.start(), value, end))
                key = None
            depth -= closes
            if depth == 0:
                return members, token.start()
    raise AssertionError("valid JSON closes what it opens")


def _text(string: bytes) -> str:
    text = string.decode("utf-8", "replace")
    return str(json.loads(text)) if "\\" in text else text[1:-1]
