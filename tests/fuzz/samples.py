"""Small honest files of every format that is read, some in several kinds."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import anymha
from anymha.interchange.files.formats import create_file
from anymha.interchange.files.reader import Tensor
from tests.tensorflow_files import checkpoint, field, varint

DATA = Path(__file__).parents[1] / "data"
PARTS = ("self.query", "self.key", "self.value", "output.dense")

Files = dict[str, bytes]
"""A sample: the content of its files by their names in a folder; the first one is opened."""


def arrays() -> dict[str, np.ndarray]:
    """A layer of BERT's and some others."""
    rng = np.random.default_rng(5)
    layer = {f"layer.0.{part}.weight": rng.standard_normal((4, 4)).astype("f4") for part in PARTS}
    return {
        **layer,
        "layer.0.self.query.bias": rng.standard_normal(4).astype("f4"),
        "half": rng.standard_normal((2, 3)).astype("f2"),
        "long": np.arange(5),
        "empty": np.zeros((0, 2), "f8"),
        "flag": np.array([True, False]),
    }


def written(name: str) -> Callable[[Path], Files]:
    """A file that anymha writes."""

    def make(folder: Path) -> Files:
        path = folder / name
        tensors = {n: Tensor(a.shape, a.dtype) for n, a in arrays().items()}
        with create_file(path, tensors) as writer:
            for key, array in arrays().items():
                writer.write(key, array)
        return {name: path.read_bytes()}

    return make


def own(folder: Path) -> Files:
    layer = anymha.MultiHeadAttention(2, 2, query_features=4, backend="numpy", seed=1)
    anymha.save(folder / "own.safetensors", layer)
    return {"own.safetensors": (folder / "own.safetensors").read_bytes()}


def sharded(suffix: str) -> Callable[[Path], Files]:
    """Two files of a format, and their index."""

    def make(folder: Path) -> Files:
        halves: list[dict[str, np.ndarray]] = [{}, {}]
        for number, (name, array) in enumerate(arrays().items()):
            halves[number % 2][name.replace(".", "/") if suffix == ".h5" else name] = array
        files, places = {}, {}
        for number, half in enumerate(halves):
            file = f"m-{number}{suffix}"
            tensors = {name: Tensor(array.shape, array.dtype) for name, array in half.items()}
            with create_file(folder / file, tensors) as writer:
                for name, array in half.items():
                    writer.write(name, array)
            files[file] = (folder / file).read_bytes()
            places |= dict.fromkeys(half, file)
        index = json.dumps({"metadata": {"total_size": 9}, "weight_map": places}).encode()
        return {f"m{suffix}.index.json": index, **files}

    return make


def npz_others(folder: Path) -> Files:
    """Arrays of other orders, and of no axes, texts and complex numbers; the second header."""
    stream = io.BytesIO()
    mixed = {
        "big": np.arange(6, dtype=">f8").reshape(2, 3), "one": np.array(3, "i2"),
        "text": np.array(["ab", "c"]), "bytes": np.array([b"ab"]), "c": np.ones((2, 2), "c8"),
        "layer.0.self.query.weight": np.asfortranarray(arrays()["layer.0.self.query.weight"]),
    }  # fmt: skip
    with zipfile.ZipFile(stream, "w") as archive:
        for number, (name, array) in enumerate(mixed.items()):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, version=(1 + number % 2, 0))
    return {"a.npz": stream.getvalue()}


def npz(folder: Path) -> Files:
    stream = io.BytesIO()
    turned = {name: np.asfortranarray(array) for name, array in arrays().items()}
    np.savez_compressed(stream, **turned)
    return {"a.npz": stream.getvalue()}


def torch_saved(folder: Path) -> Files:
    """The pickle as torch itself writes it, with memos, other values and views."""
    text = lambda words: b"X" + struct.pack("<I", len(words)) + words.encode()  # noqa: E731
    storage = b"(" + text("storage") + b"q\1ctorch\nFloatStorage\nq\2" + text("0") + text("cpu")
    storage += b"K\x18tq\3Q"
    made = b"ctorch._utils\n_rebuild_tensor_v2\nq\4(" + storage
    made += b"K\0K\4K\6\x86K\6K\1\x86\x89ccollections\nOrderedDict\n)RtR"
    turned = b"h\4(" + storage + b"K\0K\2K\2\x86K\1K\6\x86\x89NtR"
    typed = b"ctorch._utils\n_rebuild_tensor_v3\n((" + text("storage")
    typed += b"ctorch.storage\nUntypedStorage\n" + text("1") + text("cpu") + b"K\4tQ"
    typed += b"K\0K\4\x85K\1\x85\x89Nctorch\nfloat8_e5m2\ntR"
    others = text("rates") + b"](G?\xf0\0\0\0\0\0\0NK\3\x88e" + text("step") + b"\x8a\2\1\2"
    program = b"\x80\x02ccollections\nOrderedDict\n)R(" + text("a") + made + text("b") + turned
    program += text("c") + typed + text("more") + b"}q\5(" + others + b"uu}b."
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", np.arange(24, dtype="<f4").tobytes())
        archive.writestr("archive/data/1", bytes(range(60, 64)))
        archive.writestr("archive/byteorder", b"little")
    return {"b.pt": stream.getvalue()}


