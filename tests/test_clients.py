"""The clients that people use, against the running proxy: none may notice the meter but by its headers."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from hub import DONE, Hub, chat_answer, chunk, hub, usage
from langchain_openai import ChatOpenAI

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture
def site(redis_url: str) -> Iterator[Hub]:
    with hub(redis_url) as running:
        yield running


def openai_client(site: Hub, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=site.url + "/v1", api_key=site.key, max_retries=2, **options)


def test_openai_json(site: Hub) -> None:
    site.upstream.json(chat_answer("hi", usage=usage(1000, 500)))
    with openai_client(site) as client:
        answer = client.chat.completions.with_raw_response.create(model="m-chat", messages=HELLO)
    assert answer.headers["x-credits-used"] == "90"
    assert answer.headers["x-credits-remaining"] == "99910"
    parsed = answer.parse()
    assert parsed.choices[0].message.content == "hi"
    assert parsed.usage is not None and parsed.usage.total_tokens == 1500


@pytest.mark.parametrize("asked", [True, False])
def test_openai_stream(site: Hub, asked: bool) -> None:
    site.upstream.stream(chunk("he"), chunk("llo"), chunk(usage=usage(1000, 500)), DONE)
    options: Any = {"stream_options": {"include_usage": True}} if asked else {}
    with openai_client(site) as client:
        stream = client.chat.completions.create(model="m-chat", messages=HELLO, stream=True, **options)
        chunks = list(stream)
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == "hello"
    found = [each.usage for each in chunks if each.usage is not None]
    assert len(chunks) == (3 if asked else 2)
    assert [each.total_tokens for each in found] == ([1500] if asked else [])
    if asked:
        assert found[0].model_extra == {"credits_used": "90", "credits_remaining": "99910"}


def test_openai_async_streams_at_once(site: Hub) -> None:
    site.upstream.stream(chunk("he"), chunk("llo"), chunk(usage=usage(1000, 500)), DONE, seconds=0.01)

    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="m-chat", messages=HELLO, stream=True)
        return "".join([each.choices[0].delta.content or "" async for each in stream])

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=site.url + "/v1", api_key=site.key) as client:
            return await asyncio.gather(*(one(client) for _ in range(10)))

    assert asyncio.run(many()) == ["hello"] * 10
    assert site.wait_until_free().figures.available == (100_000 - 900) * 10_000


def test_openai_responses(site: Hub) -> None:
    text = {"type": "output_text", "text": "hi", "annotations": []}
    message = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [text]}
    response = {
        "id": "resp_1",
        "object": "response",
        "created_at": 0,
        "model": "m-chat",
        "status": "completed",
        "output": [message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 1000,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 500,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 1500,
        },
    }
    site.upstream.json(response)
    with openai_client(site) as client:
        answer = client.responses.with_raw_response.create(model="m-chat", input="hello")
        assert answer.parse().output_text == "hi"
        assert answer.headers["x-credits-used"] == "90"
        done = {"type": "response.completed", "sequence_number": 1, "response": response}
        delta = {
            "type": "response.output_text.delta",
            "sequence_number": 0,
            "item_id": "m",
            "output_index": 0,
            "content_index": 0,
            "delta": "hi",
            "logprobs": [],
        }
        site.upstream.stream(
            *(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode() for each in (delta, done))
        )
        kinds = [each.type for each in client.responses.create(model="m-chat", input="x", stream=True)]
    assert kinds == ["response.output_text.delta", "response.completed"]


def test_openai_embeddings(site: Hub) -> None:
    data = [{"object": "embedding", "index": 0, "embedding": [0.5, 1.5]}]
    site.upstream.json(
        {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 3000, "total_tokens": 3000}}
    )
    with openai_client(site) as client:
        answer = client.embeddings.with_raw_response.create(
            model="m-embed", input="x", encoding_format="float"
        )
    assert answer.parse().data[0].embedding == [0.5, 1.5]
    assert answer.headers["x-credits-used"] == "6"


def test_openai_out_of_credits_is_not_retried(redis_url: str) -> None:
    with hub(redis_url, credits=0) as site, openai_client(site) as client:
        with pytest.raises(openai.APIStatusError) as refused:
            client.chat.completions.create(model="m-chat", messages=HELLO)
        assert refused.value.status_code == 402
        assert refused.value.code == "credits_exhausted"
        assert not site.upstream.seen


def test_openai_running_out_mid_stream(redis_url: str) -> None:
    with hub(redis_url, credits="12.24") as site, openai_client(site) as client:
        site.upstream.stream(*[chunk(" hello")] * 300, linger=10)
        text = ""
        with pytest.raises(openai.APIError, match="Insufficient credits"):
            for each in client.chat.completions.create(model="m-chat", messages=HELLO, stream=True):
                text += each.choices[0].delta.content or ""
        assert text == " hello" * 100


def message_start(tokens: dict[str, int]) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m-chat",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": tokens,
    }


def test_anthropic_json_and_stream(site: Hub) -> None:
    tokens = {"input_tokens": 1000, "output_tokens": 500}
    whole = {**message_start(tokens), "content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn"}
    events = [
        {"type": "message_start", "message": message_start({"input_tokens": 1000, "output_tokens": 1})},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 500}},
        {"type": "message_stop"},
    ]
    with anthropic.Anthropic(base_url=site.url, api_key=site.key) as client:
        site.upstream.json(whole)
        answer = client.messages.with_raw_response.create(model="m-chat", max_tokens=600, messages=HELLO)
        assert answer.headers["x-credits-used"] == "90"
        assert answer.parse().usage.output_tokens == 500
        site.upstream.stream(
            *(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode() for each in events)
        )
        with client.messages.stream(model="m-chat", max_tokens=600, messages=HELLO) as stream:
            final = stream.get_final_message()
    assert (final.usage.input_tokens, final.usage.output_tokens) == (1000, 500)
    assert final.content[0].type == "text" and final.content[0].text == "hi"
    assert site.wait_until_free().figures.available == (100_000 - 180) * 10_000


def test_anthropic_out_of_credits(redis_url: str) -> None:
    with hub(redis_url, credits=0) as site:
        with anthropic.Anthropic(base_url=site.url, api_key=site.key) as client:
            with pytest.raises(anthropic.APIStatusError, match="Insufficient credits") as refused:
                client.messages.create(model="m-chat", max_tokens=600, messages=HELLO)
        assert refused.value.status_code == 402


def test_langchain(site: Hub) -> None:
    site.upstream.json(chat_answer("hi", usage=usage(1000, 500)))
    model = ChatOpenAI(model="m-chat", base_url=site.url + "/v1", api_key=site.key)  # type: ignore[arg-type]
    answer = model.invoke("hello")
    assert answer.content == "hi"
    site.upstream.stream(chunk("he"), chunk("llo"), chunk(usage=usage(1000, 500)), DONE)
    assert "".join(str(each.content) for each in model.stream("hello")) == "hello"
    assert site.wait_until_free().figures.available == (100_000 - 180) * 10_000
