"""Files of every format: what their own libraries write is read, what we write they read."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from anymha.errors import FileError
from anymha.interchange.files.formats import FOLDER, FORMATS, create_file, format_of, open_file
from anymha.interchange.files.reader import Reader, Tensor
from tests.file_samples import (
    BUILTIN,
    EXTENDED,
    WRITTEN,
    announced,
    as_torch,
    by_safetensors_in_shards,
    same,
    sample,
    samples,
    save_orbax,
    write,
)
from tests.frameworks import required

DATA = Path(__file__).parent / "data"
OURS = {".safetensors": EXTENDED, ".npz": (), ".pt": EXTENDED, ".h5": EXTENDED}


def read(path: Path) -> dict[str, np.ndarray]:
    with open_file(path) as reader:
        return {name: reader.read(name) for name in reader.tensors}


@pytest.mark.parametrize("written", WRITTEN)
def test_what_the_format_s_own_library_writes_is_read(tmp_path: Path, written: str) -> None:
    path, arrays = WRITTEN[written](tmp_path)
    with open_file(path) as reader:
        assert set(reader.tensors) == set(arrays)
        for name, array in arrays.items():
            assert reader.tensors[name] == Tensor(array.shape, array.dtype), name
        for name in reversed(list(arrays)):  # in any order
            found = reader.read(name)
            assert same(found, arrays[name]), name
            assert found.flags.c_contiguous
            assert found.flags.writeable


@pytest.mark.parametrize("suffix", OURS)
def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    if suffix == ".h5":
        pytest.importorskip("h5py", reason="h5py is not installed")
    arrays = samples(*BUILTIN, *OURS[suffix], separator="/" if suffix == ".h5" else ".")
    found = read(write(tmp_path / f"a{suffix}", arrays))
    assert set(found) == set(arrays)
    assert all(same(found[name], array) for name, array in arrays.items())


def test_safetensors_of_ours_are_read_by_the_library(tmp_path: Path) -> None:
    arrays = samples(*BUILTIN, "bfloat16")
    path = write(tmp_path / "a.safetensors", arrays, {"one": "1"})
    found = safetensors.numpy.load_file(path)
    assert all(same(found[name], array) for name, array in arrays.items())
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"one": "1"}


def test_npz_of_ours_are_read_by_numpy(tmp_path: Path) -> None:
    arrays = samples(*BUILTIN)
    with np.load(write(tmp_path / "a.npz", arrays), allow_pickle=False) as found:
        assert all(same(found[name], array) for name, array in arrays.items())


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_files_of_ours_are_read_by_torch(tmp_path: Path, mmap: bool) -> None:
    torch = required("torch")
    arrays = samples("float64", "float32", "float16", "int64", "bool", "uint16", *EXTENDED)
    path = write(tmp_path / "a.pt", arrays)
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        wanted = as_torch(torch, array)
        assert found[name].dtype == wanted.dtype
        assert found[name].shape == wanted.shape
        bits = [x.reshape(-1).view(torch.uint8) for x in (found[name], wanted) if x.numel()]
        assert not bits or torch.equal(*bits)


def test_keras_reads_the_weights_that_are_written(tmp_path: Path) -> None:
    """Its reader of HDF5 takes an opaque dataset for bfloat16 by the same attribute."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    array = sample("bfloat16", (3, 4))
    with h5py.File(write(tmp_path / "a.weights.h5", {"layers/a/vars/0": array})) as file:
        found = file["layers/a/vars/0"]
        assert found.attrs["dtype"] == "bfloat16"
        assert same(np.array(found).view(ml_dtypes.bfloat16), array)


