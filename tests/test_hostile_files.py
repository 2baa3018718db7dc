"""Files that are broken or made to harm: a clear error each, no code run, little memory taken."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from anymha.errors import AnymhaError, FileError
from anymha.interchange.files.formats import create_file, open_file
from anymha.interchange.files.pickles import PickleMachine, RefusedPickle
from anymha.interchange.files.reader import SAFE_BYTES, Tensor
from tests.file_samples import DATA, WRITTEN, announced, same, sample, save_orbax, write
from tests.frameworks import required
from tests.fuzz import command as fuzz_command
from tests.fuzz import samples as fuzz_samples

FLOATS = sample("float32", (3, 4))


def refused(path: Path) -> str:
    """What the error says of a file that cannot be read."""
    with pytest.raises(FileError) as error:
        read(path)
    text = str(error.value)
    assert str(path) in text or path.is_dir()
    return text


def read(path: Path) -> dict[str, np.ndarray]:
    with open_file(path) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def entry(dtype: Any = "F32", shape: Any = (3, 4), span: Any = (0, 48)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


def with_header(path: Path, header: Any, size: int = 48, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", claimed) + text + bytes(size))
    return path


HEADERS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{nothing", "its header is not JSON ("),
    "no text": (b'{"\xff": 1}', "its header is not JSON ("),
    "half a surrogate pair": (b'{"\\ud800": {}}', "its header is not JSON ("),
    "deep": (b"[" * 200_000, "its header is not JSON ("),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", "its header is not JSON ("),
    "no object": ([], "its header is not a JSON object"),
    "twice": (b'{"a": {}, "a": {}}', "its header has a name twice"),
    "twice within": (b'{"a": {"dtype": "F32", "dtype": "F64"}}', "its header has a name twice"),
    "metadata": ({"__metadata__": {"a": 1}}, "its metadata must be texts by name"),
    "entry": ({"a": 3}, "'a' must have dtype, shape and data_offsets, and nothing else"),
    "more": ({"a": {**entry(), "x": 1}}, "'a' must have dtype, shape and data_offsets, and"),
    "dtype": ({"a": entry("F31")}, "'a' has the dtype 'F31'; known are BOOL, U8, "),
    "dtype of a list": ({"a": entry([])}, "'a' has the dtype []; known are BOOL, U8, "),
    "negative": ({"a": entry(shape=[-3, -4])}, "'a' has the shape [-3, -4] and the span [0, 48]"),
    "fraction": ({"a": entry(shape=[3.0, 4])}, "'a' has the shape [3.0, 4] and the span"),
    "boolean": ({"a": entry(shape=[True, 12])}, "'a' has the shape [True, 12] and the span"),
    "huge": ({"a": entry(shape=[2**40, 2**40])}, f"'a' takes {2**82} bytes as F32 of shape"),
    "huge axis": ({"a": entry(shape=[2**70, 0], span=[0, 0])}, "'a' has the shape ["),
    "span": ({"a": entry(span=[0, 40])}, "'a' takes 48 bytes as F32 of shape (3, 4), but its"),
    "backwards": ({"a": entry(span=[48, 0])}, "but its span has -48"),
    "three": ({"a": entry(span=[0, 48, 48])}, "'a' has the shape [3, 4] and the span [0, 48, 48]"),
    "beyond": ({"a": entry(span=[48, 96])}, "its tensors must fill the 48 bytes after the header"),
    "overlap": ({"a": entry(), "b": entry(shape=[2], span=[40, 48])}, "one ends at byte 48, the "),
    "gap": ({"a": entry(shape=[2], span=[0, 8])}, "one ends at byte 8, the next begins at 48"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_broken_header_of_safetensors_is_told(tmp_path: Path, case: str) -> None:
    header, told = HEADERS[case]
    path = with_header(tmp_path / "a.safetensors", header)
    assert told in refused(path)
    with pytest.raises(AnymhaError):
        read(path)


@pytest.mark.parametrize("claimed", [57, 2**31, 2**63, 2**64 - 1])
def test_header_of_claimed_length_takes_no_memory(tmp_path: Path, claimed: int) -> None:
    path = with_header(tmp_path / "a.safetensors", {}, length=claimed)
    assert f"its header claims {claimed} bytes, where the file has 58" in refused(path)


def test_short_safetensors_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"1234567")
    assert refused(path) == (
        f"{path} is not a safetensors file that can be read: it has 7 bytes, and the length of the "
        "header alone takes 8."
    )


def test_an_index_of_too_many_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    places = {f"a{number}": f"{number}.safetensors" for number in range(10_001)}
    path.write_text(json.dumps({"weight_map": places}))
    assert "it names 10001 files, and 10000 are the most" in refused(path)


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3, "a\0.safetensors"]
)
def test_shard_elsewhere_is_refused(tmp_path: Path, place: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path / "secret.safetensors", {"a": FLOATS})
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": place}}))
    assert f"it names {place!r}, which is no file next to it" in refused(path)


def test_index_that_does_not_fit_its_shards_is_told(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", {"a": FLOATS})
    path = tmp_path / "model.safetensors.index.json"
    cases: dict[str, Any] = {
        "one.safetensors does not hold 'b', as the index says": {"b": "one.safetensors"},
        "two.safetensors cannot be read: there is no such file": {"b": "two.safetensors"},
        "it has no `weight_map`": [],
    }
    for told, places in cases.items():
        path.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(FileError, match=told):
            read(path)


class Trap:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("open('trapped', 'w').close()",)


@pytest.fixture
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, in which a trap would leave a file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def zipped_pickle(path: Path, program: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
        for key, content in records.items():
            archive.writestr(f"a/data/{key}", content)
    return path


def test_code_in_torch_files_is_never_run(untouched: Path) -> None:
    path = zipped_pickle(untouched / "a.pt", pickle.dumps({"a": Trap()}, 2))
    told = refused(path)
    assert "it holds __builtin__.eval, which is code to run, and no code of a file is run" in told
    assert not (untouched / "trapped").exists()


def test_whole_modules_of_torch_are_refused(tmp_path: Path) -> None:
    torch = required("torch")
    torch.save(torch.nn.Linear(2, 3), tmp_path / "a.pt")
    told = refused(tmp_path / "a.pt")
    assert "it holds torch.nn.modules.linear.Linear, which is code to run" in told
    assert told.endswith("In torch, save `model.state_dict()`.")


def test_programs_of_torchscript_are_refused(tmp_path: Path) -> None:
    torch = required("torch")
    path = tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is on its way out
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), path)
    assert "programs of TorchScript are not read" in refused(path)


def state(shape: str = "(J\x02\0\0\0J\x03\0\0\0t", strides: str = "(J\x03\0\0\0J\x01\0\0\0t",
          offset: int = 0, numel: int = 6, kind: str = "FloatStorage") -> bytes:  # fmt: skip
    """A pickle of a dict with one tensor."""
    number = lambda n: "J" + struct.pack("<i", n).decode("latin1")  # noqa: E731
    text = lambda t: "X" + struct.pack("<I", len(t)).decode("latin1") + t  # noqa: E731
    storage = f"({text('storage')}ctorch\n{kind}\n{text('0')}{text('cpu')}{number(numel)}tQ"
    call = f"({storage}{number(offset)}{shape}{strides}\x89NtR"
    return f"\x80\x02}}({text('a')}ctorch._utils\n_rebuild_tensor_v2\n{call}u.".encode("latin1")


def test_pickle_by_hand_is_a_tensor(tmp_path: Path) -> None:
    content = np.arange(6, dtype=np.float32)
    path = zipped_pickle(tmp_path / "a.pt", state(), **{"0": content.tobytes()})
    assert same(read(path)["a"], content.reshape(2, 3))


PICKLES: dict[str, tuple[bytes, str]] = {
    "reach": (state(offset=1), "'a' reaches beyond its elements"),
    "size": (state(numel=7), "the elements of 'a' are missing, or fewer or more than it says"),
    "negative": (state(offset=-1), "a tensor has the offset, shape and strides (-1, "),
    "strides": (state(strides="J\x03\0\0\0\x85"), "a tensor has no storage, or not a stride for"),
    "kind": (state(kind="QInt8Storage"), "it has elements of the kind QInt8Storage"),
    "untyped": (state(kind="UntypedStorage", numel=24), "it has a tensor of None in UntypedSt"),
    "expanded": (
        state("(J\0\0\0\x40J\x03\0\0\0t", "(J\0\0\0\0J\x01\0\0\0t"),
        f"'a' claims {2**30 * 3 * 4} bytes out of 24",
    ),
    "instruction": (b"\x80\x02(ios\nsystem\n.", "its pickle has the instruction INST, which no"),
    "object": (b"\x80\x02cos\nsystem\n)\x81.", "it holds os.system, which is code to run"),
    "call of text": (b"\x80\x02X\x01\0\0\0a)R.", "it calls a, and no code of a file is run"),
    "call of a dtype": (b"\x80\x02ctorch\nload\n)R.", "it calls torch.load, and no code of a file"),
    "end": (b"\x80\x02}", "its pickle is broken (pickle exhausted before seeing STOP)"),
    "empty stack": (b"\x80\x02.", "its pickle is broken (pop from empty list)"),
    "huge memo": (b"\x80\x02}r\xff\xff\xff\x7fh\x00.", "its pickle is broken (0)"),
    "cycle": (b"\x80\x02}q\0X\x01\0\0\0ah\0s.", "its dicts are nested more than 32 deep"),
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLES)
def test_broken_pickle_is_told(tmp_path: Path, case: str) -> None:
    program, told = PICKLES[case]
    path = zipped_pickle(tmp_path / "a.pt", program, **{"0": bytes(24)})
    assert told in refused(path)


def test_dicts_that_multiply_are_stopped(tmp_path: Path) -> None:
    """Thirty dicts, each with the one before it twice: a thousand million names."""
    program = b"\x80\x02}q\0"
    for n in range(30):
        program += b"}q" + bytes([n + 1]) + b"(X\x01\0\0\0ah" + bytes([n]) + b"X\x01\0\0\0bh"
        program += bytes([n]) + b"u"
    path = zipped_pickle(tmp_path / "a.pt", program + b".")
    assert "its dicts have more than 1000000 values" in refused(path)


def bomb(path: Path, member: str, size: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, \
            archive.open(member, "w") as stream:  # fmt: skip
        for _ in range(size // 2**20):
            stream.write(bytes(2**20))
    return path


@pytest.mark.parametrize(
    ("name", "member"),
    [("a.npz", "a.npy"), ("a.pt", "a/data.pkl"), ("a.keras", "model.weights.h5")],
)
def test_archive_that_swells_takes_no_memory(tmp_path: Path, name: str, member: str) -> None:
    path = bomb(tmp_path / name, member, 2 * SAFE_BYTES)
    tracemalloc.start()
    told = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"its member {member!r} claims {2 * SAFE_BYTES} bytes in " in told
    assert peak < 4 * 2**20


def npy(header: bytes, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + content


NPY: dict[str, tuple[bytes, str]] = {
    "objects": (npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"), "holds object"),
    "bytes": (
        npy(b"{'descr': '|V2', 'fortran_order': False, 'shape': (1,), }", b"ab"),
        "holds |V2, not numbers (NumPy writes bfloat16 and float8 so, without saying which they",
    ),
    "huge": (
        npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,), }"),
        "and float64 of shape (99999999999,) takes 799999999992",
    ),
    "negative": (npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }"), "(-1,)"),
    "code": (npy(b"__import__('os').getcwd()"), "the header of 'a.npy' is broken ("),
    "deep": (npy(b"(" * 9000), "the header of 'a.npy' is broken ("),
    "version": (npy(b"{}", version=b"\x09\x00"), "the header of 'a.npy' is broken ("),
    "no array": (b"text", "the header of 'a.npy' is broken ("),
}  # fmt: skip


@pytest.mark.parametrize("case", NPY)
def test_broken_array_of_an_npz_is_told(tmp_path: Path, case: str) -> None:
    content, told = NPY[case]
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    assert told in refused(tmp_path / "a.npz")


def test_pickled_objects_of_an_npz_are_not_run(untouched: Path) -> None:
    np.savez(untouched / "a.npz", a=np.array([Trap()], dtype=object))
    assert "holds object, not numbers" in refused(untouched / "a.npz")
    assert not (untouched / "trapped").exists()


def test_members_that_lead_out_of_an_archive_are_never_written(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    buffer = io.BytesIO()
    np.save(buffer, FLOATS)
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("../../out.npy", buffer.getvalue())
    before = sorted(tmp_path.rglob("*"))
    assert list(read(folder / "a.npz")) == ["../../out"]
    assert sorted(tmp_path.rglob("*")) == before


def test_archives_with_two_members_of_a_name_are_told(tmp_path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        warnings.simplefilter("ignore", UserWarning)  # of zipfile, about this very thing
        archive.writestr("a.npy", b"")
        archive.writestr("a.npy", b"")
    assert "it has two members 'a.npy'" in refused(tmp_path / "a.npz")


def test_archives_of_other_methods_are_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", b"12")
    assert "is encrypted, or neither stored nor deflated" in refused(tmp_path / "a.npz")


def h5(path: Path, make: Callable[[Any, Any], None]) -> Path:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(path, "w") as file:
        make(h5py, file)
    return path


def in_another_file(h5py: Any, file: Any) -> None:
    secret = os.fspath(Path(file.filename).parent / "secret")
    Path(secret).write_bytes(bytes(48))
    file.create_dataset("a", (3, 4), "f4", external=secret)


def virtual(h5py: Any, file: Any) -> None:
    layout = h5py.VirtualLayout((3, 4), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "a", (3, 4))
    file.create_virtual_dataset("a", layout)


def itself(h5py: Any, file: Any) -> None:
    group = file.create_group("a")
    group["b"] = group


def text(h5py: Any, file: Any) -> None:
    file["a"] = "text"


def outside(h5py: Any, file: Any) -> None:
    file["a"] = h5py.ExternalLink("other.h5", "/a")


def pointing(h5py: Any, file: Any) -> None:
    file["a"] = h5py.SoftLink("/nowhere")


def empty(h5py: Any, file: Any) -> None:
    file.create_dataset("a", (2**20, 2**20), "f4", chunks=(64, 64))


def opaque(h5py: Any, file: Any) -> None:
    file["a"] = np.zeros(3, "V2")


H5: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "in another file": (in_another_file, "the elements of 'a' do not lie in this file"),
    "virtual": (virtual, "the elements of 'a' do not lie in this file"),
    "outside": (outside, "'a' is a link to another place, which is not followed"),
    "pointing": (pointing, "'a' is a link to another place, which is not followed"),
    "itself": (itself, "its group 'a/b/' holds itself, or lies too deep"),
    "text": (text, "'a' holds object, not numbers"),
    "opaque": (opaque, "'a' holds bytes without the name of their dtype"),
    "empty": (empty, f"'a' claims {2**42} bytes in 0, as a file does that is made to fill the"),
}


@pytest.mark.parametrize("case", H5)
def test_hdf5_that_reaches_outside_itself_is_refused(tmp_path: Path, case: str) -> None:
    make, told = H5[case]
    assert told in refused(h5(tmp_path / "a.h5", make))


def stored_in_part(h5py: Any, file: Any, **options: Any) -> None:
    file.create_dataset("a", (1200, 2), "f4", chunks=(600, 2), **options)[:600] = 1


@pytest.mark.parametrize("layout", ["chunks", "contiguous"])
def test_fill_value_of_hdf5_is_not_read(tmp_path: Path, layout: str) -> None:
    """HDF5's library reads beyond its end where a damaged file says that it is longer."""

    def make(h5py: Any, file: Any) -> None:
        if layout == "chunks":
            stored_in_part(h5py, file, fillvalue=3.0)
        else:
            file.create_dataset("a", (1200, 2), "f4", fillvalue=3.0)

    path = h5(tmp_path / "a.h5", make)
    assert "fill value of" in refused(path)
    content = path.read_bytes()
    length = b"\1\4\0\0\0" + np.float32(3).tobytes()
    assert content.count(length) == 1
    path.write_bytes(content.replace(length, b"\1\x70" + length[2:]))
    refused(path)


