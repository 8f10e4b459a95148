"""Counting tokens offline: exact for OpenAI's models, an estimate for all others.

The vocabularies ship with the package, so nothing is ever downloaded.
"""

import asyncio
import gzip
import re
from binascii import a2b_base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from threading import Lock
from typing import Final

from tiktoken import Encoding

_INLINE_CHARACTERS = 20_000
_CHARACTERS_A_PIECE = 20
"""A call of the tokenizer costs as much time as so many characters."""

# A million blanks in a row make tiktoken panic, with an error that is no Exception; slices stay far below.
_SLICE_CHARACTERS = 100_000
_SEAM_CHARACTERS = 2_000
# A blank after anything that is not blank begins a new word in both encodings: a cut there changes nothing.
_SEAM = re.compile(r"(?<=\S) ")

_CL100K_MODELS = re.compile(
    r"(?:ft:)?(?:gpt-4(?![\w.])|gpt-3\.?5|text-embedding-(?:3-|ada-002)|(?:davinci|babbage)-002)"
)


def encoding_name(model: str) -> str:
    """The encoding of a model's family: cl100k_base for older OpenAI models, o200k_base for the rest."""
    known = _CL100K_MODELS.match(model.rpartition("/")[2].lower())
    return "cl100k_base" if known else "o200k_base"


def count(text: str, model: str) -> int:
    """The tokens of `text`, whatever it holds; names of special tokens count as ordinary text."""
    return _count(text, _vocabulary(model).encoding())


def is_loaded(model: str) -> bool:
    """Whether the model's vocabulary is in memory, so that counting starts at once."""
    return _vocabulary(model).loaded


async def count_in_thread(text: str, model: str) -> int:
    """Like `count`, but long texts and the first load don't hold up the event loop."""
    return await count_pieces((text,), 0, model)


async def count_pieces(pieces: Sequence[str], overhead: int, model: str) -> int:
    """The tokens of all pieces, each counted by itself, and `overhead`; in a thread where that takes long."""
    vocabulary = _vocabulary(model)
    work = sum(map(len, pieces)) + _CHARACTERS_A_PIECE * len(pieces)
    if vocabulary.loaded and work <= _INLINE_CHARACTERS:
        return overhead + _count_all(pieces, vocabulary)
    return overhead + await asyncio.to_thread(_count_all, pieces, vocabulary)


class _Vocabulary:
    """One encoding, built on first need, by one thread while others wait."""

    def __init__(self, name: str, pattern: str) -> None:
        self._name = name
        self._pattern = pattern
        self._lock = Lock()
        self._encoding: Encoding | None = None

    @property
    def loaded(self) -> bool:
        return self._encoding is not None

    def encoding(self) -> Encoding:
        if self._encoding is None:
            with self._lock:
                if self._encoding is None:
                    self._encoding = self._build()
        return self._encoding

    def _build(self) -> Encoding:
        packed = files("llmhub_meter").joinpath("data", f"{self._name}.tiktoken.gz").read_bytes()
        lines = (line.split(b" ") for line in gzip.decompress(packed).splitlines())
        ranks = {a2b_base64(token): int(rank) for token, rank in lines}
        # Special tokens stand in no text that we count, so the encoding knows none.
        return Encoding(self._name, pat_str=self._pattern, mergeable_ranks=ranks, special_tokens={})


