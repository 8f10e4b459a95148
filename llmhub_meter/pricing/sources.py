"""Taking up a new price table: what has to be looked at before it replaces the old one."""

from collections.abc import Iterator

from ..config import PRICES, ModelConfig
from ..money import credits
from .table import PriceTable

MOST_TIMES = 100


def check_change(old: PriceTable, new: PriceTable) -> list[str]:
    """Prices that change more than 100 times up or down: mostly a wrong unit. Empty if there is none."""
    faults = []
    for name, model in new.written.items():
        before = dict(_prices(old.written[name])) if name in old.written else {}
        for (field, key), price in _prices(model):
            if fault := _fault(before.get((field, key)), price):
                where = f'{field} "{key}"' if key else field
                faults.append(f'[models."{name}"] {where}: {fault}{_unit(field)}')
    return faults


def _prices(model: ModelConfig) -> Iterator[tuple[tuple[str, str], int]]:
    """Each price that is written, by field and variant."""
    for field in PRICES:
        value = getattr(model, field)
        if isinstance(value, int):
            yield (field, ""), value
        elif value:
            yield from (((field, variant), price) for variant, price in value.items())


def _fault(before: int | None, price: int) -> str | None:
    # From or to 0 is a decision, not a slip of the unit, and has no ratio.
    if not before or not price:
        return None
    if price > before * MOST_TIMES:
        direction = "up"
    elif before > price * MOST_TIMES:
        direction = "down"
    else:
        return None
    return f"from {credits(before)} to {credits(price)} is more than {MOST_TIMES} times {direction}"


def _unit(field: str) -> str:
    unit = PRICES[field].replace("1K", "1,000")
    return f"; the unit is credits per {unit}"
