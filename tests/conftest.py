from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing

import pytest
from servers import connect, valkey

from llmhub_meter import scripts as redis_seam
from llmhub_meter.archive.audit import audit
from llmhub_meter.scripts import Scripts


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The url of this test process's own server."""
    with valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def redis_url(valkey_server: str) -> str:
    """The url of an empty server."""
    with closing(connect(valkey_server)) as client:
        client.flushall()
        client.script_flush()
    return valkey_server


@pytest.fixture
async def scripts(redis_url: str) -> AsyncIterator[Scripts]:
    """The scripts on an empty server."""
    async with aclosing(Scripts(redis_seam.connect(redis_url))) as scripts:
        yield scripts


@pytest.fixture
async def audited(scripts: Scripts) -> AsyncIterator[Scripts]:
    """The scripts on an empty server, whose books must agree when the test has ended."""
    yield scripts
    assert (await audit(scripts)).findings == []
