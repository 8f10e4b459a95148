"""Config files and the environment: what is read, and every fault with its place."""

import os
import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llmhub_meter.config import Config, ModelConfig, UpstreamConfig, load_config, parse_models
from llmhub_meter.errors import ConfigError
from llmhub_meter.money import MAX_TICKS, credits

SETTINGS = """
data_dir = "data"

[redis]
url = "redis://:hush@localhost:6379/0"
on_redis_failure = "closed"

[ledger]
url = "postgresql://user:hush@localhost/ledger"

[upstreams.openai]
base_url = "https://api.openai.com/v1/"
api_key = "env:OPENAI_API_KEY"
auth = "bearer"
headers = { anthropic-version = "2023-06-01" }
query = { api-version = "1" }
timeout_seconds = 600
max_tokens_field = "max_completion_tokens"
stateful = false

[upstreams.local]
base_url = "http://127.0.0.1:11434/v1"
auth = "none"

[credits]
signup_grant = 100000

[reserve]
share = 0.25
slice_tokens = 1000
min_output_tokens = 16
lease_seconds = 600
clamp = "unset"
image_tokens = 1600
file_tokens = 8000
tool_tokens = 8000

[metering]
unknown_models = "refuse"
unpriced_features = "refuse"
sse_comment = true
on_disconnect = "cancel"
max_body_bytes = 33554432
strict = false

[limits]
enabled = false

[admin]
tokens = ["env:LLMHUB_ADMIN_TOKEN"]

[metrics]
bind = "127.0.0.1:9464"
"""

PRICES = """
[models."gpt-4o-mini"]
type = "chat"
input_per_1k = 14
output_per_1k = 56
cached_input_per_1k = 7
cache_write_per_1k = 17.5
reasoning_per_1k = 56
audio_input_per_1k = 900
per_request = 0
max_output_tokens = 16384
context_window = 128000
hidden_output = false
aliases = ["gpt-4o-mini-latest"]
upstream = "openai"
upstream_model = "gpt-4o-mini"

[models."dall-e-3"]
type = "image"
per_generation = 3700
[models."dall-e-3".per_generation_by]
"1024x1024/hd" = 7400
"1792x1024/hd" = 11100

[models."gpt-image-1"]
type = "image"
input_per_1k = 460
image_input_per_1k = 920
output_per_1k = 3700

[models."text-embedding-3-small"]
type = "embedding"
input_per_1k = 1.9

[models."whisper-1"]
type = "audio"
per_minute = 550

[models."llama-3.1-8b"]
type = "chat"
free = true
"""

ENVIRON = {"OPENAI_API_KEY": "sk-hush", "LLMHUB_ADMIN_TOKEN": "token-hush"}


def write(folder: Path, text: str) -> Path:
    path = folder / "llmhub-meter.toml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(path: Path | None, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ=environ or {})
    return caught.value.faults


def faults_of(folder: Path, text: str, environ: dict[str, str] | None = None) -> list[str]:
    """The faults of a file, without its path."""
    path = write(folder, text)
    return [fault.removeprefix(f"{path}: ") for fault in faults(path, environ)]


