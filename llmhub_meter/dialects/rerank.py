"""Rerank, as Jina, Voyage, Cohere and vLLM have it: a query and documents in, an order out."""

from ..errors import InvalidRequest
from .base import Answer, Ask, Body, Dialect, Output, Prompt, required_text, texts_in
from .reported import Reported


class Rerank(Dialect):
    name = "rerank"
    paths = ("/rerank",)
    types = frozenset({"rerank"})
    money_keys = frozenset({"model", "query", "documents"})

    def ask(self, body: Body) -> Ask:
        required_text(body, "query")
        if not isinstance(body.get("documents"), list):
            raise InvalidRequest("'documents' is missing or not a list.", param="documents")
        return Ask(model=required_text(body, "model"), writes=False)

    def prompt(self, body: Body, model: str) -> Prompt:
        return Prompt((body["query"], *texts_in(body["documents"])))

    def reported(self, answer: Answer) -> Reported | None:
        found = super().reported(answer)
        if found is None:
            # Cohere's habit: tokens beside its own units, under `meta`.
            meta = answer.full.get("meta")
            tokens = meta.get("tokens") if isinstance(meta, dict) else None
            found = Reported.read(tokens) if isinstance(tokens, dict) and tokens else None
        return found

    def output(self, answer: Body) -> Output:
        return Output(seen=any(isinstance(answer.get(name), list) for name in ("results", "data")))
