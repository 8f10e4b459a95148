"""Streams of every line end and every cut, against a plain reading of the grammar, and hostile JSON."""

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmhub_meter import sse
from llmhub_meter.sse import DONE, EventSplitter, Piece, add_to_usage, data_event, data_of, name_of

BOM = b"\xef\xbb\xbf"
FIELDS = {"credits_used": "175", "credits_remaining": "94825.5"}

line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
lines = st.sampled_from(
    [
        *(b"data: a", b"data: a", b"event: b"),
        *(b"", b"", b"", b":", b": PROCESSING", b"data", b"data:", b"data: ", b"data:  x", b"data:[DONE]"),
        *(
            b"event: a",
            b"event:b",
            b"event",
            b"retry: 3000",
            b"id: 1",
            b"dat: a",
            b"data : b",
            b"database: c",
        ),
        *(b"data: \xe2\x82\xac", b"data: : keepalive", b'data: {"usage":{}}', b" data: d", BOM + b"data: e"),
    ]
)
grammatical = st.lists(st.tuples(lines, line_ends)).map(lambda pairs: b"".join(map(b"".join, pairs)))
streams = st.one_of(
    st.binary(),
    st.lists(st.sampled_from([b"\r", b"\n", b"data", b":", b" ", b"x", BOM])).map(b"".join),
    st.tuples(st.sampled_from([b"", BOM]), grammatical, st.sampled_from([b"", b"data: x", b"event"])).map(
        b"".join
    ),
)


@st.composite
def cut_streams(draw: st.DrawFn) -> list[bytes]:
    stream = draw(streams)
    cuts = draw(st.lists(st.integers(0, len(stream)), max_size=12))
    return [stream[start:end] for start, end in pairwise([0, *sorted(cuts), len(stream)])]


def split(chunks: Iterable[bytes], max_event_bytes: int = sse.MAX_EVENT_BYTES) -> list[bytes]:
    splitter = EventSplitter(max_event_bytes=max_event_bytes)
    events = [event for chunk in chunks for event in splitter.feed(chunk)]
    rest = splitter.rest()
    assert splitter.pending == 0
    return [*events, rest] if rest else events


def read(events: Iterable[bytes]) -> list[tuple[bytes | None, bytes]]:
    return [(name_of(event), data) for event in events if (data := data_of(event)) is not None]


def read_plainly(stream: bytes) -> list[tuple[bytes | None, bytes]]:
    """The grammar, line by line; an event that the stream ends in the middle of counts too."""
    found: list[tuple[bytes | None, bytes]] = []
    name: bytes | None = None
    data: list[bytes] = []
    for line in [*re.split(rb"\r\n|\n|\r", stream.removeprefix(BOM)), b""]:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
        elif not line:
            if data:
                found.append((name, b"\n".join(data)))
            name, data = None, []
    return found


@given(cut_streams())
@example([b"data: a\r\n\r", b"\ndata: b\r\n\r\n"])
@example([b"data: a\n\r", b"\n" + BOM + b"data: b\n\n"])
@example([b"data: a\r", b"\n\r", b"\n", b"data: b\n\n"])
def test_no_byte_is_lost_or_moved(chunks: list[bytes]) -> None:
    assert b"".join(split(chunks)) == b"".join(chunks)


@given(cut_streams().filter(lambda chunks: BOM not in b"".join(chunks)[1:]))
@example([b"data: a\r", b"\n\r", b"\n", b"data: b\n\n"])
def test_events_are_read_as_the_grammar_says(chunks: list[bytes]) -> None:
    assert read(split(chunks)) == read_plainly(b"".join(chunks))


@given(cut_streams(), st.integers(1, 12))
@example([b"data: a\r\n\r", b"\ndata: b\r\n\r\n"], 10)
@example([b"data: a\n\r", b"\n" + BOM + b"data: b\n\n"], 12)
@example([b"data: a\n\n", b"data: " + b"x" * 9, b"data: b\n\n", b"data: c\n\n"], 12)
@example([b"data: a\n\n", b"\ndata: b\n\n"], 9)
def test_what_is_read_does_not_depend_on_the_chunks(chunks: list[bytes], limit: int) -> None:
    whole = [b"".join(chunks)]
    assert read(split(chunks)) == read(split(whole))
    assert read(split(chunks, limit)) == read(split(whole, limit))


