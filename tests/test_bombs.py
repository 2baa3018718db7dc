"""Small files that claim or unfold to much, and texts that would forge a terminal's lines."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shlex
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anymha
from anymha.cli.main import main
from anymha.errors import AnymhaError, ArgumentError, FileError
from anymha.interchange.convert_model import convert_file
from anymha.interchange.files.content import TORCH_LEGACY
from anymha.interchange.files.formats import create_file, open_file
from anymha.interchange.files.names import MAX_NAME
from anymha.interchange.files.reader import Tensor
from anymha.interchange.leftovers import changed_modules
from tests.file_samples import sample, write
from tests.test_hostile_files import with_header, zipped_pickle

ROOT = Path(__file__).parents[1]
MEMORY, SECONDS = 10**9, 10

LIMITED = f"""
import json, os, resource, signal, sys
from anymha.cli.main import main
def run(*words):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    status = main(words)
    print(status, resource.getrusage(resource.RUSAGE_SELF).ru_utime - before)
main(("inspect", os.devnull))  # imports what any call needs
for line in sys.stdin:
    path, folder, told = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{{told}}/{{name}}", os.O_WRONLY | os.O_CREAT), stream)
    signal.alarm(120)
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
    resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
    run("inspect", path)
    run("convert", path, f"{{folder}}/new.npz", "--from", "transformers.bert", "--to", "anymha",
        "--num-heads", "2", "--others")
    sys.exit()
"""
"""A process that imports the command once; for each line a child of it runs in limits."""


@functools.cache
def limited() -> subprocess.Popen[str]:
    """The process of `LIMITED`, for all bombs; it ends with this one."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    process = subprocess.Popen(
        [sys.executable, "-c", LIMITED], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    atexit.register(process.communicate)
    return process


