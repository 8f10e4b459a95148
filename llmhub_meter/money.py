"""Ticks, credits and euros: integers inside, plain decimals at the edges.

One credit is EUR 0.00001 and 10,000 ticks, so a tick is one nano-euro.
"""

from decimal import Decimal, InvalidOperation
from fractions import Fraction

TICKS_PER_CREDIT = 10_000
MAX_TICKS = 9_000_000_000_000_000
"""What an account can hold: Lua compares and adds integers exactly up to 2**53."""


def ticks(credits: Decimal | int | str) -> int:
    """An amount of credits as ticks, exactly.

    Raises ValueError for what is no finite number, has more than 4 decimals, or passes the cap.
    """
    if isinstance(credits, bool | float):
        raise ValueError(f"{credits!r} is not a decimal number of credits")
    try:
        value = Decimal(credits)
    except InvalidOperation:
        raise ValueError(f"{credits!r} is not a decimal number of credits") from None
    if not value.is_finite():
        raise ValueError(f"{credits} is not a finite number of credits")
    # The size is compared before the product is formed: 1e999999 must not become a million digits.
    if value and value.adjusted() > 15:
        raise ValueError(f"{credits} credits is more than an account can hold")
    # Comparing is exact, while a product of 29 digits or more would be rounded before one could look at it.
    if value != round(value, 4):
        raise ValueError(f"{credits} has more than 4 decimals of a credit")
    amount = value * TICKS_PER_CREDIT
    if abs(amount) > MAX_TICKS:
        raise ValueError(f"{credits} credits is more than an account can hold")
    return int(amount)


def credits(amount: int) -> str:
    """Ticks as credits: `175`, `0.35`, `-12`; no exponent, no trailing zeros."""
    return _decimal(amount, 4)


def euros(amount: int) -> str:
    """Ticks as euros: `0.00175`."""
    return _decimal(amount, 9)


def _decimal(amount: int, places: int) -> str:
    whole, rest = divmod(abs(amount), 10**places)
    sign = "-" if amount < 0 else ""
    if not rest:
        return f"{sign}{whole}"
    return f"{sign}{whole}.{rest:0{places}d}".rstrip("0")


def round_half_up(value: Fraction) -> int:
    """A non-negative exact sum as whole ticks; the one rounding of a charge."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)