@given(cut_streams(), st.integers(1, 12))
def test_a_limit_changes_no_byte_and_bounds_what_waits(chunks: list[bytes], limit: int) -> None:
    splitter = EventSplitter(max_event_bytes=limit)
    given_on = b""
    for chunk in chunks:
        given_on += b"".join(splitter.feed(chunk))
        assert splitter.pending <= max(limit, 2)
    assert given_on + splitter.rest() == b"".join(chunks)


@given(cut_streams())
def test_an_event_is_given_as_soon_as_its_blank_line_begins(chunks: list[bytes]) -> None:
    splitter = EventSplitter()
    fed = b""
    for chunk in chunks:
        splitter.feed(chunk)
        fed += chunk
        waiting = fed[len(fed) - splitter.pending :]
        # An LF in front may be the second half of the blank line before.
        assert not re.search(rb"\n\n|\r\r|\n\r|\r\n\r", waiting)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_whole_events_pass_at_once_as_they_came(end: bytes) -> None:
    splitter = EventSplitter()
    for text in (b"data: a", b": PROCESSING", b"event: a" + end + b"data:b"):
        event = text + end + end
        given_on = splitter.feed(event)
        assert b"".join(given_on) == event
        assert given_on[-1].endswith(end)
        assert splitter.pending == 0
    assert splitter.feed(b"data: a" + end + end + b"data: b" + end + end) == [
        b"data: a" + end + end,
        b"data: b" + end + end,
    ]


def test_a_line_feed_that_comes_late_comes_alone() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: a\r\n\r") == [b"data: a\r\n\r"]
    assert splitter.feed(b"") == []
    assert splitter.feed(b"\ndata: b\n\n") == [b"\n", b"data: b\n\n"]


def test_the_end_gives_an_event_without_its_blank_line() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: a\n\ndata: b\n") == [b"data: a\n\n"]
    assert splitter.feed(b"data: c") == []
    assert splitter.pending == 15
    assert splitter.rest() == b"data: b\ndata: c"
    assert splitter.rest() == b""
    assert splitter.feed(b"data: c\n\ndata: d\r\r") == [b"data: c\n\n", b"data: d\r\r"]
    assert splitter.rest() == b""
    assert splitter.feed(b"\ndata: e\n\n") == [b"\ndata: e\n\n"]


LONG = b'data: {"x":"' + b"x" * 40 + b'data: [DONE]\ndata: {"usage":{}}\n\n'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 30, len(LONG) - 1, len(LONG), len(LONG) + 9])
def test_an_event_above_the_limit_passes_in_pieces_that_nobody_reads(size: int) -> None:
    stream = LONG + b"data: b\n\n"
    events = split([stream[start : start + size] for start in range(0, len(stream), size)], 32)
    assert b"".join(events) == stream
    assert events[-1] == b"data: b\n\n"
    assert data_of(events[-1]) == b"b"
    pieces = events[:-1]
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert all(data_of(piece) is None and name_of(piece) is None for piece in pieces)
    assert not any(sse.is_done(piece) or sse.has_usage(piece) for piece in pieces)
    assert [add_to_usage(piece, FIELDS) for piece in pieces] == pieces


def test_the_rest_of_an_event_above_the_limit_is_a_piece_too() -> None:
    splitter = EventSplitter(max_event_bytes=8)
    assert splitter.feed(b"data: 123") == [b"data: 123"]
    assert splitter.feed(b"\n") == splitter.feed(b"data: 4") == []
    rest = splitter.rest()
    assert rest == b"\ndata: 4"
    assert data_of(rest) is None
    assert data_of(splitter.feed(b"data:5\n\n")[0]) == b"5"


def test_a_piece_is_not_read_even_where_it_looks_like_an_event() -> None:
    piece = Piece(DONE)
    assert data_of(piece) is None
    assert not sse.is_done(piece)