class TestWholeFile:
    def test_every_setting_is_read(self, tmp_path: Path) -> None:
        config = load_config(write(tmp_path, SETTINGS + PRICES), environ=ENVIRON)
        assert config.data_dir == tmp_path / "data"
        assert config.redis.url == "redis://:hush@localhost:6379/0"
        assert list(config.upstreams) == ["openai", "local"]
        assert config.default_upstream == "openai"
        openai = config.upstreams["openai"]
        assert openai.base_url == "https://api.openai.com/v1"
        assert openai.api_key is not None and openai.api_key.get_secret_value() == "sk-hush"
        assert openai.headers == {"anthropic-version": "2023-06-01"}
        assert openai.query == {"api-version": "1"}
        assert config.upstreams["local"].auth == "none"
        assert [token.get_secret_value() for token in config.admin.tokens] == ["token-hush"]
        assert config.metrics.bind == "127.0.0.1:9464"
        assert list(config.models) == [
            "gpt-4o-mini",
            "dall-e-3",
            "gpt-image-1",
            "text-embedding-3-small",
            "whisper-1",
            "llama-3.1-8b",
        ]

    def test_prices_are_ticks(self, tmp_path: Path) -> None:
        models = load_config(write(tmp_path, SETTINGS + PRICES), environ=ENVIRON).models
        assert models["gpt-4o-mini"].input_per_1k == 140_000
        assert models["gpt-4o-mini"].cache_write_per_1k == 175_000
        assert models["gpt-4o-mini"].audio_output_per_1k is None
        assert models["dall-e-3"].per_generation_by == {
            "1024x1024/hd": 74_000_000,
            "1792x1024/hd": 111_000_000,
        }
        assert models["text-embedding-3-small"].input_per_1k == 19_000
        assert models["whisper-1"].unit == "minute"
        assert models["llama-3.1-8b"].free

    def test_the_file_of_the_contract_names_the_defaults(self, tmp_path: Path) -> None:
        """What the example spells out is what an empty file means."""
        written = load_config(write(tmp_path, SETTINGS), environ=ENVIRON)
        defaults = load_config(write(tmp_path, ""), environ={})
        for table in ("credits", "reserve", "metering", "limits"):
            assert getattr(written, table) == getattr(defaults, table)
        assert defaults.data_dir == tmp_path / "llmhub-data"
        assert defaults.redis.url is None and defaults.redis.on_redis_failure == "closed"
        assert defaults.upstreams == {} and defaults.default_upstream is None
        assert defaults.credits.signup_grant == 1_000_000_000
        assert defaults.reserve.share == Decimal("0.25")

    def test_upstream_defaults(self) -> None:
        upstream = UpstreamConfig(base_url="https://api.example.com/v1")
        assert upstream.api_key is None
        assert (upstream.auth, upstream.timeout_seconds) == ("bearer", 600)
        assert (upstream.max_tokens_field, upstream.stateful) == ("max_completion_tokens", False)

    def test_no_file_means_defaults(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        config = load_config(None, environ={})
        assert config == Config(data_dir=tmp_path / "llmhub-data")

    def test_the_file_of_the_current_folder_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write(tmp_path, 'data_dir = "here"')
        assert load_config(None, environ={}).data_dir == tmp_path / "here"

    def test_paths_are_relative_to_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc" / "prices.toml").write_text('data_dir = "../data"')
        monkeypatch.chdir(tmp_path)
        assert load_config(Path("etc/prices.toml"), environ={}).data_dir == tmp_path / "data"

    def test_an_absolute_path_stays(self, tmp_path: Path) -> None:
        assert load_config(write(tmp_path, 'data_dir = "/var/lib/x"'), environ={}).data_dir == Path(
            "/var/lib/x"
        )

    def test_secrets_are_not_shown(self, tmp_path: Path) -> None:
        config = load_config(write(tmp_path, SETTINGS + PRICES), environ=ENVIRON)
        assert "hush" not in repr(config) and "hush" not in str(config)

    def test_a_config_is_frozen(self) -> None:
        with pytest.raises(ValidationError):
            Config().data_dir = Path("elsewhere")

    def test_a_byte_order_mark_is_no_fault(self, tmp_path: Path) -> None:
        path = tmp_path / "c.toml"
        path.write_bytes(b"\xef\xbb\xbf[reserve]\r\nslice_tokens = 5\r\n")
        assert load_config(path, environ={}).reserve.slice_tokens == 5


class TestFilesThatCantBeRead:
    def test_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "absent.toml"
        assert faults(path) == [f"{path}: can't be read: No such file or directory"]

    def test_a_folder(self, tmp_path: Path) -> None:
        assert faults(tmp_path) == [f"{tmp_path}: can't be read: Is a directory"]

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "c.toml"
        path.write_bytes(b'data_dir = "\xff"')
        assert faults(path) == [f"{path}: is not UTF-8 text (byte 12)"]

    @pytest.mark.parametrize(
        ("text", "line", "column"),
        [
            ("[redis]\nurl = = 1", 2, 7),
            ("[redis", 1, 7),
            ('[redis]\nurl = "redis://x', 2, 17),
            ('[models.a]\ntype = "chat"\n[models.a]\n', 3, 10),
        ],
    )
    def test_syntax_has_line_and_column(self, tmp_path: Path, text: str, line: int, column: int) -> None:
        (fault,) = faults_of(tmp_path, text)
        assert f"at line {line}, column {column}" in fault

    def test_numbers_beyond_reason(self, tmp_path: Path) -> None:
        model = '[models.a]\ntype = "embedding"\ninput_per_1k = '
        (fault,) = faults_of(tmp_path, model + "1e99999999999999999999")
        assert fault.startswith("[models.\"a\"] input_per_1k: '1e99999999999999999999' is not a decimal")
        (fault,) = faults_of(tmp_path, model + "9" * 5000)
        assert "integer string conversion" in fault

    def test_deep_nesting(self, tmp_path: Path) -> None:
        assert len(faults_of(tmp_path, "a = " + "[" * 20_000)) == 1


BAD_PRICES = [
    ("-14", "is negative (-14)"),
    ("-0.0001", "is negative (-0.0001)"),
    ("nan", "NaN is not a finite number of credits"),
    ("inf", "Infinity is not a finite number of credits"),
    ("-inf", "-Infinity is not a finite number of credits"),
    ("0.00001", "0.00001 has more than 4 decimals of a credit"),
    ("1.00000000000000000000000000001", "has more than 4 decimals of a credit"),
    ("1e-99999", "has more than 4 decimals of a credit"),
    ("1e99", "1E+99 credits is more than an account can hold"),
    ("900000000001", "credits is more than an account can hold"),
    ("true", "must be a decimal number of credits"),
    ('"free"', "'free' is not a decimal number of credits"),
    ('""', "'' is not a decimal number of credits"),
    ('"1_0"', "'1_0' is not a decimal number of credits"),
    ('" 1"', "' 1' is not a decimal number of credits"),
    ('"NaN"', "'NaN' is not a decimal number of credits"),
    ('"１"', "'１' is not a decimal number of credits"),
    ("[1]", "must be a decimal number of credits"),
    ("{a = 1}", "must be a decimal number of credits"),
    ("1979-05-27", "must be a decimal number of credits"),
]


class TestPrices:
    @pytest.mark.parametrize(("value", "message"), BAD_PRICES)
    def test_a_bad_price_is_named(self, tmp_path: Path, value: str, message: str) -> None:
        text = f'[models."gpt-4o-mini"]\ntype = "chat"\ninput_per_1k = {value}\noutput_per_1k = 1'
        path = write(tmp_path, text)
        (fault,) = faults(path)
        assert fault.startswith(f'{path}: [models."gpt-4o-mini"] input_per_1k: ')
        assert message in fault

    @pytest.mark.parametrize(
        ("type_name", "field"),
        [
            ("chat", "output_per_1k"),
            ("chat", "cached_input_per_1k"),
            ("chat", "cache_write_per_1k"),
            ("chat", "reasoning_per_1k"),
            ("chat", "audio_input_per_1k"),
            ("chat", "audio_output_per_1k"),
            ("chat", "image_input_per_1k"),
            ("rerank", "per_request"),
            ("image", "per_generation"),
            ("audio", "per_minute"),
            ("audio", "per_1k_characters"),
        ],
    )
    def test_each_price_field_refuses_negatives(self, tmp_path: Path, type_name: str, field: str) -> None:
        found = faults_of(tmp_path, f'[models.m]\ntype = "{type_name}"\n{field} = -1')
        assert f'[models."m"] {field}: is negative (-1)' in found

    def test_a_variant_is_named(self, tmp_path: Path) -> None:
        by = '{"1024x1024/hd" = -1, hd = 2}'
        text = f'[models.m]\ntype = "image"\nper_generation = 1\nper_generation_by = {by}'
        assert faults_of(tmp_path, text) == [
            '[models."m".per_generation_by] "1024x1024/hd": is negative (-1)',
            '[models."m".per_generation_by] hd: must look like "1024x1024" or "1024x1024/hd"',
        ]

    @given(st.integers(0, MAX_TICKS))
    def test_print_and_parse_are_inverse(self, amount: int) -> None:
        model = ModelConfig(type="embedding", input_per_1k=credits(amount))
        assert model.input_per_1k == amount
        assert model.model_dump()["input_per_1k"] == credits(amount)
        assert ModelConfig.model_validate(model.model_dump()) == model

    @given(st.decimals(allow_nan=True, allow_infinity=True))
    def test_any_decimal_is_exact_or_refused(self, value: Decimal) -> None:
        try:
            price = ModelConfig(type="embedding", input_per_1k=value).input_per_1k
        except ValidationError:
            # Compared without arithmetic, which would round.
            assert not value.is_finite() or value < 0 or value > 9 * 10**11 or value != round(value, 4)
        else:
            assert price is not None and Decimal(credits(price)) == value

    def test_floats_are_refused(self) -> None:
        with pytest.raises(ValidationError, match="is a float"):
            ModelConfig(type="embedding", input_per_1k=1.9)

    def test_toml_decimals_are_never_floats(self, tmp_path: Path) -> None:
        """0.1 + 0.2 of a credit as a float would have 17 decimals."""
        text = '[models.m]\ntype = "chat"\ninput_per_1k = 0.3000\noutput_per_1k = 99999999999.9999'
        model = load_config(write(tmp_path, text), environ={}).models["m"]
        assert (model.input_per_1k, model.output_per_1k) == (3_000, 999_999_999_999_999)


class TestModels:
    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            ("input_per_1k = 1", ["type: is required"]),
            (
                'type = "chatt"\ninput_per_1k = 1',
                [
                    'type: must be "chat", "completion", "embedding", "image", "audio", "moderation" '
                    'or "rerank"',
                ],
            ),
            ('type = "chat"', ["has no price (free = true if it really is free)"]),
            ('type = "chat"\nper_request = 0', ["has no price (free = true if it really is free)"]),
            ('type = "chat"\nfree = false', ["has no price (free = true if it really is free)"]),
            (
                'type = "chat"\nfree = true\ninput_per_1k = 0\nper_request = 1',
                [
                    "input_per_1k: is a price, but the model is free = true",
                    "per_request: is a price, but the model is free = true",
                ],
            ),
            (
                'type = "chat"\ninput_per_1k = 1\noutput_per_1k = 1\nper_generation = 5',
                ['per_generation: does not fit type "chat"'],
            ),
            (
                'type = "embedding"\ninput_per_1k = 1\noutput_per_1k = 5',
                ['output_per_1k: does not fit type "embedding"'],
            ),
            ('type = "image"\nper_minute = 1', ['per_minute: does not fit type "image"']),
            (
                'type = "chat"\ninput_per_1k = 1',
                ["output_per_1k: is required beside other prices per 1,000 tokens (0 if it costs nothing)"],
            ),
            (
                'type = "audio"\naudio_input_per_1k = 1\noutput_per_1k = 1',
                ["input_per_1k: is required beside other prices per 1,000 tokens (0 if it costs nothing)"],
            ),
            (
                'type = "image"\nper_generation_by = {"1024x1024" = 1}',
                ["per_generation: is required for the sizes that per_generation_by does not list"],
            ),
            (
                'type = "audio"\nper_minute = 1\nper_1k_characters = 1',
                ["per_1k_characters: is another unit than per_minute: a model has one"],
            ),
            (
                'type = "image"\nper_generation = 1\ninput_per_1k = 1\noutput_per_1k = 1',
                ["per_generation: is another unit than input_per_1k: a model has one"],
            ),
            (
                'type = "rerank"\nper_request = 1\ninput_per_k = 1',
                ['input_per_k: is not a known field; did you mean "input_per_1k"?'],
            ),
            (
                'type = "rerank"\nper_request = 1\nmax_output_tokens = 0',
                ["max_output_tokens: must be at least 1"],
            ),
            ('type = "rerank"\nper_request = 1\ncontext_window = -5', ["context_window: must be at least 1"]),
            (
                'type = "rerank"\nper_request = 1\ncontext_window = 1.5',
                ["context_window: must be a whole number"],
            ),
            ('type = "rerank"\nper_request = 1\ncontext_window = true', ["context_window: must be a number"]),
            ('type = "rerank"\nper_request = 1\nhidden_output = 3', ["hidden_output: must be true or false"]),
            ('type = "rerank"\nper_request = 1\naliases = "m2"', ["aliases: must be a list"]),
            (
                'type = "rerank"\nper_request = 1\naliases = ["a b"]',
                ["aliases[0]: a name must not hold blanks or control characters"],
            ),
            (
                'type = "rerank"\nper_request = 1\naliases = ["m"]',
                ['aliases[0]: "m" is the name of a model'],
            ),
            (
                'type = "rerank"\nper_request = 1\naliases = ["a", "a"]',
                ['aliases[1]: "a" is an alias of "m" already'],
            ),
            (
                'type = "rerank"\nper_request = 1\nupstream = "openia"',
                ['upstream: there is no [upstreams.openia]; did you mean "openai"?'],
            ),
        ],
    )
    def test_faults(self, tmp_path: Path, body: str, expected: list[str]) -> None:
        text = f'[upstreams.openai]\nbase_url = "http://x/v1"\n[models.m]\n{body}'
        found = [fault.removeprefix('[models."m"]').lstrip(": ") for fault in faults_of(tmp_path, text)]
        assert found == expected

    def test_aliases_are_unique_across_models(self, tmp_path: Path) -> None:
        text = """
        [models.a]
        type = "rerank"
        per_request = 1
        aliases = ["x", "A"]
        [models.b]
        type = "rerank"
        per_request = 1
        aliases = ["x", "a"]
        """
        assert faults_of(tmp_path, text) == [
            '[models."b"] aliases[0]: "x" is an alias of "a" already',
            '[models."b"] aliases[1]: "a" is the name of a model',
        ]

    @pytest.mark.parametrize("name", ["", "a b", "a\\tb", "a\\u0000b", "a\\u00a0b", "x" * 257])
    def test_names(self, tmp_path: Path, name: str) -> None:
        (fault,) = faults_of(tmp_path, f'[models."{name}"]\ntype = "rerank"\nper_request = 1')
        assert (
            fault.startswith("[models.") and "a name must not be" in fault or "must not hold blanks" in fault
        )

    def test_braces_in_a_name_are_no_template(self, tmp_path: Path) -> None:
        text = '[models.m]\ntype = "rerank"\nper_request = 1\nupstream = "{message}{0}"'
        assert faults_of(tmp_path, text) == ['[models."m"] upstream: there is no [upstreams.{message}{0}]']

    @pytest.mark.parametrize("value", ["gpt-4", "x"])
    def test_unknown_models_names_a_model(self, tmp_path: Path, value: str) -> None:
        table = '[models."gpt-4o"]\ntype = "rerank"\nper_request = 1\naliases = ["x"]\n'
        text = f'{table}[metering]\nunknown_models = "{value}"'
        if value == "x":
            assert load_config(write(tmp_path, text), environ={}).metering.unknown_models == "x"
            return
        assert faults_of(tmp_path, text) == [
            '[metering] unknown_models: must be "refuse", "free" or the name of a model, not "gpt-4"; '
            'did you mean "gpt-4o"?'
        ]

    def test_parse_models_names_its_source(self) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_models({"m": {"type": "chat", "input_per_1k": "-1"}}, "prices of 12:00")
        assert caught.value.faults == [
            'prices of 12:00: [models."m"] input_per_1k: is negative (-1)',
            'prices of 12:00: [models."m"] output_per_1k: is required beside other prices per 1,000 tokens '
            "(0 if it costs nothing)",
        ]