def deflated(size: int, byte: bytes = b"\0") -> bytes:
    """Zlib's stream of one byte, many times."""
    packer = zlib.compressobj(9)
    piece = byte * 2**22
    parts = [packer.compress(piece) for _ in range(size // len(piece))]
    return b"".join([*parts, packer.flush()])


def torch_of(program: bytes, *, packed: bool = True, **records: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = zipped_pickle(folder / "a.pt", b"" if packed else program, **records)
        if packed:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("a/data.pkl", program)
        return path

    return make


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def nested_key() -> bytes:
    """A dict with one key: a tuple in a tuple, 4,000 times."""
    return b"\x80\x02})" + b"\x85" * 4000 + b"Ns."


def multiplied() -> bytes:
    """A list of 11,000 items, copied 11,000 times."""
    copy = b"c__builtin__\nset\nh\0\x85R"
    return b"\x80\x02]q\0(" + b"N" * 11_000 + b"e" + copy * 1_000 + b"."


def repeated(made: bytes, use: bytes, count: int) -> bytes:
    """A pickle that makes something, as memo 1, and uses it many times."""
    return b"\x80\x02" + made + b"q\1" + b"(" + use * count + b"t."


def holding_one_another(rest: bytes) -> bytes:
    """Lists of ten that are all the list before: 13 of them would be written in 40 TB.

    Args:
        rest: What the pickle does with the last one, its memo 12.
    """
    lists = (b"]q" + bytes([i]) + b"(" + (b"h" + bytes([i - 1])) * 10 + b"e" for i in range(1, 13))
    return b"\x80\x02]q\0" + b"".join(lists) + rest + b"."


def legacy(keys: bytes) -> Callable[[Path], Path]:
    """A file of torch before 1.6 without tensors, with these keys of storages."""

    def make(folder: Path) -> Path:
        system = b"\x80\x02}(X\r\0\0\0little_endian\x88u."
        pickles = (TORCH_LEGACY, b"\x80\x02M\xe9\3.", system, b"\x80\x02}.", keys)
        (folder / "a.pt").write_bytes(b"".join(pickles))
        return folder / "a.pt"

    return make


ITEMS = b"K\1" * 100_000
PAIRS = b"K\1K\1\x86q\0](" + b"h\0" * 100_000 + b"e"
ORDERED = b"ccollections\nOrderedDict\nh\1\x85R"
LONG_TEXT = text("x" * 10**6)


def colliding() -> bytes:
    """A dict of numbers that all have the hash 0."""
    keys = (n * (2**61 - 1) for n in range(1, 40_000))
    return (
        b"\x80\x02}("
        + b"".join(b"\x8a\x0a" + k.to_bytes(10, "little") + b"N" for k in keys)
        + b"u."
    )


def shared_tensors(count: int, key: Callable[[int], str]) -> bytes:
    """Tensors that all have the elements of one storage of a million."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += number(2**18) + b"tQ"
    place = number(0) + number(2**18) + b"\x85" + number(1) + b"\x85"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + b"\x89NtR"
    first = text(key(0)) + tensor + b"q\0"
    rest = b"".join(text(key(i)) + b"h\0" for i in range(1, count))
    return b"\x80\x02}(" + first + rest + b"u."


def long_names() -> bytes:
    """A million names of 3,000,000 characters: a dict of short ones under a long one."""
    inner = b"}q\0(" + b"".join(text(str(i)) + b"N" for i in range(9)) + b"u"
    return b"\x80\x02}" + text("x" * 3_000_000) + inner + b"s."


def overlapping_npz(folder: Path) -> Path:
    """Members of 60 MB that are all the same bytes of the file."""
    path = folder / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a.npy", "w") as stream:
            np.save(stream, np.zeros(60 * 2**20, np.uint8))
        for i in range(170):
            info = zipfile.ZipInfo(f"a{i}.npy")
            for name in ("compress_type", "CRC", "compress_size", "file_size", "header_offset"):
                setattr(info, name, getattr(archive.filelist[0], name))
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
    return path


def linked_h5(folder: Path) -> Path:
    """One dataset of 60 MB under 170 names."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(folder / "a.h5", "w") as file:
        first = file.create_dataset("a", (60 * 2**20,), "u1", compression="gzip", chunks=(2**20,))
        first[...] = 0
        for i in range(170):
            file[f"a{i}"] = first
    return folder / "a.h5"


def with_chunk(
    path: Path, content: bytes, shape: Any = (4,), chunks: Any = (4,), **options: Any
) -> Path:
    """A dataset whose one chunk has that stored content."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(path, "w") as file:
        most = (None,) * len(shape)
        dataset = file.create_dataset("a", shape, "f4", chunks=chunks, maxshape=most, **options)
        dataset.id.write_direct_chunk((0,) * len(shape), content)
    return path


def swelling_chunk(folder: Path) -> Path:
    """A chunk of 256 kB that gzip unfolds to 256 MB."""
    content = deflated(2**28)
    return with_chunk(folder / "a.h5", content, (4,), (2**16,), compression="gzip")


def wide_chunk(folder: Path) -> Path:
    """A dataset of 4 numbers in a chunk of 3 GB."""
    size = 3 * 2**28
    return with_chunk(folder / "a.h5", deflated(2**22), (4,), (size,), compression="gzip")


def in_keras(folder: Path) -> Path:
    inner = swelling_chunk(folder)
    with zipfile.ZipFile(folder / "a.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(inner, "model.weights.h5")
    return folder / "a.keras"


def field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer."""
    length, head = len(content), bytes([number << 3 | 2])
    while length > 0x7F:
        head += bytes([length & 0x7F | 0x80])
        length >>= 7
    return head + bytes([length]) + content


def external_onnx(folder: Path) -> Path:
    """Ten thousand initialisers with the same megabyte of another file."""
    (folder / "a.data").write_bytes(bytes(2**20))
    pair = field(1, b"location") + field(2, b"a.data")
    tensors = b"".join(
        field(5, b"\x08\x80\x80\x40\x10\x02" + field(8, b"a%d" % i) + field(13, pair) + b"\x70\x01")
        for i in range(10_000)
    )
    (folder / "a.onnx").write_bytes(field(7, tensors))
    return folder / "a.onnx"


def many_fields(folder: Path) -> Path:
    (folder / "a.onnx").write_bytes(field(7, b"\x08\x00" * 2**21))
    return folder / "a.onnx"


def many_values(folder: Path) -> Path:
    return with_header(folder / "a.safetensors", b'{"a":[' + b"[]," * 2**22 + b"0]}", 0)


def index_of_values(folder: Path) -> Path:
    path = folder / "a.safetensors.index.json"
    path.write_bytes(b'{"weight_map":[' + b"[]," * 2**22 + b"0]}")
    return path


def zarr(
    folder: Path, shape: int, chunk: int, compressor: Any = None, content: bytes = b""
) -> Path:
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    value = {"value_type": "jax.Array", "skip_deserialize": False}
    entry = {"key_metadata": [{"key": "a", "key_type": 2}], "value_metadata": value}
    (folder / "_METADATA").write_text(
        json.dumps({"tree_metadata": {"('a',)": entry}, "use_ocdbt": False})
    )
    (folder / "a").mkdir()
    (folder / "a" / ".zarray").write_text(
        json.dumps({"shape": [shape], "chunks": [chunk], "dtype": "<f4", "compressor": compressor,
                    "fill_value": None, "filters": None, "order": "C", "zarr_format": 2})
    )  # fmt: skip
    if content:
        (folder / "a" / "0").write_bytes(content)
    return folder


def blosc(folder: Path) -> Path:
    """A chunk of 16 bytes whose head says that it unpacks to 1 GiB."""
    head = b"\2\1\0\4" + struct.pack("<III", 2**30, 2**20, 64)
    return zarr(folder, 4, 4, {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 0},
                head + bytes(48))  # fmt: skip


def packed_twice(folder: Path) -> Path:
    """Blosc within gzip: gzip unfolds to a Blosc chunk of any size, and that again."""
    grid = {"name": "regular", "configuration": {"chunk_shape": [4]}}
    gzip = {"name": "gzip", "configuration": {"level": 1}}
    blosc = {"cname": "lz4", "clevel": 5, "shuffle": "noshuffle", "blocksize": 0, "typesize": 4}
    metadata = {
        "zarr_format": 3, "node_type": "array", "shape": [4], "data_type": "float32",
        "chunk_grid": grid, "fill_value": 0, "attributes": {},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}},
                   {"name": "blosc", "configuration": blosc}, gzip],
    }  # fmt: skip
    return zarr3(folder, metadata)


