"""Finding a model and pricing a usage: exact, whatever the parts."""

import json
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmhub_meter.config import ModelConfig
from llmhub_meter.errors import ConfigError
from llmhub_meter.money import credits
from llmhub_meter.pricing import Model, PriceTable
from llmhub_meter.types import Charge, ChargeLine, Usage


def model(**fields: Any) -> Model:
    return Model.from_config("m", ModelConfig(**fields))


def table(models: Mapping[str, Mapping[str, Any]], default_upstream: str | None = None) -> PriceTable:
    configs = {name: ModelConfig(**fields) for name, fields in models.items()}
    return PriceTable.from_config(configs, default_upstream)


CHAT = {"type": "chat", "input_per_1k": 30, "output_per_1k": 120}
CARD: dict[str, dict[str, Any]] = {
    "m-chat": CHAT
    | {"cached_input_per_1k": 3, "cache_write_per_1k": Decimal("37.5"), "max_output_tokens": 16_384},
    "m-pro": {
        "type": "chat",
        "input_per_1k": 300,
        "output_per_1k": 1500,
        "cached_input_per_1k": 30,
        "cache_write_per_1k": 375,
        "max_output_tokens": 64_000,
    },
    "m-nocache": CHAT,
    "m-free": {"type": "chat", "input_per_1k": 0, "output_per_1k": 0},
    "m-embed": {"type": "embedding", "input_per_1k": 2},
    "m-img": {
        "type": "image",
        "per_generation": 4000,
        "per_generation_by": {"1024x1024/hd": 8000, "1792x1024": 6000},
    },
    "m-imgtok": {"type": "image", "input_per_1k": 500, "image_input_per_1k": 800, "output_per_1k": 3000},
    "m-minute": {"type": "audio", "per_minute": 600},
    "m-listen": {
        "type": "audio",
        "input_per_1k": 1000,
        "audio_input_per_1k": 4000,
        "output_per_1k": 1000,
    },
    "m-speech": {"type": "audio", "per_1k_characters": Decimal("1.5")},
    "m-rerank": {"type": "rerank", "per_request": 200},
}
TABLE = table(CARD)


@pytest.mark.parametrize(
    ("name", "usage", "expected"),
    [
        pytest.param("m-chat", Usage(1000, 1000), "150", id="39: the unit is 1,000 tokens"),
        pytest.param("m-chat", Usage(10, 10), "1.5", id="41: tokens times price over 1,000"),
        pytest.param("m-pro-2026-09-30", Usage(1000, 200), "600", id="45: a dated name"),
        pytest.param("m-chat", Usage(10, 1), "0.42", id="50: two parts"),
        pytest.param("m-chat", Usage(1, 0), "0.03", id="52: one token"),
        pytest.param("m-chat", Usage(2006, 300, cached_tokens=1920), "44.34", id="79: cached"),
        pytest.param("m-pro", Usage(12307, 550, cache_write_tokens=12304), "5439.9", id="80: cache write"),
        pytest.param("m-nocache", Usage(2006, 300, cached_tokens=1920), "96.18", id="83: no cached price"),
        pytest.param("m-chat", Usage(30000, 200, cached_tokens=27136), "191.328", id="85: cached"),
        pytest.param("m-pro", Usage(7206, 878, cached_tokens=3604), "2505.72", id="86: cached outside input"),
        pytest.param("m-pro", Usage(20, 15), "28.5", id="87: last word"),
        pytest.param("m-chat", Usage(64, 135, reasoning_tokens=78), "18.12", id="88: reasoning inside"),
        pytest.param("m-chat", Usage(1000, 500), "90", id="91: plain"),
        pytest.param("m-chat", Usage(6179, 222), "212.01", id="92: last usage"),
        pytest.param("m-chat", Usage(1000, 1500), "210", id="98: n = 3"),
        pytest.param("m-chat", Usage(1000, 12), "31.44", id="99: prompt counted"),
        pytest.param("m-free", Usage(900, 4000), "0", id="23: free"),
        pytest.param("m-embed", Usage(3000), "6", id="108: embedding"),
        pytest.param("m-embed", Usage(3), "0.006", id="110: three tokens"),
        pytest.param("m-imgtok", Usage(150, 8000), "24075", id="111: image output tokens"),
        pytest.param("m-imgtok", Usage(150, 0, image_prompt_tokens=100), "105", id="111: image input tokens"),
        pytest.param(
            "m-img", Usage(images=2, size="1024x1024", quality="hd"), "16000", id="113: size and quality"
        ),
        pytest.param("m-img", Usage(images=2, size="1024x1024"), "8000", id="113: standard"),
        pytest.param("m-img", Usage(images=1, size="1792x1024", quality="hd"), "6000", id="113: size alone"),
        pytest.param("m-img", Usage(images=1), "4000", id="113: neither"),
        pytest.param("m-img", Usage(images=1, quality="hd"), "4000", id="113: no size"),
        pytest.param("m-img", Usage(50, 4000, images=0, size="1024x1024"), "0", id="114: no image came"),
        pytest.param("m-chat", Usage(1400, 50), "48", id="115: an image in the prompt"),
        pytest.param("m-minute", Usage(seconds=13), "130", id="117: seconds"),
        pytest.param("m-minute", Usage(seconds=Fraction("0.01")), "0.1", id="117: a part of a second"),
        pytest.param("m-listen", Usage(14, 45, audio_prompt_tokens=14), "101", id="117: audio tokens"),
        pytest.param("m-speech", Usage(characters=1001), "1.5015", id="characters"),
        pytest.param("m-rerank", Usage(12345), "200", id="a request"),
    ],
)
def test_public_faults(name: str, usage: Usage, expected: str) -> None:
    found = TABLE.find(name)
    assert found is not None
    assert credits(found.charge(usage).amount) == expected


