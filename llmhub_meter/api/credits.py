"""Reading one's own credits: `/v1/credits` and `/v1/credits/requests/{id}`."""

from collections.abc import Mapping
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from .. import keys
from ..accounts import Holder
from ..errors import NotFound
from ..money import TICKS_PER_CREDIT, credits, euros
from ..types import Entry
from ..wallet import Wallet

STATES = {"charge": "settled", "release": "released", "expire": "expired"}


def balance(holder: Holder) -> dict[str, object]:
    """The body of `GET /v1/credits`; amounts are decimal strings."""
    figures = holder.figures
    amounts = {"balance": figures.balance, "held": figures.held, "available": figures.available}
    base = holder.signup_grant if holder.last_topup is None else holder.last_topup
    return {
        **{name: credits(amount) for name, amount in amounts.items()},
        "currency": "credits",
        "eur": {name: euros(amount) for name, amount in amounts.items()},
        "free_grant": credits(figures.promo),
        "last_topup": None if holder.last_topup is None else credits(holder.last_topup),
        "low_balance_threshold": credits(base // 10),
    }


async def request(wallet: Wallet, account: str, id: str) -> dict[str, object]:
    """The body of `GET /v1/credits/requests/{id}`. Raises NotFound, also for another account's request."""
    unknown = NotFound(f"There is no request {id[:64]!r} of this account.")
    if not keys.is_request_id(id) or keys.partition_of(id) != keys.partition(account):
        raise unknown
    held = await wallet.held(id)
    if held is not None:
        amount, owner, model = held
        if owner != account:
            raise unknown
        return {
            "id": id,
            "object": "credits.request",
            "state": "held",
            "model": model,
            "created_at": _time(keys.started_at(id)),
            "credits": "0",
            "reserved": credits(amount),
            "tokens": {},
            "estimated": False,
        }
    entry = await wallet.ending(id)
    if entry is None or entry.account != account:
        raise unknown
    return {**charge(entry), "refunded": credits(await wallet.refunded(id))}


def charge(entry: Entry) -> dict[str, object]:
    """A request that ended, with how its sum came about."""
    data: Mapping[str, Any] = entry.data
    found: dict[str, object] = {
        "id": entry.id,
        "object": "credits.request",
        "state": STATES[entry.code],
        "model": data.get("model"),
        "created_at": _time(keys.started_at(entry.id)),
        "ended_at": _time(entry.at),
        "credits": credits(-entry.amount),
        "eur": euros(-entry.amount),
        "from_grants": credits(-data["promo"]),
        "tokens": data.get("tokens", {}),
        "estimated": data.get("estimated", False),
        "usage_invalid": data.get("invalid", False),
        "late": data["late"],
        "price_version": data.get("prices"),
        "breakdown": [_line(*line) for line in data.get("lines", [])],
    }
    if "answered_by" in data:
        found["answered_by"] = data["answered_by"]
    return found


def _line(kind: str, quantity: str, price: int, per: int) -> dict[str, object]:
    """One part of the sum, exact: `credits` has as many decimals as it takes."""
    exact = Fraction(quantity) * price / per / TICKS_PER_CREDIT
    return {
        "kind": kind,
        "quantity": quantity,
        "price": credits(price),
        "per": per,
        "credits": _exact(exact),
    }


def _exact(value: Fraction) -> str:
    """A fraction as a decimal where it has an end within 12 places, else as numerator/denominator."""
    scaled = value * 10**12
    if scaled.denominator != 1:
        return str(value)
    whole, rest = divmod(scaled.numerator, 10**12)
    return f"{whole}.{rest:012d}".rstrip("0").rstrip(".")


def _time(milliseconds: int) -> str:
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
