"""The commands: one function a verb, `--json` for one object on stdout, one line on stderr for an error."""

import argparse
import asyncio
import json
import logging
import os
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from redis.exceptions import ConnectionError, RedisError, TimeoutError

from . import __version__, keys
from .accounts import Holder
from .config import DEFAULT_FILE, Config, load_config
from .errors import ConfigError, MeterError, MeteringUnavailable, ModelNotFound, UnknownRequest
from .meter import DEFAULT_OUTPUT_TOKENS, Meter, running
from .money import credits, euros, ticks
from .pricing.table import Model, PriceTable
from .tokens import chat_text, count_in_thread, count_pieces
from .types import ApiKey, Entry, Figures, Usage

DONE, FINDING, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
SHOWN_FAULTS = 3

Verb = Callable[[argparse.Namespace], int]
Found = TypeVar("Found")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 a finding, 2 wrong use or config."""
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        code: int = arguments.verb(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        # --help, --version, SIGTERM.
        return DONE if end.code in (None, 0) else WRONG_USE
    except BrokenPipeError:
        # The reader of our output left. What is still buffered must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("llmhub_meter"):
            raise
        needed = f"this needs {error.name}: run `pip install 'llmhub-meter[server]'`"
        print(f"llmhub-meter: {needed}", file=sys.stderr)
        return WRONG_USE
    except (MeterError, OSError) as error:
        print(f"llmhub-meter: {_one_line(str(error))}", file=sys.stderr)
        return WRONG_USE


class WrongUse(MeterError):
    """A command line that makes no sense."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WrongUse(f"{message} (see {self.prog} --help)")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    arguments, left = _parser().parse_known_args(argv)
    # An optional last word after an option is left over by argparse: `estimate MODEL --output 9 TEXT`.
    last: str | None = getattr(arguments, "last", None)
    if last is not None and getattr(arguments, last) is None:
        words = left[1:] if left[:1] == ["--"] else left
        if len(words) == 1 and (words is not left or not words[0].startswith("-") or words == ["-"]):
            setattr(arguments, last, words[0])
            left = []
    if left:
        raise WrongUse(f"unrecognized arguments: {' '.join(left)} (see llmhub-meter --help)")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="llmhub-meter", description="Prepaid metering for LLM traffic.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"llmhub-meter {__version__}")
    _add_common(parser, None, False)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    demo = _verb(verbs, "demo", _demo, "everything embedded, with an account, a key and curl lines")
    _add_address(demo)

    serve = _verb(verbs, "serve", _serve, "the reverse proxy")
    _add_address(serve)
    serve.add_argument("--workers", type=_positive, default=1, metavar="N")
    serve.add_argument("--no-background", action="store_true", help="without the background work")

    check = _verb(verbs, "check-config", _check_config, "name every fault of a config file")
    check.add_argument("file", nargs="?", metavar="FILE")
    check.set_defaults(last="file")

    accounts = _group(verbs, "accounts", "the accounts")
    create = _verb(accounts, "create", _accounts_create, "open an account, with the signup grant")
    create.add_argument("name", metavar="NAME")
    create.add_argument("--email", metavar="E")
    _verb(accounts, "list", _accounts_list, "all accounts")
    show = _verb(accounts, "show", _accounts_show, "one account and its balance")
    show.add_argument("account", metavar="NAME")
    change = _verb(accounts, "set", _accounts_set, "change fields: email, status (active or suspended)")
    change.add_argument("account", metavar="NAME")
    change.add_argument("changes", nargs="+", metavar="KEY=VALUE")

    api_keys = _group(verbs, "keys", "the API keys of accounts")
    issue = _verb(api_keys, "create", _keys_create, "issue a key; it is shown once")
    issue.add_argument("account", metavar="ACCOUNT")
    issue.add_argument("--name", default="", metavar="N")
    listing = _verb(api_keys, "list", _keys_list, "an account's keys")
    listing.add_argument("account", metavar="ACCOUNT")
    revoke = _verb(api_keys, "revoke", _keys_revoke, "end a key")
    revoke.add_argument("key", metavar="KEY_ID")

    money = _group(verbs, "credits", "change balances")
    grant = _verb(money, "grant", _credits_grant, "give credits")
    adjust = _verb(money, "adjust", _credits_adjust, "correct a balance; a negative amount as =-5000")
    adjust.add_argument("--reason", required=True, metavar="R")
    for each in (grant, adjust):
        each.add_argument("account", metavar="ACCOUNT")
        each.add_argument("credits", metavar="CREDITS")
        each.add_argument("--id", metavar="X", help="the same id changes the balance once")
    refund = _verb(money, "refund", _credits_refund, "give a request's charge back, whole or in parts")
    refund.add_argument("request", metavar="REQUEST_ID")
    refund.add_argument("credits", nargs="?", metavar="CREDITS")
    refund.add_argument("--id", metavar="X", help="required for a part")
    refund.set_defaults(last="credits")

    prices = _group(verbs, "prices", "the price table in force")
    _verb(prices, "show", _prices_show, "all models and prices")
    reload = _verb(prices, "reload", _prices_reload, "put the config file's prices in force")
    reload.add_argument("file", nargs="?", metavar="FILE")
    reload.add_argument("--force", action="store_true", help="also changes of more than 100 times")
    reload.set_defaults(last="file")

    estimate = _verb(verbs, "estimate", _estimate, "what a text would cost")
    estimate.add_argument("model", metavar="MODEL")
    estimate.add_argument("text", nargs="?", metavar="TEXT", help="- or none: standard input")
    estimate.add_argument("--output", type=_positive, metavar="N", help="most tokens of output")
    estimate.set_defaults(last="text")

    ledger = _group(verbs, "ledger", "the ledger of all changes")
    _verb(ledger, "audit", _ledger_audit, "prove that balances are the sums of their entries")
    return parser


