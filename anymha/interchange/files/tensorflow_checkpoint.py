"""TensorFlow's checkpoints, and the variables of SavedModels, read by TensorFlow.

Variables have the names that their checkpoint's graph of objects gives them, as
``dense/kernel``; where it gives one name twice, with the path of attributes before it; where it
gives none, the path.

References:
    TensorFlow 2.21, ``tensorflow/python/training/checkpoint_utils.py``, and
    ``tensorflow/core/protobuf/trackable_object_graph.proto``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from anymha.errors import FileError
from anymha.interchange.files.optional import require_library
from anymha.interchange.files.reader import Reader, Tensor, fits_memory
from anymha.text import shown

KIND = "a TensorFlow checkpoint"
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
KINDS = "biufc"


class TensorflowReader(Reader):
    """An open checkpoint of TensorFlow; texts and other things that are no numbers are left out."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KIND)
        prefix = _prefix(path)
        files = sorted(prefix.parent.glob(f"{_escaped(prefix.name)}.data-*"))
        if not files:
            raise self.broken(f"its data, {prefix.name}.data-..., do not lie beside it")
        self._files = [prefix.with_name(f"{prefix.name}.index"), *files]
        stored = sum(file.stat().st_size for file in files)
        tensorflow = require_library("tensorflow", path, "tensorflow")
        try:
            self._checkpoint = tensorflow.train.load_checkpoint(str(prefix))
            shapes = self._checkpoint.get_variable_to_shape_map()
            dtypes = self._checkpoint.get_variable_to_dtype_map()
            names = self._names(list(shapes)) if GRAPH in shapes else {}
        except Exception as error:  # of TensorFlow, which raises nearly every kind
            raise self.broken(f"{shown(error)}".rstrip(".")) from error
        self._keys: dict[str, str] = {}
        tensors = {}
        for key in sorted(shapes):
            dtype = np.dtype(dtypes[key].as_numpy_dtype)
            if key == GRAPH or (dtype.kind not in KINDS and dtype.name != "bfloat16"):
                continue
            name = str(names.get(key, key.removesuffix(VALUE)))
            name = key if name in tensors else name
            self._keys[name] = key
            tensors[name] = Tensor(tuple(int(size) for size in shapes[key]), dtype)
            if not fits_memory(tensors[name].bytes, stored):
                raise self.broken(f"{name!r} claims {tensors[name].bytes} bytes in {stored}")
        self.set_tensors(tensors)

    def _names(self, keys: list[str]) -> dict[str, str]:
        """The variables' own names by their keys, where they tell them apart."""
        module = "tensorflow.core.protobuf.trackable_object_graph_pb2"
        graph = require_library(module, self.path, "tensorflow").TrackableObjectGraph()
        graph.ParseFromString(self._checkpoint.get_tensor(GRAPH))
        named = {
            attribute.checkpoint_key: attribute.full_name.removesuffix(":0")
            for node in graph.nodes
            for attribute in node.attributes
        }
        full = {key: named.get(key) or key.removesuffix(VALUE) for key in keys}
        longer = {
            key: f"{key.removesuffix(VALUE).rpartition('/')[0]}/{name}"
            for key, name in full.items()
        }
        counts, longer_counts = Counter(full.values()), Counter(longer.values())
        names = {key: longer[key] for key in keys if longer_counts[longer[key]] == 1}
        return names | {key: name for key, name in full.items() if counts[name] == 1}

    def _read(self, name: str) -> np.ndarray:
        try:
            array = self._checkpoint.get_tensor(self._keys[name])
        except Exception as error:  # of TensorFlow, which raises nearly every kind
            raise self.broken(f"{name!r}: {shown(error)}".rstrip(".")) from error
        tensor = self.tensors[name]
        return np.array(array, tensor.dtype, order="C").reshape(tensor.shape)

    def files(self) -> list[Path]:
        """The index, and the files of data."""
        return self._files

    def close(self) -> None:
        """Release the checkpoint."""
        self._checkpoint: Any = None


def _prefix(path: Path) -> Path:
    """The checkpoint's name, without the ends of its files' names."""
    if path.name == "saved_model.pb":
        return path.parent / "variables" / "variables"
    return path.with_suffix("") if path.suffix == ".index" else path


def _escaped(name: str) -> str:
    """A name without the special characters of `Path.glob`."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def open_tensorflow(path: Path) -> TensorflowReader:
    """The variables of a checkpoint or a SavedModel.

    Args:
        path: The ``.index`` file, the checkpoint's name without an end, or ``saved_model.pb``.

    Raises:
        FileError: it cannot be read, or is broken; or TensorFlow is missing.
    """
    if not _prefix(path).with_name(f"{_prefix(path).name}.index").is_file():
        raise FileError(f"{shown(path)} cannot be read: the checkpoint's .index file is missing.")
    return TensorflowReader(path)
