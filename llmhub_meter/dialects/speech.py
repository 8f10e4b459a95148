"""Text to speech: https://platform.openai.com/docs/api-reference/audio/createSpeech

The answer is sound, with no usage in it: charged by the characters of the text.
"""

from dataclasses import replace
from typing import Any

from ..types import Usage
from .base import Answer, Ask, Body, Dialect, EventKind, Output, Prompt, StreamReader, required_text


class SpeechReader(StreamReader):
    """With `stream_format: "sse"`: pieces of sound, then a `done` event that may have usage."""

    def take(self, message: dict[str, Any]) -> EventKind:
        if message.get("type") == "speech.audio.delta" and message.get("audio"):
            self.output.seen = True
        return super().take(message)


class Speech(Dialect):
    name = "audio.speech"
    paths = ("/audio/speech",)
    types = frozenset({"audio"})
    units = frozenset({"1K characters"})
    money_keys = frozenset({"model", "input", "stream_format"})
    binary = True
    named_events = True
    reader = SpeechReader

    def ask(self, body: Body) -> Ask:
        text = required_text(body, "input")
        return Ask(model=required_text(body, "model"), writes=False, characters=len(text))

    def prompt(self, body: Body, model: str) -> Prompt:
        return Prompt((body["input"],))

    def output(self, answer: Body) -> Output:
        return Output(seen=bool(answer))

    def measure(self, usage: Usage, ask: Ask, answer: Answer) -> Usage:
        return replace(usage, characters=ask.characters)

    def measure_stream(self, usage: Usage, ask: Ask, output: Output) -> Usage:
        return replace(usage, characters=ask.characters)
