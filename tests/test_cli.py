"""The commands: what they print, what they change, and how they fail."""

import asyncio
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
from commands import free_port, run, start
from servers import connect as connect_sync
from servers import serve_app

from llmhub_meter import __version__, keys
from llmhub_meter.cli import main
from llmhub_meter.demo import create_upstream
from llmhub_meter.errors import UpstreamError
from llmhub_meter.money import ticks
from llmhub_meter.scripts import Scripts, connect
from llmhub_meter.serving import BrokenAnswers
from llmhub_meter.upstream import UpstreamBroken
from llmhub_meter.wallet import Terms, Wallet

MODELS = """
[models.m]
type = "chat"
input_per_1k = 14
output_per_1k = 56
max_output_tokens = 1000
[models.e]
type = "embedding"
input_per_1k = 1.9
[models.img]
type = "image"
per_generation = 3700
[models.whisper]
type = "audio"
per_minute = 550
"""


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1, "not one object"
        return json.loads(self.out)

    def refuses(self, *words: str) -> None:
        """Exit code 2 and one line that has these words."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.count("\n") == 1 and self.err.startswith("llmhub-meter: "), self.err
        for word in words:
            assert word in self.err, self.err


class Cli(Protocol):
    def __call__(self, *words: str) -> Answer: ...


@pytest.fixture
def cli(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """Commands in this process, in an empty folder, on an empty Redis."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMHUB_METER__REDIS__URL", redis_url)

    def command(*words: str) -> Answer:
        code = main(words)
        return Answer(code, *capsys.readouterr())

    return command


def on(redis_url: str, work: Callable[[Wallet], Awaitable[Any]]) -> Any:
    async def with_redis() -> Any:
        scripts = Scripts(connect(redis_url))
        try:
            return await work(Wallet(scripts))
        finally:
            await scripts.aclose()

    return asyncio.run(with_redis())


def charge(redis_url: str, account: str, credits: str) -> str:
    """A request of the account that was charged so much."""
    request = keys.new_request_id(account)

    async def work(wallet: Wallet) -> None:
        await wallet.reserve(request, account, Terms("m", fixed=ticks("10")))
        await wallet.settle(request, account, ticks(credits), {})

    on(redis_url, work)
    return request


def test_accounts(cli: Cli) -> None:
    made = cli("accounts", "create", "alice", "--email", "a@example.org", "--json").json
    assert made["id"].startswith("acct_") and made["balance"] == "100000" == made["free_grant"]
    assert cli("accounts", "show", "alice", "--json").json == made
    assert cli("accounts", "show", made["id"], "--json").json == made
    assert list(made) == [
        "id",
        "name",
        "email",
        "status",
        "balance",
        "held",
        "available",
        "free_grant",
        "created_at",
    ]
    cli("accounts", "create", "alice", "--email", "other@example.org").refuses("'alice' already")
    assert cli("accounts", "show", "alice", "--json").json == made

    changed = cli("accounts", "set", "alice", "status=suspended", "email=b@example.org", "--json").json
    assert changed == {**made, "status": "suspended", "email": "b@example.org"}
    cli("accounts", "set", "alice", "status=asleep").refuses("asleep")
    cli("accounts", "set", "alice", "status").refuses("KEY=VALUE")
    cli("accounts", "set", "alice", "balance=5").refuses("can't be set")
    cli("accounts", "show", "bob").refuses("no account 'bob'")

    cli("accounts", "create", "bob")
    assert [each["name"] for each in cli("accounts", "list", "--json").json["data"]] == ["alice", "bob"]
    head, *rows = cli("accounts", "list").out.splitlines()
    assert head.split()[:4] == ["name", "id", "status", "balance"] and len(rows) == 2
    assert rows[0].split()[:4] == ["alice", made["id"], "suspended", "100000"]
    assert re.search(r"^email +b@example.org$", cli("accounts", "show", "alice").out, re.MULTILINE)