def test_chunks_that_hdf5_has_not_stored_are_zero(tmp_path: Path) -> None:
    with open_file(h5(tmp_path / "a.h5", stored_in_part)) as reader:
        found = reader.read("a")
    assert found[:600].min() == 1
    assert not found[600:].any()


def test_fill_value_of_chunks_that_are_all_stored_is_no_matter(tmp_path: Path) -> None:
    def make(h5py: Any, file: Any) -> None:
        stored_in_part(h5py, file, fillvalue=3.0)
        file["a"][600:] = 2

    with open_file(h5(tmp_path / "a.h5", make)) as reader:
        assert reader.read("a")[600:].min() == 2


def test_damaged_heap_of_hdf5_is_not_read(tmp_path: Path) -> None:
    """Where Keras keeps the name of a dtype, HDF5's library reads for ever if a length is 0."""
    array = sample("bfloat16", (3, 4))
    pytest.importorskip("h5py", reason="h5py is not installed")
    path = write(tmp_path / "a.h5", {"a": array})
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL") + 16
    content[heap : heap + 32] = bytes(32)
    path.write_bytes(content)
    assert same(read(path)["a"], array)


def own_child(content: bytearray, node: int) -> None:
    content[node + 5] = 1  # its level
    rank = content[node + 4] * 3
    struct.pack_into("<Q", content, node + 32 + 8 * rank, node)


