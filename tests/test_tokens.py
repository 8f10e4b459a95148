"""Counts against tiktoken's own constructors, OpenAI's published examples, and hostile input."""

import base64
import gzip
import hashlib
import json
import subprocess
import sys
from importlib.resources import files
from typing import Any

import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st

from llmhub_meter import tokens
from llmhub_meter.tokens import ChatText, chat_text, count, count_in_thread, count_pieces, encoding_name

O200K, CL100K = "gpt-4o", "gpt-4"
SHA256 = {
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
}

JARGON = [
    {
        "role": "system",
        "content": "You are a helpful, pattern-following assistant that translates corporate jargon"
        " into plain English.",
    },
    {
        "role": "system",
        "name": "example_user",
        "content": "New synergies will help drive top-line growth.",
    },
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Things working well together will increase revenue.",
    },
    {
        "role": "system",
        "name": "example_user",
        "content": "Let's circle back when we have more bandwidth to touch base on opportunities"
        " for increased leverage.",
    },
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Let's talk later when we're less busy about how to do better.",
    },
    {
        "role": "user",
        "content": "This late pivot means we don't have time to boil the ocean for the client deliverable.",
    },
]
WEATHER = [
    {
        "role": "system",
        "content": "You are a helpful assistant that can answer to questions about the weather.",
    },
    {"role": "user", "content": "What's the weather like in San Francisco?"},
]
WEATHER_FUNCTION = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "unit": {
                "type": "string",
                "description": "The unit of temperature to return",
                "enum": ["celsius", "fahrenheit"],
            },
        },
        "required": ["location"],
    },
}


def vocabulary(name: str) -> bytes:
    return gzip.decompress(files("llmhub_meter").joinpath("data", f"{name}.tiktoken.gz").read_bytes())