def blosc_in_shards(folder: Path) -> Path:
    """Chunks within chunks, which Blosc packs."""
    packed_twice(folder)
    metadata = json.loads((folder / "a" / "zarr.json").read_text())
    plain, blosc, _ = metadata["codecs"]
    inner = {"chunk_shape": [2], "codecs": [plain, blosc], "index_codecs": [plain]}
    metadata["codecs"] = [{"name": "sharding_indexed", "configuration": inner}]
    return zarr3(folder, metadata)


def zarr3(folder: Path, metadata: dict[str, Any]) -> Path:
    if not (folder / "a").is_dir():
        zarr(folder, 4, 4)
    content = json.loads((folder / "_METADATA").read_text()) | {"use_zarr3": True}
    (folder / "_METADATA").write_text(json.dumps(content))
    (folder / "a" / "zarr.json").write_text(json.dumps(metadata))
    return folder


def deep_zarr(folder: Path) -> Path:
    """Metadata of which TensorStore's parser dies."""
    path = zarr(folder, 4, 4) / "a" / ".zarray"
    deep = "[" * 300_000 + "]" * 300_000
    path.write_text(path.read_text()[:-1] + f', "attributes": {deep}}}')
    return folder


def gguf_of_values(folder: Path) -> Path:
    """A list of a million texts within lists."""
    text_of_1 = struct.pack("<Q", 0)
    inner = struct.pack("<IQ", 8, 2**17) + text_of_1 * 2**17
    value = struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + inner
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40) + value * 9
    (folder / "a.gguf").write_bytes(content)
    return folder / "a.gguf"


def lists_of_msgpack(folder: Path) -> Path:
    (folder / "a.msgpack").write_bytes(b"\x81\xa1a\xdd\x00\x10\x00\x00" + b"\x90" * 2**20)
    return folder / "a.msgpack"


