"""How long sound files play."""

import io
import struct
import wave
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmhub_meter import media


def wav(seconds: float, rate: int = 8000) -> bytes:
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(bytes(2 * int(rate * seconds)))
    return held.getvalue()


def mp3(frames: int, head: bytes = b"") -> bytes:
    # 128 kbit/s at 44.1 kHz: 417 bytes and 1,152 samples a frame.
    frame = b"\xff\xfb\x90\x00".ljust(417, b"\0")
    return head + frame * frames


def flac(samples: int, rate: int) -> bytes:
    packed = (rate << 44 | 1 << 41 | 15 << 36 | samples).to_bytes(8, "big")
    return b"fLaC\x80\0\0\x22" + bytes(10) + packed + bytes(16)


def page(granule: int, body: bytes, flags: int = 0) -> bytes:
    return b"OggS\0" + struct.pack("<Bq", flags, granule) + bytes(12) + bytes([1, len(body)]) + body


def opus(granule: int) -> bytes:
    head = b"OpusHead\x01\x01" + struct.pack("<HIHB", 312, 48000, 0, 0)
    return page(0, head, 2) + page(0, b"OpusTags") + page(granule, bytes(20), 4)


def vorbis(granule: int) -> bytes:
    return page(0, b"\x01vorbis" + struct.pack("<IBI", 0, 1, 44100), 2) + page(granule, bytes(20), 4)


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def mp4(duration: int, scale: int, version: int = 0) -> bytes:
    times = struct.pack(">QQIQ" if version else ">IIII", 0, 0, scale, duration)
    head = box(b"mvhd", bytes([version, 0, 0, 0]) + times + bytes(80))
    return box(b"ftyp", b"M4A \0\0\0\0") + box(b"mdat", bytes(100)) + box(b"moov", head)


def webm(milliseconds: float) -> bytes:
    info = b"\x2a\xd7\xb1\x83\x0f\x42\x40\x44\x89\x88" + struct.pack(">d", milliseconds)
    return b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\xff\x15\x49\xa9\x66\x95" + info


@pytest.mark.parametrize(
    ("data", "seconds"),
    [
        (wav(13), Fraction(13)),
        (wav(0.5, 44100), Fraction(1, 2)),
        (mp3(100), Fraction(115200, 44100)),
        (mp3(100, b"ID3\x04\0\0\0\0\0\x0a" + bytes(10)), Fraction(115200, 44100)),
        (b"\xff\xfb\x90\0Xing".ljust(417, b"\0") + mp3(10), Fraction(11520, 44100)),
        (flac(44100 * 3 + 1, 44100), Fraction(44100 * 3 + 1, 44100)),
        (opus(48312), Fraction(1)),
        (vorbis(44100), Fraction(1)),
        (mp4(3500, 1000), Fraction(7, 2)),
        (mp4(3500, 1000, 1), Fraction(7, 2)),
        (webm(2500), Fraction(5, 2)),
    ],
)
def test_lengths(data: bytes, seconds: Fraction) -> None:
    assert media.length(data) == media.Length(seconds)


def test_a_header_that_lies() -> None:
    streamed = bytearray(wav(2))
    streamed[40:44] = b"\xff\xff\xff\xff"
    assert media.length(bytes(streamed)) == media.Length(Fraction(2))
    # A byte rate that would make it short.
    streamed[28:32] = b"\xff\xff\xff\x7f"
    assert media.length(bytes(streamed)) == media.Length(Fraction(2))


@pytest.mark.parametrize("data", [b"", b"hello" * 100, wav(1)[:30], mp4(0, 0), b"fLaC" + bytes(100), b"ID3"])
def test_an_unknown_form_is_bounded_by_its_bytes(data: bytes) -> None:
    assert media.length(data) == media.Length(Fraction(len(data), 1000), estimated=True)


KINDS = [b"", wav(1)[:60], mp3(3), flac(9, 8000), opus(48000), vorbis(9), mp4(9, 9), webm(9), b"ID3"]


@given(st.sampled_from(KINDS), st.binary(max_size=60), st.integers(0, 120))
def test_no_file_raises(start: bytes, junk: bytes, at: int) -> None:
    for data in (start + junk, start[:at] + junk + start[at:], start[:at] + junk + start[at + len(junk) :]):
        assert 0 <= media.length(data).seconds <= media.MAX_SECONDS