class TestCharge:
    def test_no_drift(self) -> None:
        """10,000 requests of one token: fault 52."""
        model = TABLE.models["m-chat"]
        assert credits(sum(model.charge(Usage(1)).amount for _ in range(10_000))) == "300"

    def test_lines_say_how_the_sum_came_about(self) -> None:
        usage = Usage(2006, 135, cached_tokens=1920, reasoning_tokens=78)
        assert TABLE.models["m-chat"].charge(usage) == Charge(
            245_400,
            (
                ChargeLine("cached_input", 1920, 30_000, 1000),
                ChargeLine("input", 86, 300_000, 1000),
                ChargeLine("reasoning", 78, 1_200_000, 1000),
                ChargeLine("output", 57, 1_200_000, 1000),
            ),
        )

    @pytest.mark.parametrize(
        ("name", "usage", "line"),
        [
            ("m-img", Usage(images=2, size="1024x1024", quality="hd"), ("images", 2, 80_000_000, 1)),
            ("m-minute", Usage(seconds=Fraction(7, 3)), ("seconds", Fraction(7, 3), 6_000_000, 60)),
            ("m-speech", Usage(characters=5), ("characters", 5, 15_000, 1000)),
            ("m-rerank", Usage(5), ("request", 1, 2_000_000, 1)),
        ],
    )
    def test_lines_of_other_units(self, name: str, usage: Usage, line: tuple[Any, ...]) -> None:
        assert TABLE.models[name].charge(usage).lines == (ChargeLine(*line),)

    def test_free_has_no_lines(self) -> None:
        free = model(type="chat", free=True)
        assert free.charge(Usage(5, 5, images=3, seconds=9, characters=7)) == Charge(0, ())

    @pytest.mark.parametrize(
        ("tokens", "price", "amount"),
        [
            (1, "0.0004", 0),
            (1, "0.0499", 0),
            (1, "0.05", 1),
            (1, "0.0500", 1),
            (3, "0.05", 2),
            (1, "0.15", 2),
        ],
    )
    def test_half_a_tick_is_rounded_up(self, tokens: int, price: str, amount: int) -> None:
        assert model(type="embedding", input_per_1k=price).charge(Usage(tokens)).amount == amount

    def test_rounded_once(self) -> None:
        """0.4 + 0.4 of a tick is a tick; each alone would be none."""
        both = model(type="chat", input_per_1k="0.04", output_per_1k="0.04")
        assert both.charge(Usage(1, 1)).amount == 1

    def test_the_flat_part_is_added_once(self) -> None:
        chat = model(**CHAT, per_request="2.5")
        assert credits(chat.charge(Usage(1000, 0, cached_tokens=10)).amount) == "32.5"
        minute = model(type="audio", per_minute=60, per_request=1)
        assert credits(minute.charge(Usage(seconds=1)).amount) == "2"
        assert credits(minute.charge(Usage()).amount) == "1"

    @pytest.mark.parametrize(
        ("usage", "kinds"),
        [
            (Usage(100, cached_tokens=70, cache_write_tokens=70), {"cached_input": 70, "cache_write": 30}),
            (
                Usage(100, cached_tokens=40, audio_prompt_tokens=90, image_prompt_tokens=90),
                {"cached_input": 40, "audio_input": 60},
            ),
            (
                Usage(100, cache_write_tokens=10, audio_prompt_tokens=20, image_prompt_tokens=90),
                {"cache_write": 10, "audio_input": 20, "image_input": 70},
            ),
            (Usage(100, cached_tokens=500), {"cached_input": 100}),
            (Usage(0, cached_tokens=500), {}),
            (Usage(100, cached_tokens=-5), {"input": 100}),
            (Usage(-100, -100, cached_tokens=5, reasoning_tokens=5), {}),
            (
                Usage(0, 100, reasoning_tokens=80, audio_completion_tokens=80),
                {"reasoning": 80, "audio_output": 20},
            ),
            (Usage(0, 100, reasoning_tokens=-80), {"output": 100}),
            (Usage(images=-1, seconds=-1, characters=-1), {}),
        ],
    )
    def test_details_stay_inside_their_total(self, usage: Usage, kinds: dict[str, int]) -> None:
        charge = TABLE.models["m-chat"].charge(usage)
        assert {line.kind: line.quantity for line in charge.lines} == kinds
        assert charge.amount >= 0

    def test_a_detail_without_price_costs_what_its_total_costs(self) -> None:
        plain = model(**CHAT)
        details = Usage(
            100,
            100,
            cached_tokens=10,
            cache_write_tokens=20,
            audio_prompt_tokens=30,
            image_prompt_tokens=5,
            reasoning_tokens=7,
            audio_completion_tokens=11,
        )
        assert plain.charge(details).amount == plain.charge(Usage(100, 100)).amount

    def test_a_detail_of_price_0_is_free(self) -> None:
        """0 is a price: it is not the default."""
        cached = model(**CHAT, cached_input_per_1k=0, reasoning_per_1k=0)
        assert cached.charge(Usage(10, 10, cached_tokens=10, reasoning_tokens=10)).amount == 0
        assert not cached.free

    @pytest.mark.parametrize(
        ("size", "quality", "price"),
        [
            ("1024X1024", "HD", "8000"),
            (" 1024x1024 ", "hd ", "8000"),
            ("1024x1024", "standard", "4000"),
            ("1792x1024", None, "6000"),
            ("512x512", "hd", "4000"),
            (None, None, "4000"),
        ],
    )
    def test_variants_in_any_spelling(self, size: str | None, quality: str | None, price: str) -> None:
        assert credits(TABLE.models["m-img"].variant(size, quality)) == price

    def test_which_units_are_priced(self) -> None:
        assert TABLE.models["m-chat"].has_price_for("1K tokens")
        assert not TABLE.models["m-minute"].has_price_for("1K tokens")
        assert not TABLE.models["m-img"].has_price_for("1K characters")
        assert TABLE.models["m-rerank"].has_price_for("1K tokens")
        assert model(type="chat", free=True).has_price_for("minute")