def filled_h5(folder: Path) -> Path:
    """Datasets of 10 GB that are not stored at all: every element is the fill value."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("a", (10 * 2**28,), "f4")
        file.create_dataset("b", (10 * 2**28,), "f4", chunks=(2**20,), compression="gzip")
    return folder / "a.h5"


BOMBS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "dicts of a pickle": (torch_of(b"\x80\x02" + b"}" * (60 * 2**20) + b"."), "a/data.pkl' claims"),
    "numbers of a pickle": (torch_of(b"\x80\x02" + b"K\1" * (30 * 2**20) + b"."), "a/data.pkl' cl"),
    "steps of a pickle": (torch_of(b"\x80\x02" + b"}" * 2**21, packed=False), "takes more than"),
    "nested key": (torch_of(nested_key()), "a key of a dict is neither a text nor a number"),
    "pairs again and again": (torch_of(repeated(PAIRS, ORDERED, 20_000)), "takes more than"),
    "arguments": (
        torch_of(repeated(b"(" + ITEMS + b"t", b"cnumpy\ndtype\nh\1R", 50_000)),
        "takes more than",
    ),
    "a text's letters": (
        torch_of(repeated(LONG_TEXT, b"ctorch\nSize\nh\1\x85R", 1000), packed=False),
        "takes more than",
    ),
    "long key": (
        torch_of(repeated(b"(" + ITEMS + b"t", b"}h\1Ns", 20_000)),
        "a key of a dict is neither",
    ),
    "key of calls": (
        torch_of(repeated(b"(" + b"ctorch\nSize\n" * 90 + b"t", b"}h\1Ns", 20_000)),
        "a key of a dict",
    ),
    "long text as a key": (torch_of(repeated(LONG_TEXT, b"}h\1Ns", 9)), "is too long"),
    "keys of one hash": (torch_of(colliding()), "a key of a dict is a number beyond"),
    "lists in one another, a name": (
        torch_of(holding_one_another(b"h\x0c\x93"), packed=False),
        "a name is no text",
    ),
    "lists in one another, a call": (
        torch_of(holding_one_another(b"h\x0c)R"), packed=False),
        "it calls list",
    ),
    "lists in one another, a storage": (
        torch_of(
            holding_one_another(b"(" + text("other") + b"ctorch\nFloatStorage\nK\1Nh\x0ctQ"),
            packed=False,
        ),
        "it has an unknown reference ('other'",
    ),
    "lists in one another, keys": (
        legacy(holding_one_another(b"h\x0c")),
        "it has no list of its storages",
    ),
    "long number as a key": (
        legacy(b"\x80\x02]\x8a\xff" + b"\x7f" * 255 + b"a."),
        "it has no list of its storages",
    ),
    "multiplied list": (torch_of(multiplied()), "its pickle takes more than"),
    "shared tensors": (
        torch_of(shared_tensors(10_000, str), packed=False, **{"0": bytes(2**20)}),
        f"its arrays take {10_000 * 2**20} bytes, more than is allowed for a file of",
    ),
    "long names": (torch_of(long_names(), packed=False), "is too long"),
    "overlapping members": (overlapping_npz, "its members claim"),
    "linked datasets": (linked_h5, "has chunks that unpack to"),
    "swelling chunk": (swelling_chunk, "unpacks to more than 262144 bytes"),
    "wide chunk": (wide_chunk, "has chunks that unpack to"),
    "swelling chunk in .keras": (in_keras, "unpacks to more than 262144 bytes"),
    "external data": (external_onnx, f"its arrays take {10_000 * 2**20} bytes, more than is"),
    "fields": (many_fields, "it has more than 250000 fields"),
    "values of a header": (many_values, "it has more than 1000000 values"),
    "values of an index": (index_of_values, "it has more than 1000000 values"),
    "chunk of Orbax": (lambda folder: zarr(folder, 1, 2**32), f"1 chunks of {2**34} bytes each"),
    "Blosc in gzip": (packed_twice, "packed twice, by blosc and gzip"),
    "Blosc in shards": (blosc_in_shards, "chunks within chunks that are packed by Blosc"),
    "Blosc": (blosc, f"a chunk of 16 bytes unpacks to {2**30}"),
    "deep metadata of Zarr": (deep_zarr, "its values are nested too deeply"),
    "values of GGUF": (gguf_of_values, "it ends too early"),
    "lists of msgpack": (lists_of_msgpack, "have more than 200000 values"),
    "fill values": (filled_h5, "'a' claims 10737418240 bytes in 0"),
    "chunks of Orbax": (lambda folder: zarr(folder, 2**23, 1), f"{2**23} chunks of 4 bytes each"),
}
READ_LATE = ("swelling chunk", "swelling chunk in .keras", "Blosc")
"""What is seen where values are read: `inspect` reads none."""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory")
@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_refused_at_once_in_little_memory(tmp_path: Path, case: str) -> None:
    make, told = BOMBS[case]
    check_bomb(tmp_path, make, told, late=case in READ_LATE)


def check_bomb(folder: Path, make: Callable[[Path], Path], told: str, *, late: bool) -> None:
    """Check that a file is refused at once in little memory, by `convert` alone where it is late.

    Args:
        folder: A folder for the file, the new one, and what is printed.
        make: Makes the file in a folder.
        told: Words of the error.
        late: Whether it is seen where values are read.
    """
    bomb, printed = folder / "bomb", folder / "printed"
    bomb.mkdir()
    printed.mkdir()
    stdin, stdout = limited().stdin, limited().stdout
    assert stdin is not None
    assert stdout is not None
    print(json.dumps([str(make(bomb)), str(bomb), str(printed)]), file=stdin, flush=True)
    status = stdout.readline().strip()
    stderr = (printed / "stderr").read_text()
    assert status == "0", stderr[-2000:]
    lines = (printed / "stdout").read_text().splitlines()
    outcomes = [line.split() for line in lines if line[:2] in ("0 ", "2 ")]
    assert [status for status, _ in outcomes] == (["0", "2"] if late else ["2", "2"])
    assert told in stderr or late
    assert all(float(seconds) < 3 for _, seconds in outcomes), outcomes
    assert not list(bomb.glob("*.part"))


@pytest.mark.parametrize("case", READ_LATE)
def test_a_bomb_that_is_seen_late_is_told_where_it_is_read(tmp_path: Path, case: str) -> None:
    make, told = BOMBS[case]
    with open_file(make(tmp_path)) as reader, pytest.raises(FileError, match=told):
        reader.read("a")


@pytest.mark.parametrize("size", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("gzip", [True, False])
def test_chunks_of_an_impossible_size_are_refused(tmp_path: Path, size: int, gzip: bool) -> None:
    """HDF5's own library ends the process on some of them."""
    options: dict[str, Any] = {"shuffle": True, "fletcher32": True}
    packed = zlib.compress(bytes(16)) if gzip else bytes(16)
    options |= {"compression": "gzip"} if gzip else {}
    path = with_chunk(tmp_path / "a.h5", packed[: size or 1], **options)
    forge(path, size, 0)
    with open_file(path) as reader, pytest.raises(FileError, match="'a' has a chunk"):
        reader.read("a")


