"""Chat completions: https://platform.openai.com/docs/api-reference/chat"""

from collections.abc import Iterator
from typing import Any

from ..errors import InvalidRequest
from ..tokens import chat_text
from .base import (
    MAX_CHOICES,
    Ask,
    Body,
    Dialect,
    EventKind,
    Output,
    Prompt,
    StreamReader,
    flag,
    hosted_tools,
    maximum,
    read_bare,
    refuse_references,
    required_text,
    texts_in,
    whole,
)


class ChatReader(StreamReader):
    """Chunks with deltas; usage in any of them, in one with empty choices, or inside `x_groq`."""

    def take(self, message: dict[str, Any]) -> EventKind:
        if message.get("error"):
            self.failed = True
        if isinstance(message.get("model"), str):
            self.model = message["model"] or self.model
        choices = message.get("choices")
        if isinstance(choices, list):
            for choice in choices:
                if isinstance(choice, dict):
                    self.read_choice(choice)
        read_bare(self.output, message)
        groq = message.get("x_groq")
        found = self.report(message.get("usage")) or (
            isinstance(groq, dict) and self.report(groq.get("usage"))
        )
        return "usage" if found and choices == [] else "pass"

    def read_choice(self, choice: dict[str, Any]) -> None:
        read_message(self.output, choice.get("index", 0), choice.get("delta") or choice.get("message"))


class Chat(Dialect):
    name = "chat"
    paths = ("/chat/completions",)
    types = frozenset({"chat", "completion"})
    maximum_fields = ("max_tokens", "max_completion_tokens")
    money_keys = Dialect.money_keys | {*maximum_fields, "stream_options", "web_search_options", "modalities"}
    asks_for_usage = True
    reader = ChatReader

    def ask(self, body: Body) -> Ask:
        if not isinstance(body.get("messages"), list):
            raise InvalidRequest("'messages' is missing or not a list.", param="messages")
        refuse_references(body["messages"], frozenset({"file_id"}), "messages")
        limit, fields = maximum(body, self.maximum_fields)
        return Ask(
            model=required_text(body, "model"),
            stream=flag(body, "stream"),
            choices=whole(body, "n", most=MAX_CHOICES) or 1,
            maximum=limit,
            maximum_fields=fields,
            wants_usage=wants_usage(body),
            speaks=isinstance(body.get("modalities"), list) and "audio" in body["modalities"],
        )

    def prompt(self, body: Body, model: str) -> Prompt:
        found = chat_text(
            body.get("messages"),
            body.get("tools"),
            body.get("functions"),
            response_format=body.get("response_format"),
            model=model,
        )
        tools = sum(1 for _ in hosted_tools(body)) + (body.get("web_search_options") is not None)
        return Prompt(found.pieces, found.overhead, found.images, found.files, found.audio, tools)

    def unpriced(self, body: Body) -> Iterator[str]:
        yield from super().unpriced(body)
        # Empty options search too; `search_parameters` is xAI's name for them, `enable_search` DashScope's.
        yield from (
            name for name in ("web_search_options", "search_parameters") if body.get(name) is not None
        )
        # `models` and `plugins` are OpenRouter's: a dearer fallback model, a paid web search.
        yield from (name for name in ("enable_search", "models", "plugins") if body.get(name))
        yield from hosted_tools(body)

    def output(self, answer: Body) -> Output:
        output = Output()
        choices = answer.get("choices")
        for index, choice in enumerate(choices if isinstance(choices, list) else []):
            if isinstance(choice, dict):
                output.seen = True
                read_message(output, index, choice.get("message"))
        read_bare(output, answer)
        return output


def wants_usage(body: Body) -> bool:
    """Whether the client asked for usage in its stream."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise InvalidRequest("'stream_options' must be an object.", param="stream_options")
    return flag(options, "include_usage")


def read_message(output: Output, index: object, message: object) -> None:
    """Text of a message or of a delta: content, refusal, reasoning by its several names, and tool calls."""
    if not isinstance(message, dict):
        return
    for field in ("content", "refusal", "reasoning_content", "reasoning"):
        for text in texts_in(message.get(field)):
            output.add((index, field), text)
    audio = message.get("audio")
    if isinstance(audio, dict):
        output.add((index, "audio"), audio.get("transcript"))
    calls = message.get("tool_calls")
    for position, call in enumerate(calls if isinstance(calls, list) else []):
        if isinstance(call, dict):
            _read_call(output, (index, "tool", call.get("index", position)), call.get("function"))
    _read_call(output, (index, "function"), message.get("function_call"))


def _read_call(output: Output, place: tuple[object, ...], function: object) -> None:
    if isinstance(function, dict):
        output.add((*place, "name"), function.get("name"))
        output.add((*place, "arguments"), function.get("arguments"))