def test_keys(cli: Cli) -> None:
    account = cli("accounts", "create", "alice", "--json").json["id"]
    issued = cli("keys", "create", "alice", "--name", "laptop", "--json").json
    assert re.fullmatch(r"llmhub_sk_[A-Za-z0-9_-]{43}", issued["key"])
    assert (issued["account"], issued["name"], issued["revoked_at"]) == (account, "laptop", None)
    assert re.match(r"llmhub_sk_\S{43}\n", cli("keys", "create", "alice").out)

    listed = cli("keys", "list", "alice", "--json")
    assert issued["key"] not in listed.out and len(listed.json["data"]) == 2
    assert issued["id"] in [key["id"] for key in listed.json["data"]]
    assert cli("keys", "revoke", issued["id"], "--json").json["revoked_at"] is not None
    assert [key["revoked_at"] is None for key in cli("keys", "list", "alice", "--json").json["data"]].count(
        True
    ) == 1
    cli("keys", "revoke", "key_nope").refuses("no key 'key_nope'")
    cli("keys", "create", "bob").refuses("no account 'bob'")


def test_grants_and_adjustments(cli: Cli, redis_url: str) -> None:
    account = cli("accounts", "create", "alice", "--json").json["id"]
    assert cli("credits", "grant", "alice", "50.5", "--json").json["balance"] == "100050.5"
    assert cli("credits", "grant", "alice", "50.5", "--json").json["balance"] == "100101"
    for _ in range(2):
        assert cli("credits", "grant", "alice", "1", "--id", "promo-1", "--json").json["balance"] == "100102"
    cli("credits", "grant", "alice", "2", "--id", "promo-1").refuses("promo-1", "another amount")
    for amount in ("0", "-5", "1.23456", "lots", "1e99", "NaN", "0x10"):
        cli("credits", "grant", "alice", amount).refuses()

    balances = [
        cli("credits", "adjust", *words, "--json").json["balance"]
        for words in (
            ("alice", "=-100", "--reason", "a typo"),
            ("alice", "-1.5", "--reason", "a typo"),
            ("--reason", "a typo", "alice", "-0.5"),
            ("alice", "100", "--reason", "back"),
        )
    ]
    assert balances == ["100002", "100000.5", "100000", "100100"]
    last = cli("--json", "credits", "adjust", "alice", "--reason", "so be it", "--", "-100")
    assert last.json["balance"] == "100000" and last.json["amount"] == "-100"
    cli("credits", "adjust", "alice", "5").refuses("--reason")
    cli("credits", "adjust", "alice", "5", "--reason", " ").refuses("--reason")
    cli("credits", "adjust", "alice", "0", "--reason", "r").refuses("0 credits")
    cli("credits", "adjust", "bob", "5", "--reason", "r").refuses("no account 'bob'")
    cli("credits", "adjust", "alice", "5", "--reason", "r", "--id", "a b").refuses("without blanks")
    cli("credits", "grant", "alice", "899999999999").refuses("balance would pass")

    with connect_sync(redis_url) as redis:
        entries = [fields for _, fields in redis.xrange(keys.ledger(keys.partition(account)))]  # type: ignore[union-attr]
    reasons = [json.loads(entry["data"]).get("reason") for entry in entries if entry["code"] == "adjust"]
    assert reasons == ["a typo", "a typo", "a typo", "back", "so be it"]


def test_refunds(cli: Cli, redis_url: str) -> None:
    account = cli("accounts", "create", "alice", "--json").json["id"]
    request = charge(redis_url, account, "12.5")
    assert cli("accounts", "show", "alice", "--json").json["balance"] == "99987.5"
    for _ in range(2):
        back = cli("credits", "refund", request, "--json").json
        assert (back["balance"], back["amount"], back["id"]) == ("100000", "12.5", f"refund:{request}")
    assert cli("accounts", "show", "alice", "--json").json["free_grant"] == "100000"

    parts = charge(redis_url, account, "10")
    assert cli("credits", "refund", parts, "4", "--id", "p1", "--json").json["balance"] == "99994"
    assert cli("credits", "refund", parts, "4", "--id", "p1", "--json").json["balance"] == "99994"
    assert cli("credits", "refund", parts, "--id", "p2", "6", "--json").json["balance"] == "100000"
    cli("credits", "refund", parts, "0.1", "--id", "p3").refuses("may not be more")
    cli("credits", "refund", parts).refuses("may not be more")
    cli("credits", "refund", parts, "1").refuses("--id")
    cli("credits", "refund", parts, "--id", "p4").refuses("--id")
    cli("credits", "refund", parts, "--id", "p4", "--", "-1").refuses("more than 0")
    cli("credits", "refund", "nonsense").refuses("not a request id")
    cli("credits", "refund", keys.new_request_id(account)).refuses("there is no request")
    cli("credits", "refund", charge(redis_url, account, "0")).refuses("charged nothing")
    assert cli("accounts", "show", "alice", "--json").json["balance"] == "100000"
    assert cli("ledger", "audit").code == 0