def _add_common(parser: argparse.ArgumentParser, config: str | None, as_json: bool | str) -> None:
    parser.add_argument(
        "--config", metavar="FILE", default=config, help=f"default: {DEFAULT_FILE} in this folder"
    )
    parser.add_argument("--json", action="store_true", default=as_json, help="one JSON object on stdout")


def _group(verbs: Any, name: str, about: str) -> Any:
    parser = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
    # Unset here, so that what stood before the verb is kept.
    _add_common(parser, argparse.SUPPRESS, argparse.SUPPRESS)
    return parser.add_subparsers(metavar="VERB", required=True)


def _verb(verbs: Any, name: str, run: Verb, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=about, description=about, allow_abbrev=False
    )
    _add_common(parser, argparse.SUPPRESS, argparse.SUPPRESS)
    parser.set_defaults(verb=run)
    return parser


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", metavar="H")
    parser.add_argument("--port", type=_port, default=8000, metavar="P")


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 1_000_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo
    from .serving import end_on_sigterm

    def announce(started: demo.Demo) -> None:
        _show(
            arguments,
            {"key": started.key, "base_url": started.base_url, "account": started.account},
            demo.welcome(started),
        )

    data_dir = _config(arguments).data_dir
    with end_on_sigterm():
        asyncio.run(demo.run(data_dir, host=arguments.host, port=arguments.port, announce=announce))
    return DONE


def _serve(arguments: argparse.Namespace) -> int:
    from .serving import serve

    config = _config(arguments)

    def announce(url: str) -> None:
        redis = f"embedded in {config.data_dir}" if config.redis.url is None else _without_secrets(config)
        facts = {"url": url, "workers": arguments.workers, "models": len(config.models), "redis": redis}
        workers, models = _counted(arguments.workers, "worker"), _counted(len(config.models), "model")
        _show(arguments, facts, f"llmhub-meter serving on {url} ({workers}, {models}, Redis: {redis})")

    try:
        serve(
            config,
            _path(arguments),
            host=arguments.host,
            port=arguments.port,
            workers=arguments.workers,
            background=not arguments.no_background,
            announce=announce,
        )
    except MeteringUnavailable as error:
        raise _unreachable(config, error) from None
    return DONE


def _check_config(arguments: argparse.Namespace) -> int:
    try:
        config = load_config(Path(arguments.file) if arguments.file else _path(arguments), environ=os.environ)
        PriceTable.from_config(config.models, config.default_upstream)
    except ConfigError as error:
        for fault in error.faults:
            print(_one_line(fault), file=sys.stderr)
        if arguments.json:
            _show(arguments, {"ok": False, "faults": error.faults}, "")
        return WRONG_USE
    models, upstreams = len(config.models), len(config.upstreams)
    facts = {"ok": True, "models": models, "upstreams": upstreams, "data_dir": str(config.data_dir)}
    _show(arguments, facts, f"OK: {_counted(models, 'model')}, {_counted(upstreams, 'upstream')}")
    return DONE


