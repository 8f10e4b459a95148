"""Images: https://platform.openai.com/docs/api-reference/images

Priced by tokens where the model has token prices, else by what came back.
"""

from dataclasses import replace
from typing import Any, ClassVar

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
    required_text,
    whole,
)

MAX_IMAGES = 10


class ImagesReader(StreamReader):
    """Partial images, then a `completed` event that has the usage."""

    def take(self, message: dict[str, Any]) -> EventKind:
        kind = message.get("type")
        if kind == "error" or message.get("error"):
            self.failed = True
        elif isinstance(kind, str) and kind.endswith((".partial_image", ".completed")):
            self.output.seen = self.output.partial = True
            self.output.images += kind.endswith(".completed")
        self.report(message.get("usage"))
        return "pass"


class Images(Dialect):
    name = "images"
    paths: ClassVar[tuple[str, ...]] = ("/images/generations",)
    types = frozenset({"image"})
    units = frozenset({"1K tokens", "generation"})
    money_keys = Dialect.money_keys | {"size", "quality", "partial_images"}
    named_events = True
    reader = ImagesReader

    def ask(self, body: Body) -> Ask:
        count = whole(body, "n", most=MAX_IMAGES) or 1
        return Ask(
            model=required_text(body, "model"),
            stream=flag(body, "stream"),
            choices=count,
            images=count,
            size=_name(body, "size"),
            quality=_name(body, "quality"),
        )

    def prompt(self, body: Body, model: str) -> Prompt:
        text = body.get("prompt")
        return Prompt((text,) if isinstance(text, str) else ())

    def output(self, answer: Body) -> Output:
        data = answer.get("data")
        images = len(data) if isinstance(data, list) else 0
        return Output(images=images, seen=images > 0)

    def measure(self, usage: Usage, ask: Ask, answer: Answer) -> Usage:
        images = self.output(answer.full).images
        return replace(usage, images=images, size=ask.size, quality=ask.quality)

    def measure_stream(self, usage: Usage, ask: Ask, output: Output) -> Usage:
        return replace(usage, images=output.images, size=ask.size, quality=ask.quality)


class ImageForms(Images):
    """Edits and variations: forms with pictures in them, charged like generations."""

    name = "images.forms"
    paths = ("/images/edits", "/images/variations")
    multipart = True

    def ask(self, body: Body) -> Ask:
        if not getattr(body, "files", 0):
            raise InvalidRequest("'image' is missing or not a file.", param="image")
        number = body.get("n")
        # A form has no numbers but in text.
        if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 4:
            body = {**body, "n": int(number)}
        return super().ask(body)

    def prompt(self, body: Body, model: str) -> Prompt:
        return replace(super().prompt(body, model), images=getattr(body, "files", 0))


def _name(body: Body, field: str) -> str | None:
    return None if body.get(field) is None else required_text(body, field)