@pytest.mark.parametrize(("size", "place"), [(2**31, 0), (24, 2**40), (2**32 - 1, 2**62)])
def test_chunks_beyond_the_file_are_refused_before_they_are_read(
    tmp_path: Path, size: int, place: int
) -> None:
    path = with_chunk(tmp_path / "a.h5", zlib.compress(bytes(16)), compression="gzip")
    forge(path, size, place)
    with open_file(path) as reader, pytest.raises(FileError, match="beyond the end of the file"):
        reader.read("a")


@pytest.mark.parametrize("size", [0, 15, 17, 4095])
def test_plain_chunks_of_another_size_are_refused(tmp_path: Path, size: int) -> None:
    """h5py writes such a chunk beyond its buffer, and the process dies later."""
    path = with_chunk(tmp_path / "a.h5", bytes(16))
    with path.open("ab") as stream:
        stream.write(bytes(8192))
    forge(path, size, 0)
    with open_file(path) as reader, pytest.raises(FileError, match=f"a chunk of {size} bytes, "):
        reader.read("a")


def test_chunks_behind_a_block_of_other_bytes_are_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
        file.create_dataset("a", data=np.ones(4, "f4"), chunks=(2,))
    with pytest.raises(FileError, match="begins with other bytes than HDF5's"):
        open_file(tmp_path / "a.h5")


def forge(path: Path, size: int, place: int) -> None:
    """Change the stored size of the only chunk, in the tree that has it; and its place, if any."""
    content = bytearray(path.read_bytes())
    key = content.index(b"TREE\x01") + 24  # size, filters, place of the first element, 0; address
    content[key : key + 4] = struct.pack("<I", size)
    if place:
        content[key + 24 : key + 32] = struct.pack("<Q", place)
    path.write_bytes(content)


def test_filters_other_than_gzip_are_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=np.ones(100, "f4"), compression="lzf")
    with pytest.raises(FileError, match="is packed in another way than by gzip, shuffle"):
        open_file(tmp_path / "a.h5")