def _accounts_create(arguments: argparse.Namespace) -> int:
    async def run(meter: Meter) -> Holder:
        account = await meter.accounts.create(arguments.name, email=arguments.email)
        return await meter.accounts.get(account.id)

    return _show_holder(arguments, _with_meter(arguments, run))


def _accounts_list(arguments: argparse.Namespace) -> int:
    async def run(meter: Meter) -> list[Holder]:
        return [holder async for holder in meter.accounts.all()]

    found = sorted(_with_meter(arguments, run), key=lambda holder: holder.account.created_at)
    data = [_holder_json(holder) for holder in found]
    columns = ("name", "id", "status", "balance", "held", "available", "created_at")
    _show(arguments, {"data": data}, _table(columns, data))
    return DONE


def _accounts_show(arguments: argparse.Namespace) -> int:
    return _show_holder(
        arguments, _with_meter(arguments, lambda meter: meter.accounts.get(arguments.account))
    )


def _accounts_set(arguments: argparse.Namespace) -> int:
    pairs = [change.partition("=") for change in arguments.changes]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise WrongUse(f"{wrong[0]!r} is not KEY=VALUE")
    changes = {name: value for name, _, value in pairs}
    holder = _with_meter(arguments, lambda meter: meter.accounts.set(arguments.account, changes))
    return _show_holder(arguments, holder)


def _keys_create(arguments: argparse.Namespace) -> int:
    secret, key = _with_meter(
        arguments, lambda meter: meter.accounts.issue_key(arguments.account, name=arguments.name)
    )
    facts = {"key": secret, **_key_json(key)}
    _show(arguments, facts, f"{secret}\n\nKey {key.id}. It is shown only now: keep it safe.")
    return DONE


def _keys_list(arguments: argparse.Namespace) -> int:
    found = _with_meter(arguments, lambda meter: meter.accounts.list_keys(arguments.account))
    data = [_key_json(key) for key in found]
    _show(arguments, {"data": data}, _table(("id", "hint", "name", "created_at", "revoked_at"), data))
    return DONE


def _keys_revoke(arguments: argparse.Namespace) -> int:
    key = _with_meter(arguments, lambda meter: meter.accounts.revoke_key(arguments.key))
    _show(arguments, _key_json(key), f"{key.id} ({key.hint}) is revoked")
    return DONE


def _credits_grant(arguments: argparse.Namespace) -> int:
    amount = _amount(arguments.credits)
    if amount <= 0:
        raise WrongUse("a grant is more than 0 credits; `credits adjust` takes some away")
    id = arguments.id or f"grant:{uuid.uuid4().hex}"

    async def run(meter: Meter) -> tuple[str, Figures]:
        account = (await meter.accounts.get(arguments.account)).account.id
        return account, await meter.wallet.credit(account, amount, "grant", id=_checked_id(id))

    return _show_change(arguments, id, amount, *_with_meter(arguments, run))


def _credits_adjust(arguments: argparse.Namespace) -> int:
    amount = _amount(arguments.credits)
    if not amount:
        raise WrongUse("an adjustment of 0 credits changes nothing")
    if not arguments.reason.strip():
        raise WrongUse("--reason is empty")
    id = arguments.id or f"adjust:{uuid.uuid4().hex}"

    async def run(meter: Meter) -> tuple[str, Figures]:
        account = (await meter.accounts.get(arguments.account)).account.id
        record = {"reason": arguments.reason}
        return account, await meter.wallet.credit(
            account, amount, "adjust", id=_checked_id(id), record=record
        )

    return _show_change(arguments, id, amount, *_with_meter(arguments, run))


def _credits_refund(arguments: argparse.Namespace) -> int:
    part = None if arguments.credits is None else _amount(arguments.credits)
    if part is not None and part <= 0:
        raise WrongUse("a refund is more than 0 credits")
    if (part is None) != (arguments.id is None):
        raise WrongUse("a part has its own --id, and only a part: refund REQUEST_ID [CREDITS --id X]")
    request = arguments.request
    id = arguments.id or f"refund:{request}"

    async def run(meter: Meter) -> tuple[int, str, Figures]:
        entry = await _charge_of(meter, request)
        charge = -entry.amount
        amount = charge if part is None else part
        figures = await meter.wallet.credit(
            entry.account,
            amount,
            "refund",
            id=_checked_id(id),
            record={"request": request},
            request=request,
            charge=charge,
            from_grants=-int(str(entry.data["promo"])),
        )
        return amount, entry.account, figures

    return _show_change(arguments, id, *_with_meter(arguments, run))