@pytest.fixture(scope="module")
def reference() -> dict[str, tiktoken.Encoding]:
    """tiktoken's own encodings, fed with the shipped ranks instead of a download."""

    def ranks(url: str, expected_hash: str) -> dict[bytes, int]:
        data = vocabulary(url.rpartition("/")[2].removesuffix(".tiktoken"))
        assert hashlib.sha256(data).hexdigest() == expected_hash
        return {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in data.splitlines()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", ranks)
        return {
            O200K: tiktoken.Encoding(**tiktoken_ext.openai_public.o200k_base()),
            CL100K: tiktoken.Encoding(**tiktoken_ext.openai_public.cl100k_base()),
        }


@pytest.mark.parametrize("name", SHA256)
def test_shipped_vocabularies_are_tiktokens(name: str) -> None:
    assert hashlib.sha256(vocabulary(name)).hexdigest() == SHA256[name]


@pytest.mark.parametrize(
    ("model", "encoding"),
    [
        ("gpt-4", "cl100k_base"),
        ("gpt-4-0613", "cl100k_base"),
        ("gpt-4-turbo-2024-04-09", "cl100k_base"),
        ("GPT-4", "cl100k_base"),
        ("azure/gpt-4", "cl100k_base"),
        ("ft:gpt-4-0613:acme::id", "cl100k_base"),
        ("gpt-3.5-turbo", "cl100k_base"),
        ("gpt-35-turbo-16k", "cl100k_base"),
        ("ft:gpt-3.5-turbo:acme", "cl100k_base"),
        ("text-embedding-3-small", "cl100k_base"),
        ("text-embedding-ada-002", "cl100k_base"),
        ("davinci-002", "cl100k_base"),
        ("gpt-4o", "o200k_base"),
        ("gpt-4o-mini", "o200k_base"),
        ("gpt-4.1", "o200k_base"),
        ("gpt-4.5-preview", "o200k_base"),
        ("ft:gpt-4o-mini:acme", "o200k_base"),
        ("gpt-5", "o200k_base"),
        ("o3", "o200k_base"),
        ("claude-sonnet-4-5", "o200k_base"),
        ("meta-llama/llama-3.1-8b", "o200k_base"),
        ("", "o200k_base"),
    ],
)
def test_encoding_of_a_model(model: str, encoding: str) -> None:
    assert encoding_name(model) == encoding


@pytest.mark.parametrize(
    ("text", "o200k", "cl100k"),
    [
        ("", 0, 0),
        ("hello world", 2, 2),
        ("The quick brown fox jumps over the lazy dog.", 10, 10),
        ("Größe, Übermut und süße Füchse – 1234567,89 €", 19, 20),
        ("Съешь ещё этих мягких французских булок", 11, 26),
        ("我能吞下玻璃而不伤身体。", 11, 17),
        ("私はガラスを食べられます。", 10, 15),
        ("나는 유리를 먹을 수 있어요.", 9, 15),
        ("أنا قادر على أكل الزجاج", 7, 16),
        ("मैं काँच खा सकता हूँ", 7, 21),
        ("👩\u200d👩\u200d👧\u200d👦 🇩🇪 ❤️", 16, 26),
        ("def f(x):\n\treturn x ** 2  # square\r\n", 13, 13),
        ("  \n\n \t mixed   blanks  ", 6, 6),
        ("I'LL've don't 'S", 7, 8),
        ("ΑΒΓ ǅ ʰ e\u0301", 11, 14),
    ],
)
def test_known_counts(text: str, o200k: int, cl100k: int) -> None:
    assert count(text, O200K) == o200k
    assert count(text, CL100K) == cl100k


def test_names_of_special_tokens_count_as_text() -> None:
    assert count("<|endoftext|> <|im_start|>", O200K) == 13
    assert count("<|endoftext|> <|im_start|>", CL100K) == 12


MIXED = st.text(
    alphabet=st.one_of(st.sampled_from(" \n\r\t'sSdMtLrEvaA1/!_é中\u0301\u00a0ʰǅ"), st.characters())
)


@given(text=MIXED)
@settings(deadline=None)
def test_counts_are_tiktokens(reference: dict[str, tiktoken.Encoding], text: str) -> None:
    for model, encoding in reference.items():
        assert count(text, model) == len(encoding.encode_ordinary(text))


@given(text=st.one_of(MIXED, st.text(alphabet=st.characters(categories=["Cs", "Ll", "So"]))))
@settings(deadline=None)
def test_text_has_no_more_tokens_than_bytes(text: str) -> None:
    for model in (O200K, CL100K):
        assert count(text, model) <= len(text.encode("utf-8", "surrogatepass"))


def test_slices_meet_between_words(reference: dict[str, tiktoken.Encoding]) -> None:
    words = "Don't  cut 中文 inside\n words, 12345 or \u00a0blanks! "
    for offset in range(0, len(words), 3):
        text = words[offset:] + words * 5_000
        for model, encoding in reference.items():
            assert count(text, model) == len(encoding.encode_ordinary(text))


@pytest.mark.parametrize("character", [" ", "\n", "\t", "a", "A", "1", "!", "中", "\u0301", "\ud800", "😀"])
@pytest.mark.parametrize("model", [O200K, CL100K])
def test_a_million_times_one_character(model: str, character: str) -> None:
    whole = count(character * 1_000_000, model)
    slices = 10 * count(character * 100_000, model)
    assert whole == slices
    assert 1_000_000 / 128 <= whole <= 1_000_000 * len(character.encode("utf-8", "surrogatepass"))


def test_an_endless_word_is_not_counted_lower(reference: dict[str, tiktoken.Encoding]) -> None:
    text = "Donaudampfschifffahrt" * 20_000
    for model, encoding in reference.items():
        exact = len(encoding.encode_ordinary(text))
        assert exact <= count(text, model) <= exact + 10


def test_first_need_loads_and_nothing_is_downloaded() -> None:
    script = """
import socket, json
class NoSocket:
    def __init__(self, *a, **k): raise AssertionError("network")
socket.socket = NoSocket
socket.getaddrinfo = NoSocket
from llmhub_meter import tokens
told = [tokens.is_loaded("gpt-4o"), tokens.is_loaded("gpt-4")]
told += [tokens.count("hello world", "gpt-4o"), tokens.is_loaded("gpt-4o"), tokens.is_loaded("gpt-4")]
told += [tokens.count("hello world", "gpt-4"), tokens.is_loaded("gpt-4")]
print(json.dumps(told))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False, 2, True, False, 2, True]


async def test_long_texts_are_counted_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    to_thread = tokens.asyncio.to_thread

    async def watched(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return await to_thread(*arguments)

    monkeypatch.setattr(tokens.asyncio, "to_thread", watched)
    assert count("warm", O200K) == 1
    assert await count_in_thread("hello world", O200K) == 2
    assert calls == 0
    assert await count_in_thread("hello world " * 5_000, O200K) == 10_001
    assert calls == 1
    assert await count_pieces(["hi"] * 5_000, 7, O200K) == 5_007
    assert calls == 2


async def tokens_of(chat: ChatText, model: str) -> int:
    return await count_pieces(chat.pieces, chat.overhead, model)


@pytest.mark.parametrize(("model", "tokens"), [("gpt-4o", 124), ("gpt-4", 129), ("gpt-3.5-turbo", 129)])
async def test_messages_as_openais_cookbook_counts_them(model: str, tokens: int) -> None:
    assert await tokens_of(chat_text(JARGON, model=model), model) == tokens


@pytest.mark.parametrize(("model", "tokens"), [("gpt-4o", 101), ("gpt-4", 105), ("gpt-3.5-turbo", 105)])
async def test_tools_as_openais_cookbook_counts_them(model: str, tokens: int) -> None:
    tool = {"type": "function", "function": WEATHER_FUNCTION}
    assert await tokens_of(chat_text(WEATHER, [tool], model=model), model) == tokens


def test_tools_count_the_same_in_every_api() -> None:
    chat = chat_text([], [{"type": "function", "function": WEATHER_FUNCTION}])
    schema = WEATHER_FUNCTION["parameters"]
    anthropic = {key: value for key, value in WEATHER_FUNCTION.items() if key != "parameters"}
    assert chat_text([], None, [WEATHER_FUNCTION]) == chat
    assert chat_text([], [{"type": "function", "strict": True, **WEATHER_FUNCTION}]) == chat
    assert chat_text([], [{**anthropic, "input_schema": schema}]) == chat


def test_nested_schemas_are_counted() -> None:
    nested = {"type": "array", "items": {"type": "object", "properties": {"town": {"type": "string"}}}}
    function = {"name": "f", "parameters": {"type": "object", "properties": {"places": nested}}}
    assert "town" in chat_text([], [{"function": function}]).pieces
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$defs": {"x": {"const": 5}}}}}
    assert "const:5" in chat_text([], response_format=schema).pieces


def test_each_medium_counts_once_and_never_as_text() -> None:
    encoded = "data:image/png;base64," + "A" * 5_000
    content = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": encoded, "detail": "high"}},
        {"type": "input_image", "image_url": encoded},
        {"type": "input_image", "file_id": "file-1"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 5_000}},
        {"type": "file", "file": {"file_data": encoded, "filename": "a.pdf"}},
        {"type": "input_file", "file_data": encoded},
        {"type": "document", "source": {"type": "base64", "data": "A" * 5_000}},
        {"type": "input_audio", "input_audio": {"data": "A" * 5_000, "format": "wav"}},
        {"image_url": encoded},
    ]
    chat = chat_text([{"role": "user", "content": content}])
    assert chat == ChatText(pieces=("user", "what is this?"), overhead=6, images=5, files=3, audio=1)


def test_text_that_looks_like_a_medium_is_text() -> None:
    looks = "data:image/png;base64," + "A" * 50
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "plain"}}
    chat = chat_text(
        [{"role": "user", "type": "image", "content": [{"type": "text", "text": looks}, document]}]
    )
    assert chat.pieces == ("user", looks, "plain")
    assert chat.files == 0


def test_tool_calls_and_results_of_every_api() -> None:
    chat = chat_text(
        [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "find", "arguments": '{"a":1}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "found"},
            {"type": "function_call", "call_id": "c", "name": "find", "arguments": '{"a":2}'},
            {"type": "function_call_output", "call_id": "c", "output": "again"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "t", "name": "find", "input": {"a": 3}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "thrice"}]},
        ]
    )
    assert sorted(chat.pieces) == sorted(
        ["assistant", "find", '{"a":1}', "tool", "found", "find", '{"a":2}', "again"]
        + ["assistant", "find", "a:3", "user", "thrice"]
    )


def test_a_system_text_is_a_message() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert chat_text(messages, system="be brief") == chat_text(
        [{"role": "system", "content": "be brief"}, *messages]
    )
    assert chat_text("hi").pieces == ("hi",)
    assert chat_text("hi").overhead == 6


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "role", "name", "content", "image_url", "input_audio", "source", "tool_calls"]
                + ["function", "parameters", "properties", "enum", "description", "arguments", "custom"]
            )
            | st.text(max_size=3),
            inner
            | st.sampled_from(["text", "image", "document", "function"])
            | st.dictionaries(st.just("type"), st.sampled_from(["text", "content"])),
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(messages=JUNK, tools=JUNK, functions=JUNK, system=JUNK, response_format=JUNK)
def test_no_shape_raises(
    messages: object, tools: object, functions: object, system: object, response_format: object
) -> None:
    chat = chat_text(messages, tools, functions, system=system, response_format=response_format)
    assert all(isinstance(piece, str) for piece in chat.pieces)
    assert min(chat.overhead, chat.images, chat.files, chat.audio) >= 0


def test_depth_and_size_don_t_raise() -> None:
    deep: Any = "core"
    for _ in range(100_000):
        deep = [{"content": deep}]
    assert chat_text(deep).pieces == ("core",)
    parameters: Any = {"const": 10**5_000}
    for _ in range(100_000):
        parameters = {"items": parameters}
    chat = chat_text([], [{"name": "f", "parameters": {"properties": {"p": parameters}}}])
    assert any(piece.startswith("const:0x") for piece in chat.pieces)
