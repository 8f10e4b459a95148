"""Transcriptions and translations through the proxy."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hub import MODELS, Hub, hub
from test_media import wav

EXTRA: dict[str, dict[str, Any]] = {
    "m-listen": {"type": "audio", "per_minute": 600},
    "m-other": {"type": "audio", "per_minute": 600, "upstream_model": "theirs"},
    "m-listentok": {"type": "audio", "audio_input_per_1k": 4000, "input_per_1k": 4000, "output_per_1k": 1000},
    "m-speak": {"type": "audio", "per_1k_characters": 1500},
}
PATHS = ("/v1/audio/transcriptions", "/v1/audio/translations")
DURATION = {"type": "duration", "seconds": 13}
TOKENS = {
    "type": "tokens",
    "input_tokens": 14,
    "input_token_details": {"text_tokens": 0, "audio_tokens": 14},
    "output_tokens": 45,
    "total_tokens": 59,
}


@pytest.fixture
def site(redis_url: str) -> Iterator[Hub]:
    with hub(redis_url, models=MODELS | EXTRA) as running:
        yield running


def send(site: Hub, path: str = PATHS[0], sound: bytes | None = None, **fields: Any) -> httpx.Response:
    file = wav(13) if sound is None else sound
    data = {"model": "m-listen", **fields}
    return site.client.post(path, data=data, files={"file": ("a.wav", file, "audio/wav")})


def used(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-credits-used"]


@pytest.mark.parametrize("path", PATHS)
def test_a_reported_duration(site: Hub, path: str) -> None:
    site.upstream.json({"text": "hi", "usage": DURATION})
    answer = send(site, path, wav(3))
    assert used(answer) == "130"
    assert site.record(answer)["estimated"] is False
    assert site.upstream.seen[0].path == path


def test_reported_tokens(site: Hub) -> None:
    site.upstream.json({"text": "hi", "usage": TOKENS})
    assert used(send(site, model="m-listentok")) == "101"


def test_audio_tokens_beside_the_prompt(site: Hub) -> None:
    usage = {"prompt_audio_seconds": 3, "prompt_tokens": 3, "total_tokens": 389, "completion_tokens": 11}
    usage["prompt_tokens_details"] = {"cached_tokens": 0, "audio_tokens": 375}  # type: ignore[assignment]
    site.upstream.json({"text": "hi", "usage": usage})
    # 378 x 4 + 11 x 1.
    assert used(send(site, model="m-listentok")) == "1523"
    assert used(send(site)) == "30"


def test_a_duration_in_the_answer_then_that_of_the_file(site: Hub) -> None:
    site.upstream.json({"text": "hi", "duration": 3.7})
    assert used(send(site)) == "37"
    site.upstream.json({"text": "hi"})
    answer = send(site, sound=wav(2.5))
    assert used(answer) == "25"
    assert site.record(answer)["estimated"] is True


@pytest.mark.parametrize("form", ["text", "srt", "vtt"])
def test_a_text_answer_passes_as_it_came(site: Hub, form: str) -> None:
    site.upstream.bytes(b"WEBVTT\n\nhi \xff\n", 200, {"content-type": "text/plain"})
    answer = send(site, response_format=form)
    assert (answer.content, used(answer)) == (b"WEBVTT\n\nhi \xff\n", "130")


def test_a_text_that_nobody_asked_for_is_no_answer(site: Hub) -> None:
    site.upstream.bytes(b"<html>", 200, {"content-type": "text/html"})
    answer = send(site)
    assert (answer.status_code, answer.headers["x-credits-used"]) == (502, "0")


@pytest.mark.parametrize(
    ("model", "usage", "cost"), [("m-listentok", TOKENS, 101), ("m-listen", DURATION, 130)]
)
def test_a_stream(site: Hub, model: str, usage: dict[str, Any], cost: int) -> None:
    pieces = [
        {"type": "transcript.text.delta", "delta": "hi"},
        {"type": "transcript.text.done", "text": "hi", "usage": usage},
    ]
    site.upstream.stream(
        *(b"data: %b\n\n" % json.dumps(each).encode() for each in pieces), b"data: [DONE]\n\n"
    )
    answer = send(site, model=model, stream="true")
    assert b": credits used=%d " % cost in answer.content
    assert answer.content.endswith(b"data: [DONE]\n\n")


def test_a_stream_without_usage_is_charged_by_the_file(site: Hub) -> None:
    site.upstream.stream(b'data: {"type": "transcript.text.delta", "delta": "hi"}\n\n')
    assert b": credits used=130 " in send(site, stream="true").content


def test_the_form_goes_on_byte_for_byte_but_for_the_model(site: Hub) -> None:
    site.upstream.json({"text": "hi", "usage": DURATION})
    for model in ("m-listen", "m-other"):
        request = site.client.build_request(
            "POST", PATHS[0], data={"model": model, "prompt": model}, files={"file": ("a.wav", wav(1))}
        )
        sent = request.read()
        site.client.send(request).raise_for_status()
        seen = site.upstream.seen[-1]
        expected = (
            sent if model == "m-listen" else sent.replace(b"\r\n\r\nm-other\r\n", b"\r\n\r\ntheirs\r\n", 1)
        )
        assert seen.raw == expected
        assert seen.headers["content-type"] == request.headers["content-type"]


def test_the_openai_client(site: Hub) -> None:
    site.upstream.json({"text": "hi", "usage": DURATION})
    client = openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key, max_retries=0)
    answer = client.audio.transcriptions.create(model="m-listen", file=("a.wav", wav(1)))
    assert answer.text == "hi"
    client.close()


def test_the_files_length_is_held(redis_url: str) -> None:
    with hub(redis_url, models=EXTRA, credits="129.99") as site:
        answer = send(site)
        assert (answer.status_code, answer.json()["error"]["code"]) == (402, "credits_exhausted")
        assert not site.upstream.seen
        site.adjust("0.01")
        site.upstream.json({"text": "hi", "usage": DURATION})
        assert (used(send(site)), site.holder().figures.balance) == ("130", 0)


@pytest.mark.parametrize(
    "fields",
    [{"model": "m-speak"}, {"model": ""}, {"stream": "yes"}, {"url": "https://a"}, {"Model": "m-listen"}],
)
def test_what_is_refused(site: Hub, fields: dict[str, str]) -> None:
    assert send(site, **fields).status_code == 400
    assert not site.upstream.seen


def test_json_and_a_missing_file_are_refused(site: Hub) -> None:
    answer = site.post(PATHS[0], model="m-listen", file="aGk=")
    assert answer.status_code == 400
    assert "multipart/form-data" in answer.json()["error"]["message"]
    assert send(site, sound=b"").status_code == 400
    assert site.client.post(PATHS[0], files={"model": ("a", b"m-listen"), "file": b"a"}).status_code == 400


def test_a_failure_costs_nothing(site: Hub) -> None:
    site.upstream.json({"error": {"message": "no"}}, 500)
    answer = send(site)
    assert (answer.status_code, answer.headers["x-credits-used"]) == (500, "0")