ticks = st.integers(0, 10**9) | st.integers(0, 3)
counts = st.integers(0, 200) | st.integers(0, 10**9)


@st.composite
def token_models(draw: st.DrawFn) -> Model:
    required = {"input_per_1k", "output_per_1k"}
    optional = {
        "cached_input_per_1k",
        "cache_write_per_1k",
        "reasoning_per_1k",
        "audio_input_per_1k",
        "audio_output_per_1k",
        "image_input_per_1k",
        "per_request",
    }
    names = required | draw(st.sets(st.sampled_from(sorted(optional))))
    return model(type="chat", **{name: credits(draw(ticks)) for name in sorted(names)})


usages = st.builds(
    Usage,
    prompt_tokens=counts,
    completion_tokens=counts,
    cached_tokens=counts,
    cache_write_tokens=counts,
    audio_prompt_tokens=counts,
    image_prompt_tokens=counts,
    reasoning_tokens=counts,
    audio_completion_tokens=counts,
)


def half_up(exact: Fraction) -> int:
    return int(exact + Fraction(1, 2))


def spend(total: int, details: list[tuple[int, int]], price: int) -> Fraction:
    """The naive way: each detail in turn takes from what is left, the rest costs the plain price."""
    exact, left = Fraction(), total
    for wanted, detail_price in details:
        taken = min(wanted, left)
        exact += Fraction(taken * detail_price, 1000)
        left -= taken
    return exact + Fraction(left * price, 1000)


