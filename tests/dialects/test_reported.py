"""Usage objects of every shape and quality, and what the public faults' cost on the reference card."""

import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import pytest
from hub import MODELS, chunk
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmhub_meter import dialects
from llmhub_meter.config import parse_models
from llmhub_meter.dialects import Answer, Ask, Output, Reported, StreamReader
from llmhub_meter.dialects.base import Dialect
from llmhub_meter.dialects.reported import MAX_COUNT
from llmhub_meter.money import ticks
from llmhub_meter.pricing import PriceTable
from llmhub_meter.sse import DONE, EventSplitter, data_event
from llmhub_meter.types import Usage

CARD = {**MODELS, "m-nocache": {"type": "chat", "input_per_1k": 30, "output_per_1k": 120}}
TABLE = PriceTable.from_config(parse_models(CARD, "test"))
# A busy machine draws nested values slowly at first.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
USAGE = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}


def dialect(path: str) -> Dialect:
    found = dialects.find("/v1" + path)
    assert found is not None
    return found


CHAT, COMPLETIONS = dialect("/chat/completions"), dialect("/completions")
EMBEDDINGS, IMAGES = dialect("/embeddings"), dialect("/images/generations")


def read(usage: dict[str, Any], of: Dialect = CHAT) -> Reported:
    """As it is read out of a JSON answer."""
    reported = of.reported(Answer(json.dumps({"usage": usage}).encode()))
    assert reported is not None
    return reported


def stream(*pieces: bytes, of: Dialect = CHAT) -> StreamReader:
    reader, splitter = of.reader(Ask("m", stream=True)), EventSplitter()
    for piece in pieces:
        for event in splitter.feed(piece):
            reader.read(event)
    reader.read(splitter.rest())
    return reader


def cost(usage: Usage, model: str = "m-chat") -> int:
    found = TABLE.find(model)
    assert found is not None
    return found.charge(usage).amount


# --- any value ---

NAMES = [
    *("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens"),
    *("prompt_tokens_details", "completion_tokens_details", "input_tokens_details", "output_tokens_details"),
    *("cached_tokens", "cache_write_tokens", "audio_tokens", "image_tokens", "reasoning_tokens"),
    *("prompt_cache_hit_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "usage", "x_groq"),
]
numbers = (
    st.integers(-5, 30) | st.integers() | st.floats() | st.sampled_from([1e400, MAX_COUNT, MAX_COUNT + 1])
)
scalars = (
    st.none()
    | st.booleans()
    | numbers
    | st.text(max_size=5)
    | st.sampled_from(["7", " 12 ", "-1", "٣", "1e3"])
)
keys = st.sampled_from(NAMES) | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=6),
    max_leaves=12,
)
counts = st.none() | st.integers(0, 40) | scalars
usages = st.fixed_dictionaries(
    {},
    optional={name: counts for name in NAMES if not name.endswith("_details")}
    | {name: st.dictionaries(st.sampled_from(NAMES), counts) for name in NAMES if name.endswith("_details")},
)
objects = usages | st.dictionaries(keys, values, max_size=8)


def check(usage: Usage) -> None:
    for field in fields(usage):
        value = getattr(usage, field.name)
        assert value is None or value >= 0
    for part in (usage.cached_tokens, usage.cache_write_tokens):
        assert part <= usage.prompt_tokens
    assert usage.cached_tokens + usage.cache_write_tokens <= usage.prompt_tokens
    assert max(usage.audio_prompt_tokens, usage.image_prompt_tokens) <= usage.prompt_tokens
    assert max(usage.reasoning_tokens, usage.audio_completion_tokens) <= usage.completion_tokens


@patient
@given(objects)
@example({"prompt_tokens": 5, "cached_tokens": 3, "cache_write_tokens": 3})
@example({"input_tokens": 1, "cache_read_input_tokens": MAX_COUNT, "cache_creation_input_tokens": MAX_COUNT})
def test_no_usage_raises_and_details_stay_in_their_totals(usage: dict[str, Any]) -> None:
    reported = Reported.read(usage)
    check(reported.usage)
    for model in ("m-chat", "m-embed", "m-imgtok"):
        assert cost(reported.usage, model) >= 0


