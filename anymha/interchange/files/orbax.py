"""Orbax checkpoints, read by TensorStore alone: neither Orbax nor JAX nor Flax is needed.

A checkpoint is a folder with a file ``_METADATA`` that names its arrays, which lie in it as Zarr,
in one OCDBT database or in a folder each. A chunk that is missing is an error, never zeros.

References:
    Orbax 0.12, "Checkpoint format", https://orbax.readthedocs.io.
    TensorStore 0.1.86, drivers "zarr", "zarr3" and "ocdbt".
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from anymha.interchange.files.json_text import parse_json
from anymha.interchange.files.optional import require_library
from anymha.interchange.files.reader import Reader, Tensor, fits_memory, open_stream
from anymha.text import quoted, shown

KIND = "an Orbax"
METADATA = "_METADATA"
MAX_METADATA = 100_000_000
ARRAYS = ("jax.Array", "np.ndarray", "scalar")
KINDS = "biufcV"
SAFE_CHUNKS, CHUNK_BYTES = 10_000, 64


class OrbaxReader(Reader):
    """An open checkpoint. Nested keys are joined by slashes.

    Where each array is the ``value`` of a variable, as in a state of `flax.nnx`, the word is left
    out of the names.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, KIND)
        folder = _folder(path)
        if folder is None:
            raise self.broken(f"neither it nor its folder 'default' has a file {METADATA!r}")
        self._folder = folder.resolve()
        self._stores: dict[str, Any] = {}
        self._stored_bytes = sum(one.stat().st_size for one in self.files())
        keys = self._keys()
        tensorstore = require_library("tensorstore", path, "orbax")
        try:
            opening = {
                name: tensorstore.open(self._spec(parts), open=True, read=True)
                for name, parts in keys.items()
            }
            self._stores = {name: future.result() for name, future in opening.items()}
        except Exception as error:  # of TensorStore, which raises nearly every kind
            raise self.broken(f"{_short(error)}") from error
        self.set_tensors((name, self._tensor(name, one)) for name, one in self._stores.items())

    def _keys(self) -> dict[str, list[str]]:
        """The keys of each array, by its name."""
        stream, _ = open_stream(self._folder / METADATA)
        with stream:
            text = stream.read(MAX_METADATA)
        try:
            metadata = parse_json(text)
            self._database = bool(metadata.get("use_ocdbt", True))
            self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
            self._complete = bool(metadata.get("store_array_data_equal_to_fill_value"))
            keys = {}
            for entry in metadata["tree_metadata"].values():
                value = entry["value_metadata"]
                if value["value_type"] in ARRAYS and not value.get("skip_deserialize"):
                    parts = [str(key["key"]) for key in entry["key_metadata"]]
                    keys["/".join(parts)] = parts
            if all(len(parts) > 1 and parts[-1] == "value" for parts in keys.values()):
                keys = {"/".join(parts[:-1]): parts for parts in keys.values()}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise self.broken(f"its {METADATA!r} is broken ({shown(error)})") from error
        for name, parts in keys.items():
            if any(not part.strip(".") or set(part) & set("/\\\0") for part in parts):
                raise self.broken(f"{quoted(name)} leads out of the folder")
        return keys

    def _spec(self, parts: list[str]) -> dict[str, Any]:
        name = ".".join(parts)
        if self._database:
            base = {"driver": "file", "path": f"{self._folder}/"}
            place = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        else:
            place = {"driver": "file", "path": f"{self._folder / name}/"}
        spec: dict[str, Any] = {"driver": self._driver, "kvstore": place}
        if self._complete:
            spec["fill_missing_data_reads"] = False
        return spec

    def _tensor(self, name: str, store: Any) -> Tensor:
        dtype = np.dtype(store.dtype.numpy_dtype)
        if dtype.kind not in KINDS:
            raise self.broken(f"{quoted(name)} holds {dtype}, not numbers")
        tensor = Tensor(tuple(int(size) for size in store.shape), dtype)
        if not fits_memory(tensor.bytes, self._stored_bytes):
            raise self.broken(f"{quoted(name)} claims {tensor.bytes} bytes in {self._stored_bytes}")
        chunk = [int(size) or 1 for size in store.chunk_layout.read_chunk.shape]
        count = math.prod(-(-size // of) for size, of in zip(tensor.shape, chunk, strict=True))
        chunk_bytes = math.prod(chunk) * dtype.itemsize
        if not fits_memory(chunk_bytes, self._stored_bytes) or count > self._most_chunks():
            raise self.broken(f"{quoted(name)} has {count} chunks of {chunk_bytes} bytes each")
        return tensor

    def _most_chunks(self) -> int:
        """The most chunks of an array; those that are not stored take time all the same."""
        return max(SAFE_CHUNKS, self._stored_bytes // CHUNK_BYTES)

    def _read(self, name: str) -> np.ndarray:
        try:
            array = np.asarray(self._stores[name].read().result())
        except Exception as error:  # of TensorStore, which raises nearly every kind
            raise self.broken(f"{quoted(name)}: {_short(error)}") from error
        tensor = self.tensors[name]
        return np.ascontiguousarray(array, tensor.dtype).reshape(tensor.shape)

    def files(self) -> list[Path]:
        """All files of the folder."""
        return [one for one in self._folder.rglob("*") if one.is_file()]

    def close(self) -> None:
        """Release the arrays."""
        self._stores = {}


def _short(error: Exception) -> str:
    """TensorStore's message, without its specification and its places in the source."""
    return shown(str(error).partition(" [")[0].rstrip("."))


def _folder(path: Path) -> Path | None:
    """The folder of the arrays: the path, or "default" in it, where Orbax's manager writes."""
    return next((one for one in (path, path / "default") if (one / METADATA).is_file()), None)


def open_orbax(path: Path) -> OrbaxReader:
    """The arrays of an Orbax checkpoint.

    Raises:
        FileError: it cannot be read, or is broken; or TensorStore is missing.
    """
    return OrbaxReader(path)
