"""The price table: one immutable snapshot that finds a model and prices a usage, exactly.

Prices are ticks per unit. Sums run in thousandths of a tick and are rounded once.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Self

from ..config import PRICES, ModelConfig, ModelType, Unit, parse_models, parse_number
from ..errors import ConfigError
from ..money import credits, euros, round_half_up
from ..types import Charge, ChargeLine, Usage


@dataclass(frozen=True, slots=True)
class Model:
    """What a model costs, with the defaults filled in: ticks per unit, 0 where the unit is another one."""

    name: str
    type: ModelType
    free: bool
    """Free by its flag, or because each of its prices is 0."""
    unit: Unit
    input_per_1k: int = 0
    output_per_1k: int = 0
    cached_input_per_1k: int = 0
    cache_write_per_1k: int = 0
    reasoning_per_1k: int = 0
    audio_input_per_1k: int = 0
    audio_output_per_1k: int = 0
    image_input_per_1k: int = 0
    per_request: int = 0
    per_generation: int = 0
    per_generation_by: Mapping[str, int] = field(default_factory=dict, hash=False)
    per_minute: int = 0
    per_1k_characters: int = 0
    max_output_tokens: int | None = None
    context_window: int | None = None
    hidden_output: bool = False
    aliases: tuple[str, ...] = ()
    upstream: str | None = None
    upstream_model: str | None = None

    @classmethod
    def from_config(cls, name: str, config: ModelConfig, default_upstream: str | None = None) -> Self:
        """A detail without a price of its own costs what its total costs."""
        input_per_1k, output_per_1k = config.input_per_1k or 0, config.output_per_1k or 0
        return cls(
            name=name,
            type=config.type,
            free=not any([*_written_prices(config).values(), *config.per_generation_by.values()]),
            unit=config.unit,
            input_per_1k=input_per_1k,
            output_per_1k=output_per_1k,
            cached_input_per_1k=_or(config.cached_input_per_1k, input_per_1k),
            cache_write_per_1k=_or(config.cache_write_per_1k, input_per_1k),
            reasoning_per_1k=_or(config.reasoning_per_1k, output_per_1k),
            audio_input_per_1k=_or(config.audio_input_per_1k, input_per_1k),
            audio_output_per_1k=_or(config.audio_output_per_1k, output_per_1k),
            image_input_per_1k=_or(config.image_input_per_1k, input_per_1k),
            per_request=config.per_request or 0,
            per_generation=config.per_generation or 0,
            per_generation_by=MappingProxyType(dict(config.per_generation_by)),
            per_minute=config.per_minute or 0,
            per_1k_characters=config.per_1k_characters or 0,
            max_output_tokens=config.max_output_tokens,
            context_window=config.context_window,
            hidden_output=config.hidden_output,
            aliases=config.aliases,
            upstream=config.upstream or default_upstream,
            upstream_model=config.upstream_model,
        )

    def has_price_for(self, unit: Unit) -> bool:
        """Whether usage measured in this unit is priced: else it would be served for nothing."""
        return self.free or self.unit in (unit, "request")

    def charge(self, usage: Usage) -> Charge:
        """What the usage costs: the exact sum of its parts, rounded half up to a tick once."""
        if self.free:
            return _NOTHING
        lines: list[ChargeLine] = []
        prompt = usage.prompt_tokens
        if (
            usage.cached_tokens
            or usage.cache_write_tokens
            or usage.audio_prompt_tokens
            or usage.image_prompt_tokens
        ):
            prompt = _take(lines, "cached_input", usage.cached_tokens, prompt, self.cached_input_per_1k)
            prompt = _take(lines, "cache_write", usage.cache_write_tokens, prompt, self.cache_write_per_1k)
            prompt = _take(lines, "audio_input", usage.audio_prompt_tokens, prompt, self.audio_input_per_1k)
            prompt = _take(lines, "image_input", usage.image_prompt_tokens, prompt, self.image_input_per_1k)
        if prompt > 0 and self.input_per_1k:
            lines.append(ChargeLine("input", prompt, self.input_per_1k, 1000))

        completion = usage.completion_tokens
        if usage.reasoning_tokens or usage.audio_completion_tokens:
            completion = _take(lines, "reasoning", usage.reasoning_tokens, completion, self.reasoning_per_1k)
            completion = _take(
                lines, "audio_output", usage.audio_completion_tokens, completion, self.audio_output_per_1k
            )
        if completion > 0 and self.output_per_1k:
            lines.append(ChargeLine("output", completion, self.output_per_1k, 1000))

        if usage.characters > 0 and self.per_1k_characters:
            lines.append(ChargeLine("characters", usage.characters, self.per_1k_characters, 1000))
        if usage.images > 0 and (price := self.variant(usage.size, usage.quality)):
            lines.append(ChargeLine("images", usage.images, price, 1))
        if self.per_request:
            lines.append(ChargeLine("request", 1, self.per_request, 1))
        if usage.seconds > 0 and self.per_minute:
            lines.append(ChargeLine("seconds", usage.seconds, self.per_minute, 60))
            exact = sum((Fraction(line.quantity) * line.price / line.per for line in lines), Fraction())
            return Charge(round_half_up(exact), tuple(lines))

        thousandths = 0
        for line in lines:
            thousandths += int(line.quantity) * line.price * (1000 // line.per)
        return Charge((thousandths + 500) // 1000, tuple(lines))

    def input_price(self, *, images: bool = False, audio: bool = False) -> int:
        """What 1,000 prompt tokens cost at most, cache writes aside, by what is among them."""
        return max(
            self.input_per_1k,
            self.image_input_per_1k if images else 0,
            self.audio_input_per_1k if audio else 0,
        )

    def output_price(self, *, audio: bool = False) -> int:
        """What 1,000 output tokens cost at most."""
        return max(self.output_per_1k, self.reasoning_per_1k, self.audio_output_per_1k if audio else 0)

    def variant(self, size: str | None, quality: str | None) -> int:
        """The price of one image: `SIZE/QUALITY` beats `SIZE` beats `per_generation`."""
        by = self.per_generation_by
        if not by or size is None:
            return self.per_generation
        # Another spelling of a dear variant must not get the plain price.
        size = size.strip().lower()
        plain = by.get(size, self.per_generation)
        return plain if quality is None else by.get(f"{size}/{quality.strip().lower()}", plain)


class PriceTable:
    """An immutable snapshot of all models. `version` is a hash that every charge records."""

    __slots__ = ("_found", "models", "version", "written")

    def __init__(self, models: Mapping[str, Model], written: Mapping[str, ModelConfig]) -> None:
        self.models: Mapping[str, Model] = MappingProxyType(dict(models))
        self.written: Mapping[str, ModelConfig] = MappingProxyType(dict(written))
        """The models as they stand in the file, without defaults."""
        self.version = hashlib.sha256(_json(self.written, sort=True).encode()).hexdigest()[:12]
        self._found = {alias: model for model in models.values() for alias in model.aliases} | dict(models)

    @classmethod
    def from_config(cls, models: Mapping[str, ModelConfig], default_upstream: str | None = None) -> Self:
        """A table of checked models; those that name no upstream get the default. Raises ConfigError."""
        return cls._of(parse_models(models, "prices"), default_upstream)

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "stored prices") -> Self:
        """The table that `to_json` wrote. Raises ConfigError for anything else, naming `source`."""
        try:
            stored = json.loads(text, parse_float=parse_number, parse_constant=parse_number)
        except (ValueError, RecursionError):
            raise ConfigError([f"{source}: is not JSON"]) from None
        if not isinstance(stored, dict) or stored.keys() != {"models"}:
            raise ConfigError([f"{source}: must be an object with the key models"])
        return cls._of(parse_models(stored["models"], source), None)

    @classmethod
    def _of(cls, models: Mapping[str, ModelConfig], default_upstream: str | None) -> Self:
        written = {
            name: model if model.upstream else model.model_copy(update={"upstream": default_upstream})
            for name, model in models.items()
        }
        return cls({name: Model.from_config(name, model) for name, model in written.items()}, written)

    def to_json(self) -> str:
        """The table as it is stored and shared: prices as decimal strings in credits, order kept."""
        return _json(self.written)

    def find(self, name: str) -> Model | None:
        """A model by its name or alias, or by either without the date at its end."""
        return self._found.get(name) or self._found.get(_DATE_AT_END.sub("", name))

    def public(self) -> list[dict[str, object]]:
        """The entries of `GET /v1/models`, with live prices."""
        return [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "llmhub",
                "type": model.type,
                "free_tier": model.free,
                "context_window": model.context_window,
                "max_output_tokens": model.max_output_tokens,
                "pricing": _public_pricing(model, self.written[name]),
            }
            for name, model in self.models.items()
        ]


_NOTHING = Charge(0)
_DATE_AT_END = re.compile(
    r"-(20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"|(20[0-9]{2})?(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01]))\Z"
)


def _take(lines: list[ChargeLine], kind: str, wanted: int, left: int, price: int) -> int:
    """Charge a detail out of what is left of its total; returns what is left after it."""
    taken = min(wanted, left)
    if taken <= 0:
        return left
    if price:
        lines.append(ChargeLine(kind, taken, price, 1000))
    return left - taken


def _or(price: int | None, default: int) -> int:
    return default if price is None else price


def _written_prices(config: ModelConfig) -> dict[str, int]:
    """Each single price that is written, by its field."""
    prices = {name: getattr(config, name) for name in PRICES if name != "per_generation_by"}
    return {name: price for name, price in prices.items() if price is not None}


def _public_pricing(model: Model, config: ModelConfig) -> dict[str, object]:
    prices = dict.fromkeys(_always_shown(model), 0)
    for name, price in _written_prices(config).items():
        if price or name != "per_request":
            prices[_public_key(name)] = price
    pricing: dict[str, object] = {"currency": "EUR", "unit": model.unit}
    for currency, show in (("credits", credits), ("eur", euros)):
        shown: dict[str, object] = {key: show(price) for key, price in prices.items()}
        if config.per_generation_by:
            shown["by"] = {variant: show(price) for variant, price in config.per_generation_by.items()}
        pricing[currency] = shown
    return pricing


def _always_shown(model: Model) -> tuple[str, ...]:
    if model.unit == "1K tokens":
        return ("input",) if model.type in ("embedding", "moderation", "rerank") else ("input", "output")
    return ("characters",) if model.unit == "1K characters" else (model.unit,)


def _public_key(field_name: str) -> str:
    return field_name.removeprefix("per_1k_").removeprefix("per_").removesuffix("_per_1k")


def _json(models: Mapping[str, ModelConfig], *, sort: bool = False) -> str:
    written = {name: model.model_dump(mode="json", exclude_defaults=True) for name, model in models.items()}
    return json.dumps({"models": written}, sort_keys=sort, separators=(",", ":"))