def test_prices(cli: Cli, tmp_path: Path) -> None:
    config = tmp_path / "llmhub-meter.toml"
    config.write_text(MODELS)
    first = cli("prices", "show", "--json").json
    assert [model["id"] for model in first["data"]] == ["m", "e", "img", "whisper"]
    assert first["data"][0]["pricing"]["credits"] == {"input": "14", "output": "56"}
    assert re.search(r"^m +chat +1K tokens +input 14, output 56$", cli("prices", "show").out, re.MULTILINE)

    config.write_text(MODELS.replace("= 14", "= 15"))
    assert cli("prices", "show", "--json").json == first, "a verb that only reads has published prices"
    reloaded = cli("prices", "reload", "--json").json
    assert (reloaded["old"], reloaded["changed"], reloaded["models"]) == (first["version"], True, 4)
    assert cli("prices", "show", "--json").json["version"] == reloaded["new"] != first["version"]
    assert "in force already" in cli("prices", "reload").out

    config.write_text(MODELS.replace("= 14", "= 15000"))
    cli("prices", "reload").refuses('[models."m"] input_per_1k', "100 times up", "--force")
    assert cli("prices", "show", "--json").json["version"] == reloaded["new"]
    assert cli("prices", "reload", "--force").code == 0

    (tmp_path / "other.toml").write_text(MODELS)
    cli("prices", "reload", "other.toml").refuses("100 times down")
    assert cli("prices", "reload", "--force", "other.toml", "--json").json["new"] == first["version"]
    (tmp_path / "broken.toml").write_text('[models.m]\ntype = "chat"\ninput_per_1k = -1\n')
    cli("prices", "reload", "broken.toml").refuses("broken.toml", "negative")
    (tmp_path / "empty.toml").write_text("")
    cli("prices", "reload", "empty.toml").refuses("no model")
    assert cli("prices", "show", "--json").json["version"] == first["version"]