def own_neighbour(content: bytearray, node: int) -> None:
    struct.pack_into("<QQ", content, node + 8, node, node)


def endless(content: bytearray, heap: int) -> None:
    free, data = struct.unpack_from("<QQ", content, heap + 16)
    struct.pack_into("<Q", content, data + free, free)


@pytest.mark.parametrize(
    ("table", "change", "told"),
    [
        (b"TREE\x00", own_child, "lies at two levels of it"),
        (b"TREE\x01", own_child, "lies at two levels of it"),
        (b"TREE\x00", own_neighbour, "is its own neighbour"),
        (b"TREE\x01", own_neighbour, "is its own neighbour"),
        (b"HEAP", endless, "whose list of free places loops"),
    ],
)
def test_tables_of_hdf5_that_loop_are_refused(
    tmp_path: Path, table: bytes, change: Callable[[bytearray, int], None], told: str
) -> None:
    """HDF5's library follows them for ever, or until the process dies."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("b/a", data=np.ones((4, 4), "f4"), chunks=(2, 2))
    content = bytearray((tmp_path / "a.h5").read_bytes())
    change(content, content.rindex(table))
    (tmp_path / "a.h5").write_bytes(content)
    assert told in refused(tmp_path / "a.h5")


def test_large_tables_of_hdf5_are_read(tmp_path: Path) -> None:
    """Their trees have three levels."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    array = np.arange(5000, dtype="f4")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for number in range(600):
            file.create_group(f"group_{number}")
        file.create_dataset("a", data=array, chunks=(1,))
    assert same(read(tmp_path / "a.h5")["a"], array)