@patient
@given(usages)
def test_what_is_certain_is_never_charged_less(usage: dict[str, Any]) -> None:
    reported = Reported.read(usage)
    for name, known, total in (
        ("prompt_tokens", reported.prompt_known, reported.usage.prompt_tokens),
        ("completion_tokens", reported.completion_known, reported.usage.completion_tokens),
    ):
        stated = usage.get(name)
        if known and type(stated) is int and 0 <= stated <= MAX_COUNT:
            assert total >= stated


@patient
@given(
    values
    | st.dictionaries(st.sampled_from(["usage", "x_groq", "model", "error", "choices", "data"]), values)
)
def test_no_answer_and_no_event_raises(answer: Any) -> None:
    body = json.dumps(answer).encode()
    for each in dialects.DIALECTS:
        read_answer = Answer(body)
        reported = each.reported(read_answer)
        assert reported is None or isinstance(reported, Reported)
        assert isinstance(each.output(read_answer.full), Output)
        if each is not EMBEDDINGS:
            reader = each.reader(Ask("m", stream=True))
            assert reader.read(data_event(body)) in ("pass", "usage", "done")
            assert reader.readable == isinstance(answer, dict)


@patient
@given(st.binary())
@example(b'{"usage":' + b"[" * 100_000)
@example(b"\xff{}")
def test_no_bytes_raise(junk: bytes) -> None:
    for body in (junk, b'{"usage":' + junk):
        answer, tail = Answer(body), Answer.of_tail(body)
        for each in dialects.DIALECTS:
            each.reported(answer)
            each.reported(tail)
            each.output(answer.full)
        stream(b"data: " + body + b"\n\n")


# --- counts ---


@pytest.mark.parametrize("spelling", [1000, "1000", " 1000 ", 1000.0, 1e3])
def test_integral_spellings_are_counts(spelling: object) -> None:
    reported = read({"prompt_tokens": spelling, "completion_tokens": 0})
    assert (reported.usage.prompt_tokens, reported.prompt_known, reported.usage.invalid) == (
        1000,
        True,
        False,
    )


NONSENSE = [
    *(True, False, "", "x", "1e3", "12.5", "0x10", "-1", "1_000", "٣", "9" * 16, "1" * 5000),
    *(float("nan"), float("inf"), 1e400, -1, -0.5, 0.5, MAX_COUNT + 1, 10**30, {}, {"n": 1}, [], [5]),
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=lambda value: repr(value)[:20])
def test_nonsense_makes_its_part_unknown(nonsense: object) -> None:
    prompt = read({"prompt_tokens": nonsense, "completion_tokens": 500, "total_tokens": 1500})
    assert (prompt.prompt_known, prompt.completion_known, prompt.usage.invalid) == (False, True, True)
    assert prompt.usage.completion_tokens == 500
    completion = read({"prompt_tokens": 1000, "completion_tokens": nonsense, "total_tokens": 1500})
    assert (completion.prompt_known, completion.completion_known, completion.usage.invalid) == (
        True,
        False,
        True,
    )
    assert completion.usage.prompt_tokens == 1000


@pytest.mark.parametrize("nonsense", NONSENSE, ids=lambda value: repr(value)[:20])
def test_a_nonsense_detail_is_dropped(nonsense: object) -> None:
    reported = read({**USAGE, "prompt_tokens_details": {"cached_tokens": nonsense, "audio_tokens": 7}})
    assert reported.usage == Usage(1000, 500, audio_prompt_tokens=7, invalid=True)
    assert reported.prompt_known and reported.completion_known


def test_a_usage_inside_x_groq_is_the_second_choice() -> None:
    inside = {"x_groq": {"usage": USAGE}}
    for answer in (
        inside,
        {"usage": None, **inside},
        {"usage": USAGE, "x_groq": {"usage": {"prompt_tokens": 1}}},
    ):
        assert CHAT.reported(Answer(json.dumps(answer).encode())) == Reported(Usage(1000, 500), True, True)
    assert CHAT.reported(Answer(b'{"x_groq":{"id":"req_1"}}')) is None


