"""One SSE answer as it passes: event by event to the client, its use covered by the hold, its end settled."""

import asyncio
from typing import Literal

from . import sse
from .errors import ApiError, InsufficientCredits, MeteringUnavailable, UpstreamError
from .meter import Metered, Receipt
from .money import credits
from .tokens import count_in_thread

EXTEND_SECONDS = 5.0
"""How long the relay stops for an extension before it ends the stream."""

End = Literal["ok", "cut", "gone", "broken"]


class StreamRelay:
    """The account of one stream.

    `feed` gives back what the client may have at once. What waits for the final figures (`[DONE]`, and the
    usage chunk that the client asked for) comes with `finish`.
    """

    def __init__(self, metered: Metered, *, comment: bool) -> None:
        quote = metered.quote
        self.metered = metered
        self.reader = quote.dialect.reader(quote.ask)
        self.cut: ApiError | None = None
        """Why the stream has to end here, when it has to."""
        self.receipt: Receipt | None = None
        """The final figures, once it is settled."""
        self._comment = comment
        self._splitter = sse.EventSplitter()
        self._usage_event = b""
        self._done_event = b""
        self._counted = 0
        self._asked_at = -1
        self._next_check = metered.granted // 2
        self._covers_itself = metered.free or not metered.terms.rate or quote.model.hidden_output

    @property
    def waits(self) -> bool:
        """Whether an event is held back for the final figures."""
        return bool(self._usage_event or self._done_event)

    @property
    def done(self) -> bool:
        """Whether `[DONE]` has come."""
        return bool(self._done_event)

    async def feed(self, data: bytes) -> bytes:
        """The events of `data` that may go on now; sets `cut` where one may not."""
        passed: list[bytes] = []
        for event in self._splitter.feed(data):
            await self._take(event, passed)
            if self.cut is not None:
                break
        return b"".join(passed)

    def let_go(self) -> bytes:
        """The usage chunk, unpatched: the stream goes on after it, or takes too long to end."""
        event, self._usage_event = self._usage_event, b""
        return event

    async def finish(self, how: End) -> bytes:
        """Settles the request and gives the last bytes for the client."""
        passed: list[bytes] = []
        if how == "ok" and (rest := self._splitter.rest()):
            # An event without its blank line gets one, so that ours begin on a border.
            await self._take(rest + b"\n\n", passed)
        if how == "ok" and self.cut is not None:
            how = "cut"
        receipt = self.receipt = await self._settle(how)
        if how == "ok" and not self.reader.readable and not self.reader.failed:
            self.cut = UpstreamError("The upstream's stream could not be read. Nothing was charged.")
        fields = _fields(receipt)
        if self._usage_event:
            passed.append(sse.add_to_usage(self._usage_event, fields))
        dialect = self.metered.quote.dialect
        if self.cut is not None:
            passed.append(dialect.error_event(self.cut))
        if self._comment:
            words = " ".join(f"{name.removeprefix('credits_')}={value}" for name, value in fields.items())
            passed.append(sse.comment(f"credits {words}"))
        passed.append(dialect.end_event if self.cut is not None else self._done_event)
        return b"".join(passed)

    async def _take(self, event: bytes, passed: list[bytes]) -> None:
        known = len(self.reader.output.fresh)
        kind = self.reader.read(event)
        if kind == "done":
            self._done_event = event
            return
        if kind == "usage":
            if self.metered.quote.ask.wants_usage:
                passed.append(self.let_go())
                self._usage_event = event
            return
        try:
            if not await self._covered(known):
                self.cut = InsufficientCredits()
                return
        except (MeteringUnavailable, TimeoutError):
            self.reader.output.take_back(len(self.reader.output.fresh) - known)
            self.cut = MeteringUnavailable()
            return
        if self._usage_event and (isinstance(event, sse.Piece) or sse.data_of(event) is not None):
            passed.append(self.let_go())
        passed.append(event)

    async def _covered(self, known: int) -> bool:
        """Whether the hold covers what was read, extended ahead of use while the balance lasts.

        Bytes of new text bound its tokens from above; only where that bound comes near the hold are they
        counted. The texts after the first `known` of the fresh ones are those of the event in question.
        """
        output, metered = self.reader.output, self.metered
        if self._covers_itself or self._counted + output.fresh_bytes <= self._next_check:
            return True
        text = "".join(text for _, text in output.fresh)
        counted = self._counted + await count_in_thread(text, metered.quote.model.name)
        piece = metered.meter.reserve_rules.slice_tokens * metered.quote.ask.choices
        most = metered.sent_maximum
        ahead = most is None or metered.granted < most
        if ahead and metered.granted - counted <= piece // 2 and self._asked_at != metered.granted:
            self._asked_at = metered.granted
            await self._extend(
                metered.granted + piece if most is None else min(metered.granted + piece, most)
            )
        if counted > metered.granted:
            await self._extend(counted + piece)
            if counted > metered.granted:
                output.take_back(len(output.fresh) - known)
                return False
        self._counted = counted
        output.fresh.clear()
        output.fresh_bytes = 0
        self._next_check = counted + (metered.granted - counted) // 2
        return True

    async def _extend(self, units: int) -> None:
        async with asyncio.timeout(EXTEND_SECONDS):
            await self.metered.extend(units)

    async def _settle(self, how: End) -> Receipt:
        metered, reader = self.metered, self.reader
        facts = {} if how == "ok" else {"end": how}
        nothing = reader.reported is None and not reader.output.seen
        # An upstream that failed before any output is not paid for its input.
        failed = (reader.failed or how == "broken") and not (reader.failure_reported or reader.wrote)
        # A client that left has used the input all the same; an upstream that gave nothing has not answered.
        if (nothing or failed) and how in ("ok", "broken"):
            return await metered.release(**facts)
        usage = await metered.meter.usage(
            metered.quote, reader.reported, lambda: reader.output, sent=metered.sent_maximum
        )
        usage = metered.quote.dialect.measure_stream(usage, metered.quote.ask, reader.output)
        return await metered.settle(usage, model=reader.model, **facts)


def _fields(receipt: Receipt) -> dict[str, str]:
    fields = {"credits_used": credits(receipt.used)}
    if receipt.figures is not None:
        fields["credits_remaining"] = credits(receipt.figures.remaining)
    return fields
