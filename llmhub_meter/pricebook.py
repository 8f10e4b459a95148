"""The price table in force, shared by all processes through Redis."""

from . import keys
from .errors import ConfigError
from .pricing.sources import check_change
from .pricing.table import PriceTable
from .scripts import Scripts


class PriceBook:
    """One process's snapshot of the shared table; swapped whole, so that a request sees one version."""

    def __init__(self, scripts: Scripts, table: PriceTable) -> None:
        self._scripts = scripts
        self.table = table

    async def publish(self, table: PriceTable, *, force: bool = False) -> bool:
        """Puts a table in force for every process; False where it is in force already.

        Raises ConfigError for a price that changes more than 100 times up or down, unless forced.
        """
        stored = await self.stored()
        if stored is not None and stored.version == table.version:
            self.table = stored
            return False
        if stored is not None and not force and (faults := check_change(stored, table)):
            raise ConfigError([*faults, "`prices reload --force` takes it all the same"])
        await self._scripts.command("HSET", keys.PRICES, "table", table.to_json(), "version", table.version)
        self.table = table
        return True

    async def stored(self) -> PriceTable | None:
        """The table in force, if any was ever published."""
        text = await self._scripts.command("HGET", keys.PRICES, "table")
        return None if text is None else PriceTable.from_json(text)

    async def refresh(self) -> None:
        """Takes up a newer table, if there is one."""
        version = await self._scripts.command("HGET", keys.PRICES, "version")
        if version is not None and version != self.table.version:
            self.table = await self.stored() or self.table