async def _charge_of(meter: Meter, request: str) -> Entry:
    if not keys.is_request_id(request):
        raise UnknownRequest(f"{request!r} is not a request id; answers carry it as X-Request-Id")
    entry = await meter.wallet.ending(request)
    if entry is None:
        raise UnknownRequest(f"there is no request {request} that ended")
    if entry.code != "charge" or not entry.amount:
        raise UnknownRequest(f"{request} was charged nothing")
    return entry


def _prices_show(arguments: argparse.Namespace) -> int:
    async def run(meter: Meter) -> PriceTable:
        return meter.prices.table

    table = _with_meter(arguments, run)
    rows = [
        {"model": name, "type": model.type, "unit": model.unit, "credits": _price_words(model, public)}
        for (name, model), public in zip(table.models.items(), table.public(), strict=True)
    ]
    text = f"version {table.version}\n\n{_table(('model', 'type', 'unit', 'credits'), rows)}"
    _show(arguments, {"version": table.version, "data": table.public()}, text)
    return DONE


def _prices_reload(arguments: argparse.Namespace) -> int:
    file = None if arguments.file is None else Path(arguments.file)
    if file is not None and _path(arguments) is None:
        # The one file that there is says where Redis is, too.
        arguments.config = arguments.file
    config = _config(arguments)
    source = config if file is None else load_config(file, environ=os.environ)
    if not source.models:
        raise ConfigError([f"{file or _path(arguments) or 'config'}: there is no model to put in force"])
    table = PriceTable.from_config(source.models, source.default_upstream or config.default_upstream)

    async def run(meter: Meter) -> tuple[str, bool]:
        before = meter.prices.table.version
        return before, await meter.prices.publish(table, force=arguments.force)

    before, changed = _with_meter(arguments, run)
    facts = {"old": before, "new": table.version, "changed": changed, "models": len(table.models)}
    text = f"{before} -> {table.version}" if before != table.version else f"{before} was in force already"
    _show(arguments, facts, f"{text} ({_counted(len(table.models), 'model')})")
    return DONE


def _estimate(arguments: argparse.Namespace) -> int:
    text = arguments.text
    if text is None and sys.stdin.isatty():
        raise WrongUse("give a TEXT, or - to read standard input")
    if text in (None, "-"):
        text = sys.stdin.buffer.read().decode(errors="replace")

    async def run(meter: Meter) -> Model:
        model = meter.prices.table.find(arguments.model)
        if model is None:
            raise ModelNotFound(f"there is no model {arguments.model!r} in the price table")
        return model

    model = _with_meter(arguments, run)
    if model.unit == "minute" and not model.free:
        raise WrongUse(f"{model.name} is priced by the minute of audio, not by text")
    tokens, least, most = asyncio.run(_price_text(model, text, arguments.output))
    facts = {
        "model": model.name,
        "prompt_tokens": tokens,
        "credits_from": credits(least),
        "credits_to": credits(most),
    }
    lines = {
        "model": model.name,
        "tokens": str(tokens),
        "credits": _span(credits(least), credits(most)),
        "EUR": _span(euros(least), euros(most)),
    }
    _show(arguments, facts, _lines(lines))
    return DONE