BAD_SETTINGS = [
    ("data_dri = 1", 'data_dri: is not a known field; did you mean "data_dir"?'),
    ("data_dir = 1", "data_dir: must be a path"),
    ("reserve = 1", "[reserve]: must be a table"),
    ("models = 1", "[models]: must be a table"),
    ("[models]\nm = 1", '[models."m"]: must be a table'),
    ("[reserve]\nshaer = 0.5", '[reserve] shaer: is not a known field; did you mean "share"?'),
    ("[reserve]\nshare = 0", "[reserve] share: must be more than 0"),
    ("[reserve]\nshare = 1.0001", "[reserve] share: must be at most 1"),
    ("[reserve]\nshare = nan", "[reserve] share: must be a finite number"),
    ("[reserve]\nshare = true", "[reserve] share: must be a number"),
    ("[reserve]\nslice_tokens = 0", "[reserve] slice_tokens: must be at least 1"),
    ("[reserve]\nslice_tokens = 99999999999", "[reserve] slice_tokens: must be at most 1000000000"),
    ("[reserve]\nslice_tokens = [1]", "[reserve] slice_tokens: must be a whole number"),
    ("[reserve]\nmin_output_tokens = -1", "[reserve] min_output_tokens: must be at least 1"),
    ("[reserve]\nlease_seconds = 0", "[reserve] lease_seconds: must be at least 1"),
    ("[reserve]\nlease_seconds = 86401", "[reserve] lease_seconds: must be at most 86400"),
    ("[reserve]\nlease_seconds = true", "[reserve] lease_seconds: must be a number"),
    ("[reserve]\nimage_tokens = -1", "[reserve] image_tokens: must be at least 0"),
    ("[reserve]\nfile_tokens = 0.5", "[reserve] file_tokens: must be a whole number"),
    ('[reserve]\ntool_tokens = "many"', "[reserve] tool_tokens: must be a whole number"),
    ('[reserve]\nclamp = "maybe"', '[reserve] clamp: must be "unset", "always" or "never"'),
    ("[metering]\nmax_body_bytes = 0", "[metering] max_body_bytes: must be at least 1"),
    ('[metering]\non_disconnect = "x"', '[metering] on_disconnect: must be "cancel" or "drain"'),
    ("[metering]\nsse_comment = 2", "[metering] sse_comment: must be true or false"),
    ("[metering]\nunknown_models = 1", "[metering] unknown_models: must be a string"),
    ("[credits]\nsignup_grant = -1", "[credits] signup_grant: is negative (-1)"),
    (
        "[credits]\nsignup_grant = 1e12",
        "[credits] signup_grant: 1E+12 credits is more than an account can hold",
    ),
    ('[ledger]\nurl = ""', "[ledger] url: is empty"),
    ('[metrics]\nbind = "9464"', '[metrics] bind: must be "HOST:PORT"'),
    ('[metrics]\nbind = "::1:70000"', '[metrics] bind: must be "HOST:PORT"'),
    ('[admin]\ntokens = "x"', "[admin] tokens: must be a list"),
    ('[admin]\ntokens = [""]', "[admin] tokens[0]: it is empty"),
    ("[admin]\ntokens = [1]", "[admin] tokens[0]: must be a string"),
    ('[redis]\nurl = "http://x"', "[redis] url: must begin with redis://, rediss:// or unix://"),
    ('[redis]\nurl = "unix://"', "[redis] url: has no host or path"),
    # What would change what is enforced, and is not there yet, is never silently ignored.
    ('[redis]\nurl = "redis+cluster://a:1"', "[redis] url: redis+cluster:// is not available yet"),
    ('[redis]\nurl = "redis+sentinel://a:1"', "[redis] url: redis+sentinel:// is not available yet"),
    ('[redis]\non_redis_failure = "open"', '[redis] on_redis_failure: "open" is not available yet'),
    ("[limits]\nenabled = true", "[limits] enabled: limits are not available yet"),
]