def test_a_long_event_in_small_chunks_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting:
        searched = 0

        def search(self, text: bytes | bytearray, position: int) -> re.Match[bytes] | None:
            Counting.searched += len(text) - position
            return border.search(text, position)

    border = sse._BORDER
    monkeypatch.setattr(sse, "_BORDER", Counting())
    event = b"data: " + b"x" * 200_000 + b"\n\n"
    splitter = EventSplitter()
    assert [found for byte in event for found in splitter.feed(bytes([byte]))] == [event]
    assert len(event) <= Counting.searched <= 4 * len(event)


@pytest.mark.parametrize(
    ("event", "data", "name"),
    [
        (b"data: a\n\n", b"a", None),
        (b"data:a\n\n", b"a", None),
        (b"data:  a\n\n", b" a", None),
        (b"data: a\r\n\r\n", b"a", None),
        (b"data: a\r\r", b"a", None),
        (b"data: a\r\n\n", b"a", None),
        (b"data: a", b"a", None),
        (b"data: a\nx", b"a", None),
        (BOM + b"data: a\n\n", b"a", None),
        (b"\ndata: a\n\n", b"a", None),
        (b"data: a\ndata:b\rdata\r\ndata: c\n\n", b"a\nb\n\nc", None),
        (b"data:\n\n", b"", None),
        (b"data: \n\n", b"", None),
        (b"data\n\n", b"", None),
        (b"event: first\nevent: last\ndata: a\n\n", b"a", b"last"),
        (b"data: a\nevent:b\n\n", b"a", b"b"),
        (b"event: b\ndata: a\n\n", b"a", b"b"),
        (b"event: b\ndata: a\r\n\n", b"a", b"b"),
        (b"event: b\rdata: a\ndata: c\n\n", b"a\nc", b"b"),
        (b"event: b\ndata: a\ndata: c\n\n", b"a\nc", b"b"),
        (b"data:a\ndata: b\n\n", b"a\nb", None),
        (b"event: ping\n\n", None, b"ping"),
        (b": comment\n\n", None, None),
        (b":\n\n", None, None),
        (b"retry: 3000\n\n", None, None),
        (b" data: a\n\n", None, None),
        (b"Data: a\n\n", None, None),
        (b"\n\n", None, None),
        (b"", None, None),
    ],
)
def test_fields_are_read(event: bytes, data: bytes | None, name: bytes | None) -> None:
    assert data_of(event) == data
    assert name_of(event) == name


def test_done_is_recognised() -> None:
    for done in (
        DONE,
        b"data:[DONE]\r\n\r\n",
        b"data: [DONE] \n\n",
        b"data:  [DONE]",
        b": x\ndata: [DONE]\n\n",
    ):
        assert sse.is_done(done), done
    for other in (b": [DONE]\n\n", b"event: [DONE]\n\n", b'data: {"x":"[DONE]"}\n\n', b"data: DONE\n\n", b""):
        assert not sse.is_done(other), other


@given(st.binary(), st.sampled_from([None, "error"]))
@example(b'{"a":\r\n1,\r"b":\n2}', "error")
def test_written_data_are_read_back_with_their_lines(data: bytes, name: str | None) -> None:
    event = data_event(data, name=name)
    assert split([event]) == [event]
    assert data_of(event) == data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert name_of(event) == (name.encode() if name else None)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("a\n\ndata: b")
def test_a_comment_is_never_read(text: str) -> None:
    event = sse.comment(text)
    assert split([event]) == [event]
    assert data_of(event) is None and name_of(event) is None


def test_a_comment_is_one_line() -> None:
    assert sse.comment("credits used=175") == b": credits used=175\n\n"


