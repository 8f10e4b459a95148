"""Legacy completions: https://platform.openai.com/docs/api-reference/completions"""

from typing import Any

from .base import (
    MAX_CHOICES,
    Ask,
    Body,
    Dialect,
    Output,
    Prompt,
    flag,
    maximum,
    read_bare,
    required_text,
    whole,
)
from .chat import ChatReader, wants_usage


class CompletionsReader(ChatReader):
    def read_choice(self, choice: dict[str, Any]) -> None:
        self.output.add((choice.get("index", 0),), choice.get("text"))
        super().read_choice(choice)


class Completions(Dialect):
    name = "completions"
    paths = ("/completions",)
    types = frozenset({"completion", "chat"})
    maximum_fields = ("max_tokens",)
    money_keys = Dialect.money_keys | {"max_tokens", "best_of", "stream_options", "prompt"}
    asks_for_usage = True
    reader = CompletionsReader

    def ask(self, body: Body) -> Ask:
        limit, fields = maximum(body, self.maximum_fields)
        n = whole(body, "n", most=MAX_CHOICES) or 1
        best_of = whole(body, "best_of", most=MAX_CHOICES) or 1
        prompts = body.get("prompt")
        # A list of texts is one completion each; a list of numbers is one prompt in tokens.
        several = len(prompts) if isinstance(prompts, list) and not _is_tokens(prompts) else 1
        return Ask(
            model=required_text(body, "model"),
            stream=flag(body, "stream"),
            choices=max(n, best_of) * max(1, several),
            maximum=limit,
            maximum_fields=fields,
            wants_usage=wants_usage(body),
        )

    def prompt(self, body: Body, model: str) -> Prompt:
        return text_or_tokens(body.get("prompt"))

    def output(self, answer: Body) -> Output:
        output = Output()
        choices = answer.get("choices")
        for index, choice in enumerate(choices if isinstance(choices, list) else []):
            if isinstance(choice, dict):
                output.seen = True
                output.add((index,), choice.get("text"))
        read_bare(output, answer)
        return output


def text_or_tokens(value: object) -> Prompt:
    """A text, texts, a list of tokens, or several such lists: tokens count as themselves."""
    pieces: list[str] = []
    tokens = 0
    unread = [value]
    while unread:
        found = unread.pop()
        if isinstance(found, str):
            pieces.append(found)
        elif isinstance(found, list):
            if _is_tokens(found):
                tokens += len(found)
            else:
                unread.extend(reversed(found))
    return Prompt(tuple(pieces), tokens)


def _is_tokens(value: list[object]) -> bool:
    return bool(value) and all(isinstance(item, int) for item in value)
