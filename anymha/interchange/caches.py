"""Caches and memories carried from one framework to another, and in files.

In a file their arrays have the names of their attributes, and the metadata says the rest, in the
entry of anymha's own files: ``{"format": 2, "kind": "cache", "max_length": 8, "window": null}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from anymha.errors import ArgumentError, FileError
from anymha.framework.registry import as_numpy, get_ops
from anymha.interchange.files.reader import Reader, Tensor
from anymha.layer.cache import Cache, Memory, flatten_linked, known_lengths
from anymha.text import shown

KINDS: dict[str, type[Any]] = {"cache": Cache, "memory": Memory}
FORMAT = 2
"""The format of files with a cache or a memory; files with layers have 1."""
FLOATING = frozenset({"float16", "bfloat16", "float32", "float64"})
INTEGERS = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})


def is_held(value: Any) -> bool:
    """Whether it is a cache or a memory."""
    return isinstance(value, (Cache, Memory))


def check_is_single(value: Any) -> None:
    """Refuse the caches of several layers in one.

    Raises:
        ArgumentError: there are some in `value`.
    """
    parts = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (list, tuple, Mapping)) and any(map(is_held, parts)):
        raise ArgumentError(
            "One cache or one memory is written or converted at a time. Received: several, in a "
            f"{type(value).__name__}. Go through them, each with a file of its own."
        )


def converted(value: Any, to: str) -> Any:
    """A cache or a memory in arrays of its own, of another home or the same one.

    Raises:
        UnknownBackendError: no home has this name.
        BackendNotInstalledError: its framework is not installed.
    """
    get_ops(to)
    return _made(type(value), arrays_of(value), static_of(value), to)


def arrays_of(value: Any) -> dict[str, np.ndarray]:
    """Copies of the arrays of a cache or a memory, in NumPy, by name."""
    leaves, (names, _) = flatten_linked(value)
    return {n: np.array(as_numpy(x), order="C") for n, x in zip(names, leaves, strict=True)}


def static_of(value: Any) -> dict[str, Any]:
    """What a cache or a memory consists of besides arrays."""
    return {name: getattr(value, name) for name in type(value).STATIC}


def entry_of(value: Any) -> dict[str, Any]:
    """The entry in the metadata of a file with a cache or a memory."""
    (kind,) = [name for name, one in KINDS.items() if isinstance(value, one)]
    return {"format": FORMAT, "kind": kind, **static_of(value)}


def is_entry(entry: Any) -> bool:
    """Whether an entry is of a file with a cache or a memory."""
    return isinstance(entry, Mapping) and entry.get("format") == FORMAT and "kind" in entry


def read(reader: Reader, entry: Mapping[str, Any], backend: str) -> Any:
    """The cache or the memory in a file.

    Raises:
        FileError: the file does not hold what its entry says.
    """
    static = {name: value for name, value in entry.items() if name not in ("format", "kind")}
    kind = KINDS.get(entry["kind"]) if isinstance(entry["kind"], str) else None
    reason = "it is of no known kind"
    if kind is not None:
        reason = _fault(kind, reader.tensors, static)
    if kind is None or reason:
        raise FileError(f"{shown(reader.path)} is broken: {reason}.")
    arrays = {name: reader.read(name) for name in reader.tensors}
    if kind is Cache and not _fit(arrays, static):
        raise FileError(f"{shown(reader.path)} is broken: lengths do not fit its sizes.")
    return _made(kind, arrays, static, backend)


def _made(
    kind: type[Any], arrays: Mapping[str, np.ndarray], static: Mapping[str, Any], backend: str
) -> Any:
    ops = get_ops(backend)
    own = {name: ops.from_numpy(x) for name, x in arrays.items()}
    value = kind(**dict.fromkeys(kind.ARRAYS) | own, **static)
    if kind is Cache:
        known = known_lengths(ops, value)
        if known is not None:
            value._own(known)
    return value


def _fault(kind: type[Any], tensors: Mapping[str, Tensor], static: Mapping[str, Any]) -> str:
    """What is wrong with names, shapes and dtypes; nothing where they are those of a cache."""
    if set(static) != set(kind.STATIC) or not set(tensors) <= set(kind.ARRAYS):
        return "it has other parts than a cache or a memory"
    needed = {"keys", "values"}
    if kind is Cache:
        needed |= {"lengths", "previous", "overflowed"}
        needed |= set() if static["window"] is None else {"starts"}
    if not needed <= set(tensors) or ("starts" in tensors) > ("starts" in needed):
        return "it has not the arrays of a cache or a memory"
    keys, values = tensors["keys"], tensors["values"]
    if len(keys.shape) != 4 or len(values.shape) != 4 or keys.shape[:3] != values.shape[:3]:
        return "keys and values do not have shapes (B, K, C, d_k) and (B, K, C, d_v)"
    batch, _, size, _ = keys.shape
    rows = {"lengths", "previous", "overflowed", "starts"}
    for name, tensor in tensors.items():
        wanted: Any = {(batch,)} if name in rows else {(batch, size)}
        dtypes: Any = {"int32"} if name in rows else INTEGERS
        if name in ("keys", "values"):
            wanted, dtypes = {tensor.shape}, FLOATING & {keys.dtype.name}
        elif name == "overflowed":
            dtypes = {"bool"}
        elif kind is Memory:
            wanted |= {(1, size)}
        if tensor.shape not in wanted or tensor.dtype.name not in dtypes:
            return f"`{name}` has dtype {tensor.dtype} and shape {tensor.shape}"
    if kind is Cache:
        most, window = static["max_length"], static["window"]
        numbers = all(type(n) is int and 0 < n < 2**31 for n in (most, window or 1))
        if not numbers or not (size == most if window is None else window <= size < most):
            return "the number of its slots is not that of its `max_length` and `window`"
    return ""


def _fit(arrays: Mapping[str, np.ndarray], static: Mapping[str, Any]) -> bool:
    """Whether the counts of a cache are such as calls leave them."""
    lengths, before = arrays["lengths"], arrays["previous"]
    starts = arrays.get("starts", np.zeros_like(lengths))
    size = arrays["keys"].shape[2]
    return bool(
        (lengths <= static["max_length"]).all()
        and (before >= 0).all()
        and (before <= lengths).all()
        and (starts >= 0).all()
        and (starts <= lengths).all()
        and (lengths - starts <= size).all()
    )
