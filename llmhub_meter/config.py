"""The config file and the environment as one frozen `Config`; every fault with its place.

Prices and the signup grant are written in credits and kept as ticks.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    SecretStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from .errors import ConfigError
from .money import TICKS_PER_CREDIT, credits, ticks

__all__ = [
    "AdminConfig",
    "Config",
    "CreditsConfig",
    "LedgerConfig",
    "LimitsConfig",
    "MeteringConfig",
    "MetricsConfig",
    "ModelConfig",
    "ModelType",
    "PRICES",
    "RedisConfig",
    "ReserveConfig",
    "Unit",
    "UpstreamConfig",
    "load_config",
    "parse_models",
]

DEFAULT_FILE = "llmhub-meter.toml"
ENVIRONMENT_PREFIX = "LLMHUB_METER__"

ModelType = Literal["chat", "completion", "embedding", "image", "audio", "moderation", "rerank"]
Unit = Literal["1K tokens", "generation", "minute", "1K characters", "request"]
Place = tuple[str | int, ...]

PRICES: Mapping[str, Unit] = {
    "input_per_1k": "1K tokens",
    "output_per_1k": "1K tokens",
    "cached_input_per_1k": "1K tokens",
    "cache_write_per_1k": "1K tokens",
    "reasoning_per_1k": "1K tokens",
    "audio_input_per_1k": "1K tokens",
    "audio_output_per_1k": "1K tokens",
    "image_input_per_1k": "1K tokens",
    "per_generation": "generation",
    "per_generation_by": "generation",
    "per_minute": "minute",
    "per_1k_characters": "1K characters",
    "per_request": "request",
}
"""Every price field of a model and the unit it is for."""

_OUTPUT_PRICES = frozenset({"output_per_1k", "reasoning_per_1k", "audio_output_per_1k"})
_TOKEN_PRICES = frozenset(name for name, unit in PRICES.items() if unit == "1K tokens")
_INPUT_PRICES = _TOKEN_PRICES - _OUTPUT_PRICES
_PRICES_OF_TYPE: Mapping[str, frozenset[str]] = {
    "chat": _TOKEN_PRICES,
    "completion": _TOKEN_PRICES,
    "embedding": _INPUT_PRICES,
    "moderation": _INPUT_PRICES,
    "rerank": _INPUT_PRICES,
    "image": _TOKEN_PRICES | {"per_generation", "per_generation_by"},
    "audio": _TOKEN_PRICES | {"per_minute", "per_1k_characters"},
}
"""Besides `per_request`, which fits any type."""

_TRUE_WORDS = frozenset({"true", "1", "yes", "on", "y", "t"})
_FRAMING_HEADERS = frozenset({"connection", "content-length", "transfer-encoding"})
_KIND_OF_MESSAGE: Mapping[str, str] = {
    "missing": "is required",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "dict_type": "must be a table",
    "tuple_type": "must be a list",
    "path_type": "must be a path",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number",
    "int_from_float": "must be a whole number",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "decimal_type": "must be a number",
    "decimal_parsing": "must be a number",
    "decimal_max_digits": "must be a shorter number",
}
_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _price(value: object) -> int:
    """A price in credits (TOML number, or a string in JSON and the environment) as ticks."""
    if isinstance(value, str) and not re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", value):
        raise ValueError(f"{value[:40]!r} is not a decimal number of credits")
    if isinstance(value, float):
        raise ValueError(f"{value!r} is a float: write it as a decimal or a string")
    if isinstance(value, bool) or not isinstance(value, int | Decimal | str):
        raise ValueError("must be a decimal number of credits")
    amount = ticks(value)
    if amount < 0:
        raise ValueError(f"is negative ({credits(amount)})")
    return amount


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _filled(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    return value


def _name(value: str) -> str:
    if not value:
        raise ValueError("a name must not be empty")
    if len(value) > 256:
        raise ValueError("a name must not be longer than 256 characters")
    if " " in value or not value.isprintable():
        raise ValueError("a name must not hold blanks or control characters")
    return value


def _secret(value: object, info: ValidationInfo) -> object:
    """`env:NAME` is replaced from the environment that the validation was given. Never tells the value."""
    if not isinstance(value, str):
        return value
    shown = "it"
    if value.startswith("env:"):
        variable = value[4:]
        environ: Mapping[str, str] = (info.context or {}).get("environ", {})
        if variable not in environ:
            raise ValueError(f"environment variable {variable} is not set")
        shown, value = f"environment variable {variable}", environ[variable]
    if not value:
        raise ValueError(f"{shown} is empty")
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise ValueError(f"{shown} holds a blank or a character that a header can't carry")
    return value


def _base_url(value: str) -> str:
    # Nothing of the URL is repeated in a message: it may hold a password.
    if not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("holds a blank or a character that a URL can't carry")
    try:
        url = urlsplit(value)
        port = url.port
    except ValueError:
        raise ValueError("is not a URL") from None
    if url.scheme not in ("http", "https"):
        raise ValueError("must begin with http:// or https://")
    if url.username is not None or url.password is not None:
        raise ValueError("must not hold a user name or password: use api_key")
    if not url.hostname:
        raise ValueError("has no host")
    if port == 0:
        raise ValueError("has no valid port")
    if "?" in value or "#" in value:
        raise ValueError("must not hold a query or a fragment: use query = {...}")
    if not url.path.rstrip("/").endswith("/v1"):
        raise ValueError("must end in /v1")
    return value.rstrip("/")


def _redis_url(value: str) -> str:
    scheme = value.partition("://")[0]
    if scheme in ("redis+cluster", "redis+sentinel"):
        raise ValueError(f"{scheme}:// is not available yet")
    if scheme not in ("redis", "rediss", "unix") or "://" not in value:
        raise ValueError("must begin with redis://, rediss:// or unix://")
    if not value.partition("://")[2]:
        raise ValueError("has no host or path")
    return value


def _bind(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError('must be "HOST:PORT"')
    return value


def _header_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", value):
        raise ValueError("is not a header name")
    if value.lower() in _FRAMING_HEADERS:
        raise ValueError("belongs to the connection and can't be set")
    return value


def _header_value(value: str) -> str:
    if not value.isascii() or not value.isprintable():
        raise ValueError("holds a character that a header can't carry")
    return value


def _variant(value: str) -> str:
    if not re.fullmatch(r"([0-9]+x[0-9]+|auto)(/[a-z0-9_.-]+)?", value):
        raise ValueError('must look like "1024x1024" or "1024x1024/hd"')
    return value


Price = Annotated[int, BeforeValidator(_price), PlainSerializer(credits, return_type=str)]
Name = Annotated[str, AfterValidator(_name)]
Secret = Annotated[SecretStr, BeforeValidator(_secret)]
Count = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1, le=1_000_000_000)]
Allowance = Annotated[int, BeforeValidator(_no_boolean), Field(ge=0, le=1_000_000_000)]


class _Table(BaseModel):
    """A table of the file: unknown fields are faults, and all faults are gathered in our words."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="wrap")
    @classmethod
    def _gather_faults(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        faults = list(cls._faults_between(data)) if isinstance(data, Mapping) else []
        try:
            table = handler(data)
        except ValidationError as error:
            faults = [(detail["loc"], _message(detail, cls)) for detail in error.errors()] + faults
        if faults:
            raise ValidationError.from_exception_data(
                cls.__name__, [_detail(place, message) for place, message in faults], hide_input=True
            )
        return table

    @classmethod
    def _faults_between(cls, data: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        """What is wrong between fields of the raw table, each of which may be valid or not."""
        yield from ()


class RedisConfig(_Table):
    """`[redis]`; without a URL the embedded server is used."""

    url: Annotated[str, AfterValidator(_redis_url)] | None = Field(default=None, repr=False)
    on_redis_failure: Literal["closed", "open"] = "closed"

    @classmethod
    def _faults_between(cls, data: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        if data.get("on_redis_failure") == "open":
            yield ("on_redis_failure",), '"open" is not available yet'


class LedgerConfig(_Table):
    """`[ledger]`: SQL for the ledger; without a URL SQLite in `data_dir`."""

    url: Annotated[str, AfterValidator(_filled)] | None = Field(default=None, repr=False)


class UpstreamConfig(_Table):
    """`[upstreams.NAME]`: where metered requests go, and with whose key."""

    base_url: Annotated[str, AfterValidator(_base_url)]
    api_key: Secret | None = None
    auth: Literal["bearer", "x-api-key", "api-key", "none"] = "bearer"
    headers: dict[
        Annotated[str, AfterValidator(_header_name)], Annotated[str, AfterValidator(_header_value)]
    ] = Field(default_factory=dict, repr=False)
    query: dict[str, str] = Field(default_factory=dict, repr=False)
    timeout_seconds: Annotated[float, BeforeValidator(_no_boolean), Field(gt=0, le=86_400)] = 600.0
    max_tokens_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    stateful: bool = False

    @classmethod
    def _faults_between(cls, data: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        if _is_true(data.get("stateful")):
            yield ("stateful",), "is not available yet"


class CreditsConfig(_Table):
    """`[credits]`."""

    signup_grant: Price = 100_000 * TICKS_PER_CREDIT
    """Written in credits, kept in ticks."""


class ReserveConfig(_Table):
    """`[reserve]`: how much a request sets aside; all but `share` in tokens."""

    share: Annotated[Decimal, BeforeValidator(_no_boolean), Field(gt=0, le=1)] = Decimal("0.25")
    slice_tokens: Count = 1000
    min_output_tokens: Count = 16
    lease_seconds: Annotated[int, BeforeValidator(_no_boolean), Field(ge=1, le=86_400)] = 600
    clamp: Literal["unset", "always", "never"] = "unset"
    image_tokens: Allowance = 1600
    file_tokens: Allowance = 8000
    tool_tokens: Allowance = 8000


class MeteringConfig(_Table):
    """`[metering]`; `unknown_models` is "refuse", "free" or the name of a model whose prices apply."""

    unknown_models: Name = "refuse"
    unpriced_features: Literal["refuse", "allow"] = "refuse"
    sse_comment: bool = True
    on_disconnect: Literal["cancel", "drain"] = "cancel"
    max_body_bytes: Annotated[int, BeforeValidator(_no_boolean), Field(ge=1, le=2**31)] = 33_554_432
    strict: bool = False


class LimitsConfig(_Table):
    """`[limits]`."""

    enabled: bool = False

    @classmethod
    def _faults_between(cls, data: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        if _is_true(data.get("enabled")):
            yield ("enabled",), "limits are not available yet"


class AdminConfig(_Table):
    """`[admin]`; without tokens there is no admin API."""

    tokens: tuple[Secret, ...] = ()


class MetricsConfig(_Table):
    """`[metrics]`."""

    bind: Annotated[str, AfterValidator(_bind)] | None = None


class ModelConfig(_Table):
    """`[models."NAME"]` as written: prices are given in credits and kept in ticks, absent ones are None."""

    type: ModelType
    free: bool = False
    input_per_1k: Price | None = None
    output_per_1k: Price | None = None
    cached_input_per_1k: Price | None = None
    cache_write_per_1k: Price | None = None
    reasoning_per_1k: Price | None = None
    audio_input_per_1k: Price | None = None
    audio_output_per_1k: Price | None = None
    image_input_per_1k: Price | None = None
    per_request: Price | None = None
    per_generation: Price | None = None
    per_generation_by: dict[Annotated[str, AfterValidator(_variant)], Price] = Field(default_factory=dict)
    per_minute: Price | None = None
    per_1k_characters: Price | None = None
    max_output_tokens: Count | None = None
    context_window: Count | None = None
    hidden_output: bool = False
    aliases: tuple[Name, ...] = ()
    upstream: Name | None = None
    upstream_model: Name | None = None

    @property
    def unit(self) -> Unit:
        """What the price is for; a model has one unit, and `per_request` besides."""
        for field, unit in PRICES.items():
            if getattr(self, field) not in (None, {}):
                return unit
        return _UNIT_WHEN_FREE.get(self.type, "1K tokens")

    @classmethod
    def _faults_between(cls, data: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        written = [field for field in PRICES if data.get(field) not in (None, {})]
        if _is_true(data.get("free")):
            yield from (((field,), "is a price, but the model is free = true") for field in written)
            return
        if all(field == "per_request" and _is_zero(data[field]) for field in written):
            yield (), "has no price (free = true if it really is free)"
            return
        type_name = data.get("type")
        if not isinstance(type_name, str) or type_name not in _PRICES_OF_TYPE:
            return
        fitting = _PRICES_OF_TYPE[type_name] | {"per_request"}
        yield from (
            ((field,), f'does not fit type "{type_name}"') for field in written if field not in fitting
        )
        yield from _faults_of_units([field for field in written if field in fitting], fitting)


_UNIT_WHEN_FREE: Mapping[ModelType, Unit] = {"image": "generation", "audio": "minute"}


class Config(_Table):
    """Everything that can be set, built once by whoever starts the process."""

    data_dir: Path = Path("llmhub-data")
    redis: RedisConfig = Field(default_factory=RedisConfig)
    ledger: LedgerConfig = Field(default_factory=LedgerConfig)
    upstreams: dict[Name, UpstreamConfig] = Field(default_factory=dict)
    credits: CreditsConfig = Field(default_factory=CreditsConfig)
    reserve: ReserveConfig = Field(default_factory=ReserveConfig)
    metering: MeteringConfig = Field(default_factory=MeteringConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    admin: AdminConfig = Field(default_factory=AdminConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    models: dict[Name, ModelConfig] = Field(default_factory=dict)

    @property
    def default_upstream(self) -> str | None:
        """The first upstream of the file, which serves models that name none."""
        return next(iter(self.upstreams), None)

    @classmethod
    def _faults_between(cls, data: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        models, upstreams = _names(data.get("models")), _names(data.get("upstreams"))
        for place, message in _alias_faults(models):
            yield ("models", *place), message
        for name, model in models.items():
            upstream = _field(model, "upstream")
            if isinstance(upstream, str) and upstream not in upstreams:
                yield (
                    ("models", name, "upstream"),
                    f"there is no [upstreams.{upstream}]{_nearest(upstream, upstreams)}",
                )
        stand_in = _field(data.get("metering"), "unknown_models")
        known = [*models, *(alias for model in models.values() for alias in _aliases(model))]
        if isinstance(stand_in, str) and stand_in not in ("refuse", "free", *known):
            fault = f'must be "refuse", "free" or the name of a model, not "{stand_in}"'
            yield ("metering", "unknown_models"), fault + _nearest(stand_in, known)


class _PriceFile(_Table):
    models: dict[Name, ModelConfig]

    @classmethod
    def _faults_between(cls, data: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
        for place, message in _alias_faults(_names(data.get("models"))):
            yield ("models", *place), message


def load_config(path: Path | None, *, environ: Mapping[str, str]) -> Config:
    """The config of a file, with `LLMHUB_METER__TABLE__FIELD` of the environment put over it.

    Without a path: `llmhub-meter.toml` of the current folder if there is one, else defaults.
    Raises ConfigError with every fault.
    """
    if path is None and Path(DEFAULT_FILE).exists():
        path = Path(DEFAULT_FILE)
    raw = {} if path is None else _read_toml(Path(path))
    origins, faults = _apply_environment(raw, environ)
    source = str(path or "config")
    try:
        config = Config.model_validate(raw, context={"environ": environ})
    except ValidationError as error:
        faults += _faults(error, source, origins)
        raise ConfigError(faults) from None
    if faults:
        raise ConfigError(faults)
    folder = Path(path).parent if path is not None else Path()
    # normpath rather than resolve: a link in the path stays what the operator wrote.
    data_dir = Path(os.path.normpath((folder / config.data_dir).absolute()))
    return config.model_copy(update={"data_dir": data_dir})


def parse_models(models: object, source: str) -> dict[str, ModelConfig]:
    """The models of a price table, from raw tables or built ones. Raises ConfigError naming `source`."""
    try:
        return _PriceFile.model_validate({"models": models}).models
    except ValidationError as error:
        raise ConfigError(_faults(error, source, {})) from None


def parse_number(text: str) -> Decimal | str:
    """A number of TOML or JSON as a decimal; what no decimal can hold stays text, for the field to refuse."""
    try:
        return Decimal(text)
    except InvalidOperation:
        return text


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        # Some editors begin a UTF-8 file with a mark that TOML does not know.
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{path}: can't be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text (byte {error.start})"]) from None
    try:
        return tomllib.loads(text, parse_float=parse_number)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path}: {_with_position(str(error), text)}"]) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{path}: {error}"]) from None


def _with_position(message: str, text: str) -> str:
    """Python's message, with line and column also where the fault is the end of the file."""
    lines = text.split("\n")
    return message.replace("at end of document", f"at line {len(lines)}, column {len(lines[-1]) + 1}")


def _apply_environment(raw: dict[str, Any], environ: Mapping[str, str]) -> tuple[dict[Place, str], list[str]]:
    """Put the environment's values into `raw`; returns which variable set which place, and faults."""
    origins: dict[Place, str] = {}
    faults: list[str] = []
    variables = [variable for variable in environ if variable.startswith(ENVIRONMENT_PREFIX)]
    # A whole table, given as JSON, comes before single fields of it.
    for variable in sorted(variables, key=lambda variable: (variable.count("__"), variable)):
        parts = variable.removeprefix(ENVIRONMENT_PREFIX).split("__")
        try:
            origins[_set_place(raw, parts, environ[variable])] = variable
        except ValueError as error:
            faults.append(f"{variable}: {error}")
    return origins, faults


def _set_place(raw: dict[str, Any], parts: list[str], text: str) -> Place:
    table: dict[str, Any] = raw
    schema: Any = Config
    place: list[str] = []
    for depth, part in enumerate(parts):
        if not part:
            raise ValueError("must be LLMHUB_METER__TABLE__FIELD")
        names = _field_names(schema)
        key = _spelling(part, table if names is None else names)
        place.append(key)
        schema = _schema_of(schema, key)
        if depth == len(parts) - 1:
            table[key] = _value(text, schema)
            break
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{'.'.join(place)} is not a table")
        table = inner
    return tuple(place)


def _field_names(schema: Any) -> list[str] | None:
    """The fields of a table; None where its keys are names, as in `[models]`."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return list(schema.model_fields)
    return None


def _schema_of(schema: Any, key: str) -> Any:
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        field = schema.model_fields.get(key)
        return None if field is None else field.annotation
    return get_args(schema)[1] if get_origin(schema) is dict else None


def _spelling(part: str, known: Iterable[str]) -> str:
    """A name that the environment can't spell (`gpt-4o-mini` as GPT_4O_MINI) as it stands in the file."""
    wanted = part.lower()
    alike = [name for name in known if re.sub(r"[^a-z0-9]", "_", name.lower()) == wanted]
    if len(alike) > 1:
        raise ValueError(f"{part} may be any of {', '.join(alike)}")
    return alike[0] if alike else wanted


def _value(text: str, schema: Any) -> object:
    """Lists and tables are given as JSON; all else is a string for pydantic to coerce."""
    whole_table = isinstance(schema, type) and issubclass(schema, BaseModel)
    if not whole_table and get_origin(schema) not in (dict, tuple):
        return text
    try:
        return json.loads(text, parse_float=parse_number, parse_constant=parse_number)
    except (ValueError, RecursionError):
        raise ValueError("must be JSON: a list or a table") from None


def _faults(error: ValidationError, source: str, origins: Mapping[Place, str]) -> list[str]:
    faults = []
    for detail in error.errors(include_url=False, include_input=False):
        place = tuple(part for part in detail["loc"] if part != "[key]")
        setters = [variable for known, variable in origins.items() if place[: len(known)] == known]
        where = _where(place)
        faults.append(
            ": ".join(part for part in (setters[-1] if setters else source, where, detail["msg"]) if part)
        )
    return faults


def _where(place: Place) -> str:
    """`[models."gpt-4o-mini"] input_per_1k` for a place, as the operator would look it up."""
    if len(place) == 1 and str(place[0]) not in _TABLES:
        return str(place[0])
    depth = 2 if place and place[0] in ("models", "upstreams") else 1
    if len(place) > depth + 1 and isinstance(place[depth + 1], str):
        depth += 1
    table = ".".join(
        _key(str(part), quoted=place[0] == "models" and index == 1)
        for index, part in enumerate(place[:depth])
    )
    field = "".join(f"[{part}]" if isinstance(part, int) else _key(part) for part in place[depth:])
    return f"[{table}] {field}".rstrip() if table else field


def _key(part: str, *, quoted: bool = False) -> str:
    """A key as TOML has it; models' names are quoted even where they need not be."""
    if not quoted and re.fullmatch(r"[A-Za-z0-9_-]+", part):
        return part
    return json.dumps(part, ensure_ascii=not part.isprintable())


_TABLES = frozenset(name for name in Config.model_fields if name != "data_dir")


def _detail(place: Place, message: str) -> InitErrorDetails:
    # The message goes in as a parameter: braces in a name must not be read as one.
    return InitErrorDetails(
        type=PydanticCustomError("fault", "{message}", {"message": message}), loc=place, input=None
    )


def _message(detail: Any, table: type[BaseModel]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"is not a known field{_nearest(str(detail['loc'][-1]), table.model_fields)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"must be {context['expected'].replace(chr(39), chr(34))}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"must be {words} {context[bound]}"
    return _KIND_OF_MESSAGE.get(kind, str(detail["msg"]))


def _nearest(wrong: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.4)
    return f'; did you mean "{found[0]}"?' if found else ""


def _faults_of_units(written: list[str], fitting: frozenset[str]) -> Iterator[tuple[Place, str]]:
    """One unit a model, and no part of it forgotten: what has no price would be served for nothing."""
    units = {PRICES[field]: field for field in reversed(written) if field != "per_request"}
    if len(units) > 1:
        first, *others = sorted(units.values(), key=list(PRICES).index)
        yield from (((other,), f"is another unit than {first}: a model has one") for other in others)
        return
    if "1K tokens" in units:
        for needed in ("input_per_1k", "output_per_1k"):
            if needed in fitting and needed not in written:
                yield (needed,), "is required beside other prices per 1,000 tokens (0 if it costs nothing)"
    if "generation" in units and "per_generation" not in written:
        yield ("per_generation",), "is required for the sizes that per_generation_by does not list"


def _alias_faults(models: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    owners: dict[str, str] = {}
    for name, model in models.items():
        for index, alias in enumerate(_aliases(model)):
            if alias in models:
                yield (name, "aliases", index), f'"{alias}" is the name of a model'
            elif alias in owners:
                yield (name, "aliases", index), f'"{alias}" is an alias of "{owners[alias]}" already'
            else:
                owners[alias] = name


def _names(table: object) -> Mapping[str, Any]:
    """A table of names as far as it is one, for checks that look across tables."""
    return table if isinstance(table, Mapping) else {}


def _aliases(model: object) -> list[str]:
    aliases = _field(model, "aliases")
    if not isinstance(aliases, list | tuple):
        return []
    return [alias if isinstance(alias, str) else "" for alias in aliases]


def _field(table: object, name: str) -> object:
    return table.get(name) if isinstance(table, Mapping) else getattr(table, name, None)


def _is_true(value: object) -> bool:
    return value is True or str(value).lower() in _TRUE_WORDS


def _is_zero(value: object) -> bool:
    return value in (0, "0") and not isinstance(value, bool)