BAD_UPSTREAMS = [
    ("", "base_url: is required"),
    ('base_url = "api.openai.com/v1"', "base_url: must begin with http:// or https://"),
    ('base_url = "ftp://x/v1"', "base_url: must begin with http:// or https://"),
    ('base_url = "https:///v1"', "base_url: has no host"),
    ('base_url = "https://x"', "base_url: must end in /v1"),
    ('base_url = "https://x/v1/chat"', "base_url: must end in /v1"),
    ('base_url = "https://x/openaiv1"', "base_url: must end in /v1"),
    ('base_url = "https://x/v1?a=1"', "base_url: must not hold a query or a fragment: use query = {...}"),
    ('base_url = "https://x/v1#a"', "base_url: must not hold a query or a fragment: use query = {...}"),
    ('base_url = "https://u:hush@x/v1"', "base_url: must not hold a user name or password: use api_key"),
    ('base_url = "https://x:99999/v1"', "base_url: is not a URL"),
    ('base_url = "https://x:0/v1"', "base_url: has no valid port"),
    ('base_url = "https://x y/v1"', "base_url: holds a blank or a character that a URL can't carry"),
    ('base_url = "https://[x/v1"', "base_url: is not a URL"),
    ('auth = "basic"', 'auth: must be "bearer", "x-api-key", "api-key" or "none"'),
    ('api_key = "env:"', "api_key: environment variable  is not set"),
    ('api_key = "env:ABSENT"', "api_key: environment variable ABSENT is not set"),
    ('api_key = "env:EMPTY"', "api_key: environment variable EMPTY is empty"),
    ('api_key = "env:BROKEN"', "api_key: environment variable BROKEN holds a blank or a character"),
    ('api_key = "hush hush"', "api_key: it holds a blank or a character that a header can't carry"),
    ("api_key = 7", "api_key: must be a string"),
    ("timeout_seconds = 0", "timeout_seconds: must be more than 0"),
    ("timeout_seconds = inf", "timeout_seconds: must be"),
    ("timeout_seconds = nan", "timeout_seconds: must be"),
    ("timeout_seconds = true", "timeout_seconds: must be a number"),
    ('max_tokens_field = "x"', 'max_tokens_field: must be "max_completion_tokens" or "max_tokens"'),
    ('headers = {"a b" = "c"}', "is not a header name"),
    ('headers = {Content-Length = "1"}', "Content-Length: belongs to the connection and can't be set"),
    ('headers = {a = "x\\ny"}', "a: holds a character that a header can't carry"),
    ("query = {a = 1}", "a: must be a string"),
    ("stateful = true", "stateful: is not available yet"),
]