@pytest.mark.parametrize("suffix", OURS)
def test_arrays_that_are_not_contiguous_are_written_right(tmp_path: Path, suffix: str) -> None:
    if suffix == ".h5":
        pytest.importorskip("h5py", reason="h5py is not installed")
    base = sample("float32", (4, 6))
    arrays = {"turned": base.T, "every second": base[::2, 1::2], "repeated": base[:1].repeat(3, 0),
              "broadcast": np.broadcast_to(base[0], (3, 6)), "backwards": base[::-1]}  # fmt: skip
    found = read(write(tmp_path / f"a{suffix}", arrays))
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def test_tensors_are_written_in_any_order(tmp_path: Path) -> None:
    arrays = samples("uint8", "float64", "float16")
    path = tmp_path / "a.safetensors"
    with create_file(path, announced(arrays)) as writer:
        for name in reversed(list(arrays)):
            writer.write(name, arrays[name])
    found = safetensors.numpy.load_file(path)
    assert all(same(found[name], array) for name, array in arrays.items())


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """The file is cut within the last tensor after it was opened: the first is still there."""
    arrays = {"first": sample("float32", (3, 4)), "last": sample("float32", (300, 400))}
    path = write(tmp_path / "a.safetensors", arrays)
    with open_file(path) as reader:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 400_000)
        assert same(reader.read("first"), arrays["first"])
        with pytest.raises(FileError, match="it ends within 'last'"):
            reader.read("last")


def test_unknown_tensor_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": sample("float32", (2,))})
    with open_file(path) as reader, pytest.raises(FileError, match="holds no tensor 'b'"):
        reader.read("b")


def test_initialisers_beside_an_onnx_file_are_read() -> None:
    found = read(DATA / "external.onnx")
    assert same(found["a"], np.arange(24, dtype=np.float32).reshape(4, 6))
    assert same(found["b"], np.arange(6, dtype=np.float64))


def test_orbax_in_folders_and_under_its_manager_is_read(tmp_path: Path) -> None:
    tree = {"a": {"kernel": sample("float32", (3, 4))}}
    save_orbax(tmp_path / "plain", tree, use_ocdbt=False)
    save_orbax(tmp_path / "step" / "default", tree)
    for path in (tmp_path / "plain", tmp_path / "step"):
        assert same(read(path)["a/kernel"], tree["a"]["kernel"])


def test_variables_of_flax_are_named_without_their_value(tmp_path: Path) -> None:
    tree = {"query": {"kernel": {"value": sample("float32", (3, 4))}}}
    save_orbax(tmp_path / "state", tree)
    assert list(read(tmp_path / "state")) == ["query/kernel"]


def test_shards_are_opened_only_where_the_index_says(tmp_path: Path) -> None:
    path, arrays = by_safetensors_in_shards(tmp_path)
    index = json.loads(path.read_text())
    (tmp_path / "model-1.safetensors").unlink()
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if "-0." in f}
    path.write_text(json.dumps(index))
    assert set(read(path)) == set(index["weight_map"]) < set(arrays)


def test_the_format_is_told_by_the_name() -> None:
    assert format_of(Path("a.weights.h5")).separator == "/"
    assert format_of(Path("A.SAFETENSORS")).metadata
    assert format_of(Path("model.safetensors.index.json")).name == "sharded safetensors"
    with pytest.raises(FileError, match=r"weights\.dat cannot be read: there is no such file\."):
        format_of(Path("weights.dat"))


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
def test_formats_that_are_only_read_say_so(tmp_path: Path, one) -> None:
    path = tmp_path if one.suffixes[0] == FOLDER else tmp_path / f"a{one.suffixes[0]}"
    if one.writer is None:
        with pytest.raises(FileError, match=r"is only read\. Written are: \.safetensors, "):
            create_file(path, {})
    else:
        assert not one.suffixes[0].endswith((".keras", ".onnx"))


def test_a_library_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("anymha.interchange.files.optional.importlib.import_module", missing)
    (tmp_path / "_METADATA").write_text('{"tree_metadata": {}}')
    for path, name, extra in ((tmp_path / "a.h5", "h5py", "hdf5"),
                              (tmp_path, "tensorstore", "orbax")):  # fmt: skip
        if path.suffix:
            path.write_bytes(b"")
        with pytest.raises(FileError) as error:
            reader_of(path)
        assert str(error.value) == (
            f"{path} needs {name}, which is not installed. Install it with: "
            f"pip install 'anymha[{extra}]'."
        )


def reader_of(path: Path) -> Reader:
    """What `open_file` gives, but for the import of its module, which a test has replaced."""
    from anymha.interchange.files.hdf5 import open_hdf5  # noqa: PLC0415
    from anymha.interchange.files.orbax import open_orbax  # noqa: PLC0415

    return open_orbax(path) if path.is_dir() else open_hdf5(path)