def test_one_good_spelling_of_two_is_enough() -> None:
    reported = read({"prompt_tokens": True, "input_tokens": 7, "output_tokens": 5})
    assert (reported.usage.prompt_tokens, reported.prompt_known) == (7, True)


@pytest.mark.parametrize("raw", [b"1e400", b"-1e400", b"NaN", b"Infinity", b"1" + b"0" * 400])
def test_numbers_beyond_json_are_nonsense(raw: bytes) -> None:
    body = b'{"usage":{"prompt_tokens":%b,"completion_tokens":500}}' % raw
    for reported in (CHAT.reported(Answer(body)), stream(b"data: " + body + b"\n\n").reported):
        assert reported is not None
        assert (reported.prompt_known, reported.usage) == (False, Usage(0, 500, invalid=True))


@pytest.mark.parametrize("usage", [None, {}, [], "x", 7, True, [{"prompt_tokens": 1}]])
def test_what_is_no_usage_object_reports_nothing(usage: object) -> None:
    assert CHAT.reported(Answer(json.dumps({"usage": usage}).encode())) is None
    assert stream(chunk("x", usage=usage)).reported is None


# --- totals and details ---


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        # Thinking that only the total shows, and reasoning beside the completion that it explains.
        (
            {"prompt_tokens": 35, "completion_tokens": 12, "total_tokens": 109},
            Usage(35, 74, reasoning_tokens=62),
        ),
        (
            {
                "prompt_tokens": 32,
                "completion_tokens": 9,
                "total_tokens": 241,
                "completion_tokens_details": {"reasoning_tokens": 200},
            },
            Usage(32, 209, reasoning_tokens=200),
        ),
        # Cached parts inside the prompt, by their several names.
        ({**USAGE, "prompt_cache_hit_tokens": 640}, Usage(1000, 500, cached_tokens=640)),
        ({**USAGE, "cached_tokens": 640}, Usage(1000, 500, cached_tokens=640)),
        ({**USAGE, "cache_read_input_tokens": 640}, Usage(1000, 500, cached_tokens=640)),
        (
            {**USAGE, "prompt_tokens_details": {"cached_tokens": 640}, "prompt_cache_hit_tokens": 640},
            Usage(1000, 500, cached_tokens=640),
        ),
        (
            {**USAGE, "prompt_tokens_details": {"cached_tokens": 600, "cache_write_tokens": 400}},
            Usage(1000, 500, cached_tokens=600, cache_write_tokens=400),
        ),
        # Apart from the input: so named, or explained by the total.
        (
            {"input_tokens": 3, "cache_creation_input_tokens": 12304, "output_tokens": 550},
            Usage(12307, 550, cache_write_tokens=12304),
        ),
        (
            {"input_tokens": 2000, "cache_read_input_tokens": 1000, "output_tokens": 5},
            Usage(3000, 5, cached_tokens=1000),
        ),
        (
            {"input_tokens": 2000, "cache_read_input_tokens": 1000, "output_tokens": 5, "total_tokens": 2005},
            Usage(2000, 5, cached_tokens=1000),
        ),
        (
            {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115, "cached_tokens": 100},
            Usage(110, 5, cached_tokens=100),
        ),
        # Larger than their whole, and nothing explains it: charged as the plain kind.
        ({**USAGE, "prompt_tokens_details": {"cached_tokens": 1001}}, Usage(1000, 500, invalid=True)),
        (
            {**USAGE, "prompt_tokens_details": {"cached_tokens": 600, "cache_write_tokens": 401}},
            Usage(1000, 500, cached_tokens=600, invalid=True),
        ),
        ({**USAGE, "completion_tokens_details": {"reasoning_tokens": 501}}, Usage(1000, 500, invalid=True)),
        # Media.
        (
            {**USAGE, "input_tokens_details": {"audio_tokens": 3, "image_tokens": 4}},
            Usage(1000, 500, audio_prompt_tokens=3, image_prompt_tokens=4),
        ),
        (
            {**USAGE, "completion_tokens_details": {"audio_tokens": 9}},
            Usage(1000, 500, audio_completion_tokens=9),
        ),
        # A missing part is what the total leaves for it.
        ({"prompt_tokens": 7}, Usage(7, 0)),
        ({"total_tokens": 7}, Usage(7, 0)),
        ({"prompt_tokens": 7, "total_tokens": 9}, Usage(7, 2)),
        ({"completion_tokens": 12, "total_tokens": 1012}, Usage(1000, 12)),
        ({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 2}, Usage(7, 3)),
    ],
)
def test_details_are_parts_of_their_totals(usage: dict[str, Any], expected: Usage) -> None:
    reported = read(usage)
    assert reported == Reported(expected, True, True)
    check(reported.usage)