@given(token_models(), usages)
def test_tokens_are_exact(priced: Model, usage: Usage) -> None:
    exact = priced.per_request + spend(
        usage.prompt_tokens,
        [
            (usage.cached_tokens, priced.cached_input_per_1k),
            (usage.cache_write_tokens, priced.cache_write_per_1k),
            (usage.audio_prompt_tokens, priced.audio_input_per_1k),
            (usage.image_prompt_tokens, priced.image_input_per_1k),
        ],
        priced.input_per_1k,
    )
    exact += spend(
        usage.completion_tokens,
        [
            (usage.reasoning_tokens, priced.reasoning_per_1k),
            (usage.audio_completion_tokens, priced.audio_output_per_1k),
        ],
        priced.output_per_1k,
    )
    charge = priced.charge(usage)
    assert charge.amount == half_up(exact)
    lines = sum((Fraction(line.quantity) * line.price / line.per for line in charge.lines), Fraction())
    assert lines == exact


@given(ticks, ticks, st.fractions(0, 10**6))
def test_seconds_are_exact(price: int, flat: int, seconds: Fraction) -> None:
    priced = model(type="audio", per_minute=credits(price), per_request=credits(flat))
    assert priced.charge(Usage(seconds=seconds)).amount == half_up(seconds * price / 60 + flat)


@given(ticks, st.integers(0, 10**7))
def test_characters_are_exact(price: int, characters: int) -> None:
    priced = model(type="audio", per_1k_characters=credits(price))
    assert priced.charge(Usage(characters=characters)).amount == half_up(Fraction(price * characters, 1000))


@given(ticks, ticks, st.integers(0, 20), st.sampled_from([None, "1024x1024", "2x2"]))
def test_images_are_exact(plain: int, special: int, images: int, size: str | None) -> None:
    priced = model(
        type="image", per_generation=credits(plain), per_generation_by={"1024x1024": credits(special)}
    )
    expected = images * (special if size == "1024x1024" else plain)
    assert priced.charge(Usage(images=images, size=size)).amount == expected


