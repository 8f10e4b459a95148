"""Accounts and API keys: create, issue, revoke, find. A key is kept only as its SHA-256."""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import msgspec

from . import keys
from .errors import AccountExists, InvalidApiKey, UnknownAccount, UnknownKey, WalletError
from .scripts import Scripts
from .types import Account, ApiKey, Figures, KeyKind

KEY_PATTERN = re.compile(r"llmhub_(sk|pk)_[A-Za-z0-9_-]{43}")
CACHE_SECONDS = 1.0
"""How long a found key is trusted without asking Redis: a revoked one is refused everywhere within this."""
CACHE_SIZE = 10_000
_SETTABLE = ("email", "status")


@dataclass(frozen=True, slots=True)
class Holder:
    """An account with its wallet."""

    account: Account
    figures: Figures
    signup_grant: int = 0
    last_topup: int | None = None


class Accounts:
    """The accounts and keys on one Redis."""

    def __init__(self, scripts: Scripts, *, signup_grant: int) -> None:
        self._scripts = scripts
        self._signup_grant = signup_grant
        self._found: dict[str, tuple[ApiKey, float]] = {}

    async def create(self, name: str, *, email: str | None = None) -> Account:
        """Opens an account under a new name, with the signup grant.

        Raises AccountExists, WalletError for a name or e-mail that can't be.
        """
        _check_name(name)
        if email is not None:
            _check_email(email)
        id = f"acct_{secrets.token_hex(8)}"
        # The name is claimed first. A claim whose account was never made (its maker died) is taken over:
        # the script makes an account once, whoever asks.
        if not await self._scripts.command("HSETNX", keys.NAMES, name, id):
            id = await self._scripts.command("HGET", keys.NAMES, name)
        account = Account(id, name, email, created_at=_now())
        if not await self._open(account):
            raise AccountExists(f"there is an account {name!r} already")
        return account

    async def ensure(self, account: Account) -> None:
        """Opens the account of a library user's `identify` when it is seen first, with the signup grant."""
        check_account_id(account.id)
        await self._open(Account(account.id, account.name or account.id, account.email, created_at=_now()))

    async def get(self, name_or_id: str) -> Holder:
        """An account by its name or id. Raises UnknownAccount."""
        id = await self._scripts.command("HGET", keys.NAMES, name_or_id) or name_or_id
        fields = await self._scripts.command("HGETALL", keys.wallet(id))
        if not fields:
            raise UnknownAccount(f"there is no account {name_or_id!r}; `accounts list` shows all")
        return _holder(id, _mapping(fields))

    async def all(self) -> AsyncIterator[Holder]:
        """All accounts, partition by partition."""
        members = await self._scripts.commands(
            [["SMEMBERS", keys.accounts(number)] for number in range(keys.PARTITIONS)]
        )
        for ids in members:
            ordered = sorted(ids)
            for start in range(0, len(ordered), 500):
                batch = ordered[start : start + 500]
                found = await self._scripts.commands([["HGETALL", keys.wallet(id)] for id in batch])
                for id, fields in zip(batch, found, strict=True):
                    yield _holder(id, _mapping(fields))

    async def set(self, name_or_id: str, changes: Mapping[str, str]) -> Holder:
        """Changes fields of an account: `email` (empty for none), `status` (active or suspended).

        Raises UnknownAccount, WalletError for a field or value that can't be.
        """
        for field, value in changes.items():
            if field not in _SETTABLE:
                raise WalletError(f"{field!r} can't be set; can be: {', '.join(_SETTABLE)}")
            if field == "status" and value not in ("active", "suspended"):
                raise WalletError(f"status is active or suspended, not {value!r}")
            if field == "email" and value:
                _check_email(value)
        holder = await self.get(name_or_id)
        if not changes:
            return holder
        id = holder.account.id
        wallet = keys.wallet(id)
        await self._change(
            [wallet, wallet, keys.accounts(keys.partition(id))], id, "account", "known", changes
        )
        return await self.get(id)

    async def issue_key(self, name_or_id: str, *, name: str = "", kind: KeyKind = "sk") -> tuple[str, ApiKey]:
        """A new key for an account: the key itself, which is never seen again, and its record."""
        if len(name) > 200 or not name.isprintable():
            raise WalletError("a key's name is printable text of at most 200 characters")
        account = (await self.get(name_or_id)).account.id
        secret, digest = _draw(kind, keys.partition(account))
        key = ApiKey(
            keys.key_id(digest), account, kind, name, f"{secret[:13]}...{secret[-4:]}", created_at=_now()
        )
        fields = {
            "hash": digest,
            "account": account,
            "kind": kind,
            "name": name,
            "hint": key.hint,
            "created": str(key.created_at),
        }
        await self._change(
            [keys.wallet(account), keys.api_key(key.id), keys.account_keys(account)],
            account,
            "key",
            "new",
            fields,
            member=key.id,
        )
        return secret, key

    async def list_keys(self, name_or_id: str) -> list[ApiKey]:
        """The keys of an account, oldest first; revoked ones too."""
        account = (await self.get(name_or_id)).account.id
        ids = sorted(await self._scripts.command("SMEMBERS", keys.account_keys(account)))
        found = await self._scripts.commands([["HGETALL", keys.api_key(id)] for id in ids]) if ids else []
        listed = [_api_key(id, _mapping(fields)) for id, fields in zip(ids, found, strict=True)]
        return sorted(listed, key=lambda key: (key.created_at, key.id))

    async def revoke_key(self, id: str) -> ApiKey:
        """Ends a key; once revoked it stays so. Raises UnknownKey."""
        fields = (
            _mapping(await self._scripts.command("HGETALL", keys.api_key(id))) if keys.is_key_id(id) else {}
        )
        if not fields:
            raise UnknownKey(f"there is no key {id!r}; `keys list ACCOUNT` shows an account's")
        key = _api_key(id, fields)
        if key.revoked_at is None:
            target = [keys.wallet(key.account), keys.api_key(id), keys.account_keys(key.account)]
            await self._change(target, key.account, "key", "known", {"revoked": str(_now())})
            self._found.clear()
        return _api_key(id, _mapping(await self._scripts.command("HGETALL", keys.api_key(id))))

    async def find(self, secret: str) -> ApiKey:
        """The record of a key that a client showed.

        Raises InvalidApiKey for one that is malformed, unknown or revoked, MeteringUnavailable.
        """
        if KEY_PATTERN.fullmatch(secret) is None:
            raise InvalidApiKey("Incorrect API key provided. Keys look like llmhub_sk_...")
        digest = hashlib.sha256(secret.encode()).hexdigest()
        cached = self._found.get(digest)
        if cached is not None and cached[1] > time.monotonic():
            return cached[0]
        id = keys.key_id(digest)
        fields = _mapping(await self._scripts.command("HGETALL", keys.api_key(id)))
        if not fields:
            await self._scripts.check_epoch()
        if not hmac.compare_digest(fields.get("hash", ""), digest):
            raise InvalidApiKey("Incorrect API key provided.")
        key = _api_key(id, fields)
        if key.revoked_at is not None:
            raise InvalidApiKey("This API key has been revoked.")
        if len(self._found) >= CACHE_SIZE:
            self._found.clear()
        self._found[digest] = key, time.monotonic() + CACHE_SECONDS
        return key

    async def _open(self, account: Account) -> bool:
        wallet, id = keys.wallet(account.id), account.id
        fields = {
            "name": account.name,
            "status": "active",
            "created": str(account.created_at),
            "grant": str(self._signup_grant),
        }
        if account.email is not None:
            fields["email"] = account.email
        return await self._change(
            [wallet, wallet, keys.accounts(keys.partition(id)), keys.credited(id)],
            id,
            "account",
            "new",
            fields,
            member=id,
            grant=self._signup_grant,
        )

    async def _change(
        self,
        targets: list[str],
        account: str,
        code: str,
        expected: str,
        fields: Mapping[str, str],
        *,
        member: str = "",
        grant: int = 0,
    ) -> bool:
        """Whether the change was made; False where the new thing is there already."""
        record = msgspec.json.encode({**fields, "member": member} if member else fields).decode()
        pairs = [part for pair in fields.items() for part in pair]
        change = keys.new_change_id(account)
        if len(targets) == 3:
            targets = [*targets, keys.credited(account)]
        status, *_ = await self._scripts.call(
            "change", targets, [change, account, code, expected, record, member, grant, *pairs]
        )
        if status in ("no_account", "unknown"):
            raise UnknownAccount(f"there is no account {account!r}")
        return bool(status == "ok")