def _span(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"


async def _price_text(model: Model, text: str, output: int | None) -> tuple[int, int, int]:
    """Tokens of a text as the only message, and its least and most price in ticks."""
    if model.type == "chat":
        message = chat_text([{"role": "user", "content": text}], model=model.name)
        tokens = await count_pieces(message.pieces, message.overhead, model.name)
    else:
        tokens = await count_in_thread(text, model.name)
    most = output or model.max_output_tokens or DEFAULT_OUTPUT_TOKENS
    images = 1 if model.unit == "generation" else 0
    least_usage = Usage(tokens, images=images, characters=len(text))
    most_usage = Usage(tokens, most, images=images, characters=len(text))
    return tokens, model.charge(least_usage).amount, model.charge(most_usage).amount


def _ledger_audit(arguments: argparse.Namespace) -> int:
    from .archive.audit import audit

    report = _with_meter(arguments, lambda meter: audit(meter.scripts))
    findings = [str(finding) for finding in report.findings]
    facts = {
        "accounts": report.accounts,
        "entries": report.entries,
        "differences": report.differences,
        "findings": findings,
    }
    accounts, entries = _counted(report.accounts, "account"), _counted(report.entries, "entry")
    counts = f"{accounts}, {entries}, "
    _show(arguments, facts, "\n".join([counts + _counted(report.differences, "difference"), *findings]))
    return FINDING if report.differences else DONE


def _path(arguments: argparse.Namespace) -> Path | None:
    if arguments.config is not None:
        return Path(arguments.config)
    return Path(DEFAULT_FILE) if Path(DEFAULT_FILE).exists() else None


def _config(arguments: argparse.Namespace) -> Config:
    """The config; of many faults the first few, since `check-config` has each on a line of its own."""
    try:
        return load_config(_path(arguments), environ=os.environ)
    except ConfigError as error:
        shown, left = error.faults[:SHOWN_FAULTS], len(error.faults) - SHOWN_FAULTS
        if left <= 0:
            raise
        raise ConfigError([*shown, f"{left} more: see `check-config`"]) from None


def _with_meter(arguments: argparse.Namespace, run: Callable[[Meter], Awaitable[Found]]) -> Found:
    """What `run` finds on the config's Redis, with the price table that is in force there."""
    config = _config(arguments)
    # Errors are told once, by `main`.
    logging.getLogger("llmhub_meter").addHandler(logging.NullHandler())

    async def work() -> Found:
        async with running(Meter.from_config(config, adopt_prices=True)) as meter:
            return await run(meter)

    try:
        return asyncio.run(work())
    except MeteringUnavailable as error:
        raise _unreachable(config, error) from None


def _unreachable(config: Config, error: MeteringUnavailable) -> MeterError:
    cause, place = error.__cause__, _without_secrets(config)
    if isinstance(cause, RedisError) and not isinstance(cause, ConnectionError | TimeoutError):
        return MeterError(f"Redis at {place} refused a call: {cause}")
    return MeterError(f"Redis can't be reached at {place}" + (f": {cause}" if cause else ""))


def _without_secrets(config: Config) -> str:
    """The Redis URL as far as it may be shown: no user, no password, no query."""
    if config.redis.url is None:
        return f"the embedded server in {config.data_dir}"
    url = urlsplit(config.redis.url)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


def _amount(text: str) -> int:
    try:
        return ticks(text.removeprefix("="))
    except ValueError as error:
        raise WrongUse(str(error)) from None


def _checked_id(id: str) -> str:
    if not 0 < len(id) <= 200 or not id.isprintable() or any(character.isspace() for character in id):
        raise WrongUse("an id is 1 to 200 printable characters without blanks")
    return id


def _show_holder(arguments: argparse.Namespace, holder: Holder) -> int:
    facts = _holder_json(holder)
    _show(arguments, facts, _lines(facts))
    return DONE


def _show_change(arguments: argparse.Namespace, id: str, amount: int, account: str, figures: Figures) -> int:
    facts = {"id": id, "account": account, "amount": credits(amount), **_figures_json(figures)}
    _show(arguments, facts, _lines(facts))
    return DONE


def _holder_json(holder: Holder) -> dict[str, object]:
    account = holder.account
    return {
        "id": account.id,
        "name": account.name,
        "email": account.email,
        "status": account.status,
        **_figures_json(holder.figures),
        "free_grant": credits(holder.figures.promo),
        "created_at": _moment(account.created_at),
    }


def _figures_json(figures: Figures) -> dict[str, object]:
    return {
        "balance": credits(figures.balance),
        "held": credits(figures.held),
        "available": credits(figures.available),
    }


def _key_json(key: ApiKey) -> dict[str, object]:
    return {
        "id": key.id,
        "account": key.account,
        "name": key.name,
        "kind": key.kind,
        "hint": key.hint,
        "created_at": _moment(key.created_at),
        "revoked_at": None if key.revoked_at is None else _moment(key.revoked_at),
    }


def _price_words(model: Model, public: Mapping[str, object]) -> str:
    if model.free:
        return "free"
    pricing: Any = public["pricing"]
    prices = dict(pricing["credits"])
    prices |= prices.pop("by", {})
    return ", ".join(f"{name} {price}" for name, price in prices.items())


def _moment(milliseconds: int) -> str:
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _show(arguments: argparse.Namespace, facts: Mapping[str, object], text: str) -> None:
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else text, flush=True)


def _lines(facts: Mapping[str, object]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {_word(value)}" for name, value in facts.items())


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    cells = [columns, *([_word(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _word(value: object) -> str:
    return "-" if value in (None, "") else str(value)


def _counted(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"


def _one_line(text: str) -> str:
    return " ".join(text.split())