# The only thing kept for the life of the process: immutable data, 75 MB and 35 MB.
_VOCABULARIES: Final = {
    "o200k_base": _Vocabulary(
        "o200k_base",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "cl100k_base": _Vocabulary(
        "cl100k_base",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    ),
}


def _vocabulary(model: str) -> _Vocabulary:
    return _VOCABULARIES[encoding_name(model)]


def _count_all(pieces: Sequence[str], vocabulary: _Vocabulary) -> int:
    encoding = vocabulary.encoding()
    return sum(_count(piece, encoding) for piece in pieces)


def _count(text: str, encoding: Encoding) -> int:
    return sum(len(encoding.encode_ordinary(part)) for part in _slices(text))


def _slices(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _SLICE_CHARACTERS:
        end = start + _SLICE_CHARACTERS
        for seam in _SEAM.finditer(text, end - _SEAM_CHARACTERS, end):
            end = seam.start()
        yield text[start:end]
        start = end
    yield text[start:]


@dataclass(frozen=True, slots=True)
class ChatText:
    """What there is to count in a chat request: pieces of text, tokens around them, and media by kind."""

    pieces: tuple[str, ...] = ()
    overhead: int = 0
    images: int = 0
    files: int = 0
    audio: int = 0


def chat_text(
    messages: object,
    tools: object = None,
    functions: object = None,
    *,
    system: object = None,
    response_format: object = None,
    model: str = "",
) -> ChatText:
    """Take a chat request apart as OpenAI's cookbook counts it; any shape is read, none raises.

    Takes messages of the chat, responses and Anthropic APIs; encoded media are never text.
    """
    reader = _ChatReader()
    if system:
        reader.read_message({"role": "system", "content": system})
    for message in messages if isinstance(messages, list | tuple) else [messages]:
        if message is not None:
            reader.read_message(message)
    reader.read_tools([*_listed(tools), *_listed(functions)], model)
    if isinstance(response_format, Mapping):
        reader.read_lines(response_format.get("json_schema"))
        reader.read_lines(response_format.get("schema"))
    return ChatText(
        pieces=tuple(reader.pieces),
        overhead=reader.overhead + _REPLY_PRIMING,
        images=reader.media["images"],
        files=reader.media["files"],
        audio=reader.media["audio"],
    )


# Tokens beside the text: OpenAI's cookbook, "How to count tokens with tiktoken".
_A_MESSAGE = 3
_A_NAME = 1
_REPLY_PRIMING = 3
_A_FUNCTION = {"o200k_base": 7, "cl100k_base": 10}
_PROPERTIES = 3
_A_PROPERTY = 3
_AN_ENUM = -3
_AN_ENUM_ITEM = 3
_TOOLS_END = 12

_MEDIA_TYPES: Final[Mapping[str, str]] = {
    "image": "images",
    "image_url": "images",
    "input_image": "images",
    "computer_screenshot": "images",
    "image_generation_call": "images",
    "file": "files",
    "input_file": "files",
    "document": "files",
    "video_url": "files",
    "input_audio": "audio",
}
_MEDIA_FIELDS: Final[Mapping[str, str]] = {
    "image": "images",
    "images": "images",
    "image_url": "images",
    "file": "files",
    "video_url": "files",
    "audio": "audio",
    "input_audio": "audio",
}
_UNSEEN_FIELDS: Final = frozenset(
    "type id call_id tool_call_id tool_use_id item_id status detail format media_type mime_type"
    " data b64_json file_data file_id file_url url result encrypted_content signature"
    " cache_control annotations logprobs".split()
)
"""Fields that a model doesn't read as text: references, settings, and encoded bytes."""
_ARGUMENT_FIELDS: Final = frozenset({"arguments", "input"})
_SETTINGS_OF_A_TOOL: Final = frozenset({"type", "strict", "cache_control"})
_SETTINGS_OF_A_SCHEMA: Final = frozenset({"type", "required", "additionalProperties", "$schema"})


class _ChatReader:
    """Gathers pieces and sums over one request. Nesting is walked with a stack: clients set its depth."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.overhead = 0
        self.media = {"images": 0, "files": 0, "audio": 0}

    def read_message(self, message: object) -> None:
        self.overhead += _A_MESSAGE
        if isinstance(message, Mapping) and message.get("name"):
            self.overhead += _A_NAME
        unread = [message]
        while unread:
            value = unread.pop()
            if isinstance(value, str):
                self.pieces.append(value)
            elif isinstance(value, list | tuple):
                unread.extend(reversed(value))
            elif isinstance(value, Mapping):
                unread.extend(reversed(self._read_part(value)))

    def _read_part(self, part: Mapping[object, object]) -> list[object]:
        """Note the media of a message or a part of one, and return what is left to read."""
        media = _media_kind(part)
        if media:
            self.media[media] += 1
        found: list[object] = []
        for field, value in part.items():
            if field == "data" and part.get("type") == "text":
                found.append(value)
            elif field in _ARGUMENT_FIELDS and isinstance(value, Mapping):
                self.read_lines(value)
            elif isinstance(field, str) and field in _MEDIA_FIELDS:
                if value and not media:
                    self.media[_MEDIA_FIELDS[field]] += len(value) if isinstance(value, list) else 1
            elif field not in _UNSEEN_FIELDS:
                found.append(value)
        return found

    def read_tools(self, tools: Sequence[object], model: str) -> None:
        for tool in tools:
            if isinstance(tool, Mapping):
                self.overhead += _A_FUNCTION[encoding_name(model)]
                self._read_tool(tool)
        if tools:
            self.overhead += _TOOLS_END

    def _read_tool(self, tool: Mapping[object, object]) -> None:
        inner = tool.get("function") or tool.get("custom")
        function = inner if isinstance(inner, Mapping) else tool
        self.pieces.append(f"{_text(function.get('name'))}:{_description(function)}")
        for field, value in function.items():
            if field in ("parameters", "input_schema") and isinstance(value, Mapping):
                self._read_schema(value)
            elif field not in _SETTINGS_OF_A_TOOL and field not in ("name", "description"):
                self.read_lines({field: value})

    def _read_schema(self, schema: Mapping[object, object]) -> None:
        for field, value in schema.items():
            if field == "properties" and isinstance(value, Mapping):
                self.overhead += _PROPERTIES if value else 0
                for name, property in value.items():
                    self._read_property(_text(name), property)
            elif field not in _SETTINGS_OF_A_SCHEMA:
                self.read_lines({field: value})

    def _read_property(self, name: str, schema: object) -> None:
        self.overhead += _A_PROPERTY
        if not isinstance(schema, Mapping):
            self.pieces.append(name)
            return
        choices = _listed(schema.get("enum"))
        if choices:
            self.overhead += _AN_ENUM + _AN_ENUM_ITEM * len(choices)
            self.pieces.extend(map(_text, choices))
        kinds = schema.get("type")
        kind = "|".join(map(_text, kinds)) if isinstance(kinds, list) else _text(kinds)
        self.pieces.append(f"{name}:{kind}:{_description(schema)}")
        for field, value in schema.items():
            if field not in ("type", "description", "enum"):
                self.read_lines({field: value})

    def read_lines(self, value: object) -> None:
        """Count nested data that the cookbook is silent about: each field and each value as a property."""
        unread = [("", value)]
        while unread:
            name, value = unread.pop()
            if isinstance(value, Mapping):
                unread.extend((_text(field), inner) for field, inner in value.items())
            elif isinstance(value, list | tuple):
                unread.extend(("", inner) for inner in value)
            elif value is not None:
                name = f"{name}:{_text(value)}" if name else _text(value)
            if name:
                self.overhead += _A_PROPERTY
                self.pieces.append(name)


def _media_kind(part: Mapping[object, object]) -> str | None:
    kind, source = part.get("type"), part.get("source")
    if kind == "document" and isinstance(source, Mapping) and source.get("type") in ("text", "content"):
        return None
    return _MEDIA_TYPES.get(kind) if isinstance(kind, str) else None


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else ()


def _description(described: Mapping[object, object]) -> str:
    return _text(described.get("description")).removesuffix(".")


def _text(value: object) -> str:
    if value is None or isinstance(value, list | tuple | Mapping):
        return ""
    # Python refuses to print a number of more than 4,300 digits in decimal, but not in hexadecimal.
    if isinstance(value, int) and value.bit_length() > 10_000:
        return hex(value)
    return str(value)