def torch_before_1_6(folder: Path) -> Files:
    import torch  # noqa: PLC0415  installed where it is called

    state = {name: torch.from_numpy(array) for name, array in arrays().items()
             if array.dtype.name in ("float32", "int64")}  # fmt: skip
    torch.save(state, folder / "old.bin", _use_new_zipfile_serialization=False)
    return {"old.bin": (folder / "old.bin").read_bytes()}


def distributed(folder: Path) -> Files:
    import torch  # noqa: PLC0415  installed where it is called
    import torch.distributed.checkpoint as checkpoint  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        state = {"a": torch.ones(3, 4), "b": torch.arange(5)}
        checkpoint.save(  # pyright: ignore[reportPrivateImportUsage]
            state, checkpoint_id=str(folder / "dcp")
        )
    files = sorted((folder / "dcp").iterdir())
    return {f"x/{file.name}": file.read_bytes() for file in files}


def two_processes(folder: Path) -> Files:
    """A checkpoint of which two processes wrote half of the rows each; see tests/data."""
    files = sorted((DATA / "distributed").iterdir())
    return {f"x/{file.name}": file.read_bytes() for file in files}


def flax_saved(folder: Path) -> Files:
    import flax.serialization  # noqa: PLC0415  installed where it is called

    return {"a.msgpack": flax.serialization.to_bytes({"x": arrays(), "step": 3})}


def gguf(folder: Path) -> Files:
    return {"a.gguf": (DATA / "sample.gguf").read_bytes()}


def tensorflow(graph: bool) -> Callable[[Path], Files]:
    def make(folder: Path) -> Files:
        return checkpoint({n.replace(".", "/"): a for n, a in arrays().items()}, graph)

    return make


def h5(latest: bool) -> Callable[[Path], Files]:
    def make(folder: Path) -> Files:
        h5py: Any = importlib.import_module("h5py")
        stream = io.BytesIO()
        with h5py.File(stream, "w", libver="latest" if latest else None) as file:
            for name, array in arrays().items():
                file.create_dataset(name.replace(".", "/"), data=array)
            packed = {"compression": "gzip", "shuffle": True, "fletcher32": True}
            data = np.arange(60, dtype=">f4").reshape(6, 10)
            file.create_dataset("packed", data=data, chunks=(4, 4), **packed)
            file.create_dataset("plain", data=data, chunks=(3, 10), maxshape=(None, 10))
            named = file.create_dataset("named", data=np.zeros(3, "V2"))
            named.attrs["dtype"] = "bfloat16"
        return {"a.weights.h5": stream.getvalue()}

    return make


def keras_weights(folder: Path) -> Files:
    """As Keras 3 saves them: numbers in groups that have names."""
    h5py: Any = importlib.import_module("h5py")
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for number, (name, array) in enumerate(arrays().items()):
            group = file.require_group(f"layers/attention/{name.rpartition('.')[0] or number}/vars")
            group.parent.attrs["name"] = name
            group[str(len(group))] = array
        file.create_group("optimizer/vars")["0"] = np.arange(3)
    return {"model.weights.h5": stream.getvalue()}


def whole_h5(folder: Path) -> Files:
    """As Keras 2 saves a whole model: its configuration, lists of names, and `:0` after them."""
    h5py: Any = importlib.import_module("h5py")
    stream = io.BytesIO()
    config = {"class_name": "Functional", "config": {"layers": [{"class_name": "Dense"}] * 3}}
    with h5py.File(stream, "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"] = np.bytes_("2.15.0")
        weights = file.create_group("model_weights")
        weights.attrs["layer_names"] = np.array([b"bert", b"dropout"])
        layer = weights.create_group("bert")
        weights.create_group("dropout").attrs["weight_names"] = np.zeros(0)
        names = [f"tf_bert_model/bert/{n.replace('.', '/')}:0" for n in arrays()]
        layer.attrs["weight_names"] = np.array([name.encode() for name in names])
        for name, array in zip(names, arrays().values(), strict=True):
            layer[name] = array
        file["optimizer_weights/Adam/iteration:0"] = np.int64(7)
    return {"tf_model.h5": stream.getvalue()}


