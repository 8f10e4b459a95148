"""The proxy as clients see it: real servers on both sides."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hub import DONE, Hub, chat_answer, chunk, hub, usage


@pytest.fixture
def site(redis_url: str) -> Iterator[Hub]:
    with hub(redis_url) as running:
        yield running


def client(site: Hub) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key, max_retries=0)


def test_the_example_of_the_product_page(redis_url: str) -> None:
    with hub(redis_url, credits=95_000) as site:
        site.upstream.json(chat_answer(usage=usage(25, 150)))
        answer = client(site).chat.completions.with_raw_response.create(
            model="m-even", messages=[{"role": "user", "content": "hello"}], max_tokens=500
        )
        assert answer.headers["x-credits-used"] == "175"
        assert answer.headers["x-credits-remaining"] == "94825"
        assert answer.parse().usage.total_tokens == 175  # type: ignore[union-attr]
        assert site.holder().figures.available == 94_825 * 10_000


def test_a_stream_with_the_openai_client(site: Hub) -> None:
    site.upstream.stream(
        chunk("Hel", usage=None), chunk("lo", usage=None), chunk(usage=usage(1000, 500)), DONE
    )
    stream = client(site).chat.completions.create(
        model="m-chat",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == "Hello"
    figures: Any = chunks[-1].usage
    assert figures.prompt_tokens == 1000
    assert figures.credits_used == "90"
    assert figures.credits_remaining == "99910"


def test_usage_that_nobody_asked_for_is_hidden(site: Hub) -> None:
    pieces = (chunk("Hel"), chunk("lo"), chunk(usage=usage(1000, 500)), DONE)
    site.upstream.stream(*pieces)
    answer = site.chat(stream=True)
    comment = b": credits used=90 remaining=99910\n\n"
    assert answer.content == pieces[0] + pieces[1] + comment + DONE
    assert site.upstream.seen[0].body["stream_options"] == {"include_usage": True}
    assert "x-credits-used" not in answer.headers
    assert answer.headers["x-credits-reserved"]
    assert site.record(answer)["credits"] == "90"


def test_embeddings_and_images_with_the_openai_client(site: Hub) -> None:
    vector = {"object": "embedding", "index": 0, "embedding": [0.1, 0.2]}
    site.upstream.json(
        {
            "object": "list",
            "data": [vector],
            "model": "m",
            "usage": {"prompt_tokens": 3000, "total_tokens": 3000},
        }
    )
    embedded = client(site).embeddings.with_raw_response.create(
        model="m-embed", input="hello", encoding_format="float"
    )
    assert embedded.headers["x-credits-used"] == "6"
    site.upstream.json({"created": 1, "data": [{"b64_json": "QQ=="}] * 2})
    images = client(site).images.with_raw_response.generate(
        model="m-img", prompt="a cat", n=3, size="1024x1024", quality="hd"
    )
    assert images.headers["x-credits-used"] == "16000"
    assert images.headers["x-credits-remaining"] == "83994"


def test_out_of_credits(redis_url: str) -> None:
    with hub(redis_url, credits=0) as site:
        answer = site.chat()
        assert answer.status_code == 402
        assert answer.content == (
            b'{"error":{"message":"Insufficient credits. Please add more credits to continue.",'
            b'"type":"insufficient_credits","code":"credits_exhausted"}}'
        )
        assert answer.headers["x-credits-used"] == "0"
        assert answer.headers["x-credits-remaining"] == "0"
        assert not site.upstream.seen
        site.upstream.json(chat_answer(usage=usage(900, 4000)))
        free = site.chat("m-free")
        assert (free.status_code, free.headers["x-credits-used"]) == (200, "0")
