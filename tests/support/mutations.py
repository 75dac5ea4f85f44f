"""Seeded damage to files: bytes, JSON values, safetensors headers and tensors, and what stands in a file's place."""

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

_DEEP: Any = []
for _ in range(300):
    _DEEP = [_DEEP]
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 10**18, 2**63, 2**64, -(2**80), 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), float("-inf"), "", " ", "a", "auto", "..", "../../etc/passwd", "/etc/passwd", "~root", ".ssh",
    "a/b", "a\\b", "a\0b", "two\nlines", "\x1b[31m", "\ud800", "\u2028", "9" * 5000, "12", "-1", "x" * 100_000, [], {},
    [[]], [None], [1, "a"], {"a": 1}, {"": {}}, {"enabled": "maybe"}, ["x"] * 1000, _DEEP,
)  # fmt: skip
_WORDS = ("name", "text", "label", "task", "head", "idx", "stage", "format", "x" * 500, "", "\n", "__class__", "..")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every part of a JSON value."""
    found, front = [], [value]
    while front:
        whole = front.pop()
        keys = list(whole) if isinstance(whole, dict) else range(len(whole)) if isinstance(whole, list) else ()
        for key in keys:
            found.append((whole, key))
            front.append(whole[key])
    return found


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()  # NaN and Infinity as Python spells them, lone surrogates escaped


def change_value(value: Any, draw: random.Random) -> Any:
    """A JSON value with one to three parts deleted, renamed, retyped, moved or copied."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = _places(value)
        if not places or draw.random() < 0.03:
            return copy.deepcopy(draw.choice(ODD))
        whole, key = draw.choice(places)
        how = draw.choice(("delete", "rename", "retype", "retype", "retype", "copy"))
        if how == "delete":
            del whole[key]
        elif how == "rename" and isinstance(whole, dict):
            whole[draw.choice(_WORDS)] = whole.pop(key)
        elif how == "copy":
            other, place = draw.choice(places)
            if place in other if isinstance(other, dict) else place < len(other):
                whole[key] = copy.deepcopy(other[place])
        else:
            whole[key] = copy.deepcopy(draw.choice(ODD))
    return value


def change_json(content: bytes, draw: random.Random) -> bytes:
    """A JSON text with other parts, or with a key twice."""
    value = json.loads(content)
    if draw.random() < 0.1 and isinstance(value, dict) and value:
        key = draw.choice(list(value))
        return b"{" + _dumped(key) + b": " + _dumped(draw.choice(ODD)) + b", " + content.strip()[1:]
    return _dumped(change_value(value, draw))


def change_lines(content: bytes, draw: random.Random) -> bytes:
    """A jsonl text, one of its lines changed."""
    lines = content.split(b"\n")
    place = draw.choice([number for number, line in enumerate(lines) if line.strip()])
    lines[place] = change_json(lines[place], draw)
    return b"\n".join(lines)


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Damage that knows no format."""
    at = draw.randrange(len(content) + 1)
    upto = draw.randrange(at, len(content) + 1)
    odd = draw.choice((b"\0", b"\xff\xfe", b"\xc3(", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"[" * 2000, b"1" * 5000, b"{}",
                       b"\r\n", b"\x80\x04\x95", b"NaN", b"\\ud800"))  # fmt: skip
    flipped = bytearray(content)
    for _ in range(draw.randrange(1, 9)):
        if flipped:
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return draw.choice((
        bytes(flipped), bytes(flipped), content[:at], content[at:], content[:at] + content[upto:], b"",
        content[:at] + odd + content[at:], content[:upto] + content[at:], b"\xef\xbb\xbf" + content,
        content.replace(b"\n", b"\r\n"), content.decode("latin-1").encode("utf-16"), content + content,
    ))  # fmt: skip


_ODD_LENGTHS = (0, 1, 7, 2**20 + 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1)
_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "X")
_SHAPES = ([], [0], [1], [4], [0, 32], [2**62, 4], [2**32, 2**32], [-1, 2], [1 << 20, 1 << 20], [1] * 70, [32, 4])


def change_tensors(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header length, header, shape, dtype or values."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    how = draw.choice(("length", "json", "shape", "dtype", "values", "values", "name", "extra", "grow", "long"))
    name = draw.choice([key for key in header if key != "__metadata__"])
    if how == "length":
        return draw.choice(_ODD_LENGTHS).to_bytes(8, "little") + content[8:]
    if how == "json":
        header = change_value(header, draw)
    elif how == "shape":
        header[name]["shape"] = draw.choice(_SHAPES)
    elif how == "dtype":
        header[name]["dtype"] = draw.choice(_DTYPES)
    elif how == "values":
        begin, end = header[name]["data_offsets"]
        at = begin + 4 * draw.randrange((end - begin) // 4)
        odd = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\0\0\x80\xbf")
        data[at : at + 4] = draw.choice(odd)
    elif how == "name":
        header[draw.choice(_WORDS)] = header.pop(name)
    elif how == "extra":
        header[draw.choice(_WORDS)] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        data += b"\0" * 4
    elif how == "grow":
        header[name]["shape"][:1] = [100_000]
    else:
        header["__metadata__"] = {"x": "y" * (1 << 20)}
    text = _dumped(header)
    return len(text).to_bytes(8, "little") + text + bytes(data)


def replace_file(file: Path, draw: random.Random) -> str:
    """Something else in a file's place; returns what."""
    how = draw.choice(("folder", "loop", "dangling", "pipe", "absent", "device", "sparse"))
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "dangling":
        file.symlink_to("nothing-here")
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "device":
        file.symlink_to("/dev/zero")
    elif how == "sparse":  # a tebibyte that takes no room
        with file.open("wb") as handle:
            handle.truncate(1 << 40)
    return how


FORMATS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": change_json, ".jsonl": change_lines, ".safetensors": change_tensors, ".csv": change_bytes,
}  # fmt: skip


def damage(file: Path, draw: random.Random) -> str:
    """Damages one file by its format, its bytes or its place in the folder; returns how, in a word."""
    way = draw.random()
    if way < 0.07:
        return replace_file(file, draw)
    change = FORMATS[file.suffix] if way < 0.75 else change_bytes
    file.write_bytes(change(file.read_bytes(), draw))
    return change.__name__
