"""What a dialect is: one API shape, read at the edge into `Ask`, `Prompt` and `Usage`.

A dialect is one small file with one subclass of `Dialect`. It says the most that a request can use, where the
usage stands in a JSON answer and in a stream, and how a stream of its kind ends.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal

import msgspec

from .. import sse
from ..config import Unit
from ..errors import ApiError, InvalidRequest, UnsupportedParameter, UnsupportedState
from ..replies import error_json
from ..types import Usage
from .reported import Reported

Body = Mapping[str, Any]
EventKind = Literal["pass", "usage", "done"]

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for what is no JSON, and for JSON that it won't take (lone surrogates)."""
MAX_CHOICES = 128
MAX_TOKENS = 10_000_000
"""No model writes more in one answer; a larger maximum is a mistake."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks for, as far as money goes."""

    model: str
    stream: bool = False
    choices: int = 1
    maximum: int | None = None
    """Most output tokens of one choice, where the client set that."""
    maximum_fields: tuple[str, ...] = ()
    """The fields of the body that set it."""
    wants_usage: bool = False
    """The client itself asked for usage in the stream."""
    writes: bool = True
    """Whether output tokens come out at all."""
    speaks: bool = False
    """Whether output may be audio."""
    images: int = 0
    size: str | None = None
    quality: str | None = None
    characters: int = 0
    seconds: Fraction | int = 0
    """How long the sound plays that is sent."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What there is to count in a request: pieces of text, tokens around them, and media by kind."""

    pieces: tuple[str, ...] = ()
    overhead: int = 0
    images: int = 0
    files: int = 0
    audio: int = 0
    tools: int = 0
    """Hosted tools, whose results become prompt tokens."""


@dataclass(slots=True)
class Output:
    """What was delivered: text by the place where it grows, so that tokens don't merge across places."""

    texts: dict[tuple[object, ...], list[str]] = field(default_factory=dict)
    fresh: list[tuple[tuple[object, ...], str]] = field(default_factory=list)
    """Texts since they were last counted, with their places."""
    fresh_bytes: int = 0
    """Bytes of these: never fewer than their tokens."""
    images: int = 0
    seen: bool = False
    """Whether anything recognisable was delivered, be it without text."""
    partial: bool = False
    """Whether a part of an image was delivered."""

    @property
    def delivered(self) -> bool:
        """Whether there is anything that a client can use."""
        return self.partial or self.images > 0 or any(self.texts.values())

    def add(self, place: tuple[object, ...], text: object) -> None:
        if not isinstance(text, str):
            return
        self.seen = True
        if text:
            place = tuple(part if isinstance(part, str | int) else None for part in place)
            self.texts.setdefault(place, []).append(text)
            self.fresh.append((place, text))
            self.fresh_bytes += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))

    def take_back(self, count: int) -> None:
        """Forgets the latest `count` texts, which were not delivered after all."""
        for place, _ in self.fresh[len(self.fresh) - count :]:
            self.texts[place].pop()

    def pieces(self) -> tuple[str, ...]:
        return tuple("".join(parts) for parts in self.texts.values())


class _Head(msgspec.Struct):
    """The parts of a JSON answer that are read on every request; all else is skipped."""

    usage: Any = None
    model: Any = None
    error: Any = None
    x_groq: Any = None


_decode_head = msgspec.json.Decoder(_Head).decode


