"""Recorded answers of many providers: what a meter reads out of each, whole and cut into pieces."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmhub_meter.dialects import DIALECTS, Answer, Ask, Dialect, StreamReader
from llmhub_meter.dialects.reported import Reported
from llmhub_meter.sse import EventSplitter

WIRE = Path(__file__).parents[1] / "data" / "wire"
DIALECT_OF = {f"openai.{dialect.name}": dialect for dialect in DIALECTS} | {
    {"messages": "anthropic.messages"}.get(dialect.name, dialect.name): dialect for dialect in DIALECTS
}

# Parts larger than their whole, which no total explains: dropped, so that they are charged as the plain kind.
NONSENSE = {
    "073-azure-foundry-openai-chat-string-tool-results-azure-grok-4-1-fast": "cached_tokens",
    "163-openrouter-openai-chat-stream-openrouter-stream-error": "reasoning_tokens",
}


@dataclass(frozen=True)
class Case:
    name: str
    meta: dict[str, Any]
    expected: dict[str, Any]
    body: bytes

    @classmethod
    def load(cls, folder: Path) -> "Case":
        meta, expected = (json.loads((folder / f"{name}.json").read_text()) for name in ("meta", "expected"))
        return cls(folder.name, meta, expected, (folder / "response.body").read_bytes())

    @property
    def dialect(self) -> Dialect:
        return DIALECT_OF[self.meta["dialect"].removesuffix(".stream")]

    @property
    def streams(self) -> bool:
        return bool(self.meta["dialect"].endswith(".stream"))

    def check(self, reported: Reported | None) -> None:
        if not self.expected["usage_reported"]:
            assert reported is None
            return
        assert reported is not None
        assert reported.prompt_known and reported.completion_known
        usage = reported.usage
        wanted = {
            "prompt_tokens": self.expected["input_tokens"],
            "completion_tokens": self.expected["output_tokens"],
            "cached_tokens": self.expected["cached_input_tokens"],
            "cache_write_tokens": self.expected["cache_write_tokens"],
            "reasoning_tokens": self.expected["reasoning_tokens"],
            "audio_prompt_tokens": self.expected["audio_input_tokens"],
            "audio_completion_tokens": self.expected["audio_output_tokens"],
        }
        if self.name in NONSENSE:
            wanted[NONSENSE[self.name]] = 0
        assert {field: getattr(usage, field) for field in wanted} == wanted
        assert usage.invalid == (self.name in NONSENSE)


CASES = [Case.load(folder) for folder in sorted(WIRE.iterdir()) if folder.is_dir()]
JSON_CASES = [case for case in CASES if not case.streams]
STREAM_CASES = [case for case in CASES if case.streams]


@pytest.mark.parametrize("case", JSON_CASES, ids=lambda case: case.name)
def test_json(case: Case) -> None:
    answer = Answer(case.body)
    case.check(case.dialect.reported(answer))
    output = case.dialect.output(answer.full)
    assert output.seen == case.expected["billable"]
    assert output.images == (case.expected["images"] or 0)
    if case.expected["model"]:
        assert answer.head.model == case.expected["model"]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("case", STREAM_CASES, ids=lambda case: case.name)
def test_stream(case: Case, size: int) -> None:
    reader = read(case, size)
    case.check(reader.reported)
    assert reader.readable
    assert reader.output.seen or reader.failed
    assert reader.failed == ("error event" in case.expected["note"])
    if case.expected["model"]:
        assert reader.model == case.expected["model"]
    whole = read(case, len(case.body))
    assert (reader.output.texts, reader.readable) == (whole.output.texts, whole.readable)


def read(case: Case, size: int) -> StreamReader:
    reader, splitter = case.dialect.reader(Ask("m", stream=True)), EventSplitter()
    passed = []
    for start in range(0, len(case.body), size):
        passed += splitter.feed(case.body[start : start + size])
    passed.append(splitter.rest())
    assert b"".join(passed) == case.body
    for event in passed:
        reader.read(event)
    return reader
