"""Every Redis key, and the ids that decide where one lives.

An account and all that changes with it share a partition, which is the hash tag of its keys: one script call
touches one slot. `lua/includes/partition.lua` spells the same names inside the scripts.
"""

import re
import secrets
import time
import zlib

PARTITIONS = 256
DONE_BUCKET_MS = 600_000
"""What has ended is kept in hashes by the time inside its id, ten minutes to a hash."""

EPOCH = "meter:epoch"
"""Random id of this Redis's data. When it is gone or another one, the data is lost."""
NAMES = "meter:names"
"""Account name -> account id."""
PRICES = "meter:prices"
"""The price table in force: `table` (JSON) and its `version`."""
SWEEPER = "meter:sweeper"
"""Lease of the one process that sweeps."""

_REQUEST_ID = re.compile("req_[0-9a-f]{32}")
_KEY_ID = re.compile("key_[0-9a-f]{24}")


def partition(account: str) -> int:
    """Where an account lives, by its root account's id; never changed later."""
    return zlib.crc32(account.encode()) % PARTITIONS


def _key(number: int, *parts: str) -> str:
    return ":".join((f"{{p{number}}}", *parts))


def wallet(account: str) -> str:
    """Hash: balance, held, promo, seq, status, name, email, created, grant, last_topup."""
    return _key(partition(account), "wallet", account)


def account_keys(account: str) -> str:
    """Set of the ids of an account's keys."""
    return _key(partition(account), "keys", account)


def credited(account: str) -> str:
    """Hash: id of a credit -> its amount, code and the balance after it; kept for ever."""
    return _key(partition(account), "credited", account)


def accounts(number: int) -> str:
    """Set of the account ids of a partition."""
    return _key(number, "accounts")


def holds(number: int) -> str:
    """Hash: request id -> amount, granted units, account, model."""
    return _key(number, "holds")


def leases(number: int) -> str:
    """Sorted set: request id by the time its hold expires, in milliseconds."""
    return _key(number, "leases")


def ledger(number: int) -> str:
    """Stream of entries."""
    return _key(number, "ledger")


def head(number: int) -> str:
    """Hash: sequence, raised with every entry."""
    return _key(number, "head")


def refunds(number: int) -> str:
    """Hash: request id -> how much of its charge was given back."""
    return _key(number, "refunds")


def done(request: str) -> str:
    """Hash: request id -> how it ended, its charge and its ledger entry's stream id."""
    return _key(partition_of(request), "done", str(started_at(request) // DONE_BUCKET_MS))


def idempotency(account: str, digest: str) -> str:
    """Hash: request, body and charge that a client's idempotency key, by its SHA-256 in hex, stands for."""
    return _key(partition(account), "idem", account, digest)


def key_id(digest: str) -> str:
    """The public id of an API key, from its SHA-256 in hex, which begins with the partition."""
    return f"key_{digest[:24]}"


def api_key(key: str) -> str:
    """Hash of an issued key, by its id."""
    return _key(int(key[4:6], 16), "key", key)


def new_request_id(account: str) -> str:
    """`req_`, 12 hex digits of milliseconds, 2 of the partition, 18 random."""
    return _new_id("req_", account)


def new_change_id(account: str) -> str:
    """Like a request id, for a change of an account or key."""
    return _new_id("chg_", account)


def _new_id(prefix: str, account: str) -> str:
    return f"{prefix}{int(time.time() * 1000):012x}{partition(account):02x}{secrets.token_hex(9)}"


def is_request_id(text: str) -> bool:
    """Whether `text` has the form of a request id, so that its time and partition can be read."""
    return _REQUEST_ID.fullmatch(text) is not None


def is_key_id(text: str) -> bool:
    """Whether `text` has the form of a key id."""
    return _KEY_ID.fullmatch(text) is not None


def started_at(request: str) -> int:
    """The time inside an id, in milliseconds."""
    return int(request[4:16], 16)


def partition_of(request: str) -> int:
    """The partition inside an id."""
    return int(request[16:18], 16)
