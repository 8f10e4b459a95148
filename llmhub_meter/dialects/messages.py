"""Anthropic's messages: https://docs.anthropic.com/en/api/messages

Its `input_tokens` leave cache reads and writes out; in a stream the usage of `message_delta` is the final
one, field by field over that of `message_start`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..errors import InvalidRequest
from ..tokens import chat_text
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
    maximum,
    refuse_references,
    refuse_state,
    required_text,
)
from .reported import Reported

_SERVER_TOOLS = ("web_search", "web_fetch", "code_execution", "mcp", "advisor", "tool_search")
_COUNTS = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


class MessagesReader(StreamReader):
    """Content blocks with deltas, between `message_start` and `message_delta`."""

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        self._usage: dict[str, Any] = {}

    def take(self, message: dict[str, Any]) -> EventKind:
        kind = message.get("type")
        if kind == "error" or message.get("error"):
            self.failed = True
        started = message.get("message")
        if isinstance(started, dict):
            self.model = started["model"] if isinstance(started.get("model"), str) else self.model
            self._merge(started.get("usage"), final=False)
        self._merge(message.get("usage"), final=True)
        place = (message.get("index"),)
        block = message.get("content_block")
        if isinstance(block, dict):
            _read_block(self.output, place, block)
        delta = message.get("delta")
        if isinstance(delta, dict):
            for field in ("text", "partial_json", "thinking"):
                self.output.add((*place, field), delta.get(field))
        if kind == "message_stop":
            self.output.seen = True
        return "pass"

    def _merge(self, usage: object, *, final: bool) -> None:
        if not isinstance(usage, dict) or not usage:
            return
        self._usage |= {name: value for name, value in usage.items() if value is not None}
        reported = read_usage(self._usage)
        # The start has a placeholder for the output.
        self.reported = reported if final else replace(reported, completion_known=False)


class Messages(Dialect):
    name = "messages"
    paths = ("/messages",)
    types = frozenset({"chat"})
    maximum_fields = ("max_tokens",)
    money_keys = Dialect.money_keys | {"max_tokens", "container", "mcp_servers", "speed", "tools"}
    anthropic = True
    named_events = True
    reader = MessagesReader

    def ask(self, body: Body) -> Ask:
        if not isinstance(body.get("messages"), list):
            raise InvalidRequest("'messages' is missing or not a list.", param="messages")
        refuse_state(body, ("container",))
        refuse_references(body["messages"], frozenset({"file_id"}), "messages")
        limit, fields = maximum(body, self.maximum_fields)
        return Ask(
            model=required_text(body, "model"),
            stream=flag(body, "stream"),
            maximum=limit,
            maximum_fields=fields,
        )

    def prompt(self, body: Body, model: str) -> Prompt:
        found = chat_text(body.get("messages"), body.get("tools"), system=body.get("system"), model=model)
        tools = sum(1 for _ in _server_tools(body))
        return Prompt(found.pieces, found.overhead, found.images, found.files, found.audio, tools)

    def unpriced(self, body: Body) -> Iterator[str]:
        if body.get("service_tier") not in (None, "auto", "default", "standard_only"):
            yield "service_tier"
        yield from (name for name in ("mcp_servers", "speed", "inference_geo") if body.get(name) is not None)
        yield from _server_tools(body)

    def reported(self, answer: Answer) -> Reported | None:
        usage = answer.head.usage
        return read_usage(usage) if isinstance(usage, dict) and usage else None

    def output(self, answer: Body) -> Output:
        output = Output()
        blocks = answer.get("content")
        for index, block in enumerate(blocks if isinstance(blocks, list) else []):
            if isinstance(block, dict):
                output.seen = True
                _read_block(output, (index,), block)
        return output


class CountTokens(Messages):
    """Counting a request's input is free."""

    name = "messages.count_tokens"
    paths = ("/messages/count_tokens",)
    free = True

    def output(self, answer: Body) -> Output:
        return Output(seen="input_tokens" in answer)


def read_usage(usage: Mapping[str, Any]) -> Reported:
    """Anthropic's usage with the cached parts inside the prompt.

    Passes that the top level leaves out (compaction) are in `iterations`: the sum is what is billed. Those of
    another model are not this model's tokens.
    """
    passes = usage.get("iterations")
    own = [
        each
        for each in (passes if isinstance(passes, list) else [])
        if isinstance(each, dict) and "model" not in each
    ]
    counts: dict[str, Any] = {name: usage.get(name) for name in _COUNTS}
    if any(each.get("type") == "compaction" for each in own):
        sums = {name: [each.get(name) or 0 for each in own] for name in _COUNTS}
        if all(type(value) is int and value >= 0 for values in sums.values() for value in values):
            counts = {name: sum(values) for name, values in sums.items()}
    # Always there, so that the input is read as without its cached parts.
    counts["cache_read_input_tokens"] = counts["cache_read_input_tokens"] or 0
    details = usage.get("output_tokens_details")
    if isinstance(details, dict):
        counts["output_tokens_details"] = {"reasoning_tokens": details.get("thinking_tokens")}
    return Reported.read({name: value for name, value in counts.items() if value is not None})


def _read_block(output: Output, place: tuple[object, ...], block: Mapping[str, Any]) -> None:
    for field in ("text", "thinking", "name"):
        output.add((*place, field), block.get(field))
    if block.get("input"):
        output.add((*place, "partial_json"), str(block["input"]))


def _server_tools(body: Body) -> Iterator[str]:
    tools = body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else []):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind.startswith(_SERVER_TOOLS):
            yield f"tools[{index}]"
