"""multipart/form-data: its fields and files, and where their values stand in the raw bytes.

Strict, because the upstream has a parser of its own: what two parsers may read in two ways is refused.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState

from .errors import InvalidRequest

MAX_PARTS = 200
MAX_FIELD_BYTES = 1024 * 1024

_BOUNDARY = re.compile(
    r"\s*multipart/form-data\s*;\s*boundary=(?:\"([^\"\\\r\n]{1,70})\"|([^\s\";,]{1,70}))"
    r"(?:\s*;\s*charset=\"?utf-8\"?)?\s*;?\s*",
    re.IGNORECASE,
)
_PARAMETER = re.compile(r';\s*([a-z*]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s";]+))\s*', re.IGNORECASE)
_PLAIN_ENCODINGS = (b"7bit", b"8bit", b"binary")


class Form(dict[str, Any]):
    """A form as a body: text fields as text, files as bytes; `spans` says where each text stands."""

    def __init__(
        self, values: Mapping[str, Any], spans: Mapping[str, tuple[int, int]], *, files: int = 0
    ) -> None:
        super().__init__(values)
        self.spans = dict(spans)
        self.files = files
        """How many files came, of which several may have one name."""

    def rewritten(self, body: bytes, changes: Mapping[str, object]) -> bytes:
        """The raw body with the values of text fields replaced, all else byte for byte."""
        for name in sorted(changes, key=lambda name: self.spans[name], reverse=True):
            start, end = self.spans[name]
            body = b"%b%b%b" % (body[:start], str(changes[name]).encode(), body[end:])
        return body


@dataclass(slots=True)
class Part:
    """One part of a form."""

    name: str
    is_file: bool
    value: bytes
    start: int
    """Where the value begins in the body."""

    @property
    def text(self) -> str:
        try:
            return self.value.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f"The form field {self.name!r} is not UTF-8.", param=self.name) from None


def parse(body: bytes, content_type: str, once: Iterable[str] = ()) -> Form:
    """The form in a body. Raises InvalidRequest for what is none, and for fields of `once` said twice.

    Also another spelling of such a field is refused: an upstream may take it for the field.
    """
    once = frozenset(once)
    values: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    files = 0
    for part in parts(body, content_type):
        _check_spelling(part.name, once)
        if part.name in values and part.name in once:
            raise InvalidRequest(f"The form field {part.name!r} is there twice.", param=part.name)
        if part.is_file:
            values[part.name] = part.value
            files += 1
            continue
        if len(part.value) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"The form field {part.name!r} is too long.", param=part.name)
        values[part.name] = part.text
        spans[part.name] = (part.start, part.start + len(part.value))
    return Form(values, spans, files=files)


def parts(body: bytes, content_type: str) -> list[Part]:
    """The parts of a multipart body, in order. Raises InvalidRequest."""
    found = _BOUNDARY.fullmatch(content_type)
    if found is None:
        raise InvalidRequest("The request body must be multipart/form-data with a boundary.")
    reader = _Reader(body)
    parser = MultipartParser((found[1] or found[2]).encode("latin-1"), reader.callbacks())
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise _malformed() from None
    if parser.state != MultipartState.END:
        raise _malformed()
    return reader.parts


class _Reader:
    """Collects what the parser calls out. The whole body is written at once: offsets are the body's own."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.parts: list[Part] = []
        self._begin()

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
        }

    def _begin(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._field = self._value = b""
        self._start: int | None = None
        self._stop = self._length = 0

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        name = self._field.strip().lower()
        if name in self._headers:
            raise _malformed()
        self._headers[name] = self._value.strip()
        self._field = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._start is None:
            self._start = start
        self._length += end - start
        self._stop = end

    def _end(self) -> None:
        start = self._start or 0
        if self._stop - start != self._length or len(self.parts) >= MAX_PARTS:
            # Not one piece of the body: its value could not be replaced in place.
            raise _malformed()
        encoding = self._headers.get(b"content-transfer-encoding", b"binary").lower()
        if encoding not in _PLAIN_ENCODINGS:
            raise InvalidRequest("Parts of a form must not be encoded.")
        name, is_file = _disposition(self._headers.get(b"content-disposition", b""))
        self.parts.append(Part(name, is_file, self.body[start : self._stop], start))


def _disposition(header: bytes) -> tuple[str, bool]:
    """A part's name, and whether it is a file."""
    text = header.decode("utf-8", "replace")
    kind, semicolon, rest = text.partition(";")
    if kind.strip().lower() != "form-data" or not semicolon:
        raise _malformed()
    given: dict[str, str] = {}
    rest, at = ";" + rest, 0
    while found := _PARAMETER.match(rest, at):
        name, at = found[1].lower(), found.end()
        if name in given:
            raise _malformed()
        given[name] = found[2] if found[2] is not None else found[3]
    if rest[at:].strip(" \t;") or "name" not in given or "name*" in given or "\\" in given["name"]:
        raise _malformed()
    return given["name"], "filename" in given or "filename*" in given


def _check_spelling(name: str, once: frozenset[str]) -> None:
    plain = name.strip().casefold().removesuffix("[]")
    if name not in once and plain in once:
        raise InvalidRequest(f"The form field {name!r} must be spelled {plain!r}.", param=plain)


def _malformed() -> InvalidRequest:
    return InvalidRequest("The request body is not valid multipart/form-data.")
