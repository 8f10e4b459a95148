"""Meter: identify, quote, reserve, extend, settle, release. It knows no HTTP."""

import asyncio
import contextlib
import logging
import math
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from . import keys
from .accounts import Accounts
from .config import (
    Config,
    CreditsConfig,
    MeteringConfig,
    ModelConfig,
    ReserveConfig,
    load_config,
    parse_models,
)
from .dialects import Ask, Dialect, Output, Prompt, Reported
from .errors import (
    ConfigError,
    InvalidApiKey,
    InvalidRequest,
    MeteringUnavailable,
    ModelNotFound,
    PermissionDenied,
    UnknownAccount,
)
from .finishing import Finisher
from .money import MAX_TICKS
from .pricebook import PriceBook
from .pricing.table import Model, PriceTable
from .scripts import Scripts, connect
from .tokens import count_pieces
from .types import Account, ApiKey, Charge, Figures, Hold, Idempotency, Usage
from .wallet import Terms, Wallet

logger = logging.getLogger("llmhub_meter")

POLL_PRICES_SECONDS = 0.5
RICH = 100
"""An account with so many times the input's bound is not worth counting tokens for."""
DEFAULT_OUTPUT_TOKENS = 16_384
"""Set aside for an answer without any maximum, the client's or the model's."""
MAX_MODEL_NAME = 200
"""Characters of a model's name that the table does not know, or that an answer gives."""
IMAGE_OUTPUT_TOKENS = 6_500
"""Output of one image of a model priced by tokens and without a maximum: above the largest documented."""


@dataclass(frozen=True, slots=True)
class Payer:
    """Who pays for a request, and with which key."""

    account: Account
    key: ApiKey | None = None


