"""Embeddings: https://platform.openai.com/docs/api-reference/embeddings"""

from ..errors import InvalidRequest
from .base import Ask, Body, Dialect, Output, Prompt, required_text
from .completions import text_or_tokens


class Embeddings(Dialect):
    name = "embeddings"
    paths = ("/embeddings",)
    types = frozenset({"embedding"})
    money_keys = frozenset({"model", "input", "service_tier"})

    def ask(self, body: Body) -> Ask:
        if not isinstance(body.get("input"), str | list):
            raise InvalidRequest("'input' is missing or neither a string nor a list.", param="input")
        return Ask(model=required_text(body, "model"), writes=False)

    def prompt(self, body: Body, model: str) -> Prompt:
        return text_or_tokens(body.get("input"))

    def output(self, answer: Body) -> Output:
        data = answer.get("data")
        return Output(seen=isinstance(data, list) and bool(data))