def test_a_wrong_checksum_of_a_chunk_is_told(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=np.arange(99, dtype="i1"), chunks=(33,), fletcher32=True)
    content = bytearray((tmp_path / "a.h5").read_bytes())
    content[content.index(bytes(range(40, 60)))] ^= 1
    (tmp_path / "a.h5").write_bytes(content)
    with open_file(tmp_path / "a.h5") as reader, pytest.raises(FileError, match="checksum"):
        reader.read("a")


@pytest.mark.parametrize("part", [".ia3_l", ".weight.quant_state", "._packed_params", ".hada_w1"])
def test_names_of_many_marks_take_little_time(part: str) -> None:
    names = [f"{i}{part * (4080 // len(part))}\n" for i in range(100)]
    before = time.process_time()
    changed_modules(names, {})
    assert time.process_time() - before < 1


def test_max_bytes_bounds_a_whole_read(tmp_path: Path) -> None:
    layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy")
    path = tmp_path / "a.safetensors"
    anymha.save(path, layer)
    size = sum(array.nbytes for array in anymha.get_weights(layer).values())
    assert anymha.load(path, "numpy", max_bytes=size).config.key_dim == 4
    with pytest.raises(FileError, match=f"its arrays take {size} bytes, more than is allowed"):
        anymha.load(path, "numpy", max_bytes=size - 1)
    with pytest.raises(FileError, match="its arrays take"):
        convert_file(path, tmp_path / "b.npz", "anymha", "anymha", max_bytes=size - 1)
    for wrong in (0, -1, "1", 1.5):
        with pytest.raises(ArgumentError, match="`max_bytes` must be a positive integer"):
            anymha.load(path, "numpy", max_bytes=wrong)  # type: ignore[arg-type]
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(65 * 2**20, np.uint8))
    with pytest.raises(FileError, match="made to fill the memory"):
        open_file(tmp_path / "zeros.npz")
    with open_file(tmp_path / "zeros.npz", 2**27) as reader:
        assert reader.read("a").nbytes == 65 * 2**20


FORGED = "x\x1b]0;y\x07\x1b[2J\r\nVerified: all\u202e\x9b31m"


def forged_files(folder: Path) -> list[Path]:
    """Files whose texts move the cursor and forge lines, of every kind of text."""
    weights = {f"{name}.weight": sample("float32", (8, 8)) for name in
               ("self.query", "self.key", "self.value", "output.dense")}  # fmt: skip
    named = {f"{FORGED}.{name}": array for name, array in weights.items()}
    paths = [write(folder / "named.safetensors", {**named, FORGED: sample("float32", (2,))})]
    beside = {f"l.{name}": array for name, array in weights.items()}
    paths.append(write(folder / "beside.npz", {**beside, f"l.{FORGED}": sample("float32", (2,))}))
    (folder / "config.json").write_text(json.dumps({"model_type": FORGED}))
    changed = {f"l.self.q.{FORGED}": sample("float32", (2,))}
    paths.append(write(folder / "changed.npz", {**beside, **changed}))
    paths.append(write(folder / "other.safetensors", {FORGED: sample("float32", (2,))}))
    paths.append(write(folder / f"{FORGED.replace('/', '')}.npz", named))
    paths.append(folder / "missing.safetensors.index.json")
    paths[-1].write_text(json.dumps({"weight_map": {"a": f"{FORGED}.safetensors"}}))
    paths.append(folder / "elsewhere.safetensors.index.json")
    paths[-1].write_text(json.dumps({"weight_map": {"a": f"/{FORGED}.safetensors"}}))
    pair = field(1, b"location") + field(2, FORGED.encode())
    tensor = field(5, b"\x08\x01\x10\x02" + field(8, b"a") + field(13, pair) + b"\x70\x01")
    paths.append(folder / "a.onnx")
    paths[-1].write_bytes(field(7, tensor))
    for i, program in enumerate((
        b"\x80\x04" + _short(FORGED) + _short("eval") + b"\x93.",
        b"\x80\x04" + _short("torch") + _short("FloatStorage\x1b[2J") + b"\x93.",
        b"\x80\x02" + text(FORGED) + b")R.",
    )):  # fmt: skip
        paths.append(zipped_pickle(folder / f"{i}.pt", program))
    options = {"num_heads": 2, "key_dim": 4, FORGED: 1}
    entry = json.dumps({"format": 1, "layers": {FORGED: options}})
    own = {name: sample("float32", (2,)) for name in ("a",)}
    paths.append(write(folder / "own.safetensors", own, {"anymha": entry}))
    return paths


