"""Responses, messages, moderations and rerank through the proxy."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hub import MODELS, Hub, hub, usage

EXTRA: dict[str, dict[str, Any]] = {
    "m-pro": {
        "type": "chat",
        "input_per_1k": 300,
        "output_per_1k": 1500,
        "cached_input_per_1k": 30,
        "cache_write_per_1k": 375,
        "max_output_tokens": 64000,
    },
    "m-mod": {"type": "moderation", "input_per_1k": 10},
    "m-speak": {"type": "audio", "per_1k_characters": 1500},
    "m-listen": {"type": "audio", "per_minute": 550},
    "m-rank": {"type": "rerank", "input_per_1k": 10},
}


@pytest.fixture
def site(redis_url: str) -> Iterator[Hub]:
    with hub(redis_url, models=MODELS | EXTRA) as running:
        yield running


def event(name: str, **data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


RESPONSE: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": 0,
    "model": "m",
    "status": "completed",
    "output": [
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Hello", "annotations": []}],
        }
    ],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
}
# Cached input in the Responses shape: (30000-27136) x 30 + 27136 x 3 + 200 x 120 per 1,000.
USED = {"input_tokens": 30000, "input_tokens_details": {"cached_tokens": 27136}, "output_tokens": 200}


def test_responses_with_the_openai_client(site: Hub) -> None:
    site.upstream.json({**RESPONSE, "usage": USED})
    client = openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key, max_retries=0)
    answer = client.responses.with_raw_response.create(model="m-chat", input="hello", max_output_tokens=500)
    assert answer.headers["x-credits-used"] == "191.328"
    assert answer.parse().output_text == "Hello"


def test_a_responses_stream(site: Hub) -> None:
    pieces = [
        event("response.created", response={**RESPONSE, "status": "in_progress", "usage": None}),
        event("response.output_text.delta", output_index=0, content_index=0, delta="Hello"),
        event("response.completed", response={**RESPONSE, "usage": USED}),
    ]
    site.upstream.stream(*pieces)
    answer = site.post("/v1/responses", model="m-chat", input="hello", stream=True)
    assert answer.content == b"".join(pieces) + b": credits used=191.328 remaining=99808.672\n\n"
    assert "stream_options" not in site.upstream.seen[0].body


def test_a_responses_stream_that_runs_out(redis_url: str) -> None:
    with hub(redis_url, credits="12.24") as site:
        delta = event("response.output_text.delta", output_index=0, content_index=0, delta=" hello")
        site.upstream.stream(*[delta] * 300, linger=10)
        answer = site.post("/v1/responses", model="m-chat", input="hello", stream=True)
        assert answer.content.count(b" hello") == 100
        last = answer.content.split(b"\n\n")[-3]
        name, data = last.split(b"\n")
        assert name == b"event: error"
        body = json.loads(data.removeprefix(b"data: "))
        assert body["type"] == "error"
        assert body["error"]["code"] == "credits_exhausted"
        assert site.upstream.gone.wait(2)


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("previous_response_id", "resp_1", "unsupported_state"),
        ("conversation", "conv_1", "unsupported_state"),
        ("background", True, "unsupported_state"),
        ("input", [{"type": "item_reference", "id": "msg_1"}], "unsupported_state"),
        (
            "input",
            [{"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}],
            "unsupported_state",
        ),
        ("tools", [{"type": "web_search"}], "unsupported_parameter"),
        ("tools", [{"type": "file_search", "vector_store_ids": ["vs_1"]}], "unsupported_state"),
        ("service_tier", "priority", "unsupported_parameter"),
    ],
)
def test_state_and_hosted_tools_are_refused(site: Hub, field: str, value: Any, code: str) -> None:
    answer = site.post("/v1/responses", **{"model": "m-chat", "input": "hello", field: value})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert not site.upstream.seen


def test_a_function_may_name_its_parameters_as_it_likes(site: Hub) -> None:
    site.upstream.json({**RESPONSE, "usage": USED})
    parameters = {"type": "object", "properties": {"file_id": {"type": "string"}}}
    tool = {"type": "function", "name": "open", "parameters": parameters}
    assert site.post("/v1/responses", model="m-chat", input="hello", tools=[tool]).status_code == 200


def test_messages(site: Hub) -> None:
    # Anthropic leaves the cached parts out of its input: 3 x 300 + 12304 x 375 + 550 x 1500 per 1,000.
    site.upstream.json(
        {
            "type": "message",
            "model": "m",
            "content": [{"type": "text", "text": "Hello"}],
            "usage": {
                "input_tokens": 3,
                "cache_creation_input_tokens": 12304,
                "cache_read_input_tokens": 0,
                "output_tokens": 550,
            },
        }
    )
    answer = site.client.post(
        "/v1/messages",
        json={"model": "m-pro", "max_tokens": 1000, "messages": [{"role": "user", "content": "hello"}]},
        headers={"authorization": "", "x-api-key": site.key, "anthropic-version": "2023-06-01"},
    )
    assert answer.headers["x-credits-used"] == "5439.9"
    assert site.upstream.seen[0].headers["anthropic-version"] == "2023-06-01"


def messages_stream(start: dict[str, int], end: dict[str, int]) -> list[bytes]:
    return [
        event("message_start", message={"model": "m", "usage": start}),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": " hello"}),
        event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": "end_turn"}, usage=end),
        event("message_stop"),
    ]


@pytest.mark.parametrize(
    ("start", "end", "credits"),
    [
        (
            {"input_tokens": 3602, "output_tokens": 0},
            {"cache_read_input_tokens": 3604, "output_tokens": 878},
            "2505.72",
        ),
        ({"input_tokens": 20, "output_tokens": 1}, {"output_tokens": 15}, "28.5"),
    ],
)
def test_a_messages_stream_merges_its_usage(
    site: Hub, start: dict[str, int], end: dict[str, int], credits: str
) -> None:
    pieces = messages_stream(start, end)
    site.upstream.stream(*pieces)
    body = {
        "model": "m-pro",
        "max_tokens": 1000,
        "stream": True,
        "messages": [{"role": "user", "content": "x"}],
    }
    answer = site.post("/v1/messages", **body)
    assert answer.content.startswith(b"".join(pieces) + f": credits used={credits} ".encode())


def test_a_messages_stream_that_breaks_is_counted_not_taken_from_its_placeholder(site: Hub) -> None:
    start = event("message_start", message={"model": "m", "usage": {"input_tokens": 20, "output_tokens": 1}})
    delta = event("content_block_delta", index=0, delta={"type": "text_delta", "text": " hello"})
    site.upstream.stream(start, *[delta] * 30, cut=True)
    body = {"model": "m-pro", "max_tokens": 1000, "stream": True, "messages": []}
    with pytest.raises(Exception, match="peer closed|incomplete"):
        with site.client.stream("POST", "/v1/messages", json=body) as answer:
            answer.read()
    site.wait_until_free()
    record = site.record(answer)
    assert record["tokens"]["prompt_tokens"] == 20
    assert record["tokens"]["completion_tokens"] == 30


def test_errors_of_messages_come_in_their_envelope(redis_url: str) -> None:
    with hub(redis_url, credits=0) as site:
        body = {"model": "m-chat", "max_tokens": 10, "messages": [{"role": "user", "content": "x"}]}
        answer = site.post("/v1/messages", **body)
        assert answer.status_code == 402
        assert answer.json() == {
            "type": "error",
            "error": {
                "message": "Insufficient credits. Please add more credits to continue.",
                "type": "insufficient_credits",
                "code": "credits_exhausted",
            },
        }
        wrong = site.client.post("/v1/messages", json=body, headers={"authorization": "Bearer x"})
        assert wrong.json()["type"] == "error"
        assert wrong.json()["error"]["code"] == "invalid_api_key"


def test_token_counts_pass_and_are_free(redis_url: str) -> None:
    with hub(redis_url, credits=0) as site:
        site.upstream.json({"input_tokens": 2095})
        body: dict[str, Any] = {"model": "m-chat", "messages": [{"role": "user", "content": "x"}]}
        answer = site.post("/v1/messages/count_tokens", **body)
        assert (answer.status_code, answer.json()) == (200, {"input_tokens": 2095})
        assert answer.headers["x-credits-used"] == "0"
        assert site.upstream.seen[0].path == "/v1/messages/count_tokens"
        record = site.record(answer)
        assert (record["tokens"]["total_tokens"], record["estimated"]) == (0, False)
        site.upstream.json({"object": "response.input_tokens", "input_tokens": 11})
        counted = site.post("/v1/responses/input_tokens", model="m-chat", input="x")
        assert (counted.status_code, counted.headers["x-credits-used"]) == (200, "0")


def test_moderations_and_rerank(site: Hub) -> None:
    site.upstream.json({"id": "modr-1", "model": "m", "results": [{"flagged": False}]})
    moderated = site.post("/v1/moderations", model="m-mod", input="hello world")
    # No usage is reported, so the two tokens are counted.
    assert moderated.headers["x-credits-used"] == "0.02"
    assert site.record(moderated)["estimated"] is True
    site.upstream.json({"results": [{"index": 0, "relevance_score": 1}], "usage": {"total_tokens": 1000}})
    ranked = site.post("/v1/rerank", model="m-rank", query="a", documents=["b", {"text": "c"}])
    assert ranked.headers["x-credits-used"] == "10"


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compressed_answer_is_read_and_passed_on_as_it_came(site: Hub, coding: str) -> None:
    import gzip
    import zlib

    from hub import chat_answer

    plain = json.dumps(chat_answer(usage=usage(1000, 500))).encode()
    body = gzip.compress(plain) if coding == "gzip" else zlib.compress(plain)
    site.upstream.bytes(body, 200, {"content-type": "application/json", "content-encoding": coding})
    with site.client.stream(
        "POST",
        "/v1/chat/completions",
        json={"model": "m-chat", "messages": [{"role": "user", "content": "x"}]},
    ) as answer:
        assert b"".join(answer.iter_raw()) == body
    assert answer.headers["x-credits-used"] == "90"
    assert answer.headers["content-encoding"] == coding


def test_speech_is_charged_by_its_characters(site: Hub) -> None:
    sound = bytes(range(256)) * 100
    site.upstream.bytes(sound, 200, {"content-type": "audio/mpeg"})
    answer = site.post("/v1/audio/speech", model="m-speak", input="Grüße!", voice="alloy")
    assert answer.content == sound
    assert answer.headers["content-type"] == "audio/mpeg"
    assert (answer.headers["x-credits-used"], answer.headers["x-credits-remaining"]) == ("9", "99991")
    site.upstream.bytes(b"", 200, {"content-type": "audio/mpeg"})
    silent = site.post("/v1/audio/speech", model="m-speak", input="Grüße!", voice="alloy")
    assert (silent.status_code, silent.headers["x-credits-used"]) == (200, "0")
    site.upstream.json({"error": {"message": "no"}}, 500)
    failed = site.post("/v1/audio/speech", model="m-speak", input="Grüße!", voice="alloy")
    assert (failed.status_code, failed.headers["x-credits-used"]) == (500, "0")


@pytest.mark.parametrize("used", [{}, {"usage": {"input_tokens": 3, "output_tokens": 40}}])
def test_streamed_speech_is_charged_by_its_characters(site: Hub, used: dict[str, Any]) -> None:
    pieces = [event("speech.audio.delta", audio="QUJD"), event("speech.audio.done", **used)]
    site.upstream.stream(*pieces)
    answer = site.post(
        "/v1/audio/speech", model="m-speak", input="Grüße!", voice="alloy", stream_format="sse"
    )
    assert answer.content == b"".join(pieces) + b": credits used=9 remaining=99991\n\n"
    site.upstream.stream(event("error", error={"message": "no"}))
    failed = site.post(
        "/v1/audio/speech", model="m-speak", input="Grüße!", voice="alloy", stream_format="sse"
    )
    assert b"credits used=0 " in failed.content


def test_a_model_priced_in_another_unit_is_not_served(site: Hub) -> None:
    answer = site.post("/v1/audio/speech", model="m-listen", input="hello", voice="alloy")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"
