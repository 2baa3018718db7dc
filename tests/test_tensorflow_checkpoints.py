"""Checkpoints of TensorFlow are read without it: parts, damages, and what is left out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import anymha
from anymha.errors import FileError, UsageError
from anymha.interchange.files.crc32c import crc32c
from anymha.interchange.files.formats import open_file
from anymha.interchange.files.reader import CHUNK
from anymha.interchange.files.sorted_table import MAX_BLOCKS, entries
from anymha.interchange.files.tensorflow_checkpoint import GRAPH
from tests.frameworks import required
from tests.tensorflow_files import (
    HEADER,
    block,
    checkpoint,
    entry,
    field,
    index_of,
    index_of_rows,
    row,
    table_of,
    varint,
)

ARRAYS = {
    "dense/kernel": np.arange(12, dtype="f4").reshape(3, 4),
    "dense/bias": np.ones(4, "f2"),
    "scale": np.array(3.5),
    "none": np.zeros((0, 2), "i8"),
    "low": np.arange(4).astype(ml_dtypes.bfloat16),
}


def by_bits(content: bytes) -> int:
    register = 2**32 - 1
    for byte in content:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 2**32 - 1


@pytest.mark.parametrize(
    ("content", "checksum"),
    [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"", 0)],
)
def test_the_checksum_is_that_of_the_standard(content: bytes, checksum: int) -> None:
    assert crc32c(content) == checksum


@pytest.mark.parametrize("size", [1, 3, 4, 5, 127, 128, 129, 4097])
def test_the_checksum_of_any_length_is_that_bit_by_bit(size: int, monkeypatch) -> None:
    content = np.random.default_rng(size).bytes(size)
    assert crc32c(content) == by_bits(content)
    monkeypatch.setattr("anymha.interchange.files.crc32c.CHUNK", 64)  # several chunks
    assert crc32c(memoryview(content)) == by_bits(content)


def test_the_checksum_of_a_whole_chunk_is_known() -> None:
    assert (CHUNK, crc32c(bytes(CHUNK))) == (2**20, 0x14298C12)


def placed(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / next(iter(files))


def read(path: Path) -> None:
    with open_file(path) as reader:
        for name in reader.tensors:
            reader.read(name)


def refused(path: Path) -> str:
    with pytest.raises(FileError) as error:
        read(path)
    return str(error.value)


@pytest.mark.parametrize("graph", [True, False])
def test_a_checkpoint_is_read_without_tensorflow(tmp_path: Path, graph: bool) -> None:
    path = placed(tmp_path, checkpoint(ARRAYS, graph))
    program = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from pathlib import Path\n"
        "from anymha.interchange.files.formats import open_file\n"
        f"print(sorted(open_file(Path({str(path)!r})).tensors))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str(sorted(ARRAYS)), done.stderr
    with open_file(path) as reader:
        for name, array in ARRAYS.items():
            found = reader.read(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.tobytes() == array.tobytes()


def test_parts_that_tensorflow_writes_are_joined(tmp_path: Path) -> None:
    """Starts and lengths of one, two and three bytes in the code of the parts' keys."""
    tf = required("tensorflow")
    sizes = (3, 61, 20, 8200, 100)
    whole = np.arange(2.0 * sum(sizes)).reshape(-1, 2)
    starts = np.cumsum((0, *sizes))
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "a"), tensor_names=["w"] * len(sizes) + ["v"],
        shape_and_slices=[f"{len(whole)} 2 {start},{size}:-"
                          for start, size in zip(starts, sizes, strict=False)] + [""],
        tensors=[*np.split(whole, starts[1:-1]), np.ones(2)],
    )  # fmt: skip
    with open_file(tmp_path / "a.index") as reader:
        assert set(reader.tensors) == {"v", "w"}
        assert np.array_equal(reader.read("w"), whole)


def test_several_files_of_data_are_read(tmp_path: Path) -> None:
    tf = required("tensorflow")
    for number, name in enumerate("ab"):
        tf.raw_ops.SaveV2(prefix=f"{tmp_path}/{name}", tensor_names=[name],
                          shape_and_slices=[""], tensors=[np.full(3, number)])  # fmt: skip
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[f"{tmp_path}/a", f"{tmp_path}/b"],
        destination_prefix=f"{tmp_path}/both", delete_old_dirs=False,
    )  # fmt: skip
    with open_file(tmp_path / "both.index") as reader:
        assert [reader.read(name).tolist() for name in "ab"] == [[0] * 3, [1] * 3]
        assert len(reader.files()) == 3
    (tmp_path / "both.data-00001-of-00002").unlink()
    assert "do not lie beside it" in refused(tmp_path / "both.index")


