"""Image edits and variations: forms with pictures, charged by what comes back."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hub import MODELS, Hub, hub

PICTURE = b"\x89PNG\r\n\x1a\n" + b"\0--x\r\n" * 100


@pytest.fixture
def site(redis_url: str) -> Iterator[Hub]:
    models = {**MODELS, "m-img": {**MODELS["m-img"], "upstream_model": "the-real-one"}}
    with hub(redis_url, models=models) as running:
        yield running


TWO = {"created": 1, "data": [{"b64_json": "x"}, {"b64_json": "y"}]}


def test_an_edit_is_charged_by_the_images_returned(site: Hub) -> None:
    site.upstream.json(TWO)
    with openai.OpenAI(base_url=site.url + "/v1", api_key=site.key) as client:
        answer = client.images.with_raw_response.edit(
            model="m-img",
            image=[("a.png", PICTURE), ("b.png", PICTURE)],
            prompt="a hat",
            n=3,
            size="1024x1024",
            quality="hd",  # type: ignore[call-overload]
        )
    assert answer.headers["x-credits-used"] == "16000"
    raw = site.upstream.seen[0].raw
    assert raw.count(PICTURE) == 2
    assert b"the-real-one" in raw and b"m-img" not in raw


def test_a_variation(site: Hub) -> None:
    site.upstream.json(TWO)
    form = {"model": "m-img", "n": "2"}
    answer = site.client.post("/v1/images/variations", data=form, files={"image": PICTURE})
    assert answer.headers["x-credits-used"] == "8000"
    assert site.upstream.seen[0].path == "/v1/images/variations"


def test_an_edit_priced_by_tokens(site: Hub) -> None:
    details = {"text_tokens": 50, "image_tokens": 100}
    usage = {
        "input_tokens": 150,
        "input_tokens_details": details,
        "output_tokens": 8000,
        "total_tokens": 8150,
    }
    site.upstream.json({"data": [{"b64_json": "x"}], "usage": usage})
    form = {"model": "m-imgtok", "prompt": "a hat"}
    answer = site.client.post("/v1/images/edits", data=form, files={"image": PICTURE})
    # 50 x 500 + 100 x 800 + 8000 x 3000, per 1,000.
    assert answer.headers["x-credits-used"] == "24105"


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ({"model": "m-img", "prompt": "x"}, None),
        ({"model": "m-img", "prompt": "x", "n": "0"}, {"image": PICTURE}),
        ({"model": "m-img", "prompt": "x", "n": "eleven"}, {"image": PICTURE}),
        ({"model": "m-img", "N": "9"}, {"image": PICTURE}),
        ({"model": ["m-img", "m-img"]}, {"image": PICTURE}),
    ],
)
def test_bad_forms(site: Hub, form: Any, files: Any) -> None:
    answer = site.client.post("/v1/images/edits", data=form, files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not site.upstream.seen


def test_json_is_no_form(site: Hub) -> None:
    assert site.post("/v1/images/edits", model="m-img", prompt="x").status_code == 400
