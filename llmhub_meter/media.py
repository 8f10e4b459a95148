"""How long a sound file plays, read from its own headers: exact seconds, or a bound from its size."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

SLOWEST_BYTES_PER_SECOND = 1000
"""8 kbit/s, below any usual speech coding: a file of unknown form plays no longer than this makes it."""
MAX_SECONDS = 10**6
MAX_STEPS = 1_000_000
"""Frames, pages or boxes that are looked at."""


@dataclass(frozen=True, slots=True)
class Length:
    """The length of a sound file."""

    seconds: Fraction
    estimated: bool = False
    """Not read from the file but bounded from its size."""


def length(data: bytes) -> Length:
    """How long a file plays. Never raises: what it can't read it estimates from its bytes, rather high."""
    for reader in _READERS:
        try:
            seconds = reader(data)
        except (struct.error, IndexError, ZeroDivisionError, ValueError):
            continue
        if seconds is not None and 0 < seconds <= MAX_SECONDS:
            return Length(seconds)
    return Length(Fraction(len(data), SLOWEST_BYTES_PER_SECOND), estimated=True)


def _wav(data: bytes) -> Fraction | None:
    if data[:4] not in (b"RIFF", b"RF64") or data[8:12] != b"WAVE":
        return None
    at, rate = 12, 0
    for _ in range(1000):
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind == b"fmt ":
            coding, _, frequency, rate, block, _ = struct.unpack_from("<HHIIHH", data, at + 8)
            if coding in (1, 3, 0xFFFE):
                # The rate of plain samples follows from their size; what the header says may be wrong.
                rate = frequency * block
        elif kind == b"data":
            # A recorder that streams writes no size, or the largest.
            left = len(data) - at - 8
            return Fraction(left if size == 0 else min(size, left), rate)
        at += 8 + size + size % 2
    return None


def _flac(data: bytes) -> Fraction | None:
    if data[:4] != b"fLaC" or data[4] & 0x7F:
        return None
    packed = int.from_bytes(data[18:26], "big")
    rate, samples = packed >> 44, packed & ((1 << 36) - 1)
    return Fraction(samples, rate)


def _ogg(data: bytes) -> Fraction | None:
    if data[:4] != b"OggS":
        return None
    head = data[:512]
    if (found := head.find(b"OpusHead")) >= 0:
        rate, skipped = 48000, struct.unpack_from("<H", data, found + 10)[0]
    elif (found := head.find(b"\x01vorbis")) >= 0:
        rate, skipped = struct.unpack_from("<I", data, found + 12)[0], 0
    else:
        return None
    at, last, total = 0, 0, 0
    for _ in range(MAX_STEPS):
        if data[at : at + 4] != b"OggS":
            break
        flags, granule = struct.unpack_from("<Bq", data, at + 5)
        if flags & 2:
            # Files may stand one after another: each begins at 0.
            total, last = total + max(0, last - skipped), 0
        last = max(last, granule)
        segments = data[at + 26]
        at += 27 + segments + sum(data[at + 27 : at + 27 + segments])
    return Fraction(total + max(0, last - skipped), rate)


def _mp4(data: bytes) -> Fraction | None:
    if data[4:8] != b"ftyp":
        return None
    box = _box(data, 0, len(data), b"moov")
    found = None if box is None else _box(data, *box, b"mvhd")
    if found is None:
        return None
    at = found[0]
    if data[at] == 1:
        scale, duration = struct.unpack_from(">IQ", data, at + 20)
    else:
        scale, duration = struct.unpack_from(">II", data, at + 12)
    return Fraction(duration, scale)


def _box(data: bytes, at: int, end: int, wanted: bytes) -> tuple[int, int] | None:
    """Where the content of a box begins and ends."""
    for _ in range(10_000):
        if at + 8 > end:
            return None
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            size, head = struct.unpack_from(">Q", data, at + 8)[0], 16
        elif size == 0:
            size = end - at
        if size < head:
            return None
        if kind == wanted:
            return at + head, min(end, at + size)
        at += size
    return None


def _webm(data: bytes) -> Fraction | None:
    """The Duration of a Segment's Info, where a recorder wrote one: a float, in units of TimestampScale."""
    if data[:4] != b"\x1a\x45\xdf\xa3":
        return None
    head = data[:65536]
    info = head.find(b"\x15\x49\xa9\x66")
    at = head.find(b"\x44\x89", info + 4) if info >= 0 else -1
    if at < 0 or at > info + 1000:
        return None
    scale_at = head.find(b"\x2a\xd7\xb1", info, info + 1000)
    scale = 1_000_000
    if scale_at >= 0:
        size = head[scale_at + 3] & 0x7F
        scale = int.from_bytes(head[scale_at + 4 : scale_at + 4 + size], "big")
    form = {0x84: ">f", 0x88: ">d"}.get(head[at + 2])
    if form is None:
        return None
    try:
        units = Fraction(struct.unpack_from(form, head, at + 3)[0])
    except OverflowError:
        return None
    return units * scale / 10**9


_MP3_KBITS = {
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def _mp3(data: bytes) -> Fraction | None:
    """The sum of all frames, so that a changing bit rate needs no table of its own."""
    at = 0
    while data[at : at + 3] == b"ID3":
        seven = data[at + 6 : at + 10]
        at += 10 + (seven[0] << 21 | seven[1] << 14 | seven[2] << 7 | seven[3])
    first = _mp3_frame(data, at)
    if first is None or (at + first[0] < len(data) and _mp3_frame(data, at + first[0]) is None):
        return None
    size, samples, rate = first
    if any(mark in data[at : at + min(size, 200)] for mark in (b"Xing", b"Info", b"VBRI")):
        # It tells of the others and plays nothing itself.
        at += size
    total: dict[int, int] = {}
    for _ in range(MAX_STEPS):
        frame = _mp3_frame(data, at)
        if frame is None:
            break
        size, samples, rate = frame
        total[rate] = total.get(rate, 0) + samples
        at += size
    left = len(data) - at
    if left > 4096 and data[at : at + 3] not in (b"TAG", b"APE"):
        # More than a tag is left unread: the bound from the size is safer.
        return None
    return sum((Fraction(samples, rate) for rate, samples in total.items()), Fraction())


def _mp3_frame(data: bytes, at: int) -> tuple[int, int, int] | None:
    """Bytes, samples and rate of the frame that begins here."""
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE0 != 0xE0:
        return None
    version, layer = data[at + 1] >> 3 & 3, 4 - (data[at + 1] >> 1 & 3)
    kbits_at, rate_at, padding = data[at + 2] >> 4, data[at + 2] >> 2 & 3, data[at + 2] >> 1 & 1
    if version == 1 or layer == 4 or kbits_at in (0, 15) or rate_at == 3:
        return None
    generation = 1 if version == 3 else 2
    bits, rate = _MP3_KBITS[generation, layer][kbits_at] * 1000, _MP3_RATES[version][rate_at]
    if layer == 1:
        return (12 * bits // rate + padding) * 4, 384, rate
    samples = 576 if layer == 3 and generation == 2 else 1152
    return samples // 8 * bits // rate + padding, samples, rate


_READERS: tuple[Callable[[bytes], Fraction | None], ...] = (_wav, _flac, _ogg, _mp4, _webm, _mp3)
