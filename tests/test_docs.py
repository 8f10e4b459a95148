"""The docs say what the code has: config fields, errors, headers, commands; links and snippets hold."""

import argparse
import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from llmhub_meter import cli, errors
from llmhub_meter.config import Config, load_config
from llmhub_meter.dialects import DIALECTS, Dialect

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

HEADER = re.compile(r"""["'](x-[a-z-]+|retry-after|www-authenticate|access-control-expose-headers)["']""")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def tables_of(model: type[BaseModel], title: str = "") -> Iterator[tuple[str, list[str]]]:
    """The tables of the config as the page titles them, with the fields of each."""
    own: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from tables_of(annotation, f"`[{name}]`")
        elif inner := [arg for arg in get_args(annotation) if isinstance(arg, type)]:
            found = [each for each in inner if issubclass(each, BaseModel)]
            for each in found:
                key = '"NAME"' if name == "models" else "NAME"
                yield from tables_of(each, f"`[{name}.{key}]`")
            if not found:
                own.append(name)
        else:
            own.append(name)
    yield title or "Top level", own


TABLES = dict(tables_of(Config))


def test_the_config_was_walked() -> None:
    assert set(Config.model_fields) == {"data_dir", *(re.findall(r"\w+", title)[0] for title in TABLES)} - {
        "Top"
    }
    assert "base_url" in TABLES["`[upstreams.NAME]`"]
    assert "per_generation_by" in TABLES['`[models."NAME"]`']
    assert TABLES["Top level"] == ["data_dir"]


@pytest.mark.parametrize("title", TABLES)
def test_every_config_field_has_a_row_in_its_table(title: str) -> None:
    sections = re.split(r"^## ", (REFERENCE / "config.md").read_text(), flags=re.MULTILINE)
    section = next(each for each in sections if each.startswith(title + "\n"))
    rows = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert sorted(rows) == sorted(TABLES[title])


def test_defaults_are_the_written_ones() -> None:
    """Plain defaults stand in the second column as TOML would have them."""
    page = (REFERENCE / "config.md").read_text()
    sections = {each.split("\n", 1)[0]: each for each in re.split(r"^## ", page, flags=re.MULTILINE)}
    checked = 0
    for name in ("reserve", "metering", "limits", "redis", "credits"):
        written = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", sections[f"`[{name}]`"], flags=re.MULTILINE)
        for field, text in written:
            value = tomllib.loads(f"value = {text}")["value"]
            table = getattr(Config(), name).model_dump(mode="json")
            assert str(table[field]) == str(value), f"[{name}] {field}"
            checked += 1
    assert checked >= 14


def api_errors(root: type[errors.ApiError] = errors.ApiError) -> Iterator[type[errors.ApiError]]:
    for each in root.__subclasses__():
        if each.__module__ == errors.__name__:
            if not each.__name__.startswith("_"):
                yield each
            yield from api_errors(each)


@pytest.mark.parametrize("error", [errors.ApiError, *api_errors()], ids=lambda error: error.__name__)
def test_every_error_has_a_row_with_its_status_type_and_code(error: type[errors.ApiError]) -> None:
    code = "none" if error.code is None else f"`{error.code}`"
    row = f"| {error.status} | `{error.type}` | {code} |"
    assert row in (REFERENCE / "http.md").read_text()


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_every_metered_route_has_a_row_with_its_model_types(dialect: Dialect) -> None:
    reference, dialects = (REFERENCE / "http.md").read_text(), (ROOT / "docs" / "dialects.md").read_text()
    for path in dialect.paths:
        row = re.search(rf"^\| `POST /v1{path}` \| ([^|]+) \|", reference, flags=re.MULTILINE)
        assert row is not None, path
        assert set(row[1].split(", ")) == dialect.types
        assert f"`/v1{path}`" in dialects


def headers_sent() -> set[str]:
    """Headers of ours that the source of the answering modules spells."""
    found: set[str] = set()
    for module in ("exchange", "errors", "middleware", "proxy", "replies"):
        source = (ROOT / "llmhub_meter" / f"{module}.py").read_text()
        found |= {name for name in HEADER.findall(source) if not name.endswith("-")}
    found.discard("x-gzip")  # A coding.
    return found


def test_every_header_is_mentioned() -> None:
    sent = headers_sent()
    assert {"x-credits-used", "x-credits-remaining", "x-credits-reserved", "retry-after"} <= sent
    page = (REFERENCE / "http.md").read_text().lower()
    assert not {name for name in sent if name not in page}


def verbs_of(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, set[str]]]:
    """Each verb with the options that it has beside the common ones."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        for name, inner in group.choices.items():
            yield from verbs_of(inner, (*words, name))
    if not groups:
        options = {option for action in parser._actions for option in action.option_strings}
        yield " ".join(words), {option for option in options if option.startswith("--")} - {"--help"}


VERBS = dict(verbs_of(cli._parser()))


def test_the_commands_were_walked() -> None:
    assert {"demo", "serve", "accounts create", "credits refund", "ledger audit"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_a_row_with_its_options(verb: str) -> None:
    page = (REFERENCE / "cli.md").read_text()
    row = next((line for line in page.splitlines() if re.match(rf"\| `{verb}[ `]", line)), None)
    assert row is not None, f"{verb} has no row"
    common = {"--config", "--json"}
    assert common <= VERBS[verb]
    assert not {option for option in VERBS[verb] - common if option not in row}


def test_every_documented_command_is_there() -> None:
    page = (REFERENCE / "cli.md").read_text()
    shown = re.findall(r"^\| `([a-z-]+(?: [a-z]+)?)", page, flags=re.MULTILINE)
    assert set(shown) == {*VERBS, "--version"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors_of(file), f"{target}: there is no such heading"


def anchors_of(page: Path) -> set[str]:
    """The anchors of headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_snippets_parse(page: Path, tmp_path: Path) -> None:
    for language, text in FENCE.findall(page.read_text()):
        if language == "python":
            ast.parse(text)
        elif language == "toml":
            file = tmp_path / "llmhub-meter.toml"
            file.write_text(text)
            config = load_config(file, environ={"OPENAI_API_KEY": "secret", "ANTHROPIC_API_KEY": "secret"})
            assert config.models and config.upstreams


def test_the_readme_has_what_it_promises() -> None:
    languages = [language for language, _ in FENCE.findall((ROOT / "README.md").read_text())]
    assert {"sh", "python", "toml"} <= set(languages)
    for script in ("demo", "test"):
        assert (ROOT / "scripts" / script).exists()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_imports_in_snippets_exist(page: Path) -> None:
    import llmhub_meter

    for language, text in FENCE.findall(page.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "llmhub_meter":
                assert {alias.name for alias in node.names} <= set(llmhub_meter.__all__)


def test_the_changelog_begins_with_what_is_unreleased() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