@dataclass(slots=True)
class Quote:
    """A priced request: its model at admission, what it asks for, and the most it can cost."""

    dialect: Dialect
    body: Mapping[str, object]
    ask: Ask
    model: Model
    prices: str
    """Version of the price table."""
    prompt: Prompt | None = None
    prompt_tokens: int | None = None
    """Counted exactly, allowances included, once that was needed."""

    @property
    def upstream_model(self) -> str:
        """The name for the upstream: the table's, else what the client said, but for an alias of ours."""
        model, asked = self.model, self.ask.model
        return model.upstream_model or (model.name if asked in model.aliases else asked)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the client is told: the charge, and what is left where Redis answered."""

    used: int
    figures: Figures | None


class Meter:
    """Metering on one Redis. Start it within the event loop that uses it, close it there."""

    def __init__(
        self,
        *,
        redis: str,
        prices: PriceTable | Mapping[str, ModelConfig | Mapping[str, object]],
        credits: CreditsConfig | None = None,
        reserve: ReserveConfig | None = None,
        metering: MeteringConfig | None = None,
        token_fields: Mapping[str, str] | None = None,
        background: bool = False,
        adopt_prices: bool = False,
    ) -> None:
        """`redis` is a URL; `prices` a table, or models as in the config file (prices in credits).

        `token_fields` says by upstream name in which field of a chat request a lowered maximum goes.
        `background` also sweeps expired holds from this process. With `adopt_prices` a table that is in force
        already stays, instead of being replaced at the start. Raises ConfigError.
        """
        self._prices = (
            prices
            if isinstance(prices, PriceTable)
            else PriceTable.from_config(parse_models(prices, "prices"))
        )
        self.credits = credits or CreditsConfig()
        self.reserve_rules = reserve or ReserveConfig()
        self.rules = metering or MeteringConfig()
        self._token_fields = token_fields or {}
        self._background = background
        self._adopt_prices = adopt_prices
        self._starting = asyncio.Lock()
        self._started = False
        self._tasks: list[asyncio.Task[None]] = []
        self._running: dict[str, Metered] = {}
        self._embedded: _OwnServer | None = None
        self.scripts = Scripts(connect(redis))
        self.wallet = Wallet(self.scripts, lease_seconds=self.reserve_rules.lease_seconds)
        self.accounts = Accounts(self.scripts, signup_grant=self.credits.signup_grant)
        self.prices = PriceBook(self.scripts, self._prices)
        self.finisher = Finisher()

    @classmethod
    def from_config(
        cls,
        config: Config | str | Path | None = None,
        *,
        background: bool = False,
        adopt_prices: bool = False,
    ) -> "Meter":
        """A meter as a config file says; without `[redis] url` on the embedded server in `data_dir`.

        Raises ConfigError.
        """
        if not isinstance(config, Config):
            config = load_config(None if config is None else Path(config), environ=os.environ)
        prices = PriceTable.from_config(config.models, config.default_upstream)
        url, server = config.redis.url, None
        if url is None:
            # Only here, so that a meter on a Redis of its own never loads it.
            from .embedded import EmbeddedServer

            server = EmbeddedServer.start(config.data_dir)
            url = server.url
        try:
            meter = cls(
                redis=url,
                prices=prices,
                credits=config.credits,
                reserve=config.reserve,
                metering=config.metering,
                token_fields={name: each.max_tokens_field for name, each in config.upstreams.items()},
                background=background,
                adopt_prices=adopt_prices,
            )
        except BaseException:
            if server is not None:
                server.stop()
            raise
        meter._embedded = server
        return meter

    async def start(self) -> None:
        """Checks Redis and begins the work beside requests; a second call does nothing.

        Raises ConfigError for a Redis that evicts keys or a price that changed too much, MeteringUnavailable.
        """
        async with self._starting:
            if self._started:
                return
            await self.scripts.check_server()
            await self.scripts.open_epoch()
            if self._adopt_prices and (stored := await self.prices.stored()) is not None:
                self.prices.table = stored
            else:
                await self.prices.publish(self._prices)
            work = [self._renew_leases(), self._follow_prices()]
            if self._background:
                work.append(self._sweep())
            self._tasks = [asyncio.get_running_loop().create_task(each) for each in work]
            self._started = True

    async def ready(self) -> None:
        """Starts the meter where nobody did. Raises MeteringUnavailable while that can't be."""
        if not self._started:
            await self.start()

    async def aclose(self, *, drain_seconds: float = 10) -> None:
        """Settles what still runs, then lets go of Redis."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.finisher.drain(drain_seconds)
        await self.scripts.aclose()
        if self._embedded is not None:
            self._embedded.stop()
        self._started = False

    async def identify(self, key: str | None) -> Payer:
        """The account of an API key. Raises InvalidApiKey, MeteringUnavailable."""
        if not key:
            raise InvalidApiKey("You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.")
        record = await self.accounts.find(key)
        return Payer(Account(record.account), record)

    def quote(self, dialect: Dialect, body: Mapping[str, object], payer: Payer) -> Quote:
        """Prices a request. Raises InvalidRequest, ModelNotFound, PermissionDenied, UnsupportedParameter."""
        if payer.key is not None and payer.key.kind == "pk":
            raise PermissionDenied("This key can't make model requests; use a llmhub_sk_ key.")
        ask = dialect.ask(body)
        table = self.prices.table
        model = self._find(table, ask.model, dialect)
        if model.type not in dialect.types or not any(model.has_price_for(unit) for unit in dialect.units):
            raise InvalidRequest(
                f"The model {ask.model[:200]!r} is of type {model.type}, priced per {model.unit}; "
                "it can't be used here.",
                param="model",
            )
        if self.rules.unpriced_features == "refuse":
            dialect.check_priced(body)
        if dialect.free:
            model = replace(model, free=True)
        return Quote(dialect, body, ask, model, table.version)

    async def reserve(
        self, payer: Payer, quote: Quote, *, body_bytes: int, idempotency: Idempotency | None = None
    ) -> "Metered":
        """Sets credits aside for a quoted request; from then on it must be settled or released.

        Raises InsufficientCredits, CreditsHeld, AccountRestricted, IdempotencyInProgress, IdempotencyReplay,
        IdempotencyMismatch, MeteringUnavailable.
        """
        account = payer.account.id
        request = keys.new_request_id(account)
        terms = self._terms(quote, self._bound(quote, body_bytes))
        hold = await self._reserve(request, payer, terms, idempotency)
        if hold is None:
            terms = self._terms(quote, await self.prompt_tokens(quote), exact=True)
            hold = await self._reserve(request, payer, terms, idempotency)
        if hold is None:
            raise AssertionError("an exact input was sent back to be counted")
        metered = Metered(self, payer, quote, hold, terms, idempotency)
        self._running[request] = metered
        return metered

    def token_field(self, model: Model) -> str:
        """The field in which the model's upstream takes a maximum of output tokens, for chat."""
        return self._token_fields.get(model.upstream or "", "max_completion_tokens")

    def forget(self, metered: "Metered") -> None:
        """The request ended: its lease is no longer renewed."""
        self._running.pop(metered.hold.id, None)

    async def prompt_tokens(self, quote: Quote) -> int:
        """The input counted exactly, with the configured allowance for what is no text."""
        if quote.prompt_tokens is None:
            prompt = self._prompt(quote)
            counted = await count_pieces(prompt.pieces, prompt.overhead, quote.model.name)
            quote.prompt_tokens = self._with_allowances(quote, counted)
        return quote.prompt_tokens

    async def usage(
        self, quote: Quote, reported: Reported | None, output: Callable[[], Output], *, sent: int | None
    ) -> Usage:
        """The usage to charge: as reported, and counted where nothing or nonsense was.

        `output` gives what was delivered, where that is needed; `sent` is the maximum of output tokens that
        went upstream, over all choices.
        """
        if quote.dialect.free:
            return Usage()
        if quote.model.unit == "minute":
            # No token of it has a price.
            return Usage() if reported is None else reported.usage
        if reported is None:
            return await self._estimate(quote, output())
        usage = reported.usage
        too_much = sent is not None and usage.completion_tokens * 10 > sent * 11
        no_prompt = not reported.prompt_known or usage.prompt_tokens == 0
        no_completion = not reported.completion_known or usage.completion_tokens == 0
        if not (too_much or no_prompt or no_completion):
            return usage
        texts = output().pieces()
        if no_prompt and (usage.completion_tokens or texts or usage.invalid) and self._prompt(quote).pieces:
            usage = replace(usage, prompt_tokens=await self.prompt_tokens(quote), estimated=True)
        if too_much or (no_completion and texts):
            counted = await count_pieces(texts, 0, quote.model.name)
            usage = replace(
                usage,
                completion_tokens=counted,
                reasoning_tokens=min(usage.reasoning_tokens, counted),
                audio_completion_tokens=min(usage.audio_completion_tokens, counted),
                estimated=True,
                invalid=usage.invalid or too_much,
            )
        return usage

    async def _estimate(self, quote: Quote, output: Output) -> Usage:
        counted = await count_pieces(output.pieces(), 0, quote.model.name)
        return Usage(await self.prompt_tokens(quote), counted, estimated=True)

    async def _reserve(
        self, request: str, payer: Payer, terms: Terms, idempotency: Idempotency | None
    ) -> Hold | None:
        try:
            return await self._hold(request, payer.account.id, terms, idempotency)
        except UnknownAccount:
            await self.scripts.check_epoch()
            if payer.key is not None:
                raise InvalidApiKey("The account of this API key does not exist.") from None
        # An account that the library user's own `identify` named is opened when it is seen first.
        await self.accounts.ensure(payer.account)
        return await self._hold(request, payer.account.id, terms, idempotency)

    async def _hold(
        self, request: str, account: str, terms: Terms, idempotency: Idempotency | None
    ) -> Hold | None:
        try:
            return await self.wallet.reserve(request, account, terms, idempotency)
        except (MeteringUnavailable, asyncio.CancelledError):
            # The hold may stand all the same.
            self.finisher.owe(lambda: self.wallet.release(request, account, {}))
            raise

    def _find(self, table: PriceTable, name: str, dialect: Dialect) -> Model:
        model = table.find(name)
        if model is not None:
            return model
        if len(name) > MAX_MODEL_NAME or not name.isprintable():
            # Lone surrogates could not be recorded.
            raise ModelNotFound("The model does not exist: its name can't be one.", param="model")
        if self.rules.unknown_models == "free":
            return Model(name, type=sorted(dialect.types)[0], free=True, unit="1K tokens")  # type: ignore[arg-type]
        stand_in = None if self.rules.unknown_models == "refuse" else table.find(self.rules.unknown_models)
        if stand_in is None:
            raise ModelNotFound(f"The model {name!r} does not exist or is not available here.", param="model")
        return replace(stand_in, name=name, upstream_model=None)

    def _prompt(self, quote: Quote) -> Prompt:
        if quote.prompt is None:
            quote.prompt = quote.dialect.prompt(quote.body, quote.model.name)
        return quote.prompt

    def _with_allowances(self, quote: Quote, tokens: int) -> int:
        prompt, rules = self._prompt(quote), self.reserve_rules
        tokens += prompt.images * rules.image_tokens + prompt.tools * rules.tool_tokens
        tokens += (prompt.files + prompt.audio) * rules.file_tokens
        window = quote.model.context_window
        return tokens if window is None else min(tokens, window)

    def _bound(self, quote: Quote, body_bytes: int) -> int:
        """The input from above: a text has no more tokens than bytes."""
        return 0 if not quote.model.input_per_1k else self._with_allowances(quote, body_bytes)

    def _terms(self, quote: Quote, prompt_tokens: int, *, exact: bool = False) -> Terms:
        """What to set aside; CONTRACT's rules of how much."""
        model, ask, rules = quote.model, quote.ask, self.reserve_rules
        if model.free:
            return Terms(quote.model.name, free=True)
        price = model.input_price()
        if prompt_tokens:
            prompt = self._prompt(quote)
            price = model.input_price(images=prompt.images > 0, audio=prompt.audio > 0)
        fixed = -(-prompt_tokens * price // 1000)
        rich_above = 0 if exact else RICH * fixed
        fixed += model.per_request + ask.images * model.variant(ask.size, ask.quality)
        fixed += -(-ask.characters * model.per_1k_characters // 1000)
        # Providers round up to a whole second.
        fixed += -(-math.ceil(ask.seconds) * model.per_minute // 60)
        rate = model.output_price(audio=ask.speaks)
        if not rate or not ask.writes:
            return Terms(model.name, fixed, rich_above=rich_above)

        # A maximum above the model's own can't be reached.
        most = model.max_output_tokens if model.max_output_tokens is not None else ask.maximum
        asked = None if ask.maximum is None else min(ask.maximum, most or ask.maximum)
        if ask.images:
            want = least = (model.max_output_tokens or IMAGE_OUTPUT_TOKENS) * ask.choices
            return Terms(model.name, fixed, rate, want, least, rich_above=rich_above)
        limit = (asked or most or DEFAULT_OUTPUT_TOKENS) * ask.choices
        smallest = min(rules.min_output_tokens * ask.choices, limit)
        if ask.stream and not model.hidden_output:
            want = min(limit, rules.slice_tokens * ask.choices)
            return Terms(model.name, fixed, rate, want, min(smallest, want), rich_above=rich_above)
        clamped = rules.clamp == "always" or (rules.clamp == "unset" and asked is None)
        # Without a field for it no maximum can be lowered.
        clamped = clamped and bool(quote.dialect.maximum_fields)
        share = math.floor(rules.share * 1000) if asked is None and clamped else 1000
        return Terms(
            model.name, fixed, rate, limit, smallest if clamped else limit, share, rich_above=rich_above
        )

    async def _renew_leases(self) -> None:
        """Every hold of a running request gets a new lease each third of its length."""
        pause = self.reserve_rules.lease_seconds / 3
        while True:
            await asyncio.sleep(pause)
            for metered in list(self._running.values()):
                with contextlib.suppress(MeteringUnavailable):
                    await self.wallet.renew(metered.hold, model=metered.quote.model.name)

    async def _follow_prices(self) -> None:
        said = ""
        while True:
            await asyncio.sleep(POLL_PRICES_SECONDS)
            try:
                await self.prices.refresh()
            except MeteringUnavailable:
                await self._revive()
            except ConfigError as error:
                # Another version's, or damaged: the old one stays.
                if error.message != said:
                    said = error.message
                    logger.error("the prices in Redis can't be taken up: %s", said)

    async def _revive(self) -> None:
        """An embedded server that died is started again by whoever notices first; its data are on disk."""
        if self._embedded is not None:
            try:
                await asyncio.to_thread(self._embedded.ensure_running)
                logger.warning("the embedded server was away and answers again")
            except ConfigError as error:
                logger.error("%s", error.message)

    async def _sweep(self) -> None:
        """Returns the holds of owners that died; one process at a time does it."""
        pause = min(10.0, max(1.0, self.reserve_rules.lease_seconds / 10))
        me = secrets.token_hex(8)
        while True:
            await asyncio.sleep(pause)
            with contextlib.suppress(MeteringUnavailable):
                lease = int(pause * 3000)
                await self.scripts.command("SET", keys.SWEEPER, me, "NX", "PX", lease)
                if await self.scripts.command("GET", keys.SWEEPER) != me:
                    continue
                await self.scripts.command("PEXPIRE", keys.SWEEPER, lease)
                for number in await self.wallet.overdue():
                    await self.wallet.sweep(number)


@dataclass(slots=True, eq=False)
class Metered:
    """One request with its hold, from reserve to its one ending."""

    meter: Meter
    payer: Payer
    quote: Quote
    hold: Hold
    terms: Terms
    idempotency: Idempotency | None = None
    started: float = field(default_factory=time.monotonic)
    granted: int = field(init=False)
    """Output tokens that the hold covers, over all choices."""
    ended: bool = False

    def __post_init__(self) -> None:
        self.granted = self.hold.granted

    @property
    def free(self) -> bool:
        return self.terms.free

    @property
    def lowered_to(self) -> int | None:
        """The maximum of one choice to send upstream, where the hold does not cover what was asked."""
        quote, terms = self.quote, self.terms
        streams = quote.ask.stream and not quote.model.hidden_output
        if terms.free or streams or not terms.want or quote.ask.images or self.granted >= terms.want:
            return None
        return max(1, self.granted // quote.ask.choices)

    @property
    def sent_maximum(self) -> int | None:
        """The most output tokens that the upstream was asked for, over all choices."""
        one = self.lowered_to or self.quote.ask.maximum
        return None if one is None else one * self.quote.ask.choices

    async def extend(self, units: int) -> Literal["ok", "part", "none"]:
        """More output for the hold, up to `units` in all; what is there where that is less.

        Raises MeteringUnavailable.
        """
        whole, current = self._amount(units), self._amount(self.granted)
        extension = await self.meter.wallet.extend(
            self.hold,
            model=self.terms.model,
            to_total=whole,
            least_total=max(self._amount(self.granted + 1), self.hold.amount + 1),
            units=units,
        )
        if extension.status == "ended":
            raise MeteringUnavailable()
        if extension.amount >= whole:
            self.granted = units
            return "ok"
        if extension.status == "ok" and extension.amount > current:
            self.granted = (extension.amount - self.terms.fixed) * 1000 // self.terms.rate
            return "part"
        return "none"

    async def settle(self, usage: Usage, *, model: str | None = None, **facts: object) -> Receipt:
        """Charges the usage, exactly and once, whatever becomes of the caller."""
        charge = self.quote.model.charge(usage)
        record = self._record(usage, charge, model, facts)
        # What no account can hold can't be owed either.
        return await self._end(min(charge.amount, MAX_TICKS), record)

    async def release(self, **facts: object) -> Receipt:
        """Charges nothing."""
        return await self._end(None, self._record(None, Charge(0), None, facts))

    async def _end(self, amount: int | None, record: Mapping[str, object]) -> Receipt:
        if self.ended:
            raise AssertionError("a request ends once")
        self.ended = True
        wallet, id, account = self.meter.wallet, self.hold.id, self.hold.account
        idempotency = self.idempotency
        try:
            if amount is None:
                ending = await self.meter.finisher.finish(lambda: wallet.release(id, account, record))
            else:
                ending = await self.meter.finisher.finish(
                    lambda: wallet.settle(id, account, amount, record, idempotency)
                )
        finally:
            self.meter.forget(self)
        return Receipt(amount or 0, ending.figures if ending else None)

    def _amount(self, units: int) -> int:
        return self.terms.fixed - (-units * self.terms.rate // 1000)

    def _record(
        self, usage: Usage | None, charge: Charge, model: str | None, facts: Mapping[str, object]
    ) -> dict[str, object]:
        """What the ledger keeps of the request beside the sum: never prompts or answers."""
        quote = self.quote
        record: dict[str, object] = {
            "model": quote.ask.model,
            "priced_as": quote.model.name,
            "prices": quote.prices,
            "dialect": quote.dialect.name,
            "ms": int((time.monotonic() - self.started) * 1000),
        }
        if self.payer.key is not None:
            record["key"] = self.payer.key.id
        if quote.ask.stream:
            record["stream"] = True
        if model and model != quote.ask.model:
            record["answered_by"] = model[:MAX_MODEL_NAME].encode("utf-8", "replace").decode()
        if usage is not None:
            record["tokens"] = usage.tokens()
            record["lines"] = [[line.kind, str(line.quantity), line.price, line.per] for line in charge.lines]
            record |= {name: True for name in ("estimated", "invalid") if getattr(usage, name)}
        return {**record, **facts}


class _OwnServer(Protocol):
    """What the meter needs of an embedded server."""

    def ensure_running(self) -> None: ...

    def stop(self) -> None: ...


@contextlib.asynccontextmanager
async def running(meter: Meter) -> AsyncIterator[Meter]:
    """A meter from start to close, for scripts and CLI verbs."""
    try:
        await meter.start()
        yield meter
    finally:
        await meter.aclose()
