"""Speech to text: https://platform.openai.com/docs/api-reference/audio/createTranscription

A form with a sound file. Usage comes as tokens, as a duration or not at all: then the file is measured.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from .. import media
from ..errors import InvalidRequest
from ..types import Usage
from .base import (
    Answer,
    Ask,
    Body,
    Dialect,
    EventKind,
    Output,
    Prompt,
    StreamReader,
    flag,
    refuse_state,
    required_text,
)
from .reported import Reported, count

TEXT_FORMATS = ("text", "srt", "vtt")


class TranscriptionsReader(StreamReader):
    """Deltas or segments of text, then a `transcript.text.done` event that has the usage."""

    def take(self, message: dict[str, Any]) -> EventKind:
        kind = message.get("type")
        if kind == "error":
            self.failed = True
        elif kind == "transcript.text.delta":
            self.output.add(("text",), message.get("delta"))
        elif kind == "transcript.text.segment":
            self.output.add(("segment",), message.get("text"))
        elif kind == "transcript.text.done" and not self.output.delivered:
            self.output.add(("text",), message.get("text"))
        return super().take(message)

    def report(self, usage: object) -> bool:
        if not isinstance(usage, dict) or not usage:
            return False
        self.reported = read_usage(usage)
        return True


class Transcriptions(Dialect):
    name = "audio.transcriptions"
    paths = ("/audio/transcriptions", "/audio/translations")
    types = frozenset({"audio"})
    units = frozenset({"1K tokens", "minute"})
    money_keys = Dialect.money_keys | {"file", "response_format"}
    multipart = True
    reader = TranscriptionsReader

    def ask(self, body: Body) -> Ask:
        refuse_state(body, ("file_id",))
        for name in ("url", "file_url"):
            if body.get(name):
                raise InvalidRequest(f"{name!r} is not available here: send the file itself.", param=name)
        file = body.get("file")
        if not isinstance(file, bytes) or not file:
            raise InvalidRequest("'file' is missing, empty or not a file.", param="file")
        return Ask(
            model=required_text(body, "model"),
            stream=flag(body, "stream"),
            seconds=media.length(file).seconds,
        )

    def prompt(self, body: Body, model: str) -> Prompt:
        text = body.get("prompt")
        return Prompt((text,) if isinstance(text, str) else (), audio=1)

    def answers_text(self, body: Body) -> bool:
        return body.get("response_format") in TEXT_FORMATS

    def reported(self, answer: Answer) -> Reported | None:
        usage = answer.head.usage
        return read_usage(usage) if isinstance(usage, dict) and usage else None

    def output(self, answer: Body) -> Output:
        output = Output()
        output.add(("text",), answer.get("text"))
        return output

    def measure(self, usage: Usage, ask: Ask, answer: Answer) -> Usage:
        if not usage.seconds and (said := _seconds(answer.full.get("duration"))):
            return replace(usage, seconds=said)
        return self.measure_stream(usage, ask, Output())

    def measure_stream(self, usage: Usage, ask: Ask, output: Output) -> Usage:
        if usage.seconds:
            return usage
        counted = usage.estimated or not (usage.prompt_tokens or usage.completion_tokens)
        return replace(usage, seconds=ask.seconds, estimated=counted)


def read_usage(usage: Mapping[str, Any]) -> Reported:
    """A usage of either type: the tokens in it, and the seconds where it has some."""
    seconds = _seconds(usage.get("seconds")) or _seconds(usage.get("prompt_audio_seconds"))
    reported = Reported.read(_with_audio_inside(usage))
    invalid = reported.usage.invalid or (usage.get("type") == "duration" and not seconds)
    return replace(reported, usage=replace(reported.usage, seconds=seconds, invalid=invalid))


def _with_audio_inside(usage: Mapping[str, Any]) -> Mapping[str, Any]:
    """Mistral's `prompt_tokens` leave the audio tokens out, which its total counts."""
    details = usage.get("prompt_tokens_details")
    if not isinstance(details, dict):
        return usage
    given = (usage.get("prompt_tokens"), usage.get("completion_tokens"), usage.get("total_tokens"))
    try:
        prompt, completion, total = (count(value) for value in given)
        audio = count(details.get("audio_tokens"))
    except Exception:
        # Nonsense is dealt with where all usages are read.
        return usage
    if prompt is None or total is None or not audio or total < prompt + (completion or 0) + audio:
        return usage
    return {**usage, "prompt_tokens": prompt + audio}


def _seconds(value: object) -> Fraction:
    """A duration as it is written, exactly; 0 for anything that is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return Fraction()
    return Fraction(str(value)) if 0 < value <= media.MAX_SECONDS else Fraction()
