"""Forms: read strictly, and rewritten in place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmhub_meter import multipart
from llmhub_meter.errors import InvalidRequest

TYPE = "multipart/form-data; boundary=xYz"
ONCE = ("model", "stream", "file")


def form(*parts: tuple[str, bytes], end: bytes = b"--xYz--\r\n") -> bytes:
    """A body of parts, each with its Content-Disposition (and other headers) and its value."""
    return b"".join(b"--xYz\r\n%b\r\n\r\n%b\r\n" % (head.encode(), value) for head, value in parts) + end


def field(name: str) -> str:
    return f'Content-Disposition: form-data; name="{name}"'


FILE = field("file") + '; filename="a.wav"\r\nContent-Type: audio/wav'
SOUND = bytes(range(256)) + b"\r\n--xY\r\n--\r\nmodel"


def test_fields_and_files() -> None:
    body = form((field("model"), b"m-\xc3\xbc"), (FILE, SOUND), (field("prompt"), b""))
    assert multipart.parse(body, TYPE, ONCE) == {"model": "m-ü", "file": SOUND, "prompt": ""}


def test_a_field_is_replaced_and_all_else_stays() -> None:
    body = form((FILE, SOUND), (field("model"), b"m-long-name"), (field("model_note"), b"m-long-name"))
    found = multipart.parse(body, TYPE, ONCE)
    expected = form((FILE, SOUND), (field("model"), b"other"), (field("model_note"), b"m-long-name"))
    assert found.rewritten(body, {"model": "other"}) == expected
    assert found.rewritten(body, {}) == body


@given(
    value=st.binary(max_size=300), model=st.text(st.characters(min_codepoint=33, codec="utf-8"), min_size=1)
)
def test_any_file_and_model_come_back(value: bytes, model: str) -> None:
    if b"--xYz" in value:
        return
    body = form((field("model"), model.encode()), (FILE, value))
    found = multipart.parse(body, TYPE, ONCE)
    assert (found["model"], found["file"]) == (model, value)
    assert found.rewritten(body, {"model": "n"}) == form((field("model"), b"n"), (FILE, value))


@pytest.mark.parametrize(
    "parts",
    [
        ((field("model"), b"a"), (field("model"), b"b")),
        ((field("model"), b"a"), (field("Model"), b"b")),
        ((field("model "), b"a"),),
        ((field("model[]"), b"a"),),
        ((field("file") + '; filename="a"', b"a"), (FILE, b"b")),
        ((field("model") + '; name="other"', b"a"),),
        ((field("model") + "; name*=UTF-8''other", b"a"),),
        ((field("model") + "\r\n" + field("other"), b"a"),),
        ((field("model") + "\r\nContent-Transfer-Encoding: base64", b"bQ=="),),
        (('Content-Disposition: form-data; name="mo\\"del"', b"a"),),
        (("Content-Disposition: attachment; name=model", b"a"),),
        (("Content-Type: text/plain", b"a"),),
        ((field("model"), b"\xff"),),
        ((field("prompt"), b"x" * (multipart.MAX_FIELD_BYTES + 1)),),
        ((field("x"), b""),) * (multipart.MAX_PARTS + 1),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(parts: tuple[tuple[str, bytes], ...]) -> None:
    with pytest.raises(InvalidRequest):
        multipart.parse(form(*parts), TYPE, ONCE)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (form((field("model"), b"a")), ""),
        (form((field("model"), b"a")), "application/json"),
        (form((field("model"), b"a")), "multipart/form-data"),
        (form((field("model"), b"a")), "multipart/form-data; boundary=xYz; boundary=other"),
        (form((field("model"), b"a")), "multipart/form-data; boundary=other"),
        (form((field("model"), b"a"), end=b""), TYPE),
        (form((field("model"), b"a"), end=b"--xYz"), TYPE),
        (b"", TYPE),
        (b'{"model": "m"}', TYPE),
    ],
)
def test_what_is_no_form_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(InvalidRequest):
        multipart.parse(body, content_type, ONCE)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(junk: bytes) -> None:
    for body in (junk, b"--xYz\r\n" + junk, form((field("model"), b"a"), end=junk)):
        try:
            multipart.parse(body, TYPE, ONCE)
        except InvalidRequest:
            continue


def test_a_quoted_boundary() -> None:
    body = form((field("model"), b"a"))
    assert multipart.parse(body, 'multipart/form-data; boundary="xYz"') == {"model": "a"}
