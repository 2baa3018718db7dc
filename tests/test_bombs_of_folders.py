"""Bombs of formats that are several files, and of the values within HDF5 and msgpack."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from anymha.errors import FileError
from anymha.interchange.files.crc32c import crc32c
from anymha.interchange.files.formats import open_file
from tests.file_samples import write
from tests.frameworks import required
from tests.fuzz.samples import orbax
from tests.tensorflow_files import HEADER, entry, field, index_of, index_of_rows, row
from tests.test_bombs import check_bomb, holding_one_another, text, zarr, zarr3

FLOATS = entry(1, (4,), 0, 16)


def tensorflow(index: bytes, data: bytes = bytes(64)) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "a.index").write_bytes(index)
        (folder / "a.data-00000-of-00001").write_bytes(data)
        return folder / "a.index"

    return make


def variables(count: int, one: bytes) -> bytes:
    return index_of({b"": HEADER, **{b"%d" % i: one for i in range(count)}})


def long_names() -> bytes:
    """Names of 4,000 letters, of which an entry has the last ones alone."""
    name = b"x" * 4000
    rows = (row(name + b"%09d" % i, b"", len(name)) for i in range(60_000))
    return index_of_rows(row(b"", HEADER) + row(name, FLOATS) + b"".join(rows))


def distributed(
    size: Sequence[int], pieces: Sequence[tuple[int, str, int, int]], length: int = 1
) -> Callable[[Path], Path]:
    """A checkpoint of torch with one tensor; of each piece where it begins, and its place."""

    def make(folder: Path) -> Path:
        torch = required("torch")
        from torch.distributed.checkpoint import filesystem, metadata  # noqa: PLC0415

        rest = [0] * (len(size) - 1), list(size[1:])
        saved = metadata.Metadata(
            state_dict_metadata={
                "a": metadata.TensorStorageMetadata(
                    metadata.TensorProperties(dtype=torch.float32),
                    torch.Size(size),
                    [
                        metadata.ChunkStorageMetadata(
                            torch.Size([first, *rest[0]]), torch.Size([length, *rest[1]])
                        )
                        for first, *_ in pieces
                    ],
                )
            },
            storage_data={
                metadata.MetadataIndex("a", torch.Size([first, *rest[0]])): (
                    filesystem._StorageInfo(*place)
                )
                for first, *place in pieces
            },
        )
        (folder / ".metadata").write_bytes(pickle.dumps(saved))
        stream = io.BytesIO()
        torch.save(torch.ones(1), stream)
        (folder / "x.distcp").write_bytes(stream.getvalue())
        return folder

    return make


HOME = b"ctorch.distributed.checkpoint.metadata\n"


def metadata_of(pieces: bytes, tensors: bytes = b"}") -> Callable[[Path], Path]:
    """A checkpoint of torch with these tables in its metadata."""
    tables = text("storage_data") + pieces + text("state_dict_metadata") + tensors
    program = HOME + b"Metadata\n)R}(" + tables + b"ub"

    def make(folder: Path) -> Path:
        (folder / ".metadata").write_bytes(holding_one_another(program))
        return folder

    return make


def zstd(count: int) -> bytes:
    """A frame of Zstandard that unfolds to 128 KiB of zeros for each 4 bytes."""
    head = b"\x28\xb5\x2f\xfd\0\x38"  # a window of 128 KiB
    return head + b"\x02\0\x10\0" * (count - 1) + b"\x03\0\x10\0"


def manifest(folder: Path) -> Path:
    """The list of a database's keys, which unfolds to 10 GB."""
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    (folder / "made").mkdir()
    for name, content in orbax("zarr", True)(folder / "made").items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    body = b"\0\1" + zstd(80_000)
    content = b"\x0c\xdb\x3a\x2a" + struct.pack("<Q", 16 + len(body)) + body
    checksum = struct.pack("<I", crc32c(content))
    (folder / "x" / "manifest.ocdbt").write_bytes(content + checksum)
    return folder / "x"


def packed_chunk(folder: Path) -> Path:
    """A chunk of 4 MiB that unfolds to 32 GB."""
    return zarr(folder, 2**20, 2**20, {"id": "zstd", "level": 1}, zstd(250_000))


def shards_of_one(folder: Path) -> Path:
    """One chunk of 16,777,216 chunks."""
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}]
    inner = {"chunk_shape": [1], "codecs": plain, "index_codecs": plain}
    grid = {"name": "regular", "configuration": {"chunk_shape": [2**24]}}
    metadata = {
        "zarr_format": 3, "node_type": "array", "shape": [2**24], "data_type": "uint8",
        "chunk_grid": grid, "fill_value": 0, "attributes": {},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }  # fmt: skip
    return zarr3(folder, metadata)