@pytest.mark.parametrize(
    ("usage", "prompt_known", "completion_known"),
    [
        ({"completion_tokens": 12}, False, True),
        ({"completion_tokens": 12, "total_tokens": 12}, False, True),
        ({"queue_time": 0.01}, False, False),
        ({"total_tokens": "x"}, False, False),
    ],
)
def test_a_part_that_nothing_tells_is_unknown(
    usage: dict[str, Any], prompt_known: bool, completion_known: bool
) -> None:
    reported = read(usage)
    assert (reported.prompt_known, reported.completion_known) == (prompt_known, completion_known)


# --- the public faults, on the reference card ---

CACHED = {
    "prompt_tokens": 2006,
    "completion_tokens": 300,
    "total_tokens": 2306,
    "prompt_tokens_details": {"cached_tokens": 1920},
}


@pytest.mark.parametrize(
    ("of", "model", "usage", "charge"),
    [
        pytest.param(CHAT, "m-chat", CACHED, "44.34", id="79 cached tokens at their own price"),
        pytest.param(CHAT, "m-nocache", CACHED, "96.18", id="83 no cached price is the input price"),
        pytest.param(
            CHAT,
            "m-chat",
            {"input_tokens": 30000, "input_tokens_details": {"cached_tokens": 27136}, "output_tokens": 200},
            "191.328",
            id="85 cached tokens by their other name",
        ),
        pytest.param(
            CHAT,
            "m-chat",
            {
                "prompt_tokens": 64,
                "completion_tokens": 135,
                "total_tokens": 199,
                "completion_tokens_details": {"reasoning_tokens": 78},
            },
            "18.12",
            id="88 reasoning inside the completion",
        ),
        pytest.param(
            CHAT,
            "m-chat",
            {"prompt_tokens": 1000, "completion_tokens": 1500},
            "210",
            id="98 n choices are summed already",
        ),
        pytest.param(
            CHAT,
            "m-chat",
            {"prompt_tokens": 0, "completion_tokens": 12, "total_tokens": 12},
            "1.44",
            id="99 a prompt of 0 as reported",
        ),
        pytest.param(
            CHAT,
            "m-chat",
            {
                "prompt_tokens": "1000",
                "completion_tokens": 500.0,
                "cost": 0,
                "is_byok": True,
                "cost_details": {"upstream_inference_cost": 0.01},
            },
            "90",
            id="105 strings and floats; their cost is not our price",
        ),
        pytest.param(
            EMBEDDINGS,
            "m-embed",
            {"prompt_tokens": 3000, "total_tokens": 3000},
            "6",
            id="108 109 an input alone",
        ),
        pytest.param(EMBEDDINGS, "m-embed", {"total_tokens": 3000}, "6", id="108 a total alone"),
        pytest.param(
            EMBEDDINGS,
            "m-embed",
            {"prompt_tokens": 3, "total_tokens": 0},
            "0.006",
            id="110 parts beat a smaller total",
        ),
        pytest.param(
            IMAGES,
            "m-imgtok",
            {
                "input_tokens": 150,
                "input_tokens_details": {"text_tokens": 150, "image_tokens": 0},
                "output_tokens": 8000,
                "total_tokens": 8150,
            },
            "24075",
            id="111 image tokens at their own price",
        ),
    ],
)
def test_a_reported_usage_costs_what_it_should(
    of: Dialect, model: str, usage: dict[str, Any], charge: str
) -> None:
    reported = read(usage, of)
    assert cost(reported.usage, model) == ticks(charge)
    assert not reported.usage.invalid
    assert reported.prompt_known and reported.completion_known