def test_keras_archive_without_weights_is_told(tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="h5py is not installed")
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("../model.weights.h5", b"")
    assert "it has no member 'model.weights.h5'" in refused(tmp_path / "a.keras")


@pytest.mark.parametrize("keys", [[".."], ["a", "../../b"], ["/etc"], ["."]])
def test_orbax_keys_that_lead_out_of_the_folder_are_refused(tmp_path: Path, keys: Any) -> None:
    entry = {
        "key_metadata": [{"key": key} for key in keys],
        "value_metadata": {"value_type": "jax.Array"},
    }
    metadata = {"tree_metadata": {"a": entry}, "use_ocdbt": False}
    (tmp_path / "_METADATA").write_text(json.dumps(metadata))
    assert "leads out of the folder" in refused(tmp_path)


def test_broken_orbax_is_told(tmp_path: Path) -> None:
    tree = {"a": {"kernel": FLOATS}, "b": sample("float32", (50, 60))}
    save_orbax(tmp_path / "x", tree, use_ocdbt=False)
    whole = (tmp_path / "x" / "_METADATA").read_bytes()
    (tmp_path / "x" / "_METADATA").write_bytes(whole[:-20])
    assert "its '_METADATA' is broken (" in refused(tmp_path / "x")
    (tmp_path / "x" / "_METADATA").write_bytes(whole)
    chunk = tmp_path / "x" / "b" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-100])
    assert "'b': " in refused(tmp_path / "x")
    chunk.unlink()
    assert "'b': " in refused(tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "b")
    refused(tmp_path / "x")


