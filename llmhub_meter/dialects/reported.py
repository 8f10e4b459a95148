"""The usage object of an answer, whatever the provider's habit, normalised: details inside totals.

Rules from recorded answers: cached, audio and image tokens stand in `*_details`, or beside them (DeepSeek's
`prompt_cache_hit_tokens`, Moonshot's `cached_tokens`, and Anthropic's `cache_*_input_tokens`, which its
`input_tokens` leave out); xAI reports reasoning beside `completion_tokens`, Gemini's OpenAI path shows it in
`total_tokens` alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..types import Usage

MAX_COUNT = 10**9
"""No answer uses more tokens; a larger count is nonsense."""

_APART = ("cache_read_input_tokens", "cache_creation_input_tokens")


class _Nonsense(Exception):
    """A value that is no count."""


@dataclass(frozen=True, slots=True)
class Reported:
    """A reported usage and how far it can be believed."""

    usage: Usage
    prompt_known: bool
    """False: the prompt has to be counted."""
    completion_known: bool
    """False: the output has to be counted."""

    @classmethod
    def read(cls, usage: Mapping[str, Any]) -> "Reported":
        """Reads tokens by kind; nonsense makes its part unknown and marks the usage invalid."""
        return _Reader(usage).read()


class _Reader:
    def __init__(self, usage: Mapping[str, Any]) -> None:
        self.usage = usage
        self.invalid = False

    def read(self) -> Reported:
        prompt = self._first("prompt_tokens", "input_tokens")
        completion = self._first("completion_tokens", "output_tokens")
        total = self._first("total_tokens")
        prompt_bad = self._bad("prompt_tokens", "input_tokens")
        completion_bad = self._bad("completion_tokens", "output_tokens")

        details = self._details("prompt_tokens_details", "input_tokens_details", "input_token_details")
        written = self._details("completion_tokens_details", "output_tokens_details", "output_token_details")
        cached = self._count(details.get("cached_tokens")) or self._first(
            "prompt_cache_hit_tokens", "cached_tokens", "cache_read_input_tokens", "num_cached_tokens"
        )
        cache_write = self._count(details.get("cache_write_tokens")) or self._first(
            "cache_creation_input_tokens", "cache_write_tokens"
        )
        audio = self._count(details.get("audio_tokens"))
        image = self._count(details.get("image_tokens"))
        reasoning = self._count(written.get("reasoning_tokens")) or self._first("reasoning_tokens")
        audio_out = self._count(written.get("audio_tokens"))

        prompt_known = prompt is not None and not prompt_bad
        completion_known = completion is not None and not completion_bad
        prompt_tokens, completion_tokens = prompt or 0, completion or 0
        if total is not None:
            if prompt_known and completion is None and not completion_bad:
                # Embeddings report no output at all; a total above the prompt is output all the same.
                completion_tokens, completion_known = max(0, total - prompt_tokens), True
            elif prompt is None and not prompt_bad and completion is None and not completion_bad:
                prompt_tokens, prompt_known, completion_known = total, True, True
            elif prompt is None and not prompt_bad and completion_known and total > completion_tokens:
                prompt_tokens, prompt_known = total - completion_tokens, True
        elif prompt_known and completion is None and not completion_bad:
            completion_known = True

        if prompt_known and completion_known:
            unexplained = (total or 0) - prompt_tokens - completion_tokens
            parts = (cached or 0) + (cache_write or 0)
            if unexplained >= parts > prompt_tokens or self._cache_is_apart(total, unexplained, parts):
                prompt_tokens += parts
                unexplained -= parts
            if unexplained > 0:
                completion_tokens += unexplained
                reasoning = reasoning or unexplained

        cached, cache_write = self._within(prompt_tokens, cached), self._within(prompt_tokens, cache_write)
        if cached + cache_write > prompt_tokens:
            self.invalid = True
            cache_write = 0
        return Reported(
            Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                cached_tokens=cached,
                cache_write_tokens=cache_write,
                audio_prompt_tokens=self._within(prompt_tokens, audio),
                image_prompt_tokens=self._within(prompt_tokens, image),
                reasoning_tokens=self._within(completion_tokens, reasoning),
                audio_completion_tokens=self._within(completion_tokens, audio_out),
                invalid=self.invalid,
            ),
            prompt_known,
            completion_known,
        )

    def _cache_is_apart(self, total: int | None, unexplained: int, parts: int) -> bool:
        """Whether the names are Anthropic's, whose input leaves the cached parts out. A total may object."""
        given = {name for name, value in self.usage.items() if value is not None}
        named = "input_tokens" in given and not given.isdisjoint(_APART)
        return named and "prompt_tokens" not in given and (total is None or unexplained >= parts)

    def _within(self, whole: int, part: int | None) -> int:
        """A part that is larger than its whole is dropped: it is then charged as the plain kind."""
        if part is not None and part > whole:
            self.invalid = True
            return 0
        return part or 0

    def _first(self, *names: str) -> int | None:
        for name in names:
            if name in self.usage and (count := self._count(self.usage[name])) is not None:
                return count
        return None

    def _bad(self, *names: str) -> bool:
        """Whether a field is there but is no count, so that its part is unknown rather than absent."""
        given = [self.usage[name] for name in names if self.usage.get(name) is not None]
        return bool(given) and all(_is_bad(value) for value in given)

    def _count(self, value: object) -> int | None:
        """A count of any spelling; None where absent or nonsense, which is noted."""
        try:
            return count(value)
        except _Nonsense:
            self.invalid = True
            return None

    def _details(self, *names: str) -> Mapping[str, Any]:
        for name in names:
            found = self.usage.get(name)
            if isinstance(found, dict):
                return found
        return {}


def count(value: object) -> int | None:
    """A token count: integers, also as text or as a float without fraction. Raises for nonsense."""
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        if not (text.isascii() and text.isdigit() and len(text) <= 15):
            raise _Nonsense
        value = int(text)
    elif isinstance(value, float):
        if not math.isfinite(value) or not value.is_integer():
            raise _Nonsense
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise _Nonsense
    return value


def _is_bad(value: object) -> bool:
    try:
        return count(value) is None
    except _Nonsense:
        return True
