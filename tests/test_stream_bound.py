"""A thousand random streams on small balances: what is delivered never passes what is paid for."""

import random
from contextlib import aclosing
from typing import Any

from hub import DONE, MODELS, chunk

from llmhub_meter import Account, Meter
from llmhub_meter.archive.audit import audit
from llmhub_meter.dialects import find
from llmhub_meter.errors import InsufficientCredits
from llmhub_meter.meter import Payer
from llmhub_meter.streams import StreamRelay
from llmhub_meter.tokens import count_in_thread

WORDS = (" hello", " world", "ß", "漢字", " antidisestablishmentarianism", "\n\n", "0123456789", "🙂")


async def test_what_is_delivered_is_covered(redis_url: str) -> None:
    random_ = random.Random(7)
    async with aclosing(Meter(redis=redis_url, prices=MODELS)) as meter:
        await meter.start()
        ends = {"cut": 0, "ok": 0, "refused": 0}
        for number in range(1000):
            ends[await one_stream(meter, f"a{number}", random_)] += 1
        report = await audit(meter.scripts)
    assert report.differences == 0, report.findings
    assert min(ends["cut"], ends["ok"]) > 100, ends


async def one_stream(meter: Meter, name: str, random_: random.Random) -> str:
    """A stream of random words in random events and pieces, on a random balance."""
    account = Account(name)
    await meter.accounts.ensure(account)
    balance = random_.randrange(10_000, 2_000_000)
    # The signup grant is taken away again.
    await meter.wallet.credit(name, balance - meter.credits.signup_grant, "adjust", id="start")
    body: dict[str, Any] = {"model": "m-chat", "stream": True, "messages": [{"role": "user", "content": "x"}]}
    if random_.random() < 0.5:
        body["max_tokens"] = random_.randrange(1, 20_000)
    dialect = find("/v1/chat/completions")
    assert dialect is not None
    payer = Payer(account)
    try:
        metered = await meter.reserve(payer, meter.quote(dialect, body, payer), body_bytes=100)
    except InsufficientCredits:
        return "refused"
    texts = [
        "".join(random_.choices(WORDS, k=random_.randrange(1, 60))) for _ in range(random_.randrange(80))
    ]
    wire = b"".join(chunk(text) for text in texts) + DONE
    relay = StreamRelay(metered, comment=True)
    at = 0
    while at < len(wire) and relay.cut is None:
        size = random_.randrange(1, 4000)
        await relay.feed(wire[at : at + size])
        at += size
    end = "ok" if relay.cut is None else "cut"
    await relay.finish("ok" if relay.cut is None else "cut")
    delivered = relay.reader.output.pieces()
    tokens = sum([await count_in_thread(text, "m-chat") for text in delivered])
    figures = await meter.wallet.figures(name)
    assert figures is not None and figures.held == 0
    if end == "ok":
        assert "".join(delivered) == "".join(texts)
    # 8 prompt tokens at 30, output at 120 credits for 1,000, in ticks.
    assert relay.receipt is not None
    assert relay.receipt.used == 8 * 300 + tokens * 1200 or tokens == 0
    assert figures.balance == balance - relay.receipt.used
    assert figures.balance >= 0, (balance, tokens)
    return end
