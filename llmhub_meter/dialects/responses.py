"""Responses: https://platform.openai.com/docs/api-reference/responses"""

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import InvalidRequest
from ..tokens import chat_text
from .base import (
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
    refuse_references,
    refuse_state,
    required_text,
    texts_in,
)

_STATE = ("previous_response_id", "conversation", "background", "prompt", "container")
_REFERENCES = frozenset({"file_id", "vector_store_ids", "container_id"})
_ENDINGS = ("response.completed", "response.incomplete", "response.failed")


class ResponsesReader(StreamReader):
    """Typed events with deltas; the last one has the whole response with its usage."""

    def take(self, message: dict[str, Any]) -> EventKind:
        kind = message.get("type")
        if not isinstance(kind, str):
            return "pass"
        response = message.get("response")
        if isinstance(response, dict):
            if isinstance(response.get("model"), str):
                self.model = response["model"]
            self.report(response.get("usage"))
        self.report(message.get("usage"))
        if kind in ("error", "response.failed"):
            self.failed = True
        elif kind in _ENDINGS:
            self.output.seen = True
        elif kind.endswith(".delta") and "audio.delta" not in kind:
            place = (kind, message.get("output_index"), message.get("content_index"))
            self.output.add(place, message.get("delta"))
        elif kind == "response.output_item.added" and isinstance(message.get("item"), dict):
            self.output.add(("name", message.get("output_index")), message["item"].get("name"))
        return "pass"


class Responses(Dialect):
    name = "responses"
    paths = ("/responses",)
    types = frozenset({"chat"})
    maximum_fields = ("max_output_tokens",)
    money_keys = Dialect.money_keys | {*maximum_fields, *_STATE, "tools"}
    named_events = True
    reader = ResponsesReader

    def ask(self, body: Body) -> Ask:
        if not isinstance(body.get("input"), str | list):
            raise InvalidRequest("'input' is missing or neither a string nor a list.", param="input")
        refuse_state(body, _STATE)
        refuse_references(body.get("input"), _REFERENCES, "input")
        refuse_references(body.get("tools"), _REFERENCES, "tools")
        limit, fields = maximum(body, self.maximum_fields)
        return Ask(
            model=required_text(body, "model"),
            stream=flag(body, "stream"),
            maximum=limit,
            maximum_fields=fields,
        )

    def prompt(self, body: Body, model: str) -> Prompt:
        text = body.get("text")
        found = chat_text(
            body.get("input"),
            body.get("tools"),
            system=body.get("instructions"),
            response_format=text.get("format") if isinstance(text, Mapping) else None,
            model=model,
        )
        tools = sum(1 for _ in hosted_tools(body))
        return Prompt(found.pieces, found.overhead, found.images, found.files, found.audio, tools)

    def unpriced(self, body: Body) -> Iterator[str]:
        yield from super().unpriced(body)
        yield from hosted_tools(body)

    def output(self, answer: Body) -> Output:
        output = Output()
        items = answer.get("output")
        for index, item in enumerate(items if isinstance(items, list) else []):
            if not isinstance(item, dict):
                continue
            output.seen = True
            for field in ("content", "summary"):
                for text in texts_in(item.get(field)):
                    output.add((index, field), text)
            for field in ("name", "arguments", "input"):
                output.add((index, field), item.get(field))
        return output


class InputTokens(Responses):
    """Counting a request's input is free."""

    name = "responses.input_tokens"
    paths = ("/responses/input_tokens",)
    free = True

    def output(self, answer: Body) -> Output:
        return Output(seen="input_tokens" in answer)