def test_an_estimate_is_what_the_text_will_cost(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llmhub-meter.toml").write_text(MODELS)
    # 2 tokens of text, and 7 around a chat message: 9 x 14 / 1000, and 1000 x 56 / 1000 besides.
    assert cli("estimate", "m", "hello there", "--json").json == {
        "model": "m",
        "prompt_tokens": 9,
        "credits_from": "0.126",
        "credits_to": "56.126",
    }
    assert cli("estimate", "m", "--output", "10", "hello there", "--json").json["credits_to"] == "0.686"
    assert cli("estimate", "e", "hello there", "--json").json["credits_to"] == "0.0038"
    assert cli("estimate", "img", "a dot", "--json").json["credits_from"] == "3700"
    for words in (("-",), ()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello there")))
        assert cli("estimate", "m", *words, "--json").json["prompt_tokens"] == 9
    assert re.search(r"^credits +0.126 to 56.126$", cli("estimate", "m", "hello there").out, re.MULTILINE)
    assert re.search(r"^credits +0.0038$", cli("estimate", "e", "hello there").out, re.MULTILINE)
    cli("estimate", "whisper", "x").refuses("minute")
    cli("estimate", "unknown", "x").refuses("no model 'unknown'")
    cli("estimate", "m", "one", "two").refuses("unrecognized arguments: two")


def test_audit_finds_a_balance_that_nobody_entered(cli: Cli, redis_url: str) -> None:
    account = cli("accounts", "create", "alice", "--json").json["id"]
    assert cli("ledger", "audit").out == "1 account, 2 entries, 0 differences\n"
    clean = cli("ledger", "audit", "--json").json
    assert (clean["accounts"], clean["differences"], clean["findings"]) == (1, 0, [])
    assert clean["entries"] >= 1
    with connect_sync(redis_url) as redis:
        redis.hincrby(keys.wallet(account), "balance", 1)
    found = cli("ledger", "audit", "--json")
    assert found.code == 1 and found.err == ""
    report = json.loads(found.out)
    assert report["differences"] >= 1 and account in " ".join(report["findings"])
    assert cli("ledger", "audit").code == 1


def test_check_config_names_every_fault(cli: Cli, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(MODELS)
    bad.write_text(MODELS.replace("= 14", "= -14") + '[credits]\nsignup = 5\n[reserve]\nshare = "all"\n')
    assert cli("check-config", str(good)).out == "OK: 4 models, 0 upstreams\n"
    assert cli("check-config", "--config", str(good), "--json").json["models"] == 4
    assert cli("check-config").out.startswith("OK: 0 models")
    faults = cli("check-config", str(bad))
    lines = faults.err.splitlines()
    assert (faults.code, faults.out, len(lines)) == (2, "", 3)
    assert all(line.startswith(f"{bad}: [") for line in lines)
    assert any('[models."m"] input_per_1k: is negative' in line for line in lines)
    told = cli("check-config", str(bad), "--json")
    assert told.code == 2 and json.loads(told.out) == {"ok": False, "faults": lines}
    bad.write_text(bad.read_text() + "slices = 1\nlease = 1\n")
    started = cli("serve", "--config", str(bad))
    assert started.code == 2 and started.err.endswith("; 2 more: see `check-config`\n")
    assert started.err.count(str(bad)) == 3
    missing = cli("check-config", "nowhere.toml")
    assert missing.code == 2 and missing.err == "nowhere.toml: can't be read: No such file or directory\n"


def test_common_options_stand_anywhere(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[credits]\nsignup_grant = 7\n")
    for index, words in enumerate(
        [
            ("--config", "c.toml", "--json", "accounts", "create", "{}"),
            ("accounts", "--config", "c.toml", "--json", "create", "{}"),
            ("accounts", "create", "--json", "{}", "--config", "c.toml"),
            ("--json", "accounts", "--config=c.toml", "create", "{}"),
        ]
    ):
        named = [word.format(f"a{index}") for word in words]
        assert cli(*named).json["balance"] == "7"
    cli("accounts", "list", "--config", "gone.toml").refuses("gone.toml", "can't be read")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("accounts",),
        ("frobnicate",),
        ("accounts", "create"),
        ("accounts", "create", "a", "b"),
        ("accounts", "create", ""),
        ("accounts", "list", "--frob"),
        ("accounts", "list", "--jso"),
        ("serve", "--port", "99999"),
        ("serve", "--workers", "0"),
        ("demo", "--port", "x"),
        ("ledger", "burn"),
        ("estimate", "m", "x", "--output", "-1"),
    ],
)
def test_wrong_use_is_one_line(cli: Cli, words: tuple[str, ...]) -> None:
    cli(*words).refuses()


def test_a_redis_out_of_reach_is_one_line_without_its_password(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("LLMHUB_METER__REDIS__URL", f"redis://user:hush@127.0.0.1:{port}/3?password=hush")
    for words in (("accounts", "list"), ("ledger", "audit"), ("prices", "reload", "--config", "m.toml")):
        Path("m.toml").write_text(MODELS)
        answer = cli(*words)
        answer.refuses(f"Redis can't be reached at redis://127.0.0.1:{port}/3")
        assert "hush" not in answer.err


def test_a_redis_that_evicts_is_refused(cli: Cli, redis_url: str) -> None:
    with connect_sync(redis_url) as redis:
        redis.config_set("maxmemory-policy", "allkeys-lru")
        try:
            cli("accounts", "list").refuses("evicts keys", "noeviction")
        finally:
            redis.config_set("maxmemory-policy", "noeviction")


def test_serve_needs_something_to_serve(cli: Cli, tmp_path: Path) -> None:
    cli("serve", "--port", "0").refuses("no upstream", "no model")
    (tmp_path / "llmhub-meter.toml").write_text(MODELS)
    answer = cli("serve", "--port", "0")
    answer.refuses("no upstream")
    assert "no model" not in answer.err


def test_the_module_is_a_command_without_tracebacks(tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path).stdout == f"llmhub-meter {__version__}\n"
    wrong = run("accounts", "show", "nobody", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "llmhub-meter: there is no account 'nobody'; `accounts list` shows all\n"
    assert (tmp_path / "llmhub-data").is_dir()
    help_text = run("credits", "adjust", "--help", cwd=tmp_path)
    assert help_text.returncode == 0 and "--reason" in help_text.stdout
    (tmp_path / "file").touch()
    blocked = run("accounts", "list", cwd=tmp_path, LLMHUB_METER__DATA_DIR="file/below")
    assert blocked.returncode == 2 and blocked.stderr.count("\n") == 1


@pytest.mark.parametrize(("verb", "missing"), [("demo", "aiohttp"), ("serve", "uvicorn")])
def test_a_missing_extra_is_named_with_its_cure(verb: str, missing: str, tmp_path: Path) -> None:
    # As after `pip install llmhub-meter` without the extra: the import finds nothing.
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from llmhub_meter.cli import main; sys.exit(main([{verb!r}]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert ended.stderr == f"llmhub-meter: this needs {missing}: run `pip install 'llmhub-meter[server]'`\n"


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "llmhub_meter", "accounts", "list"],
            cwd=tmp_path,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_serve_ends_its_streams_and_then_itself(tmp_path: Path, workers: int) -> None:
    port = free_port()
    serve = ("serve", "--port", str(port), "--workers", str(workers))
    with serve_app(create_upstream(chunk_seconds=0.03)) as upstream:
        (tmp_path / "llmhub-meter.toml").write_text(
            f'[upstreams.up]\nbase_url = "{upstream}/v1"\nauth = "none"\n'
            '[models.demo-chat]\ntype = "chat"\ninput_per_1k = 14\noutput_per_1k = 56\n'
        )
        with start(*serve, cwd=tmp_path) as running, httpx.Client() as client:
            line = running.read_until("serving")
            counted = "1 worker" if workers == 1 else "2 workers"
            data_dir = tmp_path / "llmhub-data"
            url = f"http://127.0.0.1:{port}"
            expected = f"llmhub-meter serving on {url} ({counted}, 1 model, Redis: embedded in {data_dir})\n"
            assert line == expected
            busy = run(*serve, cwd=tmp_path)
            assert busy.returncode == 2 and busy.stderr.count("\n") == 1
            assert f"port {port} of 127.0.0.1 is busy" in busy.stderr

            run("accounts", "create", "alice", cwd=tmp_path)
            key = json.loads(run("keys", "create", "alice", "--json", cwd=tmp_path).stdout)["key"]
            body = {
                "model": "demo-chat",
                "stream": True,
                "messages": [{"role": "user", "content": "w " * 60}],
            }
            auth = {"authorization": f"Bearer {key}"}
            with client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=auth) as answer:
                assert len(answer.headers.get_list("server")) == 1, "not the upstream's alone"
                pieces = answer.iter_text()
                text = next(pieces)
                ended: list[tuple[int, str]] = []
                ending = threading.Thread(target=lambda: ended.append(running.end(signal.SIGTERM)))
                ending.start()
                text += "".join(pieces)
            ending.join(30)
            assert ended == [(0, "")]
    assert text.endswith("data: [DONE]\n\n")
    used = re.search(r"^: credits used=(\S+) remaining=(\S+)$", text, re.MULTILINE)
    assert used and ticks(used[1]) > 0
    shown = json.loads(run("accounts", "show", "alice", "--json", cwd=tmp_path).stdout)
    assert (shown["balance"], shown["held"]) == (used[2], "0")


def test_an_answer_broken_off_on_purpose_is_one_line_of_log() -> None:
    def record(error: BaseException) -> logging.LogRecord:
        text = "Exception in ASGI application\n"
        facts = (type(error), error, None)
        return logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, text, (), facts)

    broken = record(UpstreamBroken("the upstream hung up"))
    assert BrokenAnswers().filter(broken) and broken.exc_info is None
    assert broken.getMessage() == "an answer was broken off: the upstream hung up"
    other = record(UpstreamError("a defect"))
    assert BrokenAnswers().filter(other) and other.exc_info is not None