def _short(words: str) -> bytes:
    return b"\x8c" + bytes([len(words.encode())]) + words.encode()


def test_no_text_of_a_file_reaches_the_terminal_unescaped(tmp_path: Path, capsys: Any) -> None:
    for path in forged_files(tmp_path):
        for words in (
            ["inspect", str(path)],
            ["convert", str(path), str(tmp_path / "new.npz"), "--from", "transformers.bert",
             "--to", "anymha", "--num-heads", "2"],
            ["convert", str(path), str(tmp_path / "new.npz"), "--from", "transformers.bert",
             "--to", "anymha", "--num-heads", "2", "--others", "--prefix", FORGED],
            ["convert", str(path), f"{tmp_path}/{FORGED}/", "--from", "transformers.bert",
             "--to", "anymha"],
            ["parity", "--backends", "numpy", "--checkpoint", str(path), "--layout",
             "transformers.bert", "--num-heads", "3"],
        ):  # fmt: skip
            main(words)
            printed = capsys.readouterr()
            for line in (printed.out + printed.err).split("\n"):
                assert line.isprintable(), (words, line)
                assert not line.startswith("Verified"), (words, line)
        with pytest.raises(AnymhaError) as error:
            anymha.load(path, "numpy")
        assert str(error.value).isprintable()


def test_what_the_library_tells_of_a_file_is_escaped(tmp_path: Path) -> None:
    forged_files(tmp_path)
    source = tmp_path / "beside.npz"
    done = anymha.convert_file(
        source, tmp_path / "new.npz", layout="transformers.bert", num_heads=2, verify=False
    )
    assert any("Not known to transformers.bert" in note for note in done.notes)
    assert all(note.isprintable() for note in done.notes)
    for path in (source, tmp_path / "changed.npz"):
        (group,) = anymha.find_layers(path)
        assert group.stated.startswith("transformers.x")
        assert group.stated.isprintable()
        assert all(reason.isprintable() for reason in group.misfits.values())


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors", ".h5"])
def test_names_are_escaped_where_a_format_cannot_hold_them(tmp_path: Path, suffix: str) -> None:
    if suffix == ".h5":
        pytest.importorskip("h5py", reason="h5py is not installed")
    kind = np.dtype("U3") if suffix != ".npz" else np.dtype("V2")
    with pytest.raises(FileError, match="cannot hold") as error, \
            create_file(tmp_path / f"a{suffix}", {FORGED: Tensor((2,), kind)}):  # fmt: skip
        pass
    assert str(error.value).isprintable()


@pytest.mark.parametrize("size", [MAX_NAME + 1, 5 * 10**7])
def test_long_names_make_no_long_errors(tmp_path: Path, size: int, capsys: Any) -> None:
    name = "x" * size
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}
    paths = [with_header(tmp_path / "a.safetensors", header, 7)]
    paths.append(tmp_path / "a.safetensors.index.json")
    paths[-1].write_text(json.dumps({"weight_map": {"a": name}}))
    paths.append(zipped_pickle(tmp_path / "a.pt", b"\x80\x02c" + name.encode() + b"\nx\n."))
    for path in paths:
        assert main(["inspect", str(path)]) == 2
        assert len(capsys.readouterr().err) < 1000


@pytest.mark.parametrize("name", ["a b", "a'b", "-a", "a\x1b[2J", "$(id)", "a\\b\n"])
def test_the_command_that_inspect_suggests_can_be_pasted(
    tmp_path: Path, name: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    arrays = {f"{name}.{word}.weight": sample("float32", (8, 8)) for word in
              ("self.query", "self.key", "self.value", "output.dense")}  # fmt: skip
    write(Path(f"{name}.safetensors"), arrays)
    main(["inspect", "--", f"{name}.safetensors"])
    command = capsys.readouterr().out.partition("To convert: ")[2].splitlines()[0]
    assert command.isprintable()
    script = f"anymha() {{ printf '%s\\0' \"$@\"; }}; {command}"
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    pasted = [word.decode() for word in words.split(b"\0")[:-1]]
    replaced = {"DST": "new.npz", "LAYOUT": "anymha", "H": "2"}
    assert main([replaced.get(word, word) for word in pasted]) == 0, shlex.join(pasted)
