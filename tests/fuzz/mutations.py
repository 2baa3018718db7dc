"""Damages to files: of their bytes, and along the structure of their format."""

from __future__ import annotations

import io
import json
import pickletools
import random
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

from anymha.interchange.files.sorted_table import entries
from tests.fuzz.samples import Files
from tests.tensorflow_files import index_of, varint

NUMBERS = (0, 1, 2, 3, 7, 8, 24, 63, 64, 127, 128, 255, 256, 4095, 65535, 65536, 2**24, 2**31 - 1,
           2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
TEXTS = ("", "..", "../../etc/passwd", "/etc/passwd", "\x1b[2J", "a\nb", "a" * 5000, "\0", "é",
         "²", "1²2", "9" * 5000, "F32", "BF16", "<f8", "|O", "|V2", "os", "eval", ".", "/", "a/b",
         "layer.0.self.query.weight", "\ud800", "gzip", "blosc", "zstd")  # fmt: skip
VALUES: tuple[Any, ...] = (*NUMBERS, *TEXTS, -1, 1.5, 1e308, float("nan"), True, None, [], {}, [[]],
                           [0] * 70, {"a": {}}, 10**400)  # fmt: skip


def mutated(files: Files, others: Sequence[Files], rng: random.Random) -> tuple[Files, str]:
    """The files with one of them damaged, and which damages in words."""
    names = list(files)
    name = names[0] if rng.random() < 0.5 else rng.choice(names)
    content, words = files[name], []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        damage = rng.choice(damages_of(name, content))
        another = rng.choice([one for file in others for one in file.values()])
        try:
            content = damage(content, another, rng)
        except Exception:  # the structure is broken already; each library raises its own
            continue
        words.append(damage.__name__)
    return {**files, name: content}, f"{name}: {', '.join(words)}"


Damage = Callable[[bytes, bytes, random.Random], bytes]


def damages_of(name: str, content: bytes) -> list[Damage]:
    """The damages that fit a file."""
    own: list[Damage] = []
    if content[:2] == b"PK":
        own = [zip_member, zip_member, zip_member, zip_header]
    elif content[:4] == b"\x89HDF":
        own = [hdf5_number, hdf5_address, hdf5_chunk]
    elif name.endswith(".index"):
        own = [table_entry, table_entry]
    elif content[:2] == b"\x80\x02":
        own = [pickle_program]
    elif name.endswith(".onnx"):
        own = [protobuf_field, protobuf_field]
    elif name.endswith(".safetensors"):
        own = [safetensors_header, safetensors_header, safetensors_length]
    elif content[:1] == b"{":
        own = [json_value, json_value]
    return [*BYTES, *own, *own, *own]


def flip(content: bytes, another: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def overwrite(content: bytes, another: bytes, rng: random.Random) -> bytes:
    data, size = bytearray(content), rng.choice((1, 2, 4, 8))
    at = rng.randrange(len(data))
    number = rng.choice((*NUMBERS, rng.randrange(len(data)), len(data))) % 2 ** (8 * size)
    data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
    return bytes(data[: max(len(content), 1)])


def truncate(content: bytes, another: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def remove(content: bytes, another: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(content))
    return content[:begin] + content[begin + rng.choice((1, 2, 8, 100)) :]


def repeat(content: bytes, another: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(content))
    span = content[begin : begin + rng.choice((1, 4, 16, 200))]
    return content[:begin] + span * rng.choice((2, 3, 100)) + content[begin:]


def splice(content: bytes, another: bytes, rng: random.Random) -> bytes:
    begin, size = rng.randrange(len(another)), rng.choice((4, 32, 300))
    at = rng.randrange(len(content))
    return content[:at] + another[begin : begin + size] + content[at + size * rng.randrange(2) :]


BYTES: list[Damage] = [flip, overwrite, truncate, remove, repeat, splice]


def changed_json(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A value of JSON with another one somewhere in it."""
    if isinstance(value, (dict, list)) and value and (depth == 0 or rng.random() < 0.9):
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        at = rng.randrange(len(items))
        key, inner = items[at]
        action = rng.random()
        if action < 0.1:
            del items[at]
        elif action < 0.2:
            items.append((rng.choice(TEXTS), inner))
        elif action < 0.3 and isinstance(value, dict):
            items[at] = (rng.choice(TEXTS), inner)
        else:
            items[at] = (key, changed_json(inner, rng, depth + 1))
        return dict(items) if isinstance(value, dict) else [item for _, item in items]
    if isinstance(value, str) and rng.random() < 0.3:
        try:
            return json.dumps(changed_json(json.loads(value), rng))
        except ValueError:
            return value + rng.choice(TEXTS)
    return rng.choice(VALUES)


def json_value(content: bytes, another: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.05:
        return rng.choice((b"[", b'{"a":')) * rng.choice((100, 100_000))
    return json.dumps(changed_json(json.loads(content), rng)).encode("utf-8", "replace")


def safetensors_header(content: bytes, another: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json_value(content[8 : 8 + size], another, rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def safetensors_length(content: bytes, another: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    number = rng.choice((*NUMBERS, size - 1, size + 1, len(content), len(content) - 8)) % 2**64
    return number.to_bytes(8, "little") + content[8:]


def zip_member(content: bytes, another: bytes, rng: random.Random) -> bytes:
    """An archive with a damaged member, whose checksum is right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile, about two members of a name
        members = [(info.filename, old.read(info)) for info in old.infolist()]
        at = rng.randrange(len(members))
        name, inner = members[at]
        if rng.random() < 0.1:
            members[at] = (name + rng.choice(TEXTS[:-4]).replace("\ud800", ""), inner)
        elif rng.random() < 0.05:
            members.append(members[at])
        elif inner:
            members[at] = (name, rng.choice(member_damages(name, inner))(inner, another, rng))
        method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(stream, "w", method) as new:
            for key, inner in members:
                new.writestr(zipfile.ZipInfo(key), inner, method)  # of no time
    return stream.getvalue()


def member_damages(name: str, inner: bytes) -> list[Damage]:
    if name.endswith(".pkl"):
        return [*BYTES, *[pickle_program] * 12]
    if name.endswith(".npy"):
        return [*BYTES, *[npy_header] * 6]
    return damages_of(name, inner)


def zip_header(content: bytes, another: bytes, rng: random.Random) -> bytes:
    """A field of a member's header, of the directory or of its end."""
    marks = [
        m.start()
        for m in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07)", content)
    ]
    at = rng.choice(marks) + rng.choice((4, 6, 8, 10, 14, 16, 18, 20, 22, 24, 26, 28, 30, 42))
    size = rng.choice((2, 4))
    number = rng.choice((*NUMBERS, len(content))) % 2 ** (8 * size)
    return content[:at] + number.to_bytes(size, "little") + content[at + size :]


def npy_header(content: bytes, another: bytes, rng: random.Random) -> bytes:
    size = struct.unpack("<H", content[8:10])[0]
    header = content[10 : 10 + size].decode("latin-1")
    words = re.findall(r"'[^']*'|\d+|True|False|[(),{}:]", header)
    words[rng.randrange(len(words))] = rng.choice(
        (*map(str, NUMBERS), "'<f4'", "'|O'", "'|V2'", "'<U9'", "('f4', 3)", "-1", "True", "()",
         "(1,2,3)", "[('a','f4')]", "(" * 200, "'" + "9" * 50 + "'", "1e5", "None", "")
    )  # fmt: skip
    header = "".join(words).ljust(size)
    version = rng.choice((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\xff\xff"))
    count = struct.pack("<H" if version[:1] == b"\1" else "<I", len(header))
    return content[:6] + version + count + header.encode("latin-1") + content[10 + size :]


OPCODES = [one.code.encode("latin-1") for one in pickletools.opcodes]


def pickle_program(content: bytes, another: bytes, rng: random.Random) -> bytes:
    """Instructions left out, repeated, exchanged, put in, or with another argument."""
    places = [place for _, _, place in pickletools.genops(content)]
    steps = [content[a:b] for a, b in zip(places, [*places[1:], len(content)], strict=True)]
    at, other = rng.randrange(len(steps)), rng.randrange(len(steps))
    action = rng.randrange(7)
    if action == 0:
        del steps[at]
    elif action == 1:
        steps.insert(at, steps[other])
    elif action == 2:
        steps[at], steps[other] = steps[other], steps[at]
    elif action == 3:
        argument = bytes(rng.randrange(256) for _ in range(rng.choice((0, 0, 1, 2, 4))))
        steps.insert(at, rng.choice(OPCODES) + argument)
    elif action == 4:
        steps[at:at] = steps[min(at, other) : max(at, other)] * rng.choice((1, 2, 50))
    elif action == 5:
        number = rng.choice(NUMBERS).to_bytes(9, "little")
        steps[at] = rng.choice((b"\x8a\x09" + number, b"J" + number[:4], b"G" + number[:8], b"N"))
    else:
        text = rng.choice(TEXTS).encode("utf-8", "replace")
        module = rng.choice((b"torch", b"os", b"builtins", b"torch._utils", b"collections"))
        name = b"c" + module + b"\n" + text.replace(b"\n", b"") + b"\n"
        steps[at] = rng.choice((b"X" + struct.pack("<I", len(text)) + text, name))
    return b"".join(steps)


def protobuf_field(content: bytes, another: bytes, rng: random.Random) -> bytes:
    """A field, at some depth: its number, its length or its content; the lengths above fit."""
    parts, at = [], 0
    while at < len(content):
        begin = at
        tag, at = _varint(content, at)
        if tag & 7 == 2:
            length, at = _varint(content, at)
            if at + length > len(content):
                raise ValueError
            parts.append((tag, content[at : at + length]))
            at += length
        elif tag & 7 == 0:
            number, at = _varint(content, at)
            parts.append((tag, number))
        elif tag & 7 == 5 and at + 4 <= len(content):
            parts.append((tag, content[at : at + 4]))
            at += 4
        else:
            raise ValueError(begin)
    where = rng.randrange(len(parts))
    tag, value = parts[where]
    action = rng.random()
    if isinstance(value, bytes) and action < 0.6:
        try:
            parts[where] = (tag, protobuf_field(value, another, rng))
        except (ValueError, IndexError):
            text = rng.choice(TEXTS).encode("utf-8", "replace")
            parts[where] = (
                tag,
                rng.choice((text, value[:-1], value + value, flip(value, b"", rng))),
            )
    elif action < 0.7:
        del parts[where]
    elif action < 0.8:
        parts.insert(where, parts[rng.randrange(len(parts))])
    elif action < 0.9:
        parts[where] = (rng.randrange(1, 20) << 3 | tag & 7, value)
    else:
        parts[where] = (tag & ~7, rng.choice(NUMBERS))
    return b"".join(varint(tag) + _encoded(tag, value) for tag, value in parts)


def _encoded(tag: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(value)
    return value if tag & 7 == 5 else varint(len(value)) + value


def table_entry(content: bytes, another: bytes, rng: random.Random) -> bytes:
    """A key or a value of a checkpoint's index, whose checksums are right."""
    table = entries(content)
    key = rng.choice(list(table))
    value = table[key]
    action = rng.random()
    if action < 0.1:
        del table[key]
    elif action < 0.2:
        table[rng.choice(TEXTS).encode("utf-8", "replace")] = value
    elif action < 0.3:
        table[rng.choice(list(table))] = value
    else:
        damage = protobuf_field if action < 0.8 else rng.choice(BYTES)
        table[key] = damage(value, another, rng)
    return index_of(table)


def _varint(content: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
        if shift > 63:
            raise ValueError


def _blocks(content: bytes) -> list[int]:
    marks = rb"\x89HDF|TREE|SNOD|HEAP|GCOL|OHDR|OCHK|FRHP|FHDB|FADB|FAHD|BTHD|BTLF|EAHD|FSHD"
    return [match.start() for match in re.finditer(marks, content)]


def hdf5_number(content: bytes, another: bytes, rng: random.Random) -> bytes:
    """A number of one of HDF5's blocks."""
    at, size = rng.choice(_blocks(content)) + rng.randrange(4, 160), rng.choice((1, 2, 4, 8))
    number = rng.choice(NUMBERS) % 2 ** (8 * size)
    return content[:at] + number.to_bytes(size, "little") + content[at + size :]


def hdf5_address(content: bytes, another: bytes, rng: random.Random) -> bytes:
    """An address that leads to another block."""
    blocks = _blocks(content)
    addresses = b"|".join(re.escape(struct.pack("<Q", block)) for block in blocks if block)
    stored = [match.start() for match in re.finditer(addresses, content)]
    at = rng.choice(stored)
    return content[:at] + struct.pack("<Q", rng.choice(blocks)) + content[at + 8 :]


def hdf5_chunk(content: bytes, another: bytes, rng: random.Random) -> bytes:
    """The stored size of a chunk, in a tree of chunks."""
    trees = [match.start() for match in re.finditer(rb"TREE\x01", content)]
    at = rng.choice(trees) + 24 + rng.choice((0, 0, 40, 80)) + rng.choice((0, 0, 0, 4, 8, 32))
    return content[:at] + struct.pack("<I", rng.choice(NUMBERS) % 2**32) + content[at + 4 :]
