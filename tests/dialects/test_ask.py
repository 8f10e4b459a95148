"""What requests ask for: bounds of what they can use, what is refused, and paths in every spelling."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmhub_meter import dialects
from llmhub_meter.dialects import Dialect
from llmhub_meter.dialects.base import MAX_CHOICES, MAX_TOKENS
from llmhub_meter.dialects.images import MAX_IMAGES
from llmhub_meter.errors import ApiError, InvalidRequest, UnsupportedParameter, UnsupportedState


def dialect(path: str) -> Dialect:
    found = dialects.find("/v1" + path)
    assert found is not None
    return found


CHAT, COMPLETIONS = dialect("/chat/completions"), dialect("/completions")
EMBEDDINGS, IMAGES = dialect("/embeddings"), dialect("/images/generations")

PLAIN: dict[Dialect, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "hello"}]},
    COMPLETIONS: {"model": "m", "prompt": "hello"},
    EMBEDDINGS: {"model": "m", "input": "hello"},
    IMAGES: {"model": "m", "prompt": "a cat"},
}
every = pytest.mark.parametrize("of", PLAIN, ids=lambda of: of.name)
MISSING = b"missing"
"""No JSON value; the same in every test process, which compares the names of tests."""
# A busy machine draws nested values slowly at first.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def body(of: Dialect, **changes: object) -> dict[str, Any]:
    changed = {**PLAIN[of], **changes}
    return {name: value for name, value in changed.items() if value is not MISSING}


@every
def test_a_plain_request(of: Dialect) -> None:
    ask = of.ask(body(of))
    assert (ask.model, ask.stream, ask.choices, ask.maximum, ask.maximum_fields) == ("m", False, 1, None, ())
    assert not ask.wants_usage
    assert ask.writes == (of is not EMBEDDINGS)
    assert ask.images == (of is IMAGES)
    prompt = of.prompt(body(of), "m")
    assert "a cat" in prompt.pieces or "hello" in prompt.pieces
    assert (prompt.images, prompt.files, prompt.audio, prompt.tools) == (0, 0, 0, 0)
    of.check_priced(body(of))


@pytest.mark.parametrize("value", [MISSING, None, "", 5, ["m"], {"id": "m"}, True], ids=repr)
@every
def test_a_request_names_its_model(of: Dialect, value: object) -> None:
    with pytest.raises(InvalidRequest, match="'model' is missing or not a string") as caught:
        of.ask(body(of, model=value))
    assert caught.value.param == "model"


BAD_NUMBERS = [0, -1, True, False, "5", 1.5, 1e18, 10**30, float("inf"), float("nan"), [1], {"n": 1}]
WITH_NUMBERS = [
    *((CHAT, "n"), (COMPLETIONS, "n"), (COMPLETIONS, "best_of"), (IMAGES, "n")),
    *((CHAT, "max_tokens"), (CHAT, "max_completion_tokens"), (COMPLETIONS, "max_tokens")),
]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize(("of", "field"), WITH_NUMBERS)
def test_bad_numbers_are_refused(of: Dialect, field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        of.ask(body(of, **{field: value}))
    assert caught.value.param == field
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("of", "field", "most"),
    [
        (CHAT, "n", MAX_CHOICES),
        (COMPLETIONS, "n", MAX_CHOICES),
        (COMPLETIONS, "best_of", MAX_CHOICES),
        (IMAGES, "n", MAX_IMAGES),
    ],
)
def test_choices_have_an_upper_bound(of: Dialect, field: str, most: int) -> None:
    assert of.ask(body(of, **{field: most})).choices == most
    assert of.ask(body(of, **{field: float(most)})).choices == most
    assert of.ask(body(of, **{field: None})).choices == 1
    with pytest.raises(InvalidRequest, match=f"must be from 1 to {most}"):
        of.ask(body(of, **{field: most + 1}))


@pytest.mark.parametrize("value", ["true", "false", 1, 0, 1.0, [], {}, [True]], ids=repr)
@pytest.mark.parametrize("of", [CHAT, COMPLETIONS, IMAGES], ids=lambda of: of.name)
def test_stream_is_true_or_false(of: Dialect, value: object) -> None:
    assert of.ask(body(of, stream=True)).stream
    assert not of.ask(body(of, stream=None)).stream
    with pytest.raises(InvalidRequest, match="'stream' must be true or false") as caught:
        of.ask(body(of, stream=value))
    assert caught.value.param == "stream"


@pytest.mark.parametrize("of", [CHAT, COMPLETIONS], ids=lambda of: of.name)
def test_stream_options(of: Dialect) -> None:
    def wants(options: object) -> bool:
        return of.ask(body(of, stream=True, stream_options=options)).wants_usage

    assert wants({"include_usage": True})
    for no in (None, {}, {"include_usage": False}, {"include_usage": None}, {"include_obfuscation": False}):
        assert not wants(no)
    for wrong in (
        "x",
        True,
        1,
        [],
        [{"include_usage": True}],
        {"include_usage": "true"},
        {"include_usage": 1},
    ):
        with pytest.raises(InvalidRequest):
            wants(wrong)


@pytest.mark.parametrize("value", [MISSING, None, "hello", {"role": "user"}, 5, True], ids=repr)
def test_messages_are_a_list(value: object) -> None:
    with pytest.raises(InvalidRequest, match="'messages' is missing or not a list") as caught:
        CHAT.ask(body(CHAT, messages=value))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("value", [MISSING, None, 5, True, {"text": "x"}], ids=repr)
def test_an_input_is_text_or_a_list(value: object) -> None:
    with pytest.raises(InvalidRequest, match="'input' is missing") as caught:
        EMBEDDINGS.ask(body(EMBEDDINGS, input=value))
    assert caught.value.param == "input"


# --- how much at most ---


def test_the_largest_of_two_maximums_counts() -> None:
    ask = CHAT.ask(body(CHAT, max_tokens=10, max_completion_tokens=2000))
    assert (ask.maximum, ask.maximum_fields) == (2000, ("max_tokens", "max_completion_tokens"))
    ask = CHAT.ask(body(CHAT, max_tokens=3000, max_completion_tokens=2000))
    assert (ask.maximum, ask.maximum_fields) == (3000, ("max_tokens", "max_completion_tokens"))
    ask = CHAT.ask(body(CHAT, max_tokens=None, max_completion_tokens=16.0))
    assert (ask.maximum, ask.maximum_fields) == (16, ("max_completion_tokens",))
    ask = COMPLETIONS.ask(body(COMPLETIONS, max_tokens=16, max_completion_tokens=99))
    assert (ask.maximum, ask.maximum_fields) == (16, ("max_tokens",))
    assert CHAT.ask(body(CHAT, max_tokens=MAX_TOKENS)).maximum == MAX_TOKENS
    with pytest.raises(InvalidRequest):
        CHAT.ask(body(CHAT, max_tokens=MAX_TOKENS + 1))


def test_one_bad_maximum_is_not_hidden_by_a_good_one() -> None:
    with pytest.raises(InvalidRequest):
        CHAT.ask(body(CHAT, max_tokens=10, max_completion_tokens=-1))


@pytest.mark.parametrize(
    ("fields", "choices"),
    [
        ({"n": 3}, 3),
        ({"best_of": 5}, 5),
        ({"n": 2, "best_of": 5}, 5),
        ({"n": 7, "best_of": 5}, 7),
        ({"prompt": "a"}, 1),
        ({"prompt": ["a"]}, 1),
        ({"prompt": ["a", "b", "c"]}, 3),
        ({"prompt": ["a", "b", "c"], "n": 2}, 6),
        ({"prompt": ["a", "b"], "n": 2, "best_of": 4}, 8),
        ({"prompt": [1, 2, 3, 4]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": [[1, 2], "b", [3]], "n": 2}, 6),
        ({"prompt": []}, 1),
        ({"prompt": None}, 1),
    ],
)
def test_choices_of_completions(fields: dict[str, Any], choices: int) -> None:
    assert COMPLETIONS.ask(body(COMPLETIONS, **fields)).choices == choices


def test_images_by_number_size_and_quality() -> None:
    ask = IMAGES.ask(body(IMAGES, n=3, size="1024x1024", quality="hd"))
    assert (ask.images, ask.choices, ask.size, ask.quality) == (3, 3, "1024x1024", "hd")
    ask = IMAGES.ask(body(IMAGES, size=None))
    assert (ask.images, ask.size, ask.quality) == (1, None, None)
    for field in ("size", "quality"):
        wrongs: list[object] = [1024, "", True, ["hd"], {}]
        for wrong in wrongs:
            with pytest.raises(InvalidRequest) as caught:
                IMAGES.ask(body(IMAGES, **{field: wrong}))
            assert caught.value.param == field


def test_audio_as_output_is_asked_for() -> None:
    assert CHAT.ask(body(CHAT, modalities=["text", "audio"])).speaks
    for silent in (MISSING, None, [], ["text"], "audio", {"audio": True}):
        assert not CHAT.ask(body(CHAT, modalities=silent)).speaks


# --- what there is to count ---


@pytest.mark.parametrize(("of", "field"), [(COMPLETIONS, "prompt"), (EMBEDDINGS, "input")])
@pytest.mark.parametrize(
    ("value", "pieces", "tokens"),
    [
        ("hello", ("hello",), 0),
        (["a", "b"], ("a", "b"), 0),
        ([5, 6, 7], (), 3),
        ([[5, 6], [7]], (), 3),
        (["a", [5, 6]], ("a",), 2),
        ([], (), 0),
    ],
)
def test_tokens_count_as_themselves(
    of: Dialect, field: str, value: object, pieces: tuple[str, ...], tokens: int
) -> None:
    prompt = of.prompt(body(of, **{field: value}), "m")
    assert (prompt.pieces, prompt.overhead) == (pieces, tokens)


def test_media_and_tools_are_counted_by_kind() -> None:
    content = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "QUJD" * 1000}},
        {"type": "file", "file": {"file_data": "QUJD" * 1000, "filename": "a.pdf"}},
        {"type": "input_audio", "input_audio": {"data": "QUJD" * 1000, "format": "wav"}},
    ]
    tools = [
        {"type": "function", "function": {"name": "lookup", "description": "finds"}},
        {"type": "web_search"},
        {"type": "code_interpreter"},
    ]
    prompt = CHAT.prompt(
        body(CHAT, messages=[{"role": "user", "content": content}], tools=tools, web_search_options={}), "m"
    )
    assert (prompt.images, prompt.files, prompt.audio, prompt.tools) == (1, 1, 1, 3)
    text = "".join(prompt.pieces)
    assert "look" in text and "lookup" in text and "finds" in text
    assert "QUJD" not in text


# --- what is refused ---


@pytest.mark.parametrize("messages", [[{"content": [{"type": "file", "file": {"file_id": "file-1"}}]}]])
def test_state_at_the_provider_is_refused(messages: list[Any]) -> None:
    with pytest.raises(UnsupportedState) as caught:
        CHAT.ask(body(CHAT, messages=[{"role": "user", "content": "x"}, *messages]))
    assert (caught.value.code, caught.value.param, caught.value.status) == (
        "unsupported_state",
        "messages",
        400,
    )


def test_a_file_that_is_sent_along_is_no_state() -> None:
    file = {"file_data": "QUJD", "file_id": None}
    CHAT.ask(body(CHAT, messages=[{"role": "user", "content": [{"type": "file", "file": file}]}]))


@pytest.mark.parametrize(
    ("of", "fields", "param"),
    [
        *(
            (of, {"service_tier": tier}, "service_tier")
            for of in PLAIN
            for tier in ("flex", "priority", "", 1, True)
        ),
        (CHAT, {"web_search_options": {"search_context_size": "high"}}, "web_search_options"),
        (CHAT, {"web_search_options": {}}, "web_search_options"),
        (CHAT, {"search_parameters": {}}, "search_parameters"),
        (CHAT, {"enable_search": True}, "enable_search"),
        (CHAT, {"models": ["other"]}, "models"),
        (CHAT, {"plugins": [{"id": "web"}]}, "plugins"),
        *(
            (CHAT, {"tools": [{"type": kind}]}, "tools")
            for kind in ("web_search", "code_interpreter", "mcp", 5)
        ),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}, {"type": "web_search"}]}, "tools"),
    ],
)
def test_what_has_no_price_is_refused(of: Dialect, fields: dict[str, Any], param: str) -> None:
    request = body(of, **fields)
    assert of.ask(request).model == "m"
    with pytest.raises(UnsupportedParameter, match="has no price") as caught:
        of.check_priced(request)
    assert (caught.value.code, caught.value.param, caught.value.status) == (
        "unsupported_parameter",
        param,
        400,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"service_tier": "auto"},
        {"service_tier": "default"},
        {"service_tier": None},
        {"web_search_options": None},
        {"enable_search": False},
        {"models": [], "plugins": []},
        {"tools": None},
        {"tools": []},
        {"tools": [{"type": "function", "function": {"name": "f"}}, {"type": "custom"}, {"function": {}}]},
    ],
)
def test_what_costs_nothing_more_is_not_refused(fields: dict[str, Any]) -> None:
    CHAT.check_priced(body(CHAT, **fields))


@every
def test_fields_that_decide_money_are_known(of: Dialect) -> None:
    assert {"model", "service_tier"} <= of.money_keys
    assert set(of.maximum_fields) <= of.money_keys
    if of is not EMBEDDINGS:
        assert {"stream", "n"} <= of.money_keys


names = st.sampled_from(
    "model messages prompt input n best_of max_tokens max_completion_tokens stream stream_options size"
    " quality service_tier tools functions web_search_options content role file file_id type text".split()
)
scalars = st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.text(max_size=4)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)


@patient
@given(st.sampled_from(list(PLAIN)), st.dictionaries(names, values))
def test_any_body_is_read_or_refused(of: Dialect, changes: dict[str, Any]) -> None:
    request = body(of, **changes)
    try:
        ask = of.ask(request)
        of.check_priced(request)
    except ApiError as error:
        assert error.status == 400
        assert error.param in request or error.param in ("model", "messages", "input", "include_usage")
        return
    assert ask.choices >= 1 and (ask.maximum is None or ask.maximum >= 1)
    prompt = of.prompt(request, ask.model)
    assert min(prompt.overhead, prompt.images, prompt.files, prompt.audio, prompt.tools) >= 0
    assert all(isinstance(piece, str) for piece in prompt.pieces)


# --- paths ---


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", "chat"),
        ("/v1/completions", "completions"),
        ("/v1/embeddings", "embeddings"),
        ("/v1/images/generations", "images"),
    ],
)
def test_a_path_finds_its_dialect(path: str, name: str) -> None:
    found = dialects.find(path)
    assert found is not None and found.name == name
    assert not dialects.misspelled(path)


METERED = sorted({f"/v1{path}" for each in dialects.DIALECTS for path in each.paths})


@pytest.mark.parametrize("path", METERED)
@pytest.mark.parametrize(
    "spell",
    [
        str.upper,
        lambda path: path.replace("v1", "V1"),
        lambda path: path.title(),
        lambda path: path + "/",
        lambda path: path + "//",
        lambda path: "/" + path,
        lambda path: path.replace("/", "//"),
        lambda path: path.replace("/v1", "/v1/."),
        lambda path: path.replace("/v1", "/v1/x/.."),
        lambda path: "/../.." + path,
        lambda path: path + "/.",
        lambda path: path + "/x/..",
        lambda path: path.replace("/v1/", "/v1%2F"),
        lambda path: path.replace("/v1/", "/v1%2f"),
        lambda path: path.replace("/v1/", "/v1%252F"),
        lambda path: path.replace("v", "%76"),
        lambda path: path.replace("/v1", "/v1/%2e"),
        lambda path: path.replace("/v1", "/v1/x/%2e%2E"),
        lambda path: path.replace("/", "\\"),
        lambda path: path.replace("/v1/", "/v1%5C"),
        lambda path: path + ";a=b",
        lambda path: path + "%3Ba",
        lambda path: path.replace("/v1", "/v1;a=b"),
        lambda path: path + " ",
        lambda path: path + "%20",
        lambda path: path + "%09",
        lambda path: path.removeprefix("/"),
    ],
)
def test_another_spelling_is_misspelled(path: str, spell: Any) -> None:
    spelled = spell(path)
    assert dialects.find(spelled) is None
    assert dialects.misspelled(spelled)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "",
            "/",
            "/v1",
            "/v1/",
            "/v1/models",
            "/v1/models/gpt-4o",
            "/v1/chat",
            "/v1/chat/completion",
            "/v1/credits",
        ),
        *(
            "/v1/chat/completions/chatcmpl-1",
            "/v1/chatcompletions",
            "/v2/chat/completions",
            "/chat/completions",
        ),
        *("/api/v1/chat/completions", "/v1/images", "/v1/audio", "/healthz"),
        *("/v1/completions/..", "/v1/../completions", "/v1/embeddings.json", "/x;/v1/completions"),
    ],
)
def test_other_paths_are_the_apps_own(path: str) -> None:
    assert dialects.find(path) is None
    assert not dialects.misspelled(path)


@patient
@given(st.text(st.sampled_from("/.%2fF;\\v1chat Ⅴ"), max_size=30) | st.text())
def test_no_path_raises(path: str) -> None:
    assert not (dialects.misspelled(path) and dialects.find(path))
