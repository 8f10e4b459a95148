"""Content codings of RFC 9110, 8.4.1: gzip, deflate, br (RFC 7932), zstd (RFC 8878), and lists of them."""

import sys
import zlib
from typing import Protocol

import brotli

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_CODINGS = 3
"""Codings over one another; more are nobody's honest answer."""
_PIECE = 1 << 20


class Undecodable(Exception):
    """A coding that is not known, bytes that are not in it, or more than the limit in clear."""


class TooLarge(Undecodable):
    """More than the limit in clear."""


class Decoder:
    """Decodes one body piece by piece, at most `limit` bytes of it."""

    def __init__(self, coding: bytes, limit: int) -> None:
        """`coding` is the header's value. Raises Undecodable."""
        names = [name.strip().lower() for name in coding.split(b",")]
        names = [name for name in names if name not in (b"", b"identity")]
        if len(names) > MAX_CODINGS:
            raise Undecodable("too many content codings")
        # The one applied last stands last, and is undone first.
        self._steps = [_step(name) for name in reversed(names)]
        self._left = limit

    def feed(self, data: bytes) -> bytes:
        """What these bytes say in clear. Raises Undecodable."""
        for step in self._steps:
            data = self._through(step, data)
        return data

    def _through(self, step: "_Step", data: bytes) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            try:
                part = step.decode(data, _PIECE)
            except (zlib.error, brotli.error, zstd.ZstdError, EOFError) as error:
                raise Undecodable(str(error)) from None
            size += len(part)
            if size > self._left:
                raise TooLarge("more than the limit in clear")
            parts.append(part)
            data = b""
            if not step.more:
                break
        # Each step is held to the limit by itself; the last one counts for the whole body.
        if step is self._steps[-1]:
            self._left -= size
        return b"".join(parts)


def decoded(body: bytes, coding: bytes, limit: int) -> bytes:
    """A whole body in clear. Raises Undecodable, TooLarge."""
    return Decoder(coding, limit).feed(body)


class _Step(Protocol):
    more: bool
    """Whether there is more to come out of what was given already."""

    def decode(self, data: bytes, most: int) -> bytes: ...


class _Zlib:
    """gzip (several members too) and deflate, with the zlib wrapper or, as some send it, without."""

    def __init__(self, *, gzip: bool) -> None:
        self._gzip = gzip
        self._inner = zlib.decompressobj(zlib.MAX_WBITS + (16 if gzip else 0))
        self._begun = False
        self._waiting = b""
        self.more = False

    def decode(self, data: bytes, most: int) -> bytes:
        data = self._waiting + data
        self._waiting = b""
        if self._inner.eof:
            if not self._gzip or not data:
                self.more = False
                return b""
            self._inner = zlib.decompressobj(zlib.MAX_WBITS + 16)
        if not self._begun and data:
            self._begun = True
            if not self._gzip and not _is_zlib(data):
                self._inner = zlib.decompressobj(-zlib.MAX_WBITS)
        found = self._inner.decompress(data, most)
        self._waiting = self._inner.unconsumed_tail
        if self._inner.eof:
            # After a gzip member only another one may follow; padding is none.
            rest = self._inner.unused_data
            self._waiting = rest if rest[:1] == b"\x1f" else b""
        self.more = bool(self._waiting) or len(found) == most
        return found


class _Brotli:
    def __init__(self) -> None:
        self._inner = brotli.Decompressor()
        self.more = False

    def decode(self, data: bytes, most: int) -> bytes:
        found: bytes = self._inner.process(data, output_buffer_limit=most)
        # It keeps output back without saying so: only nothing says that there is nothing.
        self.more = bool(found)
        return found


class _Zstd:
    def __init__(self) -> None:
        self._inner = zstd.ZstdDecompressor()
        self._waiting = b""
        self.more = False

    def decode(self, data: bytes, most: int) -> bytes:
        data = self._waiting + data
        self._waiting = b""
        if self._inner.eof:
            if not data:
                self.more = False
                return b""
            self._inner = zstd.ZstdDecompressor()
        found: bytes = self._inner.decompress(data, most)
        if self._inner.eof:
            self._waiting = self._inner.unused_data
        self.more = bool(self._waiting) or not (self._inner.eof or self._inner.needs_input)
        return found


def _step(name: bytes) -> _Step:
    match name:
        case b"gzip" | b"x-gzip":
            return _Zlib(gzip=True)
        case b"deflate":
            return _Zlib(gzip=False)
        case b"br":
            return _Brotli()
        case b"zstd":
            return _Zstd()
    raise Undecodable("a content coding that is not known")


def _is_zlib(data: bytes) -> bool:
    """Whether the data begin like zlib's wrapper (RFC 1950: deflate, and a multiple of 31)."""
    return data[0] & 15 == 8 and (len(data) < 2 or (data[0] * 256 + data[1]) % 31 == 0)
