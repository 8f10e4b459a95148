"""The built-in demo upstream, seen through the real openai client and byte by byte."""

import base64
import json
import math
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, BadRequestError
from openai import NotFoundError as OpenAINotFoundError

from llmhub_meter.demo import create_upstream
from llmhub_meter.tokens import count

HELLO: list[Any] = [{"role": "user", "content": "hello world"}]


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_upstream(chunk_seconds=0))
    async with httpx.AsyncClient(transport=transport, base_url="http://demo/v1") as client:
        yield client


@pytest.fixture
def openai(http: httpx.AsyncClient) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="any", base_url="http://demo/v1", http_client=http, max_retries=0)


def chat_body(**fields: object) -> dict[str, object]:
    return {"model": "demo-chat", "messages": HELLO, **fields}


async def test_an_answer_names_itself_a_demo_and_counts_truly(openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(model="demo-chat", messages=HELLO)
    choice, usage = answer.choices[0], answer.usage
    assert choice.message.content is not None and usage is not None
    assert "demo answer" in choice.message.content and "hello world" in choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.system_fingerprint == "llmhub-meter-demo"
    # A frame of 3 for the message, 1 for its role, 2 of text, 3 to prime the reply.
    assert usage.prompt_tokens == 9
    assert usage.completion_tokens == count(choice.message.content, "demo-chat")
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_equal_requests_get_equal_bytes(http: httpx.AsyncClient) -> None:
    first, again = [await http.post("/chat/completions", json=chat_body()) for _ in range(2)]
    other = await http.post("/chat/completions", json=chat_body(n=1))
    assert first.content == again.content
    assert first.json()["id"] != other.json()["id"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("limit", [1, 7, 15])
async def test_a_maximum_is_kept(openai: AsyncOpenAI, field: str, limit: int) -> None:
    asked: dict[str, Any] = {field: limit}
    answer = await openai.chat.completions.create(model="demo-chat", messages=HELLO, n=2, **asked)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * limit
    assert sum(count(choice.message.content or "", "demo-chat") for choice in answer.choices) == 2 * limit


async def test_choices_differ_and_are_all_counted(openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(model="demo-chat", messages=HELLO, n=3)
    texts = [choice.message.content or "" for choice in answer.choices]
    assert len(set(texts)) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(count(text, "demo-chat") for text in texts)


@given(
    text=st.text(max_size=60),
    limit=st.integers(1, 60) | st.none(),
    choices=st.integers(1, 3),
)
@settings(deadline=None, max_examples=50)
async def test_a_stream_says_what_the_json_answer_says(text: str, limit: int | None, choices: int) -> None:
    body = chat_body(messages=[{"role": "user", "content": text}], n=choices)
    if limit:
        body["max_tokens"] = limit
    transport = httpx.ASGITransport(app=create_upstream(chunk_seconds=0))
    async with httpx.AsyncClient(transport=transport, base_url="http://demo/v1") as http:
        whole = (await http.post("/chat/completions", json=body)).json()
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        events = (await http.post("/chat/completions", json=asked)).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    spoken, reasons = [""] * choices, [""] * choices
    for chunk in chunks[:-1]:
        [choice] = chunk["choices"]
        spoken[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]] = choice["finish_reason"]
    assert spoken == [choice["message"]["content"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert chunks[-1]["usage"] == whole["usage"]
    if limit:
        assert whole["usage"]["completion_tokens"] <= limit * choices


async def test_a_stream_with_usage_has_openais_form(http: httpx.AsyncClient) -> None:
    body = chat_body(stream=True, stream_options={"include_usage": True}, max_tokens=2)
    answer = await http.post("/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks[:-1])
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {}])
async def test_a_stream_without_usage_never_names_it(http: httpx.AsyncClient, options: object) -> None:
    answer = await http.post("/chat/completions", json=chat_body(stream=True, stream_options=options))
    assert answer.text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in answer.text
    assert '"choices":[]' not in answer.text


async def test_the_openai_client_reads_the_stream(openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(
        model="demo-chat", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == count(text, "demo-chat")


async def test_each_chunk_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def noted(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("llmhub_meter.demo.asyncio.sleep", noted)
    transport = httpx.ASGITransport(app=create_upstream(chunk_seconds=0.5))
    async with httpx.AsyncClient(transport=transport, base_url="http://demo/v1") as http:
        answer = await http.post("/chat/completions", json=chat_body(stream=True))
    assert pauses == [0.5] * answer.text.count("\n\n")


@pytest.mark.parametrize(("limit", "status"), [(None, "completed"), (5, "incomplete")])
async def test_a_response_and_its_stream_say_the_same(
    openai: AsyncOpenAI, limit: int | None, status: str
) -> None:
    limits: dict[str, Any] = {} if limit is None else {"max_output_tokens": limit}
    answer = await openai.responses.create(model="demo-chat", input="hello world", **limits)
    assert answer.usage is not None and answer.status == status
    # 2 of text; a bare text has no role to count.
    assert answer.usage.input_tokens == 8
    assert answer.usage.output_tokens == count(answer.output_text, "demo-chat") <= (limit or 100)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    stream = await openai.responses.create(model="demo-chat", input="hello world", stream=True, **limits)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert said == answer.output_text == last.response.output_text
    assert (last.response.status, last.response.usage) == (status, answer.usage)


async def test_a_response_hears_the_last_message(openai: AsyncOpenAI) -> None:
    asked: Any = [
        {"role": "user", "content": "first"},
        {"role": "user", "content": [{"type": "input_text", "text": "hello world"}]},
    ]
    answer = await openai.responses.create(model="demo-chat", input=asked, instructions="Be short.")
    assert answer.output_text.endswith('You wrote: "hello world"')


@pytest.mark.parametrize("dimensions", [None, 1, 3, 256])
async def test_embeddings_are_unit_vectors_in_both_encodings(
    http: httpx.AsyncClient, dimensions: int | None
) -> None:
    body = {"model": "demo-embedding", "input": ["one", "two", "one"], "dimensions": dimensions}
    floats = (await http.post("/embeddings", json=body)).json()
    packed = (await http.post("/embeddings", json={**body, "encoding_format": "base64"})).json()
    vectors = [entry["embedding"] for entry in floats["data"]]
    size = dimensions or 64
    for vector, entry in zip(vectors, packed["data"], strict=True):
        assert len(vector) == size
        assert math.isclose(math.hypot(*vector), 1, rel_tol=1e-5)
        assert list(struct.unpack(f"<{size}f", base64.b64decode(entry["embedding"]))) == vector
    assert vectors[0] == vectors[2]
    assert dimensions == 1 or vectors[0] != vectors[1]
    assert floats["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


async def test_the_openai_client_reads_embeddings(openai: AsyncOpenAI) -> None:
    answer = await openai.embeddings.create(model="demo-embedding", input="hello world")
    assert len(answer.data[0].embedding) == 64
    assert answer.usage.prompt_tokens == 2


@pytest.mark.parametrize(("given", "vectors", "tokens"), [([1, 2, 3], 1, 3), ([[1, 2], [3]], 2, 3)])
async def test_token_numbers_are_embedded(
    http: httpx.AsyncClient, given: object, vectors: int, tokens: int
) -> None:
    answer = await http.post("/embeddings", json={"model": "demo-embedding", "input": given})
    assert len(answer.json()["data"]) == vectors
    assert answer.json()["usage"]["prompt_tokens"] == tokens


async def test_images_are_pngs_of_their_size(openai: AsyncOpenAI) -> None:
    answer = await openai.images.generate(model="demo-image", prompt="a cat", n=2, size="1024x1536")
    assert answer.size == "1024x1536" and answer.data is not None
    pictures = [base64.b64decode(image.b64_json or "") for image in answer.data]
    assert len(set(pictures)) == 2
    for picture in pictures:
        assert len(picture) < 1_000
        blocks = png_blocks(picture)
        assert list(blocks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
        assert struct.unpack(">IIBBBBB", blocks[b"IHDR"]) == (1024, 1536, 1, 3, 0, 0, 0)
        assert len(zlib.decompress(blocks[b"IDAT"])) == 1536 * (1 + 1024 // 8)


def png_blocks(picture: bytes) -> dict[bytes, bytes]:
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    blocks, position = {}, 8
    while position < len(picture):
        length, kind = struct.unpack_from(">I4s", picture, position)
        data = picture[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", picture, position + 8 + length) == (zlib.crc32(kind + data),)
        blocks[kind] = data
        position += 12 + length
    return blocks


async def test_models_are_listed(openai: AsyncOpenAI) -> None:
    listed = [model.id async for model in openai.models.list()]
    assert listed == ["demo-chat", "demo-embedding", "demo-image"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", b"{", None),
        ("chat/completions", b"[]", None),
        ("chat/completions", b"\xff", None),
        ("chat/completions", b"[" * 100_000, None),
        ("chat/completions", chat_body(messages=[]), "messages"),
        ("chat/completions", {"model": "demo-chat"}, "messages"),
        ("chat/completions", {"messages": HELLO}, "model"),
        ("chat/completions", chat_body(messages=["hello"]), "messages"),
        ("chat/completions", chat_body(n=0), "n"),
        ("chat/completions", chat_body(n=True), "n"),
        ("chat/completions", chat_body(max_tokens=0), "max_tokens"),
        ("chat/completions", chat_body(max_completion_tokens="9"), "max_completion_tokens"),
        ("chat/completions", chat_body(stream_options={"include_usage": True}), "stream_options"),
        ("embeddings", {"model": "demo-embedding", "input": []}, "input"),
        ("embeddings", {"model": "demo-embedding", "input": ""}, "input"),
        ("embeddings", {"model": "demo-embedding", "input": ["a", 1]}, "input"),
        ("embeddings", {"model": "demo-embedding", "input": [[]]}, "input"),
        ("embeddings", {"model": "demo-embedding", "input": "a", "dimensions": 0}, "dimensions"),
        ("images/generations", {"model": "demo-image", "prompt": ""}, "prompt"),
        ("images/generations", {"model": "demo-image", "prompt": "a", "n": 11}, "n"),
        ("images/generations", {"model": "demo-image", "prompt": "a", "size": "9x9"}, "size"),
    ],
)
async def test_bad_input_is_a_400_in_openais_form(
    http: httpx.AsyncClient, path: str, body: bytes | dict[str, object], param: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await http.post(path, content=content)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] == param and error["message"]


async def test_the_openai_client_raises_its_own_errors(openai: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError):
        await openai.chat.completions.create(model="demo-chat", messages=[])
    with pytest.raises(OpenAINotFoundError) as refused:
        await openai.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "nowhere", 404), ("GET", "embeddings", 405)])
async def test_other_paths_are_refused_in_openais_form(
    http: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == "not_found"
