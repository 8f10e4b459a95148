"""A metered request's body: read within a limit, checked, and rewritten where metering needs it."""

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from . import multipart
from .codings import TooLarge, Undecodable, decoded
from .dialects import Dialect
from .dialects.base import UNREADABLE
from .errors import BodyTooLarge, InvalidRequest
from .meter import Metered
from .replies import Receive, Scope

_ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")
_decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The whole body in clear; None where the client left before its end.

    Raises BodyTooLarge, and InvalidRequest for a content coding that can't be undone.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit:
            raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        if part := message.get("body", b""):
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
        if not message.get("more_body", False):
            return _in_clear(scope, b"".join(parts), limit)


def _in_clear(scope: Scope, body: bytes, limit: int) -> bytes:
    coding = b",".join(value for name, value in scope["headers"] if name == b"content-encoding")
    if not coding:
        return body
    try:
        return decoded(body, coding, limit)
    except TooLarge:
        raise _too_large(limit) from None
    except Undecodable:
        raise InvalidRequest(
            "The body is not in its Content-Encoding; known are gzip, deflate, br and zstd."
        ) from None


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit} bytes.")


def content_type(scope: Scope) -> str:
    """What the body is said to be; empty where that is said twice or not at all."""
    found = [value for name, value in scope["headers"] if name == b"content-type"]
    return found[0].decode("latin-1") if len(found) == 1 else ""


def parse(body: bytes, dialect: Dialect, content_type: str = "") -> dict[str, Any]:
    """The body's object, or its form where the dialect takes forms.

    Raises InvalidRequest for what is none, and for keys that decide money said twice.
    An upstream may read the other one of two equal keys, or take `Model` for `model`.
    """
    if dialect.multipart:
        return _parse_form(body, dialect, content_type)
    try:
        parsed = msgspec.json.decode(body)
    except UNREADABLE:
        parsed = _parse_slowly(body)
    if not isinstance(parsed, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    for key in parsed:
        if key not in dialect.money_keys and key.strip().casefold() in dialect.money_keys:
            raise InvalidRequest(
                f"The key {key!r} must be spelled {key.strip().casefold()!r}.", param=key.strip().casefold()
            )
    if any(body.count(b'"%b"' % key.encode()) > 1 for key in dialect.money_keys if key in parsed) or (
        _ESCAPED_LETTER.search(body)
    ):
        _refuse_repeated(body, dialect)
    return parsed


def asks_in_their_place(metered: Metered) -> bool:
    """Whether the stream's usage has to be asked for, as the client did not."""
    ask = metered.quote.ask
    return ask.stream and metered.quote.dialect.asks_for_usage and not ask.wants_usage


def forwarded(
    body: bytes, metered: Metered, *, token_field: str, rewrite_model: bool, ask_for_usage: bool = True
) -> bytes:
    """The body as it goes on: as it came, but for what metering or the price table changes."""
    changes = _changes(metered, token_field, rewrite_model)
    if ask_for_usage and asks_in_their_place(metered):
        given = metered.quote.body.get("stream_options")
        changes["stream_options"] = {**(given if isinstance(given, Mapping) else {}), "include_usage": True}
    if not changes:
        return body
    given = metered.quote.body
    if isinstance(given, multipart.Form):
        return given.rewritten(body, changes)
    if any(name in given for name in changes) or not given:
        # Values that stay are kept byte for byte, spelling of numbers included.
        whole = {name: _encoded(value) for name, value in {**_raw(body, given), **changes}.items()}
        return b"{%b}" % b",".join(b"%b:%b" % (_encoded(name), value) for name, value in whole.items())
    added = _encoded(changes)
    return body.rstrip()[:-1] + b"," + added[1:]


def _parse_form(body: bytes, dialect: Dialect, content_type: str) -> multipart.Form:
    form = multipart.parse(body, content_type, dialect.money_keys)
    if (stream := form.get("stream")) in ("true", "false"):
        form["stream"] = stream == "true"
    return form


def _changes(metered: Metered, token_field: str, rewrite_model: bool) -> dict[str, object]:
    quote = metered.quote
    ask, dialect, changes = quote.ask, quote.dialect, dict[str, object]()
    if (lowered := metered.lowered_to) is not None:
        own = token_field if token_field in dialect.maximum_fields else dialect.maximum_fields[0]
        # Of several maximums the smaller ones stay.
        changes |= {
            name: lowered
            for name in ask.maximum_fields or (own,)
            if not _below(quote.body.get(name), lowered)
        }
    if rewrite_model and (target := quote.upstream_model) != ask.model:
        changes["model"] = target
    return changes


def _raw(body: bytes, given: Mapping[str, object]) -> Mapping[str, object]:
    try:
        return _decode_raw(body)
    except UNREADABLE:
        return given


def _below(given: object, limit: int) -> bool:
    return isinstance(given, int | float) and given < limit


def _encoded(value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (UnicodeEncodeError, OverflowError, RecursionError):
        # Lone surrogates and huge numbers came as JSON, so they can be written as such.
        return json.dumps(value, separators=(",", ":")).encode()


def _parse_slowly(body: bytes) -> Any:
    """JSON that msgspec refuses and others take: lone surrogates, huge numbers. NaN is no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        # As text: of bytes it would take UTF-16 too, in which no key is found twice.
        return json.loads(body.decode("utf-8-sig"), parse_constant=refuse)
    except (ValueError, RecursionError):
        raise InvalidRequest("The request body is not valid JSON.") from None


def _refuse_repeated(body: bytes, dialect: Dialect) -> None:
    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {"pairs": pairs}

    # The hook sees inner objects first, so only the last, outermost one is looked at.
    try:
        outermost = json.loads(body, object_pairs_hook=check)["pairs"]
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.") from None
    seen: set[str] = set()
    for key, _ in outermost:
        if key in seen and key in dialect.money_keys:
            raise InvalidRequest(f"The key {key!r} is there twice.", param=key)
        seen.add(key)
