"""Moderations: https://platform.openai.com/docs/api-reference/moderations"""

from ..errors import InvalidRequest
from .base import Ask, Body, Dialect, Output, Prompt, required_text, texts_in


class Moderations(Dialect):
    name = "moderations"
    paths = ("/moderations",)
    types = frozenset({"moderation"})
    money_keys = frozenset({"model", "input"})

    def ask(self, body: Body) -> Ask:
        if not isinstance(body.get("input"), str | list):
            raise InvalidRequest("'input' is missing or neither a string nor a list.", param="input")
        return Ask(model=required_text(body, "model"), writes=False)

    def prompt(self, body: Body, model: str) -> Prompt:
        parts = body["input"]
        images = sum(
            isinstance(part, dict) and part.get("type") == "image_url"
            for part in (parts if isinstance(parts, list) else [])
        )
        return Prompt(tuple(texts_in(parts)), images=images)

    def output(self, answer: Body) -> Output:
        return Output(seen=isinstance(answer.get("results"), list))