def index(count: int, file: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / "m.safetensors", {"a": np.zeros(1, "f4")})
        places = {f"{i}": file.format(i) for i in range(count)}
        (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return folder / "m.safetensors.index.json"

    return make


def second_names(folder: Path) -> Path:
    """Twenty thousand links to one dataset in chunks."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(folder / "a.h5", "w") as file:
        first = file.create_dataset("a", data=np.ones(4), chunks=(4,), compression="gzip")
        for i in range(20_000):
            file[f"b{i}"] = first
    return folder / "a.h5"


def long_attribute(folder: Path) -> Path:
    """A dtype whose name has 900,000 letters."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(folder / "a.h5", "w", libver="latest") as file:
        data = file.create_dataset("a", data=np.zeros(3, "V2"))
        data.attrs.create("dtype", np.bytes_(b"x" * 900_000))
    return folder / "a.h5"


def msgpack(content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "a.msgpack").write_bytes(content)
        return folder / "a.msgpack"

    return make


EMPTY = b"\xc7\x0d\1\x93\x91\0\xa7float32\xc4\0"
"""An array without elements."""
NAME = b"\xdb" + (99_999).to_bytes(4, "big") + b"x" * 99_999

BOMBS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "TensorFlow, shape": (
        tensorflow(variables(1, entry(1, (2**40, 2**40), 0, 16))), "and its index says 16"),
    "TensorFlow, the same elements": (
        tensorflow(variables(10_000, entry(1, (2**18,), 0, 2**20)), bytes(2**20)),
        f"its arrays take {10_000 * 2**20} bytes, more than is allowed"),
    "TensorFlow, variables": (tensorflow(variables(60_000, FLOATS)), "more than 250000 fields"),
    "TensorFlow, names": (tensorflow(long_names()), "more than 100000 names, or too long ones"),
    "TensorFlow, parts": (
        tensorflow(variables(1, entry(1, (4, 4), 0, 16) + field(7, field(1, b"") * 2) * 60_000)),
        "a part of '0' is missing"),
    "distributed, shape": (
        distributed((2**40, 2**40), [(0, "x.distcp", 0, 1000)], 2**40), "'a' claims 483570327845"),
    "distributed, one piece again and again": (
        distributed((9000,), [(i, "x.distcp", 0, 1000) for i in range(9000)]),
        "two pieces lie in the same bytes of 'x.distcp'"),
    "distributed, pieces over one another": (
        distributed((900,), [(i, "x.distcp", i, 400) for i in range(900)]),
        "two pieces lie in the same bytes of 'x.distcp'"),
    "distributed, pieces of nothing": (
        distributed((9000,), [(i, "x.distcp", i, 0) for i in range(9000)]), "has no bytes"),
    "distributed, files that are missing": (
        distributed((9000,), [(i, f"{i}.distcp", 0, 10) for i in range(9000)]),
        "0.distcp cannot be read: No such file"),
    "distributed, a name of tuples": (
        metadata_of(
            b"}" + HOME + b"MetadataIndex\n)R}(" + text("fqn") + b")" + b"\x85" * 300_000
            + text("offset") + b")ub}s"
        ),
        "a piece has no tensor's name"),
    "distributed, lists in one another": (
        metadata_of(
            b"}", b"}" + text("a") + HOME + b"TensorStorageMetadata\n)R}" + text("properties")
            + HOME + b"TensorProperties\n)Rh\x0c\x85bsbs",
        ),
        "[...], [...]]]]"),
    "Orbax, manifest": (manifest, "Error decoding manifest"),
    "Orbax, a chunk": (packed_chunk, "Error reading local file"),
    "Orbax, chunks": (lambda folder: zarr(folder, 2**24, 1), "'a' has 16777216 chunks of 4 bytes"),
    "Orbax, shards": (shards_of_one, "'a' has 16777216 chunks of 1 bytes"),
    "shards": (index(999_000, "{}.safetensors"), "bytes, and 25000000 are the most"),
    "shards elsewhere": (index(2, "../m.safetensors"), "which is no file next to it"),
    "one shard": (index(30_000, "m.safetensors"), "does not hold '0', as the index says"),
    "HDF5, second names": (second_names, "it has more than 1000 second names of datasets"),
    "HDF5, an attribute": (long_attribute, "holds bytes without the name of their dtype"),
    "msgpack, names": (
        msgpack(b"\x81" + NAME + b"\xdd" + (60_000).to_bytes(4, "big") + EMPTY * 60_000),
        "/0' is too long"),
    "msgpack, depth": (msgpack(b"\x81\xa1a" + b"\x91" * 10**6), "are nested more than 32 deep"),
    "msgpack, an extension": (msgpack(b"\x81\xa1a\xc9\xff\xff\xff\xff\1\x93"), "it ends too early"),
}  # fmt: skip
READ_LATE = ("Orbax, a chunk",)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory")
@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_refused_at_once_in_little_memory(tmp_path: Path, case: str) -> None:
    make, told = BOMBS[case]
    check_bomb(tmp_path, make, told, late=case in READ_LATE)


def test_a_chunk_that_unfolds_to_much_is_told_where_it_is_read(tmp_path: Path) -> None:
    with open_file(packed_chunk(tmp_path)) as reader, pytest.raises(FileError, match="'a': FAILED"):
        reader.read("a")
