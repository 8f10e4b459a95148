from collections.abc import Iterator
from contextlib import closing

import pytest
from servers import connect, valkey


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