texts = st.text(max_size=8) | st.sampled_from(
    ["usage", '"usage": {"a": 1}', "x\\", "}", "{", ",", "\r\n", "€"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
usages = st.dictionaries(texts | st.sampled_from([*FIELDS, "prompt_tokens"]), values, max_size=5)


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    before, after = draw(st.dictionaries(texts, values, max_size=3)), draw(usages)
    return {**before, "usage": draw(usages), **{name: after[name] for name in after if name != "usage"}}


@st.composite
def usage_events(draw: st.DrawFn) -> bytes:
    """A message's event: in one line or over several, with other fields around, any line ends."""
    indent = draw(st.sampled_from([None, None, 0, 2]))
    separators = draw(st.sampled_from([None, (",", ":"), (" , ", " : ")]))
    text = json.dumps(
        draw(messages()), indent=indent, separators=separators, ensure_ascii=draw(st.booleans())
    ).encode("utf-8", "surrogatepass")
    event = data_event(text, name=draw(st.sampled_from([None, 'a "quoted {name'])))
    event = draw(st.sampled_from([b"", b': "open {\n', BOM])) + event
    if draw(st.booleans()):
        event = event.replace(b"data: ", b"data:")
    return event.replace(b"\n", draw(line_ends))


def load(event: bytes) -> Any:
    """The message of an event, in a form in which NaN equals itself and order counts."""
    data = data_of(event)
    assert data is not None
    return json.loads(data.decode("utf-8", "replace"), object_pairs_hook=Members, parse_constant=str)


class Members(list[tuple[str, Any]]):
    """An object's members in order."""


@given(usage_events())
def test_fields_come_last_in_the_usage_and_all_else_stays(event: bytes) -> None:
    expected = Members(
        (
            name,
            Members([*(pair for pair in value if pair[0] not in FIELDS), *FIELDS.items()])
            if name == "usage"
            else value,
        )
        for name, value in load(event)
    )
    changed = add_to_usage(event, FIELDS)
    assert load(changed) == expected
    assert re.findall(rb"[\r\n]+", changed) == re.findall(rb"[\r\n]+", event)


ADDED = b'"credits_used":"175","credits_remaining":"94825.5"'


@pytest.mark.parametrize(
    ("event", "changed"),
    [
        (b'data: {"usage":{"a":1}}\n\n', b'data: {"usage":{"a":1,@}}\n\n'),
        (b'data:{"usage":{"a":1}}\r\n\r\n', b'data:{"usage":{"a":1,@}}\r\n\r\n'),
        (b'data: {"usage" : { "a" : 1 } }', b'data: {"usage" : { "a" : 1 ,@} }'),
        (b'data: {"usage":{}}\n\n', b'data: {"usage":{@}}\n\n'),
        (b'data: {"usage":{ }}\n\n', b'data: {"usage":{ @}}\n\n'),
        (BOM + b'data: {"usage":{}}\n\n', BOM + b'data: {"usage":{@}}\n\n'),
        (b'data: {"a":{"usage":{}},"usage":{}}\n\n', b'data: {"a":{"usage":{}},"usage":{@}}\n\n'),
        (b'data: {"a":"\\"usage\\":{}","usage":{}}', b'data: {"a":"\\"usage\\":{}","usage":{@}}'),
        (b'data: {"a":"usage","usage":{"b":{"c":{}}}}', b'data: {"a":"usage","usage":{"b":{"c":{}},@}}'),
        (b'data: {"a\\\\":"\\\\","usage":{}}', b'data: {"a\\\\":"\\\\","usage":{@}}'),
        (b'data: {"usage":{"usage":{}},"z":[{}]}', b'data: {"usage":{"usage":{},@},"z":[{}]}'),
        (b'data: {"\\u0075sage":{}}\n\n', b'data: {"\\u0075sage":{@}}\n\n'),
        (b'data: {"usage":{"a":1},"usage":{"a":2}}', b'data: {"usage":{"a":1},"usage":{"a":2,@}}'),
        (b'data: {"usage":null,"usage":{}}\n\n', b'data: {"usage":null,"usage":{@}}\n\n'),
        (b'data: {"a":"\xff","usage":{}}\n\n', b'data: {"a":"\xff","usage":{@}}\n\n'),
        (b'data: {"a":NaN,"usage":{}}\n\n', b'data: {"a":NaN,"usage":{@}}\n\n'),
        (b'data: {"usage":{"credits_used":0}}\n\n', b'data: {"usage":{@}}\n\n'),
        (b'data: {"usage":{"credits_used":0,"a":1}}', b'data: {"usage":{"a":1,@}}'),
        (b'data: {"usage":{"a":1,"credits_used":[{},2]}}', b'data: {"usage":{"a":1,@}}'),
        (
            b'data: {"usage":{"credits_used":0,"a":1,"credits_used":"x","credits_remaining":{"b":1}}}',
            b'data: {"usage":{"a":1,@}}',
        ),
        (
            b'data: {\r\nid: 7\r\ndata: "usage": {\r\n: "{\r\ndata: "a": 1\r\ndata: }}\r\n\r\n',
            b'data: {\r\nid: 7\r\ndata: "usage": {\r\n: "{\r\ndata: "a": 1\r\ndata: ,@}}\r\n\r\n',
        ),
        (
            b'data: {"usage":{"a":1,"credits_used":\nid: 7\ndata: 2}}\n\n',
            b'data: {"usage":{"a":1,\nid: 7\ndata: @}}\n\n',
        ),
    ],
)
def test_only_the_fields_are_added(event: bytes, changed: bytes) -> None:
    assert add_to_usage(event, FIELDS) == changed.replace(b"@", ADDED)


@pytest.mark.parametrize(
    "event",
    [
        *(b"", b": x\n\n", DONE, b"data: \n\n", b"data: x\n\n", b"data: []\n\n", b'data: "usage"\n\n'),
        *(b'data: {"usage":null}\n\n', b'data: {"usage":[{}]}\n\n', b'data: {"usage":"{}"}\n\n'),
        *(b'data: [{"usage":{}}]\n\n', b'data: {"a":{"usage":{}}}\n\n', b'data: {"Usage":{}}\n\n'),
        *(b'data: {"usage":{}\n\n', b'data: {"usage":{}}}\n\n', b'data: {"usage":{},}\n\n'),
        *(b'data: {"usage":{}} {}\n\n', b'data: {"usage" {}}\n\n', b'data: {"a\n"usage":{}}\n\n'),
        *(
            b'data: \xef\xbb\xbf{"usage":{}}',
            b'data: {"usage":{},"usage":null}\n\n',
            b'event: {"usage":{}}\n\n',
            b'{"usage":{}}\n\n',
        ),
        b'data: {"a":"\\"usage\\":{\\"b\\":1}","usage":1}\n\n',
        b'data: {"a":' + b"[" * 200_000 + b"]" * 200_000 + b',"usage":{}}\n\n',
        b'data: {"a":' + b"1" * 5_000 + b',"usage":{}}\n\n',
    ],
    ids=lambda event: event[:40],
)
def test_an_event_without_a_usage_object_stays(event: bytes) -> None:
    assert add_to_usage(event, FIELDS) == event


def test_values_are_written_as_json_strings() -> None:
    changed = add_to_usage(b'data: {"usage":{}}\n\n', {'a"b': 'c"\\\n€', "d": ""})
    assert split([changed]) == [changed]
    assert json.loads(data_of(changed) or b"") == {"usage": {'a"b': 'c"\\\n€', "d": ""}}
    assert add_to_usage(b'data: {"usage":{}}\n\n', {}) == b'data: {"usage":{}}\n\n'


fragments = st.sampled_from(
    [*(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b" ", b"1", b'"usage"', b'"a"', b"data:", b"event:")]
    + [*(b'"usage":{', b"data: {", b"\n", b"\r\n", b"\r", b"\xff", BOM, b"[DONE]", b"null", b"\x00")]
)


@given(st.binary() | st.lists(fragments, max_size=24).map(b"".join))
def test_no_junk_raises(junk: bytes) -> None:
    for event in (junk, b"data: " + junk):
        data = data_of(event)
        name_of(event)
        assert not sse.is_done(event) or data is not None and b"[DONE]" in data
        assert sse.has_usage(event) == (b'"usage"' in event)
        if add_to_usage(event, FIELDS) != event:
            assert data is not None
            assert isinstance(json.loads(data.decode("utf-8", "replace"))["usage"], dict)