class TestSettings:
    @pytest.mark.parametrize(("text", "fault"), BAD_SETTINGS)
    def test_faults(self, tmp_path: Path, text: str, fault: str) -> None:
        assert faults_of(tmp_path, text) == [fault]

    @pytest.mark.parametrize(("line", "fault"), BAD_UPSTREAMS)
    def test_faults_of_an_upstream(self, tmp_path: Path, line: str, fault: str) -> None:
        good = "" if "base_url" in line or not line else 'base_url = "https://x/v1"\n'
        environ = {"EMPTY": "", "BROKEN": "hush\n"}
        (found,) = faults_of(tmp_path, f"[upstreams.u]\n{good}{line}", environ)
        assert found.startswith("[upstreams.u") and fault in found
        assert "hush" not in found

    @pytest.mark.parametrize(
        "url", ["redis://", "rediss://x:6380/1", "unix:///run/valkey.sock", "redis://:pw@[::1]:6379"]
    )
    def test_redis_urls(self, tmp_path: Path, url: str) -> None:
        text = f'[redis]\nurl = "{url}"'
        if url == "redis://":
            assert faults_of(tmp_path, text) == ["[redis] url: has no host or path"]
        else:
            assert load_config(write(tmp_path, text), environ={}).redis.url == url

    @pytest.mark.parametrize("seconds", ["0.5", "86400"])
    def test_timeouts_may_be_fractions(self, tmp_path: Path, seconds: str) -> None:
        text = f'[upstreams.u]\nbase_url = "http://x/v1"\ntimeout_seconds = {seconds}'
        assert load_config(write(tmp_path, text), environ={}).upstreams["u"].timeout_seconds == float(seconds)

    def test_all_faults_are_listed(self, tmp_path: Path) -> None:
        text = """
        data_dir = 1
        [reserve]
        lease_seconds = 0
        share = 2
        [upstreams.u]
        base_url = "x"
        api_key = "env:ABSENT"
        [models.a]
        type = "chat"
        input_per_1k = -1
        output_per_1k = nan
        per_minute = 1
        aliases = ["b"]
        upstream = "v"
        [models.b]
        type = "chat"
        """
        assert faults_of(tmp_path, text) == [
            "data_dir: must be a path",
            "[upstreams.u] base_url: must begin with http:// or https://",
            "[upstreams.u] api_key: environment variable ABSENT is not set",
            "[reserve] share: must be at most 1",
            "[reserve] lease_seconds: must be at least 1",
            '[models."a"] input_per_1k: is negative (-1)',
            '[models."a"] output_per_1k: NaN is not a finite number of credits',
            '[models."a"] per_minute: does not fit type "chat"',
            '[models."b"]: has no price (free = true if it really is free)',
            '[models."a"] aliases[0]: "b" is the name of a model',
            '[models."a"] upstream: there is no [upstreams.v]',
        ]

    def test_a_secret_never_reaches_an_error(self, tmp_path: Path) -> None:
        text = '[upstreams.u]\nbase_url = "x"\napi_key = ["hush"]\n[admin]\ntokens = [{hush = "hush"}]'
        path = write(tmp_path, text)
        with pytest.raises(ConfigError) as caught:
            load_config(path, environ={})
        assert "hush" not in str(caught.value)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
        with pytest.raises(ValidationError) as direct:
            UpstreamConfig(base_url="x", api_key=["hush"])
        assert "hush" not in str(direct.value)


