"""Arrays of every dtype, and files that the formats' own libraries write."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from anymha.interchange.files.formats import create_file
from anymha.interchange.files.reader import Tensor
from tests.frameworks import required

DATA = Path(__file__).parent / "data"

Arrays = dict[str, np.ndarray]
SHAPES = ((3, 4), (), (0, 2), (5,), (2, 1, 3))
BUILTIN = ("float64", "float32", "float16", "int64", "int32", "int8", "uint8", "uint16", "bool")
EXTENDED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def sample(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng([*map(ord, dtype), *shape])
    return np.asarray(rng.standard_normal(shape) * 3).astype(getattr(ml_dtypes, dtype, dtype))


def samples(*dtypes: str, separator: str = ".") -> Arrays:
    """An array of each dtype in each shape."""
    names = [(dtype, shape) for dtype in dtypes for shape in SHAPES]
    return {
        f"{dtype}{separator}of{separator}{'x'.join(map(str, shape))}rank": sample(dtype, shape)
        for dtype, shape in names
    }


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal bit for bit, dtype and shape included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def announced(arrays: Arrays) -> dict[str, Tensor]:
    return {name: Tensor(array.shape, array.dtype) for name, array in arrays.items()}


def write(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> Path:
    """Write a file with anymha."""
    with create_file(path, announced(arrays), metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return path


def by_safetensors(folder: Path) -> tuple[Path, Arrays]:
    arrays = samples(*BUILTIN, "bfloat16")
    safetensors.numpy.save_file(arrays, folder / "a.safetensors", {"format": "pt"})
    return folder / "a.safetensors", arrays


def by_safetensors_in_shards(folder: Path) -> tuple[Path, Arrays]:
    arrays = samples("float32", "float16")
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(arrays)}
    for file in set(files.values()):
        held = {name: arrays[name] for name, where in files.items() if where == file}
        safetensors.numpy.save_file(held, folder / file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return path, arrays


def by_numpy(folder: Path) -> tuple[Path, Arrays]:
    arrays = samples(*BUILTIN) | {"fortran": np.asfortranarray(sample("float32", (3, 4)))}
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz", {name: np.ascontiguousarray(a) if a.ndim else a
                              for name, a in arrays.items()}  # fmt: skip


def by_numpy_compressed(folder: Path) -> tuple[Path, Arrays]:
    arrays = samples(*BUILTIN) | {"zeros": np.zeros((300, 300))}
    np.savez_compressed(folder / "a.npz", **arrays)
    return folder / "a.npz", arrays


def by_torch(folder: Path) -> tuple[Path, Arrays]:
    torch = required("torch")
    arrays = samples("float64", "float32", "int64", "bool", "uint8", "bfloat16", *EXTENDED[1:])
    tensors = {name: as_torch(torch, array) for name, array in arrays.items()}
    base = torch.arange(24.0).reshape(4, 6)
    views = {"view": base[1:3, ::2], "turned": base.T, "parameter": torch.nn.Parameter(base)}
    state = {"model": {**tensors, "views": views}, "step": 3, "rates": [0.1, None, (True, "x")]}
    torch.save(state, folder / "a.pt")
    found = {f"model.{name}": array for name, array in arrays.items()}
    for name, view in views.items():
        found[f"model.views.{name}"] = view.detach().contiguous().numpy()
    return folder / "a.pt", found


def as_torch(torch: Any, array: np.ndarray) -> Any:
    """The same bits as a tensor."""
    dtype = getattr(torch, array.dtype.name)
    tensor = torch.empty(array.shape, dtype=dtype)
    if tensor.numel():
        tensor.view(-1).view(torch.uint8).numpy()[:] = array.reshape(-1).view(np.uint8)
    return tensor


def by_torch_before_1_6(folder: Path) -> tuple[Path, Arrays]:
    torch = required("torch")
    _, arrays = by_torch(folder)
    state = torch.load(folder / "a.pt", weights_only=True)
    torch.save(state, folder / "old.bin", _use_new_zipfile_serialization=False)
    return folder / "old.bin", arrays


def by_torch_in_shards(folder: Path) -> tuple[Path, Arrays]:
    torch = required("torch")
    arrays = samples("float32", "float16")
    files = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(arrays)}
    for file in set(files.values()):
        held = {n: as_torch(torch, arrays[n]) for n, where in files.items() if where == file}
        torch.save(held, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return folder, arrays


def by_torch_distributed(folder: Path) -> tuple[Path, Arrays]:
    """What `torch.distributed.checkpoint.save` writes, in one process."""
    torch = required("torch")
    arrays = samples("float64", "float32", "bfloat16", "int64")
    checkpoint = __import__("torch.distributed.checkpoint", fromlist=["save"])
    state = {"model": {name: as_torch(torch, array) for name, array in arrays.items()}, "step": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        checkpoint.save(state, checkpoint_id=str(folder / "dcp"))
    return folder / "dcp", {f"model.{name}": array for name, array in arrays.items()}


def by_flax(folder: Path) -> tuple[Path, Arrays]:
    required("flax")
    serialization = __import__("flax.serialization", fromlist=["to_bytes"])
    arrays = samples("float32", "float16", "bfloat16", "int8", "bool", separator="/")
    tree: dict[str, Any] = {"step": 3, "rate": np.float32(0.1), "none": None, "words": ["x", 2.5]}
    for name, array in arrays.items():
        *groups, last = name.split("/")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = array
    tree["long"] = np.arange(300.0).reshape(20, 15)
    (folder / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    return folder / "flax_model.msgpack", {**arrays, "long": tree["long"]}


def by_gguf(folder: Path) -> tuple[Path, Arrays]:
    """The plain tensors of a file that the package gguf wrote."""
    path = folder / "sample.gguf"
    path.write_bytes((DATA / path.name).read_bytes())
    return path, {
        "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
        "halves": np.arange(6, dtype=np.float16).reshape(3, 2),
        "bfloats": np.arange(4).reshape(2, 2).astype(ml_dtypes.bfloat16),
        "integers": np.arange(3, dtype=np.int32),
    }


def by_tensorflow(folder: Path) -> tuple[Path, Arrays]:
    tf = required("tensorflow")
    known = samples("float32", "float16", "bfloat16", "int64", separator="/")
    arrays = {name.replace("x", "_"): array for name, array in known.items()}
    # Variables of one list, whose own names the checkpoint keeps besides.
    module = tf.Module()
    module.all = [tf.Variable(array, name=name) for name, array in arrays.items()]
    module.word = tf.Variable("text", name="word")
    return Path(tf.train.Checkpoint(module).write(str(folder / "ckpt"))), arrays


def by_h5py(folder: Path) -> tuple[Path, Arrays]:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    arrays = samples(*BUILTIN[:-1], separator="/")
    with h5py.File(folder / "a.h5", "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
        zipped = sample("float32", (40, 50))
        file.create_dataset("zipped", data=zipped, compression="gzip")
    return folder / "a.h5", {**arrays, "zipped": zipped}


def in_keras_archive(folder: Path) -> tuple[Path, Arrays]:
    inner, arrays = by_h5py(folder)
    with zipfile.ZipFile(folder / "a.keras", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.write(inner, "model.weights.h5")
    return folder / "a.keras", arrays


def by_orbax(folder: Path) -> tuple[Path, Arrays]:
    arrays = {
        "layer/query/kernel": sample("bfloat16", (4, 2, 3)),
        "layer/query/bias": sample("float32", (2, 3)),
        "list/0": sample("int32", (5,)),
        "list/1": sample("float16", (2, 1, 3)),
        "small": sample("float8_e4m3fn", (3, 4)),
    }
    layer = {"kernel": arrays["layer/query/kernel"], "bias": arrays["layer/query/bias"]}
    tree = {"layer": {"query": layer}, "list": [arrays["list/0"], arrays["list/1"]],
            "small": arrays["small"]}  # fmt: skip
    save_orbax(folder / "checkpoint", tree)
    return folder / "checkpoint", arrays


def save_orbax(path: Path, tree: Any, **options: Any) -> None:
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Orbax and what it imports
        orbax = pytest.importorskip("orbax.checkpoint", reason="Orbax is not installed")
        jax = required("jax")
        orbax.PyTreeCheckpointer(**options).save(path, jax.tree.map(jax.numpy.asarray, tree))


def by_onnx(folder: Path) -> tuple[Path, Arrays]:
    arrays = {
        "query.kernel": np.arange(24, dtype=np.float32).reshape(4, 6),
        "floats": np.array([1, 2.5], np.float32),
        "doubles": np.array([1, 2.5]),
        "halves": np.array([1, -2.5, 0.1], np.float16),
        "bfloats": np.array([1, -2.5], ml_dtypes.bfloat16),
        "integers": np.array([-1, 5, 2**40]),
        "bytes": np.array([-1, 5], np.int8),
        "scalar": np.array(3, np.float32),
        "eights": np.array([1, -2], ml_dtypes.float8_e4m3fn),
    }
    path = folder / "initializers.onnx"
    path.write_bytes((DATA / path.name).read_bytes())
    return path, arrays


WRITTEN: dict[str, Callable[[Path], tuple[Path, Arrays]]] = {
    "safetensors": by_safetensors,
    "shards": by_safetensors_in_shards,
    "npz": by_numpy,
    "npz compressed": by_numpy_compressed,
    "torch": by_torch,
    "torch before 1.6": by_torch_before_1_6,
    "torch shards": by_torch_in_shards,
    "torch distributed": by_torch_distributed,
    "msgpack": by_flax,
    "tensorflow": by_tensorflow,
    "h5": by_h5py,
    "keras": in_keras_archive,
    "orbax": by_orbax,
    "onnx": by_onnx,
}
"""Files that other libraries write, and what they hold."""