class TestFind:
    TABLE = table(
        {
            "gpt-4o": CHAT | {"aliases": ["chatgpt-latest", "gpt-4o-mini-2024-07-18"]},
            "gpt-4o-2024-05-13": CHAT,
            "gpt-4o-mini": CHAT | {"aliases": ["mini"]},
            "gpt-4": CHAT,
        }
    )

    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("gpt-4o", "gpt-4o"),
            ("chatgpt-latest", "gpt-4o"),
            ("gpt-4o-2024-05-13", "gpt-4o-2024-05-13"),
            ("gpt-4o-2024-08-06", "gpt-4o"),
            ("gpt-4o-20240806", "gpt-4o"),
            ("gpt-4-0613", "gpt-4"),
            ("gpt-4o-mini-2024-07-18", "gpt-4o"),
            ("gpt-4o-mini-2024-07-19", "gpt-4o-mini"),
            ("mini-2025-01-31", "gpt-4o-mini"),
            ("chatgpt-latest-1231", "gpt-4o"),
            ("GPT-4o", None),
            ("gpt-4o ", None),
            ("gpt-4o-2024-13-01", None),
            ("gpt-4o-2024-08-32", None),
            ("gpt-4o-2024-8-6", None),
            ("gpt-4o-1301", None),
            ("gpt-4o-2048", None),
            ("gpt-4o-99991231", None),
            ("gpt-4o-0613-0613", None),
            ("gpt-4o-2024-08-06\n", None),
            ("gpt-4o-٠٦١٣", None),
            ("gpt-4o2024-08-06", None),
            ("-0613", None),
            ("", None),
            ("m-new-preview", None),
        ],
    )
    def test_names(self, name: str, found: str | None) -> None:
        model = self.TABLE.find(name)
        assert (model.name if model else None) == found

    def test_aliases_must_be_clear(self) -> None:
        with pytest.raises(ConfigError, match="is an alias of"):
            table({"a": CHAT | {"aliases": ["x"]}, "b": CHAT | {"aliases": ["x"]}})


class TestJson:
    def test_round_trip(self) -> None:
        again = PriceTable.from_json(TABLE.to_json())
        assert again.version == TABLE.version
        assert again.models == TABLE.models
        assert list(again.models) == list(TABLE.models)
        assert again.to_json() == TABLE.to_json()
        assert again.public() == TABLE.public()

    @given(st.dictionaries(st.text("abcé0-.", min_size=1, max_size=9), ticks, max_size=5))
    def test_any_table_round_trips(self, prices: dict[str, int]) -> None:
        before = table(
            {name: {"type": "rerank", "input_per_1k": credits(price)} for name, price in prices.items()}
        )
        after = PriceTable.from_json(before.to_json().encode())
        assert (after.version, after.models) == (before.version, before.models)
        assert [model.input_per_1k for model in after.models.values()] == list(prices.values())

    def test_version_is_short_hex(self) -> None:
        assert len(TABLE.version) == 12 and int(TABLE.version, 16) >= 0

    def test_version_follows_the_prices_not_their_order(self) -> None:
        a, b = {"a": CHAT}, {"b": CHAT}
        assert table(a | b).version == table(b | a).version
        assert table(a).version != table({"a": CHAT | {"output_per_1k": "120.0001"}}).version
        assert table(a).version == table({"a": CHAT | {"output_per_1k": "120.000"}}).version

    def test_upstreams_are_filled_in(self) -> None:
        prices = table({"a": CHAT, "b": CHAT | {"upstream": "other", "upstream_model": "b2"}}, "openai")
        again = PriceTable.from_json(prices.to_json())
        assert [(m.upstream, m.upstream_model) for m in again.models.values()] == [
            ("openai", None),
            ("other", "b2"),
        ]

    def test_prices_are_decimal_strings(self) -> None:
        stored = json.loads(TABLE.to_json())["models"]["m-chat"]
        assert stored["cache_write_per_1k"] == "37.5" and stored["input_per_1k"] == "30"

    def test_numbers_are_read_as_decimals(self) -> None:
        read = PriceTable.from_json('{"models": {"m": {"type": "rerank", "input_per_1k": 0.0003}}}')
        assert read.models["m"].input_per_1k == 3

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ("", "stored prices: is not JSON"),
            (b"\xff", "stored prices: is not JSON"),
            ("[" * 100_000, "stored prices: is not JSON"),
            ("[]", "stored prices: must be an object with the key models"),
            ('{"models": {}, "more": 1}', "stored prices: must be an object with the key models"),
            ('{"models": []}', "stored prices: [models]: must be a table"),
            ('{"models": {"m": []}}', 'stored prices: [models."m"]: must be a table'),
            (
                '{"models": {"m": {"type": "rerank", "input_per_1k": NaN}}}',
                'stored prices: [models."m"] input_per_1k: NaN is not a finite number of credits',
            ),
            (
                '{"models": {"m": {"type": "rerank", "input_per_1k": -1}}}',
                'stored prices: [models."m"] input_per_1k: is negative (-1)',
            ),
            (
                '{"models": {"m": {"type": "rerank", "input_per_1k": true}}}',
                'stored prices: [models."m"] input_per_1k: must be a decimal number of credits',
            ),
        ],
    )
    def test_a_broken_value_is_refused(self, text: str | bytes, fault: str) -> None:
        with pytest.raises(ConfigError) as caught:
            PriceTable.from_json(text)
        assert caught.value.faults == [fault]

    def test_a_snapshot_does_not_change(self) -> None:
        with pytest.raises(TypeError):
            TABLE.models["new"] = TABLE.models["m-chat"]  # type: ignore[index]
        with pytest.raises(TypeError):
            TABLE.models["m-img"].per_generation_by["x"] = 1  # type: ignore[index]