class TestEnvironment:
    def test_fields_of_tables(self, tmp_path: Path) -> None:
        environ = {
            "LLMHUB_METER__DATA_DIR": "elsewhere",
            "LLMHUB_METER__REDIS__URL": "unix:///run/x.sock",
            "LLMHUB_METER__RESERVE__SHARE": "0.5",
            "LLMHUB_METER__RESERVE__LEASE_SECONDS": "30",
            "LLMHUB_METER__METERING__STRICT": "true",
            "LLMHUB_METER__CREDITS__SIGNUP_GRANT": "12.5",
            "LLMHUB_METER__UPSTREAMS__OPENAI__API_KEY": "env:OTHER",
            "LLMHUB_METER__UPSTREAMS__OPENAI__HEADERS": '{"anthropic-version": "2023-06-01"}',
            "LLMHUB_METER__UPSTREAMS__OPENAI__TIMEOUT_SECONDS": "5",
            "LLMHUB_METER__ADMIN__TOKENS": '["one", "env:OTHER"]',
            "OTHER": "sk-other",
            "LLMHUB_METER_UNRELATED": "x",
        }
        text = '[reserve]\nshare = 0.1\nslice_tokens = 7\n[upstreams.openai]\nbase_url = "http://x/v1"'
        config = load_config(write(tmp_path, text), environ=environ)
        assert config.data_dir == tmp_path / "elsewhere"
        assert config.redis.url == "unix:///run/x.sock"
        assert config.reserve.share == Decimal("0.5")
        assert (config.reserve.lease_seconds, config.reserve.slice_tokens) == (30, 7)
        assert config.metering.strict is True
        assert config.credits.signup_grant == 125_000
        openai = config.upstreams["openai"]
        assert openai.api_key is not None and openai.api_key.get_secret_value() == "sk-other"
        assert openai.headers == {"anthropic-version": "2023-06-01"} and openai.timeout_seconds == 5
        assert [token.get_secret_value() for token in config.admin.tokens] == ["one", "sk-other"]

    def test_without_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        environ = {
            "LLMHUB_METER__UPSTREAMS__LOCAL__BASE_URL": "http://x/v1",
            "LLMHUB_METER__MODELS": '{"m-1": {"type": "chat", "input_per_1k": 0.1, "output_per_1k": "0.2"}}',
            "LLMHUB_METER__MODELS__M_1__OUTPUT_PER_1K": "0.3",
            "LLMHUB_METER__MODELS__M_1__MAX_OUTPUT_TOKENS": "99",
        }
        config = load_config(None, environ=environ)
        assert config.default_upstream == "local"
        model = config.models["m-1"]
        assert (model.input_per_1k, model.output_per_1k, model.max_output_tokens) == (1_000, 3_000, 99)

    def test_every_setting_can_be_given(self, tmp_path: Path) -> None:
        """Each scalar field of the file, moved to the environment, means the same."""
        path = write(tmp_path, SETTINGS)
        expected = load_config(path, environ=ENVIRON)
        environ, table = dict(ENVIRON), ""
        for line in SETTINGS.splitlines():
            if line.startswith("["):
                table = line.strip("[]").replace(".", "__").upper() + "__"
            elif line:
                field, value = line.split(" = ", 1)
                if value.startswith("{"):
                    value = re.sub(r"([a-z-]+) = ", r'"\1": ', value)
                environ[f"LLMHUB_METER__{table}{field.upper()}"] = (
                    value if value[0] in "{[" else value.strip('"')
                )
        environ |= {"LLMHUB_METER__DATA_DIR": "data"}
        reached = load_config(write(tmp_path, "[upstreams.openai]\n[upstreams.local]"), environ=environ)
        assert reached == expected

    @pytest.mark.parametrize(
        ("variable", "value", "fault"),
        [
            ("RESERVE__SHAER", "1", '[reserve] shaer: is not a known field; did you mean "share"?'),
            ("RESERVE__SHARE", "much", "[reserve] share: must be a number"),
            ("RESERVE__LEASE_SECONDS", "1.5", "[reserve] lease_seconds: must be a whole number"),
            ("METERING__STRICT", "perhaps", "[metering] strict: must be true or false"),
            ("LIMITS__ENABLED", "true", "[limits] enabled: limits are not available yet"),
            ("LIMITS__ENABLED", "1", "[limits] enabled: limits are not available yet"),
            ("REDIS__ON_REDIS_FAILURE", "open", '[redis] on_redis_failure: "open" is not available yet'),
            ("MODELS__GPT_4O__INPUT_PER_1K", "-1", '[models."gpt-4o"] input_per_1k: is negative (-1)'),
            ("MODELS__GPT_4O__FREE", "true", None),
            ("ADMIN__TOKENS", "hush", "must be JSON: a list or a table"),
            ("UPSTREAMS", "{", "must be JSON: a list or a table"),
            ("RESERVE", "1", "[reserve]: must be a table"),
            ("RESERVE__", "1", "must be LLMHUB_METER__TABLE__FIELD"),
            ("", "1", "must be LLMHUB_METER__TABLE__FIELD"),
            ("DATA_DIR__X", "1", "data_dir is not a table"),
            ("MODELS__A_B__FREE", "true", "A_B may be any of a-b, a.b"),
        ],
    )
    def test_a_fault_names_the_variable(
        self, tmp_path: Path, variable: str, value: str, fault: str | None
    ) -> None:
        model = 'type = "chat"\ninput_per_1k = 1\noutput_per_1k = 1\n'
        text = f'data_dir = "d"\n[models."gpt-4o"]\n{model}[models."a-b"]\n{model}[models."a.b"]\n{model}'
        name = f"LLMHUB_METER__{variable}"
        found = faults(write(tmp_path, text), {name: value})
        if fault is None:
            assert len(found) == 2 and all(
                "is a price, but the model is free = true" in line for line in found
            )
        else:
            assert found == [f"{name}: {fault}"]

    def test_the_process_environment_is_not_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(os.environ, "LLMHUB_METER__RESERVE__SLICE_TOKENS", "5")
        assert load_config(write(tmp_path, ""), environ={}).reserve.slice_tokens == 1000
