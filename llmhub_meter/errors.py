"""Every error the package raises, in one tree.

MeterError
├── ConfigError                    a config file or price table that can't be used
├── WalletError                    an operator's call that changes nothing
│   ├── AccountExists · UnknownAccount · UnknownKey · UnknownRequest
│   ├── OverCap                    a balance would pass the cap
│   └── IdConflict                 one id, two different amounts
└── ApiError                       answered to a client: status, type, code, param
    ├── InvalidRequest             400
    │   ├── UnsupportedParameter · UnsupportedState
    │   ├── BodyTooLarge           413
    │   ├── IdempotencyInProgress · IdempotencyReplay   409
    │   └── IdempotencyMismatch    422
    ├── InvalidApiKey              401
    ├── PermissionDenied           403
    ├── AccountRestricted          403
    ├── NotFound                   404
    │   └── ModelNotFound
    ├── InsufficientCredits        402
    │   └── CreditsHeld
    ├── BudgetExhausted            402
    ├── RateLimited                429
    ├── MeteringUnavailable        503
    └── UpstreamError              502
        ├── UpstreamAuthFailed     502
        └── UpstreamTimeout        504
"""

from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "AccountExists",
    "AccountRestricted",
    "ApiError",
    "BodyTooLarge",
    "BudgetExhausted",
    "ConfigError",
    "CreditsHeld",
    "IdConflict",
    "IdempotencyInProgress",
    "IdempotencyMismatch",
    "IdempotencyReplay",
    "InsufficientCredits",
    "InvalidApiKey",
    "InvalidRequest",
    "MeterError",
    "MeteringUnavailable",
    "ModelNotFound",
    "NotFound",
    "OverCap",
    "PermissionDenied",
    "RateLimited",
    "UnknownAccount",
    "UnknownKey",
    "UnknownRequest",
    "UnsupportedParameter",
    "UnsupportedState",
    "UpstreamAuthFailed",
    "UpstreamError",
    "UpstreamTimeout",
    "WalletError",
]


class MeterError(Exception):
    """The root of all errors of this package."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(MeterError):
    """A config file or price table that can't be used; `faults` lists each one with its place."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = list(faults)


class WalletError(MeterError):
    """An operator's call was refused and changed nothing."""


class AccountExists(WalletError):
    """The name is taken."""


class UnknownAccount(WalletError):
    """There is no such account."""


class UnknownKey(WalletError):
    """There is no such key."""


class UnknownRequest(WalletError):
    """There is no such request, or its record is gone."""


class OverCap(WalletError):
    """A balance would pass what an account can hold."""


class IdConflict(WalletError):
    """One id was used for two different amounts."""


class ApiError(MeterError):
    """An error that a client sees: an HTTP status and OpenAI's error object."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def body(self) -> dict[str, object]:
        """The error object without its envelope."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def headers(self) -> dict[str, str]:
        """Headers that belong to this error."""
        return {}


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class UnsupportedState(InvalidRequest):
    code = "unsupported_state"


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class IdempotencyInProgress(InvalidRequest):
    """The first request with this idempotency key is still running."""

    status = 409
    code = "idempotency_in_progress"

    def __init__(self, request: str) -> None:
        super().__init__(f"The request {request} with this Idempotency-Key is still running.")

    def headers(self) -> dict[str, str]:
        return {"retry-after": "1"}


class IdempotencyReplay(InvalidRequest):
    """The first request with this idempotency key was charged. Its answer is not kept."""

    status = 409
    code = "idempotency_replay"

    def __init__(self, request: str) -> None:
        super().__init__(
            f"The request {request} with this Idempotency-Key was charged already. This one was not sent; "
            "answers are not stored."
        )

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class IdempotencyMismatch(InvalidRequest):
    """One idempotency key came with two different requests."""

    status = 422
    code = "idempotency_mismatch"

    def __init__(self) -> None:
        super().__init__(
            "This Idempotency-Key was used with another body or path. Take a new key.",
            param="Idempotency-Key",
        )


class InvalidApiKey(ApiError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class PermissionDenied(ApiError):
    status = 403
    type = "permission_error"
    code = "permission_denied"


class AccountRestricted(ApiError):
    status = 403
    type = "permission_error"
    code = "account_restricted"


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class _PaymentRequired(ApiError):
    status = 402
    type = "insufficient_credits"

    def __init__(self, message: str, *, remaining: int = 0) -> None:
        super().__init__(message)
        self.remaining = remaining
        """What the account can spend, in ticks."""

    def body(self) -> dict[str, object]:
        return {"message": self.message, "type": self.type, "code": self.code}


class InsufficientCredits(_PaymentRequired):
    """The balance can't cover the request. The body is a promise of the product page, word for word."""

    code = "credits_exhausted"
    text = "Insufficient credits. Please add more credits to continue."

    def __init__(self, *, remaining: int = 0) -> None:
        super().__init__(self.text, remaining=remaining)


class CreditsHeld(InsufficientCredits):
    """The balance would cover it; the account's own running requests hold it."""

    code = "credits_held"
    text = "Your credits are held by your own requests that are still running. Try again when one has ended."

    def headers(self) -> dict[str, str]:
        return {"retry-after": "1", "x-should-retry": "true"}


class BudgetExhausted(_PaymentRequired):
    code = "budget_exhausted"


class RateLimited(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class MeteringUnavailable(ApiError):
    """Redis can't be reached or has lost its data: nothing is served unmetered."""

    status = 503
    type = "service_unavailable"
    code = "metering_unavailable"

    def __init__(
        self, message: str = "Metering is temporarily unavailable. Nothing was charged. Please retry."
    ) -> None:
        super().__init__(message)

    def headers(self) -> dict[str, str]:
        return {"retry-after": "1"}


class UpstreamError(ApiError):
    status = 502
    type = "upstream_error"
    code = "upstream_error"


class UpstreamAuthFailed(UpstreamError):
    code = "upstream_auth_failed"


class UpstreamTimeout(UpstreamError):
    status = 504
    code = "upstream_timeout"