def onnx(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    for name in ("external.onnx", "external.onnx.data"):
        shutil.copy(DATA / name, folder)
    path = folder / "external.onnx"
    path.write_bytes(change(path.read_bytes()))
    return path


def test_onnx_elements_elsewhere_are_refused(tmp_path: Path) -> None:
    place = b"external.onnx.data"
    other = b"../../../etc/passw"
    path = onnx(tmp_path, lambda content: content.replace(place, other))
    assert f"the elements of 'a' lie in {other.decode()!r}, not next to the file" in refused(path)
    path = onnx(tmp_path, lambda content: content)
    (tmp_path / "external.onnx.data").write_bytes(bytes(143))
    assert "'b' reaches beyond the file that holds it" in refused(path)


def test_broken_onnx_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    for content, told in ((b"", "a.onnx is empty: it has 0 bytes"),
                          (b"\x3a\x7f", "a field runs over the end"),
                          (b"\x08\x01\x0f", "it has the wire type 7"),
                          (b"\x08\x80", "it ends within"),
                          (b"\x08" + b"\xff" * 11, "more than ten bytes")):  # fmt: skip
        path.write_bytes(content)
        assert told in refused(path)


FUZZED = (
    "safetensors", "npz", "npz compressed", "torch", "torch before 1.6", "msgpack", "h5", "keras",
    "onnx",
)  # fmt: skip


@pytest.fixture(scope="module", params=FUZZED)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file of each format."""
    folder = tmp_path_factory.mktemp("whole")
    return WRITTEN[request.param](folder)[0]


damages = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4
    ).map(lambda flips: ("flip", flips, 0)),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages)
@example(damage=("cut", 0.0, 0))
def test_damaged_file_gives_arrays_or_an_error_of_anymha(
    whole: Path, tmp_path: Path, damage: Any
) -> None:
    """And never another error. What safetensors' own library reads, is read as it reads it."""
    content = bytearray(whole.read_bytes())
    kind, where, _ = damage
    if kind == "cut":
        content = content[: int(where * len(content))]
    else:
        for place, mask in where:
            content[int(place * len(content))] ^= mask
    path = tmp_path / whole.name
    path.write_bytes(content)
    try:
        found = read(path)
    except AnymhaError:
        return
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "np") as file:
            wanted = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert all(same(found[name], array) for name, array in wanted.items())
    if path.suffix in (".npz", ".pt", ".keras"):  # they have checksums: nothing wrong gets through
        right = read(whole)
        assert all(same(array, right[name]) for name, array in found.items() if name in right)


