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
PLAIN_CODECS = ("bytes", "transpose", "crc32c", "sharding_indexed")
"""The codecs of Zarr 3 whose result has the size that the array's shape says."""
BLOSC_HEADER = 16


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
        self._blosc: dict[str, bool] = {}
        self._stored_bytes = sum(one.stat().st_size for one in self.files())
        keys = self._keys()
        tensorstore = require_library("tensorstore", path, "orbax")
        try:
            specs = {name: self._spec(parts) for name, parts in keys.items()}
            places = {n: tensorstore.KvStore.open(s["kvstore"]) for n, s in specs.items()}
            file = "zarr.json" if self._driver == "zarr3" else ".zarray"
            texts = {name: place.result().read(file) for name, place in places.items()}
            for name, text in texts.items():  # TensorStore's own parser dies of deep ones
                self._blosc[name] = _has_blosc(parse_json(bytes(text.result().value or b"{}")))
            opening = {n: tensorstore.open(s, open=True, read=True) for n, s in specs.items()}
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
            store = self._stores[name]
            if self._blosc[name]:
                shape = store.chunk_layout.read_chunk.shape
                _check_blosc(store.kvstore, math.prod(shape) * store.dtype.numpy_dtype.itemsize)
            array = np.asarray(store.read().result())
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


def _has_blosc(metadata: dict[str, Any]) -> bool:
    """Whether an array's chunks are packed by Blosc, which unfolds a chunk to the size it states.

    The other codecs are unpacked by TensorStore as far as a chunk needs, where there is only one.

    Raises:
        ValueError: several lie in one another.
    """
    if "codecs" not in metadata:  # Zarr 2
        return (metadata.get("compressor") or {}).get("id") == "blosc"
    codecs = [codec["name"] for codec in metadata["codecs"]]
    packing = [name for name in codecs if name not in PLAIN_CODECS]
    if "sharding_indexed" in codecs:
        inner = metadata["codecs"][codecs.index("sharding_indexed")]["configuration"]
        if _has_blosc(inner) or _has_blosc({"codecs": inner.get("index_codecs", [])}):
            raise ValueError("it has chunks within chunks that are packed by Blosc")
        packing = ["sharding_indexed", *packing] if packing else []
    if len(packing) > 1:
        raise ValueError(f"it has chunks that are packed twice, by {' and '.join(packing)}")
    return packing == ["blosc"]


def _check_blosc(chunks: Any, most: int) -> None:
    """Check that no chunk states another size than a chunk has.

    Raises:
        ValueError: one does.
    """
    for key in chunks.list().result():
        head = bytes(chunks.read(key).result().value)[:BLOSC_HEADER]
        size = int.from_bytes(head[4:8], "little")
        if not key.rpartition(b"/")[2].startswith(b".z") and key != b"zarr.json" and size != most:
            raise ValueError(f"a chunk of {most} bytes unpacks to {size}")


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