class TestPublic:
    def entry(self, **fields: Any) -> dict[str, Any]:
        (entry,) = table({"m": fields}).public()
        return entry

    def test_an_entry(self) -> None:
        assert self.entry(
            type="chat",
            input_per_1k=14,
            output_per_1k=56,
            cached_input_per_1k=7,
            per_request=0,
            max_output_tokens=16384,
            context_window=128000,
        ) == {
            "id": "m",
            "object": "model",
            "created": 0,
            "owned_by": "llmhub",
            "type": "chat",
            "free_tier": False,
            "context_window": 128000,
            "max_output_tokens": 16384,
            "pricing": {
                "currency": "EUR",
                "unit": "1K tokens",
                "credits": {"input": "14", "output": "56", "cached_input": "7"},
                "eur": {"input": "0.00014", "output": "0.00056", "cached_input": "0.00007"},
            },
        }

    @pytest.mark.parametrize(
        ("fields", "unit", "shown"),
        [
            ({"type": "embedding", "input_per_1k": "1.9"}, "1K tokens", {"input": "1.9"}),
            (CARD["m-imgtok"], "1K tokens", {"input": "500", "output": "3000", "image_input": "800"}),
            (
                CARD["m-img"],
                "generation",
                {"generation": "4000", "by": {"1024x1024/hd": "8000", "1792x1024": "6000"}},
            ),
            ({"type": "image", "per_generation": 5}, "generation", {"generation": "5"}),
            ({"type": "audio", "per_minute": 550}, "minute", {"minute": "550"}),
            ({"type": "audio", "per_1k_characters": "1.5"}, "1K characters", {"characters": "1.5"}),
            ({"type": "rerank", "per_request": 200}, "request", {"request": "200"}),
            (
                {"type": "audio", "per_minute": 550, "per_request": 2},
                "minute",
                {"minute": "550", "request": "2"},
            ),
            (CHAT | {"per_request": 1}, "1K tokens", {"input": "30", "output": "120", "request": "1"}),
            ({"type": "chat", "free": True}, "1K tokens", {"input": "0", "output": "0"}),
            ({"type": "embedding", "free": True}, "1K tokens", {"input": "0"}),
            ({"type": "image", "free": True}, "generation", {"generation": "0"}),
            ({"type": "audio", "free": True}, "minute", {"minute": "0"}),
        ],
    )
    def test_units(self, fields: dict[str, Any], unit: str, shown: dict[str, Any]) -> None:
        entry = self.entry(**fields)
        assert entry["pricing"]["unit"] == unit
        assert entry["pricing"]["credits"] == shown
        assert entry["free_tier"] is bool(fields.get("free"))

    def test_euros(self) -> None:
        eur = self.entry(**CARD["m-img"])["pricing"]["eur"]
        assert eur == {"generation": "0.04", "by": {"1024x1024/hd": "0.08", "1792x1024": "0.06"}}

    def test_a_model_whose_prices_are_0_is_free(self) -> None:
        """Used at any balance: fault 23."""
        free = TABLE.models["m-free"]
        assert free.free
        assert self.entry(**CARD["m-free"])["free_tier"] is True
        assert not model(type="image", per_generation=0, per_generation_by={"1x1": 5}).free