def check_account_id(id: str) -> None:
    """Raises WalletError for an account id that Redis keys and records can't carry."""
    if not 0 < len(id) <= 200 or not id.isprintable() or any(c.isspace() for c in id):
        raise WalletError("an account id is 1 to 200 printable characters without blanks")


def _draw(kind: KeyKind, number: int) -> tuple[str, str]:
    """A key whose SHA-256 begins with the partition, so that its record shares the account's slot.

    That takes 8 of the 258 bits of the key; about 256 draws.
    """
    while True:
        secret = f"llmhub_{kind}_{secrets.token_urlsafe(32)}"
        digest = hashlib.sha256(secret.encode()).hexdigest()
        if int(digest[:2], 16) == number:
            return secret, digest


def _check_name(name: str) -> None:
    if not 0 < len(name) <= 200 or not name.isprintable() or name != name.strip():
        raise WalletError("a name is 1 to 200 printable characters without blanks around it")


def _check_email(email: str) -> None:
    if len(email) > 320 or re.fullmatch(r"[^@\s]+@[^@\s]+", email) is None or not email.isprintable():
        raise WalletError(f"{email!r} is no e-mail address")


def _now() -> int:
    return int(time.time() * 1000)


def _mapping(answer: object) -> dict[str, str]:
    """HGETALL's answer, which comes as a mapping or as a flat list by the way it was asked."""
    if isinstance(answer, dict):
        return answer
    flat = list(answer)  # type: ignore[call-overload]
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _holder(id: str, fields: Mapping[str, str]) -> Holder:
    account = Account(
        id,
        fields.get("name", id),
        fields.get("email") or None,
        "suspended" if fields.get("status") == "suspended" else "active",
        int(fields.get("created", "0")),
    )
    figures = Figures(int(fields["balance"]), int(fields["held"]), int(fields["promo"]))
    last_topup = fields.get("last_topup")
    return Holder(
        account, figures, int(fields.get("grant", "0")), None if last_topup is None else int(last_topup)
    )


def _api_key(id: str, fields: Mapping[str, str]) -> ApiKey:
    revoked = fields.get("revoked")
    return ApiKey(
        id,
        fields["account"],
        "pk" if fields["kind"] == "pk" else "sk",
        fields["name"],
        fields["hint"],
        int(fields["created"]),
        None if revoked is None else int(revoked),
    )
