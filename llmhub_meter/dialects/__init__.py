"""API shapes: which one a path speaks. One file each; see `base` for what a dialect is."""

from collections.abc import Iterable
from urllib.parse import unquote

from .base import Answer, Ask, Dialect, Output, Prompt, StreamReader
from .chat import Chat
from .completions import Completions
from .embeddings import Embeddings
from .images import ImageForms, Images
from .messages import CountTokens, Messages
from .moderations import Moderations
from .reported import Reported
from .rerank import Rerank
from .responses import InputTokens, Responses
from .speech import Speech
from .transcriptions import Transcriptions

__all__ = [
    "DIALECTS",
    "Answer",
    "Ask",
    "Dialect",
    "Output",
    "Prompt",
    "Reported",
    "StreamReader",
    "find",
    "misspelled",
]

DIALECTS: tuple[Dialect, ...] = (
    Chat(),
    Completions(),
    CountTokens(),
    Embeddings(),
    ImageForms(),
    Images(),
    InputTokens(),
    Messages(),
    Moderations(),
    Rerank(),
    Responses(),
    Speech(),
    Transcriptions(),
)

PREFIX = "/v1"


def _by_path(dialects: Iterable[Dialect]) -> dict[str, Dialect]:
    return {PREFIX + path: dialect for dialect in dialects for path in dialect.paths}


_FOUND = _by_path(DIALECTS)


def find(path: str) -> Dialect | None:
    """The dialect of a path in exact spelling."""
    return _FOUND.get(path)


def misspelled(path: str) -> bool:
    """Whether a path means a metered call in another spelling.

    Another spelling is what an app's router may still let through: case, doubled or trailing slashes, dots,
    percent-encoding. Such a request must never reach the app unmetered.
    """
    if path in _FOUND:
        return False
    return _plain(path) in _FOUND


def _plain(path: str) -> str:
    for _ in range(4):
        decoded = unquote(path)
        if decoded == path:
            break
        path = decoded
    parts: list[str] = []
    for part in path.replace("\\", "/").casefold().split("/"):
        name = part.split(";")[0].strip()
        if name == "..":
            parts = parts[:-1]
        elif name not in ("", "."):
            parts.append(name)
    return "/" + "/".join(parts)