@pytest.mark.parametrize(
    "slots", [("adam_m", "adam_v"), ("Adam", "Adam_1"), ("ExponentialMovingAverage", "Momentum")]
)
def test_what_an_optimiser_keeps_of_each_variable_is_left_out(
    tmp_path: Path, slots: tuple[str, ...]
) -> None:
    """As Google's checkpoints of BERT have it."""
    rng = np.random.default_rng(0)
    layer = "bert/encoder/layer_0/attention"
    weights = {
        f"{layer}/{part}/{kind}": rng.standard_normal(shape).astype("f4")
        for part in ("self/query", "self/key", "self/value", "output/dense")
        for kind, shape in (("kernel", (8, 8)), ("bias", (8,)))
    }
    kept = {f"{name}/{slot}": array for name, array in weights.items() for slot in slots}
    source = placed(tmp_path, checkpoint({**weights, **kept, "step": np.array(3)}, False))
    done = anymha.convert_file(source, tmp_path / "a.safetensors", num_heads=2, verify=False)
    assert done.layout == "transformers.flax_bert"
    prefix = f"{layer.replace('/', '.')}."
    found = anymha.get_weights(anymha.load(tmp_path / "a.safetensors", "numpy", prefix=prefix))
    kernel = weights[f"{layer}/self/query/kernel"]
    assert np.array_equal(found["query.kernel"].reshape(8, 8), kernel)
    unknown = {**weights, f"{layer}/self/query/kernel/other": np.ones(3, "f4")}
    placed(tmp_path, checkpoint(unknown, False))
    with pytest.raises(UsageError, match="no attention layer of a known layout"):
        anymha.convert_file(source, tmp_path / "b.safetensors", num_heads=2, verify=False)


@pytest.mark.parametrize("file", ["a.index", "a.data-00000-of-00001"])
def test_any_damage_is_told(tmp_path: Path, file: str) -> None:
    files = checkpoint(ARRAYS)
    ends = {"a.index": len(files[file]) - 48}  # of the footer not all is used
    for at in range(0, ends.get(file, len(files[file])), 7):
        content = bytearray(files[file])
        content[at] ^= 4
        refused(placed(tmp_path, {**files, file: bytes(content)}))


WIDE = (2**40, 2**40)
PART = field(7, field(1, field(1, 0) + field(2, 1)) * 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({b"a": entry(1, WIDE, 0, 64)}, "takes 4835703278458516698824704 bytes, and its index s"),
        ({b"a": entry(1, (2**20,), 0, 2**22)}, "'a' reaches over the end of its file"),
        ({b"a": entry(1, (4,), 2**63, 16)}, "'a' reaches over the end of its file"),
        ({b"a": entry(1, (2**64 - 1,), 0, 16)}, "'a' of shape"),
        ({b"a": entry(29, (4,), 0, 16)}, "has elements of TensorFlow's type 29, which is not read"),
        ({b"a": entry(1, (4,), 0, 16)}, "the checksum of 'a' is wrong"),
        ({b"a": entry(1, (4,), 0, 16) + field(3, 1)}, "'a' reaches over the end of its file"),
        ({b"a": entry(1, (2, 2), 0, 16) + PART}, "a part of 'a' is missing"),
        ({b"\xff": entry(1, (4,), 0, 16)}, "codec can't decode"),
        ({b"": field(1, 0)}, "does not say how many files of data"),
        ({b"": HEADER + field(2, 1)}, "its numbers are not little-endian"),
        ({b"": field(1, 2)}, "do not lie beside it"),
        ({GRAPH: entry(7, (), 0, 16)}, "graph of objects is damaged"),
        ({GRAPH: entry(7, (), 0, 2**60)}, "graph of objects takes 115292"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_data_is_told(
    tmp_path: Path, values: dict[bytes, bytes], words: str
) -> None:
    files = {"a.index": index_of({b"": HEADER, **values}), "a.data-00000-of-00001": bytes(64)}
    assert words in refused(placed(tmp_path, files))


def blocks_over_one_another(count: int) -> bytes:
    data = block(row(b"a", b""))
    handle = varint(0) + varint(len(data) - 5)
    return table_of(data, block(b"".join(row(b"%09d" % i, handle) for i in range(count))))


def many_blocks(count: int) -> bytes:
    data = block(b"")
    rows = (row(b"%09d" % i, varint(i * len(data)) + varint(len(data) - 5)) for i in range(count))
    return table_of(data * count, block(b"".join(rows)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: b"", "does not end as one of TensorFlow does"),
        (lambda: index_of_rows(b"")[:-1], "does not end as one of TensorFlow does"),
        (lambda: index_of_rows(row(b"abc", b"", 3)), "reaches over its block"),
        (lambda: index_of_rows(row(b"a", b"x") + b"\0\7\0"), "reaches over its block"),
        (lambda: index_of_rows(row(b"a", b"") * 2), "a name twice"),
        (lambda: index_of_rows(b"\xff" * 20), "more than ten bytes"),
        (lambda: table_of(block(b""), block(row(b"a", varint(0) + varint(2**40)))), "outside of"),
        (lambda: table_of(block(b"", b"\1"), block(row(b"a", varint(0) + varint(8)))), "packed"),
        (lambda: blocks_over_one_another(2), "lie over one another"),
        (lambda: many_blocks(MAX_BLOCKS + 1), "too many"),
    ],
)
def test_a_table_that_is_broken_is_told(
    tmp_path: Path, make: Callable[[], bytes], words: str
) -> None:
    files = {"a.index": make(), "a.data-00000-of-00001": bytes(64)}
    assert words in refused(placed(tmp_path, files))


def test_keys_that_share_their_beginning_are_told_apart() -> None:
    rows = row(b"", HEADER) + row(b"layer/a", b"1") + row(b"layer/b", b"2", 6)
    assert entries(index_of_rows(rows)) == {b"": HEADER, b"layer/a": b"1", b"layer/b": b"2"}