def test_images_are_charged_as_many_as_came_back() -> None:
    """Faults 113 and 114."""
    ask = IMAGES.ask({"model": "m-img", "prompt": "x", "n": 3, "size": "1024x1024", "quality": "hd"})
    for data, charge in (([{"b64_json": ""}, {"url": "u"}], 16_000), ([], 0), (None, 0)):
        answer = Answer(json.dumps({"created": 1, "data": data}).encode())
        assert IMAGES.reported(answer) is None
        assert IMAGES.output(answer.full).seen == bool(data)
        assert cost(IMAGES.measure(Usage(), ask, answer), "m-img") == ticks(charge)


def test_streamed_images_are_counted_when_complete() -> None:
    ask = IMAGES.ask({"model": "m-img", "stream": True})
    partial = {"type": "image_generation.partial_image", "b64_json": "", "partial_image_index": 0}
    completed = {"type": "image_generation.completed", "b64_json": "", "usage": USAGE}
    reader = stream(
        *(data_event(json.dumps(each).encode()) for each in (partial, partial, completed)), of=IMAGES
    )
    assert IMAGES.measure_stream(Usage(), ask, reader.output).images == 1
    assert reader.reported == Reported(Usage(1000, 500), True, True)
    failed = stream(data_event(b'{"type":"error","error":{"code":"moderation_blocked"}}'), of=IMAGES)
    assert failed.failed and not failed.output.seen and failed.reported is None


LAST = chunk(usage=USAGE)
NULL = chunk("x", usage=None)


def groq(**more: Any) -> bytes:
    choice = {"delta": {}, "finish_reason": "stop", "index": 0}
    inner = {"id": "req_1", "usage": {**USAGE, "queue_time": 0.01}}
    return data_event(json.dumps({"choices": [choice], "x_groq": inner, **more}).encode())


FILTER = data_event(
    b'{"choices":[],"model":"","object":"","prompt_filter_results":[{"prompt_index":0,"content_filter_results":{}}]}'
)


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([chunk("x"), groq(), DONE], id="91 usage inside x_groq"),
        pytest.param([groq(usage=USAGE), LAST, DONE], id="91 both are one"),
        pytest.param([NULL, NULL, LAST, DONE], id="94 null in every chunk and empty choices"),
        pytest.param(
            [chunk("x"), chunk("x", usage=USAGE), NULL, chunk("x"), DONE], id="96 usage in the middle"
        ),
        pytest.param([LAST, chunk(usage={"prompt_tokens": 0, "completion_tokens": 0})], id="96 then zeros"),
        pytest.param([LAST, chunk(usage={})], id="96 then an empty one"),
        pytest.param([FILTER, NULL, LAST, DONE], id="97 filter results first"),
        pytest.param([LAST, FILTER, DONE], id="97 filter results last"),
        pytest.param([LAST.replace(b"data: ", b"data:"), b"data:[DONE]\n\n"], id="120 no space"),
        pytest.param([LAST.replace(b"\n", b"\r\n"), DONE.replace(b"\n", b"\r\n")], id="121 CR LF"),
        pytest.param([chunk("x").replace(b"\n", b"\r"), LAST.replace(b"\n", b"\r")], id="122 CR"),
        pytest.param([b"\xef\xbb\xbf" + chunk("€"), LAST], id="123 BOM"),
        pytest.param([LAST.replace(b'"usage"', b'"a": "\xe2\x82\xac",\ndata: "usage"')], id="124 lines, 123"),
        pytest.param(
            [b": PROCESSING\n\n:\n\ndata: : keepalive\n\ndata:\n\nevent: ping\n\nretry: 3000\n\n", LAST],
            id="125 comments",
        ),
        pytest.param([LAST.removesuffix(b"\n\n")], id="the stream ends without a blank line"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 10_000])
