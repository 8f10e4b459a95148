"""The demo as its first user meets it: started, used with OpenAI's client, stopped, killed, started again."""

import json
import os
import re
import signal
from decimal import Decimal
from pathlib import Path

import httpx
from commands import Running, free_port, run, start
from openai import OpenAI

from llmhub_meter.demo import MODELS


def read(demo: Running) -> tuple[str, str]:
    """Key and base URL as they are printed."""
    said = demo.read_until("Ctrl-C stops it")
    key = re.search(r"API key +(llmhub_sk_\S{43})\n", said)
    url = re.search(r"base URL +(http://\S+/v1)\n", said)
    assert key and url, said
    return key[1], url[1]


def balance(url: str, key: str) -> Decimal:
    answer = httpx.get(f"{url}/credits", headers={"authorization": f"Bearer {key}"}).raise_for_status()
    assert answer.json()["held"] == "0"
    return Decimal(answer.json()["balance"])


def use(url: str, key: str) -> Decimal:
    """One of everything through OpenAI's client; the credits that it costs by the price list."""
    ask = [{"role": "user", "content": "Tell me something"}]
    with OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        chat = client.chat.completions.create(model="demo-chat", messages=ask)  # type: ignore[arg-type]
        assert chat.usage is not None and "Tell me something" in (chat.choices[0].message.content or "")

        chunks = list(client.chat.completions.create(model="demo-chat", messages=ask, stream=True))  # type: ignore[call-overload]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == chat.choices[0].message.content
        assert all(chunk.choices for chunk in chunks), "a usage chunk that was not asked for"

        embedded = client.embeddings.create(model="demo-embedding", input="one two three")
        image = client.images.generate(model="demo-image", prompt="a dot", n=2, size="1024x1024")
        assert image.data is not None and len(image.data) == 2
        free = client.chat.completions.create(model="demo-free", messages=ask)  # type: ignore[arg-type]
        assert free.choices[0].message.content == text
        assert {model.id for model in client.models.list()} == MODELS.keys()

    usage = chat.usage
    one_chat = (usage.prompt_tokens * Decimal(14) + usage.completion_tokens * Decimal(56)) / 1000
    return 2 * one_chat + embedded.usage.prompt_tokens * Decimal("1.9") / 1000 + 2 * 3700


def test_a_demo_from_first_start_to_a_crash_and_back(tmp_path: Path) -> None:
    port = free_port()
    with start("demo", "--port", str(port), cwd=tmp_path) as first:
        key, url = read(first)
        assert url == f"http://127.0.0.1:{port}/v1"
        assert (tmp_path / "llmhub-data" / "demo.key").stat().st_mode & 0o777 == 0o600
        assert balance(url, key) == 100_000
        cost = use(url, key)
        left = 100_000 - cost
        assert balance(url, key) == left

        with start("demo", "--port", str(port), "--json", cwd=tmp_path) as second:
            beside = json.loads(second.read_until("}"))
            assert beside["key"] == key and beside["base_url"] != url
            assert balance(beside["base_url"], key) == left
            assert second.end(signal.SIGINT) == (0, "")

        shown = run("accounts", "show", "demo", "--json", cwd=tmp_path)
        assert Decimal(json.loads(shown.stdout)["balance"]) == left
        assert first.end() == (0, "")
    assert "is busy" not in "".join(first.said)

    with start("demo", "--port", str(port), cwd=tmp_path) as again:
        assert read(again) == (key, url)
        assert balance(url, key) == left
        left -= use(url, key)
        server = int((tmp_path / "llmhub-data" / "server.pid").read_text())
        os.killpg(again.process.pid, signal.SIGKILL)
        os.kill(server, signal.SIGKILL)
        again.process.wait(10)

    (tmp_path / "llmhub-data" / "demo.key").unlink()
    with start("demo", "--port", str(port), cwd=tmp_path) as revived:
        new_key, url = read(revived)
        assert new_key != key
        assert balance(url, new_key) == left == balance(url, key)
        audit = run("ledger", "audit", "--json", cwd=tmp_path)
        assert (audit.returncode, json.loads(audit.stdout)["differences"]) == (0, 0), audit.stdout
        assert revived.end() == (0, "")


def test_the_next_free_port_is_said_and_a_second_signal_cuts_streams(tmp_path: Path) -> None:
    port = free_port()
    with start("demo", "--port", str(port), cwd=tmp_path) as first, httpx.Client() as client:
        key, url = read(first)
        with start("demo", "--port", str(port), cwd=tmp_path) as second:
            read(second)
            assert re.match(rf"port {port} is busy, using \d+\n", second.said[0])
        words = {"model": "demo-chat", "stream": True, "messages": [{"role": "user", "content": "w " * 99}]}
        auth = {"authorization": f"Bearer {key}"}
        with client.stream("POST", f"{url}/chat/completions", json=words, headers=auth) as answer:
            assert next(answer.iter_text())
            first.process.send_signal(signal.SIGINT)
            code, errors = first.end()
        assert code == 0 and "Traceback" not in errors
    shown = json.loads(run("accounts", "show", "demo", "--json", cwd=tmp_path).stdout)
    assert shown["held"] == "0" and Decimal(99_990) < Decimal(shown["balance"]) < 100_000


def test_it_leaves_an_operators_prices_alone(tmp_path: Path) -> None:
    config = tmp_path / "llmhub-meter.toml"
    config.write_text('[models.mine]\ntype = "chat"\ninput_per_1k = 1\noutput_per_1k = 1\n')
    before = json.loads(run("prices", "show", "--json", cwd=tmp_path).stdout)
    refused = run("demo", "--port", "0", cwd=tmp_path)
    assert refused.returncode == 2 and "price table of its own (mine ...)" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert json.loads(run("prices", "show", "--json", cwd=tmp_path).stdout) == before