class Answer:
    """A JSON answer, read as far as needed."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self._full: Any = None
        try:
            self.head = _decode_head(body)
            self.is_object = True
        except UNREADABLE:
            # Invalid UTF-8 or NaN in a text must not hide the usage.
            self._full = decode(body)
            self.is_object = isinstance(self._full, dict)
            full = self.full
            self.head = _Head(full.get("usage"), full.get("model"), full.get("error"), full.get("x_groq"))

    @classmethod
    def of_tail(cls, tail: bytes) -> "Answer":
        """An answer of which only the end is there: the last usage object in it is all that is read."""
        start = tail.rfind(b'"usage"')
        while start >= 0:
            usage = _object_at(tail, start + len(b'"usage"'))
            if usage is not None:
                return cls(msgspec.json.encode({"usage": usage}))
            start = tail.rfind(b'"usage"', 0, start)
        return cls(b"{}")

    @classmethod
    def of_text(cls, text: bytes) -> "Answer":
        """An answer that is plain text, as if it had come in JSON."""
        return cls(msgspec.json.encode({"text": text.decode("utf-8", "replace")}))

    @property
    def full(self) -> dict[str, Any]:
        """The whole object; empty for anything else."""
        if self._full is None:
            self._full = decode(self.body)
        return self._full if isinstance(self._full, dict) else {}


class StreamReader:
    """Reads the events of one stream as they pass."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.output = Output()
        self.reported: Reported | None = None
        self.model: str | None = None
        self.readable = 0
        """Events that could be read at all."""
        self.failed = False
        """An error event came."""
        self.failure_reported = False
        """It carried usage."""

    def read(self, event: bytes) -> EventKind:
        """Takes note of one event and says what it is."""
        data = sse.data_of(event)
        if data is None:
            return "pass"
        if sse.is_done(event):
            return "done"
        message = decode(data)
        if not isinstance(message, dict):
            return "pass"
        self.readable += 1
        failed, reported = self.failed, self.reported
        kind = self.take(message)
        if self.failed and not failed:
            self.failure_reported = self.reported is not reported
        return kind

    @property
    def wrote(self) -> bool:
        """Whether output came, by what was delivered or by what is reported."""
        reported = self.reported
        counted = reported is not None and reported.completion_known and reported.usage.completion_tokens > 0
        return counted or self.output.delivered

    def take(self, message: dict[str, Any]) -> EventKind:
        """One event's JSON object; this much is said in every dialect."""
        if message.get("error"):
            self.failed = True
        self.report(message.get("usage"))
        return "pass"

    def report(self, usage: object) -> bool:
        """Keeps a usage object; the last word wins, unless it says nothing. False for what is none."""
        if not isinstance(usage, dict) or not usage:
            return False
        reported = Reported.read(usage)
        if self.reported is None or reported.usage.prompt_tokens or reported.usage.completion_tokens:
            self.reported = reported
        return True


class Dialect(ABC):
    """One API shape."""

    name: ClassVar[str]
    paths: ClassVar[tuple[str, ...]]
    """Below /v1."""
    types: ClassVar[frozenset[str]]
    """Model types that may be asked for here."""
    units: ClassVar[frozenset[Unit]] = frozenset({"1K tokens"})
    """Units in which a model has to be priced to be asked for here."""
    money_keys: ClassVar[frozenset[str]] = frozenset({"model", "stream", "n", "service_tier"})
    """Keys of the body that decide money: once, at top level, in exact spelling."""
    maximum_fields: ClassVar[tuple[str, ...]] = ()
    """Body fields that limit the output."""
    asks_for_usage: ClassVar[bool] = False
    """Whether streams report usage only where `stream_options.include_usage` asks for it."""
    named_events: ClassVar[bool] = False
    """Whether the events of a stream have names, `error` among them, and no `[DONE]` ends it."""
    free: ClassVar[bool] = False
    """Whether a call costs nothing, whatever its model costs."""
    binary: ClassVar[bool] = False
    """Whether a success is no JSON, and its use is known from the request."""
    multipart: ClassVar[bool] = False
    """Whether a request is a form with files, not JSON."""
    anthropic: ClassVar[bool] = False
    """Whether errors come in Anthropic's envelope."""
    reader: ClassVar[type[StreamReader]] = StreamReader

    @abstractmethod
    def ask(self, body: Body) -> Ask:
        """What the body asks for. Raises InvalidRequest, UnsupportedState."""

    @abstractmethod
    def prompt(self, body: Body, model: str) -> Prompt:
        """What there is to count in the body."""

    def unpriced(self, body: Body) -> Iterator[str]:
        """Parameters that raise the upstream's price and have none in the table."""
        tier = body.get("service_tier")
        if tier is not None and tier not in ("auto", "default"):
            yield "service_tier"

    def answers_text(self, body: Body) -> bool:
        """Whether the body asks for an answer that is plain text instead of JSON."""
        return False

    def reported(self, answer: Answer) -> Reported | None:
        """The usage that a JSON answer reports."""
        for usage in (answer.head.usage, _inside(answer.head.x_groq)):
            if isinstance(usage, dict) and usage:
                return Reported.read(usage)
        return None

    @abstractmethod
    def output(self, answer: Body) -> Output:
        """What a JSON answer delivered."""

    def measure(self, usage: Usage, ask: Ask, answer: Answer) -> Usage:
        """Adds to a JSON answer's token usage what is not measured in tokens."""
        return usage

    def measure_stream(self, usage: Usage, ask: Ask, output: Output) -> Usage:
        """The same for a stream."""
        return usage

    def error_event(self, error: ApiError) -> bytes:
        """The last event of a stream that ends early."""
        if self.named_events:
            return sse.data_event(error_json(error, anthropic=True), name="error")
        return sse.data_event(error_json(error))

    @property
    def end_event(self) -> bytes:
        """What ends a stream of this dialect, if anything does."""
        return b"" if self.named_events else sse.DONE

    def check_priced(self, body: Body) -> None:
        """Raises UnsupportedParameter for what has no price."""
        for name in self.unpriced(body):
            raise UnsupportedParameter(
                f"{name!r} is not available here: it has no price.", param=name.split("[")[0]
            )