def test_a_stream_costs_its_one_usage(events: Iterable[bytes], size: int) -> None:
    whole = b"".join(events)
    reader = stream(*(whole[start : start + size] for start in range(0, len(whole), size)))
    assert reader.reported == Reported(Usage(1000, 500), True, True)
    assert cost(reader.reported.usage) == ticks(90)
    assert not reader.failed


def test_running_totals_are_not_summed() -> None:
    """Fault 92."""
    chunks = [
        chunk("x", usage={"prompt_tokens": 6179, "completion_tokens": count, "total_tokens": 6179 + count})
        for count in range(1, 223)
    ]
    reported = stream(*chunks, DONE).reported
    assert reported is not None
    assert cost(reported.usage) == ticks("212.01")


def test_only_a_usage_in_a_chunk_without_choices_is_a_usage_chunk() -> None:
    reader = CHAT.reader(Ask("m", stream=True))
    events = [FILTER, chunk("x", usage=USAGE), groq(), NULL, LAST, chunk(usage=None), DONE]
    kinds = ["pass", "pass", "pass", "pass", "usage", "pass", "done"]
    assert [reader.read(event) for event in events] == kinds


# --- what was delivered, where nothing is reported ---


@pytest.mark.parametrize(
    ("of", "wrap"),
    [
        (CHAT, lambda text: {"choices": [{"message": {"content": text}}]}),
        (CHAT, lambda text: {"choices": [{"message": {"content": [{"type": "text", "text": text}]}}]}),
        (CHAT, lambda text: {"choices": [{"message": {"refusal": text}}]}),
        (CHAT, lambda text: {"choices": [{"message": {"reasoning_content": text}}]}),
        (CHAT, lambda text: {"choices": [{"message": {"function_call": {"arguments": text}}}]}),
        (CHAT, lambda text: {"choices": [{"message": {"tool_calls": [{"function": {"arguments": text}}]}}]}),
        (COMPLETIONS, lambda text: {"choices": [{"text": text}]}),
        (CHAT, lambda text: {"value": text}),
        (COMPLETIONS, lambda text: {"content": text}),
    ],
)
def test_delivered_text_is_found_in_answers_and_events(
    of: Dialect, wrap: Callable[[str], dict[str, Any]]
) -> None:
    answer = wrap("some text")
    assert of.output(answer).pieces() == ("some text",)
    events = [data_event(json.dumps(wrap(text)).encode()) for text in ("some", " text")]
    reader = stream(*events, of=of)
    assert reader.output.pieces() == ("some text",)
    assert reader.output.seen
    assert reader.output.fresh_bytes == len("some text")


@pytest.mark.parametrize("error", [{"message": "m"}, "overloaded", {"content": "x"}])
def test_an_error_under_200_delivers_nothing(error: object) -> None:
    body = {"error": error, "content": "the prompt was filtered"}
    reader = stream(data_event(json.dumps(body).encode()))
    assert reader.failed and not reader.output.seen and reader.reported is None
    for each in (CHAT, COMPLETIONS, EMBEDDINGS, IMAGES):
        assert not each.output(body).seen
        assert each.reported(Answer(json.dumps(body).encode())) is None


def test_an_error_event_that_carries_usage_reports_it() -> None:
    reader = stream(chunk("x"), chunk(usage=USAGE, error={"message": "m"}))
    assert reader.failed
    assert reader.reported == Reported(Usage(1000, 500), True, True)


def test_the_end_of_a_large_answer_still_tells_its_usage() -> None:
    body = json.dumps(
        {"data": [{"b64_json": "QUJD" * 5000}], "usage": {"input_tokens": 150, "output_tokens": 8}}
    )
    reported = IMAGES.reported(Answer.of_tail(body.encode()[-300:]))
    assert reported is not None
    assert reported.usage == Usage(150, 8)
    assert IMAGES.reported(Answer.of_tail(b'x","usage":null}')) is None
