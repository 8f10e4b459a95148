"""Any JSON in any field, of a request or of an upstream's answer: never a crash, never a hold that stays."""

import json
from typing import Any

import pytest
from hub import DONE, MODELS, Hub, chat_answer, hub, usage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXTRA: dict[str, dict[str, Any]] = {
    "m-mod": {"type": "moderation", "input_per_1k": 10},
    "m-rank": {"type": "rerank", "input_per_1k": 10},
    "m-speak": {"type": "audio", "per_1k_characters": 10},
}
MESSAGES = [{"role": "user", "content": "hello"}]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m-chat", "messages": MESSAGES, "stream": False, "n": 1, "tools": []},
    "/v1/completions": {"model": "m-text", "prompt": "hello", "max_tokens": 9, "best_of": 1},
    "/v1/responses": {"model": "m-chat", "input": "hello", "text": {}, "max_output_tokens": 9, "tools": []},
    "/v1/messages": {"model": "m-chat", "messages": MESSAGES, "system": "x", "max_tokens": 9, "tools": []},
    "/v1/embeddings": {"model": "m-embed", "input": "hello"},
    "/v1/images/generations": {"model": "m-img", "prompt": "x", "n": 1, "size": "1x1", "quality": "hd"},
    "/v1/moderations": {"model": "m-mod", "input": "hello"},
    "/v1/rerank": {"model": "m-rank", "query": "a", "documents": ["b"]},
    "/v1/audio/speech": {"model": "m-speak", "input": "hello"},
}
ANSWER = chat_answer(usage=usage(10, 10))
CHUNK = {"model": "m", "choices": [{"index": 0, "delta": {"content": "a"}}], "usage": usage(1, 1)}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
patient = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += places(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += places(inner, (*path, index))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: object) -> Any:
    """A copy with another value at one place."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = new
    return copy


@pytest.mark.parametrize("path", REQUESTS)
def test_any_value_in_any_field_of_a_request(redis_url: str, path: str) -> None:
    with hub(redis_url, credits=10_000_000, models=MODELS | EXTRA) as site:
        site.upstream.json(ANSWER)

        @settings(patient, max_examples=40)
        @given(place=st.sampled_from(places(REQUESTS[path])), new=values)
        def fuzz(place: tuple[Any, ...], new: object) -> None:
            body = json.dumps(replaced(REQUESTS[path], place, new)).encode()
            answer = site.client.post(path, content=body)
            assert answer.status_code in (200, 400, 402, 404), answer.text
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]

        fuzz()


def check_ended(site: Hub, answer: Any) -> None:
    assert site.record(answer)["state"] in ("settled", "released")
    assert site.holder().figures.held == 0


def test_any_value_in_any_field_of_an_answer(redis_url: str) -> None:
    with hub(redis_url, credits=10_000_000) as site:

        @patient
        @given(place=st.sampled_from(places(ANSWER)), new=values)
        def fuzz(place: tuple[Any, ...], new: object) -> None:
            sent = replaced(ANSWER, place, new)
            site.upstream.json(sent)
            answer = site.chat()
            assert (answer.status_code, answer.json()) == (200, sent)
            check_ended(site, answer)

        fuzz()


def test_any_value_in_any_field_of_a_chunk(redis_url: str) -> None:
    with hub(redis_url, credits=10_000_000) as site:

        @patient
        @given(place=st.sampled_from(places(CHUNK)), new=values)
        def fuzz(place: tuple[Any, ...], new: object) -> None:
            event = b"data: " + json.dumps(replaced(CHUNK, place, new)).encode() + b"\n\n"
            plain = b'data: {"choices":[{"index":0,"delta":{"content":"b"}}]}\n\n'
            site.upstream.stream(plain, event, plain, DONE)
            answer = site.chat(stream=True)
            assert answer.content.startswith(plain)
            # A usage chunk is hidden; whatever else comes is passed on as it came.
            assert answer.content.count(plain) == 2
            assert event in answer.content or b'"choices": []' in event
            assert answer.content.endswith(DONE)
            check_ended(site, answer)

        fuzz()