def keras(weights: Callable[[Path], Files], method: int) -> Callable[[Path], Files]:
    """As Keras 3 saves a whole model."""

    def make(folder: Path) -> Files:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
            archive.writestr("config.json", json.dumps({"module": "keras", "config": {}}))
            archive.writestr("model.weights.h5", next(iter(weights(folder).values())))
        return {"a.keras": stream.getvalue()}

    return make


def onnx(folder: Path) -> Files:
    tensors, beside = b"", b""
    kinds = {"f4": 1, "i8": 7, "f8": 11, "f2": 10, "b1": 9}
    for number, (name, array) in enumerate(arrays().items()):
        tensor = b"".join(field(1, size) for size in array.shape)
        tensor += field(2, kinds[array.dtype.str[1:]]) + field(8, name.encode())
        content = array.tobytes()
        if number % 3 == 2:
            pairs = {"location": "a.data", "offset": str(len(beside)), "length": str(len(content))}
            for key, value in pairs.items():
                tensor += field(13, field(1, key.encode()) + field(2, value.encode()))
            tensor += field(14, 1)
            beside += content
        elif array.dtype == np.int64:
            tensor += field(7, b"".join(map(varint, array.tolist())))
        else:
            tensor += field(4 if array.dtype == np.float32 else 9, content)
        tensors += field(5, tensor)
    nodes = field(1, field(1, b"x") + field(2, b"y") + field(4, b"MatMul"))
    return {"a.onnx": field(1, 8) + field(7, nodes + tensors) + field(8, b"\x10\x11"),
            "a.data": beside}  # fmt: skip


def orbax(driver: str, database: bool) -> Callable[[Path], Files]:
    def make(folder: Path) -> Files:
        tensorstore: Any = importlib.import_module("tensorstore")
        root, tree = folder / f"{driver}{database}", {}
        root.mkdir()
        for name, array in arrays().items():
            if not array.size:
                continue
            keys = name.split(".")
            base: Any = {"driver": "file", "path": f"{root}/"}
            place = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if database else {
                **base, "path": f"{root}/{name}/"}  # fmt: skip
            store = tensorstore.open(
                {"driver": driver, "kvstore": place}, create=True, dtype=array.dtype,
                shape=array.shape,
            ).result()  # fmt: skip
            store.write(array).result()
            tree[str(keys)] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
            }
        metadata = {"tree_metadata": tree, "use_ocdbt": database, "use_zarr3": driver == "zarr3"}
        (root / "_METADATA").write_text(json.dumps(metadata))
        files = sorted(one for one in root.rglob("*") if one.is_file())
        files.sort(key=lambda one: one.name != "_METADATA")
        return {f"x/{one.relative_to(root)}": one.read_bytes() for one in files}

    return make


SAMPLES: dict[str, dict[str, Callable[[Path], Files]]] = {
    "safetensors": {"plain": written("a.safetensors"), "own": own},
    "shards": {"safetensors": sharded(".safetensors"), "torch": sharded(".bin")},
    "npz": {"stored": written("a.npz"), "deflated": npz, "others": npz_others},
    "torch": {"plain": written("a.pt"), "saved": torch_saved},
    "torch before 1.6": {"saved": torch_before_1_6},
    "torch distributed": {"one process": distributed, "two": two_processes},
    "msgpack": {"flax": flax_saved},
    "gguf": {"all types": gguf},
    "hdf5": {"old": h5(False), "latest": h5(True)},
    "hdf5 shards": {"two": sharded(".h5")},
    "keras": {"old": keras(h5(False), zipfile.ZIP_DEFLATED),
              "three": keras(keras_weights, zipfile.ZIP_STORED)},
    "keras weights": {"three": keras_weights},
    "whole h5": {"two": whole_h5},
    "onnx": {"both": onnx},
    "tensorflow": {"objects": tensorflow(True), "names": tensorflow(False)},
    "orbax": {f"{driver}{' database' * base}": orbax(driver, base)
              for driver in ("zarr", "zarr3") for base in (False, True)},
}  # fmt: skip
HDF5 = ("hdf5", "hdf5 shards", "keras", "keras weights", "whole h5")
NEEDS = {
    "torch before 1.6": "torch", "torch distributed": "torch", "msgpack": "flax", "gguf": "gguf",
    "orbax": "tensorstore", **dict.fromkeys(HDF5, "h5py"),
}  # fmt: skip
LOADED = {"orbax": "tensorstore", "gguf": "gguf", **dict.fromkeys(HDF5, "h5py")}
"""The library that reads a format, which is loaded before its files are."""


def installed(name: str) -> bool:
    """Whether the library that reads a format is installed."""
    return name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None