@given(program=st.binary(max_size=200))
def test_any_bytes_as_a_pickle_are_refused_or_plain(program: bytes) -> None:
    with suppress(RefusedPickle):
        PickleMachine(b"\x80\x02" + program).run()


def empty_and_huge(path: Path) -> Path:
    """An array of no elements that NumPy cannot make, in any of the formats."""
    shape = (0, 2**61, 4)
    with create_file(path, {"a": Tensor((0, 3, 4), np.dtype("f4"))}) as writer:
        writer.write("a", np.zeros((0, 3, 4), "f4"))
    content = path.read_bytes()
    if path.suffix == ".npz":
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            stream, {"descr": "<f4", "fortran_order": False, "shape": shape}
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", stream.getvalue())
    elif path.suffix == ".pt":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            program = archive.read("archive/data.pkl")
        three = b"\x8a\x09" + (3).to_bytes(9, "little")
        assert three in program
        zipped_pickle(path, program.replace(three, three[:2] + shape[1].to_bytes(9, "little")),
                      **{"0": b""})  # fmt: skip
    return path


def test_an_array_without_elements_of_an_impossible_shape_is_told(tmp_path: Path) -> None:
    """NumPy counts the other axes for its limit of bytes, although the array has none."""
    for suffix in (".npz", ".pt"):
        told = refused(empty_and_huge(tmp_path / f"a{suffix}"))
        assert "'a' has the shape (0, 2305843009213693952, 4)" in told
    header = {"a": entry(shape=[0, 2**61, 4], span=[0, 0])}
    told = refused(with_header(tmp_path / "a.safetensors", header, 0))
    assert "'a' has the shape (0, 2305843009213693952, 4)" in told
    flax = b"\x81\xa1a\xc7\x16\x01\x93\x92\x00\xcf" + (2**62).to_bytes(8) + b"\xa7float32"
    (tmp_path / "a.msgpack").write_bytes(flax + b"\xc4\x00")
    assert "'a' has the shape (0, 4611686018427387904)" in refused(tmp_path / "a.msgpack")
    dims = b"\x08\x00\x08" + b"\x80" * 8 + b"\x40\x10\x01\x42\x01a"
    graph = b"\x2a" + bytes([len(dims)]) + dims
    (tmp_path / "a.onnx").write_bytes(b"\x08\x08\x3a" + bytes([len(graph)]) + graph)
    assert "'a' has the shape (0, 4611686018427387904)" in refused(tmp_path / "a.onnx")


