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


def sharded(folder: Path) -> Files:
    halves: list[dict[str, np.ndarray]] = [{}, {}]
    for number, (name, array) in enumerate(arrays().items()):
        halves[number % 2][name] = array
    files, places = {}, {}
    for number, half in enumerate(halves):
        file = f"m-{number}.safetensors"
        with create_file(
            folder / file, {n: Tensor(a.shape, a.dtype) for n, a in half.items()}
        ) as w:
            for name, array in half.items():
                w.write(name, array)
        files[file] = (folder / file).read_bytes()
        places |= dict.fromkeys(half, file)
    index = json.dumps({"metadata": {"total_size": 9}, "weight_map": places}).encode()
    return {"m.safetensors.index.json": index, **files}


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


def flax_saved(folder: Path) -> Files:
    import flax.serialization  # noqa: PLC0415  installed where it is called

    return {"a.msgpack": flax.serialization.to_bytes({"x": arrays(), "step": 3})}


def gguf(folder: Path) -> Files:
    return {"a.gguf": (DATA / "sample.gguf").read_bytes()}


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


def keras(folder: Path) -> Files:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", h5(False)(folder)["a.weights.h5"])
    return {"a.keras": stream.getvalue()}


def field(number: int, content: bytes | int) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(content, int):
        return bytes([number << 3]) + varint(content)
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(number: int) -> bytes:
    head = b""
    while number > 0x7F:
        head += bytes([number & 0x7F | 0x80])
        number >>= 7
    return head + bytes([number])


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
    "shards": {"two": sharded},
    "npz": {"stored": written("a.npz"), "deflated": npz},
    "torch": {"plain": written("a.pt"), "saved": torch_saved},
    "torch before 1.6": {"saved": torch_before_1_6},
    "torch distributed": {"one process": distributed},
    "msgpack": {"flax": flax_saved},
    "gguf": {"all types": gguf},
    "hdf5": {"old": h5(False), "latest": h5(True)},
    "keras": {"old": keras},
    "onnx": {"both": onnx},
    "orbax": {f"{driver}{' database' * base}": orbax(driver, base)
              for driver in ("zarr", "zarr3") for base in (False, True)},
}  # fmt: skip
NEEDS = {
    "torch before 1.6": "torch", "torch distributed": "torch", "msgpack": "flax", "gguf": "gguf",
    "hdf5": "h5py", "keras": "h5py", "orbax": "tensorstore",
}  # fmt: skip


def installed(name: str) -> bool:
    """Whether the library that reads a format is installed."""
    return name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None