def decode(data: bytes) -> Any:
    """JSON of any quality: None where it is none, replacement characters where it is not UTF-8."""
    try:
        return msgspec.json.decode(data)
    except UNREADABLE:
        pass
    try:
        return json.loads(data.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return None


def _object_at(text: bytes, start: int) -> dict[str, Any] | None:
    """The JSON object after the colon that follows a key."""
    after = text[start:].lstrip()
    if not after.startswith(b":"):
        return None
    try:
        found, _ = json.JSONDecoder().raw_decode(after[1:].decode("utf-8", "replace").lstrip())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def required_text(body: Body, field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{field!r} is missing or not a string.", param=field)
    return value


def flag(body: Body, field: str) -> bool:
    value = body.get(field)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise InvalidRequest(f"{field!r} must be true or false.", param=field)


def whole(body: Body, field: str, *, least: int = 1, most: int) -> int | None:
    """An optional whole number of the body, within bounds."""
    value = body.get(field)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{field!r} must be a whole number.", param=field)
    if not least <= value <= most:
        raise InvalidRequest(f"{field!r} must be from {least} to {most}, not {value}.", param=field)
    return value


def maximum(body: Body, fields: Sequence[str]) -> tuple[int | None, tuple[str, ...]]:
    """The client's limit of the output (the largest, where several are set) and the fields that set it."""
    limits = {field: limit for field in fields if (limit := whole(body, field, most=MAX_TOKENS)) is not None}
    return max(limits.values(), default=None), tuple(limits)


def refuse_state(body: Body, fields: Sequence[str]) -> None:
    """Provider-side state would let one customer read another's through the operator's key."""
    for name in fields:
        if body.get(name):
            raise UnsupportedState(
                f"{name!r} is not available here: it refers to state kept at the provider.", param=name
            )


def refuse_references(value: object, names: frozenset[str], param: str) -> None:
    """The same for references anywhere inside a part of the body."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            for name in names:
                if isinstance(found.get(name), str | list) and found[name]:
                    raise UnsupportedState(
                        f"{name!r} is not available here: it refers to state kept at the provider. "
                        "Send the data instead.",
                        param=param,
                    )
            if found.get("type") == "item_reference":
                raise UnsupportedState(
                    "'item_reference' is not available here: it refers to state kept at the provider.",
                    param=param,
                )
            waiting += (inner for name, inner in found.items() if name not in _OWN_WORDS)
        elif isinstance(found, list):
            waiting += found


_OWN_WORDS = frozenset({"parameters", "input_schema", "schema", "input", "arguments"})
"""Where a client's own names stand: schemas and arguments of its functions."""


def hosted_tools(body: Body) -> Iterator[str]:
    """The tools that the provider runs itself, at a price of its own."""
    tools = body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else []):
        if isinstance(tool, dict) and tool.get("type", "function") not in ("function", "custom"):
            yield f"tools[{index}]"


_TEXT_FIELDS = ("transcript", "thinking", "refusal", "content", "text")
"""The last is read first."""


def texts_in(value: object) -> Iterator[str]:
    """Every text in a content of any shape: a string, or parts with text in them."""
    unread = [value]
    while unread:
        found = unread.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, list | tuple):
            unread.extend(reversed(found))
        elif isinstance(found, dict):
            unread.extend(found.get(name) for name in _TEXT_FIELDS)


def read_bare(output: Output, message: Mapping[str, Any]) -> None:
    """Text outside any choices, as in `{"value": "..."}`: an answer of an unknown shape is not free."""
    if "choices" in message or message.get("error"):
        return
    for name in ("text", "content", "value", "response"):
        for text in texts_in(message.get(name)):
            output.add((name,), text)


def _inside(value: object) -> object:
    return value.get("usage") if isinstance(value, dict) else None
