"""A changed price table: slips of the unit are caught before they cost anyone."""

from typing import Any

import pytest

from llmhub_meter.config import ModelConfig
from llmhub_meter.pricing import PriceTable, check_change


def table(**models: dict[str, Any]) -> PriceTable:
    return PriceTable.from_config({name: ModelConfig(**fields) for name, fields in models.items()})


def chat(input_per_1k: object = 30, output_per_1k: object = 120, **more: object) -> dict[str, Any]:
    return {"type": "chat", "input_per_1k": input_per_1k, "output_per_1k": output_per_1k, **more}


def test_a_price_per_million_is_caught() -> None:
    """Faults 39 and 40: the message names model, field, old, new and the unit."""
    assert check_change(table(m=chat(30)), table(m=chat(3_000_000))) == [
        '[models."m"] input_per_1k: from 30 to 3000000 is more than 100 times up; '
        "the unit is credits per 1,000 tokens"
    ]
    assert check_change(table(m=chat(30)), table(m=chat("0.2999"))) == [
        '[models."m"] input_per_1k: from 30 to 0.2999 is more than 100 times down; '
        "the unit is credits per 1,000 tokens"
    ]


@pytest.mark.parametrize("new", [30, "30.0001", 3000, "0.3", 0, 120])
def test_up_to_100_times_passes(new: object) -> None:
    assert check_change(table(m=chat(30)), table(m=chat(new))) == []


def test_just_above_100_times() -> None:
    assert len(check_change(table(m=chat(30)), table(m=chat("3000.0001")))) == 1


def test_from_and_to_nothing_is_a_decision() -> None:
    free = {"type": "chat", "free": True}
    assert check_change(table(m=chat(0, 1)), table(m=chat(10**6, 1))) == []
    assert check_change(table(m=chat()), table(m=free)) == []
    assert check_change(table(m=free), table(m=chat())) == []


def test_new_and_removed_models_pass() -> None:
    assert check_change(table(a=chat(1)), table(b=chat(10**6))) == []


def test_a_default_is_no_written_price() -> None:
    """A cached price that appears is new, not changed."""
    before, after = table(m=chat(30)), table(m=chat(30, cached_input_per_1k="0.1"))
    assert check_change(before, after) == [] and check_change(after, before) == []


def test_every_fault_is_named() -> None:
    old = table(
        a=chat(1, 1, cached_input_per_1k=1),
        b={"type": "image", "per_generation": 1, "per_generation_by": {"1024x1024/hd": 2, "1x1": 1}},
        c={"type": "audio", "per_minute": 1},
        d={"type": "audio", "per_1k_characters": 1},
        e={"type": "rerank", "per_request": 1},
    )
    new = table(
        a=chat(1, 200, cached_input_per_1k=200),
        b={"type": "image", "per_generation": 1, "per_generation_by": {"1024x1024/hd": 201, "2x2": 900}},
        c={"type": "audio", "per_minute": 101},
        d={"type": "audio", "per_1k_characters": "0.0099"},
        e={"type": "rerank", "per_request": 101},
    )
    assert check_change(old, new) == [
        '[models."a"] output_per_1k: from 1 to 200 is more than 100 times up; '
        "the unit is credits per 1,000 tokens",
        '[models."a"] cached_input_per_1k: from 1 to 200 is more than 100 times up; '
        "the unit is credits per 1,000 tokens",
        '[models."b"] per_generation_by "1024x1024/hd": from 2 to 201 is more than 100 times up; '
        "the unit is credits per generation",
        '[models."c"] per_minute: from 1 to 101 is more than 100 times up; the unit is credits per minute',
        '[models."d"] per_1k_characters: from 1 to 0.0099 is more than 100 times down; '
        "the unit is credits per 1,000 characters",
        '[models."e"] per_request: from 1 to 101 is more than 100 times up; the unit is credits per request',
    ]


def test_tables_may_be_empty() -> None:
    assert check_change(table(), table()) == []
