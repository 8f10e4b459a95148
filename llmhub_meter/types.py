"""What travels between the rooms. Amounts are ticks; times are milliseconds since 1970, UTC."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

KeyKind = Literal["sk", "pk"]


@dataclass(frozen=True, slots=True)
class Account:
    """Who pays. `id` is printable without blanks and never changes."""

    id: str
    name: str = ""
    email: str | None = None
    status: Literal["active", "suspended"] = "active"
    created_at: int = 0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An issued key as it is kept: never the key itself, only its SHA-256."""

    id: str
    account: str
    kind: KeyKind
    name: str
    hint: str
    """Prefix and last four characters, for lists."""
    created_at: int
    revoked_at: int | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """A wallet as a script left it."""

    balance: int
    held: int
    promo: int = 0
    """The part of the balance that was given and is spent first."""

    @property
    def available(self) -> int:
        return self.balance - self.held

    @property
    def remaining(self) -> int:
        """What the account can spend, floored at 0."""
        return max(0, self.available)


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request used, normalised: details sit inside their totals.

    Cached, cache-write, audio and image tokens are parts of `prompt_tokens`; reasoning and audio of
    `completion_tokens`, whatever the provider's own habit.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    audio_prompt_tokens: int = 0
    image_prompt_tokens: int = 0
    reasoning_tokens: int = 0
    audio_completion_tokens: int = 0
    images: int = 0
    size: str | None = None
    quality: str | None = None
    seconds: Fraction | int = 0
    characters: int = 0
    estimated: bool = False
    """Counted by us, as the answer reported nothing."""
    invalid: bool = False
    """The answer reported nonsense; the parts in question were counted instead."""

    def tokens(self) -> dict[str, int]:
        """Tokens by kind, for records: totals always, details where there are any."""
        found = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        for kind in (
            "cached_tokens",
            "cache_write_tokens",
            "reasoning_tokens",
            "audio_prompt_tokens",
            "audio_completion_tokens",
            "image_prompt_tokens",
        ):
            if count := getattr(self, kind):
                found[kind] = count
        return found


@dataclass(frozen=True, slots=True)
class ChargeLine:
    """One part of a charge: `quantity` units at `price` ticks per `per` units."""

    kind: str
    quantity: Fraction | int
    price: int
    per: int


@dataclass(frozen=True, slots=True)
class Charge:
    """What a request costs: the exact sum of its lines, rounded half up to a tick once."""

    amount: int
    lines: tuple[ChargeLine, ...] = ()


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's idempotency key and what it was sent with, both as SHA-256 in hex."""

    key: str
    body: str


@dataclass(frozen=True, slots=True)
class Hold:
    """An amount set aside for one request until it is settled or released."""

    id: str
    account: str
    amount: int
    figures: Figures
    """The wallet as the reserve left it."""
    granted: int = 0
    """Output units (tokens) that the hold covers."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a hold ended. Asking again gives the first ending."""

    state: Literal["settled", "released", "expired"]
    charge: int
    figures: Figures
    late: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger; entries are only ever added."""

    id: str
    account: str
    code: str
    amount: int
    balance: int
    seq: int
    at: int
    data: Mapping[str, object] = field(default_factory=dict)