class Broken(io.BytesIO):
    """A file on a disk that fails."""

    def __init__(self, content: bytes, good: int) -> None:
        super().__init__(content)
        self.good = good

    def read(self, size: int | None = -1) -> bytes:
        self.good -= 1
        if self.good < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


@pytest.mark.parametrize("good", range(8))
@pytest.mark.parametrize(
    "suffix", [".safetensors", ".npz", ".pt", ".bin", ".h5", ".keras", ".onnx", ".gguf", ".msgpack"]
)
def test_a_disk_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, good: int
) -> None:
    kind = {".bin": "torch before 1.6", ".keras": "keras", ".onnx": "onnx", ".gguf": "gguf",
            ".msgpack": "msgpack", ".h5": "hdf5"}.get(suffix)  # fmt: skip
    if kind is not None and not fuzz_samples.installed(kind):
        pytest.skip(f"no library reads {kind} here")
    if kind is None:
        path = write(tmp_path / f"a{suffix}", {"a": FLOATS})
    else:
        make = next(iter(fuzz_samples.SAMPLES[kind].values()))
        path = fuzz_command.place(make(tmp_path), tmp_path / "case")
    content, opened = path.read_bytes(), Path.open

    def fail(self: Path, *args: Any, **options: Any) -> Any:
        return opened(self, *args, **options) if self != path else Broken(content, good)

    monkeypatch.setattr(Path, "open", fail)
    with suppress(FileError):
        read(path)  # enough reads may be good


def test_what_vanishes_or_is_closed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.safetensors", {"a": FLOATS})
    with open_file(path) as reader:
        monkeypatch.setattr(reader, "_read", lambda name: os.stat(tmp_path / "gone"))
        with pytest.raises(FileError, match="cannot be read: No such file or directory"):
            reader.read("a")

    def closed(self: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "iterdir", closed)
    assert refused(tmp_path).endswith("cannot be read: Permission denied.")


def test_json_that_is_nested_too_deeply_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a":' + "[" * 100_000)
    assert refused(tmp_path / "a.json").endswith("a.json is JSON, not weights.")


def test_unreadable_files_are_told(tmp_path: Path) -> None:
    missing = tmp_path / "a.safetensors"
    assert refused(missing) == f"{missing} cannot be read: there is no such file."
    os.mkfifo(tmp_path / "a.npz")
    assert refused(tmp_path / "a.npz").endswith("cannot be read: it is not a regular file.")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".h5"])
def test_no_partial_file_is_left(tmp_path: Path, suffix: str) -> None:
    if suffix == ".h5":
        pytest.importorskip("h5py", reason="h5py is not installed")
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"what was there")
    announced_both = announced({"a": FLOATS, "b": FLOATS})
    with suppress(RuntimeError), create_file(path, announced_both) as writer:
        writer.write("a", FLOATS)
        raise RuntimeError
    with pytest.raises(ValueError, match="not written: b"), create_file(path, announced_both) as w:
        w.write("a", FLOATS)
    with pytest.raises(ValueError, match="was announced as float32 of shape"), \
            create_file(path, announced_both) as writer:  # fmt: skip
        writer.write("a", FLOATS.T)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_dtypes_that_a_format_cannot_hold_are_refused(tmp_path: Path) -> None:
    bfloat16 = {"a": Tensor((2,), sample("bfloat16", (2,)).dtype)}
    complexes = {"a": Tensor((2,), np.dtype(np.complex256))}
    texts = {"a": Tensor((2,), np.dtype("U3"))}
    cases = [(".npz", bfloat16), (".safetensors", complexes), (".pt", complexes), (".pt", texts)]
    for suffix, tensors in cases:
        path = tmp_path / f"a{suffix}"
        with pytest.raises(FileError, match=r"file cannot hold `a` of dtype "), \
                create_file(path, tensors):  # fmt: skip
            pass
        assert not path.exists()
